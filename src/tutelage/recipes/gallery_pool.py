"""The gallery as stage 0 sees it: embedded, and without what may not be learnt from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tutelage.compute import free_memory
from tutelage.data.sources import ImageRef, Rejected
from tutelage.errors import TutelageError
from tutelage.progress import progress, say
from tutelage.recipes.admitted import Admitted
from tutelage.recipes.choosing import Leak, Pool
from tutelage.recipes.encoders import Encoder
from tutelage.retrieval.duplicates import COPIES, find_leaks, search_layouts
from tutelage.retrieval.vectors import Vectors, mean_of
from tutelage.targets import as_void

MANY_LEAKS = 0.05  # share of the gallery above which leaks are remarked upon
MEMORY = 2**30  # bytes for the search where free memory cannot be told


def fill_pool(
    encoder: Encoder,
    refs: Sequence[ImageRef],
    admitted: Admitted,
    settings: dict[str, Any],
    tick: Callable[[int], None],
) -> tuple[Pool, list[Leak], int, list[Rejected]]:
    """Embed a gallery and bar what may not be learnt from: the labelled images again, second copies, and leaks.

    Returns:
        the pool; its leaks; the number of exact duplicates; rejected images.
    """
    cache, pieces = encoder.embedded(refs, tick, settings)
    embedded = cache.load(pieces)
    if not len(embedded):
        raise TutelageError(
            "the gallery has no image that can be read", "images", "rejected.csv says why; give another --gallery"
        )
    mean = mean_of(embedded.parts)
    # Words and images lie apart in a CLIP model's space: their cosine is taken as it was trained.
    if encoder.words is not None:
        mean = np.zeros_like(mean)
    vectors = Vectors(embedded.parts, mean)
    memory = settings["memory"] * 2**30 if settings["memory"] else (free_memory() or 2 * MEMORY) / 2
    usable = np.ones(len(embedded), dtype=bool)
    pool = Pool(embedded, vectors, usable, settings["index"], int(memory))
    leaks, twice = _same_pixels(pool, admitted)
    if settings["dedup"] != "none":
        leaks += _near_leaks(pool, admitted, encoder)
    if len(leaks) > MANY_LEAKS * len(embedded):
        say(
            f"{100 * len(leaks) / len(embedded):.0f} % of the gallery count as copies of validation or test images: where all images show "
            "the same scene, that is no wonder; look at montage.jpg. --dedup none keeps only identical images out"
        )
    if not usable.any():
        raise TutelageError(
            f"the gallery has no image of its own: {len(leaks):,} are validation or test images, {twice:,} duplicates",
            "unlabelled images other than those of the target set", "give another --gallery",
        )  # fmt: skip
    return pool, leaks, twice, embedded.rejected


def _same_pixels(pool: Pool, admitted: Admitted) -> tuple[list[Leak], int]:
    """Bar by content: held-out images, labelled images, and all but the first of each content; leaks and other duplicates."""
    held = dict(zip(admitted.keys_of(admitted.held), admitted.held.tolist(), strict=True))
    keys = as_void(pool.embedded.keys)
    _, first = np.unique(keys, return_index=True)
    fresh = np.zeros(len(keys), dtype=bool)
    fresh[first] = True
    is_held = np.isin(keys, np.array(list(held), dtype="S32"))
    is_drawn = np.isin(keys, np.array(admitted.keys_of(admitted.drawn), dtype="S32"))
    pool.usable &= fresh & ~is_held & ~is_drawn
    leaks = [
        Leak(row, held[pool.embedded.keys[row].tobytes()], "same pixels") for row in np.flatnonzero(is_held).tolist()
    ]
    return leaks, int((~is_held & (is_drawn | ~fresh)).sum())


def _near_leaks(pool: Pool, admitted: Admitted, encoder: Encoder) -> list[Leak]:
    """Bar near duplicates of held-out images."""
    if not len(admitted.held):
        return []
    images = admitted.of(admitted.held)
    found = near_leaks(pool, [images[i] for i in range(len(images))], encoder.held(admitted, pool.vectors.mean))
    found = [one for one in found if pool.usable[one[0]]]  # those of the same pixels are told already
    pool.usable[[row for row, *_ in found]] = False
    return [Leak(row, int(admitted.held[at]), how) for row, at, how, _ in found]


def near_leaks(pool: Pool, held: list[np.ndarray], queries: np.ndarray | None) -> list[tuple[int, int, str, float]]:
    """Near duplicates of held-out images: found by embedding and by layout, confirmed on pixels.

    Args:
        held: H images, (H_i, W_i, 3) uint8 each. queries: (H, D) float32 unit vectors of them, where there are any.

    Returns:
        as `find_leaks`.
    """
    k = min(COPIES, pool.vectors.count)
    near = [] if queries is None else [pool.neighbours(queries, k, "leaks, by embedding")]
    with progress("leaks, by layout", pool.vectors.count) as advance:
        near.append(search_layouts(held, Vectors(pool.embedded.layout_parts, None), k, pool.memory, advance))
    similarity, rows = (np.concatenate(both, axis=1) for both in zip(*near, strict=True))
    with progress("leaks, by pixels", len(held)) as advance:
        return find_leaks(similarity, rows, held, pool.embedded.thumbs, advance)


def embed_share(shard: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Embed one share of the gallery into the cache; the run folder stays as it is.

    Returns:
        {"shard", "images", "embedded", "seconds"}.
    """
    import time

    from tutelage.data.gallery import list_gallery
    from tutelage.recipes.preflight import preflight, share_of

    share, start, done = share_of(shard), time.monotonic(), [0]
    out = Path(settings["out"]).absolute()
    cache = Path(settings["cache"]) if settings["cache"] else out.parent / "cache"
    preflight({**settings, "out": str(out)}, cache)

    def tick(count: int) -> None:
        done[0] += count

    refs = list_gallery(settings["gallery"]).refs
    _, pieces = Encoder.of(settings, cache).embedded(refs, tick, settings, share)
    mine = sum(len(piece.refs) for piece in pieces[share[0] :: share[1]])
    say(f"share {share[0]} of {share[1]}: {mine:,} of {len(refs):,} images, {done[0]:,} of them embedded now")
    return {"shard": f"{share[0]}/{share[1]}", "images": mine, "embedded": done[0], "seconds": time.monotonic() - start}
