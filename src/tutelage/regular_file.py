"""Read files that others may have put there: only regular ones, and JSON however odd it is. predict.py of an export holds this code too."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any


def regular(path: str | Path) -> os.stat_result:
    """Return the status of a regular file. Raises OSError for anything else: reading a pipe or a device might never end."""
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return status


def bytes_in(path: str | Path) -> bytes:
    """Return the bytes of a regular file. Raises OSError: there is none, or it is something else."""
    regular(path)
    return Path(path).read_bytes()


def text_in(path: str | Path, encoding: str = "utf-8") -> str:
    """Return the text of a regular file. Raises OSError: there is none, or it is something else; UnicodeDecodeError: another encoding."""
    regular(path)
    return Path(path).read_text(encoding=encoding)


def json_of(text: str | bytes) -> Any:  # whatever the text holds
    """Parse JSON. Raises ValueError: it is not JSON, or is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
