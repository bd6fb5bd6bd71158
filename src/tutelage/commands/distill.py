"""Stage 3: distil the targets into the student on the transfer set.

Each image has one target: the class probabilities of the committee, that is, of the adapted teacher (on the whole image, and
on its mirror image where flips are on) and of students trained on the labels only, mixed with a weight chosen on held-out
labels. The student sees a new view of the image in every pass. A share of each batch is drawn from the labelled images with
their true labels. `--objective` selects other ways to distil, with which this method is compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tutelage.compute_cost import CostMeter
from tutelage.data.manifest import TaskData, load_task, transfer_keys
from tutelage.device import accelerator, flops, training_flops
from tutelage.distillation.committee_mixture import Mixture
from tutelage.errors import TutelageError
from tutelage.features.view_batches import Inference, ViewSettings
from tutelage.files import file_hash, hash_of
from tutelage.image_size import sides
from tutelage.json_object import JSON
from tutelage.pipeline.stage import MetricsLog, checkpoint_steps, open_run, save_weights, training_steps
from tutelage.progress import logger, progress
from tutelage.results import AdaptationResult, CommitteeResult, CurationResult, DistillationResult
from tutelage.run_folder import Clock, Run
from tutelage.settings import command, identity
from tutelage.settings.command_flags import WITHOUT_TARGETS, DistillSettings
from tutelage.tasks import Task, peak_rate, task_of
from tutelage.training.batches import seed_of

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from tutelage.distillation.targets import Targets, TeacherOutputs
    from tutelage.models.students import Student

LEARNT_ON = 1000  # images of the transfer set on which student and targets are compared


@command(DistillSettings)
def distill(settings: DistillSettings) -> DistillationResult:
    """Distil the targets into the student, on the transfer set."""
    with open_run(settings, together=True) as (run, cache_dir):
        job = distillation_of(run, cache_dir, settings)
        hardware = accelerator(settings.device, settings.precision)
        with hardware.main_process_first():  # it may copy the stage from another run of a study
            done = run.done("distill", job.inputs)
        if done:
            return DistillationResult(**done, reused=True)
        _distil(job, hardware)
        return DistillationResult(**run.result("distill", "distill"))


@dataclass(frozen=True)
class _Distillation:
    """What a distillation depends on. curated, adapted, committee: results of earlier stages; None where there is no teacher (`dino`), or
    where the targets are not a committee's. labelled: number of labelled images in a batch. looks: the views of an image on which the
    teacher runs. level: index of the first of the task's kinds of outputs that fits the cache limit; None: the teacher runs at every
    step."""

    run: Run
    cache_dir: Path
    settings: DistillSettings
    kind: Task
    curated: CurationResult
    adapted: AdaptationResult | None
    committee: CommitteeResult | None
    labelled: int
    views: ViewSettings
    looks: tuple[int, ...]
    level: int | None

    @property
    def label_free(self) -> bool:
        """Whether the student learns nothing from the labels."""
        return self.settings.objective in WITHOUT_TARGETS and not self.labelled

    @cached_property
    def inputs(self) -> str:
        """Hash of all that the student depends on; label-free objectives depend on the images only, not on their labels."""
        images, teacher = self.curated.outputs, None
        if self.label_free:
            images = hash_of([b"".join(sorted(transfer_keys(self.run.path))).hex(), len(self.curated.classes)])
        if self.adapted is not None:
            about = self.adapted.teacher
            frozen = [about.hash, about.size, *([about.window] if about.window else [])]
            teacher = frozen if self.settings.objective == "task-agnostic" else self.adapted.outputs
        used = identity(self.settings, self.kind.UNUSED)
        if self.label_free:  # no class label is used
            used["class_weight"] = "none"
        members = self.committee and self.committee.outputs
        return hash_of(["distill", images, teacher, members, self.level or self.level is None, self.labelled, used])


def distillation_of(run: Run, cache_dir: Path, settings: DistillSettings) -> _Distillation:
    """Return what a distillation depends on.

    Raises:
        TutelageError: an earlier stage is not finished.
    """
    from tutelage.distillation.distill_loop import labelled_images
    from tutelage.features.output_cache import gibibytes

    curated, objective = CurationResult(**run.result("curate", "distill")), settings.objective
    kind, images = task_of(curated.task), curated.images
    adapted = None if objective == "dino" else AdaptationResult(**run.result("adapt", "distill"))
    mixed = objective not in WITHOUT_TARGETS and settings.committee != "none"
    committee = CommitteeResult(**run.result("committee", "distill")) if mixed else None
    labelled, level, views = 0, 0, kind.views(settings)
    # features are matched of the whole image only
    looks = views.looks[:1] if objective == "task-agnostic" else views.looks
    if adapted is not None:
        labelled = labelled_images(settings.label_share, images.train, images.transfer, settings.batch_size)
        sizes = (gibibytes(images.transfer, len(looks), width) for width in kind.widths(adapted, settings))
        level = next((i for i, size in enumerate(sizes) if size <= settings.cache_limit), None)
    return _Distillation(run, cache_dir, settings, kind, curated, adapted, committee, labelled, views, looks, level)


def _distil(job: _Distillation, hardware: Accelerator) -> None:
    """Train the student, and write its weights and the result of the stage."""
    import torch

    from tutelage.distillation.prepare_targets import without_labels

    run, meter, task, folder = job.run, CostMeter(), load_task(job.run.path, job.cache_dir), job.run.path / "distill"
    task = without_labels(task) if job.label_free else task
    target_clock = Clock(folder / "target_seconds.json")
    targets = targets_of(job, task, hardware, target_clock, meter) if job.adapted else None
    target_seconds = target_clock.tick(force=True) if targets and hardware.is_main_process else 0.0
    first = np.zeros(1, np.int64)
    width = targets.matched(first, first).shape[1] if targets else 0
    torch.manual_seed(seed_of(job.settings.seed, "student"))
    built = job.kind.student(job.settings, len(task.classes))
    module = job.kind.distillation_module(built, width, job.settings).to(hardware.device)
    module = module.to(memory_format=torch.channels_last) if built.channels_last else module
    training, clock = _training(job, module, built, len(task.transfer), meter), run.clock("distill")
    loss = _train(job, task, training, targets, hardware, clock)
    if hardware.is_main_process:
        path = folder / "weights.safetensors"
        save_weights(path, built.module)
        learnt = _learnt(job, task, built, targets, hardware) if targets else {}
        seconds = clock.stop()
        result = {
            "outputs": hash_of([job.inputs, file_hash(path)]), "student": built.about(), "curated": job.curated.outputs, **learnt,
            "objective": job.settings.objective, "head": not job.label_free, "steps": training.steps,
            "images_seen": round(training.steps * training.shown), "labelled_in_batch": job.labelled,
            "processes": hardware.num_processes, "loss": loss, "online": job.level is None, "seconds": seconds,
            "target_seconds": target_seconds, "compute_cost": meter.entry(folder, seconds, target_seconds),
        }  # fmt: skip
        run.finish("distill", job.inputs, result)
        (folder / "target_seconds.json").unlink(missing_ok=True)
    hardware.wait_for_everyone()


def targets_of(
    job: _Distillation, task: TaskData, hardware: Accelerator, clock: Clock | None, meter: CostMeter
) -> Targets:
    """Return the student's targets. clock: measures the time that they take."""
    from tutelage.distillation.prepare_targets import member_outputs, projected_features
    from tutelage.distillation.targets import Targets

    s, task_agnostic = job.settings, job.settings.objective == "task-agnostic"
    mixture, students, outputs = Mixture(), None, None
    if job.committee:
        mixture = Mixture.of(job.committee, s.committee)
        students = member_outputs(job.run.path / "committee", job.kind.grid(s)) if mixture.weight > 0 else None
    if mixture.weight < 1:
        outputs = _teacher_outputs(job, task, hardware, clock, meter)

    def log_probabilities(positions: np.ndarray) -> np.ndarray:
        if task_agnostic:  # no class probabilities are needed
            return np.zeros((len(positions), 0), np.float32)
        of_teacher = outputs.log_probabilities(positions) if outputs else None
        return mixture(of_teacher, students(positions) if students else None)

    matched = outputs is not None and (task_agnostic or _matches_features(job, outputs))
    features = projected_features(outputs) if outputs and matched else None
    return Targets(task.transfer, job.views, log_probabilities, features)


def _matches_features(job: _Distillation, outputs: TeacherOutputs) -> bool:
    """Whether the student also matches the teacher's pooled features: where this is asked for and they are kept."""
    asked = job.settings.feature_weight > 0 and job.settings.objective == "task-oriented" and not outputs.network.shape
    kept = outputs.network.output == "features"
    if asked and not kept:
        why = "only the teacher's logits are kept (fine-tuned, or beyond --cache-limit)"
        logger.info(f"{why}: its features are not matched")
    return asked and kept


def _teacher_outputs(
    job: _Distillation, task: TaskData, hardware: Accelerator, clock: Clock | None, meter: CostMeter
) -> TeacherOutputs:
    """Return the adapted teacher's outputs for the transfer set, in the form that the cache limit allows."""
    from tutelage.distillation.prepare_targets import log_reduction, teacher_outputs
    from tutelage.features.output_cache import OutputCache

    assert job.adapted is not None
    s, folder = job.settings, job.run.path / "adapt"
    teacher = job.kind.teacher_for_distillation(folder, job.adapted, s, hardware, job.level or 0)
    if s.objective == "task-agnostic" and teacher.network.output != "features":
        raise TutelageError(
            f"--objective {s.objective} needs the features of a frozen teacher, but only logits are kept "
            "(fine-tuned, or beyond --cache-limit)",
            "use --objective task-oriented, --adapt probe, or a larger --cache-limit",
        )
    if job.level and teacher.network.shape:
        whole = job.kind.teacher_for_distillation(folder, job.adapted, s, hardware, 0)
        log_reduction(whole, teacher, task.transfer, job.views)
    meter.teacher_flops = flops(teacher.module, teacher.network.size)
    store = (job.cache_dir, teacher.network, job.views.resize, task.side)
    cache = None if job.level is None else OutputCache(*store)
    return teacher_outputs(task.transfer, teacher, job.views, job.looks, cache, hardware, clock, meter)


@dataclass(frozen=True)
class _Training:
    """module: the network to train, with the student `built` in it. steps: of the optimizer. shown: images of full size in a step.
    small: side of `dino`'s small crops."""

    module: nn.Module
    built: Student
    steps: int
    shown: float
    small: int


def _training(job: _Distillation, module: nn.Module, built: Student, images: int, meter: CostMeter) -> _Training:
    """Return the network with the length of its training, and record the cost in the meter. images: of the transfer set."""
    from tutelage.distillation import self_distillation

    s, batch_size = job.settings, job.settings.batch_size
    steps = training_steps(s, images, job.kind.IMAGES)
    shown, small, extra = float(batch_size), 0, 0
    if s.objective == "dino":  # as many pixels as with the other objectives
        side = sides(built.size)[0]
        small = self_distillation.small_side(built.module, side)
        shown = self_distillation.images_in_a_step(batch_size, side, small)
        steps = max(1, round(steps * batch_size / shown))
        # the averaged network processes the large crops, and the head crops of every size
        extra = self_distillation.extra_flops(module, built, batch_size / shown)
    meter.trained, meter.train_flops = steps * shown, training_flops(module, built.size) + extra
    if job.level is None and s.committee != "only":  # the teacher runs at every step
        asked = steps * batch_size * len(job.looks)
        meter.asked(0, b"online", asked, asked)
    return _Training(module, built, steps, shown, small)


def _train(
    job: _Distillation,
    task: TaskData,
    training: _Training,
    targets: Targets | None,
    hardware: Accelerator,
    clock: Clock,
) -> float | None:
    """Train the student, which then has the averaged weights; return the last loss."""
    from tutelage.distillation import self_distillation
    from tutelage.distillation.distill_loop import Plan, class_weights, distill_student
    from tutelage.training import checkpoints, loop, optimization

    s, run, steps, shown = job.settings, job.run, training.steps, training.shown
    rate = peak_rate(s, job.kind)
    optimizer = optimization.optimizer_for(training.module, rate, hardware.device)
    # `dino` takes its targets from the average, which must not follow the first steps too quickly
    decay = optimization.EMA_DECAY if targets else self_distillation.DECAY
    average = optimization.EMA(training.module, decay, steady=targets is None)
    every = checkpoint_steps(steps, round(shown))
    resumable = checkpoints.Resumable(run.path / "checkpoints", "distill", job.inputs, every)
    if start := resumable.start:
        logger.info(f"distill goes on after step {start:,} of {steps:,}")
    hardware.wait_for_everyone()
    prepared, optimizer = hardware.prepare(training.module, optimizer)
    metrics = MetricsLog(run.path / "distill" / "metrics.jsonl", start, s.tracker, run.path, hardware)
    matching = (s.temperature, s.objective, s.task_agnostic_loss, job.labelled, s.feature_weight)
    weighted = s.class_weight == "balanced" and s.objective != "task-agnostic"
    weights = class_weights(targets, job.kind) if targets and weighted else None
    plan = Plan(steps, s.batch_size, rate, s.seed, *matching, weights)
    state = loop.TrainState(prepared, optimizer, average, resumable)
    with progress("distill", round(steps * shown), round(start * shown)) as advance:
        watch = loop.Watch("distill", metrics.write, clock.ticking(advance) if hardware.is_main_process else advance)
        if targets is None:
            how = (task.transfer, job.views, plan, hardware, watch)
            self_distillation.self_distill(state, training.built, training.small, *how)
        else:
            labels, classes = task.train.labels, len(task.classes)
            distill_student(state, training.built, targets, plan, hardware, watch, labels, classes)
    metrics.close()
    hardware.wait_for_everyone()
    hardware.unwrap_model(prepared).load_state_dict(average.state)
    return metrics.last


def _learnt(job: _Distillation, task: TaskData, built: Student, targets: Targets, hardware: Accelerator) -> JSON:
    """Return statistics of the targets of some images, and how often the student agrees with them; empty without targets."""
    first = len(task.train) if job.labelled and len(task.train) < len(task.transfer) else 0
    sample = first + np.random.default_rng(0).permutation(len(task.transfer) - first)[:LEARNT_ON]
    asked = targets.log_probabilities(sample)
    if not asked.shape[1]:
        return {}
    inference = Inference(task.transfer.take(sample), job.views, hardware, batch_size=job.kind.EVALUATION_BATCH)
    found = job.kind.log_probabilities(built.module, built, inference, job.kind.grid(job.settings))
    shares = np.moveaxis(np.exp(asked), 1, -1).reshape(-1, asked.shape[1]).mean(axis=0)
    return {
        "target_shares": [round(float(share), 4) for share in shares],
        "agreement_with_targets": float((found.argmax(axis=1) == asked.argmax(axis=1)).mean()),
    }
