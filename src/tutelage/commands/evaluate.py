"""Scores of distilled student, baseline, delivered student, teacher and committee, on test images that were used for no choice.

Evaluation uses whole images, decoded and resized by data/decode.py as in export and predict.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tutelage.errors import TutelageError, shown
from tutelage.pipeline.stage import open_run
from tutelage.progress import progress, say
from tutelage.run_folder import DEFAULT, TRAINED, Run, hash_of, read_json
from tutelage.settings import command, declared
from tutelage.settings.commands import EvaluateSettings
from tutelage.settings.groups import Student, Views

TIMED_FLOPS = 1e12  # for one image, about half a minute on one thread; a larger teacher is not timed
LEARNT_ON = 1000  # images of the transfer set on which student and teacher are compared
STUDENTS = {"distilled": "distill", "baseline": "baseline", "delivered": "finetune"}  # model -> its folder
NAMED = 20  # largest number of unusable images that a message names


@command(EvaluateSettings)
def evaluate(settings: EvaluateSettings) -> dict[str, Any]:
    """Score the models of a run on its test images, or on the images of another target set.

    Returns:
        {"distilled": {"test": scores, "parameters", "flops", "latency_ms", "agreement"}, "baseline", "delivered" (with "what" it is),
        "teacher", "committee"}, as far as the run has them.
        Each architecture is timed once; a teacher above 1 TFLOP per image is not timed.
    """
    from tutelage.device import accelerator
    from tutelage.reporting.page import write_page

    if not (Path(settings.run) / "settings.toml").exists():
        hint = f"use a folder that `tutelage run` has written, or run `tutelage run --out {settings.run} ...` first"
        raise TutelageError(f"{settings.run} is not a run folder", hint)
    with open_run(settings) as (folder, cache_dir):
        kept = folder.settings()["settings"]
        resize = kept.get("resize", "squash")
        weights: str = settings.teacher_weights or kept.get("teacher_weights", "pretrained")
        hardware = accelerator(settings.device, settings.precision)
        stages = _results(folder)
        inputs = hash_of(["evaluate", resize, {name: one and one["outputs"] for name, one in stages.items()}])
        if settings.target is None and (done := folder.done("evaluate", inputs)):
            write_page(folder.path)
            return {**done, "reused": True}
        clock = folder.clock("evaluate")
        work = _Work(folder, stages, cache_dir, resize, weights, hardware, settings.target)
        result: dict[str, Any] = work.scores()
        if settings.target is not None:
            return {"run": str(folder.path), "target": settings.target, **result}
        work.keep_evidence()
        result["seconds"] = clock.stop()
        finished = folder.finish("evaluate", inputs, result)
        write_page(folder.path)
        return finished


def _results(run: Run) -> dict[str, Any]:
    """Return the result of each stage; None where it is missing or was made from another transfer set."""
    stages = {}
    for name in TRAINED:
        stages[name] = read_json(run.path / name / "result.json")
        if stages[name] and run.outdated(stages[name]):
            say(f"{name} is left out: it was made from another transfer set; tutelage {name} redoes it")
            stages[name] = None
    return stages


def _part(group: Any, settings: dict[str, Any]) -> dict[str, Any]:
    return {name: one for name, one in settings.items() if name in declared(group)}


class _Work:
    """State of the evaluation while it runs."""

    def __init__(
        self,
        run: Run,
        stages: dict[str, Any],
        cache_dir: Path,
        resize: str,
        teacher_weights: str,
        hardware: Any,
        target: str | None,
    ):
        import numpy as np

        from tutelage.data.manifest import load_task
        from tutelage.tasks import task_of

        self.run, self.stages, self.cache_dir = run, stages, cache_dir
        self.teacher_weights, self.hardware = teacher_weights, hardware
        run.result("curate", "evaluate")
        self.task = load_task(run.path, cache_dir)
        self.kind: Any = task_of(self.task.task)
        kept = {name: None if one == DEFAULT else one for name, one in run.settings()["settings"].items()}
        self.views = self.kind.views(Views(**{**_part(Views, kept), "resize": resize}))
        self.student_settings = Student(**_part(Student, kept))
        self.test = _new_images(target, self.task, cache_dir) if target else self.task.test
        self.predictions: dict[str, Any] = {}  # model -> predictions for the test images: logits or decisions
        some = np.random.default_rng(0).permutation(len(self.task.transfer))[:LEARNT_ON]
        self.learnt_on = self.task.transfer.take(np.sort(some))
        self.times: dict[str, float] = {}  # architecture -> milliseconds; each is timed once
        self.teacher_on_transfer: Any = None  # the teacher's predictions for `learnt_on`

    def scores(self) -> dict[str, Any]:
        """Return the scores of all models that the run has."""
        result: dict[str, Any] = {
            "classes": list(self.task.classes),
            "test_images": 0 if self.test is None else len(self.test),
        }
        if self.stages["adapt"]:
            result["teacher"] = self.teacher()
        if (members := self.stages["committee"] or {}).get("folds") and "teacher" in self.predictions:
            result["committee"] = self.committee(members, result["teacher"])
        delivered = (self.stages["finetune"] or {}).get("delivered")
        for name, stage in STUDENTS.items():
            if not self.stages[stage] or (name == "distilled" and not self.stages[stage]["head"]):
                continue  # a student without a head has no scores before the last stage
            result[name] = (
                result[delivered] if name == "delivered" and delivered in result else self.student(name, stage)
            )
        if delivered:
            result["delivered"] = {**result["delivered"], "what": delivered}
        return result

    def committee(self, members: dict[str, Any], teacher: dict[str, Any]) -> dict[str, Any]:
        """Return the scores of the mixture that the targets come from. members: result of its stage. teacher: scores of the teacher."""
        import numpy as np

        from tutelage.distillation.mixture import Mixture
        from tutelage.metrics import log_softmax
        from tutelage.pipeline.load_student import load_student

        assert self.test is not None
        count, about = members["folds"], members["student"]
        mixture = Mixture.of(members, self.run.settings()["settings"].get("committee", "auto"))
        of_teacher, of_students = self.predictions["teacher"], None
        if self.kind.GRID:
            of_teacher = self.log_probabilities(self.adapted.module, self.adapted.network)
        if mixture.weight:
            of_students = 0.0
            for number in range(count):
                student = load_student(self.run.path / "committee", about, len(self.task.classes), f"fold-{number}")
                of_students = of_students + self.log_probabilities(student.module, student)
            of_students = log_softmax(of_students / count)
        mixed = mixture(log_softmax(np.asarray(of_teacher)), of_students)
        self.predictions["committee"] = self.kind.predictions_of(mixed, self.test.labels, np.arange(len(mixed)))
        return {
            "name": f"{teacher['name']}, {count} x {about['name']}", "weight": mixture.weight,
            "parameters": teacher["parameters"] + count * about["parameters"], "test": self.judged(self.predictions["committee"])
        }  # fmt: skip

    def log_probabilities(self, module: Any, network: Any) -> Any:
        """Return a model's float32 log probabilities of the test images; those of masks on the grid of the student's logits."""
        assert self.test is not None
        module, grid = module.to(self.hardware.device).eval(), self.kind.grid(self.student_settings)
        found = self.kind.log_probabilities(
            module, network, self.test.images, self.views, self.hardware, grid, lambda n: None
        )
        return found.astype("float32")

    def teacher(self) -> dict[str, Any]:
        """Return the scores of the adapted teacher, and keep its predictions to compare the students' with."""
        from tutelage.device import flops, latency_ms
        from tutelage.features.output_cache import OutputCache

        self.adapted = adapted = self.kind.adapted(
            self.run.path / "adapt", self.stages["adapt"], self.teacher_weights, self.hardware
        )
        about: dict[str, Any] = {
            "name": adapted.network.name,
            "parameters": adapted.parameters,
            "flops": flops(adapted.module, adapted.network.size),
        }
        if about["flops"] <= TIMED_FLOPS:
            about["latency_ms"] = latency_ms(adapted.module, adapted.network.size)
        cache = OutputCache(self.cache_dir, adapted.network, self.views.resize, self.task.side)

        def predictions_of(images: Any, labels: Any, what: str) -> Any:
            with progress(f"teacher on {what} images", len(images)) as advance:
                return self.kind.teacher_predictions(adapted, cache, images, labels, self.views, self.hardware, advance)

        self.teacher_on_transfer = predictions_of(self.learnt_on, None, "transfer")
        if self.test is None:
            return about
        self.predictions["teacher"] = predictions_of(self.test.images, self.test.labels, "test")
        return {**about, "test": self.judged(self.predictions["teacher"])}

    def student(self, name: str, stage: str) -> dict[str, Any]:
        """Return the scores of a student. stage: its folder."""
        from tutelage.device import flops, latency_ms
        from tutelage.pipeline.load_student import load_student

        of = self.stages[stage]["student"]
        student = load_student(self.run.path / stage, of, len(self.task.classes))
        architecture = hash_of({name: value for name, value in of.items() if name != "initialisation"})
        if architecture not in self.times:
            self.times[architecture] = latency_ms(student.module, student.size)
        about: dict[str, Any] = {
            "name": student.name, "parameters": student.parameters, "flops": flops(student.module, student.size),
            "latency_ms": self.times[architecture], "initialisation": student.initialisation
        }  # fmt: skip
        module = student.module.to(self.hardware.device)
        if self.teacher_on_transfer is not None:
            predictions = self.predict(module, student, self.learnt_on, None)
            about["agreement_on_transfer"] = self.kind.agreement(predictions, self.teacher_on_transfer)
        if name == "distilled" and "agreement_with_targets" in self.stages[stage]:
            about["agreement_with_targets"] = self.stages[stage]["agreement_with_targets"]
        if self.test is None:
            return about
        with progress(f"{name} on test images", len(self.test)) as advance:
            predictions = self.predict(module, student, self.test.images, self.test.labels, advance)
        if "teacher" in self.predictions:
            about["agreement"] = self.kind.agreement(predictions, self.predictions["teacher"])
        self.predictions[name] = predictions
        return {**about, "test": self.judged(predictions)}

    def predict(self, module: Any, student: Any, images: Any, labels: Any, advance: Any = lambda n: None) -> Any:
        """Return a student's predictions for whole images."""
        return self.kind.student_predictions(module, student, images, labels, self.views, self.hardware, advance)

    def keep_evidence(self) -> None:
        """Save what the page shows of single test images."""
        from tutelage.reporting.example_predictions import remove_evidence

        remove_evidence(self.run.path / "evaluate")
        if self.test is not None:
            self.kind.keep_evidence(self.run.path / "evaluate", self.test, self.predictions, self.task.about)

    def judged(self, predictions: Any) -> dict[str, Any]:
        """Return the scores of predictions for the test images."""
        assert self.test is not None
        return self.kind.judged(predictions, self.test.labels, len(self.task.classes))


def _new_images(target: str, task: Any, cache_dir: Path) -> Any:
    """Return the labelled images of another target set, with the run's classes."""
    import numpy as np

    from tutelage.data.image_cache import Store
    from tutelage.data.manifest import Labelled
    from tutelage.tasks import task_of

    kind = task_of(task.task)
    found = kind.read_any(target, task.classes)
    for note in found.notes:
        say(note)
    if found.rejected:
        first = shown((f"{item.id} ({item.reason})" for item in found.rejected), 3)
        say(f"{target}: {len(found.rejected):,} images cannot be used and are not scored: {first}")
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
        say(f"{known:,} of {len(images):,} images of {target} are among those that the run was trained on")
    labels = kind.labels_of(found, good, images, cache_dir)
    return Labelled([found.refs[i].id for i in good], images, labels, np.full(len(good), ""))
