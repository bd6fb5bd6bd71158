"""Columns of lists and Parquet files, found under the names that people give them, as text."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tutelage.data.sources import clean
from tutelage.errors import TutelageError, shown
from tutelage.regular_file import regular


def parquet_shards(place: Path) -> list[Path]:
    """Return the Parquet files of a folder, or of `data/` in it."""
    return sorted(place.glob("[!.]*.parquet")) or sorted(place.glob("data/[!.]*.parquet"))


def read_schema(place: Path) -> pa.Schema:
    try:
        regular(place)
        return pq.read_schema(place)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(place, error) from None


def read_columns(place: Path, names: Iterable[str]) -> pa.Table:
    """Return columns of a Parquet file. Raises TutelageError: they cannot be read, or two have the same name."""
    wanted = sorted(set(names))
    if twice := [name for name in wanted if len(read_schema(place).get_all_field_indices(name)) > 1]:
        raise TutelageError(f"{place} has two columns {shown(twice)}", "rename one of them")
    try:
        return pq.read_table(place, columns=wanted)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(place, error) from None


def _unreadable(place: Path, error: Exception) -> TutelageError:
    why = getattr(error, "strerror", None) or str(error).partition("\n")[0]
    return TutelageError(f"{place} cannot be read: {why}", "check that it is a whole Parquet file, or copy it again")


def named_file(folder: Path, name: str, *below: str) -> str:
    """Return the absolute path of a file that a list names, relative to a folder or to one `below` it; "" if there is none.

    A list from Windows has backslashes, which are read as slashes where no file has that very name.
    """
    ways = (os.path.join(folder, *above, one) for one in (name, name.replace("\\", "/")) for above in ((), *zip(below)))
    return next((os.path.abspath(way) for way in ways if os.path.isfile(way)), "")


def find_columns(header: Sequence[str], columns: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Map our name of a column to its index, for the columns that exist. columns: our names, each with its aliases."""
    lower = [cell.strip().lower() for cell in header]
    found = {word: [lower.index(alias) for alias in aliases if alias in lower] for word, aliases in columns.items()}
    return {word: places[0] for word, places in found.items() if places}


def text_cells(rows: Sequence[Sequence[str]], found: Mapping[str, int]) -> dict[str, list[str]]:
    """Return the columns of a text list, by our names; "" where a row is too short."""
    return {word: [row[at].strip() if at < len(row) else "" for row in rows] for word, at in found.items()}


def text_columns(place: Path, names: Mapping[str, str]) -> dict[str, list[str]]:
    """Return columns of a Parquet file as text, by our names; "" for null. names: our name -> the column's.

    Raises:
        TutelageError: a column cannot be read, or holds lists, structs or bytes.
    """
    table, found = read_columns(place, names.values()), {}
    for word, name in names.items():
        kind = table.schema.field(name).type
        if not is_plain(kind):
            message = f"{place}: column {name} holds {kind}, but {word} must be text or a number in each row"
            raise TutelageError(message, "write that column again as text, or rename it if it is something else")
        try:
            found[word] = [clean("" if v is None else str(v)) for v in table[name].to_pylist()]
        except (
            ValueError,
            pa.ArrowException,
            OverflowError,
        ) as error:  # such as bytes that are no text, a time that Python cannot hold
            message = f"{place}: column {name} cannot be read as text: {error}"
            raise TutelageError(message, "write that column again as text in UTF-8") from None
    return found


def is_plain(kind: pa.DataType) -> bool:
    """Whether the values of a column are numbers, text or the like: neither lists or structs nor bytes."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return not (pa.types.is_nested(kind) or "binary" in str(kind))
