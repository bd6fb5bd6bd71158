"""Which labelled images are used: those within the label budget, nested for one seed, and their cross-validation folds."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

ENOUGH = 3  # classes shown by fewer chosen images take precedence when images are drawn by number
FOLDS, FEW_FOLDS = 5, 2  # the latter if a class has fewer than FOLDS images or groups


def draw_budget(
    labels: np.ndarray,
    keys: Sequence[bytes] | np.ndarray,
    budget: int | None,
    seed: int,
    groups: np.ndarray | None = None,
) -> np.ndarray:
    """Choose `budget` images of every class: those that come first by a hash of (seed, key).

    A smaller budget's images are a subset of a larger one's; the order of the images and the other classes do not matter.
    With groups, a second image of a group comes only after one image of every group of that class.

    Args:
        labels: (n,) int64. keys: n content keys of 32 bytes, or (n, 32) uint8. groups: (n,) str, "" = none.
        budget: images per class, at least 1; None = all.

    Returns:
        (m,) int64, sorted positions. Of a class with fewer images all are chosen; see `shortfalls`.
    """
    if budget is None:
        return np.arange(len(labels))
    order = _hashed(labels, keys, seed, groups)
    return np.sort(order[places_in_runs(labels[order][:, None]) < budget])


def _hashed(labels: np.ndarray, keys: Sequence[bytes] | np.ndarray, seed: int, groups: np.ndarray | None) -> np.ndarray:
    """Return (n,) int64 positions sorted by label, then by turn within the group, then by hash of (seed, key)."""
    salt = f"{seed}\0".encode()
    digests = [hashlib.blake2b(salt + bytes(key), digest_size=8).digest() for key in keys]
    hashes = np.frombuffer(b"".join(digests), ">u8")
    turn = np.zeros(len(labels), np.int64)  # 0 for the first image of its group in its class, 1 for the second ...
    if groups is not None and len(labels):
        codes = np.unique(groups, return_inverse=True)[1]
        order = np.lexsort((hashes, codes, labels))
        turn[order] = places_in_runs(np.stack([labels[order], codes[order]], axis=1))
        turn[np.asarray(groups) == ""] = 0
    return np.lexsort((hashes, turn, labels))


def shortfalls(labels: np.ndarray, budget: int | None, classes: Sequence[str]) -> list[str]:
    """Return one message for every class with fewer images than the budget. labels: (n,) int64 of the train images."""
    counts = np.bincount(labels, minlength=len(classes))
    return [
        f"class {name!r} has {count} train images, fewer than the budget of {budget}"
        for name, count in zip(classes, counts, strict=True)
        if budget is not None and count < budget
    ]


def draw_images(
    shows: np.ndarray, keys: Sequence[bytes], budget: int | None, seed: int, groups: np.ndarray | None = None
) -> np.ndarray:
    """Choose `budget` images in all so that no class is lost: one after another, in an order that the budget does not change.

    While a class is in fewer than ENOUGH chosen images, the next image is the first by a hash of (seed, key) that shows the class
    with the fewest so far (in a tie the class that fewest images show); after that, the first by that hash. With groups, a
    second image of a group comes after one of every group.

    Args:
        shows: (n, C) bool. keys: n content keys. budget: images, at least 1; None = all. groups: (n,) str, "" = none.

    Returns:
        (m,) int64, sorted positions, m = min(n, budget).
    """
    if budget is None:
        return np.arange(len(shows))
    order = _hashed(np.zeros(len(shows), np.int64), keys, seed, groups)
    left, rarity = list(order.tolist()), shows.sum(axis=0)
    have = np.zeros(shows.shape[1], np.int64)
    chosen: list[int] = []
    while left and len(chosen) < budget:
        open_ = [k for k in range(shows.shape[1]) if have[k] < min(ENOUGH, rarity[k])]
        lacking = min(open_, key=lambda k: (have[k], rarity[k], k), default=None)
        number = left[0] if lacking is None else next(i for i in left if shows[i, lacking])
        left.remove(number)
        chosen.append(number)
        have += shows[number]
    return np.sort(np.array(chosen, np.int64))


def folds(labels: np.ndarray, groups: np.ndarray | None, seed: int) -> np.ndarray:
    """Return stratified folds for cross-validation: FOLDS, or FEW_FOLDS if any class has fewer than FOLDS images or groups.

    All images of a non-empty group share a fold. A class with one image or group is in one fold only, and is
    missing from the training part of that fold.

    Args:
        labels: (n,) int64. groups: (n,) str, "" = none, or None.

    Returns:
        (n,) int64, the fold in which each image is held out.
    """
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    units: dict[object, list[int]] = defaultdict(list)
    for i in shuffled.tolist():
        units[str(groups[i]) if groups is not None and groups[i] else i].append(i)
    per_class = Counter(label for unit in units.values() for label in set(labels[unit].tolist()))
    count = FOLDS if min(per_class.values(), default=0) >= FOLDS else FEW_FOLDS
    total = Counter(labels.tolist())
    held: list[Counter] = [Counter() for _ in range(count)]  # images of each class in each fold
    sizes = [0] * count
    fold = np.zeros(len(labels), np.int64)
    for unit in sorted(units.values(), key=len, reverse=True):  # large groups first; sorting keeps the shuffle
        mine = Counter(labels[unit].tolist())
        costs = [sum(m * (2 * h[c] + m) / total[c] ** 2 for c, m in mine.items()) for h in held]
        best = min(range(count), key=lambda f: (costs[f], sizes[f]))
        fold[unit] = best
        held[best].update(mine)
        sizes[best] += len(unit)
    return fold


def places_in_runs(rows: np.ndarray) -> np.ndarray:
    """(n, k) sorted rows -> (n,) int64: 0, 1, 2, ... within every run of equal rows."""
    fresh = np.ones(len(rows), bool)
    fresh[1:] = (rows[1:] != rows[:-1]).any(axis=1)
    at = np.arange(len(rows))
    return at - np.maximum.accumulate(np.where(fresh, at, 0))
