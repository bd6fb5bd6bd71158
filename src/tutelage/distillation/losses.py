"""Losses of distillation: pure functions of tensors, each with its formula, its source and a worked example that a test checks."""

from __future__ import annotations

import torch
from torch.nn import functional as F

TAU_T, TAU_S = 0.04, 0.1  # temperatures of DINO: of the averaged student, and of the student
MOST_ROWS = 4096  # largest number of rows compared with each other: 64 MiB of similarities


def distillation(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Kullback-Leibler divergence from the teacher's to the student's softened probabilities, times T squared.

    L = T^2 sum_i a_i sum_c p_ic (log p_ic - log q_ic) / sum_i a_i,  p = softmax(teacher / T), q = softmax(student / T),
    a_i = sum_c p_ic w_c, or 1 without weights
    (Hinton et al., arXiv 1503.02531: T^2 keeps the gradient's size when T changes. The weights are ours: rows for which the teacher
    predicts rare classes count more, while their targets stay the teacher's probabilities.)

    Worked example: teacher logits (0, ln 3), student logits (0, 0), T = 1: p = (1/4, 3/4), q = (1/2, 1/2),
    L = 1/4 ln(1/2) + 3/4 ln(3/2) = 0.1308; for a single row the weights change nothing.

    Args:
        student: (B, C) float logits, or (B, C, h, w), then the mean is over pixels.
        teacher: float logits of the same shape, or log probabilities (the same up to a constant per row).
        temperature: T > 0. weights: (C,) float > 0.

    Returns:
        scalar float32, at least 0.
    """
    return divergence(student, F.softmax(teacher.float() / temperature, dim=1), temperature, weights)


def divergence(
    student: torch.Tensor, target: torch.Tensor, temperature: float = 1.0, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """`distillation` with target probabilities instead of teacher logits; for a one-hot row at T = 1, the cross-entropy of its class.

    Worked example: target (1/4, 3/4), student logits (0, 0), T = 1: L = 0.1308; target (0, 1): L = ln 2 = 0.6931.

    Args:
        student: (B, C) float logits, or (B, C, h, w). target: probabilities of the same shape, softened with the same T; a row, or a
            pixel, that is all 0 is ignored.
        temperature: T > 0. weights: (C,) float > 0.

    Returns:
        scalar float32, at least 0; 0 if every row is ignored.
    """
    p, log_q = rows(target).float(), F.log_softmax(rows(student).float() / temperature, dim=1)
    each = (torch.xlogy(p, p) - p * log_q).sum(dim=1)
    counts = p.sum(dim=1) if weights is None else p @ weights
    return (counts * each).sum() / counts.sum().clamp(min=1e-8) * temperature**2


def feature_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """One minus the cosine between the student's projected features and the teacher's, mean over the batch.

    L = 1 - 1/B sum_i  z_i . t_i / (norm(z_i) norm(t_i))

    Worked example: z = (1, 0), t = (1, 1): L = 1 - 1/sqrt(2) = 0.2929.

    Args:
        student, teacher: (B, D) float, or (B, D, h, w), then the mean is over pixels.

    Returns:
        scalar float32 in [0, 2].
    """
    return 1 - F.cosine_similarity(student.float(), teacher.float(), dim=1).mean()


def rows(values: torch.Tensor) -> torch.Tensor:
    """Return (B, C) unchanged, and (B, C, h, w) as (B h w, C): one row per pixel."""
    return values if values.ndim == 2 else values.movedim(1, -1).reshape(-1, values.shape[1])


def contrastive(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 0.07) -> torch.Tensor:
    """Contrastive loss: each student feature should be closest to the teacher's feature of the same view, among those of the batch.

    L = -1/B sum_i log( exp(z_i . t_i / tau) / sum_j exp(z_i . t_j / tau) ),  z and t at unit length
    (InfoNCE, van den Oord et al., arXiv 1807.03748; one direction, from student to teacher.)

    Worked example: z = t = ((1, 0), (0, 1)), tau = 1: L = log(1 + e^-1) = 0.3133.

    Args:
        student, teacher: (B, D) float, or (B, D, h, w), then each pixel is a row; at most MOST_ROWS rows are used, evenly spaced.
        temperature: tau > 0.

    Returns:
        scalar float32, at least 0.
    """
    z, t = (rows(part) for part in (student, teacher))
    step = -(-len(z) // MOST_ROWS)
    z, t = (F.normalize(part[::step].float(), dim=1) for part in (z, t))
    return F.cross_entropy(z @ t.T / temperature, torch.arange(len(z), device=z.device))


def queue_similarity(
    student: torch.Tensor, teacher: torch.Tensor, queue: torch.Tensor, temperature: float = 0.07
) -> torch.Tensor:
    """Relational loss: the student's similarities to the teacher features of other images should match the teacher's.

    L = 1/B sum_i KL(p_i || q_i),  p_i = softmax_k(t_i . u_k / tau),  q_i = softmax_k(z_i . u_k / tau), all at unit length
    (Fang et al., SEED, ICLR 2021.)

    Worked example: queue ((1, 0), (0, 1)), t = (1, 0), z = (0, 1), tau = 1: p = (0.7311, 0.2689), q the other way
    round, L = 0.4621.

    Args:
        student, teacher: (B, D) float. queue: (K, D) float, teacher features of other images. temperature: tau > 0.

    Returns:
        scalar float32, at least 0.
    """
    z, t, u = (F.normalize(part.float(), dim=1) for part in (student, teacher, queue))
    return distillation(z @ u.T / temperature, t @ u.T / temperature, 1.0)


def self_distillation(student: list[torch.Tensor], teacher: list[torch.Tensor], centre: torch.Tensor) -> torch.Tensor:
    """DINO: the student's output on one crop should match the averaged student's output on another crop of the same image.

    L = mean over pairs (g, v), v another crop than g, of  - 1/B sum_i sum_k p_ik log q_ik,
    p = softmax((teacher_g - centre) / tau_t), q = softmax(student_v / tau_s), tau_t = 0.04, tau_s = 0.1  (Caron et al., ICCV 2021.)

    Worked example: two crops, all outputs (0, 0), centre 0: L = ln 2 = 0.6931.

    Args:
        student: V tensors (B, K) float, the global crops first. teacher: G of them for the global crops, no gradient.
        centre: (K,) or (1, K) float, running mean of the teacher's outputs.

    Returns:
        scalar float32, at least 0.
    """
    targets = [F.softmax((one.float() - centre) / TAU_T, dim=1) for one in teacher]
    outputs = [F.log_softmax(one.float() / TAU_S, dim=1) for one in student]
    pairs = [-(p * q).sum(1).mean() for g, p in enumerate(targets) for v, q in enumerate(outputs) if v != g]
    return torch.stack(pairs).mean()
