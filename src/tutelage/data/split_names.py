"""Names of splits: of folders, of shards, in the column `split` of a list."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tutelage.data.decode import hidden
from tutelage.data.sources import IMAGE_SUFFIXES, SUFFIXES, TAR_SUFFIXES
from tutelage.errors import TutelageError, shown

# Names of folders, in lower case, that say nothing of what is in them: neither a class nor a split.
PLAIN_FOLDERS = (
    *("images", "image", "imgs", "img", "photos", "photo", "pictures", "picture", "pics"),
    *("jpegimages", "jpeg", "jpg", "png"),
    *("data", "files", "originals", "original", "shards", "tars", "parquet"),
)
SHARDS = (".parquet", *TAR_SUFFIXES)
_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def split_folders(folders: Sequence[Path]) -> dict[Path, str]:
    """Return the folders that are splits, each with its split; none if these are folders of classes.

    A folder called `train` with images of its own and no folders, beside other folders, holds the images of a class of trains. A doubled
    folder, `scenes_train/scenes_train`, is the split that its name ends with.
    """
    named = {folder: split for folder in folders if (split := split_word(folder.name) or _doubled_split(folder))}
    named = {folder: split for folder, split in named.items() if len(named) == len(folders) or not _flat(folder)}
    return named if _sure({folder.name: split for folder, split in named.items()}) else {}


def splits_among(names: Iterable[str]) -> dict[str, str]:
    """Return the names that are splits, each with its split. Names like `training` and `val2017` count only beside another split: alone,
    they may be classes or groups."""
    found = {name: split for name in names if (split := split_word(name))}
    return found if _sure(found) else {}


def _sure(splits: Mapping[str, str]) -> bool:
    return any(name.lower() in _SPLITS for name in splits) or len({*splits.values()}) > 1


def holder(split: Path) -> Path:
    """Return the folder that holds what a split's folder is for: that one, or the only folder in it, `train/train` or `train/images`."""
    below = [item for item in split.iterdir() if not hidden(item.name)]
    folders = [item for item in below if item.is_dir()]
    plain = len(folders) == 1 and folders[0].name.lower() in (*PLAIN_FOLDERS, split.name.lower())
    if plain and not _flat(folders[0]) and not any(item.name.lower().endswith(SUFFIXES) for item in below):
        return folders[0]
    return split


def _doubled_split(folder: Path) -> str:
    """Return the split of `scenes_train/scenes_train/<class>`; else an empty text."""
    doubled = (folder / folder.name).is_dir() and holder(folder) == folder / folder.name
    return split_word(re.split("[-_ ]", folder.name)[-1]) if doubled else ""


def _flat(folder: Path) -> bool:
    """Whether a folder holds images and neither folders nor shards."""
    below = [item for item in folder.iterdir() if not hidden(item.name)]
    names = [item.name.lower() for item in below]
    whole = not any(item.is_dir() for item in below) and not any(name.endswith(SHARDS) for name in names)
    return whole and any(name.endswith(IMAGE_SUFFIXES) for name in names)


def split_word(name: str) -> str:
    """Return the split that a name says, such as train, Training, train_set, val2017; else an empty text."""
    word = re.fullmatch(
        r"(train|valid|val|validation|test)(?:ing)?[-_ ]?(?:set|split|data|images)?[-_ ]?(?:\d{4})?", name.lower()
    )
    return _SPLITS[word[1]] if word else ""


def splits_of_shards(shards: Sequence[Path]) -> dict[Path, str]:
    """Return the split that the name of each shard says, such as train-00000-of-00002.parquet; train where none says any.

    A word inside a name, as in cifar10_test.tar, counts only where the shards then are of several splits: it may be about the images.

    Raises:
        TutelageError: some names say a split and others do not, so that test images might be trained on.
    """
    words = {
        one: re.search(r"(?:^|[-_. ])(" + "|".join(_SPLITS) + r")(?:ing)?(?=\d*[-_. ])", one.name.lower())
        for one in shards
    }
    if len({_SPLITS[word[1]] for word in words.values() if word}) < 2:
        words = {one: word if word and not word.start(1) else None for one, word in words.items()}
    without = [one for one, word in words.items() if not word]
    if without and len(without) < len(shards):
        named = next(one.name for one, word in words.items() if word)
        message = f"{without[0].parent}: {shown(one.name for one in without)} says no split, but {named} beside it does"
        raise TutelageError(message, "begin the name of each shard with train, val or test")
    return {one: _SPLITS[word[1]] if word else "train" for one, word in words.items()}


def unknown_splits(place: Path, splits: Iterable[str]) -> list[TutelageError]:
    """Return an error for values of the column split that name none."""
    unknown = sorted({split for split in splits if split and not split_word(split)})
    message = f"{place}: column split holds {shown(map(repr, unknown))} instead of {', '.join(_SPLITS)}"
    return [TutelageError(message, "rename these splits, or drop the column")] if unknown else []
