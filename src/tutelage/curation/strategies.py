"""Strategies: embeddings in, chosen rows out. Pure functions; what they choose depends on their arguments alone.

A gallery is N embeddings; a query is a labelled image or a class name. Similarities are cosines of centred embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NEIGHBOURHOOD = 3  # `diverse` and `hard` choose from so many times the images that are wanted
IN_A_CLUSTER = 25  # images that `diverse` would like to take from each cluster


@dataclass(frozen=True)
class Choice:
    """What a strategy chose, in the order of choice.

    rows: (m,) int64 gallery rows. query: (m,) int64, -1 for none. similarity: (m,) float32 to that query, nan for none.
    rank: (m,) int64: how many images its query had taken before; -1 for none.
    """

    rows: np.ndarray
    query: np.ndarray
    similarity: np.ndarray
    rank: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, positions: np.ndarray) -> Choice:
        """The chosen images at these positions, in this order."""
        return Choice(self.rows[positions], self.query[positions], self.similarity[positions], self.rank[positions])


def without_queries(rows: np.ndarray) -> Choice:
    """A choice that no query made."""
    none = np.full(len(rows), -1, np.int64)
    return Choice(rows, none, np.full(len(rows), np.nan, np.float32), none)


def all_rows(usable: np.ndarray) -> Choice:
    """Strategy "all": every usable row. usable: (N,) bool."""
    return without_queries(np.flatnonzero(usable))


def random(usable: np.ndarray, wanted: int, seed: int) -> Choice:
    """Strategy "random": rows drawn evenly, in ascending order.

    Which rows another seed, gallery or `usable` draws says nothing about these; but while the gallery stays, a row that becomes
    unusable is replaced, and the others stay.

    Args:
        usable: (N,) bool. wanted: how many; fewer when there are not so many.
    """
    order = np.random.default_rng(seed).permutation(len(usable))
    return without_queries(np.sort(order[usable[order]][:wanted]))


def best(similarity: np.ndarray, query: np.ndarray, wanted: int) -> Choice:
    """Strategy "best": the rows that are most similar to any query.

    Args:
        similarity: (N,) float32 of each row to its best query, -inf for rows that may not be chosen. query: (N,) int.
        wanted: how many.
    """
    order = np.argsort(-similarity, kind="stable")[:wanted]
    order = order[np.isfinite(similarity[order])]
    return Choice(order, query[order].astype(np.int64), similarity[order], _ranks(query[order]))


def _ranks(query: np.ndarray) -> np.ndarray:
    """(m,) how often each query stands before this place."""
    seen: dict[int, int] = {}
    ranks = np.empty(len(query), np.int64)
    for place, one in enumerate(query.tolist()):
        ranks[place] = seen.get(one, 0)
        seen[one] = ranks[place] + 1
    return ranks


def round_robin(groups: np.ndarray, wanted: int, seed: int) -> np.ndarray:
    """Whose turn it is: rounds over the groups, within a group one query after the other.

    Groups that are the queries themselves give every query the same number k = floor(total / queries) - 1 of images when
    `wanted` is total - queries, as the lists of the paper have it; the rest is one more, partial round in seeded order.

    Args:
        groups: (Q,) int64 group of each query, every group from 0 up having one at least.
        wanted: how many turns. seed: of the order in the last, partial round.

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
    """Strategy "balanced" (query-balanced): in each turn a query takes its best row that nobody has taken.

    Args:
        similarity: (Q, K) float32, best first. rows: (Q, K) int64 neighbours of each query; -1 where the gallery has no more (not where the
            lists of an inverted file have).
        turn: (m,) int64 queries in the order of their turns.
        barred: (N,) bool: rows that may not be taken. complete: the lists hold all rows that were ever usable; a query whose list has
            ended lets its turn pass.

    Returns:
        the choice: shorter than `turn` only where the whole gallery is used up; or None when a query's list ended before that:
        call again with more neighbours.
    """
    taken = barred.copy()
    place = np.zeros(len(rows), np.int64)
    found: list[tuple[int, int, float]] = []
    depth = rows.shape[1]
    for query in turn.tolist():
        at = place[query]
        line = rows[query]
        while at < depth and line[at] >= 0 and taken[line[at]]:
            at += 1
        if at == depth and not complete:
            return None
        place[query] = at
        if at < depth and line[at] >= 0:
            taken[line[at]] = True
            found.append((int(line[at]), query, float(similarity[query, at])))
    chosen = np.array([row for row, _, _ in found], np.int64)
    query_of = np.array([query for _, query, _ in found], np.int64)
    return Choice(chosen, query_of, np.array([s for _, _, s in found], np.float32), _ranks(query_of))


def diverse(near: Choice, embeddings: np.ndarray, wanted: int, seed: int) -> Choice:
    """Strategy "diverse": the neighbourhood is cut into clusters, which take turns; each gives its image nearest to a query.

    Args:
        near: the retrieved neighbourhood, larger than `wanted`. embeddings: (len(near), D) float32, unit length.
        wanted: how many. seed: of k-means.
    """
    import faiss

    clusters = min(max(1, wanted // IN_A_CLUSTER), len(near))
    means = faiss.Kmeans(embeddings.shape[1], clusters, niter=20, seed=seed % 2**31, spherical=True, verbose=False,
                         min_points_per_centroid=1)  # fmt: skip
    means.train(embeddings)
    _, nearest = means.index.search(embeddings, 1)  # pyright: ignore[reportCallIssue, reportOptionalMemberAccess]
    order = np.lexsort((near.rows, -near.similarity))
    return near.take(order[_in_turns(nearest[order, 0], wanted)])


def hard(near: Choice, unsure: np.ndarray, wanted: int) -> Choice:
    """Strategy "hard": of the images near each query, those of which a probe on the labels is least sure.

    Args:
        near: the retrieved neighbourhood, larger than `wanted`. unsure: (len(near),) float, higher for less sure.
        wanted: how many; every query gives its share.
    """
    order = np.lexsort((near.rows, -unsure))
    return near.take(order[_in_turns(near.query[order], wanted)])


def _in_turns(group: np.ndarray, wanted: int) -> np.ndarray:
    """Places of the first `wanted` when groups take turns, each giving its members in their order.

    Args:
        group: (m,) int64.

    Returns:
        (min(wanted, m),) int64.
    """
    return np.lexsort((group, _ranks(group)))[:wanted]
