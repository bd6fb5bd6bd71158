"""Read the labelled images of a path, in every supported format.

Supported are a folder `train|val|test` with `<class>/*`, Parquet files or tars in each, a plain folder of classes, a list
(CSV or Parquet with the columns path, label and optionally split, group), and Parquet shards or WebDataset tars with the images
and labels inside. Nothing is decoded.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tutelage.data.class_names import are_numbers, check_folders
from tutelage.data.decode import hidden
from tutelage.data.labelled_lists import label_values, read_list, read_parquet, read_shard
from tutelage.data.labelled_place import LabelledPlace, LabelledRef, files_beside
from tutelage.data.list_columns import parquet_shards
from tutelage.data.sources import TAR_SUFFIXES, ImageRef, Rejected, clean, list_images, what_is_ours
from tutelage.data.split_names import holder, split_folders, splits_of_shards
from tutelage.data.webdataset import key_of, label_of, labels_of, tars_of
from tutelage.errors import TutelageError, shown

FORMS = (
    "a folder train|val|test/<class>/*, a folder of classes, a list (.csv, .txt, .tsv, .parquet), Parquet shards, or WebDataset tars "
    "with .cls or .json labels"
)


def read_labelled(place: Path) -> LabelledPlace:
    """Read the labelled images of one path, in any of FORMS. Raises TutelageError: everything wrong, reported at once."""
    suffix = place.suffix.lower()
    if place.is_dir():
        listing = _read_folder(place)
    elif suffix in (".csv", ".txt", ".tsv"):
        listing = read_list(place)
    elif suffix == ".parquet":
        listing = read_parquet(place)
    elif place.name.lower().endswith(TAR_SUFFIXES):
        listing = LabelledPlace()
        _add_tars(listing, [place], "", "")
    else:
        raise TutelageError(f"{place} is not a format of labelled images that tutelage reads", f"use {FORMS}")
    if not listing.images:
        why = f" ({shown((f'{bad.id}: {bad.reason}' for bad in listing.rejected), 3)})" if listing.rejected else ""
        hint = f"check the path and the names of its folders; tutelage reads {FORMS}"
        folders = [one for one in place.iterdir() if one.is_dir()] if place.is_dir() else []
        if words := [one.name for one in split_folders(folders)]:
            hint = f"{' and '.join(sorted(words))} are read as splits; rename them, or use a list, if they are classes; {hint}"
        raise TutelageError(f"{place} has no labelled images{why}", hint)
    return listing


def _read_folder(place: Path) -> LabelledPlace:
    """Read `train|val|test` with classes or shards in each, shards (Parquet also in `data/`), or a folder of classes."""
    listing = LabelledPlace()
    folders = sorted(p for p in place.iterdir() if p.is_dir() and not hidden(p.name))
    splits = split_folders(folders)
    if splits:
        for folder, split in ((holder(one), split) for one, split in splits.items()):
            _add_split(listing, folder, clean(folder.relative_to(place).as_posix()) + "/", split)
        _note_others(listing, place, list(splits))
    elif shards := parquet_shards(place, folders):
        _add_shards(listing, shards, "", "")
        _note_others(listing, place, [*shards, shards[0].parent])
    elif (tars := tars_of(place)) and not any(map(_holds_images, folders)):
        _add_tars(listing, tars, "", "")
    else:
        _add_classes(listing, place, "", "train")
    if not {image.label for image in listing.images} <= set(listing.names):  # folders beside shards
        listing.names = ()
    return listing


def _add_split(listing: LabelledPlace, folder: Path, prefix: str, split: str) -> None:
    """Add the folder of one split: classes, Parquet files or tars."""
    folders = [one for one in folder.iterdir() if one.is_dir() and not hidden(one.name)]
    if shards := parquet_shards(folder, folders):
        _add_shards(listing, shards, prefix, split)
        _note_others(listing, folder, [*shards, shards[0].parent])
    elif (tars := tars_of(folder)) and not any(map(_holds_images, folders)):
        _add_tars(listing, tars, prefix, split)
    else:
        _add_classes(listing, folder, prefix, split)


def _holds_images(folder: Path) -> bool:
    """Whether a folder holds images of the user's, at any depth."""
    return not _only_ours(folder) and bool(list_images(folder)[0])


def _note_others(listing: LabelledPlace, place: Path, read: Sequence[Path]) -> None:
    """Note the folders, images, containers and archives of a place that are not among those that are read."""
    others = [one for one in sorted(place.iterdir()) if one.is_dir() and one not in read and not hidden(one.name)]
    if folders := [one.name for one in others if not _only_ours(one)]:
        listing.notes.append(f"{place}: folders beside {read[0].name} that are not read: {shown(folders)}")
    listing.notes += files_beside(place, read, read[0].name)


def _add_shards(listing: LabelledPlace, shards: Sequence[Path], prefix: str, split: str) -> None:
    """Add Parquet files with images inside; without a split, it is taken from each file's name."""
    splits = {} if split else splits_of_shards(shards)
    for shard in shards:
        part = read_shard(shard, split or splits[shard])
        names = {*listing.names, *part.names}
        if are_numbers(names):  # bare numbers: each file lists only its own classes
            part.names = tuple(sorted(names, key=int))
        elif listing.images and listing.names != part.names:
            message = f"{shard}: its class names are not those of the shards before it"
            raise TutelageError(message, "write all shards again with the same list of class names")
        listing.names = part.names
        listing.images += [replace(i, ref=replace(i.ref, id=prefix + i.ref.id)) for i in part.images]
        listing.rejected += [Rejected(prefix + bad.id, bad.reason) for bad in part.rejected]


def _add_tars(listing: LabelledPlace, tars: Sequence[Path], prefix: str, split: str) -> None:
    """Add WebDataset tars; without a split, it is taken from each file's name. Images without a label are rejected."""
    found, splits = len(listing.images), {} if split else splits_of_shards(tars)
    for tar in tars:
        refs, rejected = list_images(tar)
        labels, stems = labels_of(tar), {key_of(ref.id.partition("/")[2])[0] for ref in refs}
        for ref in refs:
            id = prefix + ref.id
            if label := label_of(labels, ref.id.partition("/")[2], stems):
                listing.images.append(LabelledRef(replace(ref, id=id), label, split or splits[tar]))
            else:
                listing.rejected.append(
                    Rejected(id, "has no label: no .cls beside it, and no .json with a label, text or a number")
                )
        listing.rejected += [Rejected(prefix + bad.id, bad.reason) for bad in rejected]
    if len(listing.images) == found:
        first = f", such as {listing.rejected[0].id}: {listing.rejected[0].reason}" if listing.rejected else ""
        message = f"{tars[0]}: no image {'in it' if len(tars) == 1 else f'in {len(tars)} tar files'} has a label{first}"
        raise TutelageError(
            message, f"put a .cls or a .json with a key label beside each image; tutelage reads {FORMS}"
        )
    if are_numbers(image.label for image in listing.images):
        listing.names = tuple(sorted({image.label for image in listing.images}, key=int))


def _add_classes(listing: LabelledPlace, folder: Path, prefix: str, split: str) -> None:
    """Add `<class>/*` of one folder; images outside the class folders are rejected."""
    check_folders(folder)
    refs, rejected = list_images(folder)
    inside: dict[str, Counter[str]] = defaultdict(Counter)
    shards: dict[str, str] = {}  # shard -> class
    for ref in refs:
        if folders := _folders_of(ref, folder):
            label = folders[0]
            listing.images.append(LabelledRef(replace(ref, id=prefix + ref.id), label, split))
            inside[label]["/".join(folders[1:])] += 1
            shards |= {ref.container: label} if ref.kind != "file" else {}
        else:
            listing.rejected.append(Rejected(prefix + ref.id, "lies in no class folder"))
    _refuse_labels_inside(folder, shards, whole=not prefix)
    listing.rejected += [Rejected(prefix + bad.id, bad.reason) for bad in rejected]
    listing.inside |= {prefix + label: found for label, found in inside.items()}
    folders = (item for item in sorted(folder.iterdir()) if item.is_dir() and not hidden(item.name))
    without = (item for item in folders if clean(item.name) not in inside and not _only_ours(item))
    listing.empty += [prefix + clean(item.name) for item in without]


def _folders_of(ref: ImageRef, folder: Path) -> list[str]:
    """Return the names of the folders below this one that an image lies in; what a tar or Parquet file calls a folder is none."""
    names = ref.id.split("/")[:-1]
    return (
        names
        if ref.kind == "file"
        else names[: len(Path(ref.container).relative_to(os.path.abspath(folder)).parts) - 1]
    )


def _only_ours(folder: Path) -> bool:
    """Whether a folder holds nothing but what tutelage has written, such as runs and their cache."""
    names = os.listdir(folder)
    below = [folder / name for name in names if not hidden(name)]
    return bool(what_is_ours(folder, names)) or (bool(below) and all(one.is_dir() and _only_ours(one) for one in below))


def _refuse_labels_inside(folder: Path, shards: Mapping[str, str], whole: bool) -> None:
    """Raise an error if shards in class folders hold labels that are not the names of these folders.

    Args:
        folder: the one with the class folders. shards: path of each -> its class folder. whole: whether folder is the target, not a split.
    """
    for shard, label in shards.items():
        others = {name for name in _labels_inside(Path(shard)) if name.casefold() != label.casefold()}
        if not others:
            continue
        if whole and len({*shards.values()}) == 1:
            around = os.path.commonpath([os.path.dirname(one) for one in shards])
            hint = f"give the folder that holds the shards: --target {around}"
        else:
            one = f", or give one folder of them, such as --target {folder / label}" if whole else ""
            hint = (
                f"if these labels are right, move the shards into {folder} itself{one}; if {label} is right, write the shards without "
                "labels"
            )
        which = shown(map(repr, sorted(others)), 5)
        raise TutelageError(f"{shard} lies in the class folder {label}, but holds labels of its own: {which}", hint)


def _labels_inside(shard: Path) -> set[str]:
    """Return the labels that a tar or a Parquet file of images holds."""
    if shard.name.lower().endswith(TAR_SUFFIXES):
        return {*labels_of(shard).values()}
    return label_values(shard)
