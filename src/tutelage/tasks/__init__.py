"""Tasks: everything that differs between classification and segmentation, in one class per task with the same methods."""

from __future__ import annotations

from tutelage.settings.command_flags import BaselineSettings
from tutelage.tasks.base import HeadFitter, Task
from tutelage.tasks.classification import Classification
from tutelage.tasks.segmentation import Segmentation

__all__ = ["TASKS", "Classification", "HeadFitter", "Segmentation", "Task", "peak_rate", "task_of"]

TASKS: dict[str, Task] = {"classification": Classification(), "segmentation": Segmentation()}


def task_of(name: str) -> Task:
    """Return a task by its name in the settings or in the result of stage 0."""
    return TASKS[name]


def peak_rate(settings: BaselineSettings, kind: Task) -> float:
    """Return a student's peak learning rate: --lr, or the task's default for random or pretrained weights, scaled to the batch size."""
    from tutelage.training.optimization import scaled_rate

    default = kind.SCRATCH_RATE if settings.student_weights == "scratch" else kind.PRETRAINED_RATE
    return scaled_rate(settings.lr or default, settings.batch_size)
