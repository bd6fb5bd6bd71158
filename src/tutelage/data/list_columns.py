"""Columns of lists and Parquet files, found under the names that people give them, as text."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tutelage.data.sources import clean
from tutelage.data.tabular import image_column
from tutelage.errors import TutelageError, shown
from tutelage.regular_file import regular


def parquet_shards(place: Path, folders: Sequence[Path] = ()) -> list[Path]:
    """Return the Parquet files of a folder, or of `data/` in it.

    folders: those in it that may be classes: beside them, files without images, such as embeddings, do not count.
    """
    for folder in (place, place / "data"):
        inside = sorted(folder.iterdir()) if folder.is_dir() else []
        found = [
            one for one in inside if one.name.lower().endswith(".parquet") and one.name[0] != "." and not one.is_dir()
        ]
        if found and (folder != place or not folders or any(map(_has_images, found))):
            return found
    return []


def _has_images(place: Path) -> bool:
    try:
        image_column(read_schema(place), str(place))
    except TutelageError as error:
        return "no image column" not in error.message
    return True


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


def null_rows(place: Path, column: str) -> list[bool]:
    """Return whether each row of a column of a Parquet file is null; a few rows are in memory at a time."""
    try:
        with pq.ParquetFile(place) as file:
            parts = [batch.column(0).is_null() for batch in file.iter_batches(64, columns=[column])]
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(place, error) from None
    return [null for part in parts for null in part.to_pylist()]


def _unreadable(place: Path, error: Exception) -> TutelageError:
    why = getattr(error, "strerror", None) or str(error).partition("\n")[0]
    return TutelageError(f"{place} cannot be read: {why}", "check that it is a whole Parquet file, or copy it again")


def named_file(folder: Path, name: str, *below: str) -> str:
    """Return the absolute path of a file that a list names, relative to a folder or to one `below` it; "" if there is none.

    A list from Windows has backslashes, which are read as slashes where no file has that very name.
    """
    ways = (os.path.join(folder, *above, one) for one in (name, name.replace("\\", "/")) for above in ((), *zip(below)))
    return next((os.path.abspath(way) for way in ways if os.path.isfile(way)), "")


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
    """Return columns of a Parquet file as text, by our names; "" for null and NaN. names: our name -> the columns that may be it.

    Raises:
        TutelageError: a column cannot be read, or holds lists, structs or bytes; two that may be the same hold different things.
    """
    table = read_columns(place, [name for several in names.values() for name in several])
    cells = {word: {name: _texts(place, table, word, name) for name in several} for word, several in names.items()}
    return _agreed(place, cells)


def _texts(place: Path, table: pa.Table, word: str, name: str) -> list[str]:
    kind = table.schema.field(name).type
    if not is_plain(kind):
        message = f"{place}: column {name} holds {kind}, but {word} must be text or a number in each row"
        raise TutelageError(message, "write that column again as text, or rename it if it is something else")
    try:
        return [clean(_text(value)) for value in table[name].to_pylist()]
    except (
        ValueError,
        pa.ArrowException,
        OverflowError,
    ) as error:  # bytes that are no text, a time that Python cannot hold
        message = f"{place}: column {name} cannot be read as text: {error}"
        raise TutelageError(message, "write that column again as text in UTF-8") from None


def _text(value: object) -> str:
    """Return a cell as text: "" for null and NaN, a whole number without decimals, which a column with gaps has as 1.0."""
    if isinstance(value, float):
        return "" if value != value else str(int(value)) if value.is_integer() else str(value)
    return "" if value is None else str(value)


def is_plain(kind: pa.DataType) -> bool:
    """Whether the values of a column are numbers, text or the like: neither lists or structs nor bytes."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return not (pa.types.is_nested(kind) or "binary" in str(kind))


def _agreed(place: Path, columns: Mapping[str, Mapping[str, list[str]]]) -> dict[str, list[str]]:
    """Return one column for each of our names. columns: our name -> name of a column -> its cells, the preferred one first.

    Raises:
        TutelageError: columns that may be the same hold different things; of images, that name different files.
    """
    chosen: dict[str, list[str]] = {}
    for word, several in sorted(columns.items(), key=lambda column: column[0] != "label"):
        (first, cells), *others = several.items()
        labels = chosen.get("label", [""] * len(cells))  # a list may name files in the folders of their classes
        for name, more in others:
            rows = [row for row in zip(cells, more, labels, strict=True) if row[0] != row[1]]
            if word in ("path", "image"):  # beside the path, a name without its folder, or a number, is no other image
                files = [[named_file(place.parent, one, label) for one in row] for *row, label in rows]
                rows = [other for one, other in files if other not in ("", one)]
            if rows:
                message = f"{place} has two columns that may be the {word}, {first} and {name}, and they differ"
                raise TutelageError(message, f"keep one of them, or rename the one that is not the {word}")
        chosen[word] = cells
    return chosen
