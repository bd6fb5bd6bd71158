"""Embeddings computed elsewhere, matched to images by name.

Supported are Parquet files with a column of vectors and one of names; .npy files with their names beside them (`x.npy` and
`x.txt`, one name per line, or `x.parquet`); and folders as clip-retrieval writes them (`img_emb/img_emb_0.npy`,
`metadata/metadata_0.parquet`). Vectors may be float16, float32 or float64 and need not have unit length.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tutelage.data.block_cache import gather
from tutelage.data.sources import ImageRef
from tutelage.errors import TutelageError, number_of, shown
from tutelage.files import hash_of
from tutelage.regular_file import regular, text_in

NAMES = ("id", "image_path", "path", "key", "file", "file_name", "name", "class", "label", "url")
FORMS = "Parquet with a column of vectors and one of names, or x.npy beside x.txt (one name per line) or x.parquet"


class PrecomputedEmbeddings:
    """Precomputed vectors, looked up by name.

    Args:
        paths: files, or folders of them. flag: the command-line flag that gave them, for messages.

    Raises:
        TutelageError: a file that cannot be read, without names or vectors, with other widths, or a name with two vectors.
    """

    def __init__(self, paths: Sequence[str | Path], flag: str = "--embeddings"):
        self.flag = flag
        files = [file for path in paths for file in _files(Path(path), flag)]
        read = [_read(file, flag) for file in files]
        if len(widths := sorted({rows.shape[1] for _, rows in read})) != 1:
            message = f"{flag} has vectors with different numbers of features: {shown(widths)}"
            raise TutelageError(message, "give the vectors of one encoder only")
        self.width: int = widths[0]
        self.names = [name for names, _ in read for name in names]
        self._parts = [rows for _, rows in read]
        self._starts = np.cumsum([0, *map(len, self._parts)])
        self._row = {name: row for row, name in enumerate(self.names)}
        if len(self._row) != len(self.names):
            seen: set[str] = set()
            twice = [name for name in self.names if name in seen or seen.add(name)]
            raise TutelageError(f"{flag} has two vectors for {shown(map(repr, twice))}", "keep one vector per name")
        facts = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        self.about: dict[str, object] = {"embeddings": hash_of([facts, self.width]), "width": self.width}
        self._claims: dict[int, ImageRef] = {}
        some = self._stored(np.linspace(0, len(self) - 1, min(1000, len(self))).astype(np.int64))
        lengths = np.linalg.norm(some, axis=1)
        lengths = lengths[np.isfinite(lengths) & (lengths > 0)]
        self._scale = 1 / float(np.median(lengths)) if len(lengths) else 1.0  # fits all vectors into half precision

    def __len__(self) -> int:
        return len(self.names)

    def find(self, refs: Sequence[ImageRef], what: str) -> np.ndarray:
        """Return the rows of images: (n,) int64, -1 for images without a vector.

        Args:
            what: what the images are, for messages.

        Raises:
            TutelageError: two images share a vector, even if one of them was found by an earlier call.
        """
        rows = np.array([self._find(ref) for ref in refs], np.int64)
        found = rows[rows >= 0]
        order = np.argsort(found, kind="stable")
        if len(twice := np.flatnonzero(np.diff(found[order]) == 0)):
            same = np.flatnonzero(rows == found[order][twice[0]])
            name, ids = self.names[int(rows[same[0]])], shown(refs[i].id for i in same.tolist())
            hint = "give each image a name of its own, tar members as shard.tar/member"
            raise TutelageError(f"{self.flag}: {name!r} names two of the {what}: {ids}", hint)
        for ref, row in zip(refs, rows.tolist(), strict=True):
            other = self._claims.setdefault(row, ref) if row >= 0 else ref
            if other.fingerprint != ref.fingerprint:
                raise TutelageError(
                    f"{self.flag}: {self.names[row]!r} names {ref.id} of the {what}, and {other.id} in {other.container}",
                    "name each image by its whole path (/data/a.jpg, /data/a.tar/b.jpg, /data/a.parquet#7)",
                )
        return rows

    def _find(self, ref: ImageRef) -> int:
        return next((self._row[name] for name in names_of(ref) if name in self._row), -1)

    def lacks(self, ref: ImageRef) -> str | None:
        """Return why an image cannot be used; None if it can."""
        row = self._find(ref)
        if row < 0:
            return f"no vector of its name in {self.flag}"
        with np.errstate(over="ignore"):
            fits = np.isfinite(self.take([row]).astype(np.float16)).all()
        return None if fits else f"its vector in {self.flag} holds NaN or infinite numbers"

    def prepare(self, rgb: np.ndarray) -> np.ndarray:
        """Return an empty array, because `features` needs no pixels."""
        return rgb[:0]

    def features(self, refs: Sequence[ImageRef], pixels: Sequence[np.ndarray]) -> np.ndarray:
        """Return the (n, D) float16 vectors of images."""
        return self.take([self._find(ref) for ref in refs]).astype(np.float16)

    def take(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the (n, D) float32 vectors of these rows, all scaled by the same factor."""
        return (self._stored(rows) * self._scale).astype(np.float32)

    def _stored(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return (n, D) float64 vectors with the values in the files."""
        rows = np.asarray(rows, np.int64)
        return gather(self._parts.__getitem__, self._starts, rows, np.empty((len(rows), self.width)))

    def of_names(self, names: Sequence[str]) -> np.ndarray:
        """Return the (n, D) float32 vectors of these names.

        Raises:
            TutelageError: a name without a vector, or a vector with NaN or infinite numbers.
        """
        if without := [name for name in names if name not in self._row]:
            raise TutelageError(
                f"{self.flag}: no vector for {shown(map(repr, without))} (it has {shown(map(repr, self.names), 5)})",
                f"give a vector for each of {shown(map(repr, names))}",
            )
        return self.finite([self._row[name] for name in names])

    def finite(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the same as `take`, but raise an error for NaN or infinite numbers."""
        vectors = self.take(rows)
        if len(bad := np.flatnonzero(~np.isfinite(vectors).all(axis=1))):
            names = shown(self.names[rows[i]] for i in bad.tolist())
            raise TutelageError(f"{self.flag} has NaN or infinite numbers for {names}", "give finite vectors")
        return vectors


def names_of(ref: ImageRef) -> list[str]:
    """Return the names that an image may have elsewhere, the most specific first: its whole path, its id, in a tar its member's
    name; then all of them without suffix.
    """
    if ref.kind == "parquet":
        return [f"{ref.container}#{ref.position}", ref.id]
    names = [ref.container, ref.id]
    if ref.kind == "tar":
        shard = os.path.basename(ref.container) + "/"
        member = ref.id[ref.id.rindex(shard) + len(shard) :] if shard in ref.id else ""
        names = [f"{ref.container}/{member}", ref.id, member]
    stems = [os.path.splitext(name)[0] for name in names]
    return [name for name in (*names, *stems) if name]


def _files(path: Path, flag: str) -> list[Path]:
    """Return the files of vectors at a path, in natural order."""
    if not path.exists():
        raise TutelageError(f"{flag} {path}: no such file or folder", f"check the path, and give {FORMS}")
    if not path.is_dir():
        return [path]
    inner = path / "img_emb" if (path / "img_emb").is_dir() else path
    found = sorted(inner.glob("*.npy"), key=_natural) or sorted(inner.glob("*.parquet"), key=_natural)
    if not found:
        raise TutelageError(f"{flag} {path} has neither .npy nor .parquet files in it", f"give {FORMS}")
    return found


def _natural(path: Path) -> list[int | str]:
    """Return a sort key that puts img_emb_10 after img_emb_9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _read(path: Path, flag: str) -> tuple[list[str], np.ndarray]:
    """Return the names and (n, D) vectors of one file."""
    _check_regular(path, flag)
    if path.suffix == ".parquet":
        table = _table(path, flag)
        return _names(table, path, flag), _vectors(table, path, flag)
    if path.suffix != ".npy":
        suffix = path.suffix or "a file without suffix"
        raise TutelageError(f"{flag} {path}: {suffix} is neither .npy nor .parquet", f"give {FORMS}")
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        hint = "check that it is a whole .npy file of numbers, or write it again"
        raise TutelageError(f"{flag} {path} cannot be read: {error}", hint) from error
    if rows.ndim != 2 or rows.dtype.kind != "f" or not rows.shape[1]:
        expected = "(images, features) in floating point"
        message = f"{flag} {path} has shape {rows.shape}, {rows.dtype} instead of {expected}"
        raise TutelageError(message, "write one row for each image, for example rows.astype('float32')")
    names = _names_beside(path, flag)
    if not len(rows):
        raise TutelageError(f"{flag} {path} holds no vectors", "embed the gallery again")
    if len(names) != len(rows):
        raise TutelageError(
            f"{flag} {path} has {number_of(len(rows), 'vector')} and {number_of(len(names), 'name')}",
            "name each vector",
        )
    return names, rows


def _check_regular(path: Path, flag: str) -> None:
    try:
        regular(path)
    except OSError as error:
        why = f"is {error.strerror}" if path.exists() and not path.is_dir() else f"cannot be read: {error.strerror}"
        raise TutelageError(f"{flag} {path} {why}", f"give {FORMS}") from error


def _names_beside(path: Path, flag: str) -> list[str]:
    """Return the names of a .npy file's rows, read from the file beside it."""
    beside = [path.with_suffix(".txt"), path.with_suffix(".parquet")]
    if path.parent.name == "img_emb":
        beside.append(path.parent.parent / "metadata" / f"{path.stem.replace('img_emb', 'metadata')}.parquet")
    there = next((file for file in beside if file.exists()), None)
    if there is None:
        hint = f"add {' or '.join(map(str, beside))}, in a .txt one name per line"
        raise TutelageError(f"{flag} {path} has no names beside it", hint)
    _check_regular(there, flag)
    if there.suffix == ".txt":
        try:
            return text_in(there).removesuffix("\n").split("\n")
        except UnicodeDecodeError as error:
            raise TutelageError(
                f"{flag} {there} is not UTF-8: {error}", "write it again in UTF-8, one name per line"
            ) from error
    return _names(_table(there, flag), there, flag)


def _table(path: Path, flag: str) -> pa.Table:
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        why = str(error).splitlines()[0]
        hint = "check that it is a whole Parquet file, or write it again"
        raise TutelageError(f"{flag} {path} cannot be read: {why}", hint) from error


def _names(table: pa.Table, path: Path, flag: str) -> list[str]:
    there = [name for name in NAMES if table.column_names.count(name) == 1]
    words = [name for name in there if pa.types.is_string(table.schema.field(name).type)]  # numbers are not names
    column = next(iter([*words, *there]), None)
    if column is None:
        message = f"{flag} {path} lacks a column of names (columns: {shown(table.column_names)})"
        raise TutelageError(message, f"rename one to one of {', '.join(NAMES)}")
    try:
        return [str(value) for value in table.column(column).to_pylist()]
    except (UnicodeDecodeError, pa.ArrowException) as error:
        hint = "write the names again as text in UTF-8"
        raise TutelageError(f"{flag} {path}: column {column} cannot be read: {error}", hint) from error


def _vectors(table: pa.Table, path: Path, flag: str) -> np.ndarray:
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    columns = [
        f.name for f in table.schema if any(kind(f.type) for kind in kinds) and pa.types.is_floating(f.type.value_type)
    ]
    if len(columns) > 1:  # clip-retrieval writes vectors of captions beside those of images
        columns = [name for name in columns if "image" in name or "img" in name] or columns
    if len(columns) != 1:
        what = f"{len(columns)} columns of vectors" + (f": {shown(columns)}" if columns else "")
        raise TutelageError(f"{flag} {path} has {what}", "give one column of lists of floating-point numbers only")
    column = table.column(columns[0])
    if not len(column):
        raise TutelageError(f"{flag} {path} holds no vectors", "embed the gallery again")
    lengths = set(pc.call_function("list_value_length", [column]).to_pylist())
    if len(lengths) != 1 or None in lengths:
        message = f"{flag} {path} has vectors of {shown(map(str, lengths))} features, not all of one width"
        raise TutelageError(message, "give all vectors the same width, and leave none out")
    width = lengths.pop()
    values = np.concatenate([np.asarray(part.flatten().to_numpy(zero_copy_only=False)) for part in column.chunks])
    return values.reshape(-1, width)
