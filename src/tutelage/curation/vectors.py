"""Embeddings of a gallery, in memory or on disk, read in blocks or by position."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tutelage.data.block_cache import gather
from tutelage.errors import TutelageError, shown
from tutelage.progress import Advance

Part = np.ndarray | Callable[[], np.ndarray]
BLOCK = 2048  # rows read and compared at once: 1.5 MB of a file with 384 features


def _opened(part: Part) -> np.ndarray:
    """Return the rows of a part, (n, D) float16 or float32; those of a file are mapped and not yet read."""
    rows = part() if callable(part) else part
    if rows.ndim != 2 or rows.shape[1] < 1 or rows.dtype not in (np.dtype(np.float16), np.dtype(np.float32)):
        message = f"an array has shape {rows.shape}, {rows.dtype}, but embeddings must be (rows, features), float16 or float32"
        raise TutelageError(message, "convert it, for example rows.reshape(len(rows), -1).astype('float32')")
    return rows


@dataclass(frozen=True, eq=False)
class Vectors:
    """Embeddings of a gallery, cut into parts in any way; the rows are numbered through all parts.

    Args:
        parts: (n_i, D) float16 or float32 each: arrays, or functions that map one from a file, which is mapped only while
            rows are read from it.
        mean: (D,) float32 that is subtracted before every row is divided by its length; None: the rows are used
            unchanged, because they are normalised already. A row that equals the mean stays zero.

    Raises:
        TutelageError: a part of another shape or dtype, parts or a mean of different widths.
    """

    parts: tuple[Part, ...]
    mean: np.ndarray | None

    def __post_init__(self):
        widths = sorted({width for _, width in self._shapes})
        if len(widths) != 1:
            message = (
                f"parts with {shown(widths) or 'no'} features: at least one part is needed, and all of the same width"
            )
            raise TutelageError(message, "embed all parts by the same model")
        if self.mean is not None and (self.mean.shape != (self.width,) or not np.isfinite(self.mean).all()):
            message = f"a mean of shape {self.mean.shape} must be ({self.width},) finite numbers, as many as a row has"
            raise TutelageError(message, "take the mean of these rows, or None")

    @cached_property
    def _shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(_opened(source).shape for source in self.parts)

    @cached_property
    def _starts(self) -> np.ndarray:
        """(parts + 1,) int64: the first row of each part, then the number of all rows."""
        return np.cumsum([0, *(rows for rows, _ in self._shapes)])

    @property
    def count(self) -> int:
        """Rows in all parts."""
        return int(self._starts[-1])

    @property
    def width(self) -> int:
        """D, features of a row."""
        return self._shapes[0][1]

    def blocks(
        self, size: int = BLOCK, usable: np.ndarray | None = None, advance: Advance = lambda n: None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield positions (n,) int64 and rows (n, D) as from `rows`, in order; a block starts at each multiple of `size`.

        Args:
            usable: (N,) bool; other rows are left out, and may be NaN. None: all rows are usable.
            advance: called with the numbers of rows just done, N in all.
        """
        for start in range(0, self.count, size):
            positions = np.arange(start, min(start + size, self.count))
            kept = positions if usable is None else positions[usable[positions]]
            if len(kept):
                yield kept, self.rows(kept)
            advance(len(positions))

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """Return the rows at `positions` (m,) int64, in any order, also repeated: (m, D) float32 centred, unit length."""
        positions = np.asarray(positions, dtype=np.int64)
        outside = positions[(positions < 0) | (positions >= self.count)]
        if len(outside):
            raise TutelageError(f"no row {shown(outside)}: rows are 0 to {self.count - 1}", "count from 0")
        rows = np.empty((len(positions), self.width), dtype=np.float32)
        gather(lambda part: _opened(self.parts[part]), self._starts, positions, rows)
        if self.mean is not None:
            rows -= self.mean.astype(np.float32)
        squares = np.einsum("nd,nd->n", rows, rows)
        broken = ~np.isfinite(squares)
        if broken.any():
            raise TutelageError(f"NaN or infinite numbers in row {shown(positions[broken])}", "embed these images anew")
        if self.mean is not None:
            rows *= np.divide(1, np.sqrt(squares), out=np.zeros_like(squares), where=squares > 0)[:, None]
        return rows


def mean_of(parts: tuple[Part, ...], sample: int = 100_000) -> np.ndarray:
    """Return the mean (D,) float32 of up to `sample` rows, evenly spaced over all parts: the same rows at every call."""
    vectors = Vectors(parts, None)
    if not vectors.count:
        raise TutelageError("no rows to take a mean of", "give at least one image")
    positions = np.linspace(0, vectors.count - 1, min(sample, vectors.count)).astype(np.int64)
    blocks = (vectors.rows(positions[start : start + BLOCK]) for start in range(0, len(positions), BLOCK))
    total = sum((rows.sum(axis=0, dtype=np.float64) for rows in blocks), np.zeros(vectors.width))
    return (total / len(positions)).astype(np.float32)
