"""Stage 3: distil the targets into the student on the transfer set.

Each image has one target: the class probabilities of the committee, that is, of the adapted teacher (on the whole image, and
on its mirror image where flips are on) and of students trained on the labels only, mixed with a weight chosen on held-out
labels. The student sees a new view of the image in every pass. A share of each batch is drawn from the labelled images with
their true labels. `--objective` selects other ways to distil, with which this method is compared.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tutelage.errors import TutelageError
from tutelage.features.view_batches import ViewSettings
from tutelage.pipeline.stage import MetricsLog, checkpoint_steps, file_hash, open_run, save_weights, training_steps
from tutelage.progress import progress, say
from tutelage.run_folder import Clock, Run, hash_of
from tutelage.settings import command, identity
from tutelage.settings.commands import WITHOUT_TARGETS, DistillSettings
from tutelage.tasks import Task, peak_rate, task_of

LEARNT_ON = 1000  # images of the transfer set on which student and targets are compared


@command(DistillSettings)
def distill(settings: DistillSettings) -> dict[str, Any]:
    """Distil the targets into the student, on the transfer set.

    Returns:
        result of the stage: steps, images seen, labelled images in a batch, loss, seconds for the targets and for training.
    """
    from tutelage.device import accelerator

    with open_run(settings, together=True) as (run, cache_dir):
        job = _Job(run, cache_dir, settings)
        hardware = accelerator(settings.device, settings.precision)
        with hardware.main_process_first():  # it may copy the stage from another run of a study
            done = run.done("distill", job.inputs)
        return {**done, "reused": True} if done else job.run_stage(hardware)


@dataclass(frozen=True)
class _Schedule:
    """Length of the training. steps: of the optimizer. shown: images of full size in a step. small: side of `dino`'s small crops."""

    steps: int
    shown: float
    small: Any


@dataclass(frozen=True)
class _Job:
    """One distillation, derived from its settings and the results of earlier stages."""

    run: Run
    cache_dir: Path
    settings: DistillSettings

    @cached_property
    def curated(self) -> dict[str, Any]:
        return self.run.result("curate", "distill")

    @cached_property
    def kind(self) -> Task:
        return task_of(self.curated["task"])

    @cached_property
    def adapted(self) -> dict[str, Any] | None:
        return None if self.settings.objective == "dino" else self.run.result("adapt", "distill")

    @cached_property
    def members(self) -> dict[str, Any] | None:
        """The committee's result; None where the targets do not come from a committee."""
        used = self.settings.objective not in WITHOUT_TARGETS and self.settings.committee != "none"
        return self.run.result("committee", "distill") if used else None

    @cached_property
    def labelled(self) -> int:
        """Number of labelled images in a batch."""
        from tutelage.distillation.distill_loop import labelled_images

        images, share = self.curated["images"], self.settings.label_share
        if self.settings.objective == "dino":
            return 0
        return labelled_images(share, images["train"], images["transfer"], self.settings.batch_size)

    @cached_property
    def label_free(self) -> bool:
        """Whether the student learns nothing from the labels."""
        return self.settings.objective in WITHOUT_TARGETS and not self.labelled

    @cached_property
    def task(self) -> Any:
        """The images and labels, loaded on first use: a finished stage does not open them."""
        from tutelage.data.manifest import load_task
        from tutelage.distillation.prepare_targets import without_labels

        task = load_task(self.run.path, self.cache_dir)
        return without_labels(task) if self.label_free else task

    @cached_property
    def views(self) -> ViewSettings:
        return self.kind.views(self.settings)

    @cached_property
    def looks(self) -> tuple[int, ...]:
        """The views of an image on which the teacher is run; for `task-agnostic`, which matches features, only the whole image."""
        return self.views.looks[:1] if self.settings.objective == "task-agnostic" else self.views.looks

    @cached_property
    def level(self) -> int | None:
        """Index of the first of the task's kinds of outputs that fits the cache limit; None: the teacher runs online."""
        from tutelage.features.output_cache import gibibytes

        if self.adapted is None:
            return 0
        count, limit = self.curated["images"]["transfer"], self.settings.cache_limit
        widths = self.kind.widths(self.adapted, self.settings)
        fits = (i for i, width in enumerate(widths) if gibibytes(count, len(self.looks), width) <= limit)
        return next(fits, None)

    @cached_property
    def inputs(self) -> str:
        """Hash of all that the student depends on; label-free objectives depend on the images only, not on their labels."""
        from tutelage.data.manifest import transfer_keys

        images, teacher = self.curated["outputs"], self.adapted
        if self.label_free:
            images = hash_of([b"".join(sorted(transfer_keys(self.run.path))).hex(), len(self.curated["classes"])])
        if teacher is not None:
            about = teacher["teacher"]
            window = [about["window"]] if about.get("window") else []
            frozen = [about["hash"], about["size"], *window]
            teacher = frozen if self.settings.objective == "task-agnostic" else teacher["outputs"]
        used = identity(self.settings, self.kind.UNUSED)
        if self.label_free:  # no class label is used
            used["class_weight"] = "none"
        members = self.members and self.members["outputs"]
        return hash_of(["distill", images, teacher, members, self.level or self.level is None, self.labelled, used])

    def targets(self, hardware: Any, meter: Any) -> tuple[Any, float]:
        """Return the student's targets, and the seconds they took, summed over restarts; None and 0 for `dino`."""
        from tutelage.distillation.mixture import Mixture, sharpness_of
        from tutelage.distillation.prepare_targets import member_outputs, projected_features
        from tutelage.distillation.targets import Targets

        if self.adapted is None:
            return None, 0.0
        s, task_agnostic = self.settings, self.settings.objective == "task-agnostic"
        clock = Clock(self.run.path / "distill" / "target_seconds.json")
        mixture, students, outputs = Mixture(sharpness=s.sharpness or 1.0), None, None
        if self.members:
            mixture = Mixture.of(self.members, s.committee, s.sharpness or 1.0)
            students = member_outputs(self.run.path / "committee", self.kind.grid(s)) if mixture.weight > 0 else None
        if mixture.weight < 1:
            outputs = self.teacher_outputs(task_agnostic, hardware, clock, meter)

        def log_probabilities(positions: np.ndarray) -> np.ndarray:
            if task_agnostic:  # no class probabilities are needed
                return np.zeros((len(positions), 0), np.float32)
            of_students = students(positions) if students else None
            if of_students is not None and mixture.weight == 1:
                return mixture(of_students, None)
            assert outputs is not None
            return mixture(outputs.log_probabilities(positions), of_students)

        if s.sharpness is None and not task_agnostic:
            some = np.linspace(0, len(self.task.transfer) - 1, self.kind.COUNTED).astype(np.int64)
            mixture = replace(mixture, sharpness=sharpness_of(log_probabilities(np.unique(some))))
        matched = outputs if outputs and (task_agnostic or self.matches_features(outputs)) else None
        features = projected_features(matched) if matched else None
        seconds = clock.tick(force=True) if hardware.is_main_process else 0.0
        return Targets(self.task.transfer, self.views, log_probabilities, features, mixture.sharpness), seconds

    def matches_features(self, outputs: Any) -> bool:
        """Whether the student also matches the teacher's pooled features: where this is asked for and they are kept."""
        s, pooled = self.settings, not outputs.network.shape
        asked = s.feature_weight > 0 and s.objective == "task-oriented" and pooled
        if asked and outputs.network.output != "features":
            say(
                "only the teacher's logits are kept (fine-tuned, or beyond --cache-limit): its features are not matched"
            )
        return asked and outputs.network.output == "features"

    def teacher_outputs(self, needs_features: bool, hardware: Any, clock: Clock, meter: Any) -> Any:
        """Return the adapted teacher's outputs for the transfer set, in the form that the cache limit allows."""
        from tutelage.device import flops
        from tutelage.distillation.prepare_targets import log_reduction, teacher_outputs

        assert self.adapted is not None
        s, folder = self.settings, self.run.path / "adapt"
        teacher = self.kind.teacher_for_distillation(folder, self.adapted, s, hardware, self.level or 0)
        if needs_features and teacher.network.output != "features":
            raise TutelageError(
                f"--objective {s.objective} needs the features of a frozen teacher, but only logits are kept "
                "(fine-tuned, or beyond --cache-limit)",
                "use --objective task-oriented, --adapt probe, or a larger --cache-limit",
            )
        if self.level and teacher.network.shape:
            whole = self.kind.teacher_for_distillation(folder, self.adapted, s, hardware, 0)
            log_reduction(whole, teacher, self.task.transfer, self.views)
        meter.teacher_flops = flops(teacher.module, teacher.network.size)
        return teacher_outputs(
            self.task, teacher, self.views, self.looks, s.cache_limit, self.cache_dir, hardware, clock, meter
        )

    def student(self, width: int, hardware: Any) -> tuple[Any, Any]:
        """Return the module to train, and the student inside it. width: of the features to match, 0 for none."""
        import torch

        from tutelage.training import batches

        s = self.settings
        torch.manual_seed(batches.seed_of(s.seed, "student"))
        built = self.kind.student(s, len(self.task.classes))
        module = self.kind.distillation_module(built, width, s).to(hardware.device)
        return (module.to(memory_format=torch.channels_last) if built.channels_last else module), built

    def schedule(self, module: Any, built: Any, meter: Any) -> _Schedule:
        """Return the length of the training, and record its cost in the meter."""
        from tutelage.device import training_flops
        from tutelage.distillation import self_distillation

        s, batch_size = self.settings, self.settings.batch_size
        steps = training_steps(s, len(self.task.transfer), self.kind.IMAGES)
        shown, small, extra = float(batch_size), built.size, 0
        if s.objective == "dino":  # as many pixels as with the other objectives
            small = self_distillation.small_side(built.module, built.size)
            shown = self_distillation.images_in_a_step(batch_size, built.size, small)
            steps = max(1, round(steps * batch_size / shown))
            # the averaged network processes the large crops, and the head crops of every size
            extra = self_distillation.extra_flops(module, built, batch_size / shown)
        meter.trained, meter.train_flops = steps * shown, training_flops(module, built.size) + extra
        if self.level is None and self.settings.committee != "only":  # the teacher runs at every step
            asked = steps * batch_size * len(self.looks)
            meter.asked(0, b"online", asked, asked)
        return _Schedule(steps, shown, small)

    def train(
        self, module: Any, built: Any, targets: Any, schedule: _Schedule, hardware: Any, clock: Clock
    ) -> tuple[Any, float | None]:
        """Train the student; return its module with the averaged weights, and the last loss."""
        from tutelage.distillation import self_distillation
        from tutelage.distillation.distill_loop import Plan, class_weights, distill_student
        from tutelage.training import checkpoints, loop, optimization

        s, run, main, dino = self.settings, self.run, hardware.is_main_process, self.settings.objective == "dino"
        rate, steps, shown = peak_rate(s, self.kind), schedule.steps, schedule.shown
        optimizer = optimization.optimizer_for(module, rate, hardware.device)
        # `dino` takes its targets from the average, which must not follow the first steps too quickly
        average = optimization.EMA(module, self_distillation.DECAY if dino else optimization.EMA_DECAY, steady=dino)
        every = checkpoint_steps(steps, round(shown))
        resumable = checkpoints.Resumable(run.path / "checkpoints", "distill", self.inputs, every)
        if start := resumable.start:
            say(f"distill goes on after step {start:,} of {steps:,}")
        hardware.wait_for_everyone()
        module, optimizer = hardware.prepare(module, optimizer)
        metrics = MetricsLog(run.path / "distill" / "metrics.jsonl", start, s.tracker, run.path, hardware)
        matching = (s.temperature, s.objective, s.task_agnostic_loss, self.labelled, s.feature_weight)
        plan = Plan(steps, s.batch_size, rate, s.seed, *matching)
        more: dict[str, Any] = {"optimizer": optimizer, "average": average, "resumable": resumable}
        with progress("distill", round(steps * shown), round(start * shown)) as advance:
            watch = loop.Watch("distill", metrics.write, clock.ticking(advance) if main else advance)
            if dino:
                how = (self.task.transfer, self.views, plan, hardware, watch)
                self_distillation.self_distill(module, built, schedule.small, *how, **more)
            else:
                weighted = s.class_weight == "balanced" and s.objective != "task-agnostic"
                more["class_weights"] = class_weights(targets, self.kind) if weighted else None
                more |= {"labels": self.task.train.labels, "classes": len(self.task.classes)}
                distill_student(module, built, targets, plan, hardware, watch, **more)
        metrics.close()
        hardware.wait_for_everyone()
        plain = hardware.unwrap_model(module)
        plain.load_state_dict(average.state)
        return plain, metrics.last

    def learnt(self, student: Any, built: Any, targets: Any, hardware: Any) -> dict[str, Any]:
        """Return statistics of the targets of some images, and how often the student agrees with them; empty without targets."""
        first = len(self.task.train) if self.labelled and len(self.task.train) < len(self.task.transfer) else 0
        sample = first + np.random.default_rng(0).permutation(len(self.task.transfer) - first)[:LEARNT_ON]
        asked = targets.log_probabilities(sample)
        if not asked.shape[1]:
            return {}
        images, grid = self.task.transfer.take(sample), self.kind.grid(self.settings)
        found = self.kind.log_probabilities(student, built, images, self.views, hardware, grid, lambda n: None)
        shares = np.moveaxis(np.exp(asked), 1, -1).reshape(-1, asked.shape[1]).mean(axis=0)
        return {
            "sharpness": targets.sharpness,
            "target_shares": [round(float(share), 4) for share in shares],
            "agreement_with_targets": float((found.argmax(axis=1) == asked.argmax(axis=1)).mean()),
        }

    def run_stage(self, hardware: Any) -> dict[str, Any]:
        """Train the student, and write its weights and the result of the stage."""
        from tutelage.compute_cost import CostMeter

        run, meter = self.run, CostMeter()
        targets, target_seconds = self.targets(hardware, meter)
        width = targets.matched(np.zeros(1, np.int64), np.zeros(1, np.int64)).shape[1] if targets else 0
        module, built = self.student(width, hardware)
        schedule, clock = self.schedule(module, built, meter), run.clock("distill")
        module, loss = self.train(module, built, targets, schedule, hardware, clock)
        if hardware.is_main_process:
            path, module = run.path / "distill" / "weights.safetensors", getattr(module, "student", module)
            save_weights(path, module.state_dict())
            learnt = self.learnt(module, built, targets, hardware) if targets else {}
            seconds = clock.stop()
            result = {
                "outputs": hash_of([self.inputs, file_hash(path)]), "student": built.about(), "curated": self.curated["outputs"], **learnt,
                "objective": self.settings.objective, "head": not self.label_free, "steps": schedule.steps,
                "images_seen": round(schedule.steps * schedule.shown), "labelled_in_batch": self.labelled,
                "processes": hardware.num_processes, "loss": loss, "online": self.level is None, "seconds": seconds,
                "target_seconds": target_seconds, "compute_cost": meter.entry(run.path / "distill", seconds, target_seconds),
            }  # fmt: skip
            run.finish("distill", self.inputs, result)
            (run.path / "distill" / "target_seconds.json").unlink(missing_ok=True)
        hardware.wait_for_everyone()
        return run.result("distill", "distill")
