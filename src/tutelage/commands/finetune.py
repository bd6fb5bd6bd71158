"""The last stage: choose the student to deliver: the distilled student unchanged, fine-tuned on the labels, or the baseline.

Only images whose labels were used neither for a student nor for its targets can decide this. With a validation split, the distilled
student, the ways of fine-tuning it (`head` trains its last layer; `full` all layers at a small learning rate; `long` at a larger one,
for more steps) and the baseline are scored on it. A tie keeps the distilled student; the baseline is delivered where it is better by
more than a standard error. Without a validation split the distilled student is delivered unchanged, since nothing can judge it. A
student distilled without labels has no head yet: it gets one by logistic regression on its features, and the ways of fine-tuning are
then cross-validated; one for masks is trained as a whole, at larger learning rates for more steps (`long`, `steep`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tutelage.compute_cost import CostMeter
from tutelage.data.image_cache import Images
from tutelage.data.label_budget import folds
from tutelage.data.manifest import load_task
from tutelage.data.masks import Labels
from tutelage.device import accelerator, training_flops
from tutelage.features.view_batches import CLEAN, Inference, view_outputs
from tutelage.files import atomic_write, file_hash, hash_of
from tutelage.json_object import JSON
from tutelage.metrics import paired_gain
from tutelage.models import linear_probe
from tutelage.pipeline.finished_exports import move_old_export
from tutelage.pipeline.stage import HELD_OUT, PilotResult, judged_by, open_run, save_weights, write_metrics
from tutelage.progress import logger, progress
from tutelage.results import CurationResult, DistillationResult, FinetuneResult, StudentResult
from tutelage.run_folder import Run
from tutelage.settings import command, identity
from tutelage.settings.command_flags import FinetuneSettings
from tutelage.tasks import task_of

if TYPE_CHECKING:
    from torch import nn

    from tutelage.models.students import Student
    from tutelage.tasks.base import Predictions

    Scores = dict[str, dict[str, float]]  # candidate -> its mean score, gain and standard error

HEAD_VIEWS = 4  # of each labelled image, besides the whole image, on which a head is fitted
SCALE_SAMPLE = 1024  # images of the transfer set from which the scale of the features is estimated


@command(FinetuneSettings)
def finetune(settings: FinetuneSettings) -> FinetuneResult:
    """Fine-tune the distilled student on the labelled images where that helps, and choose the student to deliver."""
    from tutelage.pipeline.load_student import load_student

    with open_run(settings) as (run, cache_dir):
        curated = CurationResult(**run.result("curate", "finetune"))
        distilled = DistillationResult(**run.result("distill", "finetune"))
        auto = settings.finetune == "auto"
        piloted = judged_by(run) if auto else None
        found = run.results()["baseline"] if auto and (curated.images.val or piloted) else None
        baseline = StudentResult(**found) if found else None
        outputs = [one and one.outputs for one in (curated, distilled, baseline, piloted)]
        inputs = hash_of(["finetune", *outputs, identity(settings)])
        if done := run.done("finetune", inputs):
            return FinetuneResult(**done, reused=True)
        work, folder = _LastStage(run, cache_dir, settings, distilled), run.path / "finetune"
        other = load_student(run.path / "baseline", baseline.student, len(curated.classes)) if baseline else None
        if piloted:
            delivered, validation, judged_on = _of_pilot(piloted)
        else:
            delivered, validation = _choice(work, settings.finetune, other, folder / HELD_OUT)
            judged_on = _judged_on(work, validation)
        module, rows = (other.module, []) if other and delivered == "baseline" else work.on_all(delivered)
        write_metrics(run, "finetune", rows, settings.tracker, work.hardware)
        save_weights(folder / "weights.safetensors", module)
        entry = (baseline if baseline and delivered == "baseline" else distilled).student.to_json()
        seconds = work.clock.stop()
        result = {
            "outputs": file_hash(folder / "weights.safetensors"),
            "curated": curated.outputs,
            "delivered": delivered,
            "validation": validation,
            "judged_on": judged_on,
            "student": entry,
            "seconds": seconds,
            "compute_cost": work.meter.entry(folder, seconds),
        }
        finished = run.finish("finetune", inputs, result)
        move_old_export(run)
        return FinetuneResult(**finished)


def _choice(work: _LastStage, finetune: str, baseline: Student | None, held_out: Path) -> tuple[str, Scores]:
    """Return what is delivered, and the scores of the candidates on held-out images; no scores where nothing can judge. held_out: file for
    the delivered student's confidence on these images, and whether it was right, from which `export` sets a threshold."""
    kind, val = work.kind, work.task.val
    if finetune != "auto":
        if work.headless and finetune == "keep":
            logger.info("the student was distilled without labels and has no head to keep: it gets one from the labels")
            return kind.FROM_FEATURES[0], {}
        return ("distilled" if finetune == "keep" else finetune), {}
    if val is None and not work.headless:
        logger.info(
            "last stage: the distilled student is delivered unchanged; without a validation split (--val) nothing can judge it"
        )
        return "distilled", {}
    ways = kind.FROM_FEATURES if work.headless else kind.FROM_LOGITS
    predictions = {how: work.held_out(how) for how in ways}
    if baseline is not None and val is not None:
        predictions["baseline"] = list(work.predict(baseline.module.to(work.hardware.device), val.images, val.labels))
    truth = (val or work.task.train).labels
    right = {how: kind.image_scores(one, truth) for how, one in predictions.items()}
    delivered, validation = ways[0], {}
    for how, one in right.items():
        gain, error = paired_gain(one, right[delivered if how == "baseline" else ways[0]])
        validation[how] = {kind.IMAGE_SCORE: float(np.mean(one)), "gain": gain, "standard_error": error}
        better = how == "baseline" or gain > validation[delivered]["gain"]
        delivered = how if how != ways[0] and gain > error * (1 + 1e-9) and better else delivered
    scores = ", ".join(f"{how} {one[kind.IMAGE_SCORE]:.3f}" for how, one in validation.items())
    logger.info(f"last stage: {delivered} is delivered; validation {kind.SCORE_TITLE} {scores}")
    if (sure := kind.confidence(predictions[delivered], truth)) is not None:
        with atomic_write(held_out) as temporary, temporary.open("wb") as file:
            np.savez(file, confidence=sure[0], right=sure[1])
    return delivered, validation


def _of_pilot(found: PilotResult) -> tuple[str, Scores, str]:
    """Return what is delivered by a pilot's result, the scores of the candidates, and which images decided."""
    validation = {
        "distilled": {"accuracy": found.distilled, "gain": 0.0, "standard_error": 0.0},
        "baseline": {"accuracy": found.baseline, "gain": found.gain, "standard_error": found.standard_error},
    }
    delivered = "baseline" if found.gain > found.standard_error * (1 + 1e-9) else "distilled"
    return delivered, validation, f"{found.images} labels, each held out of a run of its own"


def _judged_on(work: _LastStage, validation: Scores) -> str:
    """Return which images decided what is delivered; an empty text where none did."""
    if not validation:
        return ""
    return f"{len(work.task.val)} validation images" if work.task.val else "cross-validation"


class _LastStage:
    """What the ways of running the last stage share. headless: whether the student has no head, or a decoder of random weights."""

    def __init__(self, run: Run, cache_dir: Path, settings: FinetuneSettings, distilled: DistillationResult):
        from tutelage.pipeline.load_student import load_student

        self.settings, self.headless, self.meter = settings, not distilled.head, CostMeter()
        self.clock, self.task = run.clock("finetune"), load_task(run.path, cache_dir)
        self.kind, self.hardware = task_of(self.task.task), accelerator(settings.device, settings.precision)
        self.views = self.kind.views(settings)
        self.student = load_student(run.path / "distill", distilled.student, len(self.task.classes))
        self.meter.train_flops = training_flops(self.student.module, self.student.size)
        self._on_all: dict[str, tuple[nn.Module, list[JSON]]] = {}

    def held_out(self, how: str) -> list[np.ndarray]:
        """Return predictions for each validation image; without any, cross-validated predictions for each labelled image."""
        train = self.task.train
        if self.task.val:
            return list(self.predict(self.on_all(how)[0], self.task.val.images, self.task.val.labels))
        fold = folds(train.strata, train.groups, self.settings.seed)
        predictions: dict[int, np.ndarray] = {}
        for number in np.unique(fold):
            held = np.flatnonzero(fold == number)
            module = self.trained(how, np.flatnonzero(fold != number))
            found = self.predict(module, train.images.take(held), train.labels[held])
            predictions |= zip(held.tolist(), found, strict=True)
        return [predictions[position] for position in range(len(train))]

    def on_all(self, how: str) -> tuple[nn.Module, list[JSON]]:
        """Return the student after the last stage on all labelled images, trained only once, and its log rows."""
        if how not in self._on_all:
            rows: list[JSON] = []
            self._on_all[how] = self.trained(how, np.arange(len(self.task.train)), rows.append), rows
        return self._on_all[how]

    def trained(self, how: str, positions: np.ndarray, log: Callable[[JSON], None] = lambda row: None) -> nn.Module:
        """Return a copy of the student after the last stage on these labelled images. log: takes step, loss and rate."""
        from tutelage.finetuning import supervised
        from tutelage.models.students import head_of
        from tutelage.training import loop, optimization

        module = copy.deepcopy(self.student.module).to(self.hardware.device)
        if how == "distilled":
            return module.eval()
        kind = self.kind
        if self.headless and not self.student.decoder:
            self.give_head(module, positions)
            if how == "head":
                return module.eval()
        module.requires_grad_(how != "head")
        head_of(module).requires_grad_(True)
        s, batch = self.settings, max(2, min(kind.FINETUNE_BATCH, len(positions)))
        steps = supervised.epochs_to_steps(kind.PASSES[how], len(positions), batch)
        self.meter.trained += steps * batch
        rate = optimization.scaled_rate(kind.RATES[how], batch)
        labelled, more = self.task.train.take(positions), {"backbone": how != "head", "views": self.views}
        plan = supervised.Plan(steps, batch, rate, s.seed, len(self.task.classes), s.class_weight, **more)
        with progress(f"last stage, {how}", steps * batch) as advance:
            watch = loop.Watch("fine-tuning the student", log, self.clock.ticking(advance))
            return supervised.train_on_labels(module, self.student, labelled, plan, self.hardware, watch)

    def give_head(self, module: nn.Module, positions: np.ndarray) -> None:
        """Fit a head by logistic regression on the student's features of these labelled images, several views of each."""
        import torch

        from tutelage.models.students import head_of

        features, scale, strength = self.features
        mine = linear_probe.stacked(features[:, positions], self.task.train.strata[positions])
        head = linear_probe.fit_probe(*mine, len(self.task.classes), strength, scale, self.settings.class_weight)
        with torch.no_grad():
            for name, value in (("weight", head.weight), ("bias", head.bias)):
                parameter = head_of(module).get_parameter(name)
                parameter.copy_(torch.from_numpy(value).to(parameter.device).reshape(parameter.shape))

    @cached_property
    def features(self) -> tuple[np.ndarray, linear_probe.Scale, float]:
        """(1 + HEAD_VIEWS, n, D) float32 features of the labelled images, whole images first; their scale; the head's strength."""
        train, transfer, module = self.task.train, self.task.transfer, self.student.module.to(self.hardware.device)
        sample = np.sort(np.random.default_rng(0).permutation(len(transfer))[:SCALE_SAMPLE])
        of = np.stack([self.pooled(module, train.images, number) for number in (CLEAN, *range(HEAD_VIEWS))])
        scale = linear_probe.scale_of(self.pooled(module, transfer.take(sample), CLEAN))
        fold = folds(train.strata, train.groups, self.settings.seed)
        return of, scale, linear_probe.best_strength(of, train.strata, fold, len(self.task.classes), scale)

    def pooled(self, module: nn.Module, images: Images, number: int) -> np.ndarray:
        """Return the student's (n, D) float32 features of one view of each image."""
        from tutelage.models.students import pooled

        inference = Inference(images, self.views, self.hardware)
        return view_outputs(partial(pooled, module), module, self.student, inference, number)

    def predict(self, module: nn.Module, images: Images, labels: Labels) -> Predictions:
        """Return a student's predictions for each image, in the form of its task."""
        inference = Inference(images, self.views, self.hardware, labels, self.kind.EVALUATION_BATCH)
        return self.kind.student_predictions(module, self.student, inference)
