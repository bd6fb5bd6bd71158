"""Stage 2: the committee of the adapted teacher and labels-only students, whose class probabilities are the student's targets.

Each of the K students is trained on the labels outside one fold, for a K-th of the run's steps, from an initialisation of its
own: they are weak, but unlike the teacher. Their weight in the targets and the temperature of the mixture are chosen by the
log loss on labels that neither they nor the teacher's head were trained on; the weight is 0 where it gains less than one
standard error.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tutelage.compute_cost import CostMeter
from tutelage.data.manifest import TaskData
from tutelage.distillation.mixture import mixture_of
from tutelage.metrics import log_softmax
from tutelage.pipeline.stage import HELD_OUT_LOGITS, checkpoint_steps, file_hash, open_run, save_weights, training_steps
from tutelage.progress import logger
from tutelage.results import JSON, AdaptationResult, CommitteeResult, CurationResult
from tutelage.run_folder import Clock, Run, atomic_write, hash_of
from tutelage.settings import command, identity
from tutelage.settings.commands import CommitteeSettings
from tutelage.tasks import Task, task_of

if TYPE_CHECKING:
    from accelerate import Accelerator

UNJUDGED = {  # where no label can be held out: the teacher only
    "folds": 0, "weight": 0.0, "temperature": 1.0, "bias": [], "students_temperature": 1.0, "students_bias": [], "gain": 0.0,
    "standard_error": 0.0, "held_out": None,
}  # fmt: skip
ROWS = 2**16  # held-out pixels, evenly spaced, on which the weight is chosen


@command(CommitteeSettings)
def committee(settings: CommitteeSettings) -> CommitteeResult:
    """Train students on parts of the labels, and choose their weight beside the adapted teacher."""
    from tutelage.data.label_budget import folds
    from tutelage.data.manifest import load_task
    from tutelage.device import accelerator

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
        job = _Job(run, kind, task, settings, hardware, clock, inputs, total, grid, fold)
        truth, fair = kind.member_truth((task.val or task.train).labels, grid, None if task.val else fold)
        found, about, path = UNJUDGED, {}, folder / "students.npy"
        if fair.any() and len(numbers) > 1:
            held, summed = {}, np.zeros(1, np.float32)
            for number in numbers:
                part = _member(job, number)
                meter.trained += total * settings.batch_size
                meter.train_flops, about = int(part["flops"]), json.loads(str(part["student"]))
                held[number] = part["held"].astype(np.float32)
                summed = summed + part["transfer"].astype(np.float32)
            found = {"folds": len(numbers), **_weighed(job, held, truth, fair)}
            with atomic_write(path) as temporary, temporary.open("wb") as file:
                np.save(file, log_softmax(summed / len(numbers)).astype(np.float16))
        log_committee(found, int(np.sum(fair.reshape(len(fair), -1).any(axis=1))))
        seconds = clock.stop()
        result = {
            "outputs": hash_of([inputs, file_hash(path) if about else None]), "curated": curated.outputs, "steps": total, "grid": grid,
            **found, "images_seen": round(meter.trained), "student": about, "seconds": seconds,
            "compute_cost": meter.entry(folder, seconds),
        }  # fmt: skip
        finished = CommitteeResult(**run.finish("committee", inputs, result))
        for kept in sorted(folder.glob("fold-*.npz")):
            kept.unlink()
        return finished


@dataclass(frozen=True)
class _Job:
    """What the students share. steps: of each. grid: of the log probabilities of masks; None for image classification. fold: of each
    labelled image."""

    run: Run
    kind: Task
    task: TaskData
    settings: CommitteeSettings
    hardware: Accelerator
    clock: Clock
    inputs: str
    steps: int
    grid: tuple[int, int] | None
    fold: np.ndarray


def _member(job: _Job, number: int) -> dict[str, np.ndarray]:
    """Return log probabilities of the student trained without this fold, kept on disk until the stage is done.

    Returns:
        "transfer": (n, C) or (n, C, h, w) float16 of the transfer set, "held": of the validation images or, without any, of the fold;
        "student": its description as JSON, "flops": of a training step for one image.
    """
    from tutelage.device import training_flops
    from tutelage.finetuning.labels_only import LabelsOnly, train_student
    from tutelage.training.batches import seed_of
    from tutelage.training.checkpoints import Resumable

    path = job.run.path / "committee" / f"fold-{number}.npz"
    if path.exists():
        with np.load(path) as kept:
            if str(kept["inputs"]) == job.inputs:
                return dict(kept)

    def tick(count: int) -> None:
        job.clock.tick()

    kind, task, settings, rest = job.kind, job.task, job.settings, np.flatnonzero(job.fold != number)
    seed, what = seed_of(settings.seed, "committee", number), f"committee, student {number + 1}"
    every = checkpoint_steps(job.steps, settings.batch_size)
    resumable = Resumable(job.run.path / "checkpoints", f"committee-{number}", job.inputs, every)
    asked = LabelsOnly(kind, task, settings, job.steps, seed, rest, what)
    student, module = train_student(asked, job.hardware, resumable, tick)
    held = task.val.images if task.val else task.train.images.take(np.flatnonzero(job.fold == number))
    how = (kind.views(settings), job.hardware, job.grid, tick)
    on_transfer = kind.log_probabilities(module, student, task.transfer, *how)
    on_held = kind.log_probabilities(module, student, held, *how)
    save_weights(path.with_suffix(".safetensors"), module)
    flops, about = training_flops(module, student.size), json.dumps(student.about())
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(file, inputs=job.inputs, flops=flops, student=about, transfer=on_transfer, held=on_held)
    return _member(job, number)


def _weighed(job: _Job, held: dict[int, np.ndarray], truth: np.ndarray, fair: np.ndarray) -> JSON:
    """Return the mixture that is best on held-out labels, as `mixture_of` returns it.

    Args:
        held: fold -> "held" of `_member`. truth, fair: what `Task.member_truth` returns.
    """
    import torch

    from tutelage.models.segmentation_grids import regrid

    parts = list(held.values())
    if job.task.val:
        students = np.mean(parts, axis=0)
    else:
        students = np.zeros((len(job.fold), *parts[0].shape[1:]), np.float32)
        for number, part in held.items():
            students[job.fold == number] = part
    with np.load(job.run.path / "adapt" / HELD_OUT_LOGITS) as file:
        teacher = file["logits"].astype(np.float32)
    if job.grid:
        teacher = regrid(torch.from_numpy(teacher), job.grid).numpy()
    images = np.broadcast_to(np.arange(len(truth)).reshape(-1, *[1] * (truth.ndim - 1)), truth.shape)[fair]
    step = max(1, len(images) // ROWS) if job.grid else 1
    first, second = (np.moveaxis(log_softmax(one), 1, -1)[fair][::step] for one in (teacher, students))
    return mixture_of(first, second, truth[fair][::step], images[::step], biased=job.grid is not None)


def log_committee(found: JSON, judged: int) -> None:
    """Log the held-out scores of the committee and the weight of its students."""
    scores = found["held_out"]
    if scores is None:
        logger.info(
            "committee: no class has labels to hold out, so no weight can be chosen: the targets come from the adapted teacher only"
        )
        return
    each = ", ".join(
        f"{name} {one['log_loss']:.3f} ({100 * one['accuracy']:.0f} % correct)" for name, one in scores.items()
    )
    logger.info(
        f"committee: log loss on {judged:,} held-out images: {each}; weight of the labels-only students {found['weight']:.1f}"
    )
