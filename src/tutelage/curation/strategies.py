"""Selection strategies: embeddings in, chosen rows out. Pure functions, whose choice depends on their arguments only.

A gallery is N embeddings; a query is a labelled image or a class name. Similarities are cosines of centred embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tutelage.data.label_budget import places_in_runs

NEIGHBOURHOOD = 3  # `diverse` and `hard` choose from this many times the wanted number of images
IN_A_CLUSTER = 25  # images that `diverse` aims to take from each cluster


@dataclass(frozen=True)
class Choice:
    """The images that a strategy chose, in the order of choice.

    rows: (m,) int64 gallery rows. query: (m,) int64, -1 for none. similarity: (m,) float32 to that query, nan for none.
    rank: (m,) int64, number of images that the query had taken before; -1 for none.
    """

    rows: np.ndarray
    query: np.ndarray
    similarity: np.ndarray
    rank: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, positions: np.ndarray) -> Choice:
        """Return the chosen images at these positions, in this order."""
        return Choice(self.rows[positions], self.query[positions], self.similarity[positions], self.rank[positions])


def without_queries(rows: np.ndarray) -> Choice:
    """Return a choice of these rows that involves no query."""
    none = np.full(len(rows), -1, np.int64)
    return Choice(rows, none, np.full(len(rows), np.nan, np.float32), none)


def all_rows(usable: np.ndarray) -> Choice:
    """Strategy "all": every usable row. usable: (N,) bool."""
    return without_queries(np.flatnonzero(usable))


def random(usable: np.ndarray, wanted: int, seed: int) -> Choice:
    """Strategy "random": rows drawn uniformly, in ascending order.

    Draws with another seed or another size of the gallery are independent of this one; in the same gallery, a row that becomes
    unusable is replaced and the other rows stay.

    Args:
        usable: (N,) bool. wanted: how many; fewer if fewer are usable.
    """
    order = np.random.default_rng(seed).permutation(len(usable))
    return without_queries(np.sort(order[usable[order]][:wanted]))


def best(similarity: np.ndarray, query: np.ndarray, wanted: int) -> Choice:
    """Strategy "best": the rows most similar to any query.

    Args:
        similarity: (N,) float32 of each row to its best query, -inf for rows that may not be chosen. query: (N,) int.
        wanted: how many.
    """
    order = np.argsort(-similarity, kind="stable")[:wanted]
    order = order[np.isfinite(similarity[order])]
    return Choice(order, query[order].astype(np.int64), similarity[order], _ranks(query[order]))


def _ranks(query: np.ndarray) -> np.ndarray:
    """(m,) int64: how often the query at each place occurs before it."""
    order, ranks = np.argsort(query, kind="stable"), np.empty(len(query), np.int64)
    ranks[order] = places_in_runs(query[order][:, None])
    return ranks


def round_robin(groups: np.ndarray, wanted: int, seed: int) -> np.ndarray:
    """Return whose turn it is: rounds over the groups, and within a group one query after another.

    If every query is a group of its own and `wanted` is total - queries, every query gets the same number of images,
    k = floor(total / queries) - 1, as in the paper; the rest is one more, partial round over groups drawn by the seed.

    Args:
        groups: (Q,) int64 group of each query; every group from 0 up has at least one query.
        wanted: how many turns. seed: of the last, partial round.

    Returns:
        (wanted,) int64 queries.
    """
    count = int(groups.max()) + 1
    rounds, rest = divmod(wanted, count)
    last = np.random.default_rng(seed).permutation(count)[:rest]
    group = np.concatenate([np.tile(np.arange(count), rounds), np.sort(last)])
    number = np.concatenate([np.repeat(np.arange(rounds), count), np.full(rest, rounds)])
    members = [np.flatnonzero(groups == one) for one in range(count)]
    return np.array([members[g][n % len(members[g])] for g, n in zip(group, number, strict=True)], np.int64)


def balanced(
    similarity: np.ndarray, rows: np.ndarray, turn: np.ndarray, barred: np.ndarray, complete: bool = False
) -> Choice | None:
    """Strategy "balanced" (query-balanced): in each turn a query takes its most similar row that is not yet taken.

    Args:
        similarity: (Q, K) float32, best first. rows: (Q, K) int64 neighbours of each query; -1 where the gallery has no more rows
            (not merely where an inverted file's lists have no more).
        turn: (m,) int64 queries in the order of their turns.
        barred: (N,) bool: rows that may not be taken. complete: the lists hold all rows that were ever usable; a query whose list
            has ended then skips its turn.

    Returns:
        the choice, shorter than `turn` only if the whole gallery is used up; or None if a query's list ended before that:
        call again with more neighbours.
    """
    taken, place, depth = barred.copy(), np.zeros(len(rows), np.int64), rows.shape[1]
    found: list[tuple[int, int]] = []  # query, and place in its list
    for query in turn.tolist():
        at, line = place[query], rows[query]
        while at < depth and line[at] >= 0 and taken[line[at]]:
            at += 1
        if at == depth and not complete:
            return None
        place[query] = at
        if at < depth and line[at] >= 0:
            taken[line[at]] = True
            found.append((query, int(at)))
    query_of, nth = np.array(found, np.int64).reshape(-1, 2).T
    return Choice(
        rows[query_of, nth].astype(np.int64), query_of, similarity[query_of, nth].astype(np.float32), _ranks(query_of)
    )


def diverse(near: Choice, embeddings: np.ndarray, wanted: int, seed: int) -> Choice:
    """Strategy "diverse": the neighbourhood is clustered, and clusters take turns in giving their image nearest to a query.

    Args:
        near: the retrieved neighbourhood, larger than `wanted`. embeddings: (len(near), D) float32, unit length.
        wanted: how many. seed: of k-means.
    """
    import faiss

    clusters = min(max(1, wanted // IN_A_CLUSTER), len(near))
    how = {"niter": 20, "seed": seed % 2**31, "spherical": True, "min_points_per_centroid": 1}
    means = faiss.Kmeans(embeddings.shape[1], clusters, verbose=False, **how)
    means.train(embeddings)
    _, nearest = means.index.search(embeddings, 1)  # pyright: ignore[reportCallIssue, reportOptionalMemberAccess]
    order = np.lexsort((near.rows, -near.similarity))
    return near.take(order[_in_turns(nearest[order, 0], wanted)])


def hard(near: Choice, unsure: np.ndarray, wanted: int) -> Choice:
    """Strategy "hard": of the images near each query, those on which a probe trained on the labels is least confident.

    Args:
        near: the retrieved neighbourhood, larger than `wanted`. unsure: (len(near),) float, higher for less confident.
        wanted: how many; the queries take turns.
    """
    order = np.lexsort((near.rows, -unsure))
    return near.take(order[_in_turns(near.query[order], wanted)])


def _in_turns(group: np.ndarray, wanted: int) -> np.ndarray:
    """Return the places of the first `wanted` members when groups (m,) int64 take turns, each giving its members in their order."""
    return np.lexsort((group, _ranks(group)))[:wanted]
