"""Folders inside class folders: whether they are classes, parts of one class or splits is asked, not guessed."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence

from tutelage.data.split_names import PLAIN_FOLDERS, split_word
from tutelage.errors import TutelageError, shown


def folders_inside(places: Iterable[tuple[str, Counter[str]]], names: Sequence[str]) -> TutelageError | None:
    """Return the question what the folders inside class folders are, None if there is nothing to ask.

    Args:
        places: class folders, such as cat or train/cat, each with the folders inside it that hold images ("" for itself) and their
            numbers of images. names: the classes.
    """
    known = frozenset(names)
    asked = _unclear([one for one in places if one[0].rpartition("/")[2] in known])
    if not asked:
        return None
    place, folders = asked[0]
    inside = sorted(folder for folder in folders if folder)
    own = "few images" if folders[""] else "no images"
    message = (
        f"class folder {place} has {own} of its own, but folders of images ({shown(inside, 3)}): one class, or several?"
    )
    return TutelageError(message, _way_out(place, inside, len(asked) == 1, len(names) == 1))


def _unclear(places: list[tuple[str, Counter[str]]]) -> list[tuple[str, Counter[str]]]:
    """Return the class folders whose images lie, most of them, in several folders inside; and those with one such folder, unless most
    other class folders hold their images themselves."""
    several, single = [], []
    for place, folders in places:
        inside = [folder for folder in folders if folder]
        plain = {*PLAIN_FOLDERS, place.rpartition("/")[2].lower()}  # cat/cat and cat/images hold the images of cat
        if folders.total() <= 2 * folders[""]:
            continue
        if len(inside) > 1:
            several.append((place, folders))
        elif not plain.issuperset(inside[0].lower().split("/")):
            single.append((place, folders))
    return several + single if 2 * (len(several) + len(single)) >= len(places) else several


def _way_out(place: str, inside: list[str], alone: bool, one_class: bool) -> str:
    """Return the hint. alone: no other class folder holds such folders. one_class: there is one class in all."""
    split, _, label = place.rpartition("/")
    bare = ["/".join(part for part in one.split("/") if part.lower() not in PLAIN_FOLDERS) or one for one in inside]
    first, last = bare[0], bare[-1].rpartition("/")[2]
    above = [top for top in (one.partition("/")[0] for one in bare) if split_word(top)]
    if not split and (one_class or (above and alone and "/" in first)):
        around = os.path.commonpath([os.path.dirname(f"{label}/{one}") for one in inside])
        return f"give the folder {around} itself, which holds them: --target .../{around}"
    if above:
        name = last if "/" in first else label
        return f"put the splits above the classes: {' and '.join(f'{one}/{name}' for one in sorted({*above}))}"
    group = ".+" if len(inside) == 1 else "(.+)/[^/]+$" if split else "([^/]+)/[^/]+$"
    kept = ", which also keeps each folder's images in one split" if len(inside) > 1 else ""
    renamed = f"; if {label} is a split, call it train, val or test, with the classes in it, such as train/{last}"
    return (
        f"if several, move these folders up, beside {label}; if one, add --group-by '{group}'{kept}"
        f"{'' if split else renamed}; a list (.csv) with the columns path,label settles it too"
    )
