"""Settings as settings.toml keeps them, and when two values of one are the same."""

from __future__ import annotations

import contextlib
import os

DEFAULT = "default"  # stands for None in settings.toml, since TOML has no null
SHARES = ("val", "test")  # settings that are a share of the images, or a path
PATHS = (
    *SHARES,
    "target",
    "gallery",
    "embeddings",
    "text_embeddings",
    "teacher_weights",
    "student_weights",
    "clip_weights",
)
NO_PATHS = (DEFAULT, "pretrained", "scratch")  # even if there are files of these names


def stored(name: str, value: object) -> object:
    """Return a setting as settings.toml keeps it: paths absolute, so that the same command may be repeated in another folder, shares as
    numbers, None as DEFAULT. A path with what TOML cannot hold stays as it is."""
    if value is None:
        return DEFAULT
    if isinstance(value, list):
        return [stored(name, one) for one in value]
    if not isinstance(value, str) or name not in PATHS or value in NO_PATHS:
        return value
    if name in SHARES:
        with contextlib.suppress(ValueError):
            return float(value)
    absolute = os.path.abspath(value)
    return absolute if os.path.exists(value) and absolute.isprintable() else value


def same_place(one: object, other: object) -> bool:
    """Whether two values of a setting are equal, or name the same file or folder, such as a relative and an absolute path."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_place, one, other))
    if isinstance(one, str) and isinstance(other, str) and one != other:
        return os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)
    return one == other
