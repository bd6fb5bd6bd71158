"""Approximate nearest neighbours: an inverted file of faiss, with its recall measured on this gallery."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from tutelage.curation.search import OVERHEAD, checked, search, shared, silent
from tutelage.curation.vectors import BLOCK, Vectors
from tutelage.errors import TutelageError

SAMPLE_PER_LIST = 64  # rows that k-means uses for each list of an inverted file
CHECKED = 32  # queries whose approximate neighbours are compared with the exact ones


def ivf_memory(number: int, width: int, lists: int | None = None) -> int:
    """Return the bytes needed to build an inverted file of `number` rows with `width` features in `lists` lists."""
    lists = _lists(number) if lists is None else lists
    sample = min(number, SAMPLE_PER_LIST * lists)
    held = number * (width * 2 + 24) * 1.1  # lists grow in steps, and the sample is drawn from all positions
    return math.ceil(OVERHEAD + held + (2 * sample + 2 * lists + 4 * BLOCK) * width * 4)


def _lists(number: int) -> int:
    return max(1, round(math.sqrt(number)))


def _ivf_index(
    vectors: Vectors, usable: np.ndarray | None, lists: int, seed: int, memory: int | None,
    advance: Callable[[int], None],
):  # fmt: skip
    """Build a faiss inverted file of all usable rows in half precision."""
    import faiss

    number = vectors.count if usable is None else int(usable.sum())
    sample = min(number, SAMPLE_PER_LIST * lists)
    needed = ivf_memory(number, vectors.width, lists)
    if memory is not None and needed > memory:
        raise TutelageError(
            f"--index ivf: {memory / 2**20:,.0f} MB of memory is too little for an approximate index of {number:,} rows, "
            f"which needs {math.ceil(needed / 2**20):,} MB",
            "use --index exact, which reads the rows block by block, or a larger --memory",
        )
    index = faiss.IndexIVFScalarQuantizer(
        faiss.IndexFlatIP(vectors.width), vectors.width, lists, faiss.ScalarQuantizer.QT_fp16,
        faiss.METRIC_INNER_PRODUCT, False,
    )  # fmt: skip
    index.cp.seed, index.cp.spherical, index.cp.niter = seed, True, 10
    index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = 1, SAMPLE_PER_LIST
    drawn = np.sort(np.random.default_rng(seed).choice(number, sample, replace=False, shuffle=False))
    index.train(vectors.rows(drawn if usable is None else np.flatnonzero(usable)[drawn]))  # type: ignore[call-arg]
    for start, count, block, mask in vectors.aligned(usable):
        if block is not None:
            kept = np.arange(count) if mask is None else np.flatnonzero(mask)
            index.add_with_ids(block.numpy()[kept], start + kept)  # type: ignore[call-arg]
        advance(count)
    return index


def search_ivf(
    vectors: Vectors, queries: np.ndarray, k: int, *, usable: np.ndarray | None = None, lists: int | None = None,
    probes: int | None = None, seed: int = 0, memory: int | None = None, advance: Callable[[int], None] = silent,
) -> tuple[np.ndarray, np.ndarray, float]:  # fmt: skip
    """Search approximately with an inverted file: a query is compared only with the rows in the lists nearest to it.

    Building takes as long as an exact search for about `lists` queries, so it pays only with many more queries than that.

    Args:
        queries, k, usable, memory, advance: as in `search`; the index holds all usable rows in memory.
        lists: clusters of rows, by k-means on a sample; default sqrt(usable rows).
        probes: lists searched for each query; default 2 sqrt(lists).
        seed: of the sample and of k-means.

    Returns:
        similarities (Q, k) float32, of rows rounded to half precision; rows (Q, k) int64, -1 where the searched lists have no more
        rows, though other lists may; and the recall, that is the share of the exact neighbours of up to 32 of the queries that
        were found.

    Raises:
        TutelageError: as `search`; an index that does not fit in `memory`; lists or probes out of range.
    """
    queries = np.asarray(queries, dtype=np.float32)
    checked(vectors, queries, usable, k)
    count = vectors.count if usable is None else int(usable.sum())
    if not count or not len(queries):
        return (*search(vectors, queries, k, usable=usable, memory=memory, advance=advance), 1.0)
    lists = _lists(count) if lists is None else lists
    probes = min(lists, max(8, round(2 * math.sqrt(max(lists, 0))))) if probes is None else probes
    if not 1 <= probes <= lists <= count:
        raise TutelageError(
            f"{lists} lists and {probes} probes for {count} rows: 1 <= probes <= lists <= rows must hold"
        )
    report = shared(advance, 2)
    index = _ivf_index(vectors, usable, lists, seed, memory, report)
    index.nprobe = probes
    similarities, rows = index.search(queries, k)  # type: ignore[call-arg]
    del index
    similarities[rows < 0] = -np.inf
    order = np.lexsort((rows, -similarities))
    similarities, rows = (np.take_along_axis(values, order, axis=1) for values in (similarities, rows))
    compared = np.unique(np.linspace(0, len(queries) - 1, CHECKED).astype(np.int64))
    exact = search(vectors, queries[compared], k, usable=usable, advance=report)[1]
    hit = sum(len(np.intersect1d(a[a >= 0], b[b >= 0])) for a, b in zip(exact, rows[compared], strict=True))
    return similarities, rows, hit / int((exact >= 0).sum())
