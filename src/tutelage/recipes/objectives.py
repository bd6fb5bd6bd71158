"""What a student is taught: each objective is one function from what was told and what the student says to a loss.

oriented            the adapted teacher's probabilities (KL), and its features beside them: the paper's
agnostic            the frozen teacher's features alone, no label in it: the paper's main rival
agnostic-oriented   first half of the steps agnostic, second half oriented (two schedules, one after the other)
pseudo-label        the adapted teacher's most likely class as if it were the label
dual-head           KL on one head, the labels on another; the heads are mixed afterwards (DHO, arXiv 2505.07675)
dino                no teacher: self-distillation between crops; its loop is in self_taught.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from tutelage import losses

LABEL_FREE = ("agnostic", "dino")  # nothing of the labels is in what the student learns
NEEDS_FEATURES = ("agnostic", "agnostic-oriented")
LABELLED_SHARE = 0.25  # of a batch of dual-head: what its second head learns from
QUEUE = 1024  # other images' features in the loss "queue"


@dataclass(frozen=True)
class Told:
    """What is said of one batch.

    soft: (B, C) float probabilities of the teacher at temperature T, or (B, 0). features: (B, d) float, its features on principal
    axes, or (B, 0). Both may have a grid (h, w) behind. labels: (B, C) float one-hot, rows of 0 where no label may be read.
    queue: (K, d) features of others.
    spread: (d,) variances of the features.
    """

    soft: torch.Tensor
    features: torch.Tensor
    labels: torch.Tensor
    queue: torch.Tensor
    spread: torch.Tensor


@dataclass(frozen=True)
class Weights:
    """temperature: of the KL divergence. features: weight of the features' distance beside it. classes: (C,) float or None for 1."""

    temperature: float
    features: float
    classes: torch.Tensor | None = None


def distilled(logits: torch.Tensor, told: Told, weights: Weights) -> torch.Tensor:
    """KL divergence from the told probabilities."""
    told_logits = weights.temperature * torch.log(told.soft.clamp(min=1e-8))
    return losses.distillation(logits, told_logits, weights.temperature, weights.classes)


def oriented(output: Any, told: Told, weights: Weights) -> torch.Tensor:
    """KL from the teacher's probabilities, plus the weighted distance of the features where there are any."""
    logits, projected, _ = output
    loss = distilled(logits, told, weights)
    if projected is not None and told.features.shape[1]:
        loss = loss + weights.features * losses.feature_distance(projected, told.features)
    return loss


def pseudo_label(output: Any, told: Told, weights: Weights) -> torch.Tensor:
    """Cross-entropy with the teacher's most likely class, which `hardened` has put for its probabilities before any mixup."""
    return losses.soft_cross_entropy(output[0], told.soft, weights.classes)


def hardened(soft: torch.Tensor, objective: str) -> torch.Tensor:
    """(B, C) or (B, C, h, w) probabilities as the objective takes them: one-hot for pseudo-label, else as they are."""
    return F.one_hot(soft.argmax(dim=1), soft.shape[1]).movedim(-1, 1).float() if objective == "pseudo-label" else soft


def dual_head(output: Any, told: Told, weights: Weights) -> torch.Tensor:
    """`oriented` on the student's own head, cross-entropy with the labels on the second one."""
    loss = oriented(output, told, weights) + 0 * (output[1].sum() + output[2].sum())  # every process has all gradients
    if told.labels.sum() > 0:
        loss = loss + losses.soft_cross_entropy(output[2], told.labels)
    return loss


AGNOSTIC: dict[str, Callable[[torch.Tensor, Told], torch.Tensor]] = {
    "contrastive": lambda z, told: losses.contrastive(z, told.features),
    "queue": lambda z, told: losses.queue_similarity(z, told.features, told.queue),
    "cosine": lambda z, told: losses.feature_distance(z, told.features),
    "specmatch": lambda z, told: losses.spectral(z, told.features, told.spread),
}


def agnostic(loss: str) -> Callable[[Any, Told, Weights], torch.Tensor]:
    """The distance of the features alone, by a loss of AGNOSTIC."""

    def of(output: Any, told: Told, weights: Weights) -> torch.Tensor:
        logits, projected, _ = output
        return AGNOSTIC[loss](projected, told) + 0 * logits.sum()  # every process's head has a gradient

    return of


def loss_of(objective: str, agnostic_loss: str) -> Callable[[float], Callable[[Any, Told, Weights], torch.Tensor]]:
    """The loss in force at a share in [0, 1) of the way."""
    one = {
        "oriented": oriented,
        "pseudo-label": pseudo_label,
        "dual-head": dual_head,
        "agnostic": agnostic(agnostic_loss),
    }
    if objective == "agnostic-oriented":
        return lambda share: one["agnostic" if share < 0.5 else "oriented"]
    return lambda share: one[objective]
