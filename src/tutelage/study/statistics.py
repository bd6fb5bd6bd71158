"""Means, spreads and differences for the page of a study. Numpy and one function of scipy; tested against scipy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tutelage.metrics import resampled

SURE = 0.95  # confidence level: share of the resamplings inside an interval


@dataclass(frozen=True)
class Difference:
    """How much better one method is than another on the same test images, as a fraction of 1.

    mean: over seeds. low, high: bounds of 95 % of the resamplings of the test images. p: two-sided paired t-test over seeds,
    None where `paired_p` is undefined. seeds: number of pairs.
    """

    mean: float
    low: float
    high: float
    p: float | None
    seeds: int

    @property
    def sure(self) -> bool:
        """Whether it is certain which method is better: the interval excludes 0, and p (where there is one) is below 0.05."""
        return not self.low <= 0 <= self.high and (self.p is None or self.p < 1 - SURE)


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation (n - 1); the latter is None for a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def paired_p(differences: Sequence[float]) -> float | None:
    """Two-sided p of a paired t-test: t = mean / (sd / sqrt(n)) with n - 1 degrees of freedom.

    None where it is undefined: fewer than 2 differences, or all of them equal, which happens by chance with few test images.
    """
    mean, deviation = spread(differences)
    if not deviation:
        return None
    from scipy.special import stdtr

    return float(2 * stdtr(len(differences) - 1, -abs(mean) / (deviation / len(differences) ** 0.5)))


def difference(
    first: np.ndarray,
    second: np.ndarray,
    score: Callable[[np.ndarray], np.ndarray] = np.asarray,
    drawn: tuple[np.ndarray, np.ndarray] | None = None,
) -> Difference:
    """Return how much better the first method is than the second.

    Args:
        first, second: (S, n, ...) counts of n test images for each of S seeds, the same seeds in both; for example bool, whether an
            image is classified correctly.
        score: computes a method's score from the mean counts (..., *rest) of some images; by default that mean itself.
        drawn: (R, S, ...) of `redrawn` for each method, if already computed.
    """
    one, other = drawn or redrawn([first, second])
    gains = score(first.mean(axis=1)) - score(second.mean(axis=1))
    means = (score(one) - score(other)).mean(axis=1)
    low, high = np.quantile(means, [(1 - SURE) / 2, (1 + SURE) / 2])
    return Difference(float(gains.mean()), float(low), float(high), paired_p(gains.tolist()), len(gains))


def redrawn(methods: Sequence[np.ndarray], seed: int = 0) -> list[np.ndarray]:
    """Mean counts over resamplings of the test images (`metrics.resampled`), the same resamplings for all methods and seeds.

    Args:
        methods: (S, n, ...) counts of each method.

    Returns:
        (R, S, ...) float64 for each method.
    """
    together = np.concatenate([np.moveaxis(counts, 1, 0) for counts in methods], axis=1)
    return np.split(resampled(together, seed), np.cumsum([len(counts) for counts in methods])[:-1], axis=1)
