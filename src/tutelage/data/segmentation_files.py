"""Read the images and masks of a path, in every supported format. Nothing is decoded.

Supported are `images/<split>/*` and `masks/<split>/*.png` under the same names, a list (CSV or Parquet with the columns
image, mask and optionally split, group), and Parquet files with the bytes of both. `classes.txt` beside them names the
classes.
"""

from __future__ import annotations

import os
from pathlib import Path

from tutelage.data.class_list import read_coding
from tutelage.data.labelled_place import LabelledPlace, LabelledRef, files_beside
from tutelage.data.list_columns import (
    find_columns,
    named_file,
    null_rows,
    parquet_shards,
    read_schema,
    text_cells,
    text_columns,
)
from tutelage.data.masks import MaskEncoding
from tutelage.data.sources import ImageRef, Rejected, clean, file_ref, fingerprints_of, list_images
from tutelage.data.split_names import split_word, splits_among, splits_of_shards, unknown_splits
from tutelage.data.tabular import MASK_COLUMNS, mask_column, text_rows
from tutelage.errors import FilesMissing, TutelageError, number_of, raise_all, shown

FORMS = (
    "images/<split>/* and masks/<split>/*.png, a list (.csv, .txt, .tsv, .parquet) with the columns image, mask and split, or "
    "Parquet files with the bytes of both; classes.txt beside them"
)
BOTH = "give both in every row; images without labels belong in --gallery"
_COLUMNS = {
    "image": ("image", "path", "file", "file_name"),
    "mask": ("mask", "annotation"),
    "split": ("split",),
    "group": ("group",),
}


def read_pairs(place: Path) -> tuple[LabelledPlace, MaskEncoding]:
    """Read the images and masks of one path, in any of FORMS, and the classes beside it.

    Raises:
        TutelageError: everything that is wrong with it, reported at once.
    """
    coding = read_coding((place if place.is_dir() else place.parent) / "classes.txt")
    suffix = place.suffix.lower()
    if place.is_dir() and (place / "images").is_dir():
        listing = _read_folder(place)
        listing.notes += files_beside(place, [], "images/ and masks/")
    elif place.is_dir() and (shards := parquet_shards(place)):
        listing = LabelledPlace()
        for shard, split in splits_of_shards(shards).items():
            part = _read_shard(shard, split)
            listing.images += part.images
            listing.rejected += part.rejected
        for folder in dict.fromkeys((place, shards[0].parent)):
            listing.notes += files_beside(folder, shards, shards[0].name)
    elif suffix == ".parquet" and mask_column(read_schema(place), place):
        listing = _read_shard(place, "train")
    elif suffix in (".parquet", ".csv", ".txt", ".tsv"):
        listing = _read_list(place, _columns(place))
    else:
        listing = None
    if listing is None or not listing.images:
        way = "put the images into images/ and the masks into masks/"
        way = "check the path and the names of its folders" if listing else way
        bad = [f"{one.id} ({one.reason})" for one in listing.rejected] if listing else []
        why = f": {shown(bad, 3)}" if bad else ""
        raise TutelageError(f"{place} has no images with masks{why}", f"{way}; tutelage reads {FORMS}")
    return listing, coding


def _read_folder(place: Path) -> LabelledPlace:
    """Read `images/<split>/*` and `masks/<split>/*`, matched by name without suffix; without split folders all are train."""
    if not (place / "masks").is_dir():
        hint = "put the masks into masks/<split>/*.png, under the names of images/<split>/*"
        raise TutelageError(f"{place} has images/ but no masks/", hint)
    listing = LabelledPlace()
    by_name: dict[str, dict[str, ImageRef]] = {}
    errors = []
    for kind in ("images", "masks"):
        refs, rejected = list_images(place / kind)
        by_name[kind] = {os.path.splitext(ref.id)[0]: ref for ref in refs}
        twice = [ref.id for ref in refs if by_name[kind][os.path.splitext(ref.id)[0]] is not ref]
        if twice:
            message = f"{place}/{kind} has {number_of(len(twice), 'name')} twice, with two endings: {shown(twice, 20)}"
            errors.append(TutelageError(message, "keep one file of each name: a mask belongs to one image"))
        listing.rejected += [Rejected(f"{kind}/{bad.id}", bad.reason) for bad in rejected]
    images, masks = by_name["images"], by_name["masks"]
    for kind, rest, other in (("image", images.keys() - masks, "a mask"), ("mask", masks.keys() - images, "an image")):
        if rest:
            names = sorted(by_name[f"{kind}s"][name].id for name in rest)
            message = f"{place} has {number_of(len(names), kind)} without {other}: {shown(names, 20)}"
            move = "move images without labels to --gallery" if kind == "image" else "remove these masks"
            errors.append(TutelageError(message, f"use the same names in masks/ and images/, or {move}"))
    raise_all(errors)
    splits = splits_among({name.split("/")[0] for name in images if "/" in name})
    for name, ref in sorted(images.items()):
        split = splits.get(name.split("/")[0], "") if splits else "train"
        if not split:
            listing.rejected.append(Rejected(ref.id, "lies in no folder train, val or test"))
            continue
        listing.images.append(LabelledRef(ref, "", split, mask=masks[name]))
    return listing


def _read_list(place: Path, columns: dict[str, list[str]]) -> LabelledPlace:
    """Read images and masks named by a list, relative to its folder."""
    listing, seen, twice = LabelledPlace(), {}, []
    splits, groups = (columns.get(word) or [""] * len(columns["image"]) for word in ("split", "group"))
    errors = unknown_splits(place, splits)
    without, lost, repeated = [], [], 0
    for image, mask, split, group in zip(columns["image"], columns["mask"], splits, groups, strict=True):
        if not image or not mask:
            without.append(clean(image or mask or "an empty row"))
            continue
        paths = {name: named_file(place.parent, name) for name in (image, mask)}
        if gone := [clean(name) for name, path in paths.items() if not path]:
            lost += gone
            continue
        row = (paths[mask], split_word(split) or split or "train", group)
        before = seen.setdefault(paths[image], row)
        if before != row:
            twice.append(clean(image))
        elif before is row:  # the first time
            refs = [file_ref(paths[name], clean(name.removeprefix("./"))) for name in (image, mask)]
            listing.images.append(LabelledRef(refs[0], "", split_word(split) or "train", clean(group), refs[1]))
        else:
            repeated += 1
    if twice:
        count = number_of(len(twice), "image is", "images are")
        message = f"{place}: {count} listed twice with two masks, splits or groups: {shown(twice, 20)}"
        errors.append(TutelageError(message, "list every image once, with the right mask and split"))
    if without:
        message = (
            f"{place} has {number_of(len(without), 'row')} without an image or without a mask: {shown(without, 20)}"
        )
        errors.append(TutelageError(message, BOTH))
    if lost:
        errors.append(FilesMissing(place, lost, f"relative to {place.parent}"))
    raise_all(errors)
    if repeated:
        listing.notes.append(
            f"{place}: {number_of(repeated, 'row repeats another row and is', 'rows repeat another row and are')} counted once"
        )
    return listing


def _columns(place: Path) -> dict[str, list[str]]:
    """Return the columns of a list, a text file with a header or Parquet, by our names."""
    table = place.suffix.lower() == ".parquet"
    header, *rows = ([read_schema(place).names] if table else text_rows(place, "image,mask")) or [[]]
    found = find_columns(place, header, _COLUMNS)
    if "image" not in found or "mask" not in found:
        message = f"{place} has no image and mask columns (columns: {shown(header, 20) or 'none'})"
        hint = "name columns image and mask (and optionally split and group), in a text list in its first line"
        raise TutelageError(message, hint)
    if table:
        return text_columns(place, {word: [header[at] for at in places] for word, places in found.items()})
    return text_cells(place, header, rows, found)


def _read_shard(place: Path, split: str) -> LabelledPlace:
    """Read the rows of a Parquet file with the bytes of image and mask; a `split` column in it overrides `split`."""
    schema = read_schema(place)
    column = mask_column(schema, place)
    if not column:
        message = f"{place} has no column with masks (columns: {shown(schema.names, 20)})"
        raise TutelageError(message, f"name the column with the masks' bytes {' or '.join(MASK_COLUMNS)}")
    refs, rejected = list_images(place)
    listing = LabelledPlace(rejected=rejected)
    found = find_columns(place, schema.names, {word: _COLUMNS[word] for word in ("split", "group")})
    texts = text_columns(place, {word: [schema.names[at] for at in places] for word, places in found.items()})
    splits, groups = (texts.get(word) or [""] * len(refs) for word in ("split", "group"))
    empty = null_rows(place, column)
    errors = unknown_splits(place, splits)
    if without := [ref.id for ref, none in zip(refs, empty, strict=True) if none]:
        message = f"{place} has {number_of(len(without), 'image')} without a mask: {shown(without, 20)}"
        errors.append(TutelageError(message, BOTH))
    raise_all(errors)
    fingerprint = fingerprints_of("mask", os.path.abspath(place), os.stat(place))
    for row, (ref, own, group) in enumerate(zip(refs, splits, groups, strict=True)):
        mask = ImageRef(f"{ref.id} (mask)", ref.container, "mask", ref.position, -1, fingerprint(row))
        listing.images.append(LabelledRef(ref, "", split_word(own) or split, group, mask))
    return listing
