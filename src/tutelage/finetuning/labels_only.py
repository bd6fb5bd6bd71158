"""Students trained on labels only: the baseline, and the members of the committee."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator

from tutelage.data.manifest import TaskData
from tutelage.finetuning import supervised
from tutelage.json_object import JSON
from tutelage.models.students import Student
from tutelage.progress import progress
from tutelage.settings.command_flags import BaselineSettings
from tutelage.tasks import Task, peak_rate
from tutelage.training import batches, checkpoints, loop


@dataclass(frozen=True)
class LabelsOnly:
    """One student to train. kind: the task. settings: of the run. steps, seed: of this student. positions: of the labelled
    images that it is trained on. what: its name in the progress bar and in errors."""

    kind: Task
    task: TaskData
    settings: BaselineSettings
    steps: int
    seed: int
    positions: np.ndarray
    what: str


def train_student(
    job: LabelsOnly,
    hardware: Accelerator,
    resumable: checkpoints.Resumable,
    advance: Callable[[int], object],
    log: Callable[[JSON], None] = lambda row: None,
) -> tuple[Student, torch.nn.Module]:
    """Train a new student; return it and its module with the averaged weights.

    Args:
        resumable: where its checkpoints are. advance: called with the images just seen, like the progress bar. log: takes step, loss, rate.
    """
    settings, classes, batch_size = job.settings, len(job.task.classes), job.settings.batch_size
    torch.manual_seed(batches.seed_of(job.seed, "student"))
    student = job.kind.student(settings, classes)
    module = student.module.to(hardware.device)
    module = module.to(memory_format=torch.channels_last) if student.channels_last else module
    rate, views, labelled = peak_rate(settings, job.kind), job.kind.views(settings), job.task.train.take(job.positions)
    plan = supervised.Plan(job.steps, batch_size, rate, job.seed, classes, settings.class_weight, views=views)
    with progress(job.what, job.steps * batch_size, resumable.start * batch_size) as shown:
        watch = loop.Watch(job.what, log, lambda count: (shown(count), advance(count)))
        module = supervised.train_on_labels(module, student, labelled, plan, hardware, watch, resumable=resumable)
        return student, module
