"""The mixture of adapted teacher and labels-only students: weight, temperature, and class biases, from held-out labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tutelage.errors import TutelageError
from tutelage.json_object import JSON
from tutelage.metrics import confusion, intersection_over_union, log_softmax, paired_gain
from tutelage.models.linear_probe import best_temperature, log_loss
from tutelage.results import CommitteeResult

WEIGHTS = np.linspace(0, 1, 11)  # of the students in the mixture, all tried
BIAS = 3.0  # largest bias of a class, in nats


@dataclass(frozen=True)
class Mixture:
    """How the committee's members are mixed: p ~ (teacher^(1 - weight) students^weight)^(1 / temperature) e^bias.

    weight: of the students, in [0, 1]. temperature, bias of each class (none: 0): calibrated on held-out labels.
    """

    weight: float = 0.0
    temperature: float = 1.0
    bias: tuple[float, ...] = ()

    @classmethod
    def of(cls, members: CommitteeResult, committee: str) -> Mixture:
        """Return the mixture described by a committee's result. committee: "auto", or "only" for the students without the teacher.

        Raises:
            TutelageError: committee is "only", and there are no students.
        """
        if committee != "only":
            return cls(members.weight, members.temperature, tuple(members.bias))
        if not members.folds:
            raise TutelageError(
                "--committee only needs a class with two labels or more: no class has labels to hold out, so there is no committee",
                "label more images, or use --committee auto",
            )
        return cls(1.0, members.students_temperature, tuple(members.students_bias))

    def __call__(self, teacher: np.ndarray | None, students: np.ndarray | None) -> np.ndarray:
        """Mix log probabilities, (B, C) or (B, C, h, w) float32, of both. One of them may be None: the other counts alone."""
        if teacher is None or students is None:
            mixed = np.asarray(students if teacher is None else teacher)
        else:
            mixed = (1 - self.weight) * teacher + self.weight * students
        if not self.bias:
            return log_softmax(mixed * np.float32(1 / self.temperature))
        bias = np.array(self.bias, np.float32).reshape(-1, *[1] * (mixed.ndim - 2))
        return log_softmax(mixed / np.float32(self.temperature) + bias)


def mixture_of(
    teacher: np.ndarray, students: np.ndarray, labels: np.ndarray, images: np.ndarray, biased: bool = False
) -> JSON:
    """Choose the weight of the labels-only students beside the teacher, and the temperature of the mixture.

    The weight is the one of 0, 0.1, ... 1 with the smallest log loss, each at its best temperature; it is 0 unless its gain over the
    teacher without students, paired by image, exceeds one standard error.

    Args:
        teacher, students: (N, C) float32 held-out log probabilities. labels: (N,) int64. images: (N,) int64, the image of each row.
        biased: whether a bias for each class is chosen too (`bias_of`), as for pixels, whose classes are of very different shares.

    Returns:
        weight, temperature, bias (empty unless biased), gain and its standard error in nats; the students' own temperature and bias;
        held-out scores of teacher, students and committee, each with its best temperature and, if biased, with the bias of `bias_of`.
    """
    counts = np.bincount(images)
    by_weight, biases = {}, {}
    for weight in WEIGHTS.tolist():
        mixed = log_softmax((1 - weight) * teacher + weight * students)
        temperature = best_temperature(mixed, labels)
        biases[weight] = bias_of(mixed / temperature, labels) if biased else np.zeros(mixed.shape[1], np.float32)
        mixed = mixed / temperature + biases[weight]
        losses = np.bincount(images, log_loss(mixed, labels))[counts > 0] / counts[counts > 0]
        by_weight[weight] = temperature, losses, float((mixed.argmax(axis=1) == labels).mean())
    without = by_weight[0.0][1]
    weight = min(by_weight, key=lambda one: by_weight[one][1].mean())
    gain, error = paired_gain(-by_weight[weight][1], -without)
    if gain <= error:
        weight, gain, error = 0.0, 0.0, 0.0
    held_out = {
        name: {"log_loss": float(by_weight[one][1].mean()), "accuracy": by_weight[one][2]}
        for name, one in (("teacher", 0.0), ("students", 1.0), ("committee", weight))
    }

    def bias_at(weight: float) -> list[float]:
        if not biased:
            return []
        mixed = log_softmax((1 - weight) * teacher + weight * students) / by_weight[weight][0]
        return bias_for_iou(mixed, labels, biases[weight]).tolist()

    return {
        "weight": weight,
        "temperature": by_weight[weight][0] if weight or biased else 1.0,  # the teacher's head is calibrated already
        "bias": bias_at(weight),
        "students_temperature": by_weight[1.0][0],
        "students_bias": bias_at(1.0),
        "gain": gain,
        "standard_error": error,
        "held_out": held_out,
    }


def bias_of(log_probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the bias of each class with which the mean probabilities are the classes' shares of the labels, in [-BIAS, BIAS].

    Averaged log probabilities make rare classes too rare, since they lose most where the members disagree. This is the most likely bias of
    a logistic regression on them (bias-corrected temperature scaling, Alexandari et al., ICML 2020).

    Worked example: probabilities (0.9, 0.1) for four pixels, one of them of class 1: bias (ln 3/4 - ln 0.9, ln 1/4 - ln 0.1).

    Args:
        log_probabilities: (N, C) float32. labels: (N,) int64.
    """
    shares = np.bincount(labels, minlength=log_probabilities.shape[1]) / len(labels)
    bias = np.zeros(len(shares), np.float32)
    for _ in range(100):
        mean = np.exp(log_softmax(log_probabilities + bias)).mean(axis=0)
        bias = (bias + np.log(shares.clip(1e-6) / mean.clip(1e-6))).clip(-BIAS, BIAS).astype(np.float32)
    return bias


def bias_for_iou(log_probabilities: np.ndarray, labels: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Return the bias of `bias_of` plus -t ln share for each class, with the t of 0, 0.1, ... 1 that makes the mean IoU largest.

    The most likely class of calibrated probabilities makes most pixels right, but the IoU of rare and thin things gains by naming them at
    less than even odds (for balanced accuracy: logit adjustment, Menon et al., ICLR 2021). Arguments as for `bias_of`.
    """
    shares = np.bincount(labels, minlength=len(bias)) / len(labels)
    rarity = np.where(shares > 0, -np.log(shares.clip(1e-6)), 0)

    def score(t: float) -> float:
        decisions = (log_probabilities + bias + t * rarity).argmax(axis=1)
        return float(np.nanmean(intersection_over_union(confusion(labels, decisions, len(bias)))))

    return (bias + max(WEIGHTS.tolist(), key=score) * rarity).astype(np.float32)
