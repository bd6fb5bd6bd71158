"""The files that predictions are written to, which replace nothing but what earlier calls wrote. Loads no torch.

What a call has written is recorded, with its hash, in a file beside its table (decode.RECORDS): only files that are as they were written
are replaced or removed, and none of them is taken for an image.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import ModuleType

import numpy as np

from tutelage.data.decode import RECORDS, file_digest, recorded
from tutelage.errors import TutelageError, number_of, shown

ENDINGS = (".csv", ".parquet")
LONGEST = 255  # bytes of a file's name


@dataclass(frozen=True)
class Outputs:
    """out: the table. masks: folder of the painted masks, None for classes. staged: folder where all is written first."""

    out: Path
    masks: Path | None
    staged: Path


def rejected_list(out: Path) -> Path:
    """Return the file beside `out` that lists the images that cannot be read."""
    return out.with_name(f"{out.stem}.rejected.csv")


@contextlib.contextmanager
def outputs(out: Path, masks: bool, images: Sequence[str]) -> Iterator[Outputs]:
    """Check before anything is predicted that the outputs can be written and replace nobody else's files; clear up afterwards.

    Args:
        out: the table. masks: whether masks are painted. images: paths of the images, which the table will hold.

    Raises:
        TutelageError: `out` has another ending or cannot be written; it, the list of rejected images beside it, or the folder of masks
            holds something that earlier predictions did not write.
    """
    folder = out.with_suffix("") if masks else None
    try:
        _check_name(out, images)
        _check_free(out, folder)
        above = next(place for place in out.absolute().parents if place.exists())
        with tempfile.TemporaryFile(dir=above):  # what the file system allows, permissions do not always tell
            pass
        out.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=".tutelage-predicting-", dir=out.parent))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TutelageError(f"--out {out} cannot be written: {reason}", "choose another --out") from error
    try:
        yield Outputs(out, folder, staged)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _check_free(out: Path, folder: Path | None) -> None:
    """Raise an error if the places of the outputs hold anything but what earlier calls wrote there, as they wrote it."""
    there = [path for path in (out, rejected_list(out)) if os.path.lexists(path)]
    if folder is not None and os.path.lexists(folder):
        there += [path for path in folder.rglob("*") if not path.is_dir()] if folder.is_dir() else [folder]
    record = recorded(_record_of(out))
    if others := [path for path in there if not _as_recorded(path, record, out.parent)]:
        what = f"{shown(sorted(map(str, others)), 3)} {'is' if len(others) == 1 else 'are'} there already"
        message = f"--out {out}: {what}, not written by predictions or changed since"
        raise TutelageError(message, "choose another --out, or move that aside")


def _record_of(out: Path) -> Path:
    """Return the record of a table; of one name and another ending it is the same, as the folder of masks is."""
    return out.with_name(RECORDS.replace("*", hashlib.sha256(os.fsencode(out.stem)).hexdigest()[:16]))


def _check_name(out: Path, images: Sequence[str]) -> None:
    if out.suffix.lower() not in ENDINGS:
        example = f"for example --out {out.name or 'predictions'}.csv"
        raise TutelageError(f"--out {out} must end in .csv or .parquet", example)
    if "\0" in str(out):
        raise ValueError("a NUL character in the name")
    if (count := len(os.fsencode(rejected_list(out).name))) > LONGEST:
        message = (
            f"--out {out.name[:40]}... is too long: {rejected_list(out).suffixes[-2]}.csv beside it has {count} bytes"
        )
        raise TutelageError(message, "use a shorter name")
    if out.suffix.lower() == ".parquet":
        _parquet()
        if odd := [path for path in images if not _is_utf8(path)]:
            count = number_of(len(odd), "name of an image is", "names of images are")
            message = f"{count} not UTF-8, which Parquet cannot hold: {shown(map(ascii, odd), 3)}"
            raise TutelageError(f"--out {out}: {message}", "use a .csv, or rename these files")


def _is_utf8(text: str) -> bool:
    try:
        return bool(text.encode())
    except UnicodeEncodeError:
        return False


def _as_recorded(path: Path, record: Mapping[str, Sequence[str]], folder: Path) -> bool:
    digests = record.get(path.relative_to(folder).as_posix(), ())
    return bool(digests) and not path.is_symlink() and file_digest(path) in digests


def _parquet() -> ModuleType:
    try:
        import pyarrow.parquet
    except ImportError:
        raise TutelageError("--out: pyarrow is not installed", "use a .csv, or run `pip install pyarrow`") from None
    return pyarrow.parquet


def write_csv(path: Path, columns: Mapping[str, Sequence[object]]) -> None:
    """Write a table as CSV; booleans are written as true and false."""

    def text(value: object) -> object:
        return str(bool(value)).lower() if isinstance(value, (bool, np.bool_)) else value

    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = csv.writer(file, lineterminator="\n")
        careful = csv.writer(
            file, lineterminator="\n", quoting=csv.QUOTE_ALL
        )  # the other leaves a carriage return bare
        for row in (list(columns), *([text(value) for value in row] for row in zip(*columns.values(), strict=True))):
            (careful if any("\r" in str(value) for value in row) else rows).writerow(row)


def write_predictions(
    place: Outputs, columns: Mapping[str, Sequence[object]], rejected: Sequence[tuple[str, str]]
) -> Path | None:
    """Write the table, beside it a list of the rejected images, and move all that was staged to its place.

    Args:
        place: from `outputs`. columns: of the table, `path` among them. rejected: path and reason of each image that cannot be read.

    Returns:
        the path of the list of rejected images; None if all could be read.

    Raises:
        TutelageError: no image could be read.
    """
    if rejected and not columns["path"]:
        first = shown((f"{name} ({reason})" for name, reason in rejected), 3)
        what = f"none of {len(rejected):,} files can" if len(rejected) > 1 else "the only file cannot"
        raise TutelageError(
            f"{what} be read as an image: {first}", "check the path, or convert these files to JPEG or PNG"
        )
    if place.out.suffix.lower() == ".parquet":
        import pyarrow

        table = pyarrow.table({name: pyarrow.array([*values]) for name, values in columns.items()})
        _parquet().write_table(table, place.staged / place.out.name)
    else:
        write_csv(place.staged / place.out.name, columns)
    listed = rejected_list(place.out) if rejected else None
    if listed:
        lines = {"path": [name for name, _ in rejected], "reason": [why for _, why in rejected]}
        write_csv(place.staged / listed.name, lines)
    _settle(place)
    return listed


def _settle(place: Outputs) -> None:
    """Move the staged files to their place, and remove those of an earlier call. Whenever it is killed, what is there is recorded."""
    _check_free(place.out, place.masks)  # once more: predicting may have taken hours
    folder, old = place.out.parent, recorded(_record_of(place.out))
    paths = [path for path in place.staged.rglob("*") if path.is_file()]
    new = {path.relative_to(place.staged).as_posix(): [file_digest(path)] for path in paths}
    mine = {place.out.name, rejected_list(place.out).name}
    gone = [name for name in old if (name in mine or _below(name, place.masks)) and name not in new]
    _record(place, {**old, **{name: [*old.get(name, []), *digests] for name, digests in new.items()}})
    for name in gone:
        if (folder / name).is_file() and _as_recorded(folder / name, old, folder):
            (folder / name).unlink()
    for name in sorted(new):
        (folder / name).parent.mkdir(exist_ok=True)
        (place.staged / name).replace(folder / name)
    _record(place, {name: digests for name, digests in {**old, **new}.items() if name not in gone})


def _below(name: str, folder: Path | None) -> bool:
    return folder is not None and PurePosixPath(name).parts[:-1] == (folder.name,) and PurePosixPath(name).name != ".."


def _record(place: Outputs, files: Mapping[str, Sequence[str]]) -> None:
    record = _record_of(place.out)
    partial = place.staged / record.name
    partial.write_text(json.dumps({"files": files}, indent=1), encoding="ascii")
    partial.replace(record)
