"""The labelled images of one path, as its reader returns them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tutelage.data.decode import hidden
from tutelage.data.sources import ImageRef, Rejected
from tutelage.data.walk import OTHER, kind_of_file
from tutelage.errors import shown

LISTS = (".csv", ".tsv")


@dataclass(frozen=True, slots=True)
class LabelledRef:
    """One labelled image: its class by name, its split (train, val or test), its group ("" = none)."""

    ref: ImageRef
    label: str
    split: str = "train"
    group: str = ""
    mask: ImageRef | None = None  # instead of a class


@dataclass
class LabelledPlace:
    """The labelled images of one path.

    names: the classes in the order of its metadata, or empty. empty: class folders without images. inside: class folder, such as cat or
    train/cat -> the folders inside it that hold images ("" for itself), with their numbers of images.
    """

    images: list[LabelledRef] = field(default_factory=list)
    names: tuple[str, ...] = ()
    empty: list[str] = field(default_factory=list)
    inside: dict[str, Counter[str]] = field(default_factory=dict)
    rejected: list[Rejected] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def files_beside(folder: Path, read: Sequence[Path], what: str) -> list[str]:
    """Return a note that names the images, lists, Parquet files, tars and archives of a folder that are not among those that are read.

    what: is read instead.
    """
    files = [one for one in sorted(folder.iterdir()) if one.is_file() and one not in read and not hidden(one.name)]
    others = [one.name for one in files if one.suffix.lower() in LISTS or kind_of_file(str(one)) != OTHER]
    return [f"{folder}: files beside {what} that are not read: {shown(others)}"] if others else []
