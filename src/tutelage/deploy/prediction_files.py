"""The files that predictions are written to, which replace nothing but earlier predictions. Loads no torch."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from tutelage.errors import TutelageError, shown

ENDINGS = (".csv", ".parquet")


def check_outputs(out: Path, masks: bool) -> None:
    """Check before anything is predicted that only earlier predictions are replaced. masks: whether masks are painted.

    Raises:
        TutelageError: `out` has another ending; it, the list of rejected images beside it, or the folder of masks holds something else.
    """
    if out.suffix.lower() not in ENDINGS:
        example = f"for example --out {out.name or 'predictions'}.csv"
        raise TutelageError(f"--out {out} must end in .csv or .parquet", example)
    hint = "choose another --out, or move that aside"
    try:
        if "\0" in str(out):
            raise ValueError("a NUL character in the name")
        for path, second in ((out, "mask" if masks else "class"), (rejected_list(out), "reason")):
            if path.exists() and [*_table(path)][:2] != ["path", second]:
                message = f"--out {out}: {path} is there already, and is no table of earlier predictions"
                raise TutelageError(message, hint)
        folder = out.with_suffix("")
        if masks and folder.exists():
            painted = set(_table(out).get("mask", ())) if out.exists() else set()
            there = map(str, sorted(folder.iterdir()) if folder.is_dir() else [folder])
            if others := [path for path in there if path not in painted]:
                message = f"--out {out}: the masks' folder {folder} holds other files: {shown(others, 3)}"
                raise TutelageError(message, hint)
    except (OSError, ValueError) as error:
        raise TutelageError(f"--out {out} cannot be written: {error}", "choose another --out") from error


def rejected_list(out: Path) -> Path:
    """Return the file beside `out` that lists the images that cannot be read."""
    return out.with_name(f"{out.stem}.rejected.csv")


def _table(path: Path) -> Mapping[str, Sequence[object]]:
    """Return the columns of a table that was written before; empty if the file is something else."""
    if path.is_file() and path.suffix.lower() == ".parquet":
        with contextlib.suppress(Exception):  # pyarrow raises its own errors for other files
            return _parquet().read_table(path).to_pydict()
    elif path.is_file():
        with (
            contextlib.suppress(UnicodeDecodeError, csv.Error),
            path.open(newline="", encoding="utf-8", errors="surrogateescape") as file,
        ):
            first, *rows = list(csv.reader(file)) or [[]]
            return {name: [row[i] for row in rows if len(row) > i] for i, name in enumerate(first)}
    return {}


def _parquet() -> ModuleType:
    try:
        import pyarrow.parquet
    except ImportError:
        raise TutelageError("--out: pyarrow is not installed", "use a .csv, or run `pip install pyarrow`") from None
    return pyarrow.parquet


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield the path of a file beside `path`, in a folder that is made, which replaces it once the block has succeeded."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    yield partial
    partial.replace(path)


def write_csv(path: Path, columns: Mapping[str, Sequence[object]]) -> None:
    """Write a table as CSV, completely or not at all; booleans are written as true and false."""

    def text(value: object) -> object:
        return str(bool(value)).lower() if isinstance(value, (bool, np.bool_)) else value

    with whole(path) as partial, partial.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([text(value) for value in row] for row in zip(*columns.values(), strict=True))


def write_predictions(
    path: Path, columns: Mapping[str, Sequence[object]], rejected: Sequence[tuple[str, str]]
) -> Path | None:
    """Write predictions.csv (or .parquet), and beside it a list of the rejected images.

    Args:
        columns: of the table, `path` among them. rejected: path and reason of each image that cannot be read.

    Returns:
        the path of the list of rejected images; None if all could be read.

    Raises:
        TutelageError: no image could be read, or a .parquet is requested without pyarrow.
    """
    if rejected and not columns["path"]:
        first = shown((f"{name} ({reason})" for name, reason in rejected), 3)
        raise TutelageError(f"none of {len(rejected):,} files can be read as an image: {first}")
    if path.suffix.lower() == ".parquet":
        write_parquet(path, columns)
    else:
        write_csv(path, columns)
    listed = rejected_list(path)
    if not rejected:
        listed.unlink(missing_ok=True)
        return None
    write_csv(listed, {"path": [name for name, _ in rejected], "reason": [why for _, why in rejected]})
    return listed


def write_parquet(path: Path, columns: Mapping[str, Sequence[object]]) -> None:
    """Write a table as Parquet, completely or not at all."""
    module = _parquet()
    import pyarrow

    with whole(path) as partial:
        module.write_table(pyarrow.table({name: pyarrow.array([*values]) for name, values in columns.items()}), partial)
