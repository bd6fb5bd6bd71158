"""Values that settings have where a call gives none: those of its task, and those of a preset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    "paper": {
        "objective": "oriented", "committee": "none", "sharpness": 1.0, "label_share": 0.0, "temperature": 1.0, "feature_weight": 0.0,
        "finetune": "full",
    },
}  # fmt: skip


# Defaults of a task that are not those of the signatures: pixels of one image are many rows, and scenes hold things of many scales.
OF_TASK: dict[str, dict[str, Any]] = {"segmentation": {"batch_size": 8, "crop_area": 0.35}}


def of(values: dict[str, Any]) -> dict[str, Any]:
    """Settings that a task and a preset have of their own. values: what a call gives, by name."""
    return {**OF_TASK.get(_task(values), {}), **PRESETS.get(str(values.get("preset")), {})}


def _task(values: dict[str, Any]) -> str:
    """The task that a call is about: as it says, or that of the run folder in which a stage goes on."""
    if "task" in values:
        return str(values["task"])
    try:
        curated = (Path(str(values.get("out", ""))) / "transfer_set" / "result.json").read_text(encoding="utf-8")
        return str(json.loads(curated).get("task", ""))
    except (OSError, ValueError):
        return ""
