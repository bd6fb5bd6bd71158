"""Losses and scores of pixels, against naive versions and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score
from torch.nn import functional as F

from tutelage import metrics
from tutelage.distillation import losses
from tutelage.training import cross_entropy

RANDOM = np.random.default_rng(0)


def test_cross_entropy_is_torchs():
    """With pixels of no class and with class weights the loss is torch's cross-entropy with ignore_index."""
    logits = torch.randn(2, 5, 6, 7, generator=torch.Generator().manual_seed(0))
    truth = torch.from_numpy(RANDOM.integers(0, 5, (2, 6, 7)))
    truth[0, :2] = 255
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.5])
    for one in (None, weights):
        ours = cross_entropy.soft_cross_entropy(logits, cross_entropy.one_hot(truth, 5), one)
        torch.testing.assert_close(ours, F.cross_entropy(logits, truth, one, ignore_index=255))
    nothing = cross_entropy.soft_cross_entropy(logits, cross_entropy.one_hot(torch.full_like(truth, 255), 5))
    assert float(nothing) == 0


def test_one_hot():
    """The worked example, and the same as torch where every label is a class."""
    assert cross_entropy.one_hot(torch.tensor([1, 255]), 2).tolist() == [[0, 1], [0, 0]]
    labels = torch.tensor([2, 0, 1])
    assert torch.equal(cross_entropy.one_hot(labels, 3), F.one_hot(labels, 3).float())


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_distillation_is_the_mean_over_pixels(temperature):
    """KL by pixel is the loss of as many single rows."""
    student, teacher = (torch.from_numpy(RANDOM.normal(size=(2, 4, 3, 5))).float() for _ in range(2))
    naive = [
        losses.distillation(student[b, :, y, x][None], teacher[b, :, y, x][None], temperature)
        for b in range(2)
        for y in range(3)
        for x in range(5)
    ]
    torch.testing.assert_close(losses.distillation(student, teacher, temperature), torch.stack(naive).mean())


def test_features_on_a_grid():
    """Cosine and contrastive losses on (B, D, h, w) are those of the places as rows."""
    student, teacher = (torch.from_numpy(RANDOM.normal(size=(2, 8, 3, 4))).float() for _ in range(2))
    flat = [part.permute(0, 2, 3, 1).reshape(-1, 8) for part in (student, teacher)]
    for loss in (losses.feature_distance, losses.contrastive):
        torch.testing.assert_close(loss(student, teacher), loss(*flat))
    many = torch.randn(1, 4, 80, 80, generator=torch.Generator().manual_seed(1))
    flat = losses.rows(many)[::2]
    torch.testing.assert_close(losses.contrastive(many, many), losses.contrastive(flat, flat))


def test_mean_iou():
    """IoU of each class is scikit-learn's; mIoU is over the pixels of all images; the worked example."""
    assert metrics.intersection_over_union(np.array([[3, 1], [0, 2]])) == pytest.approx([0.75, 2 / 3])
    labels, said = (RANDOM.integers(0, 4, (3, 20, 30)) for _ in range(2))
    said = np.where(RANDOM.random(said.shape) < 0.6, labels, said)
    labels[0, :5] = 255
    tables = np.stack([metrics.pixel_confusion(a, b, 5) for a, b in zip(labels, said, strict=True)])
    scores = metrics.segmentation(tables, np.array([0.5, np.nan, 0.7]))
    known = labels < 5
    theirs = jaccard_score(labels[known], said[known], average=None)
    assert scores["iou"][:4] == pytest.approx(theirs.tolist())
    assert scores["iou"][4] is None  # neither labelled nor decided
    assert scores["miou"] == pytest.approx(theirs.mean())
    assert scores["accuracy"] == pytest.approx((labels == said)[known].mean())
    assert scores["boundary_f1"] == pytest.approx(0.6)
    first = jaccard_score(labels[0][known[0]], said[0][known[0]], average="macro")
    assert metrics.mean_iou(metrics.pixel_counts(tables))[0] == pytest.approx(first)


def naive_boundary_f1(labels: np.ndarray, said: np.ndarray, classes: int, near: int) -> float:
    height, width = labels.shape

    def outline(mask: np.ndarray, number: int) -> list[tuple[int, int]]:
        found = []
        for y in range(height):
            for x in range(width):
                if mask[y, x] != number or labels[y, x] >= classes:
                    continue
                beside = [(y + dy, x + dx) for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0))]
                inside = [(a, b) for a, b in beside if 0 <= a < height and 0 <= b < width and labels[a, b] < classes]
                if any(mask[a, b] != number for a, b in inside):
                    found.append((y, x))
        return found

    scores = []
    for number in range(classes):
        true, decided = outline(labels, number), outline(said, number)
        if not true and not decided:
            continue

        def close(one, others):
            return any(abs(one[0] - y) <= near and abs(one[1] - x) <= near for y, x in others)

        precision = np.mean([close(p, true) for p in decided]) if decided else 0
        recall = np.mean([close(p, decided) for p in true]) if true else 0
        scores.append(2 * precision * recall / max(precision + recall, 1e-12))
    return float(np.mean(scores))


@pytest.mark.parametrize("near", [1, 3])
def test_boundary_f1_against_loops(near):
    """Outlines and their nearness are those of plain loops over pixels, with pixels of no class left out."""
    y, x = np.mgrid[:24, :30]
    labels = np.where((y - 10) ** 2 + (x - 9) ** 2 < 30, 1, np.where(x > 20, 2, 0))
    said = np.where((y - 12) ** 2 + (x - 9) ** 2 < 42, 1, np.where(x > 17, 2, 0))
    said[3, 3] = 3
    labels[:2, :8] = 255
    assert metrics.boundary_f1(labels, said, 4, near) == pytest.approx(naive_boundary_f1(labels, said, 4, near))
    assert metrics.boundary_f1(labels, np.where(labels > 3, 0, labels), 4, near) == 1
