"""What the strategies promise: who is chosen, in whose turn, and that nothing else decides."""

from __future__ import annotations

import numpy as np
import pytest

from tutelage.curation import strategies
from tutelage.curation.strategies import Choice


def unit(array: np.ndarray) -> np.ndarray:
    return (array / np.linalg.norm(array, axis=1, keepdims=True)).astype(np.float32)


def lists(queries: np.ndarray, gallery: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of each query, the naive way."""
    similarity = queries @ gallery.T
    rows = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarity, rows, 1), rows.astype(np.int64)


@pytest.fixture
def space() -> tuple[np.ndarray, np.ndarray]:
    """5 queries and 200 gallery images in 8 dimensions."""
    random = np.random.default_rng(0)
    return unit(random.normal(size=(5, 8))), unit(random.normal(size=(200, 8)))


def naive_balanced(queries: np.ndarray, gallery: np.ndarray, turn: np.ndarray, barred: np.ndarray) -> list[int]:
    similarity, taken, chosen = queries @ gallery.T, barred.copy(), []
    for query in turn:
        row = int(np.argmax(np.where(taken, -np.inf, similarity[query])))
        taken[row] = True
        chosen.append(row)
    return chosen


def test_all_and_random():
    """`all` takes what is usable; `random` takes as many as are wanted, others with another seed, each image as often."""
    usable = np.ones(50, bool)
    usable[[3, 7]] = False
    assert strategies.all_rows(usable).rows.tolist() == np.flatnonzero(usable).tolist()
    one = strategies.random(usable, 10, 3).rows.tolist()
    assert len(set(one)) == 10
    assert (
        one
        == sorted(one)
        == strategies.random(usable, 10, 3).rows.tolist()
        != strategies.random(usable, 10, 4).rows.tolist()
    )
    assert not {3, 7} & set(one)
    assert len(strategies.random(usable, 99, 0)) == 48
    counts = np.bincount(np.concatenate([strategies.random(usable, 10, s).rows for s in range(500)]), minlength=50)
    assert counts[usable].min() > 60  # 104 expected, 9 standard deviation


def test_random_replaces_only_what_became_unusable():
    """A drawn image that turns out to be a duplicate is replaced; the others of the draw stay."""
    usable = np.ones(100, bool)
    before = set(strategies.random(usable, 20, 0).rows.tolist())
    lost = min(before)
    usable[lost] = False
    after = set(strategies.random(usable, 20, 0).rows.tolist())
    assert len(after) == 20
    assert before - after == {lost}


def test_best_takes_the_nearest_to_any_query(space):
    """`best` ranks the gallery by its best similarity to any query and names that query."""
    queries, gallery = space
    similarity = queries @ gallery.T
    best, query = similarity.max(axis=0), similarity.argmax(axis=0)
    best[5] = -np.inf
    choice = strategies.best(best, query, 30)
    expected = [row for row in np.argsort(-similarity.max(axis=0)) if row != 5][:30]
    assert choice.rows.tolist() == expected
    assert choice.query.tolist() == query[expected].tolist()
    assert choice.rank[choice.query == choice.query[0]].tolist() == list(range((choice.query == choice.query[0]).sum()))


def test_balanced_is_what_the_rounds_say(space):
    """In each turn a query takes its best image that nobody has: the same as the naive rounds over all similarities."""
    queries, gallery = space
    barred = np.zeros(200, bool)
    barred[np.argsort(-queries[0] @ gallery.T)[:3]] = True
    turn = strategies.round_robin(np.arange(5), 43, 1)
    similarity, rows = lists(queries, gallery, 200)
    choice = strategies.balanced(similarity, rows, turn, barred)
    assert choice is not None
    assert choice.rows.tolist() == naive_balanced(queries, gallery, turn, barred)
    assert choice.query.tolist() == turn.tolist()
    found = (queries[choice.query] * gallery[choice.rows]).sum(axis=1)
    assert choice.similarity == pytest.approx(found, abs=1e-6)


def test_lists_that_end_too_early_are_told(space):
    """Where a query's list is too short to know its best free image, nothing is made up; a longer list gives the true choice."""
    queries, gallery = space
    turn, barred = strategies.round_robin(np.arange(5), 100, 0), np.zeros(200, bool)
    assert strategies.balanced(*lists(queries, gallery, 20), turn, barred) is None
    full = strategies.balanced(*lists(queries, gallery, 200), turn, barred)
    assert full is not None
    for k in range(21, 200):
        short = strategies.balanced(*lists(queries, gallery, k), turn, barred)
        assert short is None or short.rows.tolist() == full.rows.tolist()


def test_a_gallery_that_is_used_up(space):
    """A gallery with fewer images than turns is taken whole, and no image twice."""
    queries, gallery = space
    similarity, rows = lists(queries, gallery[:12], 12)
    padded = np.pad(rows, ((0, 0), (0, 1)), constant_values=-1)
    values = np.pad(similarity, ((0, 0), (0, 1)), constant_values=-np.inf)
    choice = strategies.balanced(values, padded, strategies.round_robin(np.arange(5), 40, 0), np.zeros(12, bool))
    assert choice is not None
    assert sorted(choice.rows.tolist()) == list(range(12))


@pytest.mark.parametrize(
    ("queries", "total", "each"),
    [(1200, 153_600, 127), (2401, 153_664, 63), (4802, 153_664, 31), (9605, 153_680, 15), (60, 10_000, 165)],
)
def test_turns_follow_the_papers_rule(queries: int, total: int, each: int):
    """With `total` images, the labelled ones among them, each query gets floor(total / queries) - 1, some one more."""
    counts = np.bincount(strategies.round_robin(np.arange(queries), total - queries, 0), minlength=queries)
    assert total // queries - 1 == each
    assert set(counts.tolist()) <= {each, each + 1}
    assert counts.sum() == total - queries


def test_classes_take_turns():
    """By class, every class brings equally many images, whatever its number of labels, and its labels take turns."""
    groups = np.array([0, 0, 0, 0, 1, 2, 2])
    turn = strategies.round_robin(groups, 30, 0)
    assert np.bincount(groups[turn]).tolist() == [10, 10, 10]
    assert np.bincount(turn[groups[turn] == 0]).tolist() == [3, 3, 2, 2]
    rest = [tuple(np.bincount(groups[strategies.round_robin(groups, 31, seed)], minlength=3)) for seed in range(20)]
    assert set(rest) == {(11, 10, 10), (10, 11, 10), (10, 10, 11)}


def neighbourhood(count: int) -> tuple[Choice, np.ndarray]:
    """A choice from two tight clusters, nine tenths in the first and all of those nearer, and its embeddings."""
    random = np.random.default_rng(0)
    first = np.arange(count) < 0.9 * count
    centres = np.where(first[:, None], [[1.0, 0, 0, 0]], [[0, 1.0, 0, 0]])
    embeddings = unit(centres + 0.05 * random.normal(size=(count, 4)))
    similarity = np.where(first, 0.9, 0.5).astype(np.float32)
    return Choice(np.arange(count), np.arange(count) % 2, similarity, np.arange(count) // 2), embeddings


def test_diverse_gives_small_clusters_their_share():
    """`diverse` takes from clusters in turn: a small far cluster gets its share, where `best` would take none of it."""
    near, embeddings = neighbourhood(200)
    choice = strategies.diverse(near, embeddings, 50, 0)
    assert len(set(choice.rows.tolist())) == len(choice) == 50
    assert (choice.rows >= 180).sum() == 20  # all of the small cluster, which has fewer than 25
    assert choice.rows.tolist() == strategies.diverse(near, embeddings, 50, 0).rows.tolist()


def test_hard_takes_what_the_probe_is_unsure_of():
    """`hard` takes, of each query's images, those with the highest doubt, and as many for each query."""
    near, _ = neighbourhood(100)
    unsure = np.random.default_rng(1).random(100)
    choice = strategies.hard(near, unsure, 20)
    assert np.bincount(choice.query).tolist() == [10, 10]
    for query in (0, 1):
        mine = np.flatnonzero(near.query == query)
        expected = mine[np.argsort(-unsure[mine])][:10]
        assert set(choice.rows[choice.query == query].tolist()) == set(expected.tolist())
