"""The scores: student, the same student alone, and teacher, on test images that entered no choice.

Evaluation sees whole images through the one decode and resize of data/decode.py, which export and predict share.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tutelage import config as c
from tutelage.config import recipe
from tutelage.errors import TutelageError, shown
from tutelage.progress import progress, say
from tutelage.recipes.stage import open_run
from tutelage.runs import COMMANDS, Run, hash_of, read_json

LEARNT_ON = 1000  # images of the transfer set on which student and teacher are compared


@recipe
def evaluate(
    *, run: c.Out = "", target: c.NewTarget = None, teacher_weights: c.OtherWeights = None,
    device: c.Device = "auto", precision: c.Precision = "auto", cache: c.Cache = None, json: c.Json = False,
) -> dict[str, Any]:  # fmt: skip
    """Score the models of a run on its test images, or on the test images of another target set.

    Args:
        run: the run folder.
        target: new labelled images (all splits are used); None for the run's own test images.
        teacher_weights: None for those that the run was given.

    Returns:
        {"student": {"test": scores, "parameters", "flops", "latency_ms", "agreement"}, "alone": {...}, "teacher": {...}}.
    """
    from tutelage.compute import accelerator
    from tutelage.reporting.page import write_page

    if not (Path(run) / "settings.toml").exists():
        raise TutelageError(
            f"{run} holds no run", "a folder that `tutelage run --out` has written", f"tutelage run --out {run} ..."
        )
    with open_run(run, cache, {}, False) as (folder, cache_dir):
        kept = folder.settings()["settings"]
        resize = kept.get("resize", "squash")
        weights: str = teacher_weights or kept.get("teacher_weights", "pretrained")
        hardware = accelerator(device, precision)
        stages = _results(folder)
        inputs = hash_of(["evaluate", resize, {name: one and one["outputs"] for name, one in stages.items()}])
        if target is None and (done := folder.done("report", inputs)):
            write_page(folder.path)
            return {**done, "reused": True}
        clock = folder.clock("report")
        work = _Work(folder, stages, cache_dir, resize, weights, hardware, target)
        result: dict[str, Any] = work.scores()
        if target is not None:
            return {"run": str(folder.path), "target": target, **result}
        work.keep_evidence()
        result["seconds"] = clock.stop()
        finished = folder.finish("report", inputs, result)
        write_page(folder.path)
        return finished


def _results(run: Run) -> dict[str, Any]:
    """The result of each stage, None where there is none of the present transfer set."""
    stages = {}
    for name in ("transfer_set", "teacher", "transfer", "student", "alone"):
        stages[name] = read_json(run.path / name / "result.json")
        if stages[name] and run.outdated(stages[name]):
            say(f"{name} is left out: it was made from another transfer set; tutelage {COMMANDS[name]} makes it anew")
            stages[name] = None
    return stages


class _Work:
    """Evaluation while it runs."""

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

        self.run, self.stages, self.cache_dir, self.resize = run, stages, cache_dir, resize
        self.teacher_weights, self.hardware = teacher_weights, hardware
        run.result("transfer_set", "evaluate")
        self.task = load_task(run.path, cache_dir)
        self.test = _new_images(target, self.task, cache_dir) if target else self.task.test
        self.logits: dict[str, Any] = {}  # of the test images, by model
        some = np.random.default_rng(0).permutation(len(self.task.transfer))[:LEARNT_ON]
        self.learnt_on = self.task.transfer.take(np.sort(some))
        self.taught: Any = None  # the teacher's logits of those

    def scores(self) -> dict[str, Any]:
        """All models that the run has."""
        result: dict[str, Any] = {
            "classes": list(self.task.classes),
            "test_images": 0 if self.test is None else len(self.test),
        }
        if self.stages["teacher"]:
            result["teacher"] = self.teacher()
        for name, stage in (("student", "student"), ("alone", "alone")):
            if self.stages[stage]:
                result[name] = self.student(stage)
        return result

    def teacher(self) -> dict[str, Any]:
        """Scores of the adapted teacher, whose logits the students are compared with."""
        from tutelage.compute import flops
        from tutelage.models.adapted import load_adapted
        from tutelage.targets import CLEAN, OutputCache, ViewSettings, compute_outputs

        adapted = load_adapted(self.run.path / "teacher", self.stages["teacher"], self.teacher_weights, self.hardware)
        about: dict[str, Any] = {
            "name": adapted.network.name,
            "parameters": adapted.parameters,
            "flops": flops(adapted.module, adapted.network.size),
        }
        kept = self.run.settings()["settings"]
        settings = ViewSettings(
            kept.get("view_seed", 0), kept.get("flip", "horizontal"), kept.get("crop_area", 0.6), resize=self.resize
        )
        cache = OutputCache(self.cache_dir, adapted.network, settings, self.task.side)

        def logits_of(images: Any, what: str) -> Any:
            with progress(f"teacher on {what} images", len(images)) as advance:
                compute_outputs(cache, adapted.network, images, [CLEAN], settings, advance)
            return adapted.head(cache.table(images, CLEAN).rows())

        self.taught = logits_of(self.learnt_on, "transfer")
        if self.test is None:
            return about
        self.logits["teacher"] = logits_of(self.test.images, "test")
        return {**about, "test": self.judged(self.logits["teacher"])}

    def student(self, stage: str) -> dict[str, Any]:
        """Scores of a student."""
        from tutelage.compute import flops, latency_ms
        from tutelage.recipes.supervised import predict_logits
        from tutelage.recipes.taught import load_student
        from tutelage.recipes.teaching import agreement

        student = load_student(self.run.path / stage, self.stages[stage]["student"], len(self.task.classes))
        about: dict[str, Any] = {
            "name": student.name, "parameters": student.parameters, "flops": flops(student.module, student.size),
            "latency_ms": latency_ms(student.module, student.size), "initialisation": student.initialisation,
        }  # fmt: skip
        module = student.module.to(self.hardware.device)
        if self.taught is not None:
            logits = predict_logits(module, student, self.learnt_on, self.resize, self.hardware)
            about["agreement_on_transfer"] = agreement(logits, self.taught)
        if self.test is None:
            return about
        with progress(f"{stage} on test images", len(self.test)) as advance:
            logits = predict_logits(module, student, self.test.images, self.resize, self.hardware, advance)
        if "teacher" in self.logits:
            about["agreement"] = agreement(logits, self.logits["teacher"])
        self.logits[stage] = logits
        return {**about, "test": self.judged(logits)}

    def keep_evidence(self) -> None:
        """Probabilities of the test images, and those on which student and teacher disagree, for the page."""
        from tutelage.metrics import softmax
        from tutelage.reporting.evidence import remove_evidence, write_evidence

        remove_evidence(self.run.path / "report")
        if self.test is not None:
            probabilities = {name: softmax(logits) for name, logits in self.logits.items()}
            write_evidence(
                self.run.path / "report", self.test.labels, self.test.ids, self.test.images.__getitem__, probabilities
            )

    def judged(self, logits: Any) -> dict[str, Any]:
        """Scores of logits on the test images."""
        from tutelage.metrics import classification

        assert self.test is not None
        return classification(logits, self.test.labels)


def _new_images(target: str, task: Any, cache_dir: Path) -> Any:
    """Labelled images of another target set, with the run's classes."""
    import numpy as np

    from tutelage.data.manifest import Labelled
    from tutelage.data.store import Store
    from tutelage.data.target_set import read_any

    found = read_any(target, task.classes)
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
            f"{target}: {len(bad)} images cannot be used, the first is {bad[0].id}: {bad[0].reason}",
            "images that can be read", "mend or remove them",
        )  # fmt: skip
    trained = {key.tobytes() for key in task.transfer.keys}
    if known := sum(key.tobytes() in trained for key in images.keys):
        say(f"{known:,} of {len(images):,} images of {target} are among those that the run was trained on")
    return Labelled([found.refs[i].id for i in good], images, found.labels[good], np.full(len(good), ""))
