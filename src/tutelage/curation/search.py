"""Exact nearest neighbours of a few queries among up to hundreds of millions of embeddings, in memory or on disk."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest

import numpy as np
import torch

from tutelage.curation.vectors import BLOCK, Vectors
from tutelage.errors import TutelageError, shown

TILE = 256  # most queries compared at once: their 2 MB of similarities stay in the processor's cache
LEAST = 64  # least rows in a product: below 16 rows or 4 queries MKL takes another path, and the last bits differ
STRIP = 512  # rows of a block for which one thread finds the best query
WORKERS = 8  # most threads with similarities of their own; further cores share in the matrix products
OVERHEAD = 48 << 20  # bytes for threads and buffers of the matrix product: 10 to 13 MB were measured on 2 cores


def silent(count: int) -> None:
    """Ignore progress."""


@dataclass(frozen=True, eq=False)
class _Best:
    """The best rows of each query so far, and newer rows that passed its bar and are not yet weeded out.

    Q queries with room for R rows each, always in ascending order of rows, so that the smaller row comes first in a tie.
    """

    k: int
    similarities: np.ndarray  # (Q, R) float32, -inf in empty places
    rows: np.ndarray  # (Q, R) int64
    filled: np.ndarray  # (Q,) int64
    bars: np.ndarray  # (Q,) float32: at least k rows score this much; later rows must score more

    @classmethod
    def empty(cls, queries: int, k: int, room: int) -> _Best:
        """Return an empty table for `queries` queries."""
        return cls(
            k,
            np.full((queries, room), -np.inf, dtype=np.float32),
            np.full((queries, room), -1, dtype=np.int64),
            np.zeros(queries, dtype=np.int64),
            np.full(queries, -np.inf, dtype=np.float32),
        )

    def take(self, first: int, scores: np.ndarray, passing: np.ndarray, start: int, usable: np.ndarray | None) -> None:
        """Keep the scores (q, n) float32 that pass: queries first ... first + q against rows start ... start + n.

        passing: (q, n) bool buffer, overwritten; allocating it each time took 4 times as long as the comparison.
        """
        count, bars = scores.shape[1], self.bars[first : first + len(scores)]
        np.greater(scores, bars[:, None], out=passing)
        if usable is not None:
            passing &= usable
        hits = np.flatnonzero(passing)
        cuts = np.searchsorted(hits, np.arange(len(scores) + 1) * count)
        crowded = np.flatnonzero(np.diff(cuts) > self.rows.shape[1] - self.k)
        if len(crowded):  # the first block, or sorted rows: keep only the block's own k best
            scores_there = np.where(passing[crowded], scores[crowded], -np.inf)
            passing[crowded], bars[crowded] = _k_best(scores_there, self.k)
            hits = np.flatnonzero(passing)
            cuts = np.searchsorted(hits, np.arange(len(scores) + 1) * count)
        found = np.diff(cuts)
        self._weed(first + np.flatnonzero(self.filled[first : first + len(scores)] + found > self.rows.shape[1]))
        queries = np.arange(first, first + len(scores))
        place = np.repeat(queries * self.rows.shape[1] + self.filled[queries] - cuts[:-1], found) + np.arange(len(hits))
        self.similarities.reshape(-1)[place] = scores.reshape(-1)[hits]
        self.rows.reshape(-1)[place] = np.repeat(start - np.arange(len(scores)) * count, found) + hits
        self.filled[queries] += found

    def _weed(self, queries: np.ndarray) -> None:
        """Keep only the k best rows of `queries`, which hold more, and raise their bars."""
        if len(queries):
            kept, bars = _k_best(self.similarities[queries], self.k)
            self.bars[queries] = np.maximum(self.bars[queries], bars)
            for values, empty in ((self.similarities, -np.inf), (self.rows, -1)):
                best = values[queries][kept].reshape(len(queries), self.k)
                values[queries] = empty
                values[queries, : self.k] = best
            self.filled[queries] = self.k

    def write(self, similarities: np.ndarray, rows: np.ndarray) -> None:
        """Write the k best rows of each query, best first, into (Q, k) arrays that hold -inf and -1."""
        for first in range(0, len(similarities), TILE):
            tile = slice(first, min(first + TILE, len(similarities)))
            order = np.argsort(-self.similarities[tile], axis=1, kind="stable")[:, : self.k]
            similarities[tile, : order.shape[1]] = np.take_along_axis(self.similarities[tile], order, axis=1)
            rows[tile, : order.shape[1]] = np.take_along_axis(self.rows[tile], order, axis=1)


def _k_best(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (q, n) bool, True for the k best in each row of scores (q, n), the first in a tie; and the k-th best scores (q,)."""
    bars = np.partition(scores, scores.shape[1] - k, axis=1)[:, -k]
    better, equal = scores > bars[:, None], scores == bars[:, None]
    equal &= np.cumsum(equal, axis=1, dtype=np.int32) <= k - better.sum(axis=1, keepdims=True)
    return better | equal, bars


def _room(k: int, count: int) -> int:
    """Return the rows held per query: with 4 k, weeding takes less than 2 % of the time; a full block needs 2 k."""
    return min(k + max(3 * k, 64), max(count, 1) + k)


def _tiles(queries: np.ndarray) -> torch.Tensor:
    """Cut queries (Q, D) into tiles of one size: (tiles, T, D) float32, 16 <= T <= TILE, the last padded with zeros.

    All products then have the same shape, so equal queries get bitwise equal similarities wherever they stand.
    """
    count = max(1, math.ceil(len(queries) / TILE))
    size = max(16, math.ceil(len(queries) / count))
    tiles = np.zeros((count * size, queries.shape[1]), dtype=np.float32)
    tiles[: len(queries)] = queries
    return torch.from_numpy(tiles.reshape(count, size, -1))


@contextmanager
def _workers(tasks: int) -> Iterator[ThreadPoolExecutor]:
    """Provide threads for `tasks` pieces of a block, which share torch's threads, and one more that prepares the next block.

    The work after a product takes a seventh of the product's time. Running pieces in parallel saves only 2 % on 2 cores;
    on many cores it keeps that seventh from dominating.
    """
    threads = torch.get_num_threads()
    workers = max(1, min(threads, tasks, WORKERS))
    pool = ThreadPoolExecutor(workers + 1, initializer=torch.set_num_threads, initargs=(threads // workers,))
    try:
        with pool:
            yield pool
    finally:
        torch.set_num_threads(threads)  # the setting is per thread, but new threads inherit the latest one


def _for_each_block(
    vectors: Vectors, usable: np.ndarray | None, pool: ThreadPoolExecutor, advance: Callable[[int], None],
    work: Callable[[int, int, torch.Tensor, np.ndarray | None], list[Callable[[], None]]],
) -> None:  # fmt: skip
    """Run the tasks that `work` makes of each block in parallel, while the next block is prepared.

    A task waits only for the previous block's task in its place, not for that whole block, so that a thread which holds
    Python's lock does not stop the products.
    """
    blocks = vectors.aligned(usable)
    older: list[Future] = []
    newer: list[Future] = []
    ahead = pool.submit(next, blocks, None)
    while (block := ahead.result()) is not None:
        _ = [done.result() for done in older]  # their rows are overwritten by the block prepared next
        ahead = pool.submit(next, blocks, None)
        start, count, rows, mask = block
        tasks = [] if rows is None else work(start, count, rows, mask)
        older, newer = newer, [pool.submit(_after, *pair) for pair in zip_longest(tasks, newer[: len(tasks)])]
        advance(count)
    _ = [done.result() for done in (*older, *newer)]


def _after(task: Callable[[], None], other: Future | None) -> None:
    """Run a task after another one is done."""
    if other is not None:
        other.result()
    task()


class _Own(threading.local):
    """Buffers of one thread."""

    def __init__(self):
        self.scores = torch.empty(TILE * BLOCK)
        self.passing = np.empty(TILE * BLOCK, dtype=bool)

    def product(self, left: torch.Tensor, right: torch.Tensor) -> np.ndarray:
        """Return left (a, D) times right (b, D) transposed: (a, b) float32, overwritten by the next call."""
        out = self.scores[: len(left) * len(right)].view(len(left), len(right))
        return torch.mm(left, right.T, out=out).numpy()


def checked(vectors: Vectors, queries: np.ndarray, usable: np.ndarray | None, k: int = 1) -> None:
    """Raise an error for queries, masks and numbers of neighbours that do not fit the gallery."""
    if queries.ndim != 2 or queries.shape[1] != vectors.width:
        raise TutelageError(
            f"queries of shape {queries.shape} must be (queries, {vectors.width}), as wide as the gallery"
        )
    broken = np.flatnonzero(~np.isfinite(np.einsum("qd,qd->q", queries, queries)))
    if len(broken):
        raise TutelageError(f"NaN or infinite numbers in query {shown(broken)}")
    if usable is not None and (usable.shape != (vectors.count,) or usable.dtype != bool):
        raise TutelageError(f"usable: {usable.shape} {usable.dtype} must be ({vectors.count},) bool, one for each row")
    if k < 1:
        raise TutelageError(f"{k} neighbours: at least 1 is needed")


def _chunk(vectors: Vectors, count: int, size: int, k: int, memory: int | None) -> int:
    """Return how many tiles of `size` queries, of `count` queries in all, one pass may hold within `memory` bytes."""
    tiles = max(1, math.ceil(count / size))
    if memory is None:
        return tiles
    room = _room(min(k, max(vectors.count, 1)), vectors.count)
    workers = min(torch.get_num_threads(), tiles, WORKERS)
    block = BLOCK * vectors.width * 16 + workers * size * (BLOCK * 40 + room * 36)  # rows; scores, and those that pass
    fixed = OVERHEAD + block + count * (vectors.width * 4 + k * 12)
    tile = size * (room * 12 + 12)
    if memory < fixed + tile:
        needed = math.ceil((fixed + tile) / 2**20)
        raise TutelageError(
            f"{memory / 2**20:.0f} MB of memory is too little for {count} queries with {k} neighbours each, "
            f"which need {needed} MB",
            "give more memory, or ask for fewer queries or neighbours",
        )
    return min(tiles, (memory - fixed) // tile)


def shared(advance: Callable[[int], None], passes: int) -> Callable[[int], None]:
    """Return a progress function for `passes` passes over the same rows that counts up to the number of rows."""
    seen = [0]

    def report(count: int) -> None:
        seen[0] += count
        advance(seen[0] // passes - (seen[0] - count) // passes)

    return report


def search(
    vectors: Vectors, queries: np.ndarray, k: int, *, usable: np.ndarray | None = None, memory: int | None = None,
    advance: Callable[[int], None] = silent,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Return the k rows with the largest inner product with each query: exact, whatever the memory limit and the parts.

    Args:
        queries: (Q, D) float32, unit length.
        usable: (N,) bool; other rows are ignored and never returned.
        memory: bytes beyond the process and the arrays in `vectors`; with little, the gallery is read several times.
        advance: called with numbers of rows just done, N in all.

    Returns:
        similarities (Q, k) float32 and rows (Q, k) int64, best first, the smaller row in a tie; -inf and -1 where
        fewer than k rows are usable.

    Raises:
        TutelageError: NaN or infinite rows or queries, shapes that do not fit, too little memory.
    """
    queries = np.asarray(queries, dtype=np.float32)
    checked(vectors, queries, usable, k)
    similarities = np.full((len(queries), k), -np.inf, dtype=np.float32)
    found = np.full((len(queries), k), -1, dtype=np.int64)
    tiles = _tiles(queries)
    size, most = tiles.shape[1], min(k, max(vectors.count, 1))
    room = _room(most, vectors.count)
    chunk = _chunk(vectors, len(queries), size, k, memory)
    report = shared(advance, math.ceil(len(tiles) / chunk))
    with _workers(len(tiles)) as pool:
        for first in range(0, len(queries), size * chunk):
            part = slice(first, min(first + size * chunk, len(queries)))
            best = _Best.empty(part.stop - part.start, most, room)
            _compare(vectors, usable, tiles[first // size :][:chunk], best, pool, report)
            best.write(similarities[part], found[part])
    return similarities, found


def _compare(
    vectors: Vectors, usable: np.ndarray | None, tiles: torch.Tensor, best: _Best, pool: ThreadPoolExecutor,
    advance: Callable[[int], None],
) -> None:  # fmt: skip
    """Compare the queries in `tiles` (tiles, T, D) with the gallery in one pass."""
    own, size = _Own(), tiles.shape[1]

    def take(index: int, start: int, count: int, rows: torch.Tensor, mask: np.ndarray | None) -> None:
        first = index * size
        scores = own.product(tiles[index], rows[: max(count, LEAST)])[: len(best.rows) - first, :count]
        best.take(first, scores, own.passing[: scores.size].reshape(scores.shape), start, mask)

    def work(*block) -> list[Callable[[], None]]:
        return [partial(take, index, *block) for index in range(len(tiles))]

    _for_each_block(vectors, usable, pool, advance, work)


def best_query(
    vectors: Vectors, queries: np.ndarray, *, usable: np.ndarray | None = None,
    advance: Callable[[int], None] = silent,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Return the query with the largest inner product with each row, the smaller query in a tie.

    Args:
        queries: (Q, D) float32, unit length. usable, advance: as in `search`.

    Returns:
        similarity (N,) float32 and query (N,) int32; -inf and -1 for rows that are not usable.

    Raises:
        TutelageError: NaN or infinite rows or queries, shapes that do not fit.
    """
    queries = np.asarray(queries, dtype=np.float32)
    checked(vectors, queries, usable)
    similarity = np.full(vectors.count, -np.inf, dtype=np.float32)
    query = np.full(vectors.count, -1, dtype=np.int32)
    tiles, own = _tiles(queries), _Own()

    def strip(low: int, high: int, rows: torch.Tensor) -> None:
        best, name = similarity[low:high], query[low:high]
        for first, tile in zip(range(0, len(queries), tiles.shape[1]), tiles, strict=True):
            scores = own.product(rows, tile)[: high - low, : len(queries) - first]
            near = scores.argmax(axis=1)  # numpy's is 7 times faster than torch's, and takes the first in a tie
            value = scores[np.arange(high - low), near]
            better = value > best
            best[better], name[better] = value[better], first + near[better]

    def work(start: int, count: int, rows: torch.Tensor, mask: np.ndarray | None) -> list[Callable[[], None]]:
        return [
            partial(strip, start + low, start + min(low + STRIP, count), rows[low : low + STRIP])
            for low in range(0, count, STRIP)
        ]

    if len(queries):
        with _workers(BLOCK // STRIP) as pool:
            _for_each_block(vectors, usable, pool, advance, work)
    if usable is not None:
        similarity[~usable], query[~usable] = -np.inf, -1
    return similarity, query
