"""Objectives of the distillation: each is one function from a batch's targets and the student's outputs to a loss.

oriented            the committee's or the adapted teacher's probabilities (KL), task-oriented: the paper's
agnostic            the frozen teacher's features, task-agnostic: the paper's main rival
pseudo-label        the most likely class as if it were the label
dino                no teacher: self-distillation between crops; its loop is in self_taught.py

All but `dino` may also read labels: rows of labelled images then ask for their true class (cross-entropy).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tutelage.training import losses

QUEUE = 1024  # other images' features in the loss "queue"

Output = tuple[torch.Tensor, torch.Tensor | None]  # logits and projected features of the student


@dataclass(frozen=True)
class Batch:
    """What is known of one batch.

    soft: (B, C) float target probabilities, rows of 0 for labelled images, or (B, 0). labels: (B, C) float one-hot, rows of 0
    for the others, or (B, 0) where no labels are read. features: (B, d) float, the teacher's on principal axes, or (B, 0). These may have a
    grid (h, w) behind. queue: (K, d) features of other images.
    temperature: of the soft targets. weights: (C,) float of the classes, or None for 1. feature_weight: of the features'
    distance beside the targets.
    """

    soft: torch.Tensor
    labels: torch.Tensor
    features: torch.Tensor
    queue: torch.Tensor
    temperature: float = 1.0
    weights: torch.Tensor | None = None
    feature_weight: float = 0.0


def oriented(output: Output, batch: Batch) -> torch.Tensor:
    """KL divergence from the targets, soft ones and the true class of labelled images, plus the weighted distance of features."""
    targets = batch.soft + batch.labels if batch.labels.shape[1] else batch.soft
    loss = losses.divergence(output[0], targets, batch.temperature, batch.weights)
    if output[1] is None or not batch.features.shape[1]:
        return loss
    return loss + batch.feature_weight * losses.feature_distance(output[1], batch.features)


AGNOSTIC: dict[str, Callable[[torch.Tensor, Batch], torch.Tensor]] = {
    "contrastive": lambda z, batch: losses.contrastive(z, batch.features),
    "queue": lambda z, batch: losses.queue_similarity(z, batch.features, batch.queue),
    "cosine": lambda z, batch: losses.feature_distance(z, batch.features),
}


def agnostic(loss: str) -> Callable[[Output, Batch], torch.Tensor]:
    """The distance of the features by a loss of AGNOSTIC, mixed with the labels' cross-entropy by their share of the batch."""

    def of(output: Output, batch: Batch) -> torch.Tensor:
        logits, projected = output
        assert projected is not None
        distance = AGNOSTIC[loss](projected, batch)
        if not batch.labels.shape[1]:
            return distance + 0 * logits.sum()  # every process's head has a gradient
        share = float((batch.labels.flatten(1).sum(dim=1) > 0).float().mean())
        return (1 - share) * distance + share * losses.soft_cross_entropy(logits, batch.labels, batch.weights)

    return of


def objective_loss(objective: str, agnostic_loss: str) -> Callable[[Output, Batch], torch.Tensor]:
    """The loss of an objective; pseudo-labels are targets that are one-hot already."""
    return agnostic(agnostic_loss) if objective == "agnostic" else oriented
