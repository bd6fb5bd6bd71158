"""Means, spreads and differences that the page of a study speaks of. Pure numpy, tested against scipy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tutelage.metrics import resampled

SURE = 0.95  # share of the resamplings that an interval holds


@dataclass(frozen=True)
class Difference:
    """How much better one arm is than another on the same test images, in shares of 1.

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
    """Two-sided p of a paired t-test: t = mean / (sd / sqrt(n)) with n - 1 degrees of freedom.

    None where there is none to tell: fewer than 2 differences, or all of them equal, which few test images make likely by chance.
    """
    mean, deviation = spread(differences)
    if not deviation:
        return None
    from scipy.special import stdtr

    return float(2 * stdtr(len(differences) - 1, -abs(mean) / (deviation / len(differences) ** 0.5)))


def difference(
    first: np.ndarray, second: np.ndarray, score: Callable[[np.ndarray], np.ndarray] = np.asarray,
    drawn: tuple[np.ndarray, np.ndarray] | None = None,
) -> Difference:  # fmt: skip
    """Compare two arms.

    Args:
        first, second: (S, n, ...) counts of n test images by each of S seeds; rows of one seed stand together. Such as bool, which
            images it gets right.
        score: what an arm is worth by the mean counts (..., *rest) of some images; by default that mean itself.
        drawn: (R, S, ...) of `redrawn` of each, where they are known.
    """
    one, other = drawn or redrawn([first, second])
    gains = score(first.mean(axis=1)) - score(second.mean(axis=1))
    means = (score(one) - score(other)).mean(axis=1)
    low, high = np.quantile(means, [(1 - SURE) / 2, (1 + SURE) / 2])
    return Difference(float(gains.mean()), float(low), float(high), paired_p(gains.tolist()), len(gains))


def redrawn(arms: Sequence[np.ndarray], seed: int = 0) -> list[np.ndarray]:
    """Mean counts of test images that are drawn again and again (`metrics.resampled`), the same images for all arms and their seeds.

    Args:
        arms: (S, n, ...) counts each.

    Returns:
        (R, S, ...) float64 each.
    """
    together = np.concatenate([np.moveaxis(counts, 1, 0) for counts in arms], axis=1)
    return np.split(resampled(together, seed), np.cumsum([len(counts) for counts in arms])[:-1], axis=1)
