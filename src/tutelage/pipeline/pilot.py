"""Choose the student to deliver without a validation split: for each fold of the labels, do a whole run that is tested on that fold.

The students of such a run have no access to its fold: the fold's images, and copies of them, are in no label, no target and no
transfer set, and the teacher's head and the committee are chosen without them. So the scores of all folds, paired by image,
compare the distilled student with the baseline, both trained for the run's full number of steps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tutelage.data.label_budget import folds
from tutelage.data.manifest import read_manifest
from tutelage.data.sources import ImageRef, read_bytes
from tutelage.errors import TutelageError
from tutelage.files import atomic_write, hash_of
from tutelage.metrics import paired_gain
from tutelage.pipeline.stage import PilotResult, open_run
from tutelage.progress import logger
from tutelage.reporting.example_predictions import read_counts
from tutelage.results import CurationResult
from tutelage.run_folder import Run
from tutelage.settings import identity
from tutelage.settings.command_flags import RunSettings

STAGES = ("curate", "adapt", "committee", "distill", "baseline")


def pilot(run: Run, settings: RunSettings, walk: Callable[[Run, Sequence[str], RunSettings], object]) -> PilotResult:
    """Compare the baseline with the distilled student, fold by fold; a killed pilot resumes where it stopped.

    Args:
        run: curated, its lock held. settings: all settings of `run`. walk: function that runs the named stages in a run folder.

    Returns:
        {"images", "distilled", "baseline": accuracies, "gain" of the baseline over the distilled student, "standard_error", "seconds"}.
    """
    curated = CurationResult(**run.result("curate", "--pilot"))
    inputs = hash_of(["pilot", curated.outputs, identity(settings)])
    if done := run.done("pilot", inputs):
        return PilotResult(**done, reused=True)
    clock = run.clock("pilot")
    refs, table = read_manifest(run.path / "target_set" / "manifest.parquet")
    rows = np.flatnonzero(np.array(table.column("split").to_pylist()) == "train")
    labels = np.array(table.column("label").to_pylist())[rows]
    fold = folds(labels, np.array(table.column("group").to_pylist())[rows], settings.seed)
    left = [np.bincount(labels[fold != number], minlength=len(curated.classes)).min() for number in np.unique(fold)]
    if min(left) < 2:
        raise TutelageError(
            "--pilot needs at least 4 labels per class: a class keeps fewer than 2 labels when a fold is left out",
            "label more images, or leave --pilot out",
        )
    numbers, students = np.unique(fold).tolist(), 2 if settings.committee == "none" else 3
    count, times = len(numbers), students * len(numbers)
    logger.info(
        f"pilot: {count} runs on parts of the labels, each as long as this one: {times} times its training steps"
    )
    right: dict[str, list[np.ndarray]] = {"distilled": [], "baseline": []}
    for number in numbers:
        place = run.path / "pilot" / f"fold-{number}"
        splits = np.where(fold == number, "test", "train")
        write_fold(place.with_name(f"labels-{number}"), [refs[i] for i in rows], labels, splits, curated.classes)
        own = {"target": str(place.with_name(f"labels-{number}")), "out": str(place)}
        own["cache"] = settings.cache or str(run.path.parent / "cache")
        whole = dict.fromkeys(("budget", "val", "test", "classes"))
        mine = replace(settings, **own, **whole, pilot=False, overwrite=False)
        with open_run(mine) as (folder, _):
            walk(folder, STAGES, mine)
        for name, found in right.items():
            found.append(read_counts(place / "evaluate" / "predictions.npz", name))
        clock.tick(force=True)
    distilled, baseline = (np.concatenate(found).astype(float) for found in right.values())
    gain, error = paired_gain(baseline, distilled)
    images, ours, theirs = len(distilled), float(distilled.mean()), float(baseline.mean())
    result = {
        "curated": curated.outputs,
        "images": images,
        "distilled": ours,
        "baseline": theirs,
        "gain": gain,
        "standard_error": error,
        "seconds": clock.stop(),
    }
    logger.info(f"pilot: on {images} held-out labels the distilled student has {ours:.3f}, the baseline {theirs:.3f}")
    return PilotResult(**run.finish("pilot", inputs, {"outputs": hash_of(result), **result}))


def write_fold(place: Path, refs: list[ImageRef], labels: np.ndarray, splits: np.ndarray, classes: list[str]) -> None:
    """Write the labelled images as Parquet shards of train and test, in Hugging Face's format. labels, splits: one per image."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    found = dict(read_bytes(refs))
    names = {"info": {"features": {"label": {"names": classes, "_type": "ClassLabel"}}}}
    for split in ("train", "test"):
        rows = np.flatnonzero(splits == split)
        images = [{"bytes": found[i], "path": refs[i].id} for i in rows.tolist()]
        table = pa.table({"image": pa.array(images, kind), "label": pa.array(labels[rows])})
        with atomic_write(place / f"{split}-00000-of-00001.parquet") as temporary:
            pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(names)}), temporary)
