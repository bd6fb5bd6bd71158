"""Columns of lists and Parquet files, found under the names that people give them, as text."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tutelage.data.sources import clean
from tutelage.errors import TutelageError, shown


def parquet_shards(place: Path) -> list[Path]:
    """Return the Parquet files of a folder, or of `data/` in it."""
    return sorted(place.glob("[!.]*.parquet")) or sorted(place.glob("data/[!.]*.parquet"))


def read_schema(place: Path) -> pa.Schema:
    try:
        return pq.read_schema(place)
    except (pa.ArrowInvalid, OSError) as error:
        hint = "check that it is a whole Parquet file, or copy it again"
        raise TutelageError(f"{place} cannot be read: {error}", hint) from None


def find_columns(place: Path, header: Sequence[str], columns: Mapping[str, Sequence[str]]) -> dict[str, list[int]]:
    """Map our name of a column to the indices of those that may be it, if there are any. columns: our names, each with its aliases.

    Raises:
        TutelageError: two columns have the same name.
    """
    lower = [cell.strip().lower() for cell in header]
    found = {word: [lower.index(alias) for alias in aliases if alias in lower] for word, aliases in columns.items()}
    twice = [alias for aliases in columns.values() for alias in aliases if lower.count(alias) > 1]
    if twice:
        message = f"{place} has {lower.count(twice[0])} columns called {twice[0]} (columns: {shown(header, 20)})"
        raise TutelageError(message, "keep one of them, or rename the others")
    return {word: places for word, places in found.items() if places}


def text_cells(
    place: Path, header: Sequence[str], rows: Sequence[Sequence[str]], found: Mapping[str, Sequence[int]]
) -> dict[str, list[str]]:
    """Return the columns of a text list, by our names; "" where a row is too short. A label stays as it is, as in a Parquet file.

    Args:
        found: as `find_columns` returns it.
    """

    def cell(row: Sequence[str], word: str, at: int) -> str:
        text = row[at] if at < len(row) else ""
        return text if word == "label" and text.strip() else text.strip()

    cells = {
        word: {header[at]: [cell(row, word, at) for row in rows] for at in places} for word, places in found.items()
    }
    return _agreed(place, cells)


def text_columns(place: Path, names: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return columns of a Parquet file as text, by our names; "" for null. names: our name -> the columns that may be it."""
    table = pq.read_table(place, columns=sorted({name for several in names.values() for name in several}))
    try:
        cells = {n: [clean("" if v is None else str(v)) for v in table[n].to_pylist()] for n in table.column_names}
    except UnicodeDecodeError as error:
        message = f"{place} holds a text that is not UTF-8: {error.object[:80]!r}"
        raise TutelageError(message, "write it again with texts in UTF-8") from None
    return _agreed(place, {word: {name: cells[name] for name in several} for word, several in names.items()})


def listed_file(place: Path, name: str, folder: str = "") -> str:
    """Return the absolute path, without `./` and the like, of a file that a list names; "" if it does not exist.

    It is looked for beside the list, then in `folder` beside it; a list from Windows may name it with backslashes.
    """
    ways = (
        os.path.join(place.parent, *inside, one)
        for one in (name, name.replace("\\", "/"))
        for inside in ((), (folder,))
    )
    return next((os.path.abspath(way) for way in ways if os.path.isfile(way)), "")


def _agreed(place: Path, columns: Mapping[str, Mapping[str, list[str]]]) -> dict[str, list[str]]:
    """Return one column for each of our names. columns: our name -> name of a column -> its cells, the preferred one first.

    Raises:
        TutelageError: columns that may be the same hold different things; of images, that name different files.
    """
    chosen: dict[str, list[str]] = {}
    for word, several in columns.items():
        (first, cells), *others = several.items()
        for name, more in others:
            pairs = [(one, other) for one, other in zip(cells, more, strict=True) if one != other]
            if word in ("path", "image"):  # beside the path, a name without its folder, or a number, is no other image
                pairs = [
                    (one, other)
                    for one, other in pairs
                    if listed_file(place, other) not in ("", listed_file(place, one))
                ]
            if pairs:
                message = f"{place} has two columns that may be the {word}, {first} and {name}, and they differ"
                raise TutelageError(message, f"keep one of them, or rename the one that is not the {word}")
        chosen[word] = cells
    return chosen
