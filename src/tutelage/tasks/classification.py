"""One class an image: pooled features, logistic regression, a linear classifier, accuracy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tutelage.errors import TutelageError
from tutelage.tasks import class_names

SCALE_SAMPLE = 2048  # gallery images whose features give the probe's scale
PASSES = {"head": 15, "full": 15, "long": 30}  # of the last stage, over the labelled images
RATES = {"head": 1e-3, "full": 1e-4, "long": 5e-4}  # at batch 128
FROM_LOGITS = ("distilled", "head", "full", "long")  # of the last stage, that are judged
FROM_FEATURES = ("head", "full", "long")  # of a student that was distilled without labels
SCRATCH_RATE, PRETRAINED_RATE = 8e-3, 2e-3  # of students, at batch 128, by where their weights come from
IMAGES = 400_000  # that a student sees where neither --steps nor --epochs is given
BATCH = 64
FULL_BATCH = 32  # of the teacher's fine-tuning
AT_ONCE = 256  # images in one pass of an evaluation
SCORE = "accuracy"  # of `image_scores`, on the mean
MAIN = "accuracy"  # of `judged`
POOLED = True  # features of whole images, on which a head may be fitted
GRID = False  # one target for the whole image
UNUSED = ("decoder", "agnostic_features")  # settings that change nothing
EACH = "accuracy"  # the mean of `image_scores`
COUNTED = 1024  # images in which the classes of the targets are counted
RARE_CLASSES = 0.5  # a class weighs (C share) to the minus this in the distillation, where --class-weight balanced asks


def models() -> tuple[Any, Any]:
    """The files of the teacher and of its head."""
    from tutelage.models import adapted_teacher, heads

    return adapted_teacher, heads


def check(settings: dict[str, Any]) -> list[TutelageError]:
    """Settings that this task cannot have."""
    task, other, faults = "with --task classification", "or use --task segmentation", []
    for kind in ("teacher", "student"):
        if _oblong(settings, kind):
            message = f"--{kind}-size {settings[f'{kind}_size']} {task} must be one number, for a square"
            faults.append(TutelageError(message, f"give one number, {other}"))
    if settings.get("teacher_window") is not None:
        message = f"--teacher-window {settings['teacher_window']} {task} is not supported"
        faults.append(TutelageError(message, f"leave it out, {other}"))
    return faults


def _oblong(settings: dict[str, Any], kind: str) -> bool:
    return isinstance(settings.get(f"{kind}_size"), str)


def read(settings: dict[str, Any]) -> Any:
    """The target set."""
    from tutelage.data.target_set import read_target_set

    return read_target_set(
        settings["target"], val=settings["val"], test=settings["test"], classes=class_names(settings),
        group_by=settings["group_by"],
    )  # fmt: skip


def read_any(target: str, classes: tuple[str, ...]) -> Any:
    """All labelled images of one path, whatever their split."""
    from tutelage.data.target_set import read_any

    return read_any(target, classes)


def labels_of(found: Any, good: np.ndarray, images: Any, cache: Path) -> Any:
    """The labels of these rows of a target set."""
    return found.labels[good]


def views(settings: dict[str, Any]) -> Any:
    """Views of a run with these settings."""
    from tutelage.features.view_batches import ViewSettings

    return ViewSettings(settings["view_seed"], settings["flip"], settings["crop_area"], resize=settings["resize"])


def scale(network: Any, features: Callable[[int], np.ndarray]) -> Any:
    """What a head needs to know of the features beforehand: their mean and spread. features: of so many gallery images."""
    from tutelage.models import heads

    return heads.scale_of(features(SCALE_SAMPLE))


def forward_of(module: Any, network: Any) -> Any:
    """What gives a whole teacher's logits as its head gives them."""
    return module


def head_truth(labels: Any, network: Any) -> Any:
    """Labels as a head takes them."""
    return labels


def extra_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Scores of held-out rows (N, C) with labels (N,), beside accuracy and log loss."""
    return {}


def whole_teacher(encoder: Any, module: Any, classes: int, head: Any) -> tuple[Any, Any, Any]:
    """A teacher to fine-tune; its encoder and its head. module: a copy of the encoder's."""
    from tutelage.models import adapted_teacher

    teacher = adapted_teacher.whole_teacher(module, encoder.features, classes, head)
    return teacher, teacher.backbone, teacher.head


def of_teacher(encoder: Any, network: Any, mode: str, classes: int) -> dict[str, Any]:
    """What a result says of the teacher: numbers that it gives for a view, pooled features, or logits once it is fine-tuned."""
    return {"width": encoder.features if mode == "probe" else classes}


def grid(settings: dict[str, Any]) -> None:
    """Rows and columns of the student's logits in the distillation: none."""
    return None


def member_grid(settings: dict[str, Any], images: int, classes: int) -> None:
    """Rows and columns of what a student of the committee predicts for each of so many images: none."""
    return None


def member_truth(labels: np.ndarray, grid: None, fold: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Labels (n,) of held-out images, and (n,) bool whether they can be judged.

    fold: (n,) of labelled images; None for validation images.
    """
    from tutelage.models.heads import judgeable

    return labels, np.ones(len(labels), bool) if fold is None else judgeable(labels, fold)


def log_probabilities(
    module: Any, network: Any, images: Any, views: Any, accelerator: Any, grid: None, advance: Any
) -> np.ndarray:
    """(n, C) float16: a student's log probabilities of whole images, the mean over the looks of `views`."""
    from tutelage.features.view_batches import view_outputs
    from tutelage.metrics import LEAST_LOG, log_softmax

    found = [
        log_softmax(view_outputs(module, module, network, images, look, views, accelerator, advance, AT_ONCE))
        for look in views.looks
    ]
    return log_softmax(np.mean(found, axis=0)).clip(LEAST_LOG).astype(np.float16)


def flops_of(encoder: Any) -> int:
    """FLOPs of the frozen encoder for one image."""
    from tutelage.device import flops

    return flops(encoder.module, encoder.size)


def largest_outputs(encoder: Any, settings: dict[str, Any], classes: int) -> tuple[int, int]:
    """Before a run: numbers that are kept of a view, and of how many views of an image."""
    return encoder.features, 1 if settings["objective"] == "agnostic" else len(views(settings).looks)


def widths(result: dict[str, Any], settings: dict[str, Any]) -> list[int]:
    """Numbers that are kept of each view, most first: features, or the classes' logits. result: of the teacher's stage."""
    features = result["teacher"]["features"]
    return (
        [features]
        if settings["objective"] == "agnostic"
        else sorted({result["width"], result["classes"]}, reverse=True)
    )


def teacher_for_distillation(
    folder: Path, result: dict[str, Any], settings: dict[str, Any], accelerator: Any, level: int
) -> Any:
    """The teacher as the transfer needs it: adapted, or frozen as it was. level: which of `widths`."""
    from tutelage.models import adapted_teacher

    load = adapted_teacher.frozen if settings["objective"] == "agnostic" else adapted_teacher.load_adapted
    teacher = load(folder, result, settings["teacher_weights"], accelerator)
    return adapted_teacher.with_logits(teacher) if level else teacher


def student(settings: dict[str, Any], classes: int) -> Any:
    """A new student."""
    from tutelage.models.students import build_student

    return build_student(settings["student"], classes, settings["student_weights"], settings["student_size"])


def rebuilt(about: dict[str, Any], classes: int) -> Any:
    """A student as a result describes it, its weights random."""
    from tutelage.models.students import build_student

    return build_student(about["name"], classes, "scratch", about["size"])


def distillation_module(module: Any, features: int, settings: dict[str, Any]) -> Any:
    """The student with what only the transfer needs beside it; None: `transfer` sees to it. features: to be matched."""
    return None


def adapted(folder: Path, result: dict[str, Any], weights: str, accelerator: Any) -> Any:
    """The teacher of a run, as evaluation needs it."""
    from tutelage.models import adapted_teacher

    return adapted_teacher.load_adapted(folder, result, weights, accelerator)


def head_of(module: Any) -> Any:
    """The part of a student that only this task has."""
    from tutelage.models.students import head_of

    return head_of(module)


def image_scores(said: np.ndarray | list[np.ndarray], labels: np.ndarray) -> np.ndarray:
    """(n,) bool: which images are classified rightly."""
    return np.asarray(said).argmax(1) == labels


def predictions_of(outputs: np.ndarray, labels: Any, positions: np.ndarray) -> list[np.ndarray]:
    """What an exported model's outputs (n, C) of these images say: as `student_predictions`."""
    return list(outputs)


def rows_of(outputs: np.ndarray) -> np.ndarray:
    """(n, C) -> (N, C): what is decided on."""
    return outputs


def confidence(said: np.ndarray | list[np.ndarray], labels: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """(n,) float32 largest probability of each image, and (n,) bool whether it is right; None where a task has no such thing."""
    from tutelage.metrics import softmax

    return softmax(np.asarray(said)).max(1).astype(np.float32), image_scores(said, labels)


def student_predictions(
    module: Any, network: Any, images: Any, labels: Any, settings: Any, accelerator: Any, advance: Any
) -> np.ndarray:
    """(n, C) float32 logits of whole images. module: trained, of the student or of a whole teacher."""
    from tutelage.features.view_batches import CLEAN, view_outputs

    return view_outputs(module, module, network, images, CLEAN, settings, accelerator, advance, AT_ONCE)


def teacher_predictions(
    adapted: Any, cache: Any, images: Any, labels: Any, settings: Any, accelerator: Any, advance: Any
) -> np.ndarray:
    """(n, C) float32 logits of whole images, from the cache of outputs or computed into it."""
    from tutelage.features.output_cache import compute_outputs
    from tutelage.features.view_batches import CLEAN

    compute_outputs(cache, adapted.network, images, [CLEAN], settings, advance)
    return adapted.head(cache.table(images, CLEAN).rows())


def agreement(one: np.ndarray, other: np.ndarray) -> float:
    """Share of images on which two (n, C) logits decide alike."""
    return float((one.argmax(axis=1) == other.argmax(axis=1)).mean())


def judged(said: np.ndarray, labels: np.ndarray, classes: int) -> dict[str, Any]:
    """All scores."""
    from tutelage.metrics import classification

    return classification(np.asarray(said), labels)


def keep_evidence(folder: Path, test: Any, said: dict[str, np.ndarray], about: dict[str, Any]) -> None:
    """What the page shows of single test images."""
    from tutelage.metrics import softmax
    from tutelage.reporting.example_predictions import write_evidence

    probabilities = {name: softmax(logits) for name, logits in said.items()}
    write_evidence(folder, test.labels, test.ids, test.images.__getitem__, probabilities)
