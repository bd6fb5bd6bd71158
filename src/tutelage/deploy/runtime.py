"""Run an export folder: images in, classes and probabilities out. Needs onnxruntime, numpy and Pillow; loads no torch.

`tutelage predict` and the predict.py of every export folder share this code (deploy/predict_bundle.py assembles it), with the
decode and resize of data/decode.py that training and evaluation use.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tutelage.data.decode import decode, file_digest, fit
from tutelage.data.image_kinds import SUFFIXES
from tutelage.data.walk import CLOSED, CONTAINER, IMAGE, walk
from tutelage.deploy.export_contents import labels_of, preprocess_of, recommended_of
from tutelage.errors import TutelageError, Unreadable, shown
from tutelage.image_size import sides
from tutelage.json_object import JSON
from tutelage.regular_file import bytes_in, json_of, text_in

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

FLOAT, INT8 = "model.onnx", "model.int8.onnx"
NAMES = {"float": FLOAT, "int8": INT8}
BATCH = 32  # images classified at once
ABOUT, LABELS, EXPORT = "preprocess.json", "labels.txt", "export.json"


@dataclass(frozen=True)
class Model:
    """An exported student.

    session: of onnxruntime. about: contents of preprocess.json. labels: C class names. file: name of the ONNX file.
    """

    session: InferenceSession
    about: JSON
    labels: list[str]
    file: str

    def pixels(self, data: bytes) -> np.ndarray:
        """Decode and resize an image file's bytes as in evaluation -> (S, S, 3) uint8.

        Raises:
            Unreadable: not an image, broken, or too large.
        """
        rgb, _ = decode(data, self.about["decode_short_side"])
        return fit(rgb, self.about["size"], self.about["resize"])

    def probabilities(self, pixels: np.ndarray) -> np.ndarray:
        """(B, S, S, 3) uint8 -> (B, C) float64."""
        output = self.outputs(pixels)
        return np.asarray(output, np.float64) if self.about["output"]["kind"] == "probabilities" else softmax(output)

    def outputs(self, pixels: np.ndarray) -> np.ndarray:
        """(B, S, S, 3) uint8 -> (B, C) float32 output of the file: logits, or probabilities if softmax is baked in."""
        return np.asarray(self.session.run(None, {self.about["input"]["name"]: model_input(pixels, self.about)})[0])


@dataclass
class Predictions:
    """paths: the n images that could be read. probabilities: (n, C). rejected: path and reason of the other images."""

    labels: list[str]
    unsure_below: float | None
    paths: list[str] = field(default_factory=list)
    probabilities: list[np.ndarray] = field(default_factory=list)
    rejected: list[tuple[str, str]] = field(default_factory=list)

    def columns(self, top: int) -> dict[str, list[object]]:
        """The table: path, class, probability, unsure, then the next most likely classes down to rank `top`."""
        table = np.array(self.probabilities).reshape(len(self.paths), len(self.labels))
        order = np.argsort(-table, axis=1, kind="stable")[:, : max(1, min(top, len(self.labels)))]
        best = np.take_along_axis(table, order, axis=1)
        columns: dict[str, list[object]] = {"path": [*self.paths]}
        for rank in range(order.shape[1]):
            end = f"_{rank + 1}" if rank else ""
            columns[f"class{end}"] = [self.labels[i] for i in order[:, rank]]
            columns[f"probability{end}"] = [round(float(value), 6) for value in best[:, rank]]
            if not rank:
                below = self.unsure_below if self.unsure_below is not None else -1.0
                columns["unsure"] = [bool(value < below) for value in best[:, 0]]
        return columns


def model_input(pixels: np.ndarray, about: JSON) -> np.ndarray:
    """(B, S, S, 3) uint8 -> the model's input: the same if preprocessing is baked in, else (B, 3, S, S) float32, normalised."""
    if about["input"]["dtype"] == "uint8":
        return pixels
    images = pixels.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    mean, std = (np.array(about[name], np.float32).reshape(1, 3, 1, 1) for name in ("mean", "std"))
    return np.ascontiguousarray((images - mean) / std)


def softmax(logits: np.ndarray) -> np.ndarray:
    """(B, C) -> (B, C) float64 probabilities."""
    shifted = np.asarray(logits, np.float64) - np.max(logits, axis=1, keepdims=True).astype(np.float64)
    exp = np.exp(shifted)
    return exp / exp.sum(axis=1, keepdims=True)


def session_of(model: Path | bytes, threads: int | None = None) -> InferenceSession:
    """Open an ONNX file, or its bytes, in onnxruntime on the CPU; threads: None for its default.

    onnxruntime 1.32 for Linux keeps an identity of the machine and a list of events in the home folder, unless that is switched off.

    Raises:
        TutelageError: onnxruntime is not installed, or cannot read the file.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError:
        raise TutelageError("onnxruntime is not installed", "run `pip install onnxruntime`") from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads:
        options.intra_op_num_threads = threads
    source, name = (model, "the model") if isinstance(model, bytes) else (str(model), str(model))
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common class
        reason = " ".join(str(error).split())[:300]
        raise TutelageError(f"{name}: onnxruntime cannot read this file: {reason}", "export again") from None


def open_export(folder: Path, which: str = "auto", threads: int | None = None) -> Model:
    """Open the model of an export folder, after checking that no file was changed.

    Args:
        folder: as `tutelage export` wrote it. which: "float", "int8", or "auto": the one that export.json recommends.
        threads: of onnxruntime; None for its default.

    Raises:
        TutelageError: not an export folder, a file changed or missing, the model is not in it, or the files do not fit each other.
    """
    about = checked(folder)
    name = recommended_of(about, (*NAMES.values(),), folder / EXPORT) if which == "auto" else NAMES[which]
    if name not in about["files"]:
        there = ", ".join(one for one, file in NAMES.items() if file in about["files"])
        raise TutelageError(f"--model {which}: {folder} has no {name}", f"use --model {there}, or export again")
    preprocess, labels = contents(folder, about)
    session = session_of(folder / name, threads)
    _check_shapes(session, preprocess, len(labels), folder / name)
    return Model(session, preprocess, labels, name)


def contents(folder: Path, about: JSON) -> tuple[JSON, list[str]]:
    """Return the contents of preprocess.json and the class names, checked. about: contents of export.json, from `checked`."""
    if lacking := [name for name in (ABOUT, LABELS) if name not in about["files"]]:
        raise TutelageError(f"{folder / EXPORT} does not list {' and '.join(lacking)}", "export again")
    preprocess = preprocess_of(bytes_in(folder / ABOUT), folder / ABOUT)
    return preprocess, labels_of(bytes_in(folder / LABELS), about, preprocess, folder / LABELS)


def _check_shapes(session: InferenceSession, preprocess: JSON, classes: int, path: Path) -> None:
    """Check that a model takes the input that preprocess.json describes, and returns as many classes as labels.txt names."""
    (height, width), given = sides(preprocess["size"]), preprocess["input"]
    shape = (3, height, width) if given["layout"] == "NCHW" else (height, width, 3)
    inputs, outputs = session.get_inputs(), session.get_outputs()
    kind = {"float32": "tensor(float)", "uint8": "tensor(uint8)"}[given["dtype"]]
    takes = [f"{one.name} {one.type} {tuple(one.shape[1:])}" for one in inputs]
    if (
        len(inputs) != 1
        or (inputs[0].name, inputs[0].type) != (given["name"], kind)
        or not _fits(inputs[0].shape, shape)
    ):
        message = f"{path} takes {shown(takes)}, but {ABOUT} beside it says {given['name']} {kind} {shape}"
        raise TutelageError(message, "export again")
    if not _fits(outputs[0].shape, (classes,)):
        message = f"{path} returns {tuple(outputs[0].shape[1:])}, but {LABELS} beside it names {classes}"
        raise TutelageError(message, "export again")


def _fits(shape: Sequence[object], wanted: Sequence[int]) -> bool:
    """Whether a model's shape, whose first side is the batch, begins with these sides; those that are open have names."""
    return len(shape) > len(wanted) and all(
        side == want for side, want in zip(shape[1:], wanted, strict=False) if isinstance(side, int)
    )


def checked(folder: Path) -> JSON:
    """Return the contents of export.json, after checking the hashes of the files that it lists.

    Raises:
        TutelageError: there is no valid export.json, or files are missing or changed; the message names them all.
    """
    about = listed(folder)
    if changed := changed_files(folder, about["files"]):
        message = f"{folder}: files do not match the hashes in {EXPORT}: {shown(changed)}"
        raise TutelageError(message, "restore them, or export again")
    return about


def listed(folder: Path, flag: str = "") -> JSON:
    """Return the contents of export.json: the files' hashes by name, and the rest. flag: put before the folder in an error.

    Raises:
        TutelageError: there is no valid export.json.
    """
    try:
        about = json_of(text_in(folder / EXPORT))
        return {**about, "files": dict(about["files"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "strerror", None) or "cannot be read"
        hint = "create one with `tutelage export RUN`, which writes RUN/export"
        raise TutelageError(f"{flag}{folder} is not an export folder ({EXPORT}: {reason})", hint) from None


def changed_files(folder: Path, files: dict[str, str]) -> list[str]:
    """Names of the files that are missing or whose SHA-256 differs."""
    return [name for name, digest in files.items() if file_digest(folder / name) != digest]


def files_in(places: Sequence[str]) -> list[str]:
    """Paths of the images that are named or lie in the folders, in the order given; within a folder by name.

    Folders are walked as in training (`walk.walk`), but tars and Parquet files in them are only named.

    Raises:
        TutelageError: a place does not exist or is a folder of tutelage's own, or there is no image in any of them.
    """
    gone = [place for place in places if not os.path.exists(place)]
    if gone:
        raise TutelageError(f"no such file or folder: {shown(gone)}", "name images, or folders of images")
    found: list[str] = []
    for place in places:
        if not os.path.isdir(place):
            found.append(str(place))
            continue
        listed = walk(place)
        found += [one.path for one in listed if one.kind == IMAGE]
        if packed := [one.name for one in listed if one.kind == CONTAINER]:
            message = f"{place}: tars and Parquet files, which predict does not read: {shown(packed)}"
            logging.getLogger("tutelage").warning(f"{message}; unpack their images")
        if closed := [f"{one.path} ({one.reason})" for one in listed if one.kind == CLOSED]:
            logging.getLogger("tutelage").warning(f"folders that cannot be opened: {shown(closed)}")
    if not found:
        raise TutelageError(f"no image in {shown(places)}", f"name files that end in {', '.join(SUFFIXES)}")
    return list(dict.fromkeys(found))


def file_bytes(path: str) -> bytes:
    """Return the bytes of a file. Raises Unreadable: it cannot be read."""
    try:
        return bytes_in(path)
    except OSError as error:
        raise Unreadable(error.strerror or "cannot be read") from None


def predict_images(model: Model, paths: Iterable[str], advance: Callable[[int], None] = lambda n: None) -> Predictions:
    """Classify image files; unreadable ones are listed in `rejected` and do not stop the rest."""
    result, batch = Predictions(model.labels, model.about.get("unsure_below")), []
    for path in paths:
        try:
            batch.append(model.pixels(file_bytes(path)))
            result.paths.append(path)
        except Unreadable as error:
            result.rejected.append((path, str(error)))
        if len(batch) == BATCH:
            result.probabilities.extend(model.probabilities(np.stack(batch)))
            batch = []
        advance(1)
    if batch:
        result.probabilities.extend(model.probabilities(np.stack(batch)))
    return result
