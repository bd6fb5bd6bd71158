"""Scores of a classifier from its probabilities: pure numpy, tested against scikit-learn and torchmetrics."""

from __future__ import annotations

from typing import Any

import numpy as np

ECE_BINS = 15


def softmax(logits: np.ndarray) -> np.ndarray:
    """(..., C) float logits -> (..., C) float64 probabilities."""
    shifted = np.asarray(logits, dtype=np.float64)
    shifted = shifted - shifted.max(axis=-1, keepdims=True)
    exp = np.exp(shifted)
    return exp / exp.sum(axis=-1, keepdims=True)


def confusion(labels: np.ndarray, decisions: np.ndarray, classes: int) -> np.ndarray:
    """Counts of (label, decision).

    Args:
        labels, decisions: (B,) integers in [0, classes).

    Returns:
        (C, C) int64, rows are labels.
    """
    return np.bincount(labels * classes + decisions, minlength=classes**2).reshape(classes, classes)


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = ECE_BINS) -> float:
    """Mean gap between confidence and accuracy over equal-width bins (Guo et al., ICML 2017).

    ECE = sum_b |B_b| / n  |acc(B_b) - conf(B_b)|, bins ((b-1)/15, b/15] of the largest probability.

    Worked example: two images with confidence 0.8, one of them right: ECE = |0.5 - 0.8| = 0.3.

    Args:
        probabilities: (B, C) float in [0, 1].
        labels: (B,) integers.
    """
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    number = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(number, weights=right - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(labels))


def unsure_threshold(confidence: np.ndarray, right: np.ndarray) -> dict[str, float] | None:
    """The confidence below which a classifier is better called unsure.

    It maximises P(sure | right) - P(sure | wrong) on images that were held out (Youden's J; Youden, Cancer 1950), "sure" being a
    largest probability of at least the threshold; of equal ones the smallest.

    Worked example: confidences 0.9, 0.8, 0.6, 0.5, right, right, wrong, right: at 0.8 it is 2/3 - 0, the best.

    Args:
        confidence: (n,) float in [0, 1], the largest probability. right: (n,) bool.

    Returns:
        threshold; sure: the share of images that are; accuracy_sure and accuracy_unsure. None where all are right or all wrong.
    """
    right = np.asarray(right, bool)
    if right.all() or not right.any():
        return None
    thresholds = np.unique(confidence)
    sure = confidence[None] >= thresholds[:, None]
    gain = sure[:, right].mean(1) - sure[:, ~right].mean(1)
    best = int(gain.argmax())
    those = sure[best]
    return {
        "threshold": float(thresholds[best]), "sure": float(those.mean()), "accuracy_sure": float(right[those].mean()),
        "accuracy_unsure": float(right[~those].mean()) if not those.all() else float("nan"),
    }  # fmt: skip


def wilson(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a share that was measured on `count` images (Wilson, JASA 1927).

    Worked example: 8 of 10 gives 0.490 to 0.943.
    """
    z = 1.959964
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * (share * (1 - share) / count + z**2 / (4 * count**2)) ** 0.5
    return middle - half, middle + half


def classification(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """All scores of one classifier on one set of images.

    Balanced accuracy is the mean recall of the classes that have images; macro F1 counts a class without images and
    without decisions as absent, as scikit-learn does.

    Args:
        logits: (B, C) float.
        labels: (B,) int64 in [0, C).

    Returns:
        accuracy, balanced_accuracy, macro_f1, ece, log_loss: float in their usual ranges; recall: list of C floats (None
        where a class has no image); confusion: C lists of C counts; images: B.
    """
    labels = np.asarray(labels, dtype=np.int64)
    probabilities = softmax(logits)
    table = confusion(labels, probabilities.argmax(axis=1), probabilities.shape[1])
    hits, there, said = np.diag(table), table.sum(axis=1), table.sum(axis=0)
    recall = np.where(there > 0, hits / np.maximum(there, 1), np.nan)
    seen = (there + said) > 0
    f1 = 2 * hits / np.maximum(there + said, 1)
    picked = probabilities[np.arange(len(labels)), labels]
    return {
        "images": len(labels),
        "accuracy": float(hits.sum() / len(labels)),
        "balanced_accuracy": float(np.nanmean(recall)),
        "macro_f1": float(f1[seen].mean()),
        "ece": expected_calibration_error(probabilities, labels),
        "log_loss": float(-np.log(np.maximum(picked, 1e-12)).mean()),
        "recall": [None if np.isnan(r) else float(r) for r in recall],
        "confusion": table.tolist(),
    }
