"""Stage 1: adapt the teacher to the task with the labelled images.

`probe` fits multinomial logistic regression on frozen features and chooses its strength by validation; `full` fine-tunes the
whole network with smaller learning rates for earlier layers, chooses the number of passes by validation, and then trains on all
labels; `probe-then-full` starts full fine-tuning from the probe; `auto` keeps the mode with the best validation log loss. In
every mode the logits are calibrated on held-out images, because their sharpness becomes that of the student's targets.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np

from tutelage.features.view_batches import CLEAN, view_outputs
from tutelage.models import linear_probe
from tutelage.pipeline.stage import HELD_OUT_LOGITS, open_run, write_metrics
from tutelage.progress import logger, progress
from tutelage.results import AdaptationResult
from tutelage.run_folder import atomic_write, hash_of
from tutelage.settings import command, identity
from tutelage.settings.commands import AdaptSettings
from tutelage.tasks import HeadFitter, Task, task_of

JUDGED = {"accuracy": "accuracy", "miou": "mean IoU", "log_loss": "log loss"}
PIXELS = 2**16  # held-out pixels, evenly spaced over all masks, on which a head is scored
FULL_PASSES = 24  # largest number of passes of full fine-tuning
FULL_RATE = 3e-4  # learning rate of the head at batch 128; earlier layers times LAYER_DECAY per group
LAYER_DECAY = 0.75
THE_TEACHER = ("teacher", "teacher_weights", "teacher_size", "teacher_window")  # known by the encoder's hash and sizes


@command(AdaptSettings)
def adapt(settings: AdaptSettings) -> AdaptationResult:
    """Adapt the teacher to the task: fit a head on the labelled images, or fine-tune the whole network."""
    from tutelage.data.manifest import load_task
    from tutelage.device import accelerator
    from tutelage.models.adapted_teacher import MOST, save_whole
    from tutelage.models.teachers import build_teacher

    with open_run(settings) as (run, cache_dir):
        curated = run.result("curate", "adapt")
        encoder = build_teacher(
            settings.teacher, settings.teacher_weights, settings.teacher_size, settings.teacher_window
        )
        seen_at = [encoder.size, encoder.window] if encoder.window else encoder.size
        inputs = hash_of(["adapt", curated["outputs"], encoder.hash, seen_at, identity(settings, THE_TEACHER)])
        if done := run.done("adapt", inputs):
            return AdaptationResult(**done, reused=True)
        clock, task = run.clock("adapt"), load_task(run.path, cache_dir)
        hardware, kind = accelerator(settings.device, settings.precision), task_of(task.task)
        work = _TeacherFitter(kind, task, encoder, cache_dir, settings, hardware, clock)
        found: dict[str, dict[str, Any]] = {}
        if settings.adapt != "full":
            found["probe"] = work.probe()
        if settings.adapt in ("full", "auto"):
            found["full"] = work.full(None)
        if settings.adapt in ("probe-then-full", "auto"):
            found["probe-then-full"] = work.full(found["probe"])
        mode = min(found, key=lambda name: found[name]["log_loss"]) if settings.adapt == "auto" else settings.adapt
        best = found[mode]
        for name, one in found.items():
            scores = ", ".join(f"{title} {one[key]:.3f}" for key, title in JUDGED.items() if key in one)
            logger.info(f"teacher, {name}: validation {scores}")
        if not work.fair.any():
            logger.info(
                "no class has labels to hold out: nothing could be validated, and the probe is not calibrated on this task"
            )
        elif best["accuracy"] < 1.5 / len(task.classes):
            logger.info("the teacher is hardly better than chance on validation: the student can learn little from it")
        if mode == "probe":
            best["head"].save(run.path / "adapt")
        else:
            save_whole(run.path / "adapt", best["module"])
        write_metrics(run, "adapt", best.get("rows", ()), settings.tracker, hardware)
        with atomic_write(run.path / "adapt" / HELD_OUT_LOGITS) as path, path.open("wb") as file:
            logits = best["logits"].clip(-MOST, MOST).astype(np.float16)
            np.savez(file, logits=logits, labels=work.judged, fair=work.fair)
        about = {
            name: getattr(encoder, name)
            for name in ("name", "size", "mean", "std", "features", "licence", "weights", "hash", "window")
            if name != "window" or encoder.window
        }
        seconds = clock.stop()
        run.update_settings({"teacher": {k: list(v) if isinstance(v, tuple) else v for k, v in about.items()}})
        result = {
            "outputs": hash_of([inputs, mode]), "curated": curated["outputs"], "mode": mode,
            **kind.teacher_entries(encoder, work.network, mode, len(task.classes)),
            "teacher": about, "classes": len(task.classes),
            "validation": {name: {k: one[k] for k in (*JUDGED, "temperature", "choice") if k in one} for name, one in found.items()},
            "validated_on": work.validated_on, "labels": len(task.train) + (len(task.val) if task.val else 0),
            "seconds": seconds, "compute_cost": work.meter.entry(run.path / "adapt", seconds),
        }  # fmt: skip
        return AdaptationResult(**run.finish("adapt", inputs, result))


class _TeacherFitter:
    """State of the stage: the images, features and folds that the modes share."""

    def __init__(self, kind: Task, task, encoder, cache_dir, settings, hardware, clock):
        from tutelage.compute_cost import CostMeter
        from tutelage.data.label_budget import folds
        from tutelage.features.output_cache import OutputCache

        self.kind, self.task, self.encoder, self.settings = kind, task, encoder, settings
        self.hardware, self.clock, self.views = hardware, clock, kind.views(settings)
        self.network, self.meter = kind.frozen_network(encoder, hardware), CostMeter()
        self.meter.teacher_flops, self.meter.output_bytes = kind.flops_of(encoder), 2 * self.network.width  # float16
        self.cache = OutputCache(cache_dir, self.network, self.views.resize, task.side)
        train = task.train
        self.folds = None if task.val else folds(train.strata, train.groups, settings.seed)
        self.truth = kind.head_truth(train.labels, self.network)
        self.judged = kind.head_truth(task.val.labels, self.network) if task.val else self.truth
        self.fair = self.judged < len(task.classes)
        if self.folds is not None:
            self.fair &= linear_probe.judgeable(self.truth, self.folds)
        count = 0 if self.folds is None else len(np.unique(self.folds))
        self.validated_on = f"{len(task.val)} validation images" if task.val else f"{count}-fold cross-validation"

    def features(self, images) -> np.ndarray:
        """Return (n, D) float32 features of whole images, from the cache; compute and cache the missing ones."""
        from tutelage.features.output_cache import compute_outputs

        with progress("teacher features", len(images)) as advance:
            tick = self.clock.ticking(advance)
            computed = compute_outputs(self.cache, self.network, images, [CLEAN], self.views, tick)
        self.meter.asked(CLEAN, images.keys.tobytes(), len(images), computed)
        return self.cache.table(images, CLEAN).rows()

    def probe(self) -> dict[str, Any]:
        """Choose the probe's strength by validation, fit it on all labels, and calibrate its logits."""
        train = self.task.train
        features = self.features(train.images)
        fitter = self.fitter()
        tried = {}
        for strength in fitter.strengths:  # takes a second or two on 100 images
            if self.folds is None:
                head = fitter.fit(features, self.truth, strength)
                logits = head(self.features(self.task.val.images))
            else:
                logits = fitter.cross_validate(features, self.truth, self.folds, strength)
            tried[strength] = self.judge(logits)
            self.clock.tick()
        strength = min(tried, key=lambda s: tried[s]["log_loss"]) if self.fair.any() else fitter.default_strength
        head = self.fitted(np.arange(len(train)), strength, tried[strength]["temperature"])
        return {**tried[strength], "head": head, "strength": strength, "choice": f"strength {strength:g}"}

    def fitted(self, positions: np.ndarray, strength: float, temperature: float):
        """Return a calibrated probe fitted on the labelled images at these positions."""
        features, truth = self.features(self.task.train.images)[positions], self.truth[positions]
        head = self.fitter().fit(features, truth, strength)
        return head.calibrated(temperature)

    def fitter(self) -> HeadFitter:
        """Return what fits heads; it may learn the scale of the features from a sample of the transfer set."""

        def of(count: int) -> np.ndarray:
            sample = np.random.default_rng(0).permutation(len(self.task.transfer))[:count]
            return self.features(self.task.transfer.take(np.sort(sample)))

        return self.kind.head_fitter(self.network, of, len(self.task.classes), self.settings.class_weight)

    def judge(self, logits: np.ndarray) -> dict[str, Any]:
        """Return accuracy and, after calibration, log loss of held-out logits (n, C), or (n, C, h, w) for pixels."""
        if not self.fair.any():
            temperature = linear_probe.UNJUDGED["temperature"]
            return {"accuracy": 0.0, "log_loss": 0.0, "temperature": temperature, "logits": logits / temperature}
        fair, labels = np.moveaxis(logits, 1, -1)[self.fair], self.judged[self.fair]
        step = 1 if logits.ndim == 2 else -(-len(labels) // PIXELS)
        fair, labels = fair[::step], labels[::step]
        temperature = linear_probe.best_temperature(fair, labels)
        loss = float(linear_probe.log_loss(fair / temperature, labels).mean())
        accuracy = float((fair.argmax(1) == labels).mean())
        more = self.kind.extra_metrics(fair, labels)
        calibrated = {"temperature": temperature, "logits": logits / temperature}
        return {**more, "accuracy": accuracy, "log_loss": loss, **calibrated}

    def full(self, probe: dict[str, Any] | None) -> dict[str, Any]:
        """Choose the number of passes by validation, then fine-tune on all labels; start from the probe if one is given."""
        train, head = self.task.train, probe and probe["head"]
        passes = [FULL_PASSES // 4, FULL_PASSES // 2, FULL_PASSES]
        tried = {}
        for count in passes:  # early stopping over whole schedules: a short cosine schedule is not a long one cut off
            if self.folds is None:
                logits = self.logits(self.fine_tune(head, np.arange(len(train)), count), self.task.val.images)
            else:
                logits = np.zeros((len(train), len(self.task.classes), *self.truth.shape[1:]), np.float32)
                for fold in np.unique(self.folds):
                    held = np.flatnonzero(self.folds == fold)
                    module = self.fine_tune(self.head_for(probe, held), np.flatnonzero(self.folds != fold), count)
                    logits[held] = self.logits(module, train.images.take(held))
            tried[count] = self.judge(logits)
            if len(tried) > 1 and tried[count]["log_loss"] > tried[passes[len(tried) - 2]]["log_loss"]:
                break
        best = min(tried, key=lambda n: tried[n]["log_loss"])
        rows: list[dict[str, Any]] = []
        module = self.fine_tune(head, np.arange(len(train)), best, rows.append)
        module.temperature.fill_(tried[best]["temperature"])  # pyright: ignore[reportCallIssue]
        return {**tried[best], "module": module, "rows": rows, "choice": f"{best} passes"}

    def head_for(self, probe: dict[str, Any] | None, held: np.ndarray):
        """Return the probe refitted with the same strength and temperature, without the held-out images."""
        if probe is None:
            return None
        rest = np.setdiff1d(np.arange(len(self.task.train)), held)
        return self.fitted(rest, probe["strength"], probe["temperature"])

    def fine_tune(self, head, positions, passes: int, log: Callable[[dict[str, Any]], None] = lambda row: None):
        """Return the whole teacher after fine-tuning on these labelled images. log: takes step, loss and rate."""
        import torch

        from tutelage.device import training_flops
        from tutelage.finetuning import supervised
        from tutelage.models.teachers import decayed_parameter_groups
        from tutelage.training import batches, loop, optimization

        train, seed, batch = self.task.train, self.settings.seed, max(2, min(self.kind.TEACHER_BATCH, len(positions)))
        torch.manual_seed(batches.seed_of(seed, "teacher head"))
        classes, backbone = len(self.task.classes), copy.deepcopy(self.encoder.module)
        module, backbone, last = self.kind.whole_teacher(self.encoder, backbone, classes, head)
        module.requires_grad_(True).to(self.hardware.device)
        rate = optimization.scaled_rate(FULL_RATE, batch)
        groups = decayed_parameter_groups(backbone, rate, optimization.WEIGHT_DECAY, LAYER_DECAY)
        groups.append({"params": list(last.parameters()), "lr_scale": 1.0, "weight_decay": optimization.WEIGHT_DECAY})
        steps = supervised.epochs_to_steps(passes, len(positions), batch)
        self.meter.trained += steps * batch
        self.meter.train_flops = self.meter.train_flops or training_flops(module, self.encoder.size)
        # BatchNorm keeps its pretrained statistics: with those of batches of a few labels a perfect probe fell to 0.71
        weight, views = self.settings.class_weight, self.views
        plan = supervised.Plan(steps, batch, rate, seed, classes, weight, statistics=False, views=views)
        with progress(f"fine-tune teacher, {passes} passes", steps * batch) as advance:
            watch = loop.Watch("fine-tuning the teacher", log, self.clock.ticking(advance))
            how = (plan, self.hardware, watch)
            return supervised.train_on_labels(module, self.encoder, train.take(positions), *how, groups=groups)

    def logits(self, module, images) -> np.ndarray:
        forward = self.kind.head_forward(module, self.network)
        how = (images, CLEAN, self.views, self.hardware, self.kind.EVALUATION_BATCH)
        return view_outputs(forward, module, self.encoder, *how)
