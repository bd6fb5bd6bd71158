"""Load a student from the folder of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file

from tutelage.errors import TutelageError
from tutelage.models import segmentation_students, students
from tutelage.pipeline.stage import file_hash
from tutelage.results import StudentEntry
from tutelage.run_folder import hash_of, read_json


def load_student(folder: Path, about: StudentEntry, classes: int, name: str = "weights") -> students.Student:
    """Return a student in evaluation mode, with the weights that a stage saved in `folder`/`name`.safetensors.

    Args:
        folder: distill/, finetune/, baseline/ or committee/ of a run. about: "student" of the stage's result.json. classes: their number.

    Raises:
        TutelageError: the file of weights is missing, or not the one that the stage wrote.
    """
    _check_unchanged(folder, f"{name}.safetensors")
    plain = about.name, classes, "scratch", about.size
    build = segmentation_students.build_student
    student = build(*plain, about.decoder) if about.decoder else students.build_student(*plain)
    student.module.load_state_dict(load_file(folder / f"{name}.safetensors"))
    student.module.eval()
    kept = {"initialisation": about.initialisation, "channels_last": about.channels_last}
    return replace(student, mean=tuple(about.mean), std=tuple(about.std), **kept)


def _check_unchanged(folder: Path, name: str) -> None:
    """Compare a finished stage's weights with the hash in its result.json."""
    result, digest = read_json(folder / "result.json"), file_hash(folder / name) if (folder / name).is_file() else ""
    stages = ("distill", "baseline", "finetune")  # the hash of a committee is that of its outputs
    if digest and (not result or folder.name not in stages):
        return
    if not digest or result["outputs"] not in (digest, hash_of([result["inputs"], digest])):
        message = f"{folder / name} is {'missing' if not digest else 'not the file that the run wrote'}"
        raise TutelageError(message, f"put it back, or delete {folder} and repeat the command that made the run")
