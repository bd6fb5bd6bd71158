"""A head on the teacher's pooled features that is fitted on the labels and on the pool at once, by mutual information.

With few labels a boundary that leaves them well apart may run through a crowd of unlabelled images. The head's loss is cross-entropy on
the labels and, on the pool, the divergence of the predicted from the expected class shares plus a tenth of the mean entropy: each image
clearly of one class, all classes present (TIM, Boudiaf et al., NeurIPS 2020; there all classes are expected to be equally frequent).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tutelage.files import atomic_write
from tutelage.metrics import log_softmax
from tutelage.models.linear_probe import NEVER, LinearHead, Scale

POOL = 4000  # images of the pool that a fit looks at; with 9,500 of Fashion-MNIST's the scores were the same
STEPS, RATE = 100, 1e-2  # of Adam, on all images at once; 300 steps were no better on four sets
SHARPNESS = 15.0  # logits are SHARPNESS times a cosine
ENTROPY = 0.1  # weight of the mean entropy beside the divergence of the shares


@dataclass(frozen=True)
class CosineHead(LinearHead):
    """logits = unit((features - mean) / std) @ weight.T + bias, with unit(x) = x / |x|; mean, std (D,) float32."""

    mean: np.ndarray
    std: np.ndarray

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """(B, D) float32 features -> (B, C) float32 logits."""
        return super().__call__(_units((features - self.mean) / self.std))

    def calibrated(self, temperature: float) -> CosineHead:
        """Return the head with its logits divided by a temperature."""
        divided = super().calibrated(temperature)
        return CosineHead(divided.weight, divided.bias, self.mean, self.std)

    def save(self, folder: Path) -> None:
        """Write the head to folder/head.safetensors."""
        with atomic_write(folder / "head.safetensors") as path:
            save_file({"weight": self.weight, "bias": self.bias, "mean": self.mean, "std": self.std}, path)


def expected_shares(log_probabilities: np.ndarray) -> np.ndarray:
    """Return the shares of the classes in the pool that the head is drawn to: half way, in logarithms, from equal shares to predicted ones.

    Predicted shares alone lose most of the gain on balanced pools (WHU-RS19: 1.0 of 2.4 points), equal ones cost 2.3 points on drawings
    whose classes are of very different sizes.

    Worked example: predicted shares (0.8, 0.2) become (2/3, 1/3).

    Args:
        log_probabilities: (n, C) float32 of the pool, of a calibrated head.

    Returns:
        (C,) float32, all above 0, which sum to 1.
    """
    root = np.sqrt(np.exp(log_probabilities).mean(axis=0).clip(1e-6))
    return (root / root.sum()).astype(np.float32)


def fit_transductive(
    features: np.ndarray,
    labels: np.ndarray,
    pool: np.ndarray,
    shares: np.ndarray,
    scale: Scale,
    class_weight: str = "none",
) -> CosineHead:
    """Fit the head on features of labelled images and of the pool, from the labelled images' class means on.

    The same bits for the same input, whatever the number of threads.

    Args:
        features: (B, D) float32, raw. labels: (B,) int64 in [0, C). pool: (n, D) float32, raw.
        shares: (C,) float32, the shares of the classes expected in the pool; a class without a label gets the constant logit NEVER.
        scale: used to standardise. class_weight: "none" or "balanced", of the labels.
    """
    from threadpoolctl import threadpool_limits

    present, index = np.unique(labels, return_inverse=True)
    truth = np.eye(len(present), dtype=np.float32)[index]
    each = truth.sum(axis=0)
    of_label = np.full(len(labels), 1 / len(labels)) if class_weight == "none" else (1 / (len(present) * each))[index]
    expected = np.log(shares[present] / shares[present].sum())
    some, every = (_units((one - scale[0]) / scale[1]).astype(np.float32) for one in (features, pool))
    with threadpool_limits(1):
        weight = _units(truth.T @ some / each[:, None])
        first, second = np.zeros_like(weight), np.zeros_like(weight)
        for step in range(1, STEPS + 1):
            length = np.linalg.norm(weight, axis=1, keepdims=True).clip(1e-6)
            unit = weight / length
            on_labels = (np.exp(log_softmax(SHARPNESS * some @ unit.T)) - truth) * of_label[:, None]
            on_pool = _pool_gradient(log_softmax(SHARPNESS * every @ unit.T), expected)
            slope = SHARPNESS * (on_labels.T @ some + on_pool.T @ every)
            slope = ((slope - (slope * unit).sum(axis=1, keepdims=True) * unit) / length).astype(np.float32)
            first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2  # Adam
            weight -= RATE * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    whole = np.zeros((len(shares), features.shape[1]), np.float32)
    bias = np.full(len(shares), NEVER, np.float32)
    whole[present], bias[present] = SHARPNESS * _units(weight), 0
    return CosineHead(whole, bias, *(np.asarray(one, np.float32) for one in scale))


def _pool_gradient(log_probabilities: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Return the gradient, by the logits (n, C), of sum_c m_c (ln m_c - expected_c) + ENTROPY * mean entropy, m the mean probabilities."""
    probabilities = np.exp(log_probabilities)
    mean = np.log(probabilities.mean(axis=0).clip(1e-8))
    by_probability = (mean - expected - ENTROPY * log_probabilities) / len(probabilities)
    return probabilities * (by_probability - (probabilities * by_probability).sum(axis=1, keepdims=True))


def _units(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-6)
