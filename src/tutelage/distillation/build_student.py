"""The student as it is trained: with a projector where it matches features, or with DINO's head."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tutelage.errors import TutelageError
from tutelage.models.students import DINOStudent, Student, StudentWithProjector, plain_head
from tutelage.progress import say
from tutelage.settings.commands import WITHOUT_TARGETS, DistillSettings
from tutelage.training.batches import seed_of


def student_to_train(kind: Any, settings: DistillSettings, classes: int, width: int) -> tuple[nn.Module, Student]:
    """Build a new student, and the module around it that is trained.

    Args:
        kind: the task. width: of the features to match; 0 for none.

    Raises:
        TutelageError: the student has no features that the objective can train.
    """
    torch.manual_seed(seed_of(settings.seed, "student"))
    built: Student = kind.student(settings, classes)
    module, strict = kind.distillation_module(built.module, width, settings), settings.objective in WITHOUT_TARGETS
    if module is not None:
        return module, built
    if strict and not plain_head(built.module, built.size):
        raise TutelageError(
            f"--objective {settings.objective} does not support --student {built.name}, "
            "whose head is not one linear layer on pooled features",
            "use --objective task-oriented or pseudo-label, or another student",
        )
    if width and (strict or StudentWithProjector.possible(built.module, built.size)):
        return StudentWithProjector(built.module, width, built.size), built
    if width:
        say(f"{built.name} has no single head on pooled features: the teacher's features are not matched")
    return (DINOStudent(built.module, built.size) if strict else built.module), built
