"""Exact nearest neighbours of a few queries among up to hundreds of millions of embeddings, in memory or on disk."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import faiss
import numpy as np
from threadpoolctl import threadpool_limits

from tutelage.curation.vectors import BLOCK, Vectors
from tutelage.device import memory_text
from tutelage.errors import TutelageError, shown
from tutelage.progress import Advance

TILE = 256  # most queries that one thread compares at once: their 2 MB of similarities stay in the processor's cache
OVERHEAD = 48 << 20  # bytes for threads and buffers of the matrix product: 10 to 13 MB were measured on 2 cores


def checked(vectors: Vectors, queries: np.ndarray, usable: np.ndarray | None, k: int = 1) -> None:
    """Raise an error for queries, masks and numbers of neighbours that do not fit the gallery."""
    if queries.ndim != 2 or queries.shape[1] != vectors.width:
        message = f"queries of shape {queries.shape} must be (queries, {vectors.width}), as wide as the gallery"
        raise TutelageError(message, "embed the queries by the model that embedded the gallery")
    broken = np.flatnonzero(~np.isfinite(np.einsum("qd,qd->q", queries, queries)))
    if len(broken):
        raise TutelageError(
            f"NaN or infinite numbers in query {shown(broken)}", "embed these images anew, or leave them out"
        )
    if usable is not None and (usable.shape != (vectors.count,) or usable.dtype != bool):
        message = f"usable: {usable.shape} {usable.dtype} must be ({vectors.count},) bool, one for each row"
        raise TutelageError(message, "pass None to use all rows")
    if k < 1:
        raise TutelageError(f"{k} neighbours: at least 1 is needed", "ask for one or more")


def search(
    vectors: Vectors,
    queries: np.ndarray,
    k: int,
    *,
    usable: np.ndarray | None = None,
    memory: int | None = None,
    advance: Advance = lambda n: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the k rows with the largest inner product with each query: exact, whatever the parts in which the gallery is stored.

    `faiss.knn` block by block, and `knn_ground_truth` of faiss.contrib, return other rows in ties and took 6.8 and 7.2 s where
    this took 4.4 s (200,000 x 384 float16 on disk, 1,000 queries, k 100; interleaved, medians of 5 on 2 busy cores).

    Args:
        queries: (Q, D) float32, unit length.
        usable: (N,) bool; other rows are ignored and never returned.
        memory: bytes that the search may take beyond the process and the arrays in `vectors`; None: no limit.
        advance: called with numbers of rows just done, N in all.

    Returns:
        similarities (Q, k) float32 and rows (Q, k) int64, best first, the smaller row in a tie; -inf and -1 where
        fewer than k rows are usable.

    Raises:
        TutelageError: NaN or infinite rows or queries, shapes that do not fit, too little memory.
    """
    queries = np.asarray(queries, dtype=np.float32)
    checked(vectors, queries, usable, k)
    count = max(1, math.ceil(len(queries) / TILE))
    threads = min(count, faiss.omp_get_max_threads())
    _check_memory(vectors.width, len(queries), k, threads, memory)
    # Tiles and blocks are filled up with repetitions: only in products of one shape do equal rows get bitwise equal results.
    size = 16 * max(1, math.ceil(len(queries) / count / 16))
    tiles = np.resize(-queries, (count, size, vectors.width))
    # Among equal rows, a heap of the k smallest values keeps the first, but one of the k largest (in faiss.knn, too) drops
    # the first for a better row. So the heaps hold negated similarities.
    best = faiss.ResultHeap(len(queries), k)

    def compare(rows: np.ndarray, positions: np.ndarray, filled: int, first: int) -> None:
        """Compare a tile, the queries from `first` on, with the first `filled` rows of a block."""
        negated = tiles[first // size] @ rows.T
        negated[:, filled:] = np.inf
        values, names, asked = faiss.swig_ptr(negated), faiss.swig_ptr(positions), min(size, len(queries) - first)
        best.heaps.addn_with_ids(BLOCK, values, names, 0, first, asked)

    running: Iterator[None] = iter(())
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(threads, "", faiss.omp_set_num_threads, (1,)) as pool:
        for positions, rows in vectors.blocks(BLOCK, usable, advance):  # read while the block before is compared
            list(running)
            filled = len(rows)
            if filled < BLOCK:
                rows, positions = np.resize(rows, (BLOCK, vectors.width)), np.resize(positions, BLOCK)
            running = pool.map(partial(compare, rows, positions, filled), range(0, len(queries), size))
        list(running)
    best.finalize()
    similarities = np.subtract(0, best.D, out=best.D)
    similarities[best.I < 0] = -np.inf
    return similarities, best.I


def _check_memory(width: int, queries: int, k: int, threads: int, memory: int | None) -> None:
    """Raise an error if a search for k neighbours of so many queries needs more than `memory` bytes."""
    # Two blocks of rows as stored, as float32 and padded; a tile of similarities for each thread; queries twice; results.
    needed = OVERHEAD + BLOCK * (width * 20 + threads * TILE * 4) + (queries + TILE) * width * 8 + queries * k * 13
    if memory is not None and memory < needed:
        raise TutelageError(
            f"{memory_text(memory)} of memory is too little for {queries} queries with {k} neighbours each, "
            f"which need {math.ceil(needed / 2**20):,} MiB",
            "give more memory, or ask for fewer queries or neighbours",
        )


def best_query(
    vectors: Vectors, queries: np.ndarray, *, usable: np.ndarray | None = None, advance: Advance = lambda n: None
) -> tuple[np.ndarray, np.ndarray]:
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
    # Equal queries may get unequal bits from BLAS, so only the first of them is compared.
    first = np.sort(np.unique(queries, axis=0, return_index=True)[1])
    for positions, rows in vectors.blocks(BLOCK, usable, advance) if len(queries) else ():
        best, near = faiss.knn(np.resize(rows, (BLOCK, vectors.width)), queries[first], 1, faiss.METRIC_INNER_PRODUCT)
        similarity[positions], query[positions] = best[: len(rows), 0], first[near[: len(rows), 0]]
    return similarity, query
