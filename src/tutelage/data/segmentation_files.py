"""Read the images and masks of a path, in every supported format. Nothing is decoded.

Supported are `images/<split>/*` and `masks/<split>/*.png` under the same names, a list (CSV or Parquet with the columns
image, mask and optionally split, group), and Parquet files with the bytes of both. `classes.txt` beside them names the
classes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

from tutelage.data.labelled import _SPLIT_WORDS, LabelledPlace, LabelledRef, _schema, _unknown_splits
from tutelage.data.masks import MaskEncoding, read_coding
from tutelage.data.sources import ImageRef, Rejected, _prints, clean, file_ref, list_images
from tutelage.data.tabular import MASK_COLUMNS, mask_column, text_rows
from tutelage.errors import FilesMissing, TutelageError, raise_all, shown

FORMS = (
    "images/<split>/* and masks/<split>/*.png, a list (.csv, .txt, .tsv, .parquet) with the columns image, mask and split, or "
    "Parquet files with the bytes of both; classes.txt beside them"
)
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
    elif place.is_dir() and (shards := sorted(place.glob("[!.]*.parquet")) or sorted(place.glob("data/[!.]*.parquet"))):
        listing = LabelledPlace()
        for shard in shards:
            named = re.match(r"(train|test|validation|valid|val)(?=[-_.])", shard.name.lower())
            listing.images += _read_shard(shard, _SPLIT_WORDS[named[1]] if named else "train").images
    elif suffix == ".parquet":
        listing = (
            _read_shard(place, "train") if mask_column(_schema(place)) else _read_list(place, _parquet_rows(place))
        )
    elif suffix in (".csv", ".txt", ".tsv"):
        listing = _read_list(place, _csv_rows(place))
    else:
        hint = f"put the images into images/ and the masks into masks/; tutelage reads {FORMS}"
        raise TutelageError(f"{place} has no images with masks", hint)
    if not listing.images:
        hint = f"check the path and the names of its folders; tutelage reads {FORMS}"
        raise TutelageError(f"{place} has no images with masks", hint)
    return listing, coding


def _read_folder(place: Path) -> LabelledPlace:
    """Read `images/<split>/*` and `masks/<split>/*`, matched by name without suffix; without split folders all are train."""
    if not (place / "masks").is_dir():
        hint = "put the masks into masks/<split>/*.png, under the names of images/<split>/*"
        raise TutelageError(f"{place} has images/ but no masks/", hint)
    listing = LabelledPlace()
    by_name: dict[str, dict[str, ImageRef]] = {}
    for kind in ("images", "masks"):
        refs, rejected = list_images(place / kind)
        by_name[kind] = {os.path.splitext(ref.id)[0]: ref for ref in refs}
        listing.rejected += [Rejected(f"{kind}/{bad.id}", bad.reason) for bad in rejected]
    images, masks = by_name["images"], by_name["masks"]
    errors = []
    for kind, rest, other in (("image", images.keys() - masks, "a mask"), ("mask", masks.keys() - images, "an image")):
        if rest:
            names = sorted(by_name[f"{kind}s"][name].id for name in rest)
            message = f"{place} has {len(names)} {kind}s without {other}: {shown(names, 20)}"
            move = "move images without labels to --gallery" if kind == "image" else "remove these masks"
            errors.append(TutelageError(message, f"use the same names in masks/ and images/, or {move}"))
    raise_all(errors)
    folders = {name.split("/")[0] for name in images if "/" in name}
    known = {name for name in folders if name.lower() in _SPLIT_WORDS}
    for name, ref in sorted(images.items()):
        split = name.split("/")[0]
        if known and split not in known:
            listing.rejected.append(Rejected(ref.id, "lies in no folder train, val or test"))
            continue
        listing.images.append(LabelledRef(ref, "", _SPLIT_WORDS[split.lower()] if known else "train", mask=masks[name]))
    return listing


def _read_list(place: Path, rows: Sequence[dict[str, str]]) -> LabelledPlace:
    """Read images and masks named by a list, relative to its folder."""
    listing, seen = LabelledPlace(), set()
    errors = _unknown_splits(place, [row.get("split", "") for row in rows])
    without: list[str] = []
    lost: list[str] = []
    for row in rows:
        paths = {kind: os.path.join(place.parent, row.get(kind, "")) for kind in ("image", "mask")}
        if not row.get("image") or not row.get("mask"):
            without.append(clean(row.get("image") or row.get("mask") or "an empty row"))
            continue
        gone = [row[kind] for kind, path in paths.items() if not os.path.isfile(path)]
        lost += [clean(name) for name in gone]
        if gone or paths["image"] in seen:
            continue
        seen.add(paths["image"])
        image, mask = (file_ref(paths[kind], clean(row[kind].removeprefix("./"))) for kind in ("image", "mask"))
        split = _SPLIT_WORDS.get(row.get("split", "").lower(), "train")
        listing.images.append(LabelledRef(image, "", split, clean(row.get("group", "")), mask))
    if without:
        message = f"{place} has {len(without)} rows without an image or without a mask: {shown(without, 20)}"
        errors.append(TutelageError(message, "give both in every row; images without labels belong in --gallery"))
    if lost:
        errors.append(FilesMissing(place, lost, f"relative to {place.parent}"))
    raise_all(errors)
    return listing


def _csv_rows(place: Path) -> list[dict[str, str]]:
    """Return the rows of a text list with a header, under our column names."""
    rows = text_rows(place, "image,mask")
    header = rows[0] if rows else []
    found = _found(place, header)
    return [{word: row[at].strip() if at < len(row) else "" for word, at in found.items()} for row in rows[1:]]


def _parquet_rows(place: Path) -> list[dict[str, str]]:
    """Return the rows of a Parquet list, under our column names."""
    names = _schema(place).names
    found = _found(place, names)
    table = pq.read_table(place, columns=[names[at] for at in found.values()])
    columns = {word: table.column(names[at]).to_pylist() for word, at in found.items()}
    return [
        {word: "" if values[i] is None else str(values[i]) for word, values in columns.items()}
        for i in range(table.num_rows)
    ]


def _found(place: Path, header: Sequence[str]) -> dict[str, int]:
    """Map our name of a column to its index, for the columns that exist."""
    lower = [cell.strip().lower() for cell in header]
    found = {word: [lower.index(alias) for alias in aliases if alias in lower] for word, aliases in _COLUMNS.items()}
    if not found["image"] or not found["mask"]:
        message = f"{place} has no image and mask columns (columns: {shown(header, 20) or 'none'})"
        hint = "name columns image and mask (and optionally split and group), in a text list in its first line"
        raise TutelageError(message, hint)
    return {word: places[0] for word, places in found.items() if places}


def _read_shard(place: Path, split: str) -> LabelledPlace:
    """Read the rows of a Parquet file with the bytes of image and mask; a `split` column in it overrides `split`."""
    schema = _schema(place)
    column = mask_column(schema)
    if not column:
        message = f"{place} has no column with masks (columns: {shown(schema.names, 20)})"
        raise TutelageError(message, f"name the column with the masks' bytes {' or '.join(MASK_COLUMNS)}")
    refs, rejected = list_images(place)
    listing = LabelledPlace(rejected=rejected)
    named = {word: next((n for n in schema.names if n.lower() == word), "") for word in ("split", "group")}
    table = pq.read_table(place, columns=[name for name in named.values() if name])
    texts = {
        word: [clean("" if v is None else str(v)) for v in table.column(name).to_pylist()] if name else [""] * len(refs)
        for word, name in named.items()
    }
    empty = pq.read_table(place, columns=[column]).column(column).is_null().to_pylist()
    errors = _unknown_splits(place, texts["split"])
    if any(empty):
        without = [ref.id for ref, none in zip(refs, empty, strict=True) if none]
        message = f"{place} has {len(without)} images without a mask: {shown(without, 20)}"
        errors.append(TutelageError(message, "give both in every row; images without labels belong in --gallery"))
    raise_all(errors)
    fingerprint = _prints("mask", os.path.abspath(place), os.stat(place))
    for row, ref in enumerate(refs):
        mask = ImageRef(f"{ref.id} (mask)", ref.container, "mask", ref.position, -1, fingerprint(row))
        own = texts["split"][row]
        listing.images.append(
            LabelledRef(ref, "", _SPLIT_WORDS[own.lower()] if own else split, texts["group"][row], mask)
        )
    return listing
