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
