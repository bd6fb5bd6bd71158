"""What the distance between two sets of embeddings promises."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tutelage.curation.mmd import MOST, mmd


def unit(seed: int, count: int, away: float = 0.0, width: int = 16) -> np.ndarray:
    """(count, width) float32 of unit length: a cloud whose middle is `away` along the first axis."""
    points = np.random.default_rng(seed).normal(size=(count, width))
    points[:, 0] += away
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


def naive(x: np.ndarray, y: np.ndarray) -> float:
    """The formula of the docstring, one pair at a time."""

    def k(a, b):
        return math.exp(-sum((float(s) - float(t)) ** 2 for s, t in zip(a, b, strict=True)) / 2)

    def among(z):
        return np.mean([k(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j])

    return among(x) + among(y) - 2 * np.mean([k(a, b) for a in x for b in y])


def test_worked_example():
    """The numbers of the docstring: two right angles back to back, and two opposite points."""
    x, y = np.eye(2, dtype=np.float32), -np.eye(2, dtype=np.float32)
    assert mmd(x, y) == pytest.approx(0.232544, abs=1e-6)
    here = np.array([[1, 0], [1, 0]], np.float32)
    assert mmd(here, -here) == pytest.approx(2 * (1 - math.exp(-2)), abs=1e-6)


def test_equals_the_double_loop():
    """Sets of other sizes, near and far, give what the formula gives pair by pair."""
    for away in (0.0, 0.5, 3.0):
        x, y = unit(0, 7, away), unit(1, 11)
        assert mmd(x, y) == pytest.approx(naive(x, y), abs=1e-6)


def test_zero_for_one_distribution_on_average():
    """Two samples of one distribution are 0 apart, with values of both signs: no bias at small counts."""
    values = np.array([mmd(unit(seed, 20), unit(1000 + seed, 30)) for seed in range(200)])
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(200)
    assert 0.3 < (values < 0).mean() < 0.8


def test_grows_as_a_cluster_moves_away():
    """The further a set is from another, the larger the value."""
    values = [mmd(unit(0, 200, away), unit(1, 200)) for away in (0.0, 0.5, 1.0, 2.0, 4.0, 16.0)]
    assert values == sorted(values)
    assert abs(values[0]) < 0.002 < values[1]
    assert values[-1] > 0.3


def test_sees_spread_where_the_means_agree():
    """Sets with one mean and different spread are told apart; a comparison of means alone would see nothing."""
    full = unit(0, 600)
    flat = full.copy()
    flat[:, 8:] = 0
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    assert mmd(np.concatenate([flat, -flat]), unit(1, 1200)) > 0.01


def test_order_does_not_matter():
    """Neither the order of the sets nor that of the images in them changes the value."""
    x, y = unit(0, 90, 1.0), unit(1, 70)
    shuffled = np.random.default_rng(2).permutation(90)
    assert mmd(x, y) == pytest.approx(mmd(y, x), abs=1e-9)
    assert mmd(x, y) == pytest.approx(mmd(x[shuffled], y[::-1]), abs=1e-9)


def test_large_sets_are_sampled_over_all_their_parts():
    """Of many images a part is taken, the same at every call, without skipping those at odd places."""
    near, far = unit(0, 2 * MOST), unit(1, 2 * MOST, 8.0)
    mixed = np.stack([near, far], axis=1).reshape(-1, near.shape[1])  # in turn: every second image is far
    other = np.concatenate([unit(2, 1000), unit(3, 1000, 8.0)])
    assert abs(mmd(mixed, other)) < 0.005
    assert mmd(mixed, other) == mmd(mixed, other)


def test_identical_images_are_no_trouble():
    """Copies of one image, and sets of the least size, give finite values."""
    same = np.repeat(unit(0, 1), 5, axis=0)
    assert mmd(same, same) == pytest.approx(0, abs=1e-6)
    assert np.isfinite(mmd(unit(0, 2), unit(1, 2)))
