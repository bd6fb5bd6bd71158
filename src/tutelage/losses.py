"""Losses: pure functions of tensors, each with its formula, its source and one worked example under test."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def distillation(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Kullback-Leibler divergence from the teacher's to the student's softened probabilities, times T squared.

    L = T^2 / B  sum_i sum_c p_ic (log p_ic - log q_ic),  p = softmax(teacher / T), q = softmax(student / T)
    (Hinton et al., arXiv 1503.02531: T^2 keeps the gradient's size when T changes.)

    Worked example: teacher logits (0, ln 3), student logits (0, 0), T = 1: p = (1/4, 3/4), q = (1/2, 1/2),
    L = 1/4 ln(1/2) + 3/4 ln(3/2) = 0.1308.

    Args:
        student: (B, C) float logits.
        teacher: (B, C) float logits, or log probabilities (the same up to a constant per row).
        temperature: T > 0.

    Returns:
        scalar float32, at least 0.
    """
    target = F.log_softmax(teacher.float() / temperature, dim=1)
    output = F.log_softmax(student.float() / temperature, dim=1)
    return F.kl_div(output, target, reduction="batchmean", log_target=True) * temperature**2


def feature_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """One minus the cosine between the student's projected features and the teacher's, mean over the batch.

    L = 1 - 1/B sum_i  z_i . t_i / (|z_i| |t_i|)

    Worked example: z = (1, 0), t = (1, 1): L = 1 - 1/sqrt(2) = 0.2929.

    Args:
        student, teacher: (B, D) float.

    Returns:
        scalar float32 in [0, 2].
    """
    return 1 - F.cosine_similarity(student.float(), teacher.float(), dim=1).mean()


def soft_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Cross-entropy with probabilities as targets, classes weighted.

    L = - sum_i sum_c w_c t_ic log q_ic / sum_i sum_c w_c t_ic,  q = softmax(logits)

    Worked example: logits (0, 0), target (1, 0): L = ln 2 = 0.6931, whatever the weights.

    Args:
        logits: (B, C) float.
        targets: (B, C) float, rows sum to 1 (one-hot, or mixed by mixup).
        weights: (C,) float > 0, or None for 1.

    Returns:
        scalar float32.
    """
    weighted = targets if weights is None else targets * weights
    return -(weighted * F.log_softmax(logits.float(), dim=1)).sum() / weighted.sum()


def class_weights(labels: torch.Tensor, classes: int, how: str) -> torch.Tensor | None:
    """Weights of the classes: None, or n / (C n_c) as scikit-learn's "balanced".

    Args:
        labels: (B,) int64 in [0, classes).
        classes: C.
        how: "none" or "balanced".

    Returns:
        (C,) float32, or None for "none".
    """
    if how == "none":
        return None
    counts = torch.bincount(labels, minlength=classes).clamp(min=1)
    return len(labels) / (classes * counts.float())
