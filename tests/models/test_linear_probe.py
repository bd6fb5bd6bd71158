"""What the probe and its cross-validation promise."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from tutelage.metrics import softmax
from tutelage.models.linear_probe import (
    LinearHead,
    best_temperature,
    cross_validate,
    fit_probe,
    judgeable,
    log_loss,
    scale_of,
    stacked,
)  # fmt: skip


def example(seed: int = 0, per_class: int = 10, classes: int = 4, width: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Features whose parts differ in size and place, and labels that they tell imperfectly."""
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), per_class)
    centres = np.random.default_rng(99).normal(size=(classes, width))
    features = centres[labels] + 1.5 * generator.normal(size=(len(labels), width))
    return (features * np.linspace(0.1, 5, width) + np.linspace(-3, 3, width)).astype(np.float32), labels


def sklearn_probabilities(
    features: np.ndarray, labels: np.ndarray, new: np.ndarray, strength: float, pool: np.ndarray, weight: str | None
) -> np.ndarray:
    scaler = StandardScaler().fit(pool)
    model = LogisticRegression(C=strength, max_iter=5000, tol=1e-8, class_weight=weight)
    return model.fit(scaler.transform(features), labels).predict_proba(scaler.transform(new))


@pytest.mark.parametrize("strength", [1e-2, 1e-1])
@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("weight", ["none", "balanced"])
def test_the_probe_is_that_of_scikit_learn(strength: float, classes: int, weight: str):
    """On raw features the probe gives the probabilities of scikit-learn's scaler and logistic regression."""
    features, labels = example(classes=classes)
    features, labels = features[5:], labels[5:]  # unbalanced
    pool, new = example(1, 100, classes)[0], example(2, 20, classes)[0]
    head = fit_probe(features, labels, classes, strength, scale_of(pool), weight)
    theirs = sklearn_probabilities(features, labels, new, strength, pool, None if weight == "none" else weight)
    assert (head.weight.dtype, head.weight.shape) == (np.float32, (classes, 20))
    assert head(new).dtype == np.float32
    np.testing.assert_allclose(softmax(head(new)), theirs, atol=1e-3)
    assert np.ptp(theirs, axis=0).max() > 0.1


def test_a_class_without_an_image():
    """A class that the probe has not seen is decided for nowhere, and the others are as if it did not exist."""
    features, labels = example()
    new = example(3, 50)[0]
    seen = labels != 1
    head = fit_probe(features[seen], labels[seen], 4, 1e-2, scale_of(features))
    compact = fit_probe(features[seen], np.searchsorted([0, 2, 3], labels[seen]), 3, 1e-2, scale_of(features))
    assert softmax(head(new))[:, 1].max() < 1e-9
    np.testing.assert_allclose(head(new)[:, [0, 2, 3]], compact(new), atol=1e-5)


def test_one_class_only():
    """Where only one class has images, the probe says that class everywhere."""
    features, labels = example()
    head = fit_probe(features[labels == 2], labels[labels == 2], 4, 1e-2, scale_of(features))
    assert (head(example(4)[0]).argmax(axis=1) == 2).all()


def test_held_out_logits_come_from_a_probe_that_has_not_seen_the_image():
    """Each image's logits are those of the probe fitted on the other folds, on all their views, for the clean view."""
    features, labels = example()
    generator = np.random.default_rng(5)
    views = np.stack([features, *(features + generator.normal(size=features.shape) for _ in range(2))])
    views = views.astype(np.float32)
    folds, scale = np.arange(len(labels)) % 5, scale_of(features)
    fit = partial(fit_probe, classes=4, strength=1e-2, scale=scale)
    logits = cross_validate(fit, views, labels, folds, 4)
    for fold in range(5):
        rest = folds != fold
        head = fit_probe(*stacked(views[:, rest], labels[rest]), 4, 1e-2, scale)
        np.testing.assert_allclose(logits[~rest], head(features[~rest]), atol=1e-5)
    shuffled = np.random.default_rng(6).permutation(labels)  # labels of no meaning are not learned by heart
    accuracy = (cross_validate(fit, views, shuffled, folds, 4).argmax(1) == shuffled).mean()
    assert accuracy < 0.6
    assert (logits.argmax(1) == labels).mean() > 0.6


@pytest.mark.parametrize("labels", [[0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 1]])
def test_a_class_absent_in_a_fold(labels: list[int]):
    """Folds that hold all images of a class, down to one class left, still give finite logits for every image."""
    y = np.array(labels)
    features = np.random.default_rng(0).normal(size=(1, 6, 5)).astype(np.float32)
    fit = partial(fit_probe, classes=3, strength=1e-2, scale=scale_of(features[0]))
    logits = cross_validate(fit, features, y, y, 3)
    assert np.isfinite(logits).all()
    assert (logits.argmax(1) != y).all()


def test_stacked_keeps_labels_with_features():
    """Views and images become rows, each with the label of its image."""
    features = np.arange(12).reshape(2, 3, 2)
    rows, labels = stacked(features, np.array([7, 8, 9]))
    assert rows.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    assert labels.tolist() == [7, 8, 9, 7, 8, 9]


def test_a_constant_feature_is_left_as_it_is():
    """The scale of a feature that never changes is 1, so that nothing is divided by 0."""
    features = np.array([[1.0, 5.0], [3.0, 5.0]], np.float32)
    mean, std = scale_of(features)
    assert mean.tolist() == [2, 5]
    assert std.tolist() == [1, 1]
    assert std.dtype == np.float32
    assert np.isfinite(fit_probe(features, np.array([0, 1]), 2, 1.0, (mean, std))(features)).all()


def test_log_loss_by_hand():
    """The log loss of an image is -log of its label's probability, and stays finite for a sure mistake."""
    losses = log_loss(np.array([[0.0, np.log(3)], [0.0, 0.0], [0.0, 1e4]]), np.array([1, 0, 0]))
    np.testing.assert_allclose(losses, [-np.log(0.75), np.log(2), -np.log(1e-12)], rtol=1e-6)


@pytest.mark.parametrize("true", [0.25, 1.0, 4.0])
def test_best_temperature_finds_the_one_that_calibrates(true: float):
    """Logits that are T times too large get the temperature T: labels drawn from softmax(logits / T) give it back."""
    generator = np.random.default_rng(0)
    calibrated = 1.5 * generator.normal(size=(6000, 5))
    labels = np.array([generator.choice(5, p=p) for p in softmax(calibrated)])
    found = best_temperature(calibrated * true, labels)
    assert true / 1.2 < found < true * 1.2


def test_best_temperature_has_ends():
    """Logits that are always right, or always wrong, get the ends of the range: 1/16 and 8."""
    logits = np.eye(3) * 5
    assert best_temperature(logits, np.arange(3)) == 1 / 16
    assert best_temperature(logits, np.array([1, 2, 0])) == 8


def test_a_head_is_a_matrix_product():
    """logits = features @ weight.T + bias."""
    head = LinearHead(np.array([[1.0, 2.0], [0.0, -1.0]], np.float32), np.array([0.5, 0.0], np.float32))
    assert head(np.array([[1.0, 1.0]], np.float32)).tolist() == [[3.5, -1.0]]


def test_judgeable():
    """A held-out image is judged only where the rest still has an image of its class."""
    labels = np.array([0, 0, 1, 2, 2])
    folds = np.array([0, 1, 0, 1, 1])
    assert judgeable(labels, folds).tolist() == [True, True, False, False, False]
