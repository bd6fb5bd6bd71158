"""One class a pixel: features by level, a dense head, a decoder on the student, mIoU. The functions of `classification`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tutelage.errors import TutelageError
from tutelage.image_size import sides
from tutelage.tasks import class_names

PASSES = {"head": 40, "full": 40, "long": 200, "steep": 200}
RATES = {"head": 4e-3, "full": 1e-3, "long": 8e-3, "steep": 2e-2}  # at batch 128
FROM_LOGITS = ("distilled", "head", "full", "long")
FROM_FEATURES = ("long", "steep")  # a decoder from random weights
SCRATCH_RATE, PRETRAINED_RATE = 2e-2, 5e-3
IMAGES = 8_000
BATCH = 8
FULL_BATCH = 8
AT_ONCE = 16
SCORE = "mean IoU"
MAIN = "miou"  # of `judged`
POOLED = False
GRID = True
EACH = "miou_of_images"  # the mean of `image_scores`
UNUSED = ()
LEVELS = 3  # logits are kept at the student's stride, at two and at four times as much
COUNTED = 64  # images in which the classes of the targets are counted
RARE_CLASSES = 1.0  # a class weighs (C share) to the minus this in the distillation, where --class-weight balanced asks


def models() -> tuple[Any, Any]:
    """The files of the teacher and of its head."""
    from tutelage.models import segmentation_heads, segmentation_teachers

    return segmentation_teachers, segmentation_heads


def check(settings: dict[str, Any]) -> list[TutelageError]:
    """Settings that this task cannot have, checked before anything is read."""
    from tutelage.tasks.segmentation_settings import faults_of

    return faults_of(settings)


def read(settings: dict[str, Any]) -> Any:
    """The target set, its masks looked at."""
    from tutelage.data.segmentation_set import read_dense_set
    from tutelage.models.teachers import default_size, resolve

    size = settings["student_size"] or default_size(resolve(settings["student"], "student"))
    return read_dense_set(
        settings["target"], val=settings["val"], test=settings["test"], classes=class_names(settings),
        group_by=settings["group_by"], size=size,
    )  # fmt: skip


def read_any(target: str, classes: tuple[str, ...]) -> Any:
    """All images and masks of one path, whatever their split."""
    from tutelage.data.segmentation_set import read_any_dense

    return read_any_dense(target, classes)


def labels_of(found: Any, good: np.ndarray, images: Any, cache: Path) -> Any:
    """The masks of these rows of a target set."""
    from tutelage.data.manifest import load_masks

    rows = np.arange(len(found.refs))[good]
    of = {"classes": found.classes, **found.about(rows)}
    return load_masks(cache, [found.masks[i] for i in rows], images.sizes, of, [found.truths[i] for i in rows])


def views(settings: dict[str, Any]) -> Any:
    """Views of a run with these settings: regions in the images' own proportions."""
    from tutelage.features.view_batches import ViewSettings

    return ViewSettings(settings["view_seed"], settings["flip"], settings["crop_area"], resize="squash", follow=True)


def scale(network: Any, features: Callable[[int], np.ndarray]) -> Any:
    """What a head needs to know of the features beforehand: the shapes of their levels."""
    return network.shape


def forward_of(module: Any, network: Any) -> Any:
    """What gives a whole teacher's logits as its head gives them: on the finest level's grid."""
    return lambda images: module.on_grid(images, network.shape[0][1:])


def head_truth(labels: Any, network: Any) -> Any:
    """Masks on the grid of a head's logits."""
    from tutelage.models.segmentation_heads import truth_of

    return truth_of(labels, network.shape)


def extra_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Mean IoU of held-out pixels (N, C) with classes (N,), beside accuracy and log loss."""
    from tutelage.metrics import confusion, intersection_over_union

    table = confusion(labels, logits.argmax(axis=1), logits.shape[1])
    return {"miou": float(np.nanmean(intersection_over_union(table)))}


def whole_teacher(encoder: Any, module: Any, classes: int, head: Any) -> tuple[Any, Any, Any]:
    """A teacher to fine-tune; its encoder and its head. module: a copy of the encoder's."""
    from tutelage.models import segmentation_teachers

    teacher = segmentation_teachers.whole_teacher(encoder, module, classes, head)
    return teacher, teacher.pyramid.encoder, teacher.head


def of_teacher(encoder: Any, network: Any, mode: str, classes: int) -> dict[str, Any]:
    """What a result says of the teacher: channels of its logits and of its deepest level."""
    return {"width": classes, "deepest": network.shape[-1][0]}


def grids(settings: dict[str, Any]) -> list[tuple[int, int]]:
    """Grids on which logits may be kept, the student's own first."""
    from tutelage.models.segmentation_grids import grid_of
    from tutelage.models.segmentation_students import STRIDES
    from tutelage.models.teachers import default_size, resolve

    size = settings["student_size"] or default_size(resolve(settings["student"], "student"))
    return [grid_of(size, STRIDES[settings["decoder"]] * 2**level) for level in range(LEVELS)]


def matched(settings: dict[str, Any]) -> tuple[int, int]:
    """The grid on which features are compared: of the deepest level, or one for the whole image."""
    from tutelage.models.segmentation_grids import grid_of
    from tutelage.models.segmentation_students import DEEPEST
    from tutelage.models.teachers import default_size, resolve

    size = settings["student_size"] or default_size(resolve(settings["student"], "student"))
    return (1, 1) if settings["agnostic_features"] == "global" else grid_of(size, DEEPEST)


def grid(settings: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns of the student's logits in the distillation."""
    return grids(settings)[0]


def member_grid(settings: dict[str, Any], images: int, classes: int) -> tuple[int, int]:
    """Rows and columns of what a student of the committee predicts for each of so many images: the finest that --cache-limit allows."""
    from tutelage.features.output_cache import gibibytes

    every = grids(settings)
    fits = (one for one in every if gibibytes(images, 1, classes * one[0] * one[1]) <= settings["cache_limit"])
    return next(fits, every[-1])


def member_truth(labels: Any, grid: tuple[int, int], fold: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """(n, h, w) int64 classes of held-out images on a grid, and bool which of them can be judged.

    fold: (n,) of labelled images; None for validation images.
    """
    from tutelage.data.masks import IGNORE
    from tutelage.models.segmentation_heads import judgeable

    truth = labels.seen(None, grid).astype(np.int64)
    return truth, truth != IGNORE if fold is None else judgeable(truth, fold)


def log_probabilities(
    module: Any, network: Any, images: Any, views: Any, accelerator: Any, grid: tuple[int, int], advance: Any
) -> np.ndarray:
    """(n, C, h, w) float16: a student's log probabilities of whole images on a grid, the mean over the looks of `views`."""
    from tutelage.features.view_batches import MIRRORED, view_outputs
    from tutelage.metrics import LEAST_LOG, log_softmax

    def forward(batch: Any) -> Any:
        return module.on_grid(batch, grid)

    def seen(look: int) -> np.ndarray:
        found = log_softmax(view_outputs(forward, module, network, images, look, views, accelerator, advance, AT_ONCE))
        return found[..., ::-1] if look == MIRRORED else found

    return log_softmax(np.mean([seen(look) for look in views.looks], axis=0)).clip(LEAST_LOG).astype(np.float16)


def flops_of(encoder: Any) -> int:
    """FLOPs of the frozen encoder for one image, in all its windows."""
    from tutelage.device import flops
    from tutelage.models.segmentation_grids import window_starts
    from tutelage.models.segmentation_teachers import pyramid_of

    unit = pyramid_of(encoder).levels[-1].stride
    along = [window_starts(*both, unit) for both in zip(sides(encoder.size), sides(encoder.at_once), strict=True)]
    return len(along[0]) * len(along[1]) * flops(encoder.module, encoder.at_once)


def largest_outputs(encoder: Any, settings: dict[str, Any], classes: int) -> tuple[int, int]:
    """Before a run: numbers that are kept of a view, where --cache-limit allows, and of how many views of an image."""
    if settings["objective"] == "agnostic":
        from tutelage.models.segmentation_teachers import pyramid_of

        rows, columns = matched(settings)
        return pyramid_of(encoder).levels[-1].channels * rows * columns, 1
    rows, columns = grids(settings)[0]
    return classes * rows * columns, len(views(settings).looks)


def widths(result: dict[str, Any], settings: dict[str, Any]) -> list[int]:
    """Numbers that are kept of each view, most first."""
    if settings["objective"] == "agnostic":
        rows, columns = matched(settings)
        return [result["deepest"] * rows * columns]
    return [result["width"] * rows * columns for rows, columns in grids(settings)]


def teacher_for_distillation(
    folder: Path, result: dict[str, Any], settings: dict[str, Any], accelerator: Any, level: int
) -> Any:
    """The teacher as the transfer needs it: logits on the student's grid, or the frozen encoder's features on a grid."""
    from tutelage.models import segmentation_teachers

    weights = settings["teacher_weights"]
    if settings["objective"] == "agnostic":
        return segmentation_teachers.frozen(folder, result, weights, accelerator, matched(settings))
    every = grids(settings)
    return segmentation_teachers.load_adapted(folder, result, weights, accelerator, every[0], every[level])


def student(settings: dict[str, Any], classes: int) -> Any:
    """A new student."""
    from tutelage.models.segmentation_students import build_student

    return build_student(
        settings["student"], classes, settings["student_weights"], settings["student_size"], settings["decoder"]
    )


def rebuilt(about: dict[str, Any], classes: int) -> Any:
    """A student as a result describes it, its weights random."""
    from tutelage.models.segmentation_students import build_student

    return build_student(about["name"], classes, "scratch", about["size"], about["decoder"])


def distillation_module(module: Any, features: int, settings: dict[str, Any]) -> Any:
    """The student with what only the transfer needs beside it. features: to be matched, 0 = none."""
    from tutelage.models.segmentation_students import SegmentationStudentWithProjector

    return SegmentationStudentWithProjector(module, grids(settings)[0], features, matched(settings))


def adapted(folder: Path, result: dict[str, Any], weights: str, accelerator: Any) -> Any:
    """The teacher of a run, as evaluation needs it."""
    from tutelage.models import segmentation_teachers

    return segmentation_teachers.load_adapted(folder, result, weights, accelerator, (1, 1))


def head_of(module: Any) -> Any:
    """The part of a student that only this task has."""
    return module.head


def image_scores(said: list[np.ndarray], labels: Any) -> np.ndarray:
    """(n,) float64: mean IoU of each image over the classes that it or the decision shows."""
    from tutelage.metrics import mean_iou, pixel_counts

    return mean_iou(pixel_counts(_tables(said, labels, int(max(one.max() for one in said)) + 1)))


def predictions_of(outputs: np.ndarray, labels: Any, positions: np.ndarray) -> list[np.ndarray]:
    """What an exported model's logits (n, C, H, W) of these images say: as `student_predictions`."""
    from tutelage.data.upsample import decided

    return [decided(one, *labels.one(place).shape) for place, one in zip(positions.tolist(), outputs, strict=True)]


def rows_of(outputs: np.ndarray) -> np.ndarray:
    """(n, C, H, W) -> (N, C) of every fourth pixel in both directions: what is decided on."""
    return np.moveaxis(outputs[:, :, ::4, ::4], 1, -1).reshape(-1, outputs.shape[1])


def confidence(said: list[np.ndarray], labels: Any) -> None:
    """No image is right or wrong as a whole."""
    return None


def student_predictions(
    module: Any, network: Any, images: Any, labels: Any, settings: Any, accelerator: Any, advance: Any
) -> list[np.ndarray]:
    """The decided class of every pixel: (H, W) uint8 for each image, at its mask's own size, or, without masks, at the input's."""
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
    """As `student_predictions`, of the teacher at its own resolution."""
    return student_predictions(adapted.module, adapted.network, images, labels, settings, accelerator, advance)


def agreement(one: list[np.ndarray], other: list[np.ndarray]) -> float:
    """Share of pixels on which two models decide alike, mean over images; the teacher's are looked up at the student's pixels."""
    from tutelage.data.masks import nearest

    shares = []
    for a, b in zip(one, other, strict=True):
        rows, columns = (nearest(0, b.shape[i], b.shape[i], b.shape[i], a.shape[i]) for i in (0, 1))
        shares.append(float((a == b[rows[:, None], columns]).mean()))
    return float(np.mean(shares))


def _tables(said: list[np.ndarray], labels: Any, classes: int) -> np.ndarray:
    """(n, C, C) counts of the pixels of each image."""
    from tutelage.metrics import pixel_confusion

    least = max([classes, *(int(one[one < 255].max(initial=0)) + 1 for one in map(labels.one, range(len(labels))))])
    return np.stack([pixel_confusion(labels.one(i), one, least) for i, one in enumerate(said)])


def judged(said: list[np.ndarray], labels: Any, classes: int) -> dict[str, Any]:
    """All scores, at the masks' own size."""
    from tutelage.metrics import boundary_f1, segmentation

    outlines = np.array([boundary_f1(labels.one(i), one, classes) for i, one in enumerate(said)])
    return segmentation(_tables(said, labels, classes), outlines)


def keep_evidence(folder: Path, test: Any, said: dict[str, list[np.ndarray]], about: dict[str, Any]) -> None:
    """What the page shows of single test images: pictures in the data set's colours, and every image's pixels by each model."""
    from tutelage.metrics import pixel_counts
    from tutelage.reporting.segmentation_examples import write_dense_evidence

    classes = len(about["colours"])
    counts = {name: pixel_counts(_tables(one, test.labels, classes)) for name, one in said.items()}
    write_dense_evidence(folder, test, said, counts, about["colours"])
