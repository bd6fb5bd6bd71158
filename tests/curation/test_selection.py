"""Stage 0 on embeddings alone: many copies of one held-out image, inverted files that end, memory that does not do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from textures import CLASSES, texture
from tutelage.curation import candidates
from tutelage.curation.candidates import LeakCheck
from tutelage.curation.image_match import layout, opponent, thumbnail
from tutelage.curation.selection import Pool, SelectionRequest, choose
from tutelage.curation.vectors import Vectors


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def pool_of(thumbs: np.ndarray, index: str) -> tuple[Pool, np.ndarray]:
    """A gallery of thumbnails (N, 16, 16, 3) uint8, whose embeddings are their own pixels; and these: (N, D) float32."""
    embeddings = unit(opponent(thumbs).reshape(len(thumbs), -1))
    parts = SimpleNamespace(layout_parts=(layout(thumbs),), thumbs=lambda rows: thumbs[rows])
    usable = np.ones(len(thumbs), bool)
    return Pool(parts, Vectors((embeddings,), None), usable, index, 2**30), embeddings  # type: ignore[arg-type]


@pytest.mark.parametrize("index", ["exact", "ivf"])
@pytest.mark.parametrize("among", [False, True])
def test_thousands_of_copies_take_few_searches(index, among, monkeypatch):
    """2,000 copies of one held-out image are barred in as many searches as their logarithm, all but the first for that image alone."""
    random, copies = np.random.default_rng(0), 2000
    held = [texture(CLASSES[seed % 3], seed) for seed in range(6)]
    noisy = np.clip(thumbnail(held[2]) + random.normal(0, 3, (copies, 16, 16, 3)), 0, 255).astype(np.uint8)
    others = [thumbnail(texture(CLASSES[seed % 3], 100 + seed)) for seed in range(60)]
    pool, embeddings = pool_of(np.concatenate([noisy, np.stack(others)]), index)
    queries = unit(opponent(np.stack([thumbnail(one) for one in held])).reshape(6, -1))
    encoder = SimpleNamespace(held=lambda labelled, mean: queries)
    labelled = SimpleNamespace(held=10 + np.arange(6), of=lambda rows: [held[row - 10] for row in rows])
    searched: list[tuple[int, int]] = []

    def counted(pool: Pool, images: list, *rest: Any) -> list:
        searched.append((len(images), rest[-1]))
        return near_leaks(pool, images, *rest)

    near_leaks = candidates.near_leaks
    monkeypatch.setattr(candidates, "near_leaks", counted)
    check = LeakCheck(pool, labelled, encoder, [])  # type: ignore[arg-type]
    assert check(np.arange(len(embeddings)) if among else None) == len(check.leaks) >= copies
    assert not pool.usable[:copies].any()
    assert pool.usable[copies:].sum() >= 58
    assert {leak.held for leak in check.leaks if leak.row < copies} == {12}
    assert searched[0] == (6, candidates.COPIES)
    assert len(searched) <= 9
    assert all(one == (1, candidates.COPIES * 2**number) for number, one in enumerate(searched[1:], 1))
    assert len(pool.recalls) == (index == "ivf" and not among), "one inverted file at most"


@pytest.mark.parametrize("strategy", ["balanced", "diverse"])
def test_an_inverted_file_that_ends_too_soon(strategy):
    """Where the lists that a query looks into hold fewer images than it is to bring, the exact search brings the rest."""
    random = np.random.default_rng(0)
    gallery = unit(np.concatenate([random.normal(2, 0.1, (40, 8)), random.normal(0, 1, (860, 8))]))
    pool = Pool(None, Vectors((gallery,), None), np.ones(900, bool), "ivf", 2**30)  # type: ignore[arg-type]
    wish = SelectionRequest(strategy, 880, np.zeros(1, np.int64), 0, "none", lambda embeddings: embeddings[:, 0])
    choice, _ = choose(pool, gallery[:1], wish)
    assert len(choice) == len(set(choice.rows.tolist())) == 880
    assert pool.recalls
    assert pool.recalls[0] < 1
