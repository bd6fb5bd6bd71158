"""Selection of gallery images by their embeddings: leaks are excluded, a strategy chooses, each picture is kept once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from tutelage.curation import strategies
from tutelage.curation.duplicates import SEARCHES, near_duplicates
from tutelage.curation.embed import EmbeddingTable
from tutelage.curation.ivf import ivf_memory, search_ivf
from tutelage.curation.search import best_query, search
from tutelage.curation.strategies import Choice
from tutelage.curation.vectors import Vectors
from tutelage.device import memory_text
from tutelage.errors import TutelageError, shown
from tutelage.progress import logger, progress
from tutelage.settings.shared_flags import Gallery

EXACT = 5_000_000  # above this many vectors --index auto uses an inverted file
NEAR = 0.5  # a similarity that counts as near whatever chance finds: in a gallery of similar images, chance finds much
EACH = 6200  # bytes per image, beside its vector, for comparing images with each other: measured on 100,000 and 200,000
NULL = 64  # random directions that the queries are compared with
# The gallery shows something if the similarities of all queries, or of one class, lie this many standard errors above
# chance. The earlier rule, a median above chance's 95 %, found in 3 of 4 draws that 300 images of CIFAR-10 show none of
# its classes; this rule found it in none of 20.
SURE = 3.0
FEW = 3  # classes with fewer queries are not judged; with 3, 1 in 25 classes that 100 CIFAR-10 images do show was named
NAMED = 20  # most classes that a warning names


@dataclass
class Pool:
    """The gallery, ready for selection.

    embedded: its readable images. vectors: their embeddings. usable: (N,) bool, images that may be chosen; changed in place when
    leaks or duplicates are found. index, memory: how to search; memory in bytes. recalls: of each approximate search, the share of
    the true nearest neighbours that it found.
    """

    embedded: EmbeddingTable
    vectors: Vectors
    usable: np.ndarray
    index: str
    memory: int
    recalls: list[float] = field(default_factory=list)

    def _settle(self) -> None:
        """Resolve the index "auto": an inverted file for many images if it fits in memory, else the exact search."""
        count = int(self.usable.sum())
        needed = ivf_memory(count, self.vectors.width)
        many = self.vectors.count > EXACT
        self.index = "ivf" if many and needed <= self.memory else "exact"
        if many and self.index == "exact":
            logger.info(
                f"an inverted file over {count:,} images takes {memory_text(needed)} of memory, but the limit is "
                f"{memory_text(self.memory)} (--memory, or half of what is free): the search is exact, and takes longer"
            )

    def neighbours(self, queries: np.ndarray, k: int, what: str, exact: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Return the usable rows nearest to each query.

        Args:
            queries: (Q, D) float32 unit vectors. what: label of the progress bar. exact: search exactly whatever the index.

        Returns:
            (Q, k) float32 similarities and (Q, k) int64 rows, best first; -1 where the gallery has no more rows. Queries for which
            an inverted file finds too few rows are searched exactly.
        """
        vectors, usable, memory = self.vectors, self.usable, self.memory
        if self.index == "auto" and not exact:
            self._settle()
        with progress(what, vectors.count) as advance:
            if exact or self.index == "exact":
                return search(vectors, queries, k, usable=usable, memory=memory, advance=advance)
            similarity, rows, recall = search_ivf(vectors, queries, k, usable=usable, memory=memory, advance=advance)
        self.recalls.append(recall)
        logger.info(f"inverted file over {vectors.count:,} images: finds {100 * recall:.1f} % of the true {k} nearest")
        short = np.flatnonzero((rows >= 0).sum(axis=1) < min(k, int(self.usable.sum())))
        if len(short):
            similarity[short], rows[short] = self.neighbours(queries[short], k, f"{what}, short lists", exact=True)
        return similarity, rows


@dataclass(frozen=True)
class Leak:
    """A gallery image (row of the pool) that shows a validation or test image (row of the target set), and how."""

    row: int
    held: int
    how: str


@dataclass(frozen=True)
class SelectionRequest:
    """What to choose. groups: (Q,) int64, groups of queries that take turns. unsure: (m, D) unit embeddings -> (m,) for `hard`."""

    strategy: str
    wanted: int
    groups: np.ndarray
    seed: int
    dedup: str
    unsure: Callable[[np.ndarray], np.ndarray]


def choose(
    pool: Pool, queries: np.ndarray, wish: SelectionRequest, leaks: Callable[[np.ndarray | None], int] = lambda rows: 0
) -> tuple[Choice, int]:
    """Let a strategy choose, bar the leaks and near duplicates in its choice, and repeat until there are none.

    Args:
        queries: (Q, D) float32 unit embeddings; may be empty for `all` and `random`.
        leaks: bars leaks among rows of the pool, or among all rows (None), and returns how many it barred.

    Returns:
        the choice; the number of gallery images left out as near duplicates of chosen ones.
    """
    known, passed = np.zeros(pool.vectors.count, bool), 0
    if wish.dedup == "gallery":  # leaks are already barred in the whole gallery
        passed = _drop_duplicates(pool, np.flatnonzero(pool.usable), known, wish.dedup)
    elif wish.dedup == "candidates" and wish.strategy == "all":
        leaks(None)
    if not pool.usable.any():
        return strategies.without_queries(np.zeros(0, np.int64)), passed
    again = _strategy(pool, queries, wish)
    if wish.dedup != "candidates" or wish.strategy == "all":
        return again(), passed
    while pool.usable.any():
        choice = again()
        barred = leaks(choice.rows[~known[choice.rows]])
        dropped = _drop_duplicates(pool, choice.rows[pool.usable[choice.rows]], known, wish.dedup)
        passed += dropped
        if not barred and not dropped:
            return choice, passed
    return strategies.without_queries(np.zeros(0, np.int64)), passed


def check_memory(pool: Pool, count: int, dedup: str) -> None:
    """Raise an error if memory cannot hold what comparing images with each other needs: vectors, thumbnails, intermediates.

    Args:
        count: number of images. dedup: the setting that has them compared, "gallery" or "candidates".
    """
    needed = count * (12 * pool.vectors.width + EACH)
    if needed > pool.memory:
        chosen_only = "--dedup candidates, which compares what is chosen"
        raise TutelageError(
            f"--dedup {dedup} with {count:,} images to compare takes {memory_text(needed)} of memory, "
            f"and the limit is {memory_text(pool.memory)} (--memory, or half of what is free)",
            f"use {chosen_only if dedup == 'gallery' else 'a smaller --total, --dedup none'}, or a larger --memory",
        )


def _drop_duplicates(pool: Pool, rows: np.ndarray, known: np.ndarray, dedup: str) -> int:
    """Bar all but the first of the near duplicates among these rows; return how many are barred.

    known: (N,) bool, changed in place: rows already compared with each other. dedup: as for `check_memory`.
    """
    if len(rows) < 2:
        return 0
    check_memory(pool, len(rows), dedup)
    fresh = np.flatnonzero(~known[rows])
    with progress("near duplicates", SEARCHES * len(fresh)) as advance:
        first = near_duplicates(pool.vectors.rows(rows), pool.embedded.thumbs(rows), fresh=fresh, advance=advance)
    known[rows] = True
    dropped = rows[first != np.arange(len(rows))]
    pool.usable[dropped] = False
    return len(dropped)


def _strategy(pool: Pool, queries: np.ndarray, wish: SelectionRequest) -> Callable[[], Choice]:
    """Return a strategy over a pool; each call chooses among the rows usable by then and searches only if necessary."""
    if wish.strategy == "all":
        return lambda: strategies.all_rows(pool.usable)
    if wish.strategy == "random":
        return lambda: strategies.random(pool.usable, wish.wanted, wish.seed)
    if wish.strategy == "best":
        with progress("search", pool.vectors.count) as advance:
            similarity, query = best_query(pool.vectors, queries, usable=pool.usable, advance=advance)
        return lambda: strategies.best(np.where(pool.usable, similarity, -np.inf), query, wish.wanted)
    if wish.strategy in ("balanced", "text"):
        return _balanced(pool, queries, wish, wish.wanted)
    wide = min(strategies.NEIGHBOURHOOD * wish.wanted, int(pool.usable.sum()))
    near = _balanced(pool, queries, wish, wide)

    def narrowed() -> Choice:
        found = near()
        embeddings = pool.vectors.rows(found.rows)
        if wish.strategy == "hard":
            return strategies.hard(found, wish.unsure(embeddings), wish.wanted)
        return strategies.diverse(found, embeddings, wish.wanted, wish.seed)

    return narrowed


def _balanced(pool: Pool, queries: np.ndarray, wish: SelectionRequest, wanted: int) -> Callable[[], Choice]:
    turn = strategies.round_robin(wish.groups, wanted, wish.seed)
    most = int(np.bincount(turn, minlength=len(queries)).max())
    k = min(2 * most + 16, pool.vectors.count)
    lists: tuple[np.ndarray, np.ndarray] | None = None

    def chosen() -> Choice:
        nonlocal k, lists
        while True:
            if lists is None:
                lists = pool.neighbours(queries, k, f"search, {k:,} for each query")
            similarity, rows = lists
            choice = strategies.balanced(similarity, rows, turn, ~pool.usable, k == pool.vectors.count)
            if choice is not None:
                return choice
            k, lists = min(2 * k, pool.vectors.count), None

    return chosen


def nothing_near(pool: Pool, choice: Choice, labels: np.ndarray, classes: Sequence[str]) -> tuple[str, list[str]]:
    """Return a warning if the images that queries retrieved are no nearer to them than random directions find.

    Each query counts by the nearest image that it retrieved; queries are judged all together, and class by class.

    Args:
        labels: (Q,) int64 class of each query. classes: names of the classes.

    Returns:
        the warning, "" if there is none; and the classes that it names, empty if it is about all of them.
    """
    asked, null = np.unique(choice.query[choice.query >= 0]), _meaningless(pool)
    if not len(asked) or not np.isfinite(null).all():
        return "", []
    nearest = np.array([choice.similarity[choice.query == query].max() for query in asked])
    by_class = {name: nearest[labels[asked] == number] for number, name in enumerate(classes)}

    def near(found: np.ndarray, errors: float) -> bool:
        """Return whether the mean similarity exceeds that of the random directions by so many standard errors."""
        noise = null.std() * np.sqrt(1 / len(found) + 1 / len(null))
        return bool(found.mean() > min(null.mean() + errors * noise, NEAR))

    finds = f"a random direction finds {null.mean():.2f}"
    if not near(nearest, SURE) and not any(near(found, SURE) for found in by_class.values() if len(found)):
        return (
            f"nothing in the gallery is near the queries: the nearest image that each of them found has a mean similarity of "
            f"{nearest.mean():.2f}, {finds}. The transfer set is no better than a random one: look at montage.jpg, and give a "
            "--gallery that shows such things"
        ), []
    far = [name for name, found in by_class.items() if len(found) >= FEW and not near(found, 0)]
    if not far:
        return "", []
    theirs = float(np.concatenate([by_class[name] for name in far]).mean())
    return (
        f"the queries of {shown(far, NAMED)} find nothing near: the nearest image that each of them found has a mean similarity of "
        f"{theirs:.2f}, {finds}. Either the gallery does not show these classes, or its images of them are already labelled or "
        "held out: look at montage.jpg, and give more --gallery, or a smaller --total"
    ), far


def _meaningless(pool: Pool) -> np.ndarray:
    """(NULL,) float32: similarity of each random direction to its nearest usable image; -inf where there is none.

    The directions are random sums of at most a quarter of the gallery's embeddings (so they share the gallery's spread), at unit
    length. They are compared only with the other embeddings, because a sum is near its own terms: when all embeddings were in both
    places, 100 images of CIFAR-10 seemed to show nothing in 1 of 2 draws.
    """
    random = np.random.default_rng(0)
    rows = np.sort(random.permutation(pool.vectors.count)[: min(1024, -(-pool.vectors.count // 4))])
    null = random.normal(size=(NULL, len(rows))).astype(np.float32) @ pool.vectors.rows(rows)
    null /= np.maximum(np.linalg.norm(null, axis=1, keepdims=True), 1e-12)
    others = pool.usable.copy()
    others[rows] = False
    return search(pool.vectors, null, 1, usable=others, memory=pool.memory)[0][:, 0]


def wanted_of(settings: Gallery, labelled: int, classes: int) -> int | None:
    """Return the number of gallery images to choose; None for all. The labelled images count towards `--total`."""
    if settings.per_query is not None:
        return settings.per_query * (classes if settings.strategy == "text" else labelled)
    total = settings.total
    if total is not None and total <= labelled:
        raise TutelageError(
            f"--total {total} with {labelled:,} labelled images, which count towards it, leaves none for the gallery",
            f"raise --total above {labelled:,}, or lower --budget (--smoke takes at most 256 images)",
        )
    return None if total is None else total - labelled
