"""The labelled images of one path, as its reader returns them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from tutelage.data.sources import ImageRef, Rejected


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
