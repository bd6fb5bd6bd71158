"""Read the labelled images of a path, in every supported format.

Supported are a folder `train|val|test` with `<class>/*`, Parquet files or tars in each, a plain folder of classes, a list
(CSV or Parquet with the columns path, label and optionally split, group), and Parquet shards or WebDataset tars with the images
and labels inside. Nothing is decoded.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa

from tutelage.data.class_names import are_numbers, check_folders
from tutelage.data.decode import hidden
from tutelage.data.list_columns import (
    find_columns,
    is_plain,
    named_file,
    parquet_shards,
    read_schema,
    text_cells,
    text_columns,
)
from tutelage.data.sources import (
    IMAGE_SUFFIXES,
    TAR_SUFFIXES,
    ImageRef,
    Rejected,
    clean,
    file_ref,
    list_images,
    what_is_ours,
)
from tutelage.data.split_names import holder, split_folders, split_of_shard, split_word, unknown_splits
from tutelage.data.tabular import image_column, text_rows
from tutelage.data.webdataset import label_of, labels_of, tars_of
from tutelage.errors import FilesMissing, TutelageError, number_of, raise_all, shown
from tutelage.regular_file import json_of

FORMS = (
    "a folder train|val|test/<class>/*, a folder of classes, a list (.csv, .txt, .tsv, .parquet), Parquet shards, or WebDataset tars "
    "with .cls or .json labels"
)

_COLUMNS = {
    "path": ("path", "file_name", "filename", "file", "image"),
    "label": ("label", "class"),
    "split": ("split",),
    "group": ("group",),
}
_INSIDE = {word: _COLUMNS[word] for word in ("label", "split", "group")}  # beside the bytes of images


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


def read_labelled(place: Path) -> LabelledPlace:
    """Read the labelled images of one path, in any of FORMS. Raises TutelageError: everything wrong, reported at once."""
    suffix = place.suffix.lower()
    if place.is_dir():
        listing = _read_folder(place)
    elif suffix in (".csv", ".txt", ".tsv"):
        listing = _read_list(place, *_csv_columns(place))
    elif suffix == ".parquet":
        listing = _read_parquet(place)
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
            prefix = clean(folder.relative_to(place).as_posix()) + "/"
            inside, tars = sorted(folder.glob("[!.]*.parquet")), tars_of(folder)
            classes = any(p.is_dir() and not hidden(p.name) for p in folder.iterdir())
            if inside and not classes:
                _add_shards(listing, inside, prefix, split)
            elif tars and not classes:
                _add_tars(listing, tars, prefix, split)
            else:
                _add_classes(listing, folder, prefix, split)
        if others := [p.name for p in folders if p not in splits]:
            first = next(iter(splits)).name
            listing.notes.append(f"{place}: folders beside {first} that are not read: {shown(others)}")
    elif shards := parquet_shards(place):
        _add_shards(listing, shards, "", "")
    elif not folders and (tars := tars_of(place)):
        _add_tars(listing, tars, "", "")
    else:
        _add_classes(listing, place, "", "train")
    if not {image.label for image in listing.images} <= set(listing.names):  # folders beside shards
        listing.names = ()
    return listing


def _add_shards(listing: LabelledPlace, shards: Sequence[Path], prefix: str, split: str) -> None:
    """Add Parquet files with images inside; without a split, it is taken from each file's name."""
    for shard in shards:
        part = _read_shard(shard, split or split_of_shard(shard))
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
    found = len(listing.images)
    for tar in tars:
        refs, rejected = list_images(tar)
        labels = labels_of(tar)
        for ref in refs:
            id = prefix + ref.id
            if label := label_of(labels, ref.id.partition("/")[2]):
                listing.images.append(LabelledRef(replace(ref, id=id), label, split or split_of_shard(tar)))
            else:
                listing.rejected.append(Rejected(id, "has no label: no .cls beside it, and no .json with a key label"))
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
    return {*_parquet_columns(shard, {"label": _COLUMNS["label"]})[0].get("label", ())} - {""}


def _read_parquet(place: Path) -> LabelledPlace:
    """Read one Parquet file: with the images inside, or a list of paths."""
    schema = read_schema(place)
    try:
        image_column(schema, str(place))
    except TutelageError:
        if "path" not in find_columns(place, schema.names, _COLUMNS):
            raise
        return _read_list(place, *_with_labels(place, _COLUMNS))
    return _read_shard(place, "train")


def _read_shard(place: Path, split: str) -> LabelledPlace:
    """Read the rows of a Parquet file with image bytes; a `split` column in the file overrides `split`."""
    columns, names = _with_labels(place, _INSIDE)
    refs, rejected = list_images(place)
    listing = LabelledPlace(names=names, rejected=rejected)
    splits, groups = columns.get("split") or [""] * len(refs), columns.get("group") or [""] * len(refs)
    raise_all(unknown_splits(place, splits))
    for ref, label, own, group in zip(refs, columns["label"], splits, groups, strict=True):
        if label:
            listing.images.append(LabelledRef(ref, label, split_word(own) or split, group))
        else:
            listing.rejected.append(Rejected(ref.id, "has no label"))
    return listing


def _read_list(place: Path, columns: dict[str, list[str]], names: tuple[str, ...]) -> LabelledPlace:
    """Read images named by a list, relative to its folder (or to the folder of their class in it)."""
    listing = LabelledPlace(names=names)
    count = len(columns["path"])
    splits, groups = columns.get("split") or [""] * count, columns.get("group") or [""] * count
    errors = unknown_splits(place, splits)
    lost, unlabelled, torn = [], [], []
    seen: dict[str, tuple[str, str, str]] = {}
    for name, label, split, group in zip(columns["path"], columns["label"], splits, groups, strict=True):
        path, row = named_file(place.parent, name, label), (label, split_word(split) or split or "train", group)
        if not label:
            unlabelled.append(clean(name))
        elif not path:
            lost.append(clean(name))
        elif path in seen:
            torn += [clean(name)] if seen[path] != row else []
        else:
            seen[path] = row
            ref, split = file_ref(path, clean(name.removeprefix("./"))), split_word(split) or "train"
            listing.images.append(LabelledRef(ref, clean(label), split, clean(group)))
    if lost:
        errors.append(FilesMissing(place, lost, f"relative to {place.parent}"))
    if unlabelled:
        message = f"{place} has {number_of(len(unlabelled), 'row')} without a label: {shown(unlabelled, 20)}"
        errors.append(TutelageError(message, "label or remove these rows"))
    if torn:
        message = f"{place}: {len(torn)} paths are listed twice with two labels, splits or groups: {shown(torn, 20)}"
        errors.append(TutelageError(message, "list every path once, with the right label, split and group"))
    raise_all(errors)
    if len(seen) < count:
        repeated = number_of(count - len(seen), "row repeats another row and is", "rows repeat another row and are")
        listing.notes.append(f"{place}: {repeated} counted once")
    return listing


def _lacking(place: Path, header: Sequence[str], words: Iterable[str]) -> TutelageError:
    names = "; ".join(f"{word} may be called {' or '.join(_COLUMNS[word])}" for word in words)
    message = f"{place} has no {' and no '.join(words)} column (columns: {shown(header, 20)})"
    return TutelageError(message, f"add or rename a column: {names}")


def _csv_columns(place: Path) -> tuple[dict[str, list[str]], tuple[str, ...]]:
    """Return the columns of a text list, with a header, or without one as `file.jpg,class`."""
    rows = text_rows(place, "path,label")
    if not rows:
        raise TutelageError(f"{place} is an empty list", "write a list with the columns path,label")
    if rows[0][0].strip().lower().endswith(IMAGE_SUFFIXES):  # no header: file.jpg,class
        rows.insert(0, ["path", "label"][: len(rows[0])])
    header, *rows = rows
    found = find_columns(place, header, _COLUMNS)
    if lacking := [word for word in ("path", "label") if word not in found]:
        raise _lacking(place, header, lacking)
    return text_cells(place, header, rows, found), ()


def _with_labels(place: Path, wanted: Mapping[str, Sequence[str]]) -> tuple[dict[str, list[str]], tuple[str, ...]]:
    """Return what `_parquet_columns` does. Raises TutelageError: no labels."""
    columns, names = _parquet_columns(place, wanted)
    if "label" not in columns:
        raise _lacking(place, read_schema(place).names, ["label"])
    return columns, names


def _parquet_columns(place: Path, wanted: Mapping[str, Sequence[str]]) -> tuple[dict[str, list[str]], tuple[str, ...]]:
    """Return those of the wanted columns that exist, as text, and the class names in the metadata's order (or ())."""
    schema = read_schema(place)
    features = _features(schema)
    found = {}
    for word, places in find_columns(place, schema.names, wanted).items():
        plain = [at for at in places if is_plain(schema.field(at).type)]
        found[word] = [schema.names[at] for at in plain or places]
    classes = [name for name, feature in features.items() if feature.get("_type") == "ClassLabel"]
    named = [name for name in classes if name in schema.names]
    if not found.get("label") and len(named) == 1:
        found["label"] = named
    columns = text_columns(place, found)
    if "label" not in columns:
        return columns, ()
    label = found["label"][0]
    given = features.get(label, {}).get("names") or []
    if not isinstance(given, list):
        message = f"{place}: the names of classes in its Hugging Face metadata are no list: {shown([given])[:60]}"
        raise TutelageError(message, "write the file again with the datasets package, or without these metadata")
    names = tuple(map(str, given))
    if pa.types.is_integer(schema.field(label).type):
        if names:
            columns["label"] = [names[int(v)] if v and 0 <= int(v) < len(names) else "" for v in columns["label"]]
        else:
            names = tuple(str(v) for v in sorted({int(v) for v in columns["label"] if v}))
    return columns, names


def _features(schema: pa.Schema) -> dict[str, dict]:
    """Return what Hugging Face's metadata says about the columns; empty if there is none."""
    try:
        features = json_of((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}
