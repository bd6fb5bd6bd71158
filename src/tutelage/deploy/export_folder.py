"""Write an export folder: staged beside its place, moved there once complete and checked; a hand-changed old one is kept."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from tutelage.deploy.runtime import EXPORT, changed_files, file_hash, listed
from tutelage.errors import TutelageError
from tutelage.files import TEMPORARY, write_json
from tutelage.json_object import JSON


@contextlib.contextmanager
def staged(place: Path) -> Iterator[Path]:
    """Yield an empty folder to write an export to. It is deleted, and the old export untouched, unless `settle` is called."""
    folder = place.with_name(f"{place.name}.{os.getpid()}{TEMPORARY}")
    shutil.rmtree(folder, ignore_errors=True)
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
    write_json(folder / EXPORT, {"files": {path.name: file_hash(path) for path in paths}, **about})
    old = None
    if place.exists():
        old = place.with_name(f"{place.name}.old-{datetime.now():%Y%m%d-%H%M%S-%f}")
        place.rename(old)
    folder.rename(place)
    if old is not None and not changed_by_hand(old):
        shutil.rmtree(old)
        old = None
    return old


def changed_by_hand(folder: Path) -> bool:
    """Whether an export folder differs from what was written to it."""
    try:
        about = listed(folder)
    except TutelageError:
        return True
    more = {path.name for path in folder.iterdir()} - {*about["files"], *about.get("added", ()), EXPORT}
    return bool(changed_files(folder, about["files"]) or more)
