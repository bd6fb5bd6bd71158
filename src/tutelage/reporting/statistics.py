"""Means, spreads and differences that the page of a study speaks of. Pure numpy, tested against scipy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
SURE = 0.95  # share of the resamplings that an interval holds


@dataclass(frozen=True)
class Difference:
    """How much more accurate one arm is than another on the same test images, in shares of 1.

    mean: over seeds. low, high: what 95 % of the resamplings of the test images lie between. p: two-sided paired t-test over
    seeds, None with fewer than 2. seeds: how many pairs.
    """

    mean: float
    low: float
    high: float
    p: float | None
    seeds: int

    @property
    def sure(self) -> bool:
        """Neither the test images nor (where there are several) the seeds leave it open which is better."""
        return not self.low <= 0 <= self.high and (self.p is None or self.p < 1 - SURE)


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation (n - 1); None for the latter with one value: no spread is invented."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def paired_p(differences: Sequence[float]) -> float | None:
    """Two-sided p of a paired t-test: t = mean / (sd / sqrt(n)) with n - 1 degrees of freedom; None with fewer than 2."""
    if len(differences) < 2:
        return None
    from scipy.special import stdtr

    mean, deviation = spread(differences)
    if not deviation:
        return 1.0 if mean == 0 else 0.0
    return float(2 * stdtr(len(differences) - 1, -abs(mean) / (deviation / len(differences) ** 0.5)))


def difference(first: np.ndarray, second: np.ndarray, seed: int = 0) -> Difference:
    """Compare two arms.

    Args:
        first, second: (S, n) bool, which of n test images each of S seeds gets right; rows of one seed stand together.
    """
    gains = first.astype(np.float64) - second
    each = gains.mean(axis=0)  # over seeds: images are resampled, the same for both arms and all seeds
    random = np.random.default_rng(seed)
    means = np.array([each[random.integers(0, len(each), len(each))].mean() for _ in range(RESAMPLES)])
    low, high = np.quantile(means, [(1 - SURE) / 2, (1 + SURE) / 2])
    return Difference(float(each.mean()), float(low), float(high), paired_p(gains.mean(axis=1).tolist()), len(gains))
