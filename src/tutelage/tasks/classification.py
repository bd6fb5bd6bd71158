"""Classification, one class per image: pooled features, logistic regression, a linear classifier, accuracy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tutelage.errors import TutelageError
from tutelage.settings import groups as g
from tutelage.settings.commands import CommitteeSettings, Curation, DistillSettings, RunSettings
from tutelage.settings.groups import Group
from tutelage.tasks import class_names

SCALE_SAMPLE = 2048  # gallery images whose features determine the scale used to standardise the probe's features
PASSES = {"head": 15, "full": 15, "long": 30}  # over the labelled images, for each way to run the last stage
RATES = {"head": 1e-3, "full": 1e-4, "long": 5e-4}  # learning rates of the last stage, at batch 128
FROM_LOGITS = ("distilled", "head", "full", "long")  # candidates of the last stage for a student distilled from logits
FROM_FEATURES = ("head", "full", "long")  # candidates for a student distilled from features, without labels
SCRATCH_RATE, PRETRAINED_RATE = 8e-3, 2e-3  # learning rates at batch 128 of students from random and pretrained weights
IMAGES = 400_000  # that a student sees if neither --steps nor --epochs is given
BATCH = 64
FULL_BATCH = 32  # of the teacher's fine-tuning
AT_ONCE = 256  # images in one forward pass of an evaluation
SCORE = "accuracy"  # name of the mean of `image_scores`
MAIN = "accuracy"  # the main score of `judged`
POOLED = True  # features are of whole images, and a head can be fitted on them
GRID = False  # targets are of whole images, not on a grid
UNUSED = ("decoder", "task_agnostic_features")  # settings without effect
EACH = "accuracy"  # the mean of `image_scores`
COUNTED = 1024  # images whose targets are used to estimate the share of each class
RARE_CLASSES = 0.5  # with --class-weight balanced, a class weighs (C x share)^-RARE_CLASSES in the distillation


def models() -> tuple[Any, Any]:
    """Return the modules of the teacher and of its head."""
    from tutelage.models import adapted_teacher, heads

    return adapted_teacher, heads


def check(settings: Group) -> list[TutelageError]:
    """Return one fault for each setting that this task does not support."""
    task, other, faults = "with --task classification", "or use --task segmentation", []
    for kind in ("teacher", "student"):
        if _oblong(settings, kind):
            message = f"--{kind}-size {getattr(settings, f'{kind}_size')} {task} must be one number, for a square"
            faults.append(TutelageError(message, f"give one number, {other}"))
    if isinstance(settings, g.Teacher) and settings.teacher_window is not None:
        message = f"--teacher-window {settings.teacher_window} {task} is not supported"
        faults.append(TutelageError(message, f"leave it out, {other}"))
    return faults


def _oblong(settings: Group, kind: str) -> bool:
    return isinstance(getattr(settings, f"{kind}_size", None), str)


def read(settings: Curation) -> Any:
    """Read the target set."""
    from tutelage.data.target_set import read_target_set

    return read_target_set(
        settings.target, val=settings.val, test=settings.test, classes=class_names(settings),
        group_by=settings.group_by,
    )  # fmt: skip


def read_any(target: str, classes: tuple[str, ...]) -> Any:
    """Read all labelled images of one path, whatever their split."""
    from tutelage.data.target_set import read_any

    return read_any(target, classes)


def labels_of(found: Any, good: np.ndarray, images: Any, cache: Path) -> Any:
    """Return the labels of the rows `good` of a target set."""
    return found.labels[good]


def views(settings: g.Views) -> Any:
    """Return the view settings of a run."""
    from tutelage.features.view_batches import ViewSettings

    return ViewSettings(settings.view_seed, settings.flip, settings.crop_area, resize=settings.resize)


def scale(network: Any, features: Callable[[int], np.ndarray]) -> Any:
    """Return the features' mean and standard deviation, which a head needs. features: number of gallery images -> their features."""
    from tutelage.models import heads

    return heads.scale_of(features(SCALE_SAMPLE))


def forward_of(module: Any, network: Any) -> Any:
    """Return the forward function of a whole teacher whose logits have the shape of its head's."""
    return module


def head_truth(labels: Any, network: Any) -> Any:
    """Return the labels in the form that a head is fitted on."""
    return labels


def extra_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return scores of held-out rows (N, C) with labels (N,) in addition to accuracy and log loss: none."""
    return {}


def whole_teacher(encoder: Any, module: Any, classes: int, head: Any) -> tuple[Any, Any, Any]:
    """Return a teacher to fine-tune, its encoder and its head. module: a copy of the encoder's."""
    from tutelage.models import adapted_teacher

    teacher = adapted_teacher.whole_teacher(module, encoder.features, classes, head)
    return teacher, teacher.backbone, teacher.head


def of_teacher(encoder: Any, network: Any, mode: str, classes: int) -> dict[str, Any]:
    """Return the teacher's entries in a result. width: numbers per view, of pooled features or, if it is fine-tuned, of logits."""
    return {"width": encoder.features if mode == "probe" else classes}


def grid(settings: g.Student) -> None:
    """Return the grid of the student's logits in the distillation; None, because they are of whole images."""
    return None


def member_grid(settings: CommitteeSettings, images: int, classes: int) -> None:
    """Return the grid of the predictions of the committee's students; None, because they are of whole images."""
    return None


def member_truth(labels: np.ndarray, grid: None, fold: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the labels (n,) of held-out images, and (n,) bool whether they can be judged.

    fold: (n,) of labelled images; None for validation images, all of which can be judged.
    """
    from tutelage.models.heads import judgeable

    return labels, np.ones(len(labels), bool) if fold is None else judgeable(labels, fold)


def log_probabilities(
    module: Any, network: Any, images: Any, views: Any, accelerator: Any, grid: None, advance: Any
) -> np.ndarray:
    """Return (n, C) float16 log probabilities of a student for whole images, averaged over `views.looks`."""
    from tutelage.features.view_batches import view_outputs
    from tutelage.metrics import LEAST_LOG, log_softmax

    found = [
        log_softmax(view_outputs(module, module, network, images, look, views, accelerator, advance, AT_ONCE))
        for look in views.looks
    ]
    return log_softmax(np.mean(found, axis=0)).clip(LEAST_LOG).astype(np.float16)


def flops_of(encoder: Any) -> int:
    """Return the FLOPs of the frozen encoder for one image."""
    from tutelage.device import flops

    return flops(encoder.module, encoder.size)


def largest_outputs(encoder: Any, settings: RunSettings, classes: int) -> tuple[int, int]:
    """Return, before a run, the largest number of values to be cached per view, and the number of views per image."""
    return encoder.features, 1 if settings.objective == "task-agnostic" else len(views(settings).looks)


def widths(result: dict[str, Any], settings: DistillSettings) -> list[int]:
    """Return how many values per view may be cached, largest first: features, or logits. result: of the teacher's stage."""
    features = result["teacher"]["features"]
    return (
        [features]
        if settings.objective == "task-agnostic"
        else sorted({result["width"], result["classes"]}, reverse=True)
    )


def teacher_for_distillation(
    folder: Path, result: dict[str, Any], settings: DistillSettings, accelerator: Any, level: int
) -> Any:
    """Load the teacher for the distillation: adapted, or frozen for the task-agnostic objective. level: index into `widths`."""
    from tutelage.models import adapted_teacher

    load = adapted_teacher.frozen if settings.objective == "task-agnostic" else adapted_teacher.load_adapted
    teacher = load(folder, result, settings.teacher_weights, accelerator)
    return adapted_teacher.with_logits(teacher) if level else teacher


def student(settings: g.Student, classes: int) -> Any:
    """Build a new student."""
    from tutelage.models.students import build_student

    return build_student(settings.student, classes, settings.student_weights, settings.student_size)


def rebuilt(about: dict[str, Any], classes: int) -> Any:
    """Build a student as described in a result, with random weights."""
    from tutelage.models.students import build_student

    return build_student(about["name"], classes, "scratch", about["size"])


def distillation_module(module: Any, features: int, settings: DistillSettings) -> Any:
    """Return the student with its projector for the distillation; None, because `transfer` adds it. features: width to match."""
    return None


def adapted(folder: Path, result: dict[str, Any], weights: str, accelerator: Any) -> Any:
    """Load the teacher of a run for evaluation."""
    from tutelage.models import adapted_teacher

    return adapted_teacher.load_adapted(folder, result, weights, accelerator)


def head_of(module: Any) -> Any:
    """Return the part of a student that is specific to this task, its classifier."""
    from tutelage.models.students import head_of

    return head_of(module)


def image_scores(predictions: np.ndarray | list[np.ndarray], labels: np.ndarray) -> np.ndarray:
    """Return (n,) bool: whether each image is classified correctly."""
    return np.asarray(predictions).argmax(1) == labels


def predictions_of(outputs: np.ndarray, labels: Any, positions: np.ndarray) -> list[np.ndarray]:
    """Return an exported model's outputs (n, C) for these images in the form of `student_predictions`."""
    return list(outputs)


def rows_of(outputs: np.ndarray) -> np.ndarray:
    """Return outputs (n, C) as (N, C), one row per decision."""
    return outputs


def confidence(predictions: np.ndarray | list[np.ndarray], labels: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Return (n,) float32 confidence of each image and (n,) bool whether it is classified correctly; None if a task has neither."""
    from tutelage.metrics import softmax

    return softmax(np.asarray(predictions)).max(1).astype(np.float32), image_scores(predictions, labels)


def student_predictions(
    module: Any, network: Any, images: Any, labels: Any, settings: Any, accelerator: Any, advance: Any
) -> np.ndarray:
    """Return (n, C) float32 logits of whole images. module: a trained student or a whole teacher."""
    from tutelage.features.view_batches import CLEAN, view_outputs

    return view_outputs(module, module, network, images, CLEAN, settings, accelerator, advance, AT_ONCE)


def teacher_predictions(
    adapted: Any, cache: Any, images: Any, labels: Any, settings: Any, accelerator: Any, advance: Any
) -> np.ndarray:
    """Return (n, C) float32 logits of whole images; missing outputs are computed and added to the cache."""
    from tutelage.features.output_cache import compute_outputs
    from tutelage.features.view_batches import CLEAN

    compute_outputs(cache, adapted.network, images, [CLEAN], settings, advance)
    return adapted.head(cache.table(images, CLEAN).rows())


def agreement(one: np.ndarray, other: np.ndarray) -> float:
    """Return the share of images for which two models' logits (n, C) predict the same class."""
    return float((one.argmax(axis=1) == other.argmax(axis=1)).mean())


def judged(predictions: np.ndarray, labels: np.ndarray, classes: int) -> dict[str, Any]:
    """Return all scores."""
    from tutelage.metrics import classification

    return classification(np.asarray(predictions), labels)


def keep_evidence(folder: Path, test: Any, predictions: dict[str, np.ndarray], about: dict[str, Any]) -> None:
    """Write what the report page shows of single test images."""
    from tutelage.metrics import softmax
    from tutelage.reporting.example_predictions import write_evidence

    probabilities = {name: softmax(np.asarray(logits)) for name, logits in predictions.items()}
    write_evidence(folder, test.labels, test.ids, test.images.__getitem__, probabilities)
