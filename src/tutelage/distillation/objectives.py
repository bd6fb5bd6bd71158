"""Distillation objectives: functions that compute the loss from the student's outputs and a batch's targets.

task-oriented       the paper's method: match the probabilities of the committee or the adapted teacher (KL)
task-agnostic       the method that the paper mainly compares with: match the frozen teacher's features
pseudo-label        train on the targets' most likely class as if it were the label
dino                no teacher: self-distillation between crops; its loop is in self_distillation.py

All but `dino` may also use labels: labelled images are then trained on their true class (cross-entropy).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional as F

from tutelage.distillation import losses
from tutelage.training import cross_entropy

QUEUE = 1024  # how many other images' features the loss "queue" compares with

Output = tuple[torch.Tensor, torch.Tensor | None]  # logits and projected features of the student


@dataclass(frozen=True)
class Batch:
    """The targets of one batch.

    soft: (B - L, C) float target probabilities of all but the first L images, or (B - L, 0). labels: (L, C) float one-hot, of the first.
    features: (B, d) float, the teacher's on principal axes, or (B, 0). All may be on a grid, (.., C, h, w), and labels on a finer one
    than soft. queue: (K, d) features of other images.
    temperature: of the soft targets. weights: (C,) float class weights, or None for 1. feature_weight: of the feature
    distance, which is added to the loss on the targets.
    """

    soft: torch.Tensor
    labels: torch.Tensor
    features: torch.Tensor
    queue: torch.Tensor
    temperature: float = 1.0
    weights: torch.Tensor | None = None
    feature_weight: float = 0.0


def task_oriented(output: Output, batch: Batch) -> torch.Tensor:
    """KL divergence from the targets (soft, or the true class for labelled images) plus the weighted feature distance."""
    loss = _divergence(output[0], batch)
    if output[1] is None or not batch.features.shape[1]:
        return loss
    return loss + batch.feature_weight * losses.feature_distance(output[1], batch.features)


def _of_labelled(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return the logits of the labelled images, as large as their masks."""
    known = logits[: len(batch.labels)]
    return known if known.ndim == 2 else F.interpolate(known, batch.labels.shape[2:], mode="bilinear")


def _divergence(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """KL divergence from the targets of all images; at the true masks' own resolution, which is finer than that of soft targets."""
    count = len(batch.labels)
    if logits.ndim == 2 or not count:
        targets = torch.cat([batch.labels, batch.soft]) if count else batch.soft
        return losses.divergence(logits, targets, batch.temperature, batch.weights)
    on_labels = losses.divergence(_of_labelled(logits, batch), batch.labels, batch.temperature, batch.weights)
    on_targets = losses.divergence(logits[count:], batch.soft, batch.temperature, batch.weights)
    return (count * on_labels + len(batch.soft) * on_targets) / len(logits)


TASK_AGNOSTIC: dict[str, Callable[[torch.Tensor, Batch], torch.Tensor]] = {
    "contrastive": lambda z, batch: losses.contrastive(z, batch.features),
    "queue": lambda z, batch: losses.queue_similarity(z, batch.features, batch.queue),
    "cosine": lambda z, batch: losses.feature_distance(z, batch.features),
}


def task_agnostic(output: Output, batch: Batch, loss: str) -> torch.Tensor:
    """A loss of TASK_AGNOSTIC on the features, mixed with cross-entropy on the labels in proportion to the labelled share of the batch."""
    logits, projected = output
    assert projected is not None
    distance = TASK_AGNOSTIC[loss](projected, batch)
    count = len(batch.labels)
    if not count:
        return distance + 0 * logits.sum()  # so that the head gets a gradient in every process
    share, known = count / len(logits), _of_labelled(logits, batch)
    return (1 - share) * distance + share * cross_entropy.soft_cross_entropy(known, batch.labels, batch.weights)


def objective_loss(objective: str, task_agnostic_loss: str) -> Callable[[Output, Batch], torch.Tensor]:
    """Return the loss function of an objective; for "pseudo-label", the targets are made one-hot beforehand."""
    return partial(task_agnostic, loss=task_agnostic_loss) if objective == "task-agnostic" else task_oriented
