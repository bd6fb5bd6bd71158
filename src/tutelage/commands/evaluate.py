"""Scores of distilled student, baseline, delivered student, teacher and committee, on test images that were used for no choice.

Evaluation uses whole images, decoded and resized by data/decode.py as in export and predict.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tutelage.data.image_cache import Images, Store
from tutelage.data.manifest import Labelled, TaskData, load_task
from tutelage.data.masks import Labels
from tutelage.data.target_set import TargetSet
from tutelage.device import accelerator, flops, latency_ms
from tutelage.distillation.committee_mixture import Mixture
from tutelage.errors import TutelageError, number_of, shown
from tutelage.features.view_batches import Inference, ViewSettings
from tutelage.files import hash_of
from tutelage.json_object import JSON
from tutelage.metrics import log_softmax
from tutelage.pipeline.stage import open_run
from tutelage.progress import Advance, logger, progress
from tutelage.results import (
    AdaptationResult,
    CommitteeResult,
    CurationResult,
    DistillationResult,
    EvaluationResult,
    FinetuneResult,
    StudentEntry,
    StudentResult,
)
from tutelage.run_folder import TRAINED, Run
from tutelage.settings import command, declared
from tutelage.settings.command_flags import EvaluateSettings
from tutelage.settings.shared_flags import Views
from tutelage.tasks import Task, task_of

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from tutelage.models.adapted_teacher import AdaptedTeacher
    from tutelage.tasks.base import Grid, Network, Predictions

    Stages = dict[str, JSON | None]  # result of each stage, or None
    Scored = tuple[
        JSON, Predictions | None
    ]  # a model's scores, and its predictions for the test images, if there are any

TIMED_FLOPS = 1e12  # for one image, about half a minute on one thread; a larger teacher is not timed
LEARNT_ON = 1000  # images of the transfer set on which student and teacher are compared
MADE = {  # stage -> what its result.json holds
    "curate": CurationResult,
    "adapt": AdaptationResult,
    "committee": CommitteeResult,
    "distill": DistillationResult,
    "baseline": StudentResult,
    "finetune": FinetuneResult,
}
STUDENTS = {"distilled": "distill", "baseline": "baseline", "delivered": "finetune"}  # model -> its folder
NAMED = 20  # largest number of unusable images that a message names


@command(EvaluateSettings)
def evaluate(settings: EvaluateSettings) -> EvaluationResult:
    """Score the models of a run on its test images, or on the images of another target set."""
    from tutelage.reporting.example_predictions import remove_evidence
    from tutelage.reporting.page import write_page

    if not (Path(settings.run) / "settings.toml").exists():
        hint = f"use a folder that `tutelage run` has written, or run `tutelage run --out {settings.run} ...` first"
        raise TutelageError(f"{settings.run} is not a run folder", hint)
    with open_run(settings) as (run, cache_dir):
        kept = run.chosen()
        stages = _results(run)
        for name, result in stages.items():
            if result:
                MADE[name](**result)  # a file that holds something else is an error
        inputs = run.evaluation_inputs()
        if settings.target is None and (done := run.done("evaluate", inputs)):
            write_page(run.path)
            return EvaluationResult(**done, reused=True)
        clock = run.clock("evaluate")
        context = _context(run, stages, cache_dir, kept, settings)
        result, predictions = _scores(context)
        if settings.target is not None:
            return EvaluationResult(run=str(run.path), target=settings.target, **result)
        remove_evidence(run.path / "evaluate")
        if context.test is not None:
            context.kind.keep_evidence(run.path / "evaluate", context.test, predictions, context.task.about)
        finished = run.finish("evaluate", inputs, {**result, "seconds": clock.stop()})
        write_page(run.path)
        return EvaluationResult(**finished)


def _results(run: Run) -> Stages:
    """Return the result of each stage; None where it is missing or was made from another transfer set.

    Raises:
        TutelageError: a stage that was scored before is gone, or its folder holds weights, but not their result.json.
    """
    stages, before = {name: run.kept(name) for name in TRAINED}, run.kept("evaluate") or {}
    for model, name in {"teacher": "adapt", "committee": "committee", **STUDENTS}.items():
        if before.get(model) and stages[name] is None and not (run.path / name).exists():
            message = f"{run.path / name} is gone, and with it the {model}, which was scored before"
            hint = f"put the folder back, repeat the command of the run, or remove {run.path / 'evaluate'} to do without it"
            raise TutelageError(message, hint)
    for name, result in stages.items():
        if result is None and any((run.path / name).glob("*.safetensors")):
            message = f"{run.path / name} holds weights, but no result.json: the stage was interrupted, or the file was removed"
            raise TutelageError(
                message, f"repeat the command of the run, or `tutelage {name} --out {run.path} ...`: it makes it anew"
            )
        if result and run.outdated(result):
            logger.info(f"{name} is left out: it was made from another transfer set; tutelage {name} redoes it")
            stages[name] = None
    return stages


@dataclass(frozen=True)
class _Context:
    """What is scored, and on which images. stages: result of each stage, or None. teacher_weights: where the teacher's weights come from.
    views: of whole images. test: None if there are no test images. sample: images of the transfer set on which the students are compared
    with the teacher."""

    run: Run
    stages: Stages
    cache_dir: Path
    teacher_weights: str
    committee: str
    hardware: Accelerator
    kind: Task
    task: TaskData
    views: ViewSettings
    test: Labelled | None
    sample: Images

    def log_probabilities(self, module: nn.Module, network: Network, grid: Grid | None) -> np.ndarray:
        """Return a model's float32 log probabilities of the test images: (n, C), or (n, C, *grid) of masks."""
        assert self.test is not None
        module = module.to(self.hardware.device).eval()
        return self.kind.log_probabilities(module, network, self.inference(self.test.images), grid).astype("float32")

    def inference(
        self, images: Images, labels: Labels | None = None, advance: Advance = lambda count: None
    ) -> Inference:
        """Return these images, to apply a model to."""
        return Inference(images, self.views, self.hardware, labels, self.kind.EVALUATION_BATCH, advance)

    def judged(self, predictions: Predictions) -> JSON:
        """Return the scores of predictions for the test images."""
        assert self.test is not None
        return self.kind.judged(predictions, self.test.labels, len(self.task.classes))


def _context(run: Run, stages: Stages, cache_dir: Path, kept: JSON, settings: EvaluateSettings) -> _Context:
    """Load the images of an evaluation. kept: the settings of the run."""
    run.result("curate", "evaluate")
    task = load_task(run.path, cache_dir)
    kind = task_of(task.task)
    some = np.random.default_rng(0).permutation(len(task.transfer))[:LEARNT_ON]
    return _Context(
        run,
        stages,
        cache_dir,
        settings.teacher_weights or kept.get("teacher_weights", "pretrained"),
        kept.get("committee", "auto"),
        accelerator(settings.device, settings.precision),
        kind,
        task,
        kind.views(Views(**{name: one for name, one in kept.items() if name in declared(Views)})),
        _new_images(settings.target, task, cache_dir) if settings.target else task.test,
        task.transfer.take(np.sort(some)),
    )


def _scores(context: _Context) -> tuple[JSON, dict[str, Predictions]]:
    """Return the scores of all models that the run has, and the predictions of each for the test images."""
    stages, teacher, test = context.stages, None, context.test
    result: JSON = {"classes": list(context.task.classes), "test_images": 0 if test is None else len(test)}
    predictions: dict[str, Predictions | None] = {}  # of each model
    if about := stages["adapt"]:
        teacher = _teacher(context, AdaptationResult(**about))
        result["teacher"], predictions["teacher"] = teacher.scores, teacher.on_test
        members = CommitteeResult(**stages["committee"]) if stages["committee"] else None
        if test is not None and members and isinstance(members.student, StudentEntry):
            result["committee"], predictions["committee"] = _committee(context, members, members.student, teacher)
    delivered = (stages["finetune"] or {}).get("delivered")
    times: dict[str, float] = {}
    for name, stage in STUDENTS.items():
        about = stages[stage]
        if not about or (name == "distilled" and not about["head"]):
            continue  # a student without a head has no scores before the last stage
        if name == "delivered" and delivered in result:
            result[name] = result[delivered]
        else:
            result[name], predictions[name] = _student(context, name, about, teacher, times)
    if delivered:
        result["delivered"] = {**result["delivered"], "what": delivered}
    return result, {name: one for name, one in predictions.items() if one is not None}


@dataclass(frozen=True)
class _Teacher:
    """The adapted teacher, its scores, and its predictions for the test images, if there are any, and for the sample."""

    adapted: AdaptedTeacher
    scores: JSON
    on_test: Predictions | None
    on_sample: Predictions


def _teacher(context: _Context, about: AdaptationResult) -> _Teacher:
    from tutelage.features.output_cache import OutputCache

    kind, test = context.kind, context.test
    adapted = kind.adapted(context.run.path / "adapt", about, context.teacher_weights, context.hardware)
    network, module = adapted.network, adapted.module
    scores: JSON = {"name": network.name, "parameters": adapted.parameters, "flops": flops(module, network.size)}
    if scores["flops"] <= TIMED_FLOPS:
        scores["latency_ms"] = latency_ms(module, network.size)
    cache = OutputCache(context.cache_dir, network, context.views.resize, context.task.side)

    def predict(images: Images, labels: Labels | None, what: str) -> Predictions:
        with progress(f"teacher on {what} images", len(images)) as advance:
            return kind.teacher_predictions(adapted, cache, context.inference(images, labels, advance))

    on_sample = predict(context.sample, None, "transfer")
    if test is None:
        return _Teacher(adapted, scores, None, on_sample)
    on_test = predict(test.images, test.labels, "test")
    return _Teacher(adapted, {**scores, "test": context.judged(on_test)}, on_test, on_sample)


def _committee(context: _Context, members: CommitteeResult, about: StudentEntry, teacher: _Teacher) -> Scored:
    """Return scores and predictions of the mixture that the targets come from. about: the members' students."""
    from tutelage.pipeline.load_student import load_student

    assert context.test is not None
    count, grid, adapted, classes = members.folds, members.grid, teacher.adapted, len(context.task.classes)
    mixture, of_teacher, of_students = Mixture.of(members, context.committee), None, None
    if mixture.weight < 1:
        if grid is None:
            of_teacher = log_softmax(np.asarray(teacher.on_test))
        else:
            of_teacher = context.log_probabilities(adapted.module, adapted.network, grid)
    if mixture.weight:
        students = (load_student(context.run.path / "committee", about, classes, f"fold-{k}") for k in range(count))
        summed = np.asarray(sum(context.log_probabilities(one.module, one, grid) for one in students))
        of_students = log_softmax(summed / count)
    mixed = mixture(of_teacher, of_students)
    predictions = context.kind.predictions_of(mixed, context.test.labels, np.arange(len(mixed)))
    return {
        "name": f"{teacher.scores['name']}, {count} x {about.name}",
        "weight": mixture.weight,
        "parameters": teacher.scores["parameters"] + count * about.parameters,
        "test": context.judged(predictions),
    }, predictions


def _student(context: _Context, name: str, result: JSON, teacher: _Teacher | None, times: dict[str, float]) -> Scored:
    """Return scores and test predictions of a student. name: distilled, baseline or delivered. result: of its stage. times: architecture ->
    milliseconds for an image; what is not there is measured and added."""
    from tutelage.pipeline.load_student import load_student

    kind, test, about = context.kind, context.test, StudentEntry(**result["student"])
    student = load_student(context.run.path / STUDENTS[name], about, len(context.task.classes))
    architecture = hash_of(about.model_dump(exclude={"initialisation"}))
    if architecture not in times:
        times[architecture] = latency_ms(student.module, student.size)
    scores: JSON = {
        "name": student.name,
        "parameters": student.parameters,
        "flops": flops(student.module, student.size),
        "latency_ms": times[architecture],
        "initialisation": student.initialisation,
    }
    module = student.module.to(context.hardware.device)
    if teacher is not None:
        on_sample = kind.student_predictions(module, student, context.inference(context.sample))
        scores["agreement_on_transfer"] = kind.agreement(on_sample, teacher.on_sample)
    if name == "distilled" and "agreement_with_targets" in result:
        scores["agreement_with_targets"] = result["agreement_with_targets"]
    if test is None:
        return scores, None
    with progress(f"{name} on test images", len(test)) as advance:
        on_test = context.inference(test.images, test.labels, advance)
        predictions = kind.student_predictions(module, student, on_test)
    if teacher is not None and teacher.on_test is not None:
        scores["agreement"] = kind.agreement(predictions, teacher.on_test)
    return {**scores, "test": context.judged(predictions)}, predictions


def _check_palette(found: TargetSet, task: TaskData) -> None:
    """Raise an error if masks of numbers show a class in the colour that another class has in the run's masks: they number it anew."""
    if not found.colours or found.coloured or task.about["coloured"]:
        return
    known = [(r, g, b) for r, g, b in task.about["colours"]]
    for number, colour in enumerate(found.colours):
        if colour in known and (other := known.index(colour)) != number:
            name, of_run = task.classes[number], task.classes[other]
            message = f"the palettes differ: {colour} is {number} ({name}) in these masks, but {other} ({of_run}) in those of the run"
            hint = (
                "list the colours in classes.txt, `name red green blue` for every class, so that colours count; "
                "if the numbers are right, save the masks without palettes, in grey"
            )
            raise TutelageError(message, hint)


def _new_images(target: str, task: TaskData, cache_dir: Path) -> Labelled:
    """Return the labelled images of another target set, with the run's classes."""
    from tutelage.curation.split_copies import count_trained_on

    kind = task_of(task.task)
    found = kind.read_any(target, task.classes)
    for note in found.notes:
        logger.info(note)
    if found.rejected:
        first = shown((f"{item.id} ({item.reason})" for item in found.rejected), 3)
        logger.info(
            f"{target}: {number_of(len(found.rejected), 'image is', 'images are')} unusable and not scored: {first}"
        )
    _check_palette(found, task)
    store = Store(cache_dir, task.side)
    store.add(found.refs)
    images, good, bad = store.find(found.refs)
    if bad:
        raise TutelageError(
            f"{target}: {number_of(len(bad), 'image')} cannot be used: {shown((f'{one.id} ({one.reason})' for one in bad), NAMED)}",
            "fix or remove them",
        )
    if known := count_trained_on(images, task.transfer):
        logger.info(
            f"of {len(images):,} images of {target}, {known:,} were trained on, or look like copies of such images"
        )
    labels = kind.labels_of(found, good, images, cache_dir)
    return Labelled([found.refs[i].id for i in good], images, labels, np.full(len(good), ""))
