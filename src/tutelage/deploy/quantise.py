"""Int8 models: static quantisation by onnxruntime, with choices made by measuring on unlabelled images.

The criterion is the expected loss of accuracy: the mean of p(d) - p(d8), where p are the float model's probabilities, d its
decision and d8 that of the int8 model. It needs no labels, is zero where the decisions agree, and equals the drop in accuracy if
the float model is calibrated. On a MobileNetV3 for CIFAR-10 it gave 0.5 points where 10,000 labels gave 0.8 to 1.1. A model whose
probabilities are all nearly equal would seem to lose nothing, so decisions that change count at least a 30th each; and where there
are held-out labels, the loss measured on them decides too.

Ranges from the smallest to the largest value lose most on mobile networks, whose activations have a few far outliers; so several
percentiles are tried, and for each tensor the range of least squared error. If the loss is still too high, layers stay float,
those first that cause most error for the square root of their bytes.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tutelage.deploy.activation_ranges import least_error
from tutelage.deploy.runtime import session_of, softmax
from tutelage.deploy.silence_output import quiet
from tutelage.errors import TutelageError
from tutelage.json_object import JSON

LogitsOf = Callable[[np.ndarray], np.ndarray]  # outputs of a batch -> (N, C) logits of what is classified
LEAST_CALIBRATION = 32  # fewest images to calibrate with
LAYERS = ("Conv", "Gemm", "MatMul")
# How ranges of the activations are chosen -> percentile of their absolute values, if it is one
RANGES = {
    "smallest to largest value": None,
    "99.99 % percentile": 99.99,
    "99.9 % percentile": 99.9,
    "99.5 % percentile": 99.5,
    "least squared error": None,
}
LEAST_ERROR = "least squared error"
# name -> (activations unsigned, 7-bit weights). Without VNNI, products of U8S8 are summed in pairs in 16 bits, which can overflow.
SCHEMES = {"S8S8": (False, False), "U8S8, 7-bit weights": (True, True), "U8S8": (True, False)}
SAFE = ("S8S8", "U8S8, 7-bit weights")  # correct on every CPU
SENSITIVITY_IMAGES = 128
EQUAL = 0.001  # expected losses that differ by less count as equal
CHANGED = 1 / 30  # least loss of a decision that changes
AIMED = 1 / 3  # of the allowed loss: on labels up to 2.2 times the expected loss was measured


@dataclass(frozen=True)
class HeldOut:
    """Labelled images that the student was not trained on. inputs: (n, ...) of the network. score: of its outputs for them, such as the
    accuracy."""

    inputs: np.ndarray
    score: Callable[[np.ndarray], float]


@dataclass(frozen=True)
class Quantised:
    """The chosen scheme and ranges. lost: expected loss of accuracy, in [0, 1]. agreement: share of decisions equal to the float
    model's. layers: number of layers. kept_float: names of those that stay float. tried: measurements of each choice.
    """

    scheme: str
    ranges: str
    lost: float
    agreement: float
    layers: int
    kept_float: list[str]
    tried: list[JSON]


def quantise(
    source: Path,
    out: Path,
    calibration: np.ndarray,
    judged_on: np.ndarray,
    most_lost: float,
    logits_of: LogitsOf,
    log: Callable[[str], None] = lambda text: None,
    held_out: HeldOut | None = None,
) -> Quantised:
    """Write an int8 copy of an ONNX classifier.

    Args:
        source: the float model; its one input has a free batch size. out: the file to write.
        calibration: (n, ...) inputs that give the ranges, at least LEAST_CALIBRATION, best 300 or more.
        judged_on: (m, ...) other inputs, to measure the loss.
        most_lost: largest loss of accuracy, in [0, 1]; layers stay float until the expected loss is at most a third of it, and the loss on
            held-out labels at most this.
        logits_of: outputs of a batch -> (N, C) logits or log probabilities of the classified images or pixels.
        held_out: labels on which the loss is measured too, if there are any.

    Raises:
        TutelageError: no choice of layers meets `most_lost`.
    """
    with tempfile.TemporaryDirectory(dir=out.parent, prefix="int8-") as folder:
        work = _Quantiser(source, Path(folder), calibration, judged_on, logits_of, held_out)

        def too_much(one: JSON) -> bool:
            return one["lost"] > AIMED * most_lost or one.get("measured", 0.0) > most_lost

        tried = {ranges: work.measured(SAFE[0], ranges, ()) for ranges in RANGES}
        ranges = min(tried, key=lambda one: tried[one]["lost"])
        log(f"int8 ranges: {ranges} loses least, {tried[ranges]['lost']:.2%} expected")
        others = {scheme: work.measured(scheme, ranges, ()) for scheme in SCHEMES if scheme != SAFE[0]}
        schemes = {SAFE[0]: tried[ranges], **others}
        scheme = min(SAFE, key=lambda one: (round(schemes[one]["lost"] / EQUAL), SAFE.index(one)))
        chosen = schemes[scheme]
        order = work.by_sensitivity(scheme, ranges) if too_much(chosen) else []
        kept = 0
        while too_much(chosen) and kept < len(order) - 1:
            kept = min(len(order) - 1, max(2, round(kept * 1.5)))
            chosen = work.measured(scheme, ranges, order[:kept])
        if too_much(chosen):  # with one layer in int8 too; with none, onnxruntime would quantise all
            every = schemes[scheme]
            most = max(every["lost"] / AIMED, every.get("measured", 0.0))
            raise TutelageError(
                "int8 loses more accuracy than --int8-loss allows, however few layers are quantised",
                f"raise --int8-loss above {most:.4f}, which suffices for all layers in int8, or use --no-int8",
            )
        out.write_bytes(work.model(scheme, ranges, order[:kept]))
        return Quantised(
            scheme,
            ranges,
            chosen["lost"],
            chosen["agreement"],
            len(work.layers),
            [work.layers[name] for name in order[:kept]],
            [*tried.values(), *others.values()],
        )


def expected_loss(reference: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Return the expected loss of accuracy of another model's decisions, and the share of decisions that agree.

    Worked example: p = (0.6, 0.4) and the other model decides for the second class: 0.6 - 0.4 = 0.2 is lost on this image.

    Args:
        reference, other: (n, C) logits of the trusted model, and of the other one.
    """
    p, rows = softmax(reference), np.arange(len(reference))
    mine, others = reference.argmax(1), other.argmax(1)
    return float((p[rows, mine] - p[rows, others]).mean()), float((mine == others).mean())


class _Quantiser:
    """A search for a quantisation. layers: name of the ONNX node -> name of the layer in the torch module."""

    def __init__(
        self,
        source: Path,
        folder: Path,
        calibration: np.ndarray,
        judged_on: np.ndarray,
        logits_of: LogitsOf,
        held_out: HeldOut | None,
    ):
        import onnx

        self.source, self.folder, self.logits_of = source, folder, logits_of
        self.calibration, self.judged_on, self.held_out = calibration, judged_on, held_out
        graph = onnx.load(source).graph
        self.input = graph.input[0].name
        sizes = {one.name: int(np.prod(one.dims)) for one in graph.initializer}
        named = [node for node in graph.node if node.op_type in LAYERS and node.input[1] in sizes]
        self.layers = {node.name: node.input[1].removesuffix(".weight") for node in named}
        self.sizes = {node.name: sizes[node.input[1]] for node in named}
        whole = source.read_bytes()
        self.reference, self.score = self.outputs(whole, judged_on), self.held_out_score(whole)

    def raw(self, model: bytes, inputs: np.ndarray) -> list[np.ndarray]:
        """Return the outputs of a model for these inputs, batch by batch."""
        session, step = session_of(model), batch_of(inputs)
        at = range(0, len(inputs), step)
        return [np.asarray(session.run(None, {self.input: inputs[one : one + step]})[0]) for one in at]

    def outputs(self, model: bytes, inputs: np.ndarray) -> np.ndarray:
        """(N, C) logits of a model for these inputs, by `logits_of`."""
        return np.concatenate([self.logits_of(one) for one in self.raw(model, inputs)])

    def held_out_score(self, model: bytes) -> float:
        """Score of a model on the held-out labels, 0 without any."""
        held_out = self.held_out
        return held_out.score(np.concatenate(self.raw(model, held_out.inputs))) if held_out else 0.0

    def measured(self, scheme: str, ranges: str, kept_float: Sequence[str]) -> JSON:
        """Expected loss, agreement and size of one choice; measured: the loss on held-out labels, if there are any."""
        model = self.model(scheme, ranges, kept_float)
        lost, agreement = expected_loss(self.reference, self.outputs(model, self.judged_on))
        choice = {"scheme": scheme, "ranges": ranges, "kept_float": len(kept_float)}
        measured = {"measured": self.score - self.held_out_score(model)} if self.held_out else {}
        return {
            **choice,
            "lost": max(lost, CHANGED * (1 - agreement)),
            **measured,
            "agreement": agreement,
            "bytes": len(model),
        }

    def by_sensitivity(self, scheme: str, ranges: str) -> list[str]:
        """Layers by decreasing cost when only that layer is int8: squared error of the logits over the root of the layer's size."""
        few = self.judged_on[:SENSITIVITY_IMAGES]

        def cost(name: str) -> float:
            others = [one for one in self.layers if one != name]
            rows = self.outputs(self.model(scheme, ranges, others), few)
            return float(((rows - self.reference[: len(rows)]) ** 2).mean() / self.sizes[name] ** 0.5)

        return sorted(self.layers, key=cost, reverse=True)

    def model(self, scheme: str, ranges: str, kept_float: Sequence[str]) -> bytes:
        """Bytes of the quantised model; each kind of ranges is measured only once."""
        from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static

        (unsigned, reduced), percentile = SCHEMES[scheme], RANGES[ranges]
        reader: Any = _Reader(self.input, self.calibration)
        path = self.folder / "int8.onnx"
        with quiet(logging.WARNING):
            quantize_static(
                self.source,
                path,
                reader,
                per_channel=True,
                reduce_range=reduced,
                op_types_to_quantize=list(LAYERS),
                nodes_to_quantize=[name for name in self.layers if name not in kept_float],
                weight_type=QuantType.QInt8,
                activation_type=QuantType.QUInt8 if unsigned else QuantType.QInt8,
                calibrate_method=CalibrationMethod.Percentile if percentile else CalibrationMethod.MinMax,
                calibration_cache_path=self.measured_ranges(ranges),
                extra_options={"CalibStridedMinMax": 1, **({"CalibPercentile": percentile} if percentile else {})},
            )
        return _shortened(path)

    def measured_ranges(self, ranges: str) -> Path:
        """Path of the cache file of measured ranges, which onnxruntime writes, or reads if it exists."""
        path = self.folder / f"{ranges.replace(' ', '-')}.json"
        if ranges == LEAST_ERROR and not path.exists():
            widest = self.folder / f"{next(iter(RANGES)).replace(' ', '-')}.json"  # measured first
            given = json.loads(widest.read_text())
            path.write_text(json.dumps(least_error(self.source, self.calibration, batch_of(self.calibration), given)))
        return path


def batch_of(inputs: np.ndarray) -> int:
    """Batch size: 64 at 64 x 64 pixels, smaller for larger images, since all activations are kept while ranges are measured."""
    return max(1, min(64, 64 * 64 * 64 * 3 // int(np.prod(inputs.shape[1:]))))


class _Reader:
    """Batches as onnxruntime's calibration requests them, a range at a time; all of one size, which its percentiles require."""

    def __init__(self, name: str, inputs: np.ndarray):
        size = next(size for size in range(batch_of(inputs), 0, -1) if len(inputs) % size == 0)
        self._batches = [{name: inputs[at : at + size]} for at in range(0, len(inputs), size)]
        self._left = iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._left = iter(self._batches[start_index:end_index])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._left, None)


def _shortened(path: Path) -> bytes:
    """Bytes of the model with short internal names: onnxruntime's names take a tenth of a small file."""
    import onnx

    model = onnx.load(path)
    graph = model.graph
    kept = {value.name for value in (*graph.input, *graph.output)}
    short: dict[str, str] = {"": ""}

    def name_of(name: str) -> str:
        return name if name in kept else short.setdefault(name, f"t{len(short)}")

    for node in graph.node:
        node.name = ""
        node.input[:] = [name_of(name) for name in node.input]
        node.output[:] = [name_of(name) for name in node.output]
    for one in graph.initializer:
        one.name = name_of(one.name)
    del graph.value_info[:]
    return model.SerializeToString()
