"""The scores of each task, and how reports word them. Loads no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tutelage.json_object import JSON
from tutelage.metrics import mean_iou


@dataclass(frozen=True)
class MetricSpec:
    """A task's scores. main: key of the main score. title: its name. phrase: phrase for a model's main score, "is right for {} %".
    over: the preposition before "N test images". labels: unit of a label budget. table: (title, score) of the columns. each: (title,
    score) of the chart by class. score: main score from the mean counts of some test images. unit: what is decided, images or pixels.
    best_low: scores where lower is better.
    """

    main: str
    title: str
    phrase: str
    over: str
    labels: str
    table: tuple[tuple[str, str], ...]
    each: tuple[str, str]
    score: Callable[[np.ndarray], np.ndarray]
    unit: str
    best_low: tuple[str, ...] = ()


CLASSES = MetricSpec(
    "accuracy", "accuracy", "is right for {:.1f} %", "of", "labels per class",
    (("accuracy", "accuracy"), ("balanced", "balanced_accuracy"), ("macro F1", "macro_f1"), ("ECE", "ece"), ("log loss", "log_loss")),
    ("Recall of each class", "recall"), np.asarray, "images", ("ece", "log_loss"),
)  # fmt: skip
MASKS = MetricSpec(
    "miou",
    "mIoU",
    "has a mean IoU of {:.1f} %",
    "on",
    "labelled images",
    (("mIoU", "miou"), ("pixels", "accuracy"), ("recall", "balanced_accuracy"), ("boundary F1", "boundary_f1")),
    ("IoU of each class", "iou"),
    mean_iou,
    "pixels",
)
OF_TASK = {"segmentation": MASKS, "classification": CLASSES}


def words_of(test: JSON | None) -> MetricSpec:
    """The scores and wording that fit a model's test results; those of classification without any."""
    return next((one for one in OF_TASK.values() if test and one.main in test), CLASSES)


def words_of_results(results: JSON) -> MetricSpec:
    """The scores and wording that fit an evaluation: those of the first model with test results."""
    tests = [one["test"] for one in results.values() if isinstance(one, dict) and "test" in one]
    return words_of(tests[0] if tests else None)


def main_score(test: JSON) -> float:
    """The task's main score, in [0, 1]."""
    return test[words_of(test).main]


def variance(test: JSON) -> float:
    """Squared standard error of the main score due to the choice of test images."""
    share = main_score(test)
    return test["standard_error"] ** 2 if "standard_error" in test else share * (1 - share) / max(test["images"], 1)
