"""Export the delivered student as files that run without torch, each compared with the student before the old export is replaced."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tutelage.data.decode import fit
from tutelage.data.image_cache import Images
from tutelage.data.manifest import TaskData, load_task
from tutelage.deploy.export_folder import settle, staged
from tutelage.deploy.quantise import LEAST_CALIBRATION, HeldOut, Quantised, quantise
from tutelage.deploy.runtime import FLOAT, INT8, model_input, session_of
from tutelage.device import cpu
from tutelage.environment import versions
from tutelage.errors import TutelageError, number_of
from tutelage.files import hash_of, intact, write_json, write_text
from tutelage.image_size import sides
from tutelage.json_object import JSON
from tutelage.metrics import unsure_threshold
from tutelage.pipeline.finished_exports import finished
from tutelage.pipeline.stage import HELD_OUT, open_run
from tutelage.progress import logger
from tutelage.results import ExportResult, StudentEntry
from tutelage.run_folder import Run
from tutelage.settings import command
from tutelage.settings.command_flags import ExportSettings
from tutelage.tasks import Task, task_of
from tutelage.version import __version__

if TYPE_CHECKING:
    from torch import nn

    from tutelage.deploy.formats import Program
    from tutelage.models.students import Student

    Stages = dict[str, JSON]  # result of each stage

PROVED_ON = 1000  # images on which torch and onnxruntime are compared
SCORED_ON = 10_000  # test images on which the files are scored
JUDGED_ON = 1000  # images of the transfer set on which int8 is chosen, if possible not those of the calibration
MEMORY = 2**29  # bytes of inputs and outputs held at once; where images are large, fewer are compared and used for int8
VERSIONS = ("torch", "timm", "onnx", "onnxruntime", "numpy", "pillow")  # Pillow 13 resizes tall images in another order


@command(ExportSettings)
def export(settings: ExportSettings) -> ExportResult:
    """Write RUN/export: model.onnx, model.int8.onnx, labels.txt, preprocess.json, predict.py, MODEL_CARD.md, export.json.

    Every file is run on test images and compared with the student; if one differs too much (int8 may), the old export is kept.
    """
    from tutelage.deploy import formats, onnx_graph

    formats.check(settings.format)
    stages = finished(Path(settings.run))
    with open_run(settings) as (run, cache_dir):
        few = min(settings.calibration, stages["curate"]["images"]["transfer"])
        if not settings.no_int8 and few < LEAST_CALIBRATION:
            many = number_of(few, "image is", "images are")
            message = f"{many} too few to calibrate int8 with: at least {LEAST_CALIBRATION} are needed, 500 are better"
            more = few < stages["curate"]["images"]["transfer"]
            raise TutelageError(
                message, f"{'raise --calibration' if more else 'use a larger transfer set'}, or --no-int8"
            )
        job, place = _delivered(run, stages, cache_dir, settings), run.path / "export"
        baked, size = settings.bake_preprocess, job.student.size
        with staged(place) as new:
            onnx_graph.write_onnx(job.module, size, baked, new / FLOAT)
            files = {FLOAT: _proved(job, new / FLOAT, job.in_onnxruntime(new / FLOAT))}
            int8 = None if settings.no_int8 else _write_int8(job, new, files)
            for name in settings.format:
                if name != "onnx":
                    path, program = formats.write(name, job.module, size, baked, new)
                    files[path.name] = _proved(job, path, program, scored=False)
            about = _about(job, stages, files, int8, new)
            old = settle(new, place, about)
        if old:
            logger.info(f"the previous export had been changed by hand; it is kept in {old}")
        return ExportResult(export=str(place), **about)


@dataclass(frozen=True)
class _Delivered:
    """The student to export, and the images on which its files are judged. kept: the run's settings. module: what is written. original:
    the same before layers are fused, with which files are compared. unsure: the threshold of confidence, if one could be chosen.
    preprocess: content of preprocess.json. images: test images, or those of the transfer set. at_once: images held in memory. truth:
    outputs of `original`, batch by batch, for the images that files are compared on."""

    run: Run
    settings: ExportSettings
    kept: JSON
    task: TaskData
    kind: Task
    student: Student
    module: nn.Module
    original: nn.Module
    unsure: dict[str, float | None] | None
    preprocess: JSON
    images: Images
    at_once: int
    truth: dict[int, np.ndarray]

    @property
    def proved_on(self) -> int:
        """The number of images on which files are compared with the student."""
        return min(len(self.images), PROVED_ON, self.at_once)

    def inputs_of(self, images: Images, positions: np.ndarray) -> np.ndarray:
        """Return the model's input (n, ...) for these images."""
        size, resize = self.preprocess["size"], self.preprocess["resize"]
        return model_input(np.stack([fit(images[int(i)], size, resize) for i in positions]), self.preprocess)

    def logits(self, outputs: np.ndarray) -> np.ndarray:
        """Return (N, C) logits, or logarithms of probabilities, of what is classified: images or pixels."""
        baked = self.settings.bake_preprocess
        return self.kind.rows_of(np.log(np.maximum(outputs, 1e-12)) if baked else outputs)

    def in_onnxruntime(self, path: Path) -> Program:
        """Return a file as a function of its inputs, run by onnxruntime."""
        session, name = session_of(path), self.preprocess["input"]["name"]
        return lambda inputs: np.asarray(session.run(None, {name: inputs})[0])


def _delivered(run: Run, stages: Stages, cache_dir: Path, settings: ExportSettings) -> _Delivered:
    from tutelage.deploy import onnx_graph
    from tutelage.pipeline.load_student import load_student

    kept = run.chosen()
    task, folder, baked = load_task(run.path, cache_dir), run.path / "finetune", settings.bake_preprocess
    student = load_student(folder, StudentEntry(**stages["finetune"]["student"]), len(task.classes))
    module, original = onnx_graph.fused(student.module), student.module
    if baked:
        module = onnx_graph.WithPreprocessing(module, student.mean, student.std).eval()
        original = onnx_graph.WithPreprocessing(original, student.mean, student.std).eval()
    unsure = None
    if (folder / HELD_OUT).exists():  # of images whose labels the student was not trained on
        with np.load(intact(folder / HELD_OUT)) as file:
            unsure = unsure_threshold(file["confidence"], file["right"])
    given, returned = onnx_graph.INPUT, onnx_graph.OUTPUT
    if baked:
        given, returned = onnx_graph.BAKED_INPUT, onnx_graph.BAKED_OUTPUT
    colours = stages["curate"].get("colours")
    preprocess = {
        "task": task.task,
        "decode_short_side": task.side,
        "size": student.size,
        "resize": kept["resize"],
        "mean": list(student.mean),
        "std": list(student.std),
        "input": {"name": given, "dtype": "uint8" if baked else "float32", "layout": "NHWC" if baked else "NCHW"},
        "output": {"name": returned, "kind": "probabilities" if baked else "logits"},
        "unsure_below": unsure["threshold"] if unsure else None,
        **({"colours": colours} if colours else {}),
    }
    outputs = onnx_graph.torch_outputs(original, onnx_graph.example(student.size, baked).numpy())
    height, width = sides(student.size)
    at_once = max(1, MEMORY // (4 * max(3 * height * width, int(np.prod(outputs.shape[1:])))))
    return _Delivered(
        run, settings, kept, task, task_of(task.task), student, module, original, unsure, preprocess,
        task.test.images if task.test else task.transfer, at_once, {},
    )  # fmt: skip


def _write_int8(job: _Delivered, folder: Path, files: dict[str, JSON]) -> Quantised:
    """Write and check model.int8.onnx, its ranges and layers chosen on the transfer set and validation images. files: what was found of
    each file."""
    transfer, calibration, most_lost = job.task.transfer, job.settings.calibration, job.settings.int8_loss
    order, most = np.random.default_rng(0).permutation(len(transfer)), max(LEAST_CALIBRATION, job.at_once)
    ranges, judges = order[: min(calibration, most)], order[calibration : calibration + min(JUDGED_ON, most)]
    if len(judges) < len(ranges) / 2:  # in a small transfer set the same images serve for both
        judges = order[: min(JUDGED_ON, most)]
    given, judged = (job.inputs_of(transfer, np.sort(some)) for some in (ranges, judges))
    int8 = quantise(folder / FLOAT, folder / INT8, given, judged, most_lost, job.logits, logger.info, _held_out(job))
    if int8.kept_float:
        logger.info(f"int8: {len(int8.kept_float)} of {int8.layers} layers stay float: {', '.join(int8.kept_float)}")
    files[INT8] = _proved(job, folder / INT8, job.in_onnxruntime(folder / INT8), strict=False)
    return int8


def _held_out(job: _Delivered) -> HeldOut | None:
    """Return the validation images and how outputs for them are scored, if there are any."""
    val, kind, classes = job.task.val, job.kind, len(job.task.classes)
    if val is None:
        return None
    positions = np.arange(min(len(val), JUDGED_ON, max(LEAST_CALIBRATION, job.at_once)))
    labels = val.take(positions).labels

    def score(outputs: np.ndarray) -> float:
        return kind.judged(kind.predictions_of(outputs, labels, positions), labels, classes)[kind.METRICS.main]

    return HeldOut(job.inputs_of(val.images, positions), score)


def recommended(latency: dict[str, dict[str, float]], files: dict[str, JSON], int8_loss: float) -> str:
    """Return the faster file of those that lose no more than --int8-loss: in decisions that change, each of which counts a tenth, and of
    the score on test images, if there are any."""
    whole, small = files[FLOAT], files.get(INT8)
    fit = list(latency)
    if small is not None:
        changed = (1 - small["agreement"]) / 10
        lost = changed if small["score"] is None else whole["score"] - small["score"]
        if not (changed <= int8_loss and lost <= int8_loss):  # a score may be NaN
            found = "too many decisions change" if changed > int8_loss else f"{100 * lost:.2f} points on test images"
            logger.info(f"int8 is not recommended: it loses more than --int8-loss {int8_loss:g} ({found})")
            fit.remove(INT8)
    return min(fit, key=lambda one: latency[one]["median_ms"])


def _proved(job: _Delivered, path: Path, program: Program, strict: bool = True, scored: bool = True) -> JSON:
    """Run a file on test images, compare it with the student, and return the difference, its score and its size. strict: outputs that
    differ by more than the tolerance are an error."""
    from tutelage.deploy.onnx_graph import torch_outputs

    labels = job.task.test.labels if job.task.test and scored else None
    kind, tolerance = job.kind, job.settings.tolerance
    count = job.proved_on if labels is None else min(len(job.images), SCORED_ON)
    predictions, differences, largest, same = [], [], [1.0], []
    for start in range(0, count, step := min(64, job.at_once)):
        positions = np.arange(start, min(start + step, count))
        inputs = job.inputs_of(job.images, positions)
        outputs = program(inputs)
        if start < job.proved_on:
            if start not in job.truth:
                job.truth[start] = torch_outputs(job.original, inputs)
            truth = job.truth[start][: len(inputs)]
            differences.append(float(np.abs(outputs - truth).max()))
            largest.append(float(np.abs(truth).max()))
            same.append((outputs.argmax(1) == truth.argmax(1)).reshape(len(inputs), -1).mean(1))
        if labels is not None:
            predictions += kind.predictions_of(outputs, labels, positions)
    difference, agreement = float(np.max(differences)) / max(largest), float(np.concatenate(same).mean())
    score = None
    if labels is not None:
        score = kind.judged(predictions, labels[np.arange(count)], len(job.task.classes))[kind.METRICS.main]
    size = sum(one.stat().st_size for one in ([path] if path.is_file() else path.rglob("*")))
    shown = "" if score is None else f", {kind.SCORE_TITLE} {score:.4f}"
    logger.info(f"{path.name}: {size:,} bytes, difference {difference:.1e}, same decision for {agreement:.2%}{shown}")
    if strict and not difference <= tolerance:
        raise TutelageError(
            f"{path.name} differs from the student by {difference:.2e} of its largest output "
            f"on {job.proved_on:,} {_judges(job)}, more than --tolerance {tolerance:g}",
            "raise --tolerance if you accept that (the old export is unchanged)",
        )
    return {"difference": difference, "agreement": agreement, "score": score, "bytes": size}


def _judges(job: _Delivered) -> str:
    return "test images" if job.task.test else "images of the transfer set"


def _about(job: _Delivered, stages: Stages, files: dict[str, JSON], int8: Quantised | None, folder: Path) -> JSON:
    """Write the small files, time the ONNX files, and return the content of export.json."""
    from tutelage.deploy import predict_bundle, runtime, timing
    from tutelage.deploy.model_card import model_card

    images, name = job.inputs_of(job.images, np.arange(1)), job.preprocess["input"]["name"]
    sessions = {one.name: runtime.session_of(one, 1) for one in sorted(folder.glob("*.onnx"))}
    runs = {one: lambda s=session: s.run(None, {name: images}) for one, session in sessions.items()}
    latency = timing.in_turn(runs)
    proof = {
        "images": job.proved_on,
        "of": _judges(job),
        "score": job.kind.METRICS.main,
        "tolerance": job.settings.tolerance,
        "files": files,
    }
    about = {
        "recommended": recommended(latency, files, job.settings.int8_loss),
        "size": job.student.size,
        "student": job.student.about(),
        "classes": len(job.task.classes),
        "proof": proof,
        "unsure": job.unsure,
        "int8": dataclasses.asdict(int8) if int8 else None,
        "latency": latency,
        "machine": cpu(),
        "outputs": stages["finetune"]["outputs"],
        "settings_hash": hash_of(job.kept),
        "versions": versions(VERSIONS),
    }
    write_text(folder / runtime.LABELS, "".join(f"{name}\n" for name in job.task.classes))
    write_json(folder / runtime.ABOUT, job.preprocess)
    write_text(folder / "predict.py", predict_bundle.predict_file(__version__))
    teacher = job.run.settings().get("teacher", {})
    write_text(folder / "MODEL_CARD.md", model_card(job.run.path, stages, job.kept, teacher, about))
    return about
