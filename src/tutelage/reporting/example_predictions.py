"""Files that hold what the page shows of single test images: each model's probabilities, and where student and teacher disagree."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tutelage.files import atomic_write, intact, read_json, write_json
from tutelage.json_object import JSON

SHOWN = 24  # images shown, those on which student and teacher disagree most
SIDE = 96  # largest side of their thumbnails in pixels
COUNTS = "counts "  # prefix of a model's name in predictions.npz: its pixel counts on each image (masks)
STUDENTS = ("delivered", "distilled", "baseline")  # the first that a run has is the one whose test images are shown
DECIDED = "decided "  # prefix of a model's name: its decisions, which float16 probabilities may not give exactly


def write_evidence(
    folder: Path,
    labels: np.ndarray,
    ids: Sequence[str],
    image: Callable[[int], np.ndarray],
    probabilities: dict[str, np.ndarray],
) -> None:
    """Write predictions.npz and disagreements.json into a report folder.

    Args:
        labels: (n,) int64. ids: n names. image: row -> (H, W, 3) uint8. probabilities: (n, C) float for each model.
    """
    with atomic_write(folder / "predictions.npz") as path, path.open("wb") as file:
        halves = {name: one.astype(np.float16) for name, one in probabilities.items()}
        decided = {f"{DECIDED}{name}": one.argmax(axis=1).astype(np.int32) for name, one in probabilities.items()}
        np.savez_compressed(file, labels=labels.astype(np.int32), **halves, **decided)  # type: ignore[arg-type]
    shown = []
    student = shown_student(probabilities)
    if student and "teacher" in probabilities:
        for row in disagreements(probabilities[student], probabilities["teacher"]).tolist():
            models = {name: [int(one[row].argmax()), float(one[row].max())] for name, one in probabilities.items()}
            shown.append({"id": ids[row], "label": int(labels[row]), **models, "jpeg": thumbnail(image(row))})
    write_json(folder / "disagreements.json", {"images": shown})


def shown_student(models: Iterable[str]) -> str | None:
    """The student whose test images are shown: the delivered one if it is a separate model, else the distilled one, else the baseline."""
    there = set(models)
    return next((name for name in STUDENTS if name in there), None)


def disagreements(student: np.ndarray, teacher: np.ndarray, most: int = SHOWN) -> np.ndarray:
    """Return the images that two models decide differently, the most confident disagreements first.

    Args:
        student, teacher: (n, C) float probabilities.

    Returns:
        (m,) int64 rows, m <= most, by decreasing product of both models' confidence.
    """
    apart = np.flatnonzero(student.argmax(axis=1) != teacher.argmax(axis=1))
    sure = student[apart].max(axis=1) * teacher[apart].max(axis=1)
    return apart[np.argsort(-sure, kind="stable")[:most]]


def thumbnail(image: np.ndarray, side: int = SIDE) -> str:
    """A JPEG, at most `side` pixels high and wide, as base-64 text."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    picture.thumbnail((side, side), Image.Resampling.BICUBIC)
    return encoded(picture, "JPEG", quality=85)


def encoded(picture: Image.Image, kind: str, **options: object) -> str:
    """A picture's file as base-64 text. kind, options: as Pillow's `save` takes them."""
    data = io.BytesIO()
    picture.save(data, kind, **options)
    return base64.b64encode(data.getvalue()).decode("ascii")


def remove_evidence(folder: Path) -> None:
    """Delete the files that an earlier evaluation wrote."""
    for name in ("predictions.npz", "disagreements.json", "pictures.json"):
        (folder / name).unlink(missing_ok=True)


def read_evidence(folder: Path) -> tuple[np.ndarray, dict[str, np.ndarray], list[JSON]]:
    """Labels (n,), probabilities (n, C) float32 of each model, and the disagreements; all empty if the run kept none.

    If the delivered student is one of the other models, the probabilities stand under both names.
    """
    path = folder / "predictions.npz"
    if not path.exists():
        return np.zeros(0, np.int64), {}, []
    with np.load(intact(path), allow_pickle=False) as kept:
        if "labels" not in kept.files:  # masks: pixel counts only
            return np.zeros(0, np.int64), {}, []
        names = [name for name in kept.files if name != "labels" and not name.startswith(DECIDED)]
        models = {name: kept[name].astype(np.float32) for name in names}
        labels = kept["labels"].astype(np.int64)
    if "delivered" not in models and (what := _kept_as(folder)) in models:
        models["delivered"] = models[what]
    return labels, models, read_json(intact(folder / "disagreements.json"))["images"]


def _kept_as(folder: Path) -> str:
    """The name under which predictions.npz keeps the delivered student."""
    delivered = (read_json(folder / "result.json") or {}).get("delivered") or {}
    return delivered.get("what", "delivered")


def read_counts(path: Path, model: str) -> np.ndarray:
    """Read a model's result on each of n test images from predictions.npz: (n,) bool, whether it is right; or (n, C, 3) int32 of
    `metrics.pixel_counts`. A delivered student that is one of the other models is looked up under that model's name."""
    with np.load(intact(path), allow_pickle=False) as kept:
        if not {f"{COUNTS}{model}", f"{DECIDED}{model}"} & set(kept.files):
            model = _kept_as(path.parent) if model == "delivered" else model
        if f"{COUNTS}{model}" in kept.files:
            return kept[f"{COUNTS}{model}"]
        return kept[f"{DECIDED}{model}"].astype(np.int64) == kept["labels"]


def read_pictures(folder: Path, classes: Sequence[str]) -> JSON:
    """Pictures of test images with masks, and the colour of each class; empty for a run without masks."""
    if not (folder / "pictures.json").exists():
        return {}
    found = read_json(intact(folder / "pictures.json"))
    hexes = ["#" + "".join(f"{part:02x}" for part in colour) for colour in found["colours"]]
    return {"images": found["images"], "colours": list(zip(classes, hexes, strict=True))}
