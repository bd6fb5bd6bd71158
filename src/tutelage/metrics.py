"""Scores of classification and segmentation, and their uncertainty from the choice of test images: numpy and scipy, tested
against scikit-learn and torchmetrics."""

from __future__ import annotations

import functools

import numpy as np

from tutelage.json_object import JSON

ECE_BINS = 15
RESAMPLES, RESAMPLED_AT_ONCE = 2000, 100
LEAST_LOG = -1e4  # lower clip of stored log probabilities: it fits in float16, and 0 times it is 0


def softmax(logits: np.ndarray) -> np.ndarray:
    """(..., C) float logits -> (..., C) float64 probabilities."""
    from scipy import special  # a tenth of a second, which `--help` need not wait

    return special.softmax(np.asarray(logits, dtype=np.float64), axis=-1)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """(B, C) or (B, C, h, w) float32 logits -> log probabilities over the classes, same shape; C = 0 gives an empty array."""
    from scipy import special

    # C = 0: outputs of a frozen teacher, which has no classes
    return special.log_softmax(logits, axis=1) if logits.shape[1] else logits


def unit(rows: np.ndarray) -> np.ndarray:
    """(n, D) float -> (n, D) float32 rows of unit length; a row of zeros stays zero."""
    return (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def confusion(labels: np.ndarray, decisions: np.ndarray, classes: int) -> np.ndarray:
    """Return the confusion matrix: counts of (label, predicted class).

    Args:
        labels, decisions: (B,) integers in [0, classes); decisions are the predicted classes.

    Returns:
        (C, C) int64, rows are labels.
    """
    return np.bincount(labels * classes + decisions, minlength=classes**2).reshape(classes, classes)


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean gap between confidence and accuracy over equal-width bins (Guo et al., ICML 2017).

    ECE = sum_b |B_b| / n  |acc(B_b) - conf(B_b)|, bins ((b-1)/15, b/15] of the largest probability.

    Worked example: two images with confidence 0.8, one of them right: ECE = |0.5 - 0.8| = 0.3.

    Args:
        probabilities: (B, C) float in [0, 1].
        labels: (B,) integers.
    """
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    number = np.clip(np.ceil(confidence * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)
    gap = np.bincount(number, weights=right - confidence, minlength=ECE_BINS)
    return float(np.abs(gap).sum() / len(labels))


def reliability(probabilities: np.ndarray, labels: np.ndarray, bins: int = 10) -> np.ndarray:
    """Return the data of a reliability diagram (Niculescu-Mizil and Caruana, ICML 2005) as sums, so that evaluations can be added.

    Worked example: two images with confidence 0.85, one of them right, in 10 bins: row 8 is (1.7, 1, 2), the others 0.

    Args:
        probabilities: (B, C) float in [0, 1]. labels: (B,) integers.

    Returns:
        (bins, 3) float64: for the images whose confidence is in [b / bins, (b + 1) / bins), the sum of their confidences, the number
        classified correctly, and the number of images.
    """
    confidence = probabilities.max(axis=1).astype(np.float64)
    right = probabilities.argmax(axis=1) == labels
    number = np.clip((confidence * bins).astype(int), 0, bins - 1)
    sums = [np.bincount(number, weights=one, minlength=bins) for one in (confidence, right, np.ones(len(labels)))]
    return np.stack(sums, axis=1)


def unsure_threshold(confidence: np.ndarray, right: np.ndarray) -> dict[str, float | None] | None:
    """Return the confidence threshold below which a classifier's prediction should count as unsure.

    It maximises P(sure | right) - P(sure | wrong) on held-out images (Youden's J; Youden, Cancer 1950), where "sure" means a confidence
    of at least the threshold; the smallest one if several are equally good.

    Worked example: confidences 0.9, 0.8, 0.6, 0.5 that are right, right, wrong, right: at 0.8 the difference is 2/3 - 0, the largest.

    Args:
        confidence: (n,) float in [0, 1], the largest probability. right: (n,) bool.

    Returns:
        threshold; sure: the share of sure images; accuracy_sure; accuracy_unsure, None if all are sure. None if all images are right or
        all are wrong.
    """
    from sklearn.metrics import roc_curve

    right = np.asarray(right, bool)
    if right.all() or not right.any():
        return None
    of_wrong, of_right, thresholds = (one[::-1] for one in roc_curve(right, confidence, drop_intermediate=False))
    threshold = thresholds[np.argmax(of_right - of_wrong)]
    sure = confidence >= threshold
    return {
        "threshold": float(threshold),
        "sure": float(sure.mean()),
        "accuracy_sure": float(right[sure].mean()),
        "accuracy_unsure": float(right[~sure].mean()) if not sure.all() else None,
    }


def wilson(share: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share that was measured on `count` images (Wilson, JASA 1927).

    Worked example: 8 of 10 gives 0.490 to 0.943.
    """
    z = 1.959964
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * (share * (1 - share) / count + z**2 / (4 * count**2)) ** 0.5
    return middle - half, middle + half


def classification(logits: np.ndarray, labels: np.ndarray) -> JSON:
    """Return all scores of one classifier on one set of images.

    Balanced accuracy is the mean recall of the classes that have images; macro F1 leaves out classes that are neither
    labelled nor predicted, as scikit-learn does.

    Args:
        logits: (B, C) float.
        labels: (B,) int64 in [0, C).

    Returns:
        accuracy, balanced_accuracy, macro_f1, ece, log_loss: float in their usual ranges; recall: list of C floats (None
        for a class without images); confusion: C lists of C counts; images: B.
    """
    labels = np.asarray(labels, dtype=np.int64)
    probabilities = softmax(logits)
    table = confusion(labels, probabilities.argmax(axis=1), probabilities.shape[1])
    hits, there, predicted = np.diag(table), table.sum(axis=1), table.sum(axis=0)
    recall = np.where(there > 0, hits / np.maximum(there, 1), np.nan)
    seen = (there + predicted) > 0
    f1 = 2 * hits / np.maximum(there + predicted, 1)
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


def pixel_confusion(labels: np.ndarray, decisions: np.ndarray, classes: int) -> np.ndarray:
    """Return the (C, C) int64 confusion matrix over the pixels whose label is a class.

    Args:
        labels: (H, W) integers; pixels with labels >= `classes` are left out. decisions: (H, W) integers in [0, classes).
    """
    known = labels < classes
    return confusion(labels[known].astype(np.int64), decisions[known].astype(np.int64), classes)


def intersection_over_union(table: np.ndarray) -> np.ndarray:
    """Return the IoU of each class: hits / (labelled + predicted - hits).

    Worked example: table ((3, 1), (0, 2)): 3 / (4 + 3 - 3) = 0.75 and 2 / (2 + 3 - 2) = 0.667.

    Args:
        table: (C, C) counts, rows are labels.

    Returns:
        (C,) float64, NaN for a class that is neither labelled nor predicted.
    """
    labelled, decided, hits = np.moveaxis(pixel_counts(table), -1, 0)
    with np.errstate(invalid="ignore"):  # 0 / 0
        return hits / (labelled + decided - hits)


def pixel_counts(tables: np.ndarray) -> np.ndarray:
    """Return (..., C, 3) from (..., C, C) counts with labels as rows: pixels labelled as a class, predicted as it, and both."""
    both = np.diagonal(tables, axis1=-2, axis2=-1)
    return np.stack([tables.sum(axis=-1), tables.sum(axis=-2), both], axis=-1)


def mean_iou(counts: np.ndarray) -> np.ndarray:
    """Return the mean IoU over the classes that are labelled or predicted, 0 if there are none.

    Args:
        counts: (..., C, 3) of `pixel_counts`, summed or averaged over the images.

    Returns:
        (...) float64 in [0, 1].
    """
    union = counts[..., 0] + counts[..., 1] - counts[..., 2]
    there = union > 0
    iou = np.divide(counts[..., 2], union, out=np.zeros(union.shape), where=there)
    return iou.sum(axis=-1) / np.maximum(there.sum(axis=-1), 1)


def resampled(counts: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return bootstrap means, each over n images drawn from n with replacement (Efron, 1979); same seed and n, same draws.

    Args:
        counts: (n, ...) one entry per image.

    Returns:
        (RESAMPLES, ...) float64.
    """
    random, n = np.random.default_rng(seed), len(counts)
    flat = counts.reshape(n, -1).astype(np.float64)
    means = []
    for _ in range(RESAMPLES // RESAMPLED_AT_ONCE):
        drawn = random.integers(0, n, (RESAMPLED_AT_ONCE, n))
        means.append(np.stack([np.bincount(one, minlength=n) for one in drawn]) @ flat / n)
    return np.concatenate(means).reshape(-1, *counts.shape[1:])


def boundary_f1(labels: np.ndarray, decisions: np.ndarray, classes: int, tolerance: int | None = None) -> float:
    """Return the boundary F1, averaged over classes: how many outline pixels of labels and prediction lie close to each other.

    F1 = 2 P R / (P + R), P the share of predicted outline pixels near a labelled one, R the reverse (Csurka et al., BMVC 2013).
    A class that occurs in only one of the two scores 0. Pixels without a label are left out of both.

    Args:
        labels, decisions: (H, W) integers. tolerance: pixels, along rows and columns; None for 0.75 % of the diagonal.

    Returns:
        float in [0, 1], NaN if no class has an outline.
    """
    from scipy import ndimage

    near = max(1, round(0.0075 * float(np.hypot(*labels.shape)))) if tolerance is None else tolerance
    widened = functools.partial(ndimage.maximum_filter, size=2 * near + 1, mode="constant")
    known, scores = labels < classes, []
    for number in np.union1d(labels[known], decisions[known]):
        true, predicted = (_outline(part == number, known) for part in (labels, decisions))
        if not true.any() and not predicted.any():
            continue
        precision = (predicted & widened(true)).sum() / max(predicted.sum(), 1)
        recall = (true & widened(predicted)).sum() / max(true.sum(), 1)
        scores.append(2 * precision * recall / max(precision + recall, 1e-12))
    return float(np.mean(scores)) if scores else float("nan")


def _outline(inside: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return (H, W) bool: the pixels of a class next to a labelled pixel of another class."""
    from scipy import ndimage

    return np.logical_and(inside & known, ndimage.binary_dilation(known & ~inside))


def segmentation(tables: np.ndarray, outlines: np.ndarray) -> JSON:
    """Return all scores of one model on one set of masks.

    Args:
        tables: (n, C, C) counts of pixels of each image, rows are labels. outlines: (n,) boundary F1 of each, NaN = none.

    Returns:
        miou: mean IoU of the classes that are labelled or predicted, over the pixels of all images; iou: C floats (None for the
        other classes); accuracy: of pixels; balanced_accuracy: mean recall of the labelled classes; boundary_f1: mean over images;
        standard_error: of miou, from the choice of test images only (bootstrap);
        recall: C floats (None for a class without pixels); confusion: C lists of C counts; images: n.
    """
    table = tables.sum(axis=0)
    iou, there, counts = intersection_over_union(table), table.sum(axis=1), pixel_counts(tables)
    recall = np.where(there > 0, np.diag(table) / np.maximum(there, 1), np.nan)
    known = outlines[~np.isnan(outlines)]
    return {
        "images": len(tables),
        "miou": float(mean_iou(counts.sum(axis=0))),
        "iou": [None if np.isnan(one) else float(one) for one in iou],
        "accuracy": float(np.diag(table).sum() / max(1, table.sum())),
        "balanced_accuracy": float(np.nanmean(recall)),
        "boundary_f1": float(known.mean()) if len(known) else 0.0,
        "standard_error": float(mean_iou(resampled(counts)).std()),
        "recall": [None if np.isnan(one) else float(one) for one in recall],
        "confusion": table.tolist(),
    }


def paired_gain(scores: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Return the mean difference of scores (n,), float or bool, on the same images, and its standard error, 0 for a single image."""
    difference = np.asarray(scores, dtype=float) - np.asarray(reference, dtype=float)
    error = difference.std(ddof=1) / len(difference) ** 0.5 if len(difference) > 1 else 0.0
    return float(difference.mean()), float(error)
