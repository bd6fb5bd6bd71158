"""Cross-entropy with soft targets and weighted classes, of whole images and of pixels."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def soft_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Cross-entropy with probabilities as targets and weighted classes.

    L = - sum_i sum_c w_c t_ic log q_ic / sum_i sum_c w_c t_ic,  q = softmax(logits)

    Worked example: logits (0, 0), target (1, 0): L = ln 2 = 0.6931, whatever the weights.

    Args:
        logits: (B, C) float, or (B, C, h, w).
        targets: (B, C) float, rows sum to 1, or (B, C, h, w); a row or pixel without a class is all 0
            and is ignored.
        weights: (C,) float > 0, or None for 1.

    Returns:
        scalar float32; 0 if no row or pixel has a class.
    """
    weighted = targets if weights is None else targets * weights.reshape(-1, *[1] * (targets.ndim - 2))
    return -(weighted * F.log_softmax(logits.float(), dim=1)).sum() / weighted.sum().clamp(min=1e-8)


def one_hot(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Return class numbers as one-hot probabilities; a number that is not a class gives all 0.

    one_hot([1, 255], 2) == [[0, 1], [0, 0]]

    Args:
        labels: (B,) or (B, H, W) int64.

    Returns:
        (B, C) or (B, C, H, W) float32.
    """
    known = labels < classes
    return (F.one_hot(labels * known, classes) * known[..., None]).movedim(-1, 1).float()


def class_weights(labels: torch.Tensor, classes: int, how: str) -> torch.Tensor | None:
    """Return the class weights: None, or n / (C n_c) like scikit-learn's "balanced".

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
