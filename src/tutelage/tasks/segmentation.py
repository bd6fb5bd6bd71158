"""Segmentation, one class per pixel: features by level, a dense head, a student with decoder, mIoU. Functions as in `classification`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tutelage.errors import TutelageError
from tutelage.image_size import sides
from tutelage.settings import groups as g
from tutelage.settings.commands import CommitteeSettings, Curation, DistillSettings, RunSettings
from tutelage.settings.groups import Group
from tutelage.tasks import class_names

PASSES = {"head": 40, "full": 40, "long": 200, "steep": 200}
RATES = {"head": 4e-3, "full": 1e-3, "long": 8e-3, "steep": 2e-2}  # at batch 128
FROM_LOGITS = ("distilled", "head", "full", "long")
FROM_FEATURES = ("long", "steep")  # these start with a decoder of random weights
SCRATCH_RATE, PRETRAINED_RATE = 2e-2, 5e-3
IMAGES = 8_000
BATCH = 8
FULL_BATCH = 8
AT_ONCE = 16
SCORE = "mean IoU"
MAIN = "miou"  # the main score of `judged`
POOLED = False
GRID = True
EACH = "miou_of_images"  # the mean of `image_scores`
UNUSED = ()
LEVELS = 4  # logits may be cached at half the student's stride, or at once, twice or four times that stride
COUNTED = 64  # images whose targets are used to estimate the share of each class
RARE_CLASSES = 1.0  # with --class-weight balanced, a class weighs (C x share)^-RARE_CLASSES in the distillation


def models() -> tuple[Any, Any]:
    """Return the modules of the teacher and of its head."""
    from tutelage.models import segmentation_heads, segmentation_teachers

    return segmentation_teachers, segmentation_heads


def check(settings: Group) -> list[TutelageError]:
    """Return one fault for each setting that this task does not support, before anything is read."""
    from tutelage.tasks.segmentation_settings import faults_of

    return faults_of(settings)


def read(settings: Curation) -> Any:
    """Read the target set and check its masks."""
    from tutelage.data.segmentation_set import read_dense_set
    from tutelage.models.teachers import default_size, resolve

    size = settings.student_size or default_size(resolve(settings.student, "student"))
    return read_dense_set(
        settings.target, val=settings.val, test=settings.test, classes=class_names(settings),
        group_by=settings.group_by, size=size,
    )  # fmt: skip


def read_any(target: str, classes: tuple[str, ...]) -> Any:
    """Read all images and masks of one path, whatever their split."""
    from tutelage.data.segmentation_set import read_any_dense

    return read_any_dense(target, classes)


def labels_of(found: Any, good: np.ndarray, images: Any, cache: Path) -> Any:
    """Return the masks of the rows `good` of a target set."""
    from tutelage.data.manifest import load_masks

    rows = np.arange(len(found.refs))[good]
    of = {"classes": found.classes, **found.about(rows)}
    return load_masks(cache, [found.masks[i] for i in rows], images.sizes, of, [found.truths[i] for i in rows])


def views(settings: g.Views) -> Any:
    """Return the view settings of a run; aspect ratios of crops vary around the image's."""
    from tutelage.features.view_batches import ViewSettings

    return ViewSettings(settings.view_seed, settings.flip, settings.crop_area, resize="squash", follow=True)


def scale(network: Any, features: Callable[[int], np.ndarray]) -> Any:
    """Return the shapes of the features' levels, which a head needs."""
    return network.shape


def forward_of(module: Any, network: Any) -> Any:
    """Return the forward function of a whole teacher whose logits have the shape of its head's, the finest level's grid."""
    return lambda images: module.on_grid(images, network.shape[0][1:])


def head_truth(labels: Any, network: Any) -> Any:
    """Return the masks on the grid of a head's logits."""
    from tutelage.models.segmentation_heads import truth_of

    return truth_of(labels, network.shape)


def extra_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the mean IoU of held-out pixels (N, C) with labels (N,), in addition to accuracy and log loss."""
    from tutelage.metrics import confusion, intersection_over_union

    table = confusion(labels, logits.argmax(axis=1), logits.shape[1])
    return {"miou": float(np.nanmean(intersection_over_union(table)))}


def whole_teacher(encoder: Any, module: Any, classes: int, head: Any) -> tuple[Any, Any, Any]:
    """Return a teacher to fine-tune, its encoder and its head. module: a copy of the encoder's."""
    from tutelage.models import segmentation_teachers

    teacher = segmentation_teachers.whole_teacher(encoder, module, classes, head)
    return teacher, teacher.pyramid.encoder, teacher.head


def of_teacher(encoder: Any, network: Any, mode: str, classes: int) -> dict[str, Any]:
    """Return the teacher's entries in a result: the channels of its logits and of its deepest level."""
    return {"width": classes, "deepest": network.shape[-1][0]}


def grids(settings: g.Student) -> list[tuple[int, int]]:
    """Return the grids on which logits may be cached: that of half the stride of the student's logits, and coarser ones."""
    from tutelage.models.segmentation_grids import grid_of
    from tutelage.models.segmentation_students import STRIDES
    from tutelage.models.teachers import default_size, resolve

    size = settings.student_size or default_size(resolve(settings.student, "student"))
    return [grid_of(size, STRIDES[settings.decoder] * 2**level // 2) for level in range(LEVELS)]


def matched(settings: DistillSettings) -> tuple[int, int]:
    """Return the grid on which features are matched: the deepest level's, or (1, 1) for the whole image."""
    from tutelage.models.segmentation_grids import grid_of
    from tutelage.models.segmentation_students import DEEPEST
    from tutelage.models.teachers import default_size, resolve

    size = settings.student_size or default_size(resolve(settings.student, "student"))
    return (1, 1) if settings.task_agnostic_features == "global" else grid_of(size, DEEPEST)


def grid(settings: g.Student) -> tuple[int, int]:
    """Return rows and columns of the student's logits in the distillation."""
    return grids(settings)[0]


def member_grid(settings: CommitteeSettings, images: int, classes: int) -> tuple[int, int]:
    """Return the grid of the predictions of the committee's students: the finest for which `images` of them fit into --cache-limit."""
    from tutelage.features.output_cache import gibibytes

    every = grids(settings)
    fits = (one for one in every if gibibytes(images, 1, classes * one[0] * one[1]) <= settings.cache_limit)
    return next(fits, every[-1])


def member_truth(labels: Any, grid: tuple[int, int], fold: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Return (n, h, w) int64 masks of held-out images on a grid, and (n, h, w) bool: which pixels can be judged.

    fold: (n,) of labelled images; None for validation images, where all labelled pixels can be judged.
    """
    from tutelage.data.masks import IGNORE
    from tutelage.models.segmentation_heads import judgeable

    truth = labels.seen(None, grid).astype(np.int64)
    return truth, truth != IGNORE if fold is None else judgeable(truth, fold)


def log_probabilities(
    module: Any, network: Any, images: Any, views: Any, accelerator: Any, grid: tuple[int, int], advance: Any
) -> np.ndarray:
    """Return (n, C, h, w) float16 log probabilities of a student for whole images on a grid, averaged over `views.looks`."""
    from tutelage.features.view_batches import MIRRORED, view_outputs
    from tutelage.metrics import LEAST_LOG, log_softmax

    def forward(batch: Any) -> Any:
        return module.on_grid(batch, grid)

    def seen(look: int) -> np.ndarray:
        found = log_softmax(view_outputs(forward, module, network, images, look, views, accelerator, advance, AT_ONCE))
        return found[..., ::-1] if look == MIRRORED else found

    return log_softmax(np.mean([seen(look) for look in views.looks], axis=0)).clip(LEAST_LOG).astype(np.float16)


def flops_of(encoder: Any) -> int:
    """Return the FLOPs of the frozen encoder for one image, summed over its windows."""
    from tutelage.device import flops
    from tutelage.models.segmentation_grids import window_starts
    from tutelage.models.segmentation_teachers import pyramid_of

    unit = pyramid_of(encoder).levels[-1].stride
    along = [window_starts(*both, unit) for both in zip(sides(encoder.size), sides(encoder.at_once), strict=True)]
    return len(along[0]) * len(along[1]) * flops(encoder.module, encoder.at_once)


def largest_outputs(encoder: Any, settings: RunSettings, classes: int) -> tuple[int, int]:
    """Return, before a run, the number of values to be cached per view if --cache-limit allows, and the number of views per image."""
    if settings.objective == "task-agnostic":
        from tutelage.models.segmentation_teachers import pyramid_of

        rows, columns = matched(settings)
        return pyramid_of(encoder).levels[-1].channels * rows * columns, 1
    rows, columns = grids(settings)[0]
    return classes * rows * columns, len(views(settings).looks)


def widths(result: dict[str, Any], settings: DistillSettings) -> list[int]:
    """Return how many values per view may be cached, largest first."""
    if settings.objective == "task-agnostic":
        rows, columns = matched(settings)
        return [result["deepest"] * rows * columns]
    return [result["width"] * rows * columns for rows, columns in grids(settings)]


def teacher_for_distillation(
    folder: Path, result: dict[str, Any], settings: DistillSettings, accelerator: Any, level: int
) -> Any:
    """Load the teacher for the distillation: with logits on the student's grid, or the frozen encoder with features on a grid."""
    from tutelage.models import segmentation_teachers

    weights = settings.teacher_weights
    if settings.objective == "task-agnostic":
        return segmentation_teachers.frozen(folder, result, weights, accelerator, matched(settings))
    every = grids(settings)
    return segmentation_teachers.load_adapted(folder, result, weights, accelerator, every[0], every[level])


def student(settings: g.Student, classes: int) -> Any:
    """Build a new student."""
    from tutelage.models.segmentation_students import build_student

    return build_student(settings.student, classes, settings.student_weights, settings.student_size, settings.decoder)


def rebuilt(about: dict[str, Any], classes: int) -> Any:
    """Build a student as described in a result, with random weights."""
    from tutelage.models.segmentation_students import build_student

    return build_student(about["name"], classes, "scratch", about["size"], about["decoder"])


def distillation_module(module: Any, features: int, settings: DistillSettings) -> Any:
    """Return the student with its projector for the distillation. features: width of those to match, 0 = none."""
    from tutelage.models.segmentation_students import SegmentationStudentWithProjector

    return SegmentationStudentWithProjector(module, grids(settings)[0], features, matched(settings))


def adapted(folder: Path, result: dict[str, Any], weights: str, accelerator: Any) -> Any:
    """Load the teacher of a run for evaluation."""
    from tutelage.models import segmentation_teachers

    return segmentation_teachers.load_adapted(folder, result, weights, accelerator, (1, 1))


def head_of(module: Any) -> Any:
    """Return the part of a student that is specific to this task, its decoder."""
    return module.head


def image_scores(predictions: list[np.ndarray], labels: Any) -> np.ndarray:
    """Return (n,) float64 mean IoU of each image over the classes that are labelled or predicted in it."""
    from tutelage.metrics import mean_iou, pixel_counts

    return mean_iou(pixel_counts(_tables(predictions, labels, int(max(one.max() for one in predictions)) + 1)))


def predictions_of(outputs: np.ndarray, labels: Any, positions: np.ndarray) -> list[np.ndarray]:
    """Return an exported model's logits (n, C, H, W) for these images in the form of `student_predictions`."""
    from tutelage.data.upsample import decided

    return [decided(one, *labels.one(place).shape) for place, one in zip(positions.tolist(), outputs, strict=True)]


def rows_of(outputs: np.ndarray) -> np.ndarray:
    """Return outputs (n, C, H, W) as (N, C), one row per decision, of every fourth pixel in both directions."""
    return np.moveaxis(outputs[:, :, ::4, ::4], 1, -1).reshape(-1, outputs.shape[1])


def confidence(predictions: list[np.ndarray], labels: Any) -> None:
    """Return None: an image as a whole is neither right nor wrong."""
    return None


def student_predictions(
    module: Any, network: Any, images: Any, labels: Any, settings: Any, accelerator: Any, advance: Any
) -> list[np.ndarray]:
    """Return the predicted class of every pixel, (H, W) uint8 for each image, at the size of its mask, or of the input without masks."""
    from torch.nn.functional import interpolate

    from tutelage.features.view_batches import CLEAN, forward_batches

    found: list[np.ndarray] = []
    batches = forward_batches(module, module, network, images, CLEAN, settings, accelerator, advance, AT_ONCE)
    for positions, logits in batches:
        for place, one in zip(positions.tolist(), logits, strict=True):
            shape = tuple(one.shape[1:]) if labels is None else labels.one(place).shape
            full = one[None] if shape == tuple(one.shape[1:]) else interpolate(one[None], shape, mode="bilinear")
            found.append(full.argmax(1)[0].byte().cpu().numpy())
    return found


def teacher_predictions(
    adapted: Any, cache: Any, images: Any, labels: Any, settings: Any, accelerator: Any, advance: Any
) -> list[np.ndarray]:
    """Return the teacher's predictions like `student_predictions`, with the teacher at its own input size."""
    return student_predictions(adapted.module, adapted.network, images, labels, settings, accelerator, advance)


def agreement(one: list[np.ndarray], other: list[np.ndarray]) -> float:
    """Return the share of pixels with the same predicted class, averaged over images; `other` is sampled at the pixels of `one`."""
    from tutelage.data.masks import nearest

    shares = []
    for a, b in zip(one, other, strict=True):
        rows, columns = (nearest(0, b.shape[i], b.shape[i], b.shape[i], a.shape[i]) for i in (0, 1))
        shares.append(float((a == b[rows[:, None], columns]).mean()))
    return float(np.mean(shares))


def _tables(predictions: list[np.ndarray], labels: Any, classes: int) -> np.ndarray:
    """Return (n, C, C) pixel counts of (label, prediction) for each image."""
    from tutelage.metrics import pixel_confusion

    least = max([classes, *(int(one[one < 255].max(initial=0)) + 1 for one in map(labels.one, range(len(labels))))])
    return np.stack([pixel_confusion(labels.one(i), one, least) for i, one in enumerate(predictions)])


def judged(predictions: list[np.ndarray], labels: Any, classes: int) -> dict[str, Any]:
    """Return all scores, computed at the masks' own size."""
    from tutelage.metrics import boundary_f1, segmentation

    outlines = np.array([boundary_f1(labels.one(i), one, classes) for i, one in enumerate(predictions)])
    return segmentation(_tables(predictions, labels, classes), outlines)


def keep_evidence(folder: Path, test: Any, predictions: dict[str, list[np.ndarray]], about: dict[str, Any]) -> None:
    """Write what the report page shows of single test images: masks in the data set's colours, and each model's pixel counts."""
    from tutelage.metrics import pixel_counts
    from tutelage.reporting.segmentation_examples import write_dense_evidence

    classes = len(about["colours"])
    counts = {name: pixel_counts(_tables(one, test.labels, classes)) for name, one in predictions.items()}
    write_dense_evidence(folder, test, predictions, counts, about["colours"])
