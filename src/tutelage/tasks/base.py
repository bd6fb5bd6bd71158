"""What a task is: everything in which classification and segmentation differ, as one protocol with a class for each task."""

# pyright: reportReturnType=false
# The methods of a protocol have no body: each is a signature and its meaning

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np

from tutelage.data.image_cache import Images
from tutelage.data.manifest import Labelled
from tutelage.data.masks import Labels
from tutelage.data.target_set import TargetSet
from tutelage.errors import TutelageError
from tutelage.features.view_batches import Inference, ViewSettings
from tutelage.image_size import Size
from tutelage.json_object import JSON
from tutelage.reporting.scores import MetricSpec
from tutelage.results import AdaptationResult
from tutelage.settings import shared_flags
from tutelage.settings.command_flags import CommitteeSettings, Curation, DistillSettings, RunSettings

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor, nn

    from tutelage.features.output_cache import OutputCache
    from tutelage.models.adapted_teacher import AdaptedTeacher, FeatureExtractor
    from tutelage.models.linear_probe import LinearHead
    from tutelage.models.segmentation_heads import DenseHead
    from tutelage.models.students import Student
    from tutelage.models.teachers import FrozenEncoder

    TeacherHead = LinearHead | DenseHead
    Network = Student | FeatureExtractor

Grid = tuple[int, int]  # rows and columns
Predictions = np.ndarray | list[np.ndarray]  # n logits (C,) float32, or n masks (H, W) uint8 of predicted classes


@dataclass(frozen=True)
class HeadFitter:
    """Fits heads on features (n, D) float32 of the frozen teacher and labels as `Task.head_truth` returns them.

    strengths: to choose from. strength, temperature: where no label can be held out. fit: strength, features, labels -> head.
    """

    strengths: tuple[float, ...]
    strength: float
    temperature: float
    fit: Callable[[float, np.ndarray, np.ndarray], TeacherHead]


def class_names(settings: shared_flags.Labelled) -> list[str] | None:
    """Return the class names given by --classes; None for all classes."""
    return [name.strip() for name in settings.classes.split(",")] if settings.classes else None


class Task(Protocol):
    """One task. A class of it names this one as its base, is final, holds no state, and imports torch only inside its methods.

    Shapes: n images, C classes, (h, w) a grid; "logits" are (n, C) of whole images or (n, C, h, w), or (n, C, H, W), of masks.
    Arguments that many methods have: `settings` of the command; `result`: of the teacher's stage, whose folder is `folder`; `module`: in
    training or evaluation mode; `network`: with size, mean and std of the module's input; `images`: stored images; `inference`: the images
    to apply a model to, with `views` as `Task.views` returns them.
    """

    # Training. Learning rates are for batch 128
    PASSES: ClassVar[dict[str, int]]  # way to run the last stage -> passes over the labelled images
    RATES: ClassVar[dict[str, float]]  # the same -> learning rate
    FROM_LOGITS: tuple[str, ...]  # candidates for a student distilled from logits, the one kept in a tie first
    FROM_FEATURES: tuple[str, ...]  # candidates for a student distilled from features, without labels
    SCRATCH_RATE: float  # learning rate of a student that starts from random weights
    PRETRAINED_RATE: float
    IMAGES: int  # that a student sees if neither --steps nor --epochs is given
    FINETUNE_BATCH: int  # largest batch of the last stage
    TEACHER_BATCH: int  # largest batch of the teacher's fine-tuning
    EVALUATION_BATCH: int  # images in one forward pass of an evaluation
    COUNTED: int  # images whose targets are used to estimate the share of each class
    RARE_CLASSES: float  # with --class-weight balanced, a class weighs (C x share)^-RARE_CLASSES in the distillation
    UNUSED: tuple[str, ...]  # settings without effect
    BUDGET_PER_CLASS: bool  # whether --budget counts labels of each class, not labelled images in all
    TRIES_ALL_TEACHERS: bool  # whether a teacher may be unfit at its own size too
    PILOT: bool  # whether --pilot can hold each label out of a run of its own
    # Names of scores
    METRICS: MetricSpec  # the scores that `judged` returns; METRICS.main is the key of the main one
    SCORE_TITLE: str  # the main score in messages
    IMAGE_SCORE: str  # key of the mean of `image_scores` in the result of the last stage

    # Reading data
    def check(self, settings: shared_flags.Group) -> list[TutelageError]:
        """Return one fault for each setting that this task does not support; nothing is read."""

    def read(self, settings: Curation) -> TargetSet:
        """Read the target set, and check its masks if it has any."""

    def read_any(self, target: str, classes: tuple[str, ...]) -> TargetSet:
        """Read all labelled images of one path, whatever their split. classes: of the run."""

    def labels_of(self, found: TargetSet, good: np.ndarray, images: Images, cache: Path) -> Labels:
        """Return the labels of the rows `good` of a target set, whose images are `images`."""

    # Views and grids
    def views(self, settings: shared_flags.Views) -> ViewSettings:
        """Return the view settings of a run."""

    def grid(self, settings: shared_flags.Student) -> Grid | None:
        """Return the grid of the student's logits in the distillation; None if they are of whole images."""

    # The teacher
    def flops_of(self, encoder: FrozenEncoder) -> int:
        """Return the FLOPs of the frozen encoder for one image, summed over its windows."""

    def check_teacher(self, module: nn.Module, name: str, size: Size, window: Size | None) -> None:
        """Run a teacher's module on one blank image, as this task does; raises whatever the architecture raises. name: timm's. size,
        window: of its input."""

    def frozen_network(self, encoder: FrozenEncoder, accelerator: Accelerator) -> FeatureExtractor:
        """Return the frozen encoder as a network that gives the features on which heads are fitted."""

    def head_fitter(
        self, network: FeatureExtractor, features: Callable[[int], np.ndarray], classes: int, class_weight: str
    ) -> HeadFitter:
        """Return what fits heads on a frozen network's features. features: number of gallery images -> their features (n, D)."""

    def head_truth(self, labels: Labels, network: FeatureExtractor) -> np.ndarray:
        """Return the labels on which a head is fitted: (n,) int64, or masks (n, h, w) int64 on the grid of its logits."""

    def extra_metrics(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Return scores of held-out logits (N, C) with labels (N,) in addition to accuracy and log loss."""

    def whole_teacher(
        self, encoder: FrozenEncoder, module: nn.Module, classes: int, head: TeacherHead | None
    ) -> tuple[nn.Module, nn.Module, nn.Module]:
        """Return a teacher to fine-tune, its encoder and its head. module: a copy of the encoder's. head: to start from, if any."""

    def head_forward(self, module: nn.Module, network: FeatureExtractor) -> Callable[[Tensor], Tensor]:
        """Return the forward function of a whole teacher whose logits have the shape of its head's."""

    def teacher_entries(self, encoder: FrozenEncoder, network: FeatureExtractor, mode: str, classes: int) -> JSON:
        """Return the teacher's entries in a result, from which `widths` is computed. mode: how it was adapted."""

    def largest_outputs(self, encoder: FrozenEncoder, settings: RunSettings, classes: int) -> tuple[int, int, bool]:
        """Return, before a run, what is cached if --cache-limit allows.

        Returns:
            the number of values per view; the number of views per image; whether they are outputs of the unadapted teacher.
        """

    def widths(self, result: AdaptationResult, settings: DistillSettings) -> list[int]:
        """Return how many values per view may be cached, largest first."""

    def teacher_for_distillation(
        self, folder: Path, result: AdaptationResult, settings: DistillSettings, accelerator: Accelerator, level: int
    ) -> AdaptedTeacher:
        """Load the teacher for the distillation: adapted, or frozen for the task-agnostic objective. level: index into `widths`."""

    def adapted(self, folder: Path, result: AdaptationResult, weights: str, accelerator: Accelerator) -> AdaptedTeacher:
        """Load the teacher of a run for evaluation. weights: --teacher-weights of the run."""

    # The student
    def student(self, settings: shared_flags.Student, classes: int) -> Student:
        """Build a new student."""

    def distillation_module(self, student: Student, width: int, settings: DistillSettings) -> nn.Module:
        """Return the module to distil, with the student in it. width: of the features to match, 0 for none.

        Raises:
            TutelageError: the objective does not support this student.
        """

    # The committee
    def member_grid(self, settings: CommitteeSettings, images: int, classes: int) -> Grid | None:
        """Return the grid of the predictions of the committee's students; None if they are of whole images.

        The finest grid for which the predictions for `images` images fit into --cache-limit.
        """

    def member_truth(self, labels: Labels, grid: Grid | None, fold: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Return the labels of held-out images, (n,) int64 or (n, h, w) int64 on a grid, and bool of that shape: which can be judged.

        Args:
            grid: from `member_grid`. fold: (n,) of labelled images; None for validation images, where every label can be judged.
        """

    def log_probabilities(
        self, module: nn.Module, network: Network, inference: Inference, grid: Grid | None
    ) -> np.ndarray:
        """Return float16 log probabilities of a model for whole images, (n, C) or (n, C, *grid), averaged over `views.looks`."""

    # Predictions and scores
    def student_predictions(self, module: nn.Module, network: Network, inference: Inference) -> Predictions:
        """Return the predictions of a student or a whole teacher; those of masks at the masks' size, or the input's without labels."""

    def teacher_predictions(self, adapted: AdaptedTeacher, cache: OutputCache, inference: Inference) -> Predictions:
        """Return the adapted teacher's predictions, from the cache where outputs are kept."""

    def predictions_of(self, outputs: np.ndarray, labels: Labels, positions: np.ndarray) -> list[np.ndarray]:
        """Return an exported model's logits for the images at these positions in the form of `student_predictions`."""

    def rows_of(self, outputs: np.ndarray) -> np.ndarray:
        """Return an exported model's logits as (N, C), one row per decision."""

    def image_scores(self, predictions: Predictions, labels: Labels) -> np.ndarray:
        """Return the score of each image: (n,) bool, whether it is right, or (n,) float64 in [0, 1]."""

    def confidence(self, predictions: Predictions, labels: Labels) -> tuple[np.ndarray, np.ndarray] | None:
        """Return (n,) float32 confidence in [0, 1] and (n,) bool, whether each image is right; None where images are neither."""

    def agreement(self, one: Predictions, other: Predictions) -> float:
        """Return the share of decisions, of images or pixels, that two models have in common."""

    def judged(self, predictions: Predictions, labels: Labels, classes: int) -> JSON:
        """Return all scores."""

    # What the report page shows
    def keep_evidence(self, folder: Path, test: Labelled, predictions: dict[str, Predictions], about: JSON) -> None:
        """Write what the report page shows of single test images. predictions: of each model. about: the result of curation."""
