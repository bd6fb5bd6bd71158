"""Load a student from the folder of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tutelage.models.students import Student
from tutelage.tasks import rebuilt


def load_student(folder: Path, about: dict[str, Any], classes: int, name: str = "weights") -> Student:
    """Return a student in evaluation mode, with the weights that a stage saved in `folder`/`name`.safetensors.

    Args:
        folder: distill/, finetune/, baseline/ or committee/ of a run. about: "student" of the stage's result.json. classes: their number.
    """
    student = rebuilt(about, classes)
    student.module.load_state_dict(load_file(folder / f"{name}.safetensors"))
    student.module.eval()
    keep = ("initialisation", "channels_last")
    return replace(
        student, mean=tuple(about["mean"]), std=tuple(about["std"]), **{name: about[name] for name in keep}
    )  # fmt: skip
