"""Settings that segmentation cannot have: objectives, windows, shapes and decoders, told before anything is read."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

from tutelage.errors import TutelageError
from tutelage.sizes import sides

OBJECTIVES = ("oriented", "pseudo-label", "agnostic")
COMPARISONS = ("contrastive", "cosine")


def faults_of(settings: dict[str, Any]) -> list[TutelageError]:
    """One fault for each setting, or pair of settings, that segmentation cannot have."""
    faults = []
    objective, comparison = settings.get("objective", "oriented"), settings.get("agnostic_loss", "contrastive")
    if objective not in OBJECTIVES:
        given = f"--objective {objective} with --task segmentation"
        faults.append(TutelageError(given, ", ".join(OBJECTIVES), "use one of them"))
    if objective == "agnostic" and comparison not in COMPARISONS:
        given = f"--agnostic-loss {comparison} with --task segmentation"
        faults.append(TutelageError(given, ", ".join(COMPARISONS), "use one of them"))
    faults += _window_faults(settings)
    if settings.get("resize", "squash") != "squash":
        given = f"--resize {settings['resize']} with --task segmentation"
        faults.append(TutelageError(given, "squash", "give --student-size HxW in the images' proportions"))
    decoder = settings.get("decoder")
    if decoder in ("fpn", "deeplabv3plus") and importlib.util.find_spec("segmentation_models_pytorch") is None:
        given = f"--decoder {decoder}: segmentation-models-pytorch is not installed"
        faults.append(TutelageError(given, "the package, or --decoder lraspp", "pip install 'tutelage[segmentation]'"))
    elif decoder and "student_weights" in settings and not faults:
        from tutelage.models.dense_students import build_student

        try:
            build_student(settings["student"], 2, "scratch", settings["student_size"], decoder)
        except TutelageError as error:
            faults.append(error)
    return faults


def _window_faults(settings: dict[str, Any]) -> list[TutelageError]:
    """A window that the teacher cannot take, or that does not lie in its input."""
    from tutelage.models.names import check_size
    from tutelage.models.teachers import default_size, resolve

    window = settings.get("teacher_window")
    if window is None:
        return []
    given = f"--teacher-window {window}"
    try:
        name = resolve(settings["teacher"])
        check_size(name, window)
    except TutelageError as error:
        return [TutelageError(f"{given} for --teacher {settings['teacher']}", error.allowed, error.mend)]
    size = settings["teacher_size"] or default_size(name)
    if any(one > whole for one, whole in zip(sides(window), sides(size), strict=True)):
        return [
            TutelageError(
                f"{given} with --teacher-size {size}",
                f"at most {size}",
                "give a smaller window, or a larger --teacher-size",
            )
        ]
    plain = re.search(r"patch(1[0-9]|[89]|32)", name)  # one level, whose stride is the patch
    if not plain and any(one % 32 for one in (*sides(window), *sides(size))):
        return [
            TutelageError(f"{given} with --teacher-size {size}", "multiples of 32 px", "round the window and the size")
        ]
    return []
