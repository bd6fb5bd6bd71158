"""Segmentation, one class per pixel: features by level, a dense head, a student with decoder, mIoU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, cast, final

import numpy as np

from tutelage import metrics
from tutelage.data.image_cache import Images
from tutelage.data.manifest import Labelled, load_masks
from tutelage.data.masks import IGNORE, Labels, Masks, nearest
from tutelage.data.segmentation_set import read_any_dense, read_dense_set
from tutelage.data.target_set import TargetSet
from tutelage.data.upsample import decided
from tutelage.device import flops
from tutelage.errors import TutelageError
from tutelage.features.view_batches import CLEAN, MIRRORED, Inference, ViewSettings, forward_batches, view_outputs
from tutelage.image_size import Size, sides
from tutelage.json_object import JSON
from tutelage.models.linear_probe import judgeable
from tutelage.reporting.scores import MASKS
from tutelage.reporting.segmentation_examples import write_dense_evidence
from tutelage.results import AdaptationResult
from tutelage.settings import shared_flags
from tutelage.settings.command_flags import CommitteeSettings, Curation, DistillSettings, RunSettings
from tutelage.tasks.base import Grid, HeadFitter, Predictions, Task, class_names
from tutelage.tasks.segmentation_settings import faults_of

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor, nn

    from tutelage.features.output_cache import OutputCache
    from tutelage.models.adapted_teacher import AdaptedTeacher, FeatureExtractor
    from tutelage.models.segmentation_grids import DenseNetwork
    from tutelage.models.students import Student
    from tutelage.models.teachers import FrozenEncoder
    from tutelage.tasks.base import Network, TeacherHead

LEVELS = 4  # logits may be cached at half the student's stride, or at once, twice or four times that stride


@final
class Segmentation(Task):
    """One class per pixel: labels are `Masks`, predictions the class of every pixel, (H, W) uint8 for each image."""

    PASSES: ClassVar = {"head": 40, "full": 40, "long": 200, "steep": 200}
    RATES: ClassVar = {"head": 4e-3, "full": 1e-3, "long": 8e-3, "steep": 2e-2}
    FROM_LOGITS = ("distilled", "head", "full", "long")
    FROM_FEATURES = ("long", "steep")  # these start with a decoder of random weights
    SCRATCH_RATE, PRETRAINED_RATE = 2e-2, 5e-3
    IMAGES = 8_000
    FINETUNE_BATCH, TEACHER_BATCH, EVALUATION_BATCH = 8, 8, 16
    COUNTED = 64
    RARE_CLASSES = 1.0
    UNUSED = ()
    METRICS, SCORE_TITLE, IMAGE_SCORE = MASKS, "mean IoU", "miou_of_images"
    BUDGET_PER_CLASS, TRIES_ALL_TEACHERS, PILOT = False, True, False

    def check(self, settings: shared_flags.Group) -> list[TutelageError]:
        return faults_of(settings)

    def read(self, settings: Curation) -> TargetSet:
        from tutelage.models.teachers import size_of

        classes, splits = class_names(settings), {"val": settings.val, "test": settings.test}
        size = size_of(settings, "student")
        return read_dense_set(settings.target, **splits, classes=classes, group_by=settings.group_by, size=size)

    def read_any(self, target: str, classes: tuple[str, ...]) -> TargetSet:
        return read_any_dense(target, classes)

    def labels_of(self, found: TargetSet, good: np.ndarray, images: Images, cache: Path) -> Masks:
        rows = np.arange(len(found.refs))[good]
        of = {"classes": found.classes, **found.about(rows)}
        return load_masks(cache, [found.masks[i] for i in rows], images.sizes, of, [found.truths[i] for i in rows])

    def views(self, settings: shared_flags.Views) -> ViewSettings:
        return ViewSettings(settings.view_seed, settings.flip, settings.crop_area, resize="squash", follow=True)

    def grid(self, settings: shared_flags.Student) -> Grid:
        return _grids(settings)[0]

    def flops_of(self, encoder: FrozenEncoder) -> int:
        from tutelage.models.segmentation_grids import window_starts
        from tutelage.models.segmentation_teachers import pyramid_of

        unit = pyramid_of(encoder).levels[-1].stride
        along = [window_starts(*both, unit) for both in zip(sides(encoder.size), sides(encoder.at_once), strict=True)]
        return len(along[0]) * len(along[1]) * flops(encoder.module, encoder.at_once)

    def check_teacher(self, module: nn.Module, name: str, size: Size, window: Size | None) -> None:
        from tutelage.models.segmentation_grids import check_windows, levels_of

        levels = levels_of(module, name, window or size)
        if window is not None:
            check_windows(module, levels, window, size)

    def frozen_network(self, encoder: FrozenEncoder, accelerator: Accelerator) -> FeatureExtractor:
        from tutelage.models.segmentation_teachers import network_of

        return network_of(encoder, accelerator)

    def head_fitter(
        self, network: FeatureExtractor, features: Callable[[int], np.ndarray], classes: int, class_weight: str
    ) -> HeadFitter:
        from tutelage.models import segmentation_heads as heads

        layout = network.levels
        return HeadFitter(
            heads.STRENGTHS,
            heads.UNVALIDATED_STRENGTH,
            heads.UNVALIDATED_TEMPERATURE,
            lambda steps, x, y: heads.fit_probe(x, y, classes, steps, layout, class_weight),
        )

    def head_truth(self, labels: Labels, network: FeatureExtractor) -> np.ndarray:
        return _masks(labels).seen(None, network.levels[0][1:]).astype(np.int64)

    def extra_metrics(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        table = metrics.confusion(labels, logits.argmax(axis=1), logits.shape[1])
        return {"miou": float(np.nanmean(metrics.intersection_over_union(table)))}

    def whole_teacher(
        self, encoder: FrozenEncoder, module: nn.Module, classes: int, head: TeacherHead | None
    ) -> tuple[nn.Module, nn.Module, nn.Module]:
        from tutelage.models.segmentation_teachers import DenseHead, whole_teacher

        assert head is None or isinstance(head, DenseHead)
        teacher = whole_teacher(encoder, module, classes, head)
        return teacher, teacher.pyramid.encoder, teacher.head

    def head_forward(self, module: nn.Module, network: FeatureExtractor) -> Callable[[Tensor], Tensor]:
        return partial(_dense(module).on_grid, grid=network.levels[0][1:])  # of the finest level

    def teacher_entries(self, encoder: FrozenEncoder, network: FeatureExtractor, mode: str, classes: int) -> JSON:
        return {"width": classes, "deepest": network.levels[-1][0]}  # channels of the logits and of the deepest level

    def largest_outputs(self, encoder: FrozenEncoder, settings: RunSettings, classes: int) -> tuple[int, int, bool]:
        from tutelage.models.segmentation_teachers import pyramid_of

        if settings.objective == "task-agnostic":
            rows, columns = _matched(settings)
            return pyramid_of(encoder).levels[-1].channels * rows * columns, 1, True
        rows, columns = self.grid(settings)
        return classes * rows * columns, len(self.views(settings).looks), False

    def widths(self, result: AdaptationResult, settings: DistillSettings) -> list[int]:
        if settings.objective == "task-agnostic":
            rows, columns = _matched(settings)
            assert result.deepest is not None
            return [result.deepest * rows * columns]
        return [result.width * rows * columns for rows, columns in _grids(settings)]

    def teacher_for_distillation(
        self, folder: Path, result: AdaptationResult, settings: DistillSettings, accelerator: Accelerator, level: int
    ) -> AdaptedTeacher:
        from tutelage.models import segmentation_teachers

        how = (folder, result.to_json(), settings.teacher_weights, accelerator)
        if settings.objective == "task-agnostic":
            return segmentation_teachers.frozen(*how, _matched(settings))
        every = _grids(settings)
        return segmentation_teachers.load_adapted(*how, every[0], every[level])

    def adapted(self, folder: Path, result: AdaptationResult, weights: str, accelerator: Accelerator) -> AdaptedTeacher:
        from tutelage.models.segmentation_teachers import load_adapted

        return load_adapted(folder, result.to_json(), weights, accelerator, (1, 1))

    def student(self, settings: shared_flags.Student, classes: int) -> Student:
        from tutelage.models.segmentation_students import build_student

        s = settings
        return build_student(s.student, classes, s.student_weights, s.student_size, s.decoder)

    def distillation_module(self, student: Student, width: int, settings: DistillSettings) -> nn.Module:
        from tutelage.models.segmentation_students import SegmentationStudentWithProjector

        return SegmentationStudentWithProjector(_dense(student.module), self.grid(settings), width, _matched(settings))

    def member_grid(self, settings: CommitteeSettings, images: int, classes: int) -> Grid:
        from tutelage.features.output_cache import gibibytes

        every = _grids(settings)
        fits = (one for one in every if gibibytes(images, 1, classes * one[0] * one[1]) <= settings.cache_limit)
        return next(fits, every[-1])

    def member_truth(self, labels: Labels, grid: Grid | None, fold: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        assert grid is not None
        truth = _masks(labels).seen(None, grid).astype(np.int64)
        known = truth != IGNORE
        return truth, known if fold is None else known & judgeable(truth, fold)

    def log_probabilities(
        self, module: nn.Module, network: Network, inference: Inference, grid: Grid | None
    ) -> np.ndarray:
        assert grid is not None
        forward = partial(_dense(module).on_grid, grid=grid)

        def seen(look: int) -> np.ndarray:
            found = metrics.log_softmax(view_outputs(forward, module, network, inference, look))
            return found[..., ::-1] if look == MIRRORED else found

        mean = np.mean([seen(look) for look in inference.views.looks], axis=0)
        return metrics.log_softmax(mean).clip(metrics.LEAST_LOG).astype(np.float16)

    def student_predictions(self, module: nn.Module, network: Network, inference: Inference) -> list[np.ndarray]:
        from torch.nn.functional import interpolate

        found: list[np.ndarray] = []
        labels = inference.labels
        for positions, logits in forward_batches(module, module, network, inference, CLEAN):
            for place, one in zip(positions.tolist(), logits, strict=True):
                shape = tuple(one.shape[1:]) if labels is None else _masks(labels).one(place).shape
                full = one[None] if shape == tuple(one.shape[1:]) else interpolate(one[None], shape, mode="bilinear")
                found.append(full.argmax(1)[0].byte().cpu().numpy())
        return found

    def teacher_predictions(
        self, adapted: AdaptedTeacher, cache: OutputCache, inference: Inference
    ) -> list[np.ndarray]:
        return self.student_predictions(adapted.module, adapted.network, inference)

    def predictions_of(self, outputs: np.ndarray, labels: Labels, positions: np.ndarray) -> list[np.ndarray]:
        masks = _masks(labels)
        return [decided(one, *masks.one(place).shape) for place, one in zip(positions.tolist(), outputs, strict=True)]

    def rows_of(self, outputs: np.ndarray) -> np.ndarray:
        few = outputs[:, :, ::4, ::4]  # every fourth pixel in both directions
        return np.moveaxis(few, 1, -1).reshape(-1, outputs.shape[1])

    def image_scores(self, predictions: Predictions, labels: Labels) -> np.ndarray:
        """Return (n,) float64 mean IoU of each image over the classes that are labelled or predicted in it."""
        classes = int(max(one.max() for one in predictions)) + 1
        return metrics.mean_iou(metrics.pixel_counts(_tables(predictions, _masks(labels), classes)))

    def confidence(self, predictions: Predictions, labels: Labels) -> None:
        return None

    def agreement(self, one: Predictions, other: Predictions) -> float:
        """Return the share of pixels, averaged over images; `other` is sampled at the pixels of `one`."""
        shares = []
        for a, b in zip(one, other, strict=True):
            rows, columns = (nearest(0, b.shape[i], b.shape[i], b.shape[i], a.shape[i]) for i in (0, 1))
            shares.append(float((a == b[rows[:, None], columns]).mean()))
        return float(np.mean(shares))

    def judged(self, predictions: Predictions, labels: Labels, classes: int) -> JSON:
        """Return all scores, computed at the masks' own size."""
        masks = _masks(labels)
        outlines = np.array([metrics.boundary_f1(masks.one(i), one, classes) for i, one in enumerate(predictions)])
        return metrics.segmentation(_tables(predictions, masks, classes), outlines)

    def keep_evidence(self, folder: Path, test: Labelled, predictions: dict[str, Predictions], about: JSON) -> None:
        masks, classes = _masks(test.labels), len(about["colours"])
        counts = {name: metrics.pixel_counts(_tables(one, masks, classes)) for name, one in predictions.items()}
        write_dense_evidence(folder, test, predictions, counts, about["colours"])


def _masks(labels: Labels) -> Masks:
    return cast("Masks", labels)


def _dense(module: nn.Module) -> DenseNetwork:
    return cast("DenseNetwork", module)


def _grid(settings: shared_flags.Student, stride: int) -> Grid:
    from tutelage.models.segmentation_grids import grid_of
    from tutelage.models.teachers import size_of

    return grid_of(size_of(settings, "student"), stride)


def _grids(settings: shared_flags.Student) -> list[Grid]:
    """Return the grids on which logits may be cached: that of half the stride of the student's logits, and coarser ones."""
    from tutelage.models.segmentation_students import STRIDES

    return [_grid(settings, STRIDES[settings.decoder] * 2**level // 2) for level in range(LEVELS)]


def _matched(settings: DistillSettings) -> Grid:
    """Return the grid on which features are matched: the deepest level's, or (1, 1) for the whole image."""
    from tutelage.models.segmentation_students import DEEPEST

    return (1, 1) if settings.task_agnostic_features == "global" else _grid(settings, DEEPEST)


def _tables(predictions: Predictions, masks: Masks, classes: int) -> np.ndarray:
    """Return (n, C, C) pixel counts of (label, prediction) for each image."""
    least = max([classes, *(int(one[one < 255].max(initial=0)) + 1 for one in map(masks.one, range(len(masks))))])
    return np.stack([metrics.pixel_confusion(masks.one(i), one, least) for i, one in enumerate(predictions)])
