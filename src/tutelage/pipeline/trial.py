"""Try teacher and student with random weights before anything is read: not every architecture can take every size and objective."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tutelage.errors import TutelageError
from tutelage.image_size import sides
from tutelage.models.aliases import full_name
from tutelage.settings import shared_flags
from tutelage.settings.command_flags import BaselineSettings, CommitteeSettings, CurateSettings, DistillSettings
from tutelage.tasks import Task

TRAINING = ((DistillSettings, "distill"), (CommitteeSettings, "committee"), (BaselineSettings, "baseline"))


def try_teacher(settings: shared_flags.Stage, task: Task) -> None:
    """Run the teacher on one blank image; on the meta device, which takes no memory and a second or two, where the architecture can.

    Raises:
        TutelageError: it cannot take its size.
    """
    if not isinstance(settings, shared_flags.Teacher):
        return
    if isinstance(settings, CurateSettings) and (settings.embeddings or settings.strategy == "text"):
        return  # another model embeds the gallery
    if not task.TRIES_ALL_TEACHERS and (settings.teacher_size is None or full_name(settings.teacher)):
        return  # sizes of models of our own table are known
    import torch

    from tutelage.models.teachers import build, resolve, size_of
    from tutelage.models.weights import first_line

    name, size, window = resolve(settings.teacher), size_of(settings, "teacher"), settings.teacher_window

    def attempt(device: str) -> None:
        with torch.device(device), torch.random.fork_rng(devices=[]), torch.no_grad():
            module = build(name, "scratch", 0, window or size, "teacher")[0].eval()
            task.check_teacher(module, name, size, window)

    try:
        try:
            attempt("meta")
        except Exception:  # some architectures compute with values while they are built
            attempt("cpu")
    except TutelageError:
        raise
    except Exception as error:
        message = f"--teacher {settings.teacher} cannot be used at {window or size} pixels: {first_line(error)}"
        raise TutelageError(message, "use another --teacher-size, or another --teacher") from error


def try_student(settings: shared_flags.Stage, task: Task) -> None:
    """Train the student for one step on random pixels, as the stage does.

    Raises:
        TutelageError: it cannot take its size or the objective.
    """
    stage = next((name for kind, name in TRAINING if isinstance(settings, kind)), "")
    if not isinstance(settings, BaselineSettings) or (not settings.overwrite and (Path(settings.out) / stage).exists()):
        return
    import torch

    from tutelage.distillation.self_distillation import averaged
    from tutelage.models.weights import first_line
    from tutelage.training.optimization import EMA

    size, how = f"{settings.student_size} pixels" if settings.student_size else "its own size", "on labels"
    try:
        with torch.random.fork_rng(devices=[]):
            student = task.student(replace(settings, student_weights="scratch"), 2)
            module, images = student.module, torch.randn(2, 3, *sides(student.size))
            if isinstance(settings, DistillSettings):
                how = f"with --objective {settings.objective}"
                # features of a teacher; any number shows whether they can be matched
                module = task.distillation_module(student, 8 if settings.objective == "task-agnostic" else 0, settings)
            outputs = module.train()(images)
            parts = outputs if isinstance(outputs, tuple) else (outputs,)
            torch.stack([part.square().mean() for part in parts if part is not None]).sum().backward()
            if isinstance(settings, DistillSettings) and settings.objective == "dino":
                averaged(module, EMA(module).state, images)
            module.eval()(images[:1])
    except TutelageError:
        raise
    except Exception as error:  # timm's models raise almost anything for a size that they cannot take
        message = f"--student {settings.student} at {size} cannot be trained {how}: {first_line(error)}"
        raise TutelageError(message, "use another --student-size, or another --student") from error
