"""Scores of distilled student, baseline, delivered student, teacher and committee, on test images that were used for no choice.

Evaluation uses whole images, decoded and resized by data/decode.py as in export and predict.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutelage.errors import TutelageError, shown
from tutelage.pipeline.stage import open_run
from tutelage.progress import logger, progress
from tutelage.results import CommitteeResult, EvaluationResult
from tutelage.run_folder import DEFAULT, TRAINED, Run, hash_of, read_json
from tutelage.settings import command, declared
from tutelage.settings.commands import EvaluateSettings
from tutelage.settings.groups import Views
from tutelage.tasks import Task, task_of

if TYPE_CHECKING:
    import numpy as np

    from tutelage.data.image_cache import Images
    from tutelage.data.manifest import Labelled, TaskData
    from tutelage.features.view_batches import ViewSettings

TIMED_FLOPS = 1e12  # for one image, about half a minute on one thread; a larger teacher is not timed
LEARNT_ON = 1000  # images of the transfer set on which student and teacher are compared
STUDENTS = {"distilled": "distill", "baseline": "baseline", "delivered": "finetune"}  # model -> its folder
NAMED = 20  # largest number of unusable images that a message names


@command(EvaluateSettings)
def evaluate(settings: EvaluateSettings) -> EvaluationResult:
    """Score the models of a run on its test images, or on the images of another target set."""
    from tutelage.reporting.page import write_page

    if not (Path(settings.run) / "settings.toml").exists():
        hint = f"use a folder that `tutelage run` has written, or run `tutelage run --out {settings.run} ...` first"
        raise TutelageError(f"{settings.run} is not a run folder", hint)
    with open_run(settings) as (run, cache_dir):
        kept = {name: None if one == DEFAULT else one for name, one in run.settings()["settings"].items()}
        kept["resize"] = kept.get("resize") or "squash"
        stages = _results(run)
        inputs = hash_of(["evaluate", kept["resize"], {name: one and one["outputs"] for name, one in stages.items()}])
        if settings.target is None and (done := run.done("evaluate", inputs)):
            write_page(run.path)
            return EvaluationResult(**done, reused=True)
        clock = run.clock("evaluate")
        context = _context(run, stages, cache_dir, kept, settings)
        result, predictions = _scores(context)
        if settings.target is not None:
            return EvaluationResult(run=str(run.path), target=settings.target, **result)
        _keep_evidence(context, predictions)
        finished = run.finish("evaluate", inputs, {**result, "seconds": clock.stop()})
        write_page(run.path)
        return EvaluationResult(**finished)


def _results(run: Run) -> dict[str, Any]:
    """Return the result of each stage; None where it is missing or was made from another transfer set."""
    stages = {}
    for name in TRAINED:
        stages[name] = read_json(run.path / name / "result.json")
        if stages[name] and run.outdated(stages[name]):
            logger.info(f"{name} is left out: it was made from another transfer set; tutelage {name} redoes it")
            stages[name] = None
    return stages


@dataclass(frozen=True)
class _Context:
    """What is scored, and on which images.

    stages: result of each stage, or None. teacher_weights: where the teacher's weights come from. views: of whole images. test: None if
    there are no test images. sample: images of the transfer set on which the students are compared with the teacher.
    """

    run: Run
    stages: dict[str, Any]
    cache_dir: Path
    teacher_weights: str
    committee: str
    hardware: Any
    kind: Task
    task: TaskData
    views: ViewSettings
    test: Labelled | None
    sample: Images

    def log_probabilities(self, module: Any, network: Any, grid: tuple[int, int] | None) -> np.ndarray:
        """Return a model's float32 log probabilities of the test images: (n, C), or (n, C, *grid) of masks."""
        assert self.test is not None
        module, images = module.to(self.hardware.device).eval(), self.test.images
        found = self.kind.log_probabilities(
            module, network, images, self.views, self.hardware, grid, lambda n: None
        )  # fmt: skip
        return found.astype("float32")

    def judged(self, predictions: Any) -> dict[str, Any]:
        """Return the scores of predictions for the test images."""
        assert self.test is not None
        return self.kind.judged(predictions, self.test.labels, len(self.task.classes))


def _context(
    run: Run, stages: dict[str, Any], cache_dir: Path, kept: dict[str, Any], settings: EvaluateSettings
) -> _Context:
    """Load the images of an evaluation. kept: the settings of the run."""
    import numpy as np

    from tutelage.data.manifest import load_task
    from tutelage.device import accelerator

    run.result("curate", "evaluate")
    task = load_task(run.path, cache_dir)
    kind = task_of(task.task)
    some = np.random.default_rng(0).permutation(len(task.transfer))[:LEARNT_ON]
    return _Context(
        run, stages, cache_dir, settings.teacher_weights or kept.get("teacher_weights") or "pretrained",
        kept.get("committee") or "auto", accelerator(settings.device, settings.precision), kind, task,
        kind.views(Views(**{name: one for name, one in kept.items() if name in declared(Views)})),
        _new_images(settings.target, task, cache_dir) if settings.target else task.test, task.transfer.take(np.sort(some)),
    )  # fmt: skip


def _scores(context: _Context) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the scores of all models that the run has, and the predictions of each for the test images."""
    stages, teacher = context.stages, None
    result: dict[str, Any] = {
        "classes": list(context.task.classes),
        "test_images": 0 if context.test is None else len(context.test),
    }
    predictions: dict[str, Any] = {}  # model -> logits or decisions
    if stages["adapt"]:
        adapted = context.kind.adapted(
            context.run.path / "adapt", stages["adapt"], context.teacher_weights, context.hardware
        )
        teacher = _teacher(context, adapted)
        result["teacher"], predictions["teacher"] = teacher.scores, teacher.on_test
        if context.test is not None and (stages["committee"] or {}).get("folds"):
            result["committee"], predictions["committee"] = _committee(context, adapted, teacher)
    delivered = (stages["finetune"] or {}).get("delivered")
    times: dict[str, float] = {}
    for name, stage in STUDENTS.items():
        if not stages[stage] or (name == "distilled" and not stages[stage]["head"]):
            continue  # a student without a head has no scores before the last stage
        if name == "delivered" and delivered in result:
            result[name] = result[delivered]
        else:
            result[name], predictions[name] = _student(context, name, stage, teacher, times)
    if delivered:
        result["delivered"] = {**result["delivered"], "what": delivered}
    return result, {name: one for name, one in predictions.items() if one is not None}


@dataclass(frozen=True)
class _Teacher:
    """Scores of the adapted teacher, and its predictions for the test images, if there are any, and for the sample."""

    scores: dict[str, Any]
    on_test: Any
    on_sample: Any


def _teacher(context: _Context, adapted: Any) -> _Teacher:
    from tutelage.device import flops, latency_ms
    from tutelage.features.output_cache import OutputCache

    scores: dict[str, Any] = {
        "name": adapted.network.name,
        "parameters": adapted.parameters,
        "flops": flops(adapted.module, adapted.network.size),
    }
    if scores["flops"] <= TIMED_FLOPS:
        scores["latency_ms"] = latency_ms(adapted.module, adapted.network.size)
    cache = OutputCache(context.cache_dir, adapted.network, context.views.resize, context.task.side)

    def predict(images: Images, labels: Any, what: str) -> Any:
        with progress(f"teacher on {what} images", len(images)) as advance:
            return context.kind.teacher_predictions(
                adapted, cache, images, labels, context.views, context.hardware, advance
            )

    on_sample = predict(context.sample, None, "transfer")
    if context.test is None:
        return _Teacher(scores, None, on_sample)
    on_test = predict(context.test.images, context.test.labels, "test")
    return _Teacher({**scores, "test": context.judged(on_test)}, on_test, on_sample)


def _committee(context: _Context, adapted: Any, teacher: _Teacher) -> tuple[dict[str, Any], Any]:
    """Return scores and predictions of the mixture that the targets come from."""
    import numpy as np

    from tutelage.distillation.mixture import Mixture
    from tutelage.metrics import log_softmax
    from tutelage.pipeline.load_student import load_student

    assert context.test is not None
    members, classes = CommitteeResult(**context.stages["committee"]), len(context.task.classes)
    count, about, grid = members.folds, members.student, members.grid
    mixture, of_teacher, of_students = Mixture.of(members, context.committee), None, None
    if mixture.weight < 1:
        of_teacher = (
            log_softmax(teacher.on_test)
            if grid is None
            else context.log_probabilities(adapted.module, adapted.network, grid)
        )
    if mixture.weight:
        students = (load_student(context.run.path / "committee", about, classes, f"fold-{k}") for k in range(count))
        of_students = log_softmax(
            np.asarray(sum(context.log_probabilities(one.module, one, grid) for one in students)) / count
        )
    mixed = mixture(of_teacher, of_students)
    predictions = context.kind.predictions_of(mixed, context.test.labels, np.arange(len(mixed)))
    return {
        "name": f"{teacher.scores['name']}, {count} x {about['name']}", "weight": mixture.weight,
        "parameters": teacher.scores["parameters"] + count * about["parameters"], "test": context.judged(predictions),
    }, predictions  # fmt: skip


def _student(
    context: _Context, name: str, stage: str, teacher: _Teacher | None, times: dict[str, float]
) -> tuple[dict[str, Any], Any]:
    """Return scores and test predictions of a student.

    Args:
        stage: its folder. times: architecture -> milliseconds for an image; what is not there is measured and added.
    """
    from tutelage.device import flops, latency_ms
    from tutelage.pipeline.load_student import load_student

    about = context.stages[stage]["student"]
    student = load_student(context.run.path / stage, about, len(context.task.classes))
    architecture = hash_of({key: value for key, value in about.items() if key != "initialisation"})
    if architecture not in times:
        times[architecture] = latency_ms(student.module, student.size)
    scores: dict[str, Any] = {
        "name": student.name, "parameters": student.parameters, "flops": flops(student.module, student.size),
        "latency_ms": times[architecture], "initialisation": student.initialisation,
    }  # fmt: skip
    module = student.module.to(context.hardware.device)

    def predict(images: Images, labels: Any, advance: Any = lambda n: None) -> Any:
        return context.kind.student_predictions(
            module, student, images, labels, context.views, context.hardware, advance
        )

    if teacher is not None:
        scores["agreement_on_transfer"] = context.kind.agreement(predict(context.sample, None), teacher.on_sample)
    if name == "distilled" and "agreement_with_targets" in context.stages[stage]:
        scores["agreement_with_targets"] = context.stages[stage]["agreement_with_targets"]
    if context.test is None:
        return scores, None
    with progress(f"{name} on test images", len(context.test)) as advance:
        predictions = predict(context.test.images, context.test.labels, advance)
    if teacher is not None:
        scores["agreement"] = context.kind.agreement(predictions, teacher.on_test)
    return {**scores, "test": context.judged(predictions)}, predictions


def _keep_evidence(context: _Context, predictions: dict[str, Any]) -> None:
    """Save what the page shows of single test images."""
    from tutelage.reporting.example_predictions import remove_evidence

    folder = context.run.path / "evaluate"
    remove_evidence(folder)
    if context.test is not None:
        context.kind.keep_evidence(folder, context.test, predictions, context.task.about)


def _new_images(target: str, task: Any, cache_dir: Path) -> Any:
    """Return the labelled images of another target set, with the run's classes."""
    import numpy as np

    from tutelage.data.image_cache import Store
    from tutelage.data.manifest import Labelled

    kind = task_of(task.task)
    found = kind.read_any(target, task.classes)
    for note in found.notes:
        logger.info(note)
    if found.rejected:
        first = shown((f"{item.id} ({item.reason})" for item in found.rejected), 3)
        logger.info(f"{target}: {len(found.rejected):,} images cannot be used and are not scored: {first}")
    store = Store(cache_dir, task.side)
    store.add(found.refs)
    images, good, bad = store.find(found.refs)
    if bad:
        raise TutelageError(
            f"{target}: {len(bad):,} images cannot be used: {shown((f'{one.id} ({one.reason})' for one in bad), NAMED)}",
            "fix or remove them",
        )
    trained = {key.tobytes() for key in task.transfer.keys}
    if known := sum(key.tobytes() in trained for key in images.keys):
        logger.info(f"{known:,} of {len(images):,} images of {target} are among those that the run was trained on")
    labels = kind.labels_of(found, good, images, cache_dir)
    return Labelled([found.refs[i].id for i in good], images, labels, np.full(len(good), ""))
