"""Files that are written completely or not at all, and are checked when they are read back.

A file is written under a temporary name and then renamed, so a killed process leaves the old file or the new one, never a part. Temporary
names begin with a word that nobody else uses, and only files and folders with such names are ever cleared away.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import secrets
import shutil
import tomllib
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import tomli_w

from tutelage.errors import TutelageError
from tutelage.json_object import JSON
from tutelage.regular_file import json_of, regular, text_in

TEMPORARY = ".tutelage-partial-"  # what the names of files and folders being written begin with


def hash_of(value: object) -> str:
    """Return the SHA-256 (hex) of a JSON-like value in canonical form; it identifies the inputs of a stage."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def temporary_beside(path: Path) -> Path:
    """Return an unused path in the folder of `path`, for what is to become `path`, however long its name is."""
    return path.with_name(f"{TEMPORARY}{secrets.token_hex(12)}")  # several machines may share a cache


def unused_beside(path: Path, why: str) -> Path:
    """Return an unused path beside `path`, for what is moved aside: its name, cut where it is too long, with why and when."""
    short = path.name
    while len(os.fsencode(short)) > 200:
        short = short[:-1]
    name = f"{short}.{why}-{datetime.now():%Y%m%d-%H%M%S}"
    found = (path.with_name(f"{name}-{number}" if number else name) for number in itertools.count())
    return next(place for place in found if not place.exists())


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left half-written in a folder that no other process writes to."""
    for path in list(folder.rglob(f"{TEMPORARY}*")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it when the block succeeds, remove it when it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        yield temporary
        with temporary.open("rb+") as file:  # Windows writes back only what is open for writing
            os.fsync(file.fileno())
        temporary.replace(path)
    except Exception as error:
        if no_room(error, path.parent):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def no_room(error: Exception, folder: Path) -> bool:
    """Whether a write failed for lack of space; safetensors, NumPy and Arrow each raise their own exceptions for it."""
    if isinstance(error, TutelageError):
        return False
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)
    return full or shutil.disk_usage(folder).free < 2**14


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, completely or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: object) -> None:
    """Write a JSON file, completely or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def files_below(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield the files below a folder, each with its status; those that another process removes meanwhile are left out."""
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            with contextlib.suppress(OSError):
                yield path, path.stat()


def read_json(path: Path) -> Any:  # a JSON object, whose values depend on the file
    """Return the content of a JSON file, an object; None if it does not exist.

    Raises:
        TutelageError: it is damaged.
    """
    try:
        if isinstance(found := json_of(text_in(path)), dict):
            return found
        raise ValueError("a JSON object is expected")
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:  # no JSON, no text, no file
        raise damaged(path, error) from error


def damaged(path: Path, error: object) -> TutelageError:
    """Return the error for a file of ours that holds something else."""
    hint = "restore it, or remove the folder that holds it and repeat `tutelage run`"
    return TutelageError(f"{path} is not as tutelage wrote it: {error}", hint)


def toml_of(text: str) -> JSON:
    """Parse TOML. Raises ValueError: it is none, or is nested too deeply."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def toml(tables: JSON) -> str:
    """Return nested dicts of text, numbers, booleans and lists as TOML; None values are left out."""
    return tomli_w.dumps(_without_none(tables))


def _without_none(table: JSON) -> JSON:
    return {k: _without_none(v) if isinstance(v, dict) else v for k, v in table.items() if v is not None}


def file_hash(path: Path) -> str:
    """Return the SHA-256 (hex) of a file."""
    regular(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def intact(path: Path, stage: Path | None = None) -> Path:
    """Return the path of a file of a run's stage, after a comparison with its hash in the stage's result.json, if the stage is finished.

    Args:
        path: of the file. stage: the stage's folder, if the file lies elsewhere.

    Raises:
        TutelageError: the file is missing, or not the one that the stage wrote.
    """
    result = (stage or path.parent) / "result.json"
    hashes = (read_json(result) or {}).get("files", {})
    if not isinstance(hashes, dict):
        raise damaged(result, "`files` is not a JSON object")
    name = path.relative_to(stage.parent).as_posix() if stage else path.name
    if not path.is_file() or hashes.get(name, digest := file_hash(path)) != digest:
        message = f"{path} is {'not the file that the run wrote' if path.is_file() else 'missing'}"
        raise TutelageError(
            message, f"put it back, or delete {stage or path.parent} and repeat the command that made the run"
        )
    return path
