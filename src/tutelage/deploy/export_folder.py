"""Write an export folder: staged beside its place, moved there once complete and checked; a hand-changed old one is kept."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from tutelage.data.decode import file_digest
from tutelage.deploy.runtime import EXPORT, changed_files, listed
from tutelage.errors import TutelageError
from tutelage.files import hash_of, temporary_beside, unused_beside, write_json
from tutelage.json_object import JSON


@contextlib.contextmanager
def staged(place: Path) -> Iterator[Path]:
    """Yield an empty folder to write an export to. It is deleted, and the old export untouched, unless `settle` is called."""
    folder = temporary_beside(place)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def settle(folder: Path, place: Path, about: JSON) -> Path | None:
    """Write export.json with the hash of every file, and move the folder to its place.

    Args:
        folder: from `staged`. place: where it goes. about: the rest of export.json.

    Returns:
        the new path of the old export if it had been changed by hand; else None, and the old export is deleted.
    """
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    write_about(folder, {"files": {path.name: file_digest(path) for path in paths}, **about})
    old = None
    if place.exists():
        old = unused_beside(place, "old")
        place.rename(old)
    try:
        folder.rename(place)
    except OSError:
        if old is not None:
            old.rename(place)
        raise
    if old is not None and not changed_by_hand(old):
        old.unlink() if old.is_symlink() else shutil.rmtree(old)  # what a link leads to lies elsewhere and stays
        old = None
    return old


def write_about(folder: Path, about: JSON) -> None:
    """Write export.json with a hash of what it says."""
    about = {name: value for name, value in about.items() if name != "hash"}
    write_json(folder / EXPORT, {**about, "hash": hash_of(about)})


def changed_by_hand(folder: Path) -> bool:
    """Whether an export folder differs from what was written to it."""
    try:
        about = listed(folder)
    except TutelageError:
        return True
    said = {name: value for name, value in about.items() if name != "hash"}
    if about.get("hash") != hash_of(said) or changed_files(folder, about["files"]):
        return True
    return bool({path.name for path in folder.iterdir()} - {*about["files"], *about.get("added", ()), EXPORT})
