"""Approximate nearest neighbours: an inverted file of faiss, with its recall measured on this gallery."""

from __future__ import annotations

import math
from typing import Any

import faiss
import numpy as np

from tutelage.curation.search import OVERHEAD, checked, search
from tutelage.curation.vectors import BLOCK, Vectors
from tutelage.device import memory_text
from tutelage.errors import TutelageError
from tutelage.progress import Advance

SAMPLE_PER_LIST = 64  # rows that k-means uses for each list of an inverted file
CHECKED = 32  # queries whose approximate neighbours are compared with the exact ones


def ivf_memory(number: int, width: int) -> int:
    """Return the bytes needed to build an inverted file of `number` rows with `width` features."""
    lists = round(math.sqrt(number))
    sample = min(number, SAMPLE_PER_LIST * lists)
    held = number * (width * 2 + 24) * 1.1  # lists grow in steps, and the sample is drawn from all positions
    return math.ceil(OVERHEAD + held + (2 * sample + 2 * lists + 4 * BLOCK) * width * 4)


def search_ivf(
    vectors: Vectors,
    queries: np.ndarray,
    k: int,
    *,
    usable: np.ndarray | None = None,
    memory: int | None = None,
    advance: Advance = lambda n: None,
) -> tuple[np.ndarray, np.ndarray, float]:
    """Search approximately with an inverted file: a query is compared only with the rows in the lists nearest to it.

    Of N usable rows there are sqrt(N) lists, made by k-means on a sample; a query looks into 2 N^(1/4) of them, at least 8.
    Building takes as long as an exact search for about sqrt(N) queries, so it pays only with many more queries than that.

    Args:
        queries, k, usable, memory, advance: as in `search`; the index holds all usable rows in memory.

    Returns:
        similarities (Q, k) float32, of rows rounded to half precision; rows (Q, k) int64, -1 where the searched lists have no
        more, though others may; and the recall: which share of the exact neighbours of up to 32 of the queries was found.

    Raises:
        TutelageError: as `search`; an index that does not fit in `memory`.
    """
    queries = np.asarray(queries, dtype=np.float32)
    checked(vectors, queries, usable, k)
    count = vectors.count if usable is None else int(usable.sum())
    if not count or not len(queries):
        return (*search(vectors, queries, k, usable=usable, memory=memory, advance=advance), 1.0)
    lists, needed, report = round(math.sqrt(count)), ivf_memory(count, vectors.width), _shared(advance, 2)
    if memory is not None and needed > memory:
        raise TutelageError(
            f"--index ivf: {memory_text(memory)} of memory is too little for an approximate index of {count:,} rows, "
            f"which needs {math.ceil(needed / 2**20):,} MiB",
            "use --index exact, which reads the rows block by block, or a larger --memory",
        )
    # In half precision. SWIG's declarations do not have the methods' Python arguments
    index: Any = faiss.index_factory(vectors.width, f"IVF{lists},SQfp16", faiss.METRIC_INNER_PRODUCT)
    index.by_residual, index.nprobe = False, min(lists, max(8, round(2 * math.sqrt(lists))))
    index.cp.seed, index.cp.spherical, index.cp.niter = 0, True, 10
    index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = 1, SAMPLE_PER_LIST
    sample = min(count, SAMPLE_PER_LIST * lists)
    drawn = np.sort(np.random.default_rng(0).choice(count, sample, replace=False, shuffle=False))
    index.train(vectors.rows(drawn if usable is None else np.flatnonzero(usable)[drawn]))
    for positions, rows in vectors.blocks(BLOCK, usable, report):
        index.add_with_ids(rows, positions)
    similarities, rows = index.search(queries, k)
    del index
    similarities[rows < 0] = -np.inf
    order = np.lexsort((rows, -similarities))
    similarities, rows = (np.take_along_axis(values, order, axis=1) for values in (similarities, rows))
    compared = np.unique(np.linspace(0, len(queries) - 1, CHECKED).astype(np.int64))
    exact = search(vectors, queries[compared], k, usable=usable, advance=report)[1]
    hit = sum(len(np.intersect1d(a[a >= 0], b[b >= 0])) for a, b in zip(exact, rows[compared], strict=True))
    return similarities, rows, hit / int((exact >= 0).sum())


def _shared(advance: Advance, passes: int) -> Advance:
    """Return a progress function for `passes` passes over the same rows that counts up to the number of rows."""
    seen = [0]

    def report(count: int) -> None:
        seen[0] += count
        advance(seen[0] // passes - (seen[0] - count) // passes)

    return report
