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

import torch

from tutelage.training import losses

QUEUE = 1024  # how many other images' features the loss "queue" compares with

Output = tuple[torch.Tensor, torch.Tensor | None]  # logits and projected features of the student


@dataclass(frozen=True)
class Batch:
    """The targets of one batch.

    soft: (B, C) float target probabilities, rows of 0 for labelled images, or (B, 0). labels: (B, C) float one-hot, rows of 0
    for the other images, or (B, 0) if no labels are used. features: (B, d) float, the teacher's on principal axes, or (B, 0). All three
    may be on a grid: (B, C, h, w). queue: (K, d) features of other images.
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
    targets = batch.soft + batch.labels if batch.labels.shape[1] else batch.soft
    loss = losses.divergence(output[0], targets, batch.temperature, batch.weights)
    if output[1] is None or not batch.features.shape[1]:
        return loss
    return loss + batch.feature_weight * losses.feature_distance(output[1], batch.features)


TASK_AGNOSTIC: dict[str, Callable[[torch.Tensor, Batch], torch.Tensor]] = {
    "contrastive": lambda z, batch: losses.contrastive(z, batch.features),
    "queue": lambda z, batch: losses.queue_similarity(z, batch.features, batch.queue),
    "cosine": lambda z, batch: losses.feature_distance(z, batch.features),
}


def task_agnostic(loss: str) -> Callable[[Output, Batch], torch.Tensor]:
    """A loss of TASK_AGNOSTIC on the features, mixed with cross-entropy on the labels in proportion to the labelled share of the batch."""

    def of(output: Output, batch: Batch) -> torch.Tensor:
        logits, projected = output
        assert projected is not None
        distance = TASK_AGNOSTIC[loss](projected, batch)
        if not batch.labels.shape[1]:
            return distance + 0 * logits.sum()  # so that the head gets a gradient in every process
        share = float((batch.labels.flatten(1).sum(dim=1) > 0).float().mean())
        return (1 - share) * distance + share * losses.soft_cross_entropy(logits, batch.labels, batch.weights)

    return of


def objective_loss(objective: str, task_agnostic_loss: str) -> Callable[[Output, Batch], torch.Tensor]:
    """Return the loss function of an objective; for "pseudo-label", the targets are made one-hot beforehand."""
    return task_agnostic(task_agnostic_loss) if objective == "task-agnostic" else task_oriented
