"""Load a student from the folder of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file

from tutelage.files import intact
from tutelage.models import segmentation_students, students
from tutelage.results import StudentEntry


def load_student(folder: Path, about: StudentEntry, classes: int, name: str = "weights") -> students.Student:
    """Return a student in evaluation mode, with the weights that a stage saved in `folder`/`name`.safetensors.

    Args:
        folder: distill/, finetune/, baseline/ or committee/ of a run. about: "student" of the stage's result.json. classes: their number.

    Raises:
        TutelageError: the file of weights is missing, or not the one that the stage wrote.
    """
    plain = about.name, classes, "scratch", about.size
    build = segmentation_students.build_student
    student = build(*plain, about.decoder) if about.decoder else students.build_student(*plain)
    student.module.load_state_dict(load_file(intact(folder / f"{name}.safetensors")))
    student.module.eval()
    kept = {"initialisation": about.initialisation, "channels_last": about.channels_last}
    return replace(student, mean=tuple(about.mean), std=tuple(about.std), **kept)
