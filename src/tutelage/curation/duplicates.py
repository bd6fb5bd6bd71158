"""Near duplicates: pictures that are copies of each other, re-encoded, resized, cropped to 90 % or mirrored.

Candidates come from two searches, since each finds what the other misses: embeddings find crops (all within the 5 nearest
of 22,700; a JPEG of a 32-pixel image at quality 40 only within 888), the layout of small pixels finds everything else
(all within the 3 nearest; crops only within 4,114). A candidate is confirmed on thumbnails (same_picture.py).
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

COPIES = (
    20  # neighbours to search for a held image, by embedding and by layout; more copies than these may slip through
)
FLOOR = 0.45  # of either cosine: the embeddings of copies to 90 % start at 0.51, the layouts of other copies at 0.68
NEIGHBOURS = 10  # of each image in near_duplicates
SEARCHES = 3  # for them: by embedding, by layout, by the mirrored layout
ASKED = 4096  # images at once
MANY = 5_000  # images, above which only their first principal components are searched: 2 s instead of 5 for 20,000
SURE = 0.8  # layouts above this are looked at whatever the embeddings say


def search_layouts(
    held: Sequence[np.ndarray], layouts: Vectors, k: int = COPIES, memory: int | None = None,
    advance: Callable[[int], None] = lambda n: None, usable: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The gallery images whose layout is nearest to that of a held image or of its mirror image.

    Args:
        held: H images, (H_i, W_i, 3) uint8 each. layouts: those of the gallery, 192 features, as they are.
        memory, advance, usable: as in `search`.

    Returns:
        (H, 2 k) float32 cosines and (H, 2 k) int64 rows of the gallery: k for the image, k for its mirror image; a row may be in both;
        -1 where there are no more.
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
    advance: Callable[[int], None] = lambda n: None,
    counts: np.ndarray | None = None,
) -> list[tuple[int, int, str, float]]:
    """Gallery images that are copies of held-out images.

    Args:
        similarity: (H, k) float32 cosines; those below FLOOR are passed over.
        rows: (H, k) int64, gallery images near each held image: by embedding and by `search_layouts`, side by side in
            any order; -1 for none.
        held: H images, (H_i, W_i, 3) uint8 each. thumbs: (m,) int64 rows -> their (m, 16, 16, 3) uint8 thumbnails.
        advance: called with the number of held images just done. counts: (H,) int64, filled with the number of copies of each held image.

    Returns:
        (row, position of the held image, how, similarity), ordered by row, each row once with the most similar image
        that it is a copy of. how: one of HOW[1:].
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
    embeddings: np.ndarray,
    thumbs: np.ndarray,
    floor: float = FLOOR,
    fresh: np.ndarray | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> np.ndarray:
    """The first image of each picture: an image is a duplicate when it is a copy of an earlier one that is none.

    Images that are copies of a duplicate only (a crop of a crop) are kept.

    Args:
        embeddings: (n, D) float32, unit length. thumbs: (n, 16, 16, 3) uint8.
        floor: pairs whose embeddings have a smaller cosine are looked at only when their layouts agree to SURE.
        fresh: (m,) int64 positions; the others are known not to be copies of each other. None: nothing is known.
        advance: called with numbers of images whose neighbours were looked for in one of SEARCHES ways.

    Returns:
        (n,) int64: the smallest position of a kept image that this one is a copy of; its own where it is kept.
    """
    first, small, layouts = np.arange(len(thumbs)), opponent(thumbs), layout(thumbs)
    asked = first if fresh is None else fresh
    while len(asked):  # of many copies of one picture, the neighbours of some are all dropped: those are asked again
        kept = np.flatnonzero(first == np.arange(len(first)))
        pairs = kept[_pairs(embeddings[kept], layouts[kept], floor, np.searchsorted(kept, asked), advance)]
        for b, a in _copies(small, pairs).tolist():
            if first[a] == a and first[b] == b:
                first[b] = a
        dropped = first[pairs] != pairs
        asked = np.unique(pairs[dropped.any(axis=1)])
        asked = asked[first[asked] == asked] if dropped.any() else asked[:0]
    while (first[first] != first).any():  # kept at first, and dropped later
        first = first[first]
    return first


def _copies(small: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Of pairs (p, 2) int64, those that are copies of each other: (q, 2), the later first, in its order."""
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

    # Two threads of BLAS on busy cores took 3 times as long.
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(os.cpu_count()) as pool:
        copies = [np.zeros((0, 2), np.int64), *pool.map(copies_in, range(0, len(pairs), BLOCK))]
    return np.unique(np.sort(np.concatenate(copies), axis=1)[:, ::-1], axis=0)


def _pairs(
    embeddings: np.ndarray, layouts: np.ndarray, floor: float, fresh: np.ndarray, advance: Callable[[int], None]
) -> np.ndarray:
    """(p, 2) int64, a < b: whom to look at, of the nearest neighbours of `fresh` by embedding and by layout (mirrored ones too)."""
    half = THUMB // 2
    mirrored = np.ascontiguousarray(layouts.reshape(-1, half, half, 3)[:, :, ::-1]).reshape(layouts.shape)
    if len(fresh) > MANY and embeddings.shape[1] > COMPONENTS:
        embeddings = unit_embeddings(embeddings)
    a, b = _near(embeddings, embeddings, floor, fresh, advance)
    blank = np.minimum(squared_length(layouts[a]), squared_length(layouts[b])) < 0.99  # their layout says little
    alike = [np.einsum("pd,pd->p", one[a], layouts[b]) for one in (layouts, mirrored)]
    keep = blank | (np.maximum(*alike) >= FLOOR)
    found = [(a[keep], b[keep]), *(_near(layouts, queries, SURE, fresh, advance) for queries in (layouts, mirrored))]
    pairs = np.concatenate([np.stack(both, axis=1) for both in found])
    return np.unique(np.sort(pairs, axis=1), axis=0)


def _near(
    base: np.ndarray, queries: np.ndarray, floor: float, fresh: np.ndarray, advance: Callable[[int], None]
) -> tuple[np.ndarray, np.ndarray]:
    """(p,), (p,) int64: pairs of a query in `fresh` and one of its nearest in base, not itself, with at least this cosine."""
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
