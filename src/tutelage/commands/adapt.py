"""Stage 1: adapt the teacher to the task with the labelled images.

`probe` fits multinomial logistic regression on frozen features and chooses its strength by validation; `full` fine-tunes the
whole network with smaller learning rates for earlier layers, chooses the number of passes by validation, and then trains on all
labels; `probe-then-full` starts full fine-tuning from the probe; `transductive` fits a head on the labels and on the pool, and
keeps the probe where held-out labels do not clearly prefer that head; `auto` keeps the mode with the best validation log loss.
In every mode the logits are calibrated on held-out images, because their sharpness becomes that of the student's targets.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tutelage.compute_cost import CostMeter
from tutelage.data.image_cache import Images
from tutelage.data.label_budget import folds
from tutelage.data.manifest import load_task
from tutelage.device import accelerator, training_flops
from tutelage.features.view_batches import CLEAN, Inference, view_outputs
from tutelage.files import atomic_write, hash_of
from tutelage.json_object import JSON
from tutelage.metrics import log_softmax, paired_gain
from tutelage.models import linear_probe
from tutelage.pipeline.stage import HELD_OUT_LOGITS, open_run, save_weights, write_metrics
from tutelage.progress import logger, progress
from tutelage.results import AdaptationResult, CurationResult
from tutelage.run_folder import Run
from tutelage.settings import command, identity
from tutelage.settings.command_flags import AdaptSettings
from tutelage.tasks import task_of

if TYPE_CHECKING:
    from torch import nn

    from tutelage.models.teachers import FrozenEncoder
    from tutelage.tasks.base import TeacherHead

JUDGED = {"accuracy": "accuracy", "miou": "mean IoU", "log_loss": "log loss"}
PIXELS = 2**16  # held-out pixels, evenly spaced over all masks, on which a head is scored
FULL_PASSES = 24  # largest number of passes of full fine-tuning
FULL_RATE = 3e-4  # learning rate of the head at batch 128; earlier layers times LAYER_DECAY per group
LAYER_DECAY = 0.75
CLEARLY = 2.0  # standard errors; with 1, the transductive head was taken for drawings that it got wrong more often
THE_TEACHER = ("teacher", "teacher_weights", "teacher_size", "teacher_window")  # known by the encoder's hash and sizes


@command(AdaptSettings)
def adapt(settings: AdaptSettings) -> AdaptationResult:
    """Adapt the teacher to the task: fit a head on the labelled images, or fine-tune the whole network."""
    from tutelage.models.adapted_teacher import MOST
    from tutelage.models.teachers import build_teacher

    with open_run(settings) as (run, cache_dir):
        curated = CurationResult(**run.result("curate", "adapt"))
        encoder = build_teacher(*(getattr(settings, name) for name in THE_TEACHER))
        seen_at = [encoder.size, encoder.window] if encoder.window else encoder.size
        inputs = hash_of(["adapt", curated.outputs, encoder.hash, seen_at, identity(settings, THE_TEACHER)])
        if done := run.done("adapt", inputs):
            return AdaptationResult(**done, reused=True)
        work = _Work(run, cache_dir, settings, encoder)
        found = _tried(work, settings.adapt)
        auto = settings.adapt == "auto"
        mode = min(found, key=lambda name: found[name].scores["log_loss"]) if auto else [*found][-1]
        best, classes, folder = found[mode], len(work.task.classes), run.path / "adapt"
        for name, one in found.items():
            scores = ", ".join(f"{title} {one.scores[key]:.3f}" for key, title in JUDGED.items() if key in one.scores)
            logger.info(f"teacher, {name}: validation {scores}")
        if not work.fair.any():
            logger.info(
                "no class has labels to hold out: nothing could be validated, and the probe is not calibrated on this task"
            )
        elif best.scores["accuracy"] < 1.5 / classes:
            logger.info("the teacher is hardly better than chance on validation: the student can learn little from it")
        if best.module is not None:
            save_weights(folder / "weights.safetensors", best.module)
        elif best.head is not None:
            best.head.save(folder)
        write_metrics(run, "adapt", best.rows, settings.tracker, work.hardware)
        with atomic_write(folder / HELD_OUT_LOGITS) as path, path.open("wb") as file:
            logits = best.logits.clip(-MOST, MOST).astype(np.float16)
            np.savez(file, logits=logits, labels=work.judged, fair=work.fair)
        about = {name: one for name, one in vars(encoder).items() if name != "module" and one is not None}
        about |= {"mean": list(encoder.mean), "std": list(encoder.std)}
        seconds = work.clock.stop()
        run.update_settings({"teacher": about})
        train, val = len(work.task.train), len(work.task.val) if work.task.val else 0
        by_folds = f"{0 if work.folds is None else len(np.unique(work.folds))}-fold cross-validation"
        result = {
            "outputs": hash_of([inputs, mode]),
            "curated": curated.outputs,
            "mode": mode,
            **work.kind.teacher_entries(encoder, work.network, mode, classes),
            "teacher": about,
            "classes": classes,
            "validation": {name: {**one.scores, "choice": one.choice} for name, one in found.items()},
            "validated_on": f"{val} validation images" if val else by_folds,
            "labels": train + val,
            "seconds": seconds,
            "compute_cost": work.meter.entry(folder, seconds),
        }
        return AdaptationResult(**run.finish("adapt", inputs, result))


@dataclass(frozen=True)
class _Adapted:
    """The teacher in one mode: a head, or the whole fine-tuned module. scores: on held-out labels, and the temperature by which their
    logits were divided. choice: what validation chose, in words. refit: fits the same head on the labelled images at some positions. rows:
    of the log."""

    scores: dict[str, float]
    logits: np.ndarray
    choice: str
    head: TeacherHead | None = None
    refit: Callable[[np.ndarray], TeacherHead] | None = None
    module: nn.Module | None = None
    rows: list[JSON] = field(default_factory=list)


class _Work:
    """What all modes share; nothing of it changes but the meter. network: the frozen encoder, whose outputs are in the cache. folds: of
    each labelled image; None where there are validation images. truth: labels on which heads are fitted. judged: those of the images that
    validate, of which `fair` can be judged."""

    def __init__(self, run: Run, cache_dir: Path, settings: AdaptSettings, encoder: FrozenEncoder):
        from tutelage.features.output_cache import OutputCache

        self.settings, self.encoder, self.meter = settings, encoder, CostMeter()
        self.clock, self.task = run.clock("adapt"), load_task(run.path, cache_dir)
        self.hardware, kind = accelerator(settings.device, settings.precision), task_of(self.task.task)
        self.kind, self.views, self.network = kind, kind.views(settings), kind.frozen_network(encoder, self.hardware)
        self.meter.teacher_flops, self.meter.output_bytes = kind.flops_of(encoder), 2 * self.network.width  # float16
        self.cache = OutputCache(cache_dir, self.network, self.views.resize, self.task.side)
        train, val = self.task.train, self.task.val
        self.folds = None if val else folds(train.strata, train.groups, settings.seed)
        self.truth = kind.head_truth(train.labels, self.network)
        self.judged = kind.head_truth(val.labels, self.network) if val else self.truth
        self.fair = self.judged < len(self.task.classes)
        if self.folds is not None:
            self.fair &= linear_probe.judgeable(self.truth, self.folds)


def _tried(work: _Work, adapt: str) -> dict[str, _Adapted]:
    """Return the modes that --adapt asks for, with those that they start from before them."""
    found: dict[str, _Adapted] = {}
    if adapt != "full":
        found["probe"] = _probe(work)
    if adapt in ("transductive", "auto"):
        found |= _transductive(work, found["probe"])
    if adapt in ("full", "auto"):
        found["full"] = _full(work, None)
    if adapt in ("probe-then-full", "auto"):
        found["probe-then-full"] = _full(work, found["probe"])
    return found


def _features(work: _Work, images: Images) -> np.ndarray:
    """Return (n, D) float32 features of whole images, from the cache; compute and cache the missing ones."""
    from tutelage.features.output_cache import compute_outputs

    with progress("teacher features", len(images)) as advance:
        tick = work.clock.ticking(advance)
        computed = compute_outputs(work.cache, work.network, images, [CLEAN], work.views, tick)
    work.meter.asked(CLEAN, images.keys.tobytes(), len(images), computed)
    return work.cache.table(images, CLEAN).rows()


def _pool_features(work: _Work, count: int) -> np.ndarray:
    """Return the features of at most `count` images of the transfer set, drawn at random."""
    sample = np.random.default_rng(0).permutation(len(work.task.transfer))[:count]
    return _features(work, work.task.transfer.take(np.sort(sample)))


def _probe(work: _Work) -> _Adapted:
    """Choose the probe's strength by validation, fit it on all labels, and calibrate its logits."""
    task, truth = work.task, work.truth
    features = _features(work, task.train.images)

    sampled = partial(_pool_features, work)  # the scale of the features may be learnt from the transfer set
    fitter = work.kind.head_fitter(work.network, sampled, len(task.classes), work.settings.class_weight)
    tried: dict[float, tuple[dict[str, float], np.ndarray]] = {}
    for strength in fitter.strengths if work.fair.any() else ():  # takes a second or two on 100 images
        if task.val:
            logits = fitter.fit(strength, features, truth)(_features(work, task.val.images))
        else:
            assert work.folds is not None
            fit = partial(fitter.fit, strength)
            logits = linear_probe.cross_validate(fit, features[None], truth, work.folds, len(task.classes))
        tried[strength] = _judged(work, logits)
        work.clock.tick()
    strength = min(tried, key=lambda s: tried[s][0]["log_loss"], default=fitter.strength)
    scores, logits = tried.get(strength) or _unjudged(work, fitter.temperature)

    def fitted(positions: np.ndarray) -> TeacherHead:
        some = _features(work, task.train.images)[positions]
        return fitter.fit(strength, some, truth[positions]).calibrated(scores["temperature"])

    return _Adapted(scores, logits, f"strength {strength:g}", fitted(np.arange(len(task.train))), fitted)


def _transductive(work: _Work, probe: _Adapted) -> dict[str, _Adapted]:
    """Fit the transductive head; return it only if its held-out log loss is better than the probe's by CLEARLY standard errors, paired by
    image, since a pool that is unlike the labels misleads it."""
    from tutelage.models.transductive_head import POOL, expected_shares, fit_transductive

    task, truth, weight = work.task, work.truth, work.settings.class_weight
    if truth.ndim > 1 or not work.fair.any():  # masks; or nothing could judge it
        return {}
    features, pool = _features(work, task.train.images), _pool_features(work, POOL)
    scale = linear_probe.scale_of(pool)

    def fitted(positions: np.ndarray) -> TeacherHead:
        assert probe.refit
        shares = expected_shares(log_softmax(probe.refit(positions)(pool)))
        return fit_transductive(features[positions], truth[positions], pool, shares, scale, weight)

    whole = fitted(np.arange(len(truth)))
    logits = (
        whole(_features(work, task.val.images))
        if task.val
        else _by_fold(work, lambda rest, held: fitted(rest)(features[held]))
    )
    scores, logits = _judged(work, logits)
    each = (-linear_probe.log_loss(one[work.fair], work.judged[work.fair]) for one in (logits, probe.logits))
    gain, error = paired_gain(*each)
    found = f"its held-out log loss is {gain:.3f} ± {error:.3f} better than the probe's"
    if kept := gain > CLEARLY * error:
        logger.info(f"teacher, transductive head: {found}")
    else:
        logger.info(f"teacher, transductive head: {found}, which is not clear: the probe is kept")
    head = whole.calibrated(scores["temperature"])
    return {"transductive": _Adapted(scores, logits, f"a pool of {len(pool):,} images", head)} if kept else {}


def _judged(work: _Work, logits: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
    """Calibrate held-out logits (n, C), or (n, C, h, w) for pixels; return their scores and temperature, and the calibrated logits."""
    fair, labels = np.moveaxis(logits, 1, -1)[work.fair], work.judged[work.fair]
    step = 1 if logits.ndim == 2 else -(-len(labels) // PIXELS)
    fair, labels = fair[::step], labels[::step]
    temperature = linear_probe.best_temperature(fair, labels)
    scores = {"accuracy": float((fair.argmax(1) == labels).mean()), **work.kind.extra_metrics(fair, labels)}
    scores["log_loss"] = float(linear_probe.log_loss(fair / temperature, labels).mean())
    return {**scores, "temperature": temperature}, logits / temperature


def _unjudged(work: _Work, temperature: float) -> tuple[dict[str, float], np.ndarray]:
    """Return what `_judged` returns where no label can be held out: no scores, and logits that nobody reads."""
    logits = np.zeros((len(work.judged), len(work.task.classes), *work.judged.shape[1:]), np.float32)
    return {"accuracy": 0.0, "log_loss": 0.0, "temperature": temperature}, logits


def _full(work: _Work, probe: _Adapted | None) -> _Adapted:
    """Choose the number of passes by validation, then fine-tune on all labels; start from the probe if one is given."""
    task, head = work.task, probe.head if probe else None
    passes, every = [FULL_PASSES // 4, FULL_PASSES // 2, FULL_PASSES], np.arange(len(task.train))
    tried: dict[int, tuple[dict[str, float], np.ndarray]] = {}
    if not work.fair.any():
        passes, tried = [], {passes[0]: _unjudged(work, 1.0)}
    for count in passes:  # early stopping over whole schedules: a short cosine schedule is not a long one cut off
        if task.val:
            logits = _logits(work, _fine_tuned(work, head, every, count), task.val.images)
        else:

            def outside(rest: np.ndarray, held: np.ndarray, count: int = count) -> np.ndarray:
                start = probe.refit(rest) if probe and probe.refit else None
                return _logits(work, _fine_tuned(work, start, rest, count), task.train.images.take(held))

            logits = _by_fold(work, outside)
        tried[count] = _judged(work, logits)
        if len(tried) > 1 and tried[count][0]["log_loss"] > tried[passes[len(tried) - 2]][0]["log_loss"]:
            break
    best = min(tried, key=lambda n: tried[n][0]["log_loss"])
    rows: list[JSON] = []
    module = _fine_tuned(work, head, every, best, rows.append)
    module.get_buffer("temperature").fill_(tried[best][0]["temperature"])
    return _Adapted(*tried[best], f"{best} passes", module=module, rows=rows)


def _by_fold(work: _Work, logits_of: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """Return the logits of each labelled image by a teacher adapted without its fold. logits_of: positions to adapt on, those held out."""
    assert work.folds is not None
    logits = np.zeros((len(work.truth), len(work.task.classes), *work.truth.shape[1:]), np.float32)
    for fold in np.unique(work.folds):
        held = work.folds == fold
        logits[held] = logits_of(np.flatnonzero(~held), np.flatnonzero(held))
        work.clock.tick()
    return logits


def _fine_tuned(
    work: _Work,
    head: TeacherHead | None,
    positions: np.ndarray,
    passes: int,
    log: Callable[[JSON], None] = lambda row: None,
) -> nn.Module:
    """Return the whole teacher after fine-tuning on these labelled images. log: takes step, loss and rate."""
    import torch

    from tutelage.finetuning import supervised
    from tutelage.models.teachers import decayed_parameter_groups
    from tutelage.training import batches, loop, optimization

    seed, batch = work.settings.seed, max(2, min(work.kind.TEACHER_BATCH, len(positions)))
    torch.manual_seed(batches.seed_of(seed, "teacher head"))
    classes, backbone = len(work.task.classes), copy.deepcopy(work.encoder.module)
    module, backbone, last = work.kind.whole_teacher(work.encoder, backbone, classes, head)
    module.requires_grad_(True).to(work.hardware.device)
    rate = optimization.scaled_rate(FULL_RATE, batch)
    groups = decayed_parameter_groups(backbone, rate, optimization.WEIGHT_DECAY, LAYER_DECAY)
    groups.append({"params": list(last.parameters()), "lr_scale": 1.0, "weight_decay": optimization.WEIGHT_DECAY})
    steps = supervised.epochs_to_steps(passes, len(positions), batch)
    work.meter.trained += steps * batch
    work.meter.train_flops = work.meter.train_flops or training_flops(module, work.encoder.size)
    # BatchNorm keeps its pretrained statistics: with those of batches of a few labels a perfect probe fell to 0.71
    weight, views = work.settings.class_weight, work.views
    plan = supervised.Plan(steps, batch, rate, seed, classes, weight, statistics=False, views=views)
    labelled = work.task.train.take(positions)
    with progress(f"fine-tune teacher, {passes} passes", steps * batch) as advance:
        watch = loop.Watch("fine-tuning the teacher", log, work.clock.ticking(advance))
        return supervised.train_on_labels(module, work.encoder, labelled, plan, work.hardware, watch, groups=groups)


def _logits(work: _Work, module: nn.Module, images: Images) -> np.ndarray:
    inference = Inference(images, work.views, work.hardware, batch_size=work.kind.EVALUATION_BATCH)
    return view_outputs(work.kind.head_forward(module, work.network), module, work.encoder, inference, CLEAN)
