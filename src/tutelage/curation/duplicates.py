"""Near duplicates: images that are copies of each other, re-encoded, resized, cropped to 90 % of their sides or mirrored.

Candidates come from two searches, because each finds copies that the other misses. Embeddings find crops (all within the 5
nearest of 22,700 images, but a 32-pixel JPEG of quality 40 only within 888); layouts of small pixels find all other copies
(all within the 3 nearest, but crops only within 4,114). Candidates are confirmed on thumbnails (image_match.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from threadpoolctl import threadpool_limits

from tutelage.curation.image_match import (
    BLOCK,
    HOW,
    THUMB,
    colours_of,
    compare,
    confirm,
    layout,
    may_agree,
    opponent,
    squared_length,
    thumbnail,
)
from tutelage.curation.search import search
from tutelage.curation.vectors import Vectors
from tutelage.features.principal_axes import COMPONENTS, unit_embeddings
from tutelage.progress import Advance

COPIES = 20  # neighbours searched for each held-out image by embedding, and again by layout; more copies may be missed
FLOOR = 0.45  # least cosine of a candidate: embeddings of 90 % crops start at 0.51, layouts of other copies at 0.68
NEIGHBOURS = 10  # neighbours that near_duplicates searches for each image
SEARCHES = 3  # number of these searches: by embedding, by layout, by the mirrored layout
ASKED = 4096  # images searched at once
MANY = 5_000  # above this many images only the first principal components are searched: 2 s instead of 5 s for 20,000
SURE = 0.8  # pairs whose layouts have a larger cosine are compared whatever their embeddings say


def search_layouts(
    held: Sequence[np.ndarray],
    layouts: Vectors,
    k: int = COPIES,
    memory: int | None = None,
    advance: Advance = lambda n: None,
    usable: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the gallery images whose layouts are nearest to that of each held-out image and of its mirror image.

    Args:
        held: H held-out images, (H_i, W_i, 3) uint8 each. layouts: the gallery's layouts, 192 features, not centred.
        memory, advance, usable: as in `search`.

    Returns:
        (H, 2 k) float32 cosines and (H, 2 k) int64 gallery rows: k for the image, then k for its mirror image. A row may occur in
        both; -1 where the gallery has no more rows.
    """
    thumbs = np.array([thumbnail(image) for image in held], np.uint8).reshape(-1, THUMB, THUMB, 3)
    queries = layout(np.concatenate([thumbs, thumbs[:, :, ::-1]]))
    similarity, rows = search(layouts, queries, k, usable=usable, memory=memory, advance=advance)
    return (np.concatenate(np.split(similarity, 2), axis=1), np.concatenate(np.split(rows, 2), axis=1))


def find_leaks(
    similarity: np.ndarray,
    rows: np.ndarray,
    held: Sequence[np.ndarray],
    thumbs: Callable[[np.ndarray], np.ndarray],
    advance: Advance = lambda n: None,
    counts: np.ndarray | None = None,
) -> list[tuple[int, int, str, float]]:
    """Return the gallery images that are copies of held-out images.

    Args:
        similarity: (H, k) float32 cosines; those below FLOOR are ignored.
        rows: (H, k) int64 gallery rows near each held-out image, found by embedding and by `search_layouts`, side by side
            in any order; -1 where there is none.
        held: H held-out images, (H_i, W_i, 3) uint8 each. thumbs: (m,) int64 rows -> their (m, 16, 16, 3) uint8 thumbnails.
        advance: called with the number of held-out images just done. counts: (H,) int64, filled with the number of copies of each.

    Returns:
        (gallery row, position of the held-out image, how, similarity), ordered by row. Each row appears once, with the most
        similar held-out image that it is a copy of. how: one of HOW[1:].
    """

    def copies_of(position: int) -> list[tuple[int, int, str, float]]:
        near: dict[int, float] = {}
        for row, cosine in zip(rows[position].tolist(), similarity[position].tolist(), strict=True):
            if row >= 0 and cosine >= FLOOR:
                near[row] = max(cosine, near.get(row, cosine))
        candidates = np.array(sorted(near), np.int64)
        how = confirm(held[position], thumbs(candidates)) if len(candidates) else candidates
        kinds = zip(candidates[how > 0].tolist(), how[how > 0].tolist(), strict=True)
        return [(row, position, HOW[kind], near[row]) for row, kind in kinds]

    found: dict[int, tuple[int, int, str, float]] = {}
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(os.cpu_count()) as pool:
        for position, copies in enumerate(pool.map(copies_of, range(len(held)))):
            if counts is not None:
                counts[position] = len(copies)
            for copy in copies:
                if copy[0] not in found or copy[3] > found[copy[0]][3]:
                    found[copy[0]] = copy
            advance(1)
    return [found[row] for row in sorted(found)]


def near_duplicates(
    embeddings: np.ndarray, thumbs: np.ndarray, fresh: np.ndarray | None = None, advance: Advance = lambda n: None
) -> np.ndarray:
    """Return which image each image duplicates: an image is a duplicate if it is a copy of an earlier, kept image.

    Images that are copies only of a duplicate (a crop of a crop) are kept. Pairs whose embeddings have a cosine below FLOOR are compared
    only if their layouts have one of at least SURE.

    Args:
        embeddings: (n, D) float32, unit length. thumbs: (n, 16, 16, 3) uint8.
        fresh: (m,) int64 positions of images to check; the others are known not to be copies of each other. None: check all.
        advance: called with the number of images searched, once for each of the SEARCHES searches.

    Returns:
        (n,) int64: the smallest position of a kept image that this one is a copy of; its own position if it is kept.
    """
    first, small, layouts = np.arange(len(thumbs)), opponent(thumbs), layout(thumbs)
    asked = first if fresh is None else fresh
    while len(asked):  # among many copies of one picture, an image's neighbours may all be dropped: search it again
        kept = np.flatnonzero(first == np.arange(len(first)))
        pairs = kept[_pairs(embeddings[kept], layouts[kept], np.searchsorted(kept, asked), advance)]
        for b, a in _copies(small, pairs).tolist():
            if first[a] == a and first[b] == b:
                first[b] = a
        dropped = first[pairs] != pairs
        asked = np.unique(pairs[dropped.any(axis=1)])
        asked = asked[first[asked] == asked] if dropped.any() else asked[:0]
    while (first[first] != first).any():  # the copied image was kept at first and dropped later
        first = first[first]
    return first


def copies_among(embeddings: np.ndarray, thumbs: np.ndarray, asked: np.ndarray, advance: Advance) -> np.ndarray:
    """Return pairs of copies, (q, 2) int64, the later image first, among `asked` and their neighbours; as for `near_duplicates`."""
    return _copies(opponent(thumbs), _pairs(embeddings, layout(thumbs), asked, advance))


def _copies(small: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Return those of `pairs` (p, 2) int64 that are copies of each other: (q, 2), the later image first, sorted by it."""
    mean, spread = colours_of(small)
    a, b = ((mean[side], spread[side]) for side in pairs.T)
    pairs = pairs[may_agree(a, b)]
    pairs = np.concatenate([pairs, pairs[:, ::-1]])  # either may be a crop of the other
    pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]

    def copies_in(start: int) -> np.ndarray:
        block = pairs[start : start + BLOCK]
        source, number = np.unique(block[:, 0], return_inverse=True)
        other, target = np.unique(block[:, 1], return_inverse=True)
        return block[compare(small[source], small[other], number, target) > 0]

    # One BLAS thread per worker: with two, on busy cores, this took 3 times as long.
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(os.cpu_count()) as pool:
        copies = [np.zeros((0, 2), np.int64), *pool.map(copies_in, range(0, len(pairs), BLOCK))]
    return np.unique(np.sort(np.concatenate(copies), axis=1)[:, ::-1], axis=0)


def _pairs(embeddings: np.ndarray, layouts: np.ndarray, fresh: np.ndarray, advance: Advance) -> np.ndarray:
    """Return the pairs to compare, (p, 2) int64 with a < b: nearest neighbours of `fresh` by embedding, layout and mirrored layout."""
    half = THUMB // 2
    mirrored = np.ascontiguousarray(layouts.reshape(-1, half, half, 3)[:, :, ::-1]).reshape(layouts.shape)
    if len(fresh) > MANY and embeddings.shape[1] > COMPONENTS:
        embeddings = unit_embeddings(embeddings)
    a, b = _near(embeddings, embeddings, FLOOR, fresh, advance)
    blank = np.minimum(squared_length(layouts[a]), squared_length(layouts[b])) < 0.99  # too little structure to judge
    alike = [np.einsum("pd,pd->p", one[a], layouts[b]) for one in (layouts, mirrored)]
    keep = blank | (np.maximum(*alike) >= FLOOR)
    found = [(a[keep], b[keep]), *(_near(layouts, queries, SURE, fresh, advance) for queries in (layouts, mirrored))]
    pairs = np.concatenate([np.stack(both, axis=1) for both in found])
    return np.unique(np.sort(pairs, axis=1), axis=0)


def _near(
    base: np.ndarray, queries: np.ndarray, floor: float, fresh: np.ndarray, advance: Advance
) -> tuple[np.ndarray, np.ndarray]:
    """Return pairs, (p,) and (p,) int64: a query in `fresh` and a near row of `base`, not itself, with a cosine >= floor."""
    import faiss

    index = faiss.IndexFlatIP(base.shape[1])
    index.add(np.ascontiguousarray(base, np.float32))  # type: ignore[call-arg]
    found = [(fresh[:0], fresh[:0])]
    for start in range(0, len(fresh), ASKED):
        some = fresh[start : start + ASKED]
        cosines, near = index.search(np.ascontiguousarray(queries[some], np.float32), NEIGHBOURS + 1)  # type: ignore[call-arg]
        query, near = np.repeat(some, near.shape[1]), near.ravel()
        good = (near >= 0) & (near != query) & (cosines.ravel() >= floor)
        found.append((query[good], near[good]))
        advance(len(some))
    query, near = (np.concatenate(column) for column in zip(*found, strict=True))
    return query, near
