"""How far one set of images is from another, by their embeddings: the transfer set from the target's own images."""

from __future__ import annotations

import numpy as np

from tutelage.errors import TutelageError

# A typical pair of centred unit embeddings has a cosine near 0 (medians of 0.04 to 0.16 within CIFAR-10's classes and
# photos, tf_efficientnet_lite2) and so a squared distance near 2: 1 is what the median heuristic gives for nearly any
# set, but fixed, so that values can be compared. CMMD's 10 sees only the means: two sets of 2,000 that differ in
# spread alone were 0.9 errors apart with it, and 26 with 1.
BANDWIDTH = 1.0
MOST = 2_000  # images of each set that are looked at: 0.4 s at D = 1280, 32 MB a block, an error near 0.001


def mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Squared maximum mean discrepancy of two sets, without bias (Gretton et al., JMLR 2012, eq. 3).

    mean k(x_i, x_j), i != j, + mean k(y_i, y_j), i != j, - 2 mean k(x_i, y_j), with k(a, b) = exp(-|a - b|^2 / 2). As
    CMMD (Jayasumana et al., CVPR 2024), with another bandwidth and no factor of 1000.

    With x = [[1, 0], [0, 1]] and y = [[-1, 0], [0, -1]]: exp(-1) + exp(-1) - 2 (2 exp(-2) + 2 exp(-1)) / 4 = 0.232544.

    Args:
        x: (n, D) float32, unit length. y: (m, D) float32, unit length. Both centred with the same mean (the gallery's),
            and without a common image: an image that is in both makes them look nearer. Of more than 2,000, a random
            part, the same at every call.

    Returns:
        0 on average for two samples of one distribution, and then as often below; at most 2 (1 - exp(-2)) = 1.73.

    Raises:
        TutelageError: fewer than two images in a set.
    """
    return mmd_and_error(x, y)[0]


def mmd_and_error(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """`mmd`, and its standard error over the draw of the images.

    sqrt(4 var w(x_i) / n + 4 var w(y_j) / m), with w(a) = mean k(a, x) - mean k(a, y), a itself left out: the leading
    term of a U-statistic's variance (Serfling, 1980, chapter 5). Told against seen on CIFAR-10's cats and dogs, 50 of
    each: 0.0070 and 0.0064. Where both sets are of one distribution it is 1.4 times too large, since w is then all
    noise; so a value within two errors of 0 means that no difference was seen.

    Args and raises: as for `mmd`.
    """
    for name, rows in (("x", x), ("y", y)):
        if len(rows) < 2:
            raise TutelageError(
                f"{name} has {len(rows)} embedding{'' if len(rows) == 1 else 's'}, but at least 2 are needed: the distance "
                "depends on the spread within each set",
                "choose or label more images",
            )
    x, y = _part(x), _part(y)
    n, m = len(x), len(y)
    # Row means in float64, each kernel block made once and let go.
    among_x, among_y = (_kernel(x, x).sum(axis=1) - 1) / (n - 1), (_kernel(y, y).sum(axis=1) - 1) / (m - 1)
    across = _kernel(x, y)
    x_to_y, y_to_x = across.mean(axis=1), across.mean(axis=0)
    value = among_x.mean() + among_y.mean() - 2 * x_to_y.mean()
    variance = 4 * (among_x - x_to_y).var(ddof=1) / n + 4 * (among_y - y_to_x).var(ddof=1) / m
    return float(value), float(np.sqrt(variance))


def subsample_rows(count: int) -> np.ndarray:
    """(min(count, 2,000),) int64 positions of those of `count` images that a distance is taken of, ascending.

    Drawn at random: evenly spaced ones would miss classes in a set that lists them in turn.
    """
    return np.sort(np.random.default_rng(0).permutation(count)[:MOST])


def _part(embeddings: np.ndarray) -> np.ndarray:
    return embeddings if len(embeddings) <= MOST else embeddings[subsample_rows(len(embeddings))]


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n, D), (m, D) float32 -> (n, m) float64 in (0, 1]."""
    squares = np.square(a).sum(axis=1)[:, None] + np.square(b).sum(axis=1)[None, :]
    distances = np.maximum((squares - 2 * (a @ b.T)).astype(np.float64), 0)
    return np.exp(-distances / (2 * BANDWIDTH**2))
