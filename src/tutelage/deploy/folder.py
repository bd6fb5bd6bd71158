"""The export folder: made beside its place, moved there when it is whole and proven; an old one that was changed by hand is kept."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from tutelage.deploy.runtime import EXPORT, changed_files
from tutelage.run_folder import TEMPORARY, read_json, write_json


@contextlib.contextmanager
def staged(place: Path) -> Iterator[Path]:
    """An empty folder to write an export to. Nothing of it stays, and the old export is untouched, unless `settle` is called."""
    folder = place.with_name(f"{place.name}.{os.getpid()}{TEMPORARY}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def settle(folder: Path, place: Path, about: dict[str, Any]) -> Path | None:
    """Write export.json with the hash of every file, and put the folder in its place.

    Args:
        folder: from `staged`. place: where it goes. about: the rest of export.json.

    Returns:
        where the old export is now, if it had been changed by hand; else it is gone.
    """
    write_json(folder / EXPORT, {"files": hashes(folder), **about})
    old = None
    if place.exists():
        old = place.with_name(f"{place.name}.old-{datetime.now():%Y%m%d-%H%M%S-%f}")
        place.rename(old)
    folder.rename(place)
    if old is not None and not changed_by_hand(old):
        shutil.rmtree(old)
        old = None
    return old


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 (hex) of each file of a folder, by name."""
    import hashlib

    paths = sorted(path for path in folder.iterdir() if path.is_file() and path.name != EXPORT)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def changed_by_hand(folder: Path) -> bool:
    """Whether an export holds anything else than what was written."""
    try:
        about = read_json(folder / EXPORT)
        files = about["files"]
    except (json.JSONDecodeError, TypeError, KeyError):
        return True
    more = {path.name for path in folder.iterdir()} - {*files, *about.get("added", ()), EXPORT}
    return bool(changed_files(folder, files) or more)
