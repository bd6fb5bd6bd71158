"""Export the delivered student as files that run without torch, each compared with the student before the old export is replaced."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tutelage.errors import TutelageError
from tutelage.pipeline.finished_exports import finished
from tutelage.pipeline.stage import HELD_OUT, open_run
from tutelage.progress import logger
from tutelage.results import ExportResult
from tutelage.run_folder import hash_of, write_json, write_text
from tutelage.settings import command
from tutelage.settings.commands import ExportSettings
from tutelage.tasks import task_of
from tutelage.version import __version__

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
    from tutelage.deploy import formats
    from tutelage.deploy.folder import settle, staged
    from tutelage.deploy.quantise import enough

    formats.check(settings.format)
    stages = finished(Path(settings.run))
    with open_run(settings) as (folder, cache_dir):
        if not settings.no_int8:
            enough(min(settings.calibration, stages["curate"]["images"]["transfer"]))
        work = _Exporter(folder, stages, cache_dir, settings.bake_preprocess, settings.tolerance)
        place = folder.path / "export"
        with staged(place) as new:
            work.write_float(new)
            if not settings.no_int8:
                work.write_int8(new, settings.calibration, settings.int8_loss)
            for name in settings.format:
                if name != "onnx":
                    work.write_other(new, name)
            about = work.about(new)
            old = settle(new, place, about)
        if old:
            logger.info(f"the previous export had been changed by hand; it is kept in {old}")
        return ExportResult(export=str(place), **about)


class _Exporter:
    """State of the export while it is made."""

    def __init__(self, run: Any, stages: dict[str, Any], cache_dir: Path, baked: bool, tolerance: float):
        from tutelage.data.manifest import load_task
        from tutelage.deploy import onnx_graph
        from tutelage.image_size import sides
        from tutelage.pipeline.load_student import load_student

        self.run, self.stages, self.baked, self.tolerance = run, stages, baked, tolerance
        self.settings = {name: one for name, one in run.settings()["settings"].items() if one != "default"}
        self.task = load_task(run.path, cache_dir)
        self.kind = task_of(self.task.task)
        self.student = load_student(run.path / "finetune", stages["finetune"]["student"], len(self.task.classes))
        plain, fused = self.student.module, onnx_graph.fused(self.student.module)
        statistics = self.student.mean, self.student.std
        self.module = onnx_graph.WithPreprocessing(fused, *statistics).eval() if baked else fused
        self.original = onnx_graph.WithPreprocessing(plain, *statistics).eval() if baked else plain
        self.truth: dict[int, np.ndarray] = {}  # position of a batch's first image -> outputs of the student
        self.unsure = self.threshold()
        self.preprocess = self.described()
        self.labels = self.task.test.labels if self.task.test else None
        self.judged_on = self.task.test.images if self.task.test else self.task.transfer
        height, width = sides(self.student.size)
        outputs = onnx_graph.torch_outputs(self.original, onnx_graph.example(self.student.size, baked).numpy())
        # images held in memory
        self.at_once = max(1, MEMORY // (4 * max(3 * height * width, int(np.prod(outputs.shape[1:])))))
        self.proved_on = min(len(self.judged_on), PROVED_ON, self.at_once)
        self.proof: dict[str, Any] = {
            "images": self.proved_on, "of": "test images" if self.task.test else "images of the transfer set",
            "score": self.kind.METRICS.main, "tolerance": tolerance, "files": {},
        }  # fmt: skip
        self.int8: Any = None

    def described(self) -> dict[str, Any]:
        """Return the content of preprocess.json: all that is needed to turn an image into the model's input and to read its output."""
        from tutelage.deploy import onnx_graph

        names = (
            (onnx_graph.BAKED_INPUT, onnx_graph.BAKED_OUTPUT) if self.baked else (onnx_graph.INPUT, onnx_graph.OUTPUT)
        )
        unsure, colours = self.unsure, self.stages["curate"].get("colours")
        return {
            "task": self.task.task, "decode_short_side": self.task.side, "size": self.student.size,
            "resize": self.settings.get("resize", "squash"), "mean": list(self.student.mean), "std": list(self.student.std),
            "input": {"name": names[0], "dtype": "uint8" if self.baked else "float32", "layout": "NHWC" if self.baked else "NCHW"},
            "output": {"name": names[1], "kind": "probabilities" if self.baked else "logits"},
            "unsure_below": unsure["threshold"] if unsure else None, **({"colours": colours} if colours else {}),
        }  # fmt: skip

    def threshold(self) -> dict[str, Any] | None:
        """Return the threshold below which the student counts as unsure, from images whose labels it was not trained on."""
        from tutelage.metrics import unsure_threshold

        path = self.run.path / "finetune" / HELD_OUT
        if not path.exists():
            return None
        with np.load(path) as file:
            return unsure_threshold(file["confidence"], file["right"])

    def inputs_of(self, images: Any, positions: np.ndarray) -> np.ndarray:
        """Return the model's input (n, ...) for these images."""
        from tutelage.data.decode import fit
        from tutelage.deploy.runtime import model_input

        size, resize = self.preprocess["size"], self.preprocess["resize"]
        return model_input(np.stack([fit(images[int(i)], size, resize) for i in positions]), self.preprocess)

    def write_float(self, folder: Path) -> None:
        """Write and check model.onnx."""
        from tutelage.deploy import onnx_graph
        from tutelage.deploy.runtime import FLOAT

        onnx_graph.write_onnx(self.module, self.student.size, self.baked, folder / FLOAT)
        self.prove(folder / FLOAT, self.in_onnxruntime(folder / FLOAT))

    def write_int8(self, folder: Path, calibration: int, most_lost: float) -> None:
        """Write and check model.int8.onnx, its ranges and layers chosen on the transfer set.

        The score lost on labels has been up to 2.2 times the expected loss, so the choice aims at a third of `most_lost`.
        """
        from tutelage.deploy.quantise import LEAST_CALIBRATION, quantise
        from tutelage.deploy.runtime import FLOAT, INT8

        order = np.random.default_rng(0).permutation(len(self.task.transfer))
        most = max(LEAST_CALIBRATION, self.at_once)
        ranges, judges = order[: min(calibration, most)], order[calibration : calibration + min(JUDGED_ON, most)]
        if len(judges) < len(ranges) / 2:  # in a small transfer set the same images serve for both
            judges = order[: min(JUDGED_ON, most)]
        given, judged = (self.inputs_of(self.task.transfer, np.sort(some)) for some in (ranges, judges))
        self.int8 = quantise(folder / FLOAT, folder / INT8, given, judged, most_lost / 3, self.logits, logger.info)
        if self.int8.kept_float:
            logger.info(
                f"int8: {len(self.int8.kept_float)} of {self.int8.layers} layers stay float: {', '.join(self.int8.kept_float)}"
            )
        self.prove(folder / INT8, self.in_onnxruntime(folder / INT8), strict=False)
        files = self.proof["files"]
        lost = None if self.labels is None else files[FLOAT]["score"] - files[INT8]["score"]
        if lost is not None and lost > most_lost:
            logger.info(
                f"int8 lost {100 * lost:.2f} points on test images, more than --int8-loss {most_lost:g} aims at: check it before use"
            )

    def write_other(self, folder: Path, name: str) -> None:
        """Write a file of another format, run it in its own runtime, and compare it."""
        from tutelage.deploy import formats

        path, run = formats.write(name, self.module, self.student.size, self.baked, folder)
        self.prove(path, run, scored=False)

    def logits(self, outputs: np.ndarray) -> np.ndarray:
        """Return (N, C) logits, or logarithms of probabilities, of what is classified: images or pixels."""
        return self.kind.rows_of(np.log(np.maximum(outputs, 1e-12)) if self.baked else outputs)

    def in_onnxruntime(self, path: Path) -> Callable[[np.ndarray], np.ndarray]:
        """Return a file as a function of its inputs, run by onnxruntime."""
        from tutelage.deploy.runtime import session_of

        session, name = session_of(path), self.preprocess["input"]["name"]
        return lambda inputs: np.asarray(session.run(None, {name: inputs})[0])

    def prove(
        self, path: Path, run: Callable[[np.ndarray], np.ndarray], strict: bool = True, scored: bool = True
    ) -> None:
        """Run a file on test images, compare it with the student, and record the difference and its score.

        Raises:
            TutelageError: with `strict`, the outputs differ by more than the tolerance.
        """
        count = min(len(self.judged_on), SCORED_ON) if scored and self.labels is not None else self.proved_on
        predictions, differences, largest, same = [], [0.0], [1.0], []
        for start in range(0, count, step := min(64, self.at_once)):
            positions = np.arange(start, min(start + step, count))
            inputs = self.inputs_of(self.judged_on, positions)
            outputs = run(inputs)
            if start < self.proved_on:
                truth = self.truth_of(start, inputs)
                differences.append(float(np.abs(outputs - truth).max()))
                largest.append(float(np.abs(truth).max()))
                same.append((outputs.argmax(1) == truth.argmax(1)).reshape(len(inputs), -1).mean(1))
            if self.labels is not None and scored:
                predictions += self.kind.predictions_of(outputs, self.labels, positions)
        difference, agreement = max(differences) / max(largest), float(np.concatenate(same).mean())
        score = None
        if self.labels is not None and scored:
            scores = self.kind.judged(predictions, self.labels[np.arange(count)], len(self.task.classes))
            score = scores[self.kind.METRICS.main]
        size = sum(one.stat().st_size for one in ([path] if path.is_file() else path.rglob("*")))
        found = {"difference": difference, "agreement": agreement, "score": score, "bytes": size}
        self.proof["files"][path.name] = found
        shown = "" if score is None else f", {self.kind.SCORE_TITLE} {score:.4f}"
        logger.info(
            f"{path.name}: {size:,} bytes, difference {difference:.1e}, same decision for {agreement:.2%}{shown}"
        )
        if strict and not difference <= self.tolerance:
            raise TutelageError(
                f"{path.name} differs from the student by {difference:.2e} of its largest output "
                f"on {self.proved_on:,} {self.proof['of']}, more than --tolerance {self.tolerance:g}",
                "raise --tolerance if you accept that (the old export is unchanged)",
            )

    def truth_of(self, start: int, inputs: np.ndarray) -> np.ndarray:
        """Return the student's own outputs for the batch that starts at this image, computed for the first file and kept for others."""
        from tutelage.deploy.onnx_graph import torch_outputs

        if start not in self.truth:
            self.truth[start] = torch_outputs(self.original, inputs)
        return self.truth[start][: len(inputs)]

    def about(self, folder: Path) -> dict[str, Any]:
        """Write the small files, and return the content of export.json."""
        import dataclasses

        from tutelage.deploy import predict_bundle, runtime, timing
        from tutelage.deploy.model_card import model_card
        from tutelage.device import cpu

        images, name = self.inputs_of(self.judged_on, np.arange(1)), self.preprocess["input"]["name"]
        sessions = {one.name: runtime.session_of(one, 1) for one in sorted(folder.glob("*.onnx"))}
        runs = {one: lambda s=session: s.run(None, {name: images}) for one, session in sessions.items()}
        latency = timing.in_turn(runs)
        about = {
            "recommended": min(latency, key=lambda one: latency[one]["median_ms"]), "size": self.student.size,
            "student": self.student.about(), "classes": len(self.task.classes), "proof": self.proof, "unsure": self.unsure,
            "int8": dataclasses.asdict(self.int8) if self.int8 else None, "latency": latency, "machine": cpu(),
            "outputs": self.stages["finetune"]["outputs"], "settings_hash": hash_of(self.settings),
            "versions": {"tutelage": __version__, **{one: importlib.metadata.version(one) for one in VERSIONS}},
        }  # fmt: skip
        write_text(folder / runtime.LABELS, "".join(f"{' '.join(name.split())}\n" for name in self.task.classes))
        write_json(folder / runtime.ABOUT, self.preprocess)
        write_text(folder / "predict.py", predict_bundle.predict_file(__version__))
        teacher = self.run.settings().get("teacher", {})
        write_text(folder / "MODEL_CARD.md", model_card(self.run.path, self.stages, self.settings, teacher, about))
        return about
