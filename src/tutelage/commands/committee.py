"""Stage 2: the committee of the adapted teacher and labels-only students, whose class probabilities are the student's targets.

Each of the K students is trained on the labels outside one fold, for a K-th of the run's steps, from an initialisation of its
own: they are weak, but unlike the teacher. Their weight in the targets and the temperature of the mixture are chosen by the
log loss on labels that neither they nor the teacher's head were trained on; the weight is 0 where it gains less than one
standard error.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from tutelage.compute_cost import CostMeter
from tutelage.data.label_budget import folds
from tutelage.data.manifest import load_task
from tutelage.device import accelerator, training_flops
from tutelage.distillation.committee_mixture import mixture_of
from tutelage.features.view_batches import Inference
from tutelage.files import atomic_write, file_hash, hash_of, intact
from tutelage.json_object import JSON
from tutelage.metrics import log_softmax
from tutelage.pipeline.stage import HELD_OUT_LOGITS, checkpoint_steps, open_run, save_weights, training_steps
from tutelage.progress import logger
from tutelage.results import AdaptationResult, CommitteeResult, CurationResult
from tutelage.run_folder import Clock, Run
from tutelage.settings import command, identity
from tutelage.settings.command_flags import CommitteeSettings
from tutelage.tasks import task_of
from tutelage.training.batches import seed_of

if TYPE_CHECKING:
    from accelerate import Accelerator

    from tutelage.finetuning.labels_only import LabelsOnly

UNJUDGED = {  # where no label can be held out: the teacher only
    "folds": 0,
    "weight": 0.0,
    "temperature": 1.0,
    "bias": [],
    "students_temperature": 1.0,
    "students_bias": [],
    "gain": 0.0,
    "standard_error": 0.0,
    "held_out": None,
}
ROWS = 2**16  # held-out pixels, evenly spaced, on which the weight is chosen


@command(CommitteeSettings)
def committee(settings: CommitteeSettings) -> CommitteeResult:
    """Train students on parts of the labels, and choose their weight beside the adapted teacher."""
    from tutelage.finetuning.labels_only import LabelsOnly

    with open_run(settings) as (run, cache_dir):
        curated = CurationResult(**run.result("curate", "committee"))
        adapted = AdaptationResult(**run.result("adapt", "committee"))
        kind, folder = task_of(curated.task), run.path / "committee"
        grid = kind.member_grid(settings, curated.images.transfer, len(curated.classes))
        inputs = hash_of(["committee", curated.outputs, adapted.outputs, grid, identity(settings, kind.UNUSED)])
        if done := run.done("committee", inputs):
            return CommitteeResult(**done, reused=True)
        clock, task = run.clock("committee"), load_task(run.path, cache_dir)
        hardware = accelerator(settings.device, settings.precision)
        fold, meter = folds(task.train.strata, task.train.groups, settings.seed), CostMeter()
        numbers = np.unique(fold).tolist()
        total = max(1, training_steps(settings, len(task.transfer), kind.IMAGES) // len(numbers))
        job = LabelsOnly(kind, task, settings, total, settings.seed, np.arange(0), "committee")
        stage = _Stage(run, job, hardware, clock, inputs, grid, fold)
        truth, fair = kind.member_truth((task.val or task.train).labels, grid, None if task.val else fold)
        found, about, path = UNJUDGED, {}, folder / "students.npy"
        if fair.any() and len(numbers) > 1:
            held, summed = {}, np.zeros(1, np.float32)
            for number in numbers:
                part = _member(stage, number)
                meter.trained += total * settings.batch_size
                meter.train_flops, about = int(part["flops"]), json.loads(str(part["student"]))
                held[number] = part["held"].astype(np.float32)
                summed = summed + part["transfer"].astype(np.float32)
            found = {"folds": len(numbers), **_weighed(stage, held, truth, fair)}
            with atomic_write(path) as temporary, temporary.open("wb") as file:
                np.save(file, log_softmax(summed / len(numbers)).astype(np.float16))
        log_committee(found, int(np.sum(fair.reshape(len(fair), -1).any(axis=1))))
        seconds = clock.stop()
        result = {
            "outputs": hash_of([inputs, file_hash(path) if about else None]),
            "curated": curated.outputs,
            "steps": total,
            "grid": grid,
            **found,
            "images_seen": round(meter.trained),
            "student": about,
            "seconds": seconds,
            "compute_cost": meter.entry(folder, seconds),
        }
        finished = CommitteeResult(**run.finish("committee", inputs, result))
        for kept in sorted(folder.glob("fold-*.npz")):
            kept.unlink()
        return finished


@dataclass(frozen=True)
class _Stage:
    """What the students share. job: one of them, before its own seed and labels. grid: of the log probabilities of masks; None for image
    classification. fold: of each labelled image."""

    run: Run
    job: LabelsOnly
    hardware: Accelerator
    clock: Clock
    inputs: str
    grid: tuple[int, int] | None
    fold: np.ndarray


def _member(stage: _Stage, number: int) -> dict[str, np.ndarray]:
    """Return log probabilities of the student trained without this fold, kept on disk until the stage is done: "transfer", (n, C) or
    (n, C, h, w) float16 of the transfer set, "held" of the validation images or, without any, of the fold; "student": its description as
    JSON, "flops": of a training step for one image."""
    from tutelage.finetuning.labels_only import train_student
    from tutelage.training.checkpoints import Resumable

    path = stage.run.path / "committee" / f"fold-{number}.npz"
    if path.exists():
        with np.load(path) as kept:
            if str(kept["inputs"]) == stage.inputs:
                return dict(kept)

    def tick(count: int) -> None:
        stage.clock.tick()

    seed, rest = seed_of(stage.job.settings.seed, "committee", number), np.flatnonzero(stage.fold != number)
    job = replace(stage.job, seed=seed, positions=rest, what=f"committee, student {number + 1}")
    kind, task, every = job.kind, job.task, checkpoint_steps(job.steps, job.settings.batch_size)
    resumable = Resumable(stage.run.path / "checkpoints", f"committee-{number}", stage.inputs, every)
    student, module = train_student(job, stage.hardware, resumable, tick)
    held = task.val.images if task.val else task.train.images.take(np.flatnonzero(stage.fold == number))
    views, batch = kind.views(job.settings), kind.EVALUATION_BATCH
    on_transfer, on_held = (
        kind.log_probabilities(module, student, Inference(images, views, stage.hardware, None, batch, tick), stage.grid)
        for images in (task.transfer, held)
    )
    save_weights(path.with_suffix(".safetensors"), module)
    flops, about = training_flops(module, student.size), json.dumps(student.about())
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(file, inputs=stage.inputs, flops=flops, student=about, transfer=on_transfer, held=on_held)
    return _member(stage, number)


def _weighed(stage: _Stage, held: dict[int, np.ndarray], truth: np.ndarray, fair: np.ndarray) -> JSON:
    """Return the mixture that is best on held-out labels, as `mixture_of` returns it. held: fold -> "held" of `_member`. truth, fair: what
    `Task.member_truth` returns."""
    import torch

    from tutelage.models.segmentation_grids import regrid

    parts = list(held.values())
    if stage.job.task.val:
        students = np.mean(parts, axis=0)
    else:
        students = np.zeros((len(stage.fold), *parts[0].shape[1:]), np.float32)
        for number, part in held.items():
            students[stage.fold == number] = part
    with np.load(intact(stage.run.path / "adapt" / HELD_OUT_LOGITS)) as file:
        teacher = file["logits"].astype(np.float32)
    if stage.grid:
        teacher = regrid(torch.from_numpy(teacher), stage.grid).numpy()
    images = np.broadcast_to(np.arange(len(truth)).reshape(-1, *[1] * (truth.ndim - 1)), truth.shape)[fair]
    step = max(1, len(images) // ROWS) if stage.grid else 1
    first, second = (np.moveaxis(log_softmax(one), 1, -1)[fair][::step] for one in (teacher, students))
    return mixture_of(first, second, truth[fair][::step], images[::step], biased=stage.grid is not None)


def log_committee(found: JSON, judged: int) -> None:
    """Log the held-out scores of the committee and the weight of its students."""
    if found["held_out"] is None:
        logger.info(
            "committee: no class has labels to hold out, so no weight can be chosen: the targets come from the adapted teacher only"
        )
        return
    scores = ((name, one["log_loss"], 100 * one["accuracy"]) for name, one in found["held_out"].items())
    each = ", ".join(f"{name} {loss:.3f} ({share:.0f} % correct)" for name, loss, share in scores)
    logger.info(
        f"committee: log loss on {judged:,} held-out images: {each}; weight of the labels-only students {found['weight']:.1f}"
    )
