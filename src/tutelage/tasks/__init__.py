"""Tasks: everything that differs between classification and segmentation, in one file per task with the same functions."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from tutelage.settings import groups as g
from tutelage.settings.commands import BaselineSettings

TASKS = {"classification": "tutelage.tasks.classification", "segmentation": "tutelage.tasks.segmentation"}


def task_of(name: str) -> ModuleType:
    """Return the module of a task, by its name in the settings or in the result of stage 0."""
    return importlib.import_module(TASKS[name])


def class_names(settings: g.Labelled) -> list[str] | None:
    """Return the class names given by --classes; None for all classes."""
    return [name.strip() for name in settings.classes.split(",")] if settings.classes else None


def rebuilt(about: dict[str, Any], classes: int) -> Any:
    """Build a student as described in a result, with random weights. about: "student" of the result. classes: C."""
    return task_of("segmentation" if "decoder" in about else "classification").rebuilt(about, classes)


def peak_rate(settings: BaselineSettings, kind: Any) -> float:
    """Return a student's peak learning rate: --lr, or the task's default for random or pretrained weights, scaled to the batch size.

    Args:
        kind: the task's module.
    """
    from tutelage.training.optimization import scaled_rate

    default = kind.SCRATCH_RATE if settings.student_weights == "scratch" else kind.PRETRAINED_RATE
    return scaled_rate(settings.lr or default, settings.batch_size)
