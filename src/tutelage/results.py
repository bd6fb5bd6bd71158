"""What the commands return: frozen values with typed fields, and, from `to_json`, the object that --json prints.

A score is in [0, 1]; seconds are of work, summed over restarts; 1 MAC = 2 FLOPs. A field that a task or a run does not have is None.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from tutelage.errors import TutelageError
from tutelage.image_size import Size
from tutelage.json_object import JSON


class Result(BaseModel):
    """Base of all results."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, defer_build=True)

    def to_json(self) -> JSON:
        """Return the result as plain dicts, lists, texts and numbers, without the fields that it does not have."""
        return self.model_dump(by_alias=True, exclude_unset=True)


class Scores(Result):
    """Scores on test images; of masks over their pixels. recall, iou: of each class, None for one without images. confusion: rows are
    labels. standard_error: of the mIoU, from drawing the test images again."""

    images: int
    accuracy: float
    balanced_accuracy: float
    recall: list[float | None]
    confusion: list[list[int]]
    macro_f1: float | None = None
    ece: float | None = None
    log_loss: float | None = None
    miou: float | None = None
    iou: list[float | None] | None = None
    boundary_f1: float | None = None
    standard_error: float | None = None


class ModelResult(Result):
    """One model of a run. latency_ms: batch 1, 1 thread, None for a teacher above 1 TFLOP an image. agreement: share of equal decisions,
    with the teacher on test images and on images of the transfer set, and with the targets. weight: of a committee's students. what: the
    delivered one is (distilled, head, full, long, steep or baseline)."""

    name: str | None = None
    parameters: int
    flops: int | None = None
    latency_ms: float | None = None
    initialisation: str | None = None
    agreement: float | None = None
    agreement_on_transfer: float | None = None
    agreement_with_targets: float | None = None
    weight: float | None = None
    what: str | None = None
    scores: Scores | None = Field(None, alias="test")

    @property
    def test(self) -> Scores:
        """Scores on the test images.

        Raises:
            TutelageError: the run has no test images.
        """
        if self.scores is None:
            raise TutelageError("this run has no test images, so no scores", "give it some with --test")
        return self.scores


class Models(Result):
    """The models of a run that have been scored."""

    distilled: ModelResult | None = None
    baseline: ModelResult | None = None
    delivered: ModelResult | None = None
    teacher: ModelResult | None = None
    committee: ModelResult | None = None

    @property
    def student(self) -> ModelResult:
        """The student to ship: the delivered one, or the distilled one before the last stage.

        Raises:
            TutelageError: the run has neither.
        """
        found = self.delivered or self.distilled
        if found is None:
            raise TutelageError("this run has no student yet", "run `tutelage distill` and `tutelage finetune` first")
        return found


class RunResult(Models):
    """Result of `run`. run: its folder. seconds: of each stage. reused: stages whose result was there already."""

    run: str
    seconds: dict[str, float]
    reused: list[str]


class DemoResult(RunResult):
    """Result of `demo`. pixels: logistic regression on the pixels. text: the table."""

    pixels: ModelResult
    text: str


class TeacherCost(Result):
    """Compute of the teacher's outputs. outputs: views of images that were needed; computed: those that the cache did not have."""

    flops: int
    outputs: int
    computed: int
    seconds: float
    bytes: int


class ComputeCost(Result):
    """Compute of a stage. images: trained on, repeats included. memory_mib: the peak. bytes: on disk."""

    flops: int
    images: float
    seconds: float
    memory_mib: float
    bytes: int
    teacher: TeacherCost


class StageResult(Result):
    """Result of any stage. inputs, outputs, curated: hashes of what it depends on, of what it made, and of the transfer set. files: SHA-256
    of each file that the stage wrote for later ones. made_with: versions. taken_from: the run of the same study that it was copied from.
    reused: whether it was there already."""

    inputs: str
    seconds: float
    made_with: dict[str, str | int]
    files: dict[str, str] = {}
    outputs: str | None = None
    curated: str | None = None
    compute_cost: ComputeCost | None = None
    taken_from: str | None = None
    reused: bool = False


class ImageCounts(Result):
    """Numbers of images."""

    train: int
    val: int
    test: int
    transfer: int


class CurationResult(StageResult):
    """Result of `curate`. gallery, leaks, duplicates, near_duplicates, rejected: numbers of images; split_copies: of labelled images that
    show one of another split. similarity: its percentiles, of the images chosen to their query. brought: class -> images that its queries
    brought. distance: MMD to the target set, of transfer set and gallery. recall: of an approximate index. shown_by: class -> images whose
    mask shows it."""

    given: dict[str, str]
    task: str
    classes: list[str]
    images: ImageCounts
    gallery: int
    leaks: int
    duplicates: int
    near_duplicates: int
    rejected: int
    split_copies: int = 0
    store_side: int
    strategy: str
    distance: dict[str, str | float] | None = None
    similarity: dict[str, float] | None = None
    brought: dict[str, int] | None = None
    far_classes: list[str] | None = None
    nothing_near: bool | None = None
    index: str | None = None
    recall: float | None = None
    colours: list[list[int]] | None = None
    coloured: bool | None = None
    ignored_colours: list[list[int]] | None = None
    shown_by: dict[str, int] | None = None


class TeacherEntry(Result):
    """The frozen encoder of a teacher, from which it can be built again. Fields as in `models.teachers.FrozenEncoder`."""

    name: str
    size: Size
    mean: list[float]
    std: list[float]
    features: int
    licence: str
    weights: str
    hash: str
    window: Size | None = None


class AdaptationResult(StageResult):
    """Result of `adapt`. mode: probe or full. width: values of an output. classes, labels: numbers. validation: mode -> scores on held-out
    labels. deepest: channels of the deepest level, for masks."""

    mode: str
    width: int
    teacher: TeacherEntry
    classes: int
    labels: int
    validation: dict[str, dict[str, float | str]]
    validated_on: str
    deepest: int | None = None


class StudentEntry(Result):
    """A student, from which it can be built again. Fields as in `models.students.Student`; parameters: count."""

    name: str
    size: Size
    mean: list[float]
    std: list[float]
    parameters: int
    initialisation: str
    channels_last: bool
    decoder: str = ""


class StudentResult(StageResult):
    """Result of a stage that trains students."""

    student: StudentEntry
    steps: int
    images_seen: int
    loss: float | None = None


class CommitteeResult(StageResult):
    """Result of `committee`. The fields of the mixture are those of `distillation.mixture.mixture_of`. folds: number of students; 0 where
    no label can be held out, and `student` is empty. grid: of the students' predictions for masks."""

    student: StudentEntry | dict[str, None]
    steps: int
    images_seen: int
    folds: int
    weight: float
    temperature: float
    bias: list[float]
    students_temperature: float
    students_bias: list[float]
    gain: float
    standard_error: float
    held_out: dict[str, dict[str, float]] | None
    grid: tuple[int, int] | None


class DistillationResult(StudentResult):
    """Result of `distill`. head: whether the student has a trained classifier or decoder. labelled_in_batch: images. online: whether the
    teacher ran at every step. target_shares: mean probability of each class. agreement_with_targets: share of equal decisions."""

    objective: str
    head: bool
    labelled_in_batch: int
    processes: int
    online: bool
    target_seconds: float
    target_shares: list[float] | None = None
    agreement_with_targets: float | None = None


class FinetuneResult(StageResult):
    """Result of `finetune`. delivered: distilled, head, full, long, steep or baseline. validation: by candidate."""

    delivered: str
    student: StudentEntry
    validation: dict[str, dict[str, float]]
    judged_on: str


class EvaluationResult(Models):
    """Result of `evaluate`. On a run's own test images it is a stage, with `inputs` and `seconds`; on another target set it has `run` and
    `target`."""

    classes: list[str]
    test_images: int
    inputs: str | None = None
    seconds: float | None = None
    files: dict[str, str] | None = None
    made_with: dict[str, str | int] | None = None
    reused: bool = False
    run: str | None = None
    target: str | None = None


class ShardResult(Result):
    """Result of `curate --shard`: images of this share, and those embedded now."""

    shard: str
    images: int
    embedded: int
    seconds: float


class StudyResult(Result):
    """Result of `compare`. study: its folder. runs: one row each. table: a row for each method and budget, with mean and spread. teachers:
    the same of the adapted teachers. failed: run or method -> reason. missing: runs that are not finished. shared: what runs had in
    common."""

    study: str
    page: str
    failed: dict[str, str]
    missing: list[str]
    table: list[JSON]
    teachers: list[JSON]
    shared: dict[str, float]
    runs: list[JSON]


class StudyEstimate(Result):
    """Result of `compare --dry-run`: what is left to run. plan: in words. gibibytes: new in the cache, with the teacher's outputs."""

    runs: int
    hours: float
    gibibytes: float
    outputs_gibibytes: float
    plan: list[str]


class ExportResult(Result):
    """Result of `export`: its folder, and the content of export.json. recommended: the faster file here of those that lose little enough.
    proof: scores of each file, and its agreement with the student. unsure: the threshold of confidence. latency: file -> milliseconds."""

    export: str
    recommended: str
    size: Size
    student: StudentEntry
    classes: int
    proof: JSON
    unsure: dict[str, float | None] | None
    int8: JSON | None
    latency: dict[str, dict[str, float]]
    machine: JSON
    outputs: str
    settings_hash: str
    versions: dict[str, str]


class BenchmarkResult(Result):
    """Result of `benchmark`. rows: model, device, threads, batch, median_ms, p95_ms, times_as_fast. files: bytes, peak_mib."""

    machine: JSON
    size: Size
    rows: list[JSON]
    files: dict[str, dict[str, float]]
    versions: dict[str, str]


class PredictionsResult(Result):
    """Result of `predict`. unsure: images below the threshold. masks: folder of the masks."""

    predictions: str
    images: int
    rejected: int
    model: str
    unsure: int | None = None
    masks: str | None = None


class PageResult(Result):
    """Result of `report` and `demo-page`: path and size of the page."""

    page: str
    megabytes: float | None = None


class CacheResult(Result):
    """Result of `cache`. entries: name, what, gib, days since their last use."""

    cache: str
    entries: list[JSON]
    gib: float
    removed: list[str]


class DoctorResult(Result):
    """Result of `doctor`. disk_gib, memory_gib: free. weights: `hub`, "" or why it cannot be reached, and `packages`. advice: lines."""

    python: str
    versions: dict[str, str | None]
    devices: JSON
    threads: JSON
    disk_gib: dict[str, float]
    memory_gib: float
    extras: dict[str, bool]
    weights: JSON
    advice: list[str]
