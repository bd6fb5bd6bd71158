"""Candidates for the transfer set: the gallery, embedded, without the images that must not be trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tutelage.curation.duplicates import COPIES, find_leaks, search_layouts
from tutelage.curation.embedders import GalleryEmbedder, Ticking
from tutelage.curation.labelled_set import LabelledSplit
from tutelage.curation.search import search
from tutelage.curation.selection import Leak, Pool, check_memory
from tutelage.curation.vectors import Vectors, mean_of
from tutelage.data.block_cache import as_void
from tutelage.data.sources import ImageRef, Rejected
from tutelage.device import free_memory
from tutelage.errors import TutelageError, shown
from tutelage.progress import progress
from tutelage.settings.command_flags import Curation

CROWDED = COPIES // 2  # a search that finds this many copies of one image may have missed further ones
# Most neighbours searched for a held-out image: their thumbnails and crops take 50 MB for each image being compared.
DEEPEST = 4096


def fill_pool(
    encoder: GalleryEmbedder, refs: Sequence[ImageRef], labelled: LabelledSplit, settings: Curation, ticking: Ticking
) -> tuple[Pool, LeakCheck, int, int, list[Rejected]]:
    """Embed a gallery and bar images that are known already: labelled images, held-out images, exact duplicates.

    Returns:
        the pool; its leak check, which holds the leaks so far and can be called to find near duplicates; the number of labelled
        images in the gallery; the number of exact duplicates, including those; rejected images.
    """
    cache, pieces, _ = encoder.embedded(refs, settings, ticking=ticking)
    embedded = cache.load(pieces)
    if not len(embedded):
        bad = [f"{one.id} ({one.reason})" for one in embedded.rejected]
        message = f"no image of the gallery can be used: {shown(bad, 3)}"
        raise TutelageError(message, "use another --gallery, or other --embeddings if they are the reason")
    mean = mean_of(embedded.parts)
    # A CLIP model embeds texts and images in different regions: their cosine is used as in its training, not centred.
    vectors = Vectors(embedded.parts, mean if encoder.words is None else np.zeros_like(mean))
    pool = Pool(embedded, vectors, np.ones(len(embedded), dtype=bool), settings.index, int(memory_of(settings)))
    leaks, known, twice = _same_pixels(pool, labelled)
    check = LeakCheck(pool, labelled, encoder, leaks)
    if settings.dedup == "gallery":
        check_memory(pool, int(pool.usable.sum()), "gallery")  # before the search for leaks, which may take hours
        check()
    return pool, check, known, twice, embedded.rejected


def memory_of(settings: Curation) -> float:
    """Return the bytes that a search may use: --memory, or half of what is free."""
    return settings.memory * 2**30 if settings.memory else free_memory() / 2


def nothing_left(pool: Pool, leaks: Sequence[Leak], labelled: int) -> TutelageError:
    """Return the error for a gallery of which nothing may be chosen. labelled: how many of its images are labelled images."""
    copies = len(pool.embedded) - len(leaks) - labelled
    parts = {"are validation or test images": len(leaks), "labelled ones": labelled, "copies of these": copies}
    return TutelageError(
        f"every gallery image is already labelled or held out: of {len(pool.embedded):,} images "
        + ", ".join(f"{count:,} {what}" for what, count in parts.items() if count),
        "use another --gallery, with unlabelled images other than these",
    )


def _same_pixels(pool: Pool, labelled: LabelledSplit) -> tuple[list[Leak], int, int]:
    """Bar by content hash: held-out images, labelled images, and all but the first image of each content.

    Returns the leaks; the number of labelled images; the number of these and of other duplicates.
    """
    held = dict(zip(labelled.keys_of(labelled.held), labelled.held.tolist(), strict=True))
    keys = as_void(pool.embedded.keys)
    fresh = np.zeros(len(keys), dtype=bool)
    fresh[np.unique(keys, return_index=True)[1]] = True
    is_held = np.isin(keys, np.array(list(held), dtype="S32"))
    is_drawn = np.isin(keys, np.array(labelled.keys_of(labelled.drawn), dtype="S32"))
    pool.usable &= fresh & ~is_held & ~is_drawn
    rows = np.flatnonzero(is_held).tolist()
    leaks = [Leak(row, held[pool.embedded.keys[row].tobytes()], "same pixels") for row in rows]
    return leaks, int(is_drawn.sum()), int((~is_held & (is_drawn | ~fresh)).sum())


@dataclass
class LeakCheck:
    """Bars gallery images that show validation or test images, also mirrored or cropped.

    leaks: found so far, including those with the same pixels. looked_at: number of gallery images compared. near: number of these
    that were barred.
    """

    pool: Pool
    labelled: LabelledSplit
    encoder: GalleryEmbedder
    leaks: list[Leak]
    looked_at: int = 0
    near: int = 0

    @cached_property
    def _held(self) -> tuple[list[np.ndarray], np.ndarray | None]:
        """Pixels of the held-out images, and their embeddings if there are any."""
        images = self.labelled.of(self.labelled.held)
        queries = self.encoder.held(self.labelled, self.pool.vectors.mean)
        return [images[i] for i in range(len(images))], queries

    def __call__(self, rows: np.ndarray | None = None) -> int:
        """Bar near duplicates of held-out images among these rows of the pool (m,), or among all; return how many."""
        usable = self.pool.usable
        if not len(self.labelled.held) or (rows is not None and not len(rows)):
            return 0
        self.looked_at += int(usable.sum()) if rows is None else len(rows)
        images, queries = self._held
        asked, k, barred = np.arange(len(images)), COPIES, 0
        while len(asked):  # a search finds k neighbours of each image: those with many copies are searched again
            counts = np.zeros(len(asked), np.int64)
            shown, vectors = [images[i] for i in asked.tolist()], None if queries is None else queries[asked]
            among = rows if rows is None else rows[usable[rows]]
            found = near_leaks(self.pool, shown, vectors, among, counts, k)
            usable[[row for row, *_ in found]] = False
            self.leaks += [Leak(row, int(self.labelled.held[asked[at]]), how) for row, at, how, _ in found]
            barred += len(found)
            asked, k = asked[counts >= CROWDED], min(2 * k, DEEPEST)
        self.near += barred
        return barred


def near_leaks(
    pool: Pool,
    held: list[np.ndarray],
    queries: np.ndarray | None,
    among: np.ndarray | None = None,
    counts: np.ndarray | None = None,
    k: int = COPIES,
) -> list[tuple[int, int, str, float]]:
    """Return near duplicates of held-out images, found by embedding and by layout and confirmed on pixels.

    Args:
        held: H images, (H_i, W_i, 3) uint8 each. queries: (H, D) float32 unit vectors of them, if there are any.
        among: (m,) int64 rows of the pool to search, which are read into memory; None: all usable rows.
        counts: as for `find_leaks`. k: neighbours of each held-out image by embedding, and by layout. More than COPIES are wanted
            for a few images only and searched exactly, because building an inverted file takes longer.

    Returns:
        as from `find_leaks`.
    """
    layouts, exact, near = Vectors(pool.embedded.layout_parts, None), k > COPIES, []
    k = min(k, pool.vectors.count)
    if among is not None:
        if not len(among):
            return []
        layouts = Vectors((layouts.rows(among),), None)
        if queries is not None:
            near.append(search(Vectors((pool.vectors.rows(among),), None), queries, k, memory=pool.memory))
    elif queries is not None:
        near.append(pool.neighbours(queries, k, "leaks, by embedding", exact))
    with progress("leaks, by layout", layouts.count) as advance:
        usable = pool.usable if among is None else None
        near.append(search_layouts(held, layouts, k, pool.memory, advance, usable))
    similarity, rows = (np.concatenate(both, axis=1) for both in zip(*near, strict=True))
    if among is not None:
        rows = np.where(rows >= 0, among[rows], -1)
    with progress("leaks, by pixels", len(held)) as advance:
        return find_leaks(similarity, rows, held, pool.embedded.thumbs, advance, counts)
