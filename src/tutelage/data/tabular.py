"""Rows of text lists, and the columns of Parquet files that hold the bytes of images and masks."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tutelage.errors import TutelageError, Unreadable
from tutelage.regular_file import bytes_in

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "bytes")
MASK_COLUMNS = ("mask", "annotation")  # masks of classes, beside the images
BATCH_BYTES = 64 << 20  # bytes of one Parquet column in memory at a time


def text_rows(place: Path, columns: str) -> list[list[str]]:
    """Return the rows of a text list, including the header; the delimiter is detected, blank rows are left out.

    Raises:
        TutelageError: not a readable list. columns: those it should have, for the message.
    """
    hint = f"use a text list in UTF-8 with the columns {columns}"
    try:
        data = bytes_in(place)
    except OSError as error:
        raise TutelageError(f"{place} cannot be read: {error.strerror}", hint) from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n")
        message = f"{place} is not UTF-8: line {line + 1} is {data.splitlines()[line][:80]!r}"
        raise TutelageError(message, "save it as UTF-8; spreadsheets call that CSV UTF-8") from None
    first = text.lstrip().partition("\n")[0]
    mark = next((mark for mark in ",;\t" if mark in first), ",")
    try:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=mark, skipinitialspace=True)
        return [row for row in rows if any(map(str.strip, row))]
    except csv.Error as error:
        raise TutelageError(f"{place} cannot be read: {error}", hint) from None


def image_column(schema: pa.Schema, where: str) -> str:
    """Return the name of the column with image bytes: a struct with `bytes`, or binary with a name in IMAGE_COLUMNS.

    Raises:
        TutelageError: none or several such columns.
    """
    found = [f.name for f in schema if _holds_images(f) and f.name.lower() not in MASK_COLUMNS]
    if len(found) == 1:
        return found[0]
    columns = ", ".join(f"{f.name} ({'struct' if pa.types.is_struct(f.type) else f.type})" for f in schema)
    what = f"{len(found)} image columns ({', '.join(found)})" if found else f"no image column (columns: {columns})"
    fits = f"a struct with `bytes`, as Hugging Face writes, or binary and named one of {', '.join(IMAGE_COLUMNS)}"
    raise TutelageError(f"{where}: {what}", f"keep or rename one column: {fits}")


def _holds_images(field: pa.Field) -> bool:
    kind = field.type
    inside = pa.types.is_struct(kind) and any(part.name == "bytes" and _is_binary(part.type) for part in kind)
    return inside or (_is_binary(kind) and field.name.lower() in IMAGE_COLUMNS)


def mask_column(schema: pa.Schema, where: object) -> str:
    """Return the name of the column with the bytes of masks, "" if there is none.

    Raises:
        TutelageError: several such columns. where: the file, for the message.
    """
    found = [f.name for f in schema if f.name.lower() in MASK_COLUMNS and (_is_binary(f.type) or _holds_images(f))]
    if len(found) > 1:
        message = f"{where}: {len(found)} mask columns ({', '.join(found)})"
        raise TutelageError(message, "keep one of them, or rename the others")
    return found[0] if found else ""


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def read_rows(path: str, wanted: Sequence[int], masks: bool) -> Iterator[bytes | Unreadable]:
    """Yield the bytes of images, or of masks, in these rows of a Parquet file, which are in ascending order.

    Row groups without a wanted row are skipped, the others are read in small batches.
    """
    with pq.ParquetFile(path, buffer_size=1 << 20) as file:
        schema = file.schema_arrow
        column = mask_column(schema, path) if masks else image_column(schema, path)
        nested = pa.types.is_struct(schema.field(column).type)
        leaf = f"{column}.bytes" if nested else column
        first, at = 0, 0  # row where the group starts; place in `wanted`
        for group in range(file.metadata.num_row_groups):
            rows, mean = _group_size(file, group, leaf)
            if at < len(wanted) and wanted[at] < first + rows:
                batch_rows = int(min(max(BATCH_BYTES // max(mean, 1), 1), 1024))
                start = first
                for batch in file.iter_batches(batch_rows, row_groups=[group], columns=[leaf]):
                    values = batch.column(0).field("bytes") if nested else batch.column(0)
                    while at < len(wanted) and wanted[at] < start + batch.num_rows:
                        data = values[wanted[at] - start].as_py()
                        yield Unreadable("the row holds no image bytes") if data is None else data
                        at += 1
                    start += batch.num_rows
                    if at == len(wanted) or wanted[at] >= first + rows:
                        break
            first += rows


def _group_size(file: pq.ParquetFile, group: int, leaf: str) -> tuple[int, float]:
    """Return the number of rows of a row group and the mean number of bytes of an image in it."""
    meta = file.metadata.row_group(group)
    columns = (meta.column(i) for i in range(meta.num_columns))
    size = sum(column.total_uncompressed_size for column in columns if column.path_in_schema == leaf)
    return meta.num_rows, size / max(meta.num_rows, 1)
