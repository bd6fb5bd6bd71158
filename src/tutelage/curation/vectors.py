"""Embeddings of a gallery, in memory or on disk, read in blocks or by position."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from tutelage.errors import TutelageError, shown

BLOCK = 2048  # rows read and compared at once: 1.5 MB of a file with 384 features


@dataclass(frozen=True)
class _Part:
    """One array of rows: in memory, or the rows of a .npy file from byte `offset` on."""

    source: np.ndarray | Path
    rows: int
    width: int
    dtype: np.dtype
    offset: int = 0

    def read(self, first: int, count: int, scratch: np.ndarray) -> torch.Tensor:
        """Return rows first ... first + count: (count, D) as stored; scratch: (bytes,) uint8 that may hold them."""
        room = scratch[: count * self.width * self.dtype.itemsize]
        stored = room.view(self.dtype).reshape(count, self.width)
        if isinstance(self.source, Path):
            with self.source.open("rb", buffering=0) as file:
                self._read_at(file, first, room)
        else:
            rows = self.source[first : first + count]
            if rows.flags.c_contiguous and rows.flags.writeable:  # torch warns about read-only arrays
                return torch.from_numpy(rows)
            np.copyto(stored, rows)
        return torch.from_numpy(stored)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Return the rows at positions (m,), which ascend: (m, D) as stored."""
        if isinstance(self.source, np.ndarray):
            return self.source[rows]
        taken = np.empty((len(rows), self.width), dtype=self.dtype)
        with self.source.open("rb", buffering=0) as file:
            for place, row in enumerate(rows.tolist()):
                self._read_at(file, row, taken[place].view(np.uint8))
        return taken

    def _read_at(self, file, first: int, room: np.ndarray) -> None:
        file.seek(self.offset + first * self.width * self.dtype.itemsize)
        view, read = room.data, 0
        while read < len(view):  # one call reads 2 GB at most
            got = file.readinto(view[read:])
            if not got:
                raise TutelageError(
                    f"{self.source} ends within row {first + read // (self.width * self.dtype.itemsize)}, but its "
                    f"header says {self.rows} rows",
                    "write the file again",
                )
            read += got


def _part(source: np.ndarray | Path) -> _Part:
    """Describe an array or a .npy file without reading its rows."""
    offset, fortran, name = 0, False, "an array"
    if isinstance(source, np.ndarray):
        shape, dtype = source.shape, source.dtype
    else:
        name = str(source)
        try:
            with open(source, "rb") as file:
                version = np.lib.format.read_magic(file)
                header = (
                    np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                )
                shape, fortran, dtype = header(file)
                offset = file.tell()
        except (OSError, ValueError) as error:
            raise TutelageError(f"{name} is not a readable .npy file of embeddings: {error}") from error
    if len(shape) != 2 or shape[1] < 1 or fortran or dtype not in (np.dtype(np.float16), np.dtype(np.float32)):
        raise TutelageError(
            f"{name} has shape {tuple(shape)}, {dtype}{', in Fortran order' if fortran else ''}, but embeddings must be "
            "(rows, features), float16 or float32, in C order"
        )
    return _Part(source, shape[0], shape[1], dtype, offset)


@dataclass(frozen=True, eq=False)
class Vectors:
    """Embeddings of a gallery, cut into parts in any way; the rows are numbered through all parts.

    Args:
        parts: arrays or .npy files, (n_i, D) float16 or float32 each. A file is read block by block, never mapped.
        mean: (D,) float32 that is subtracted before every row is divided by its length; None: the rows are used
            unchanged, because they are normalised already. A row that equals the mean stays zero.

    Raises:
        TutelageError: a part that cannot be read or has another shape or dtype, parts or a mean of different widths.
    """

    parts: tuple[np.ndarray | Path, ...]
    mean: np.ndarray | None

    def __post_init__(self):
        widths = sorted({part.width for part in self._parts})
        if len(widths) != 1:
            raise TutelageError(
                f"parts with {shown(widths) or 'no'} features: at least one part is needed, and all of the same width"
            )
        if self.mean is not None and (self.mean.shape != (self.width,) or not np.isfinite(self.mean).all()):
            raise TutelageError(
                f"a mean of shape {self.mean.shape} must be ({self.width},) finite numbers, as many as a row has"
            )

    @cached_property
    def _parts(self) -> tuple[_Part, ...]:
        return tuple(_part(source) for source in self.parts)

    @cached_property
    def _starts(self) -> np.ndarray:
        """(parts + 1,) int64: the first row of each part, then the number of all rows."""
        return np.cumsum([0, *(part.rows for part in self._parts)])

    @property
    def count(self) -> int:
        """Rows in all parts."""
        return int(self._starts[-1])

    @property
    def width(self) -> int:
        """D, features of a row."""
        return self._parts[0].width

    def blocks(self, size: int = BLOCK) -> Iterator[tuple[int, np.ndarray]]:
        """Yield all rows in order: (start row, (n, D) float32 centred, unit length), n <= size; never across two parts."""
        scratch = self._scratch(size)
        for first, after in zip(self._starts[:-1].tolist(), self._starts[1:].tolist(), strict=True):
            for start in range(first, after, size):
                rows = torch.empty((min(size, after - start), self.width))
                self._fill(start, rows, scratch)
                yield start, rows.numpy()

    def aligned(self, usable: np.ndarray | None) -> Iterator[tuple[int, int, torch.Tensor | None, np.ndarray | None]]:
        """Yield blocks for a search: start, n <= BLOCK, (BLOCK, D) float32 of which n rows count, usable (n,) or None for all.

        Blocks start at multiples of BLOCK whatever the parts, so that the parts never change the shape of a product. The rows
        are None if none is usable; unusable rows may be NaN. The tensor is overwritten by the third block after it.
        """
        scratch, buffers = self._scratch(BLOCK), torch.zeros((3, BLOCK, self.width))
        for index, start in enumerate(range(0, self.count, BLOCK)):
            count = min(BLOCK, self.count - start)
            mask = None if usable is None else usable[start : start + count]
            if mask is not None and not mask.any():
                yield start, count, None, mask
                continue
            rows = buffers[index % 3]
            self._fill(start, rows[:count], scratch, mask)
            yield start, count, rows, None if mask is None or mask.all() else mask

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """Return the rows at `positions` (m,) int64, in any order, also repeated: (m, D) float32 centred, unit length."""
        positions = np.asarray(positions, dtype=np.int64)
        outside = positions[(positions < 0) | (positions >= self.count)]
        if len(outside):
            raise TutelageError(f"no row {shown(outside)}: rows are 0 to {self.count - 1}")
        order = np.argsort(positions, kind="stable")  # disks read forwards fastest
        rows = np.empty((len(positions), self.width), dtype=np.float32)
        cuts = np.searchsorted(positions[order], self._starts)
        for part, start, low, high in zip(self._parts, self._starts[:-1], cuts[:-1], cuts[1:], strict=True):
            for first in range(low, high, BLOCK):
                places = order[first : min(first + BLOCK, high)]
                rows[places] = part.take(positions[places] - start)
        self._prepare(torch.from_numpy(rows), positions)
        return rows

    def _scratch(self, size: int) -> np.ndarray:
        """Return a reusable buffer for `size` rows as they are stored."""
        return np.empty(size * self.width * max(part.dtype.itemsize for part in self._parts), dtype=np.uint8)

    def _fill(self, start: int, rows: torch.Tensor, scratch: np.ndarray, usable: np.ndarray | None = None) -> None:
        """Fill rows (n, D) float32 with those from row `start` on, across parts; usable: (n,) bool, other rows may be NaN."""
        filled, index = 0, int(np.searchsorted(self._starts, start, side="right")) - 1
        while filled < len(rows):
            part, first = self._parts[index], start + filled - int(self._starts[index])
            count = min(part.rows - first, len(rows) - filled)
            if count:
                rows[filled : filled + count].copy_(part.read(first, count, scratch))  # 10 times as fast as in numpy
            filled, index = filled + count, index + 1
        self._prepare(rows, np.arange(start, start + len(rows)), usable)

    def _prepare(self, rows: torch.Tensor, names: np.ndarray, usable: np.ndarray | None = None) -> None:
        """Centre rows (n, D) and scale them to unit length, in place; raise an error for rows without a finite length."""
        if self.mean is not None:
            rows.sub_(torch.from_numpy(np.array(self.mean, dtype=np.float32)))
        squares = np.einsum("nd,nd->n", rows.numpy(), rows.numpy())
        broken = ~np.isfinite(squares)
        if usable is not None:
            broken &= usable
        if broken.any():
            raise TutelageError(f"NaN or infinite numbers in row {shown(names[broken])}")
        if self.mean is not None:
            scales = np.divide(1, np.sqrt(squares), out=np.zeros_like(squares), where=squares > 0)
            rows.mul_(torch.from_numpy(scales)[:, None])


def mean_of(parts: tuple[np.ndarray | Path, ...], sample: int = 100_000) -> np.ndarray:
    """Return the mean (D,) float32 of up to `sample` rows, evenly spaced over all parts: the same rows at every call."""
    vectors = Vectors(parts, None)
    if not vectors.count:
        raise TutelageError("no rows to take a mean of")
    positions = np.linspace(0, vectors.count - 1, min(sample, vectors.count)).astype(np.int64)
    total = np.zeros(vectors.width)
    for start in range(0, len(positions), BLOCK):
        total += vectors.rows(positions[start : start + BLOCK]).sum(axis=0, dtype=np.float64)
    return (total / len(positions)).astype(np.float32)
