"""Selection as a function of embeddings: what `tutelage curate` does in a run folder, without one."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import numpy as np

from tutelage.errors import TutelageError, did_you_mean

Strategy = Literal["all", "random", "best", "balanced", "diverse", "hard", "text"]
Balance = Literal["query", "class"]


class Selection(NamedTuple):
    """The gallery embeddings that a strategy chose, in the order of choice.

    positions: (m,) int64 rows of the gallery. scores: (m,) float32 cosine similarity in [-1, 1] to the query that retrieved the row.
    queries: (m,) int64, that query. "all" and "random" have no query: score nan, query -1.
    """

    positions: np.ndarray
    scores: np.ndarray
    queries: np.ndarray


def select(
    gallery: np.ndarray,
    queries: np.ndarray | None = None,
    *,
    count: int | None = None,
    strategy: Strategy = "balanced",
    labels: np.ndarray | None = None,
    balance: Balance = "query",
    usable: np.ndarray | None = None,
    seed: int = 0,
) -> Selection:
    """Choose a transfer set from the embeddings of a gallery, by the strategies of `tutelage curate`.

    The embeddings are of one encoder, of any length: both sides are centred on the gallery's mean and scaled to unit length, for
    "text" scaled only. Copies are not looked for, since that takes pixels: leave those of test images out by `usable`. "balanced" is
    the strategy of arXiv 2311.18237.

    Args:
        gallery: (N, D) float, may be memory-mapped.
        queries: (Q, D) float, embeddings of labelled images, for "text" of class names; None for "all" and "random".
        count: rows to choose, from 1 to the number of usable rows; None, and always for "all": all of these.
        strategy: "all", "random", "best", "balanced", "diverse", "hard" or "text".
        labels: (Q,) integers, the class of each query, for "hard" and for balance "class".
        balance: what takes turns in choosing rows: each query, or each class.
        usable: (N,) bool, rows that may be chosen; None for all.
        seed: of random draws.

    Raises:
        TutelageError: an unknown strategy, lacking queries or labels, shapes that do not fit, NaN, or a count out of range.
    """
    from tutelage.commands.curate import unsure
    from tutelage.curation.embed import EmbeddingTable
    from tutelage.curation.selection import Pool, SelectionRequest, choose
    from tutelage.curation.vectors import Vectors, mean_of
    from tutelage.device import free_memory
    from tutelage.metrics import unit

    rows = (gallery if gallery.dtype == np.float16 else np.asarray(gallery, np.float32),)
    mean = np.zeros(Vectors(rows, None).width, np.float32) if strategy == "text" else mean_of(rows)
    asked = np.zeros((0, len(mean)), np.float32) if queries is None else np.asarray(queries, np.float32)
    free = np.ones(len(gallery), bool) if usable is None else np.array(usable)
    _check(strategy, asked, labels, balance, free, gallery.shape)
    most = int(free.sum())
    wanted = most if count is None else count
    if not 1 <= wanted <= most:
        raise TutelageError(f"count {wanted}: 1 to {most:,} rows can be chosen", "give another, or leave it out")
    asked, own = unit(asked - mean), np.arange(len(asked))
    classes = own if labels is None else np.unique(labels, return_inverse=True)[1]
    table = EmbeddingTable(
        rows, np.arange(len(gallery)), np.zeros((0, 32), np.uint8), np.zeros(1, np.int64), (), (), []
    )
    groups, ungrouped = classes if balance == "class" else own, np.full(len(asked), "")
    wish = SelectionRequest(
        strategy, wanted, groups, seed, "none", lambda near: unsure(asked, classes, ungrouped, near, seed)
    )
    pool = Pool(table, Vectors(rows, mean), free, "auto", int(free_memory() / 2))
    choice, _ = choose(pool, asked, wish)
    return Selection(choice.rows, choice.similarity, choice.query)


def _check(
    strategy: str,
    queries: np.ndarray,
    labels: np.ndarray | None,
    balance: str,
    usable: np.ndarray,
    shape: tuple[int, ...],
) -> None:
    """Raise an error for arguments that do not fit each other. shape: of the gallery."""
    known = get_args(Strategy)
    if strategy not in known:
        near = did_you_mean(strategy, known, f"use one of {', '.join(known)}")
        raise TutelageError(f"strategy {strategy!r} is unknown", near)
    if balance not in get_args(Balance):
        raise TutelageError(f"balance {balance!r} is unknown", "use 'query' or 'class'")
    if queries.ndim != 2 or queries.shape[1] != shape[1]:
        message = f"queries of shape {queries.shape} must be (queries, {shape[1]}), as wide as the gallery"
        raise TutelageError(message, "embed the queries by the model that embedded the gallery")
    if strategy not in ("all", "random") and not len(queries):
        raise TutelageError(f"strategy {strategy!r} needs queries", "give queries, or use strategy 'random'")
    if labels is None and (strategy == "hard" or balance == "class"):
        raise TutelageError(
            f"strategy {strategy!r} with balance {balance!r} needs labels", "give the class of each query"
        )
    if labels is not None and np.shape(labels) != (len(queries),):
        message = f"labels of shape {np.shape(labels)} must be ({len(queries)},), one for each query"
        raise TutelageError(message, "give the class number of each query, in the same order")
    if usable.shape != shape[:1] or usable.dtype != bool:
        message = f"usable: {usable.shape} {usable.dtype} must be ({shape[0]},) bool, one for each row"
        raise TutelageError(message, "leave usable out to use all rows")
