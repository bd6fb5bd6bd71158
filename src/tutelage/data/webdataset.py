"""Labels inside tars as WebDataset and img2dataset write them: `000.jpg` beside `000.cls`, or beside `000.json` with a key `label`."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Container, Mapping
from pathlib import Path, PurePosixPath

from tutelage.data.decode import hidden
from tutelage.data.sources import TAR_SUFFIXES, clean
from tutelage.errors import TutelageError, shown
from tutelage.regular_file import json_of, regular

LABEL_KEYS = ("label", "cls", "class", "class_name")  # of the .json beside an image, the first that is there
MOST = 1 << 20  # bytes of a .cls or .json; larger ones are ignored


def tars_of(folder: Path) -> list[Path]:
    """Return the tars that lie directly in a folder, in the order of their names."""
    found = (one for one in folder.iterdir() if one.name.lower().endswith(TAR_SUFFIXES) and not hidden(one.name))
    return sorted(one for one in found if one.is_file())


def labels_of(tar: Path) -> dict[str, str]:
    """Return the labels of a tar: name of a member without its ending, with folders -> the label, a number or a class name, as text.

    Of a tar that breaks off, the labels before that; the image listing (sources.py) says that it is broken.
    """
    found: dict[str, dict[str, str]] = {"json": {}, "cls": {}}
    try:
        regular(tar)
        with tarfile.open(tar, errors="surrogateescape") as members:
            while (member := members.next()) is not None:
                members.members.clear()  # type: ignore[attr-defined]  # tarfile would keep all of them
                name = str(PurePosixPath(clean(member.name)))
                stem, _, ending = name.rpartition(".")
                passed_over = any(map(hidden, name.split("/"))) or not member.isreg() or member.size > MOST
                if passed_over or ending.lower() not in ("cls", "json"):
                    continue
                file = members.extractfile(member)
                try:
                    text = "" if file is None else file.read().decode("utf-8-sig")
                except UnicodeDecodeError as error:
                    message = f"{tar}: {shown([clean(member.name)])} is not UTF-8: {error.object[:80]!r}"
                    raise TutelageError(message, "write the labels again in UTF-8") from None
                label = text.strip("\r\n") if ending.lower() == "cls" else _in_json(text)
                if label.strip():
                    found[ending.lower()][stem] = label
    except (tarfile.TarError, OSError, EOFError, zlib.error):
        pass
    # What a .json says may be a name where the .cls is a number: the .cls counts wherever there is one.
    return found["json"] | found["cls"]


def label_of(labels: Mapping[str, str], image: str, members: Container[str] = ()) -> str:
    """Return the label of a member; "" without one. By the name up to its last dot or, as in WebDataset, up to its first.

    members: stems of all images: 0.seg.png beside 0.jpg is a mask or another picture of the sample, not one more image of its class.
    """
    stem, key = key_of(image)
    return labels.get(stem) or ("" if key != stem and key in members else labels.get(key, ""))


def key_of(image: str) -> tuple[str, str]:
    """Return the name of a member without what follows its last dot, and without what follows its first."""
    path = PurePosixPath(image)
    return str(path.with_suffix("")), str(path.with_name(path.name.partition(".")[0]) if path.name[0] != "." else path)


def _in_json(text: str) -> str:
    try:
        about = json_of(text)
    except ValueError:
        return ""
    found = [about[key] for key in LABEL_KEYS if isinstance(about, dict) and key in about]
    label = found[0] if found else ""
    if isinstance(label, float) and label.is_integer():  # as pandas writes numbers
        label = int(label)
    return str(label) if isinstance(label, (str, int)) and not isinstance(label, bool) else ""
