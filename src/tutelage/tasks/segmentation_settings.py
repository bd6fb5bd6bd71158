"""Checks for settings that segmentation does not support (objectives, windows, shapes, decoders), before anything is read."""

from __future__ import annotations

import importlib.util
import re

from tutelage.errors import TutelageError
from tutelage.image_size import sides
from tutelage.settings.command_flags import DistillSettings
from tutelage.settings.shared_flags import Adaptation, Group, Resize, Student, Teacher

OBJECTIVES = ("task-oriented", "pseudo-label", "task-agnostic")
COMPARISONS = ("contrastive", "cosine")


def faults_of(settings: Group) -> list[TutelageError]:
    """Return one fault for each setting, or pair of settings, that segmentation does not support."""
    faults, task = [], "with --task segmentation is not supported"
    if isinstance(settings, DistillSettings):
        objective, comparison = settings.objective, settings.task_agnostic_loss
        if objective not in OBJECTIVES:
            faults.append(TutelageError(f"--objective {objective} {task}", f"use one of {', '.join(OBJECTIVES)}"))
        if objective == "task-agnostic" and comparison not in COMPARISONS:
            hint = f"use one of {', '.join(COMPARISONS)}"
            faults.append(TutelageError(f"--task-agnostic-loss {comparison} {task}", hint))
    if isinstance(settings, Adaptation) and settings.adapt == "transductive":
        faults.append(TutelageError(f"--adapt transductive {task}", "use --adapt probe, or --adapt auto"))
    if isinstance(settings, Teacher):
        faults += _window_faults(settings)
    if isinstance(settings, Resize) and settings.resize != "squash":
        hint = "use --resize squash, and --student-size HxW in the images' aspect ratio"
        faults.append(TutelageError(f"--resize {settings.resize} {task}", hint))
    if not isinstance(settings, Student):
        return faults
    decoder = settings.decoder
    if decoder in ("fpn", "deeplabv3plus") and importlib.util.find_spec("segmentation_models_pytorch") is None:
        message = f"--decoder {decoder}: segmentation-models-pytorch is not installed"
        faults.append(TutelageError(message, "run `pip install 'tutelage[segmentation]'`, or use --decoder lraspp"))
    elif not faults:
        from tutelage.models.segmentation_students import build_student

        try:
            build_student(settings.student, 2, "scratch", settings.student_size, decoder)
        except TutelageError as error:
            faults.append(error)
    return faults


def _window_faults(settings: Teacher) -> list[TutelageError]:
    """Return the fault of a window that the teacher does not accept, or that is larger than its input."""
    from tutelage.models.aliases import check_size
    from tutelage.models.teachers import default_size, resolve

    window = settings.teacher_window
    if window is None:
        return []
    try:
        name = resolve(settings.teacher)
        check_size(name, window)
    except TutelageError as error:
        reason = error.message.removeprefix("--teacher-size ")  # the check's message calls it a size
        message = f"--teacher-window {window} does not fit --teacher {settings.teacher}: {reason}"
        return [TutelageError(message, error.hint.replace("--teacher-size", "--teacher-window"))]
    size = settings.teacher_size or default_size(name)
    both = f"--teacher-window {window} with --teacher-size {size}"
    if any(one > whole for one, whole in zip(sides(window), sides(size), strict=True)):
        return [TutelageError(f"{both} must be at most {size}", "use a smaller window, or a larger --teacher-size")]
    plain = re.search(r"patch(1[0-9]|[89]|32)", name)  # a ViT has one level, whose stride is its patch
    if not plain and any(one % 32 for one in (*sides(window), *sides(size))):
        return [TutelageError(f"{both}: both must be multiples of 32 px", "round the window and the size")]
    return []
