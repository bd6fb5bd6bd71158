"""Which scores a task is judged by, and how people say them. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tutelage.metrics import mean_iou


@dataclass(frozen=True)
class MetricSpec:
    """main: the score that counts. title: its name. says: "is right for {} %", a model's main score in a sentence. over: the word
    before "N test images". labels: what a budget counts. table: (title, score) of the columns. each: (title, score) of the chart
    by class. score: the main score by the mean counts of some test images. best_low: scores of which less is better.
    """

    main: str
    title: str
    says: str
    over: str
    labels: str
    table: tuple[tuple[str, str], ...]
    each: tuple[str, str]
    score: Callable[[np.ndarray], np.ndarray]
    best_low: tuple[str, ...] = ()


CLASSES = MetricSpec(
    "accuracy", "accuracy", "is right for {:.1f} %", "of", "labels per class",
    (
        ("accuracy", "accuracy"), ("balanced", "balanced_accuracy"), ("macro F1", "macro_f1"), ("ECE", "ece"),
        ("log loss", "log_loss"),
    ),
    ("Recall of each class", "recall"), np.asarray, ("ece", "log_loss"),
)  # fmt: skip
MASKS = MetricSpec(
    "miou", "mIoU", "has a mean IoU of {:.1f} %", "on", "labelled images",
    (
        ("mIoU", "miou"), ("pixels", "accuracy"), ("recall", "balanced_accuracy"), ("boundary F1", "boundary_f1"),
    ),
    ("IoU of each class", "iou"), mean_iou,
)  # fmt: skip


def words_of(test: dict[str, Any] | None) -> MetricSpec:
    """The words for a model's scores on test images."""
    return MASKS if test and "miou" in test else CLASSES


def words_of_results(results: dict[str, Any]) -> MetricSpec:
    """The words for an evaluation: those of the first model that has scores."""
    tests = [one["test"] for one in results.values() if isinstance(one, dict) and "test" in one]
    return words_of(tests[0] if tests else None)


def main_score(test: dict[str, Any]) -> float:
    """The score that counts, in [0, 1]."""
    return test[words_of(test).main]


def variance(test: dict[str, Any]) -> float:
    """The square of the error that the choice of test images leaves in the main score."""
    share = main_score(test)
    return test["standard_error"] ** 2 if "miou" in test else share * (1 - share) / max(test["images"], 1)
