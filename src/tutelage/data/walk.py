"""What lies in a folder: the only walk of training, evaluation and `predict`. Only the standard library.

- Each real folder is walked once, whatever links lead to it: under its own path if it lies in the place, otherwise under the
  first link that leads to it. A link to a folder that holds the link or the place is not followed.
- Hidden names, folders of storage systems, and what tutelage itself wrote (runs, studies, exports, caches, predictions) are left out.
- A file is an image by its ending or by its first bytes; what else lies there is counted and said.
"""

from __future__ import annotations

import logging
import os
import re
import tomllib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tutelage.data.decode import hidden, predicted_files
from tutelage.data.image_kinds import HEAD, SUFFIXES, UNREAD_SUFFIXES, is_image
from tutelage.errors import TutelageError, shown
from tutelage.regular_file import bytes_in

IMAGE_SUFFIXES = (*SUFFIXES, *UNREAD_SUFFIXES)  # the latter are listed, and rejected when they are read
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
CONTAINERS = (*TAR_SUFFIXES, ".parquet")
ARCHIVES = (".zip", ".7z", ".rar", ".tar.xz", ".txz", ".tar.bz2", ".tbz", ".tbz2", ".tar.zst", ".tzst", ".tar.lz4")
# Never opened to look whether they are images: there may be one beside every image.
_BESIDE = ".txt .json .jsonl .csv .tsv .xml .xmp .yaml .yml .toml .md .html .cls .npy .npz .pt .py .log"
SIDECARS = tuple(_BESIDE.split())
_CACHE = re.compile(r"(images|masks|outputs|embeddings)(-.+)?-[0-9a-f]{24}")
IMAGE, CONTAINER, ARCHIVE, OTHER, CLOSED = "image", "container", "archive", "other", "closed"


@dataclass(frozen=True, slots=True)
class Found:
    """A file, or a folder that cannot be opened. name: below the place. kind: one of those above. reason: why it cannot be opened."""

    path: str
    name: str
    kind: str
    reason: str = ""


def walk(place: str) -> list[Found]:
    """Return all that lies in a folder, in the order of names; what was passed over is logged in one line.

    Raises:
        TutelageError: the folder is, or lies in, a run, an export or a cache of tutelage.
    """
    known: dict[Path, str] = {}
    if ours := _ours_above(place, known):
        message = f"{place} lies in {ours} of tutelage: its pictures are no images of yours"
        raise TutelageError(message, "give the folder of your own images")
    found: list[Found] = []
    seen: set[tuple[int, int]] = set()  # device and inode
    todo, links = deque([(place, "")]), deque[tuple[str, str]]()
    while todo or links:  # what links lead to comes last, so that a link to a folder of the place adds nothing
        folder, prefix = (todo or links).popleft()
        try:
            status = os.stat(folder)
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            found.append(Found(folder, prefix.removesuffix("/"), CLOSED, error.strerror or "unknown"))
            continue
        if (key := (status.st_dev, status.st_ino)) in seen:
            continue
        seen.add(key)
        if prefix and (what := what_is_ours(folder, [entry.name for entry in entries])):
            logging.getLogger("tutelage").info(f"{folder} is {what} of tutelage: its pictures are left out")
            continue
        ours = predicted_files(folder)
        for entry in entries:
            if hidden(entry.name) or entry.name in ours:
                continue
            name = prefix + entry.name
            if not (os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()):
                found.append(Found(entry.path, name, kind_of_file(entry.path)))
            elif not entry.is_symlink():
                todo.append((entry.path, name + "/"))
            elif what := _ours_above(entry.path, known):
                logging.getLogger("tutelage").info(
                    f"{entry.path} leads to {what} of tutelage: its pictures are left out"
                )
            elif not _leads_up(entry.path, place):
                links.append((entry.path, name + "/"))
    _log_others(place, found)
    return sorted(found, key=lambda one: one.name.split("/"))


def kind_of_file(path: str) -> str:
    """Return IMAGE, CONTAINER, ARCHIVE or OTHER: by the ending, else by the first bytes."""
    name = path.lower()
    for kind, endings in ((IMAGE, IMAGE_SUFFIXES), (CONTAINER, CONTAINERS), (ARCHIVE, ARCHIVES), (OTHER, SIDECARS)):
        if name.endswith(endings):
            return kind
    try:
        if not os.path.isfile(path):  # reading a pipe or a device might never end
            return OTHER
        with open(path, "rb") as file:
            return IMAGE if is_image(file.read(HEAD)) else OTHER
    except OSError:
        return OTHER


def what_is_ours(folder: str | Path, names: Sequence[str]) -> str:
    """Return what a folder is that tutelage itself has written (its montages are no images of the user's); else an empty text.

    names: of the files and folders in it.
    """
    if "settings.toml" in names and (".lock" in names or "curate" in names):
        return "a run"
    if "study.toml" in names and is_study(Path(folder, "study.toml")):
        return "a study"
    if "export.json" in names and "preprocess.json" in names:
        return "an export"
    return "a cache" if "about.json" in names and _CACHE.fullmatch(os.path.basename(folder)) else ""


def is_study(path: Path) -> bool:
    """Whether a study.toml is one that `tutelage compare` wrote, a damaged one included; another program may call its own the same."""
    try:
        data = bytes_in(path)
    except OSError:
        return False
    try:
        study = tomllib.loads(data.decode()).get("study")
    except (ValueError, RecursionError):
        return data.startswith(b"[study]")
    return isinstance(study, dict) and "plan" in study


def _ours_above(place: str, known: dict[Path, str]) -> str:
    """Return which run, export or cache a folder is or lies in; "" for none. known: what was found of other folders, which grows."""
    real = Path(place).resolve()
    for folder in (real, *real.parents):
        if folder not in known:
            known[folder] = _marked(folder)
        if known[folder]:
            return f"{folder}, {known[folder]}"
    return ""


def _marked(folder: Path) -> str:
    """As `what_is_ours`, but a study does not count, because its runs do, and a run's settings must name
    tutelage: much may lie below a folder."""
    try:
        what = what_is_ours(folder, os.listdir(folder))
        foreign = what == "a run" and b"tutelage" not in bytes_in(folder / "settings.toml")
    except OSError:
        return ""
    return "" if foreign or what == "a study" else what


def _leads_up(link: str, place: str) -> bool:
    """Return whether a link leads to a folder that holds the link or the place."""
    target = os.path.realpath(link)
    return any(Path(os.path.realpath(one)).is_relative_to(target) for one in (os.path.dirname(link), place))


def _log_others(place: str, found: Sequence[Found]) -> None:
    """Log how many files are no images, and the archives, which are not read."""
    names = {kind: sorted(one.name for one in found if one.kind == kind) for kind in (OTHER, ARCHIVE)}
    files = sum(one.kind != CLOSED for one in found)
    if others := names[OTHER]:
        count = f"{len(others):,} file{'s' if len(others) > 1 else ''} of {files:,}"
        logging.getLogger("tutelage").info(
            f"{count} in {place} {'are no images' if len(others) > 1 else 'is no image'}: {shown(others)}"
        )
    if archives := names[ARCHIVE]:
        logging.getLogger("tutelage").warning(
            f"{place} holds archives that are not read: {shown(archives)}; unpack them, or pack their images as .tar"
        )
