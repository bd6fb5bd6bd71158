"""Columns of lists and Parquet files, found under the names that people give them, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tutelage.data.sources import clean
from tutelage.errors import TutelageError


def parquet_shards(place: Path) -> list[Path]:
    """Return the Parquet files of a folder, or of `data/` in it."""
    return sorted(place.glob("[!.]*.parquet")) or sorted(place.glob("data/[!.]*.parquet"))


def read_schema(place: Path) -> pa.Schema:
    try:
        return pq.read_schema(place)
    except (pa.ArrowInvalid, OSError) as error:
        hint = "check that it is a whole Parquet file, or copy it again"
        raise TutelageError(f"{place} cannot be read: {error}", hint) from None


def find_columns(header: Sequence[str], columns: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Map our name of a column to its index, for the columns that exist. columns: our names, each with its aliases."""
    lower = [cell.strip().lower() for cell in header]
    found = {word: [lower.index(alias) for alias in aliases if alias in lower] for word, aliases in columns.items()}
    return {word: places[0] for word, places in found.items() if places}


def text_cells(rows: Sequence[Sequence[str]], found: Mapping[str, int]) -> dict[str, list[str]]:
    """Return the columns of a text list, by our names; "" where a row is too short. A label stays as it is, as in a Parquet file."""

    def cell(row: Sequence[str], word: str, at: int) -> str:
        text = row[at] if at < len(row) else ""
        return text if word == "label" and text.strip() else text.strip()

    return {word: [cell(row, word, at) for row in rows] for word, at in found.items()}


def text_columns(place: Path, names: Mapping[str, str]) -> dict[str, list[str]]:
    """Return columns of a Parquet file as text, by our names; "" for null. names: our name -> the column's."""
    table = pq.read_table(place, columns=sorted(set(names.values())))
    try:
        cells = {word: table[name].to_pylist() for word, name in names.items()}
    except UnicodeDecodeError as error:
        message = f"{place} holds a text that is not UTF-8: {error.object[:80]!r}"
        raise TutelageError(message, "write it again with texts in UTF-8") from None
    return {word: [clean("" if v is None else str(v)) for v in column] for word, column in cells.items()}
