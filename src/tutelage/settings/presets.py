"""Default values of settings that depend on the task or on a preset, used where a call does not set them."""

from __future__ import annotations

from pathlib import Path

from tutelage.regular_file import json_of, text_in

PRESETS: dict[str, dict[str, object]] = {
    "none": {},
    "paper": {
        "objective": "task-oriented",
        "committee": "none",
        "label_share": 0.0,
        "temperature": 1.0,
        "feature_weight": 0.0,
        "finetune": "full",
    },
}


# Task defaults that differ from the signatures: one image holds many labelled pixels, and objects of many scales.
OF_TASK: dict[str, dict[str, object]] = {"segmentation": {"batch_size": 8, "crop_area": 0.35}}


def of(values: dict[str, object]) -> dict[str, object]:
    """Return the settings that the task and the preset define. values: the settings given in the call, by name."""
    return {**OF_TASK.get(_task(values), {}), **PRESETS.get(str(values.get("preset")), {})}


def _task(values: dict[str, object]) -> str:
    """Return the task of a call: the one it names, or that of the run folder in which a later stage continues; else empty."""
    if "task" in values:
        return str(values["task"])
    try:
        curated = text_in(Path(str(values.get("out", ""))) / "curate" / "result.json")
        return str(json_of(curated).get("task", ""))
    except (OSError, ValueError, AttributeError):
        return ""
