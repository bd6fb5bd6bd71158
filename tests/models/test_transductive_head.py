"""What the head that is fitted on labels and pool promises."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from threadpoolctl import threadpool_limits

from tutelage.metrics import log_softmax
from tutelage.models.adapted_teacher import AdaptedTeacher, FeatureExtractor, with_logits
from tutelage.models.linear_probe import NEVER, fit_probe, scale_of
from tutelage.models.transductive_head import ENTROPY, CosineHead, _pool_gradient, expected_shares, fit_transductive

Example = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def example(seed: int = 0, classes: int = 4, labels: int = 2, shares: tuple[float, ...] = (1, 1, 1, 1)) -> Example:
    """Features of a few labelled images and of a pool in clusters, and the pool's true classes; parts differ in size and place."""
    generator = np.random.default_rng(seed)
    centres = 2.2 * generator.normal(size=(classes, 16))
    truth = np.concatenate(
        [np.repeat(np.arange(classes), labels), generator.choice(classes, 600, p=np.array(shares) / sum(shares))]
    )
    features = centres[truth] + 3 * generator.normal(size=(len(truth), 16))
    features = (features * np.linspace(0.1, 5, 16) + np.linspace(-3, 3, 16)).astype(np.float32)
    few = classes * labels
    return features[:few], truth[:few], features[few:], truth[few:]


def fitted(found: Example, **more) -> CosineHead:
    features, labels, pool, _ = found
    return fit_transductive(features, labels, pool, np.full(4, 0.25, np.float32), scale_of(pool), **more)


def test_the_pool_helps():
    """On clusters with two labels each the head is right for clearly more of the pool than the probe, over eight draws."""
    gains = []
    for seed in range(8):
        features, labels, pool, truth = example(seed)
        probe = fit_probe(features, labels, 4, 1e-2, scale_of(pool))
        right, before = ((one(pool).argmax(1) == truth).mean() for one in (fitted(example(seed)), probe))
        gains.append(right - before)
    assert np.mean(gains) > 0.05
    assert min(gains) > -0.05


def test_gradient():
    """The gradient on the pool is that of the loss in the docstring, by automatic differentiation."""
    generator = np.random.default_rng(0)
    logits = torch.from_numpy(generator.normal(size=(30, 5))).requires_grad_(True)
    expected = np.log(np.array([0.1, 0.2, 0.3, 0.2, 0.2]))
    mean, entropy = logits.softmax(1).mean(0), -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
    ((mean * (mean.log() - torch.from_numpy(expected))).sum() + ENTROPY * entropy).backward()
    found = _pool_gradient(log_softmax(logits.detach().numpy()), expected)
    assert logits.grad is not None
    np.testing.assert_allclose(found, logits.grad.numpy(), atol=1e-9)


def test_expected_shares():
    """Half way, in logarithms, from equal shares to predicted ones; a class that is never predicted keeps a share."""
    np.testing.assert_allclose(expected_shares(np.log([[0.8, 0.2]] * 3)), [2 / 3, 1 / 3], rtol=1e-6)
    assert expected_shares(log_softmax(np.array([[0.0, -400.0]], np.float32))).min() > 0


@pytest.mark.parametrize("weight", ["none", "balanced"])
def test_a_class_without_a_label(weight: str):
    """It is decided for nowhere, and the others are as if it did not exist."""
    features, labels, pool, _ = example()
    some = labels != 2
    head = fit_transductive(
        features[some], labels[some], pool, np.full(4, 0.25, np.float32), scale_of(pool), class_weight=weight
    )
    assert (head(pool)[:, 2] == NEVER).all()
    three = fit_transductive(
        features[some], np.array([0, 0, 1, 1, 2, 2]), pool, np.full(3, 1 / 3, np.float32), scale_of(pool), weight
    )
    np.testing.assert_array_equal(head(pool)[:, [0, 1, 3]], three(pool))


def test_balanced_labels():
    """--class-weight balanced changes a fit on unequal numbers of labels, and not one on equal numbers."""
    features, labels, pool, truth = example()
    np.testing.assert_allclose(
        fitted((features, labels, pool, truth), class_weight="balanced").weight, fitted(example()).weight, atol=1e-4
    )
    odd = (features[1:], labels[1:], pool, truth)
    assert np.abs(fitted(odd, class_weight="balanced").weight - fitted(odd).weight).max() > 1e-3


def test_the_same_bits(tmp_path: Path):
    """Another number of threads gives the same head; it is read back as it was; a temperature divides its logits."""
    heads = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            heads.append(fitted(example()))
    assert all((one == other).all() for one, other in zip(*(vars(head).values() for head in heads), strict=True))
    head = heads[0].calibrated(0.5)
    head.save(tmp_path)
    pool = example()[2]
    np.testing.assert_array_equal(CosineHead(**load_file(tmp_path / "head.safetensors"))(pool), head(pool))
    np.testing.assert_allclose(head(pool), heads[0](pool) / 0.5, rtol=1e-5)
    assert head(pool).dtype == np.float32


def test_inside_the_network():
    """Where logits are cached instead of features, they are the head's."""
    head = fitted(example()).calibrated(0.5)
    pool = example()[2]
    network = FeatureExtractor(lambda images: images, 8, (0.0,) * 3, (1.0,) * 3, 16, "0" * 64, "features", "any")
    inside = with_logits(AdaptedTeacher(network, head, torch.nn.Identity(), 0))
    assert (inside.network.width, inside.network.output) == (4, "logits")
    np.testing.assert_allclose(inside.network.forward(torch.from_numpy(pool)).numpy(), head(pool), atol=1e-4)
    assert inside.network.hash != network.hash
