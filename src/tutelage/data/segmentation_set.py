"""The target set of segmentation: images with a mask each, the split of each, and the classes that every mask shows.

Masks are decoded here, because a value that is not a class would silently spoil training.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tutelage.data.decode import size_of
from tutelage.data.image_cache import in_turn, memory_for
from tutelage.data.labelled_place import LabelledRef
from tutelage.data.masks import (
    IGNORE,
    TAKES,
    Colour,
    MaskEncoding,
    Shade,
    colours_count,
    numbered,
    read_values,
    truth_of,
)
from tutelage.data.segmentation_files import FORMS, read_pairs
from tutelage.data.sources import ImageRef, Rejected, missing, read_bytes
from tutelage.data.target_set import TargetSet, _grouped, _held_out, _merge, check_places
from tutelage.errors import TutelageError, Unreadable, number_of, raise_all, shown
from tutelage.image_size import Size, sides


@dataclass(frozen=True)
class _Pair:
    """One image and its mask, which can be read. strange: values that are not a class -> pixels.

    sizes: (height, width) of image and mask. counts: (C,) int64 pixels of each class. truth: hash of the class numbers. palette: colours by
    number, if the mask has any. shades: the numbers in a mask of one channel, and what they show. paletted: as in `masks.Values`. clear:
    whether pixels are transparent.
    """

    image: LabelledRef
    mask: ImageRef
    strange: dict[str, int]
    coloured: bool
    sizes: tuple[tuple[int, int], tuple[int, int]]
    counts: np.ndarray
    truth: bytes
    palette: dict[int, Colour]
    shades: frozenset[Shade]
    paletted: bool
    clear: bool


def read_dense_set(
    target: str | Path,
    *,
    val: str | Path | float | None = None,
    test: str | Path | float | None = None,
    classes: Sequence[str] | None = None,
    group_by: str | None = None,
    size: Size = 1,
) -> TargetSet:
    """Read images and masks and assign each pair to a split. Arguments and splits as in `target_set.read_target_set`.

    Args:
        size: of the student's input; smaller images are reported.

    Raises:
        TutelageError: everything that is wrong, reported at once.
    """
    shares, places, pattern = check_places(target, {"val": val, "test": test}, group_by)
    errors = []
    if classes is not None:
        message = "--classes with --task segmentation is not supported: all classes of classes.txt are used"
        errors.append(TutelageError(message, "set the pixels of the other classes to 255"))
    listings, codings = {}, {}
    for split, place in places.items():
        try:
            listings[split], codings[split] = read_pairs(place)
        except TutelageError as error:
            errors.append(error)
    raise_all(errors)
    coding = codings[""]
    for split, other in codings.items():
        if other.classes != coding.classes:
            message = f"{places[split]} has classes {shown(other.classes)}, but {target} has {shown(coding.classes)}"
            errors.append(TutelageError(message, "use the same classes.txt for both"))
        elif other != coding:
            message = f"{places[split]} and {target} give other colours to the same classes"
            errors.append(TutelageError(message, "use the same classes.txt for both"))
    raise_all(errors)
    images, rejected, notes, ids = _merge(listings, places)
    if pattern:
        images = _grouped(images, pattern)
    images = _held_out(images, shares, notes)
    images = [replace(i, ref=replace(i.ref, id=ids[i.ref.fingerprint])) for i in images]
    pairs, unusable, coloured = _examined(images, coding)
    if not any(image.split == "train" for image in images):
        hint = f"check the names of its folders; tutelage reads {FORMS}"
        errors.append(TutelageError(f"{target} has no train images with a mask", hint))
    raise_all([*errors, *_faults(images, pairs, unusable, coding, coloured, target)])
    made = replace(_numbered(pairs, coding, [*rejected, *unusable]), coloured=coloured)
    raise_all(_lost(made, pairs, target))
    return replace(made, notes=(*notes, *_remarks(made, pairs, sides(size))))


def read_any_dense(target: str | Path, classes: Sequence[str]) -> TargetSet:
    """Read all images and masks of one path, whatever their split, to score a model whose classes are known."""
    if not Path(target).exists():
        raise missing(target)
    listing, coding = read_pairs(Path(target))
    if coding.classes != tuple(classes):
        message = f"{target} has classes {shown(coding.classes)}, but the run's classes are {shown(classes)}"
        raise TutelageError(message, "use the classes.txt of the run's target set")
    pairs, unusable, coloured = _examined(listing.images, coding)
    raise_all(_faults([] if pairs else listing.images, pairs, unusable, coding, coloured, target))
    made = _numbered(pairs, coding, [*listing.rejected, *unusable])
    return replace(made, coloured=coloured, notes=tuple(listing.notes))


def _numbered(pairs: Sequence[_Pair], coding: MaskEncoding, rejected: Sequence[Rejected]) -> TargetSet:
    """Build the target set, a row for each pair."""
    counts = np.array([pair.counts for pair in pairs], np.int64).reshape(len(pairs), len(coding.classes))
    rarity = np.maximum(counts.sum(axis=0), 1)
    return TargetSet(
        "segmentation",
        coding.classes,
        [pair.image.ref for pair in pairs],
        labels=np.where(counts > 0, rarity, np.iinfo(np.int64).max).argmin(axis=1).astype(np.int64),
        splits=np.array([pair.image.split for pair in pairs], np.str_),
        groups=np.array([pair.image.group for pair in pairs], np.str_),
        rejected=tuple(rejected),
        masks=tuple(pair.mask for pair in pairs),
        truths=tuple(pair.truth for pair in pairs),
        pixels=counts,
        colours=_palette(coding, pairs),
        ignored=coding.ignored,
    )


def _examined(images: Sequence[LabelledRef], coding: MaskEncoding) -> tuple[list[_Pair], list[Rejected], bool]:
    """Read every image's header and decode every mask; images whose mask cannot be used are rejected.

    Returns:
        the pairs; the rejected; whether the colours of pixels say the class in all masks, and not their numbers.

    Raises:
        TutelageError: the masks could be meant either way.
    """
    part = [(image, image.mask) for image in images if image.mask]
    sizes = {at: _size(data) for at, data in read_bytes([image.ref for image, _ in part])}
    masks = read_bytes([mask for _, mask in part])  # each container is read once, in its own order
    given = (((at, *part[at], sizes[at], data, coding), memory_for(data, 0, TAKES)) for at, data in masks)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = [*in_turn(pool, lambda one: (one[0], _pair(*one[1:])), given)]
    found = [pair for _, pair in sorted(rows, key=lambda row: row[0])]
    usable = [one for one in found if not isinstance(one, Rejected)]
    coloured = coding.coloured
    if coloured and all(False in one for one in usable):
        coloured = colours_count([one[False].shades for one in usable], coding)
    return [one[coloured] for one in usable], [one for one in found if isinstance(one, Rejected)], coloured


def _pair(
    image: LabelledRef, mask: ImageRef, size: tuple[int, int] | None, data: bytes | Unreadable, coding: MaskEncoding
) -> dict[bool, _Pair] | Rejected:
    """Examine one image and its mask, by the colours of its pixels (True), by their numbers (False), or both.

    Args:
        size: of the image, None if it cannot be read. data: the bytes of the mask.
    """
    try:
        if isinstance(data, Unreadable):
            raise data
        values = read_values(data)
    except Unreadable as reason:
        return Rejected(image.ref.id, f"its mask: {reason}")
    colours, clear, found = values.pixels.ndim == 3, values.clear is not None, {}
    shades = frozenset() if colours else values.shades()
    for coloured in {coding.coloured, coding.coloured and colours}:
        kept, strange = numbered(values, replace(coding, coloured=coloured))
        counts = np.bincount(kept.reshape(-1), minlength=IGNORE + 1)[: len(coding.classes)]
        height, width = kept.shape
        sizes = size or (height, width), (height, width)
        palette = {n: c for n, c in values.colours.items() if values.indexed and n < len(coding.classes)}
        truth = truth_of(kept)
        found[coloured] = _Pair(
            image, mask, strange, colours, sizes, counts, truth, palette, shades, values.paletted, clear
        )
    return found


def _size(picture: bytes | Unreadable) -> tuple[int, int] | None:
    """Return height and width of an image after EXIF rotation; None if it cannot be read, which is reported elsewhere."""
    if isinstance(picture, Unreadable):
        return None
    try:
        return size_of(picture)
    except Exception:  # Pillow's readers raise almost anything on broken data; the store reports it
        return None


def _faults(
    images: Sequence[LabelledRef],
    pairs: Sequence[_Pair],
    unusable: Sequence[Rejected],
    coding: MaskEncoding,
    coloured: bool,
    target: str | Path,
) -> list[TutelageError]:
    """Return what makes masks unusable: splits without any, colours without names, palettes or sizes that differ, values of no class.

    Args:
        images: those whose masks were decoded, of which a split must not lose all. coloured: whether the colours of pixels say the class.
    """
    errors = _emptied(images, pairs, unusable, target)
    if holding := [pair.mask.id for pair in pairs if pair.coloured and not coloured]:
        message = f"{number_of(len(holding), 'mask holds', 'masks hold')} colours, but classes.txt does not say which class each colour is"
        hint = (
            "write `name red green blue` for every class into classes.txt and `ignore red green blue` for colours of no "
            "class, or use masks of class numbers (one channel or a palette, 255 = no class)"
        )
        return [*errors, TutelageError(f"{message}: {shown(holding)}", hint)]
    differ = [] if coding.coloured else _palettes_apart(pairs)
    return [*errors, *_sizes_apart(pairs), *(differ or _strange(pairs, coding, coloured))]


def _emptied(
    images: Sequence[LabelledRef], pairs: Sequence[_Pair], unusable: Sequence[Rejected], target: str | Path
) -> list[TutelageError]:
    """Return errors for splits that had masks before they were decoded and have none that can be used, with the first reasons."""
    reasons, left = {one.id: one.reason for one in unusable}, {pair.image.split for pair in pairs}
    lost: dict[str, list[str]] = defaultdict(list)
    for image in images:
        if image.split not in left:
            lost[f"{image.split} " if left else ""].append(image.ref.id)
    errors = []
    for split, names in lost.items():
        first: dict[str, list[str]] = defaultdict(list)
        for name in names:
            first[reasons[name].removeprefix("its mask: ")].append(name)
        why = shown((f"{reason} ({number_of(len(at), 'mask')}: {shown(at, 2)})" for reason, at in first.items()), 3)
        errors.append(
            TutelageError(
                f"{target} has no {split}mask that can be used, of {len(names)}: {why}",
                "save these masks as PNG of class numbers or of colours, from what they were drawn in: the values that a JPEG has changed "
                "do not come back",
            )
        )
    return errors


def _palettes_apart(pairs: Sequence[_Pair]) -> list[TutelageError]:
    """Return an error if a number is not the same colour in all palettes: each file may number its colours anew, as a GIF does."""
    first: dict[int, tuple[Colour, str]] = {}
    for pair in pairs:
        for shade in sorted(pair.shades, key=lambda one: one.number) if pair.paletted else ():
            if shade.colour is None or shade.number == IGNORE:  # 255 is no class, whatever its colour
                continue
            colour, where = first.setdefault(shade.number, (shade.colour, pair.mask.id))
            if colour != shade.colour:
                message = f"the masks' palettes differ: index {shade.number} is {colour} in {where} and {shade.colour} in {pair.mask.id}"
                hint = (
                    "list the colours in classes.txt, `name red green blue` for every class and `ignore red green blue` for those of no "
                    "class, so that colours count; if the indices are right, save the masks without palettes, in grey"
                )
                return [TutelageError(message, hint)]
    return []


def _sizes_apart(pairs: Sequence[_Pair]) -> list[TutelageError]:
    """Return an error if images and masks differ in size."""
    apart = [
        f"{one.image.ref.id} ({one.sizes[0][0]} x {one.sizes[0][1]}, mask {one.sizes[1][0]} x {one.sizes[1][1]})"
        for one in pairs
        if one.sizes[0] != one.sizes[1]
    ]
    if not apart:
        return []
    count = number_of(len(apart), "image differs from its mask", "images differ from their masks")
    hint = "resize each mask to the size of its image, by nearest neighbour"
    return [TutelageError(f"{count} in height x width: {shown(apart)}", hint)]


def _strange(pairs: Sequence[_Pair], coding: MaskEncoding, coloured: bool) -> list[TutelageError]:
    """Return an error for values that are not a class: which, in how many masks and pixels, and where."""
    where: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for pair in pairs:
        for value, pixels in pair.strange.items():
            where[value].append((pixels, pair.mask.id))
    if not where:
        return []
    ordered = sorted(where.items(), key=lambda item: -sum(n for n, _ in item[1]))
    values = [
        f"{value} in {number_of(len(at), 'mask')} ({number_of(sum(n for n, _ in at), 'pixel')}, most in {max(at)[1]})"
        for value, at in ordered
    ]
    known = "the colours of classes.txt" if coloured else f"0 to {len(coding.classes) - 1}, and 255 for no class"
    hint = _way_of_numbers(pairs, where, coding)
    if coloured:
        hint = "give each to one class in classes.txt, or write `ignore red green blue` for those of no class"
        if len({pair.coloured for pair in pairs}) == 2:
            hint = f"masks of class numbers beside masks of RGB are not read: save all as RGB; {hint}"
    return [TutelageError(f"masks hold values that are not a class ({known}): {shown(values)}", hint)]


def _way_of_numbers(pairs: Sequence[_Pair], strange: Iterable[str], coding: MaskEncoding) -> str:
    """Return what to do about numbers that are not a class, given which numbers the set holds. strange: those that are none, as text."""
    count, unclassed = len(coding.classes), "set these pixels to 255 if they are no class"
    odd = {int(value) if value.isdecimal() else IGNORE for value in strange}
    if max(odd) >= IGNORE:
        return f"{unclassed}, else save the masks in whole numbers: 0 to {count - 1}"
    numbers = odd.union(*(np.flatnonzero(pair.counts).tolist() for pair in pairs))
    if numbers == {*range(1, count + 1)}:
        return "the masks number the classes from 1: subtract 1 from all pixels but those of 255"
    if numbers == {*range(max(numbers) + 1)}:
        less = "; or, if 0 is no class, set it to 255 and subtract 1 from all others" if max(numbers) == count else ""
        named = f"name {len(numbers)} classes in classes.txt, in the order of their numbers from 0"
        return f"{unclassed}, or {named}{less}"
    way = f"{unclassed}, or number the classes from 0 without gaps, a line of classes.txt for each"
    lines = [] if coding.coloured else _lines_of_colours(pairs, numbers)
    return f"{way}; if greys or colours are meant, write them into classes.txt: {shown(lines, 20)}" if lines else way


def _lines_of_colours(pairs: Sequence[_Pair], numbers: Iterable[int]) -> list[str]:
    """Return lines for classes.txt that give each number its colour in the masks; none where colours do not tell the numbers apart."""
    shades = frozenset[Shade]().union(*(pair.shades for pair in pairs))
    colours = {(one.number, one.colour) for one in shades if one.number != IGNORE}
    if None in (colour for _, colour in colours) or len({colour for _, colour in colours}) != len({*numbers}):
        return []
    lines = ["`name {} {} {}`".format(*colour) for _, colour in sorted(colours) if colour]
    return lines + ["`ignore 255 255 255`"] * any(one.number == IGNORE and not one.indexed for one in shades)


def _lost(made: TargetSet, pairs: Sequence[_Pair], target: str | Path) -> list[TutelageError]:
    """Return errors for classes without a pixel in train or in test."""
    errors = []
    for split in ("train", "test"):
        rows = np.flatnonzero(made.splits == split)
        lost = [name for name, seen in zip(made.classes, made.shows(rows).sum(axis=0), strict=True) if not seen]
        if len(rows) and lost:
            which = f"{number_of(len(lost), 'class', 'classes')} in the {len(rows)} {split} images: {shown(lost, 10)}"
            way = "write `ignore red green blue` in place of its name"
            if not made.coloured:
                less = "" if lost == [*made.classes[-len(lost) :]] else ", subtract 1 from the numbers above it"
                way = f"set its pixels to 255{less} and remove its name"
            hint = f"add images so that train and test show every class, give another --test, or leave the class out: {way}"
            if lost == list(made.classes[1:]):  # often masks of black and white
                hint = "255 is no class; if the masks are 0 and 255, write `name 0 0 0` and `name 255 255 255` into classes.txt"
            if any(pair.clear for pair in pairs):
                hint += "; pixels of masks that are fully transparent have no class"
            errors.append(TutelageError(f"{target} has no pixel of {which}", hint))
    return errors


def _remarks(made: TargetSet, pairs: Sequence[_Pair], size: tuple[int, int]) -> list[str]:
    """Return notes on masks with at most one class, which help little and are often a fault of the tool, and on small images."""
    few = made.shows(np.arange(len(made.refs))).sum(axis=1) < 2
    plain = [ref.id for ref, one in zip(made.refs, few, strict=True) if one]
    sizes = ((pair.image.ref.id, *pair.sizes[0]) for pair in pairs)
    small = [id for id, height, width in sizes if height < size[0] or width < size[1]]
    notes = [f"{number_of(len(plain), 'mask shows', 'masks show')} one class or none: {shown(plain)}"] if plain else []
    if small:
        text = f"{number_of(len(small), 'image is', 'images are')} smaller than the student's {size[0]} x {size[1]} pixels and enlarged"
        notes.append(f"{text}: {shown(small)}")
    return notes


def _palette(coding: MaskEncoding, pairs: Iterable[_Pair]) -> tuple[Colour, ...]:
    """Return the data set's colours: those of classes.txt, else of the first palette with all classes, else generated ones."""
    count = len(coding.classes)
    if coding.coloured:
        return coding.colours
    for pair in pairs:
        mine = tuple(pair.palette[i] for i in range(count) if i in pair.palette)
        if len(set(mine)) == count:
            return mine
    return coding.colours
