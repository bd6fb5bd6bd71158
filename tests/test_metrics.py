"""What the scores promise."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics as sk
import torch

from tutelage.metrics import (
    ECE_BINS,
    classification,
    confusion,
    expected_calibration_error,
    log_softmax,
    softmax,
    unsure_threshold,
    wilson,
)  # fmt: skip


def example(seed: int, images: int = 300, classes: int = 6, sharp: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are right more often than not, and labels."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, images)
    logits = generator.normal(size=(images, classes)) + sharp * np.eye(classes)[labels]
    return logits.astype(np.float32), labels


def test_scores_are_those_of_scikit_learn():
    """Accuracy, balanced accuracy, macro F1, log loss, recall and confusion are those of scikit-learn."""
    logits, labels = example(0)
    scores, said, p = classification(logits, labels), logits.argmax(1), softmax(logits)
    assert scores["images"] == 300
    assert scores["accuracy"] == pytest.approx(sk.accuracy_score(labels, said))
    assert scores["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(labels, said))
    assert scores["macro_f1"] == pytest.approx(sk.f1_score(labels, said, average="macro"))
    assert scores["log_loss"] == pytest.approx(sk.log_loss(labels, p))
    np.testing.assert_allclose(scores["recall"], sk.recall_score(labels, said, average=None))
    np.testing.assert_array_equal(scores["confusion"], sk.confusion_matrix(labels, said))


@pytest.mark.parametrize("sharp", [0.0, 2.0, 8.0])
def test_calibration_error_is_that_of_torchmetrics(sharp: float):
    """The calibration error is torchmetrics' with 15 bins and the L1 norm."""
    oracle = pytest.importorskip("torchmetrics.functional.classification").multiclass_calibration_error
    logits, labels = example(1, sharp=sharp)
    p = softmax(logits)
    theirs = oracle(torch.from_numpy(p), torch.from_numpy(labels), num_classes=6, n_bins=15, norm="l1")
    assert ECE_BINS == 15
    assert expected_calibration_error(p, labels) == pytest.approx(theirs.item(), abs=1e-6)
    assert classification(logits, labels)["ece"] == pytest.approx(theirs.item(), abs=1e-6)


def test_calibration_error_worked_example():
    """The number in the docstring is right, and so is one with two bins worked by hand."""
    assert expected_calibration_error(np.array([[0.8, 0.2], [0.8, 0.2]]), np.array([0, 1])) == pytest.approx(0.3)
    # 0.55 (wrong) and 0.9, 0.9 (both right): (|0 - 0.55| + |2 - 1.8|) / 3
    p = np.array([[0.55, 0.45], [0.9, 0.1], [0.1, 0.9]])
    assert expected_calibration_error(p, np.array([1, 0, 1])) == pytest.approx((0.55 + 0.2) / 3)


def test_calibration_bins_are_closed_above():
    """A confidence on the edge of two bins counts in the lower one, and 1 in the last."""
    # 10/15 belongs to the bin (9/15, 10/15], with 9.5/15; were it in the next, the gaps would not cancel
    edge, inside = 10 / 15, 9.5 / 15
    p = np.array([[edge, 1 - edge], [inside, 1 - inside]])
    assert expected_calibration_error(p, np.array([0, 1])) == pytest.approx(abs(1 - edge - inside) / 2)
    assert expected_calibration_error(np.array([[1.0, 0.0]]), np.array([0])) == 0


@pytest.mark.filterwarnings("error")
def test_classes_without_images():
    """A class without images has no recall and leaves the means alone, as with scikit-learn, and warns of nothing."""
    generator = np.random.default_rng(2)
    labels = generator.choice([0, 2], 60)  # nothing of 1, 3, 4
    logits = generator.normal(size=(60, 5)) + 2 * np.eye(5)[labels]
    logits[:, 4] = -50.0  # never decided for: absent altogether
    scores, said = classification(logits, labels), logits.argmax(1)
    assert {1, 3} <= set(said.tolist())
    assert [r is None for r in scores["recall"]] == [False, True, False, True, True]
    recall = sk.recall_score(labels, said, labels=[0, 2], average=None)
    assert scores["balanced_accuracy"] == pytest.approx(recall.mean())
    assert scores["macro_f1"] == pytest.approx(sk.f1_score(labels, said, average="macro", zero_division=0.0))
    np.testing.assert_array_equal(scores["confusion"], sk.confusion_matrix(labels, said, labels=range(5)))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("label", [0, 1])
def test_a_single_image(label: int):
    """One image has scores: all right or all wrong."""
    scores = classification(np.array([[2.0, 0.0, 1.0]]), np.array([label]))
    right = float(label == 0)
    confidence = softmax(np.array([2.0, 0.0, 1.0]))[0]
    assert scores["accuracy"] == scores["balanced_accuracy"] == right
    assert scores["macro_f1"] == right
    assert scores["ece"] == pytest.approx(abs(right - confidence))
    assert scores["recall"] == [right if c == label else None for c in range(3)]


def test_ties_go_to_the_first_class():
    """Among equal logits the first class is the decision, so that scores do not depend on the machine."""
    scores = classification(np.zeros((4, 3)), np.array([0, 0, 1, 2]))
    assert scores["accuracy"] == 0.5
    assert scores["confusion"] == [[2, 0, 0], [1, 0, 0], [1, 0, 0]]
    assert scores["log_loss"] == pytest.approx(np.log(3))


def test_rows_of_the_confusion_are_labels():
    """Row r, column c counts the images of class r that were taken for c."""
    table = confusion(np.array([0, 0, 2]), np.array([1, 1, 0]), 3)
    np.testing.assert_array_equal(table, [[0, 2, 0], [0, 0, 0], [1, 0, 0]])


def test_a_sure_mistake_costs_a_finite_loss():
    """A probability of 0 for the label is clipped at 1e-12: the log loss stays a number."""
    scores = classification(np.array([[0.0, 1e4]]), np.array([0]))
    assert scores["log_loss"] == pytest.approx(-np.log(1e-12))


def test_softmax_of_large_logits():
    """softmax neither overflows nor loses its sum, in any shape."""
    p = softmax(np.array([[[1e4, 1e4, 0.0]], [[-1e4, 0.0, 0.0]]], dtype=np.float32))
    assert p.dtype == np.float64
    np.testing.assert_allclose(p, [[[0.5, 0.5, 0.0]], [[0.0, 0.5, 0.5]]])


def test_log_softmax_keeps_what_it_is_given():
    """float32 stays float32, over the classes of rows and of grids; without classes, as of a frozen teacher, nothing happens."""
    grid = log_softmax(np.array([[[[1e4]], [[1e4]]]], dtype=np.float32))
    assert grid.dtype == np.float32
    np.testing.assert_allclose(grid.ravel(), np.log([0.5, 0.5]), rtol=1e-6)
    assert log_softmax(np.zeros((3, 0), dtype=np.float32)).shape == (3, 0)


def test_scores_are_plain_json():
    """Every score is of a type that JSON writes."""
    import json

    logits, labels = example(3, images=20)
    assert json.loads(json.dumps(classification(logits, labels)))["images"] == 20


def test_unsure_threshold_by_hand():
    """The worked example of the docstring: of 0.9, 0.8, 0.6, 0.5 with the third wrong, 0.8 parts right from wrong best."""
    found = unsure_threshold(np.array([0.9, 0.8, 0.6, 0.5]), np.array([True, True, False, True]))
    assert found == {"threshold": 0.8, "sure": 0.5, "accuracy_sure": 1.0, "accuracy_unsure": 0.5}
    assert unsure_threshold(np.array([0.9, 0.8]), np.array([True, True])) is None
    everything = unsure_threshold(np.array([0.9, 0.5]), np.array([False, True]))
    assert everything["accuracy_unsure"] is None, "all are sure"
    tied = unsure_threshold(np.array([0.9, 0.8, 0.6, 0.5]), np.array([True, False, True, False]))
    assert tied is not None
    assert tied["threshold"] == 0.6, "0.9 is as good: the smallest of them"


def test_wilson_by_hand():
    """The worked example of the docstring, and as statsmodels gives it: 8 of 10."""
    assert wilson(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
