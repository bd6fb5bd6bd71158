"""Tasks: what a stage asks of the kind of labels. One file a task, all with the same functions; the commands know no other difference."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

TASKS = {"classification": "tutelage.tasks.classification", "segmentation": "tutelage.tasks.segmentation"}


def task_of(name: str) -> ModuleType:
    """The functions of a task, by its name in the settings or in the result of stage 0."""
    return importlib.import_module(TASKS[name])


def class_names(settings: dict[str, Any]) -> list[str] | None:
    """The names that --classes asks for; None for all that there are."""
    return [name.strip() for name in settings["classes"].split(",")] if settings["classes"] else None


def rebuilt(about: dict[str, Any], classes: int) -> Any:
    """A student as a result describes it, its weights random. about: "student" of the result. classes: C."""
    return task_of("segmentation" if "decoder" in about else "classification").rebuilt(about, classes)


def peak_rate(settings: dict[str, Any], kind: Any) -> float:
    """The peak learning rate of a student: as asked for, or the task's by the origin of its weights, scaled to the batch.

    Args:
        settings: lr, student_weights, batch_size. kind: the task.
    """
    from tutelage.training.optimization import scaled_rate

    default = kind.SCRATCH_RATE if settings["student_weights"] == "scratch" else kind.PRETRAINED_RATE
    return scaled_rate(settings["lr"] or default, settings["batch_size"])
