"""Strategies: embeddings in, chosen indices out."""

from __future__ import annotations

import numpy as np


def choose_all(count: int, labelled: int, total: int | None, seed: int) -> np.ndarray:
    """Strategy "all": every gallery image. Arguments and result as for `choose_random`; only `count` is looked at."""
    return np.arange(count)


def choose_random(count: int, labelled: int, total: int | None, seed: int) -> np.ndarray:
    """Strategy "random": a random part of the gallery.

    Args:
        count: images in the gallery.
        labelled: labelled images, which count towards `total`.
        total: size of the transfer set.
        seed: of the draw.

    Returns:
        (k,) int64 sorted positions in [0, count); all of them when they do not reach `total`.
    """
    assert total is not None, "the settings were checked"
    return np.sort(np.random.default_rng(seed).permutation(count)[: max(0, total - labelled)])


STRATEGIES = {"all": choose_all, "random": choose_random}
