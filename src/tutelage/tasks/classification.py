"""Classification, one class per image: pooled features, logistic regression, a linear classifier, accuracy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, final

import numpy as np

from tutelage.data.image_cache import Images
from tutelage.data.manifest import Labelled
from tutelage.data.masks import Labels
from tutelage.data.target_set import TargetSet, read_any, read_target_set
from tutelage.device import flops
from tutelage.errors import TutelageError
from tutelage.features.view_batches import CLEAN, Inference, ViewSettings, view_outputs
from tutelage.image_size import Size, sides
from tutelage.json_object import JSON
from tutelage.metrics import LEAST_LOG, classification, log_softmax, softmax
from tutelage.models import linear_probe
from tutelage.progress import logger
from tutelage.reporting.example_predictions import write_evidence
from tutelage.reporting.scores import CLASSES
from tutelage.results import AdaptationResult
from tutelage.settings import shared_flags
from tutelage.settings.command_flags import WITHOUT_TARGETS, CommitteeSettings, Curation, DistillSettings, RunSettings
from tutelage.tasks.base import Grid, HeadFitter, Predictions, Task, class_names

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor, nn

    from tutelage.features.output_cache import OutputCache
    from tutelage.models.adapted_teacher import AdaptedTeacher, FeatureExtractor
    from tutelage.models.students import Student
    from tutelage.models.teachers import FrozenEncoder
    from tutelage.tasks.base import Network, TeacherHead

SCALE_SAMPLE = 2048  # gallery images whose features determine the scale used to standardise the probe's features


@final
class Classification(Task):
    """One class per image: labels are (n,) int64, predictions (n, C) float32 logits."""

    PASSES: ClassVar = {"head": 15, "full": 15, "long": 30}
    RATES: ClassVar = {"head": 1e-3, "full": 1e-4, "long": 5e-4}
    FROM_LOGITS = ("distilled", "head", "full", "long")
    FROM_FEATURES = ("head", "full", "long")
    SCRATCH_RATE, PRETRAINED_RATE = 8e-3, 2e-3
    IMAGES = 400_000
    FINETUNE_BATCH, TEACHER_BATCH, EVALUATION_BATCH = 64, 32, 256
    COUNTED = 1024
    RARE_CLASSES = 0.5
    UNUSED = ("decoder", "task_agnostic_features")
    METRICS, SCORE_TITLE, IMAGE_SCORE = CLASSES, "accuracy", "accuracy"
    BUDGET_PER_CLASS, TRIES_ALL_TEACHERS, PILOT = True, False, True

    def check(self, settings: shared_flags.Group) -> list[TutelageError]:
        task, other, faults = "with --task classification", "or use --task segmentation", []
        for kind in ("teacher", "student"):
            if isinstance(size := getattr(settings, f"{kind}_size", None), str):
                message = f"--{kind}-size {size} {task} must be one number, for a square"
                faults.append(TutelageError(message, f"give one number, {other}"))
        if isinstance(settings, shared_flags.Teacher) and settings.teacher_window is not None:
            message = f"--teacher-window {settings.teacher_window} {task} is not supported"
            faults.append(TutelageError(message, f"leave it out, {other}"))
        return faults

    def read(self, settings: Curation) -> TargetSet:
        classes, splits = class_names(settings), {"val": settings.val, "test": settings.test}
        return read_target_set(settings.target, **splits, classes=classes, group_by=settings.group_by)

    def read_any(self, target: str, classes: tuple[str, ...]) -> TargetSet:
        return read_any(target, classes)

    def labels_of(self, found: TargetSet, good: np.ndarray, images: Images, cache: Path) -> np.ndarray:
        return found.labels[good]

    def views(self, settings: shared_flags.Views) -> ViewSettings:
        return ViewSettings(settings.view_seed, settings.flip, settings.crop_area, resize=settings.resize)

    def grid(self, settings: shared_flags.Student) -> None:
        return None

    def flops_of(self, encoder: FrozenEncoder) -> int:
        return flops(encoder.module, encoder.size)

    def check_teacher(self, module: nn.Module, name: str, size: Size, window: Size | None) -> None:
        import torch

        module(torch.zeros(1, 3, *sides(size)))

    def frozen_network(self, encoder: FrozenEncoder, accelerator: Accelerator) -> FeatureExtractor:
        from tutelage.models.adapted_teacher import network_of

        return network_of(encoder, accelerator)

    def head_fitter(
        self, network: FeatureExtractor, features: Callable[[int], np.ndarray], classes: int, class_weight: str
    ) -> HeadFitter:
        scale = linear_probe.scale_of(features(SCALE_SAMPLE))
        return HeadFitter(
            linear_probe.STRENGTHS,
            linear_probe.UNVALIDATED_STRENGTH,
            linear_probe.UNVALIDATED_TEMPERATURE,
            lambda strength, x, y: linear_probe.fit_probe(x, y, classes, strength, scale, class_weight),
        )

    def head_truth(self, labels: Labels, network: FeatureExtractor) -> np.ndarray:
        return _numbers(labels)

    def extra_metrics(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return {}

    def whole_teacher(
        self, encoder: FrozenEncoder, module: nn.Module, classes: int, head: TeacherHead | None
    ) -> tuple[nn.Module, nn.Module, nn.Module]:
        from tutelage.models.adapted_teacher import whole_teacher

        assert head is None or isinstance(head, linear_probe.LinearHead)
        teacher = whole_teacher(module, encoder.features, classes, head)
        return teacher, teacher.backbone, teacher.head

    def head_forward(self, module: nn.Module, network: FeatureExtractor) -> Callable[[Tensor], Tensor]:
        return module

    def teacher_entries(self, encoder: FrozenEncoder, network: FeatureExtractor, mode: str, classes: int) -> JSON:
        return {
            "width": encoder.features if mode in ("probe", "transductive") else classes
        }  # of pooled features, or of logits

    def largest_outputs(self, encoder: FrozenEncoder, settings: RunSettings, classes: int) -> tuple[int, int, bool]:
        task_agnostic = settings.objective == "task-agnostic"
        views_each = 1 if task_agnostic else len(self.views(settings).looks)
        return encoder.features, views_each, task_agnostic or settings.adapt in ("probe", "transductive")

    def widths(self, result: AdaptationResult, settings: DistillSettings) -> list[int]:
        features = result.teacher.features
        if settings.objective == "task-agnostic":
            return [features]
        return [result.width, *([result.classes] if result.classes < result.width else [])]  # features, or logits

    def teacher_for_distillation(
        self, folder: Path, result: AdaptationResult, settings: DistillSettings, accelerator: Accelerator, level: int
    ) -> AdaptedTeacher:
        from tutelage.models import adapted_teacher

        load = adapted_teacher.frozen if settings.objective == "task-agnostic" else adapted_teacher.load_adapted
        teacher = load(folder, result.to_json(), settings.teacher_weights, accelerator)
        return adapted_teacher.with_logits(teacher) if level else teacher

    def adapted(self, folder: Path, result: AdaptationResult, weights: str, accelerator: Accelerator) -> AdaptedTeacher:
        from tutelage.models.adapted_teacher import load_adapted

        return load_adapted(folder, result.to_json(), weights, accelerator)

    def student(self, settings: shared_flags.Student, classes: int) -> Student:
        from tutelage.models.students import build_student

        return build_student(settings.student, classes, settings.student_weights, settings.student_size)

    def distillation_module(self, student: Student, width: int, settings: DistillSettings) -> nn.Module:
        from tutelage.models.students import DINOStudent, StudentWithProjector, plain_head

        module, size, strict = student.module, int(student.size), settings.objective in WITHOUT_TARGETS
        if strict and not plain_head(module, size):
            raise TutelageError(
                f"--objective {settings.objective} does not support --student {student.name}, "
                "whose head is not one linear layer on pooled features",
                "use --objective task-oriented or pseudo-label, or another student",
            )
        if width and (strict or StudentWithProjector.possible(module, size)):
            return StudentWithProjector(module, width, size)
        if width:
            logger.info(f"{student.name} has no single head on pooled features: the teacher's features are not matched")
        return DINOStudent(module, size) if strict and not width else module

    def member_grid(self, settings: CommitteeSettings, images: int, classes: int) -> None:
        return None

    def member_truth(self, labels: Labels, grid: Grid | None, fold: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        truth = _numbers(labels)
        return truth, np.ones(len(truth), bool) if fold is None else linear_probe.judgeable(truth, fold)

    def log_probabilities(
        self, module: nn.Module, network: Network, inference: Inference, grid: Grid | None
    ) -> np.ndarray:
        outputs = (view_outputs(module, module, network, inference, look) for look in inference.views.looks)
        found = [log_softmax(one) for one in outputs]
        return log_softmax(np.mean(found, axis=0)).clip(LEAST_LOG).astype(np.float16)

    def student_predictions(self, module: nn.Module, network: Network, inference: Inference) -> np.ndarray:
        return view_outputs(module, module, network, inference, CLEAN)

    def teacher_predictions(self, adapted: AdaptedTeacher, cache: OutputCache, inference: Inference) -> np.ndarray:
        from tutelage.features.output_cache import compute_outputs

        images = inference.images
        compute_outputs(cache, adapted.network, images, [CLEAN], inference.views, inference.advance)
        return adapted.head(cache.table(images, CLEAN).rows())

    def predictions_of(self, outputs: np.ndarray, labels: Labels, positions: np.ndarray) -> list[np.ndarray]:
        return list(outputs)

    def rows_of(self, outputs: np.ndarray) -> np.ndarray:
        return outputs

    def image_scores(self, predictions: Predictions, labels: Labels) -> np.ndarray:
        return np.asarray(predictions).argmax(1) == _numbers(labels)

    def confidence(self, predictions: Predictions, labels: Labels) -> tuple[np.ndarray, np.ndarray]:
        return softmax(np.asarray(predictions)).max(1).astype(np.float32), self.image_scores(predictions, labels)

    def agreement(self, one: Predictions, other: Predictions) -> float:
        return float((np.asarray(one).argmax(axis=1) == np.asarray(other).argmax(axis=1)).mean())

    def judged(self, predictions: Predictions, labels: Labels, classes: int) -> JSON:
        return classification(np.asarray(predictions), _numbers(labels))

    def keep_evidence(self, folder: Path, test: Labelled, predictions: dict[str, Predictions], about: JSON) -> None:
        probabilities = {name: softmax(np.asarray(logits)) for name, logits in predictions.items()}
        write_evidence(folder, _numbers(test.labels), test.ids, test.images.__getitem__, probabilities)


def _numbers(labels: Labels) -> np.ndarray:
    assert isinstance(labels, np.ndarray)
    return labels
