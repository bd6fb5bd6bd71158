"""Records: a finished run as one JSON file that holds all the study page needs, so the run folder may be deleted."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from tutelage.curation.labelled_set import data_of
from tutelage.data.gallery import list_gallery
from tutelage.data.manifest import read_manifest
from tutelage.environment import versions
from tutelage.errors import TutelageError, shown
from tutelage.files import hash_of, write_json
from tutelage.json_object import JSON
from tutelage.metrics import reliability
from tutelage.reporting.diagnosis import diagnose
from tutelage.reporting.example_predictions import read_counts, read_evidence
from tutelage.run_folder import Run
from tutelage.settings.command_flags import FREE, RunSettings
from tutelage.settings.stored import stored
from tutelage.study.methods import Method
from tutelage.study.results_table import Record, read_record, record_name
from tutelage.tasks import task_of

DATA = ("task", "target", "val", "test", "classes", "group_by", "gallery")  # settings that choose the images and labels
# Two runs that differ only in these (locations of the data, identity in the study) or in FREE count as the same run
PLACES = {"target", "gallery", "smoke", "seed", "budget"}


def kept_record(folder: Path, method: str, budget: int, seed: int, settings: JSON) -> Record | None:
    """Return the record of a run that was finished here or elsewhere; None if there is none.

    Raises:
        TutelageError: the record was made with other settings, or cannot be read.
    """
    path = folder / f"{record_name(method, budget, seed)}.json"
    record = read_record(path)
    if record is None:
        return None
    asked, made = compared(settings), record["settings"]
    unused = task_of(asked["task"]).UNUSED
    differing = {
        name
        for name, value in asked.items()
        if stored(name, made.get(name)) != stored(name, value) and name not in unused
    }
    other = [f"{name}: {made.get(name)} -> {value}" for name, value in asked.items() if name in differing]
    if other:
        hint = "use the same settings, or another --results (and --out)"
        raise TutelageError(f"{path} was made with other settings: {shown(other, 8)}", hint)
    return record


def compared(settings: JSON) -> JSON:
    """The settings that identify a run: two runs with equal ones count as the same run."""
    kept = {name: value for name, value in sorted(settings.items()) if name not in FREE | PLACES}
    places = ("val", "test", "teacher_weights", "student_weights")  # a keyword, a share or a path; paths may differ
    return {name: "a file" if name in places and Path(str(value)).exists() else value for name, value in kept.items()}


def check_data(folder: Path, finished: Sequence[tuple[Record, JSON]]) -> None:
    """Check that finished runs were made from the data as they are now.

    Args:
        folder: of the results. finished: records, each with the settings of its run as the study has them; records without hashes of
            their data ("given") are skipped.

    Raises:
        TutelageError: data cannot be read, or differ from those that a run was made from.
    """
    now: dict[str, dict[str, str]] = {}
    for record, settings in finished:
        if not record.get("given"):
            continue
        if (key := hash_of([settings[name] for name in DATA])) not in now:
            now[key] = _data_now(settings)
        other = [f"--{name} {settings[name]}" for name, one in now[key].items() if record["given"][name] != one]
        if other:
            raise TutelageError(
                f"{folder}: {record_name(record['method'], record['budget'], record['seed'])} was made from other images or labels "
                f"than {' and '.join(other)}, whose contents have changed",
                "use another --results (and --out), or restore the data; `tutelage report` shows the results that are there",
            )


def _data_now(settings: JSON) -> dict[str, str]:
    """Hashes of the data that these settings give a run now."""
    of_run = RunSettings(**{name: value for name, value in settings.items() if name in DATA})
    return data_of(task_of(of_run.task).read(of_run), list_gallery(of_run.gallery)[0])


def write_record(folder: Path, run: Run, method: Method, identity: tuple[str, int, int, JSON]) -> Record:
    """Write and return the record of a run that has just been evaluated.

    Args:
        folder: of the results. identity: name in the study, budget, seed, settings.
    """
    name, budget, seed, settings = identity
    charged = [stage for stage in method.charged if run.kept(stage)]  # a run may have no committee
    stages = {stage: run.kept(stage) or {} for stage in ("curate", *charged, "evaluate")}
    scores, counts = stages["evaluate"], read_counts(run.path / "evaluate" / "predictions.npz", method.model)
    record: Record = {
        "method": name, "budget": budget, "seed": seed, "description": method.description,
        "settings": compared(settings), "classes": scores["classes"],
        "student": scores[method.model], "teacher": scores.get("teacher") if "adapt" in charged else None,
        **_written(counts), "test_images": len(counts),
        "test": _test_images(run), "given": stages["curate"].get("given"),
        "images": stages["curate"]["images"], "data": stages["curate"]["outputs"],
        "compute_cost": {name: _cost(stages[name]) for name in charged},
        "images_seen": next(stages[name]["images_seen"] for name in ("distill", "baseline") if name in charged),
        "findings": [asdict(one) for one in diagnose(scores, Run(run.path).results())], "calibration": _calibration(run, method.model),
        "chosen": {name: stages[name][key] for name, key in (("finetune", "delivered"), ("adapt", "mode")) if name in charged},
        "versions": versions(("torch", "timm", "numpy")),
    }  # fmt: skip
    if "committee" in charged:
        mixture = {one: stages["committee"][one] for one in ("weight", "held_out")}
        record["committee"] = {"scores": scores.get("committee"), **mixture}
    if "adapt" in method.stages and "adapt" not in charged:  # done in this run, though the method is not charged for it
        record["beside"] = {"adapt": _cost(run.kept("adapt") or {})}
    if "adapt" in charged:
        adapted = stages["adapt"]
        record["validation"] = adapted["validation"][adapted["mode"]]
        kept = ("name", "size", "weights", "hash", "licence")
        record["teacher_weights"] = {one: adapted["teacher"][one] for one in kept}
    record["hash"] = hash_of(record)
    write_json(folder / f"{record_name(name, budget, seed)}.json", record)
    return record


def _cost(stage: JSON) -> JSON:
    return {**stage["compute_cost"], "taken_from": stage.get("taken_from")}


def _calibration(run: Run, model: str) -> dict[str, list[list[float]]]:
    """Bins of `metrics.reliability` for the method's student (`model` in the evaluation) and its teacher; empty for masks."""
    labels, probabilities, _ = read_evidence(run.path / "evaluate")
    names = {model: "student", "teacher": "teacher"}
    return {names[name]: reliability(one, labels).tolist() for name, one in probabilities.items() if name in names}


def _test_images(run: Run) -> str:
    """Hash of the test images and their labels; only records with equal hashes are compared."""
    table = read_manifest(run.path / "target_set" / "manifest.parquet")[1]
    truth = "mask_truth" if "mask_truth" in table.column_names else "label"
    rows = table.select(["key", truth, "split"]).to_pylist()
    return hash_of([[row["key"].hex(), row[truth]] for row in rows if row["split"] == "test"])


def _written(counts: np.ndarray) -> dict[str, str]:
    """Encode the counts of each test image as text; `results_table.counts_in` decodes it."""
    if counts.dtype == bool:
        return {"right": base64.b64encode(np.packbits(counts).tobytes()).decode("ascii")}
    return {"pixels": base64.b64encode(zlib.compress(counts.astype(np.int32).tobytes(), 9)).decode("ascii")}
