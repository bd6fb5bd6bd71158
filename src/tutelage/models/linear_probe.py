"""Task heads on a teacher's pooled features: the probe, and the choice of its strength by cross-validation.

The probe is multinomial logistic regression (scikit-learn, L2, L-BFGS) on standardised features. It is stored as one
matrix and one bias for the raw features, so that logits of cached features are a single matrix product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tutelage.files import atomic_write
from tutelage.metrics import softmax

# Inverse strength of the L2 penalty on standardised features, like scikit-learn's C. With 10 labels per class and 1,280
# features the best is near 1e-3; ten times more or less costs about one point of accuracy.
STRENGTHS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 1e-1)
UNVALIDATED_STRENGTH, UNVALIDATED_TEMPERATURE = (
    1e-3,
    0.25,
)  # if no label can be held out: chosen with 10 labels per class
Scale = tuple[np.ndarray, np.ndarray]  # mean (D,) and standard deviation (D,) of the features
NEVER = -30.0  # logit of a class without a labelled image


@dataclass(frozen=True)
class LinearHead:
    """logits = features @ weight.T + bias; weight (C, D) float32, bias (C,) float32."""

    weight: np.ndarray
    bias: np.ndarray

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """(B, D) float32 features -> (B, C) float32 logits."""
        return features @ self.weight.T + self.bias

    def calibrated(self, temperature: float) -> LinearHead:
        """Return the head with its logits divided by a temperature."""
        return LinearHead(self.weight / np.float32(temperature), self.bias / np.float32(temperature))

    def save(self, folder: Path) -> None:
        """Write the head to folder/head.safetensors."""
        with atomic_write(folder / "head.safetensors") as path:
            save_file({"weight": self.weight, "bias": self.bias}, path)


def fit_probe(
    features: np.ndarray, labels: np.ndarray, classes: int, strength: float, scale: Scale, class_weight: str = "none"
) -> LinearHead:
    """Fit the probe on features of labelled images.

    Args:
        features: (B, D) float32, raw.
        labels: (B,) int64 in [0, classes).
        classes: C; a class without an image gets the constant logit NEVER.
        strength: inverse strength of the penalty, > 0.
        scale: used to standardise; of the transfer set rather than of the few labelled images.
        class_weight: "none" or "balanced".
    """
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    mean, std = scale
    full_weight = np.zeros((classes, features.shape[1]))
    full_bias = np.full(classes, NEVER)
    present = np.unique(labels)
    if len(present) == 1:  # a fold may leave a single class, which scikit-learn refuses
        full_bias[present] = 0
        return LinearHead(full_weight.astype(np.float32), full_bias.astype(np.float32))
    model = LogisticRegression(C=strength, max_iter=2000, class_weight=None if class_weight == "none" else "balanced")
    with threadpool_limits(1):  # next to a busy process, two BLAS threads (busy-waiting) took 100 times as long
        model.fit((features - mean) / std, labels)
    weight, bias = model.coef_, model.intercept_
    if len(model.classes_) == 2:  # scikit-learn stores one row for two classes
        weight, bias = np.concatenate([-weight / 2, weight / 2]), np.concatenate([-bias / 2, bias / 2])
    full_weight[model.classes_] = weight / std
    full_bias[model.classes_] = bias - (weight / std) @ mean
    return LinearHead(full_weight.astype(np.float32), full_bias.astype(np.float32))


def scale_of(features: np.ndarray) -> Scale:
    """Return mean and standard deviation of each feature: two (D,) float32, the second never 0."""
    std = features.std(axis=0)
    return features.mean(axis=0), np.where(std > 1e-6, std, 1.0).astype(np.float32)


def cross_validate(
    fit: Callable[[np.ndarray, np.ndarray], Callable[[np.ndarray], np.ndarray]],
    features: np.ndarray,
    labels: np.ndarray,
    folds: np.ndarray,
    classes: int,
) -> np.ndarray:
    """Return the logits of every labelled image from a head fitted without it.

    Args:
        fit: features (n, D) and their labels -> head.
        features: (V, B, D) float32: V views of each image, the clean one first. All views are fitted, the clean one is predicted.
        labels: (B,) int64; of masks, with one view, (B, h, w). folds: (B,) int64 fold of each image. classes: C.

    Returns:
        (B, C) float32 out-of-fold logits; of masks (B, C, h, w).
    """
    out = np.zeros((len(labels), classes, *labels.shape[1:]), dtype=np.float32)
    for fold in np.unique(folds):
        rest, held = folds != fold, folds == fold
        head = (
            fit(*stacked(features[:, rest], labels[rest])) if labels.ndim == 1 else fit(features[0][rest], labels[rest])
        )
        out[held] = head(features[0][held])
    return out


def best_probe(features: np.ndarray, labels: np.ndarray, folds: np.ndarray, classes: int, scale: Scale) -> LinearHead:
    """Fit a probe on all labelled images with the strength that has the smallest cross-validated log loss.

    Args:
        features: (B, D) float32. labels: (B,) int64. folds: (B,) int64 fold of each image.
    """
    strength = best_strength(features[None], labels, folds, classes, scale)
    return fit_probe(features, labels, classes, strength, scale)


def best_strength(features: np.ndarray, labels: np.ndarray, folds: np.ndarray, classes: int, scale: Scale) -> float:
    """Return the strength with the smallest cross-validated log loss. Arguments as for `cross_validate`."""
    fair = judgeable(labels, folds)
    if not fair.any():
        return UNVALIDATED_STRENGTH

    def loss(strength: float) -> float:
        fit = partial(fit_probe, classes=classes, strength=strength, scale=scale)
        return float(log_loss(cross_validate(fit, features, labels, folds, classes)[fair], labels[fair]).mean())

    return min(STRENGTHS, key=loss)


def judgeable(labels: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """Return for each label, as bool, whether it also occurs outside its fold; if not, its prediction cannot be judged.

    Args:
        labels: (B,) int64, or masks (B, h, w) int64. folds: (B,) int64.
    """
    fair = np.zeros(labels.shape, bool)
    for fold in np.unique(folds):
        fair[folds == fold] = np.isin(labels[folds == fold], labels[folds != fold])
    return fair


def stacked(features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reshape (V, B, D) features to (V B, D), and repeat (B,) labels to (V B,)."""
    return features.reshape(-1, features.shape[-1]), np.tile(labels, len(features))


def log_loss(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Negative log-likelihood of each image: (B,) float64, at least 0."""
    return -np.log(np.maximum(softmax(logits)[np.arange(len(labels)), labels], 1e-12))


def best_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the T, from 1/16 to 8, for which softmax(logits / T) has the smallest log loss (Guo et al., ICML 2017)."""
    candidates = 2.0 ** np.arange(-4, 3.01, 0.25)
    return float(min(candidates, key=lambda t: log_loss(logits / t, labels).mean()))
