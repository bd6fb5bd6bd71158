"""Lists of labelled images, and Parquet files with images inside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from tutelage.data.labelled_place import LabelledPlace, LabelledRef
from tutelage.data.list_columns import find_columns, is_plain, named_file, read_schema, text_cells, text_columns
from tutelage.data.sources import IMAGE_SUFFIXES, Rejected, clean, file_ref, list_images
from tutelage.data.split_names import split_word, unknown_splits
from tutelage.data.tabular import image_column, text_rows
from tutelage.errors import FilesMissing, TutelageError, number_of, raise_all, shown
from tutelage.regular_file import json_of

_COLUMNS = {
    "path": ("path", "file_name", "filename", "file", "image"),
    "label": ("label", "class"),
    "split": ("split",),
    "group": ("group",),
}
LINE = "write the names of the columns as the first line, such as path,label"
_INSIDE = {word: _COLUMNS[word] for word in ("label", "split", "group")}  # beside the bytes of images


def read_list(place: Path) -> LabelledPlace:
    """Read a text list, with or without a header."""
    return _read_rows(place, *_csv_columns(place))


def read_parquet(place: Path) -> LabelledPlace:
    """Read one Parquet file: with the images inside, or a list of paths."""
    schema = read_schema(place)
    try:
        image_column(schema, str(place))
    except TutelageError:
        if "path" not in find_columns(place, schema.names, _COLUMNS):
            raise
        return _read_rows(place, *_with_labels(place, _COLUMNS))
    return read_shard(place, "train")


def read_shard(place: Path, split: str) -> LabelledPlace:
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


def _read_rows(place: Path, columns: dict[str, list[str]], names: tuple[str, ...]) -> LabelledPlace:
    """Read images named by a list, relative to its folder (or to the folder of their class in it)."""
    listing = LabelledPlace(names=names)
    count = len(columns["path"])
    splits, groups = columns.get("split") or [""] * count, columns.get("group") or [""] * count
    errors = unknown_splits(place, splits)
    lost, unlabelled, torn, nameless = [], [], [], 0
    seen: dict[str, tuple[str, str, str]] = {}
    for name, label, split, group in zip(columns["path"], columns["label"], splits, groups, strict=True):
        path, row = named_file(place.parent, name, label), (label, split_word(split) or split or "train", group)
        if not name.strip():
            nameless += 1
        elif not label:
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
    if nameless:
        errors.append(
            TutelageError(
                f"{place} has {number_of(nameless, 'row')} without a path", "name the image or remove the row"
            )
        )
    if unlabelled:
        message = f"{place} has {number_of(len(unlabelled), 'row')} without a label: {shown(unlabelled, 20)}"
        errors.append(TutelageError(message, "label or remove these rows"))
    if torn:
        paths = number_of(len(torn), "path is", "paths are")
        message = f"{place}: {paths} listed twice with two labels, splits or groups: {shown(torn, 20)}"
        errors.append(TutelageError(message, "list every path once, with the right label, split and group"))
    raise_all(errors)
    if len(seen) < count:
        repeated = number_of(count - len(seen), "row repeats another row and is", "rows repeat another row and are")
        listing.notes.append(f"{place}: {repeated} counted once")
    return listing


def label_values(place: Path) -> set[str]:
    """Return the labels that a Parquet file of images holds."""
    return {*_parquet_columns(place, {"label": _COLUMNS["label"]})[0].get("label", ())} - {""}


def _lacking(place: Path, header: Sequence[str], words: Iterable[str]) -> TutelageError:
    names = "; ".join(f"{word} may be called {' or '.join(_COLUMNS[word])}" for word in words)
    message = f"{place} has no {' and no '.join(words)} column (columns: {shown(header, 20)})"
    if len(header) == 1:
        return TutelageError(message, f"{LINE}, and separate columns by commas, semicolons or tabs")
    return TutelageError(message, f"add or rename a column: {names}")


def _csv_columns(place: Path) -> tuple[dict[str, list[str]], tuple[str, ...]]:
    """Return the columns of a text list, with a header, or without one as `file.jpg,class`."""
    rows = text_rows(place, "path,label")
    if not rows:
        raise TutelageError(f"{place} is an empty list", "write a list with the columns path,label")
    if rows[0][0].strip().lower().endswith(IMAGE_SUFFIXES):  # no header: file.jpg,class
        if len(rows[0]) > 2:
            message = (
                f"{place} has {len(rows[0])} columns, but no line that names them: it begins with {shown(rows[0])}"
            )
            raise TutelageError(message, f"{LINE}, or path,label,split")
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
