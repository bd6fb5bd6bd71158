"""Names of splits: of folders, of shards, in the column `split` of a list."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from tutelage.data.decode import hidden
from tutelage.data.sources import IMAGE_SUFFIXES, TAR_SUFFIXES
from tutelage.errors import TutelageError, shown

SHARDS = (".parquet", *TAR_SUFFIXES)
_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def split_folders(folders: Sequence[Path]) -> dict[Path, str]:
    """Return the folders that are splits, each with its split; none if these are folders of classes.

    A folder called `train` with images of its own and no folders, beside other folders, holds the images of a class of trains.
    """
    named = [folder for folder in folders if split_word(folder.name)]
    named = [folder for folder in named if not (len(named) < len(folders) and _flat(folder))]
    splits = splits_among(folder.name for folder in named)
    return {folder: splits[folder.name] for folder in named if splits}


def splits_among(names: Iterable[str]) -> dict[str, str]:
    """Return the names that are splits, each with its split. Names like `training` and `val2017` count only beside another split: alone,
    they may be classes or groups."""
    found = {name: split for name in names if (split := split_word(name))}
    return found if any(name.lower() in _SPLITS for name in found) or len({*found.values()}) > 1 else {}


def _flat(folder: Path) -> bool:
    """Whether a folder holds images and neither folders nor shards."""
    names = [item.name.lower() for item in folder.iterdir() if not hidden(item.name)]
    whole = not any(item.is_dir() for item in folder.iterdir()) and not any(name.endswith(SHARDS) for name in names)
    return whole and any(name.endswith(IMAGE_SUFFIXES) for name in names)


def split_word(name: str) -> str:
    """Return the split that a name says, such as train, Training, train_set, val2017; else an empty text."""
    word = re.fullmatch(
        r"(train|valid|val|validation|test)(?:ing)?[-_ ]?(?:set|split|data|images)?[-_ ]?(?:\d{4})?", name.lower()
    )
    return _SPLITS[word[1]] if word else ""


def split_of_shard(shard: Path) -> str:
    """Return the split that the name of a shard begins with, or train."""
    named = re.match(r"(train|test|validation|valid|val)(?:ing)?(?=[-_.])", shard.name.lower())
    return _SPLITS[named[1]] if named else "train"


def unknown_splits(place: Path, splits: Iterable[str]) -> list[TutelageError]:
    """Return an error for values of the column split that name none."""
    unknown = sorted({split for split in splits if split and not split_word(split)})
    message = f"{place}: column split holds {shown(map(repr, unknown))} instead of {', '.join(_SPLITS)}"
    return [TutelageError(message, "rename these splits, or drop the column")] if unknown else []
