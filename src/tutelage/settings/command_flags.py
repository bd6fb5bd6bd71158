"""The settings of each command: groups that commands share, and what is its own."""

from __future__ import annotations

from typing import Literal

from tutelage.settings import shared_flags
from tutelage.settings.shared_flags import declared, setting

MOST_THREADS = 1024  # of onnxruntime, which starts all of them at once
WITHOUT_TARGETS = ("task-agnostic", "dino")  # objectives that use no class probabilities, and so no committee


class Curation(
    shared_flags.Labelled,
    shared_flags.Gallery,
    shared_flags.Search,
    shared_flags.Teacher,
    shared_flags.StudentInput,
    shared_flags.Resize,
    shared_flags.Stage,
    shared_flags.Smoke,
):
    """Settings of `curate` that `run` has too."""

    budget: int | None = setting(
        None, "number of labels per class to use, or of masks in total; default: all", ge=1, le=shared_flags.MOST_IMAGES
    )


class CurateSettings(Curation):
    """Settings of `curate`."""

    shard: str | None = setting(
        None,
        "embed only part i of n of the gallery: i/n, i from 0; env: from RANK and WORLD_SIZE (torchrun, job arrays)",
        free=True,
    )


class AdaptSettings(shared_flags.Teacher, shared_flags.Adaptation, shared_flags.TrainingStage):
    """Settings of `adapt`."""


class BaselineSettings(shared_flags.Student, shared_flags.Schedule, shared_flags.TrainingStage):
    """Settings of `baseline`."""


class CommitteeSettings(BaselineSettings, shared_flags.TeacherCache):
    """Settings of `committee`: those of the baseline, since its students are trained like it."""


class DistillSettings(shared_flags.TeacherWeights, BaselineSettings, shared_flags.Distillation):
    """Settings of `distill`."""

    objective: Literal["task-oriented", "task-agnostic", "pseudo-label", "dino"] = setting(
        "task-oriented",
        "distillation objective: match class probabilities (task-oriented), features (task-agnostic), or a rival method",
    )
    preset: Literal["none", "paper"] = setting(
        "none",
        "defaults to start from, which flags override; paper: KL to the adapted teacher only, then --finetune full",
        free=True,
    )


class FinetuneSettings(shared_flags.LastStage, shared_flags.TrainingStage):
    """Settings of `finetune`."""


class RunSettings(Curation, shared_flags.Adaptation, DistillSettings, shared_flags.LastStage, shared_flags.Json):
    """Settings of `run`: those of its stages."""

    pilot: bool = setting(
        False, "without --val: compare with the baseline by one run per label fold; 10 to 15 times as long"
    )
    no_baseline: bool = setting(False, "do not train the baseline, the same student on the labels only", free=True)


class Compared(
    shared_flags.Labelled,
    shared_flags.Gallery,
    shared_flags.Teacher,
    shared_flags.Adaptation,
    shared_flags.Student,
    shared_flags.Distillation,
    shared_flags.Schedule,
    shared_flags.Training,
):
    """Settings of a run that the methods of a study may differ in."""


class CompareSettings(
    Compared, shared_flags.LastStage, shared_flags.Machine, shared_flags.ConfigFile, shared_flags.Json
):
    """Settings of `compare`."""

    out: str = setting("", "folder of the study, with its runs in METHOD/budget-N/seed-N", min_length=1, free=True)
    student_weights: str = setting("scratch", "pretrained, scratch, or a file", min_length=1)
    methods: list[str] = setting(
        ("scratch", "task-agnostic", "task-oriented"),
        "methods, separated by commas or spaces: scratch imagenet clip dino task-agnostic task-oriented pseudo-label "
        "teacher-only self-training paper baseline-plus; NAME:LABEL is a variant with its own settings",
        min_length=1,
    )
    budgets: list[str] = setting(("10",), "labels per class, or masks in total; one or several values", min_length=1)
    seeds: list[str] = setting(("0", "1", "2"), "seeds of random draws and training; one or several", min_length=1)
    set: list[str] = setting((), "settings of one method, as METHOD.SETTING=VALUE: task-agnostic.lr=3e-3")
    match: Literal["images", "flops"] = setting(
        "images", "training budget that is equal for all methods: images seen, or FLOPs, the teacher's included"
    )
    results: str | None = setting(
        None, "folder with results of finished runs, not repeated; default: results/ in --out"
    )
    dry_run: bool = setting(False, "print the plan with estimated time and disk, and stop")


class EvaluateSettings(shared_flags.FinishedRun, shared_flags.Machine, shared_flags.Json):
    """Settings of `evaluate`."""

    target: str | None = setting(None, "other labelled images to evaluate the models on")
    teacher_weights: str | None = setting(None, "the teacher's weights; default: those of the run", min_length=1)


class ReportSettings(shared_flags.FinishedRun):
    """Settings of `report`."""


class ExportSettings(shared_flags.FinishedRun, shared_flags.Cache, shared_flags.Json, shared_flags.ConfigFile):
    """Settings of `export`."""

    format: list[str] = setting(
        ("onnx",), "formats to export besides model.onnx: torchscript, executorch, coreml", min_length=1
    )
    bake_preprocess: bool = setting(False, "put normalisation and softmax into the graph: pixels in, probabilities out")
    no_int8: bool = setting(False, "do not make an int8 model")
    int8_loss: float = setting(0.01, "largest accuracy loss of int8; layers stay float until it is met", gt=0, le=1)
    calibration: int = setting(512, "images of the transfer set to calibrate int8 with", ge=1, le=10**6)
    tolerance: float = setting(
        1e-4, "largest difference from the student, as a share of its largest output", gt=0, le=1
    )


class BenchmarkSettings(shared_flags.FinishedRun, shared_flags.Json):
    """Settings of `benchmark`."""


class PredictSettings(shared_flags.FinishedExport, shared_flags.Json):
    """Settings of `predict`."""

    images: list[str] = setting((), "images, or folders of images", min_length=1)
    out: str = setting("predictions.csv", "file for the predictions: .csv or .parquet", min_length=1, free=True)
    top: int = setting(1, "number of classes per image, the most likely first", ge=1, le=10**6)
    model: Literal["auto", "float", "int8"] = setting("auto", "model to use; auto: the one that the export recommends")
    threads: int | None = setting(None, "threads of onnxruntime; default: all cores", ge=1, le=MOST_THREADS)


class DemoSettings(shared_flags.Seed, shared_flags.Smoke, shared_flags.Json):
    """Settings of `demo`."""

    out: str = setting("tutelage-demo", "run folder", min_length=1, free=True)


class DemoPageSettings(shared_flags.FinishedExport):
    """Settings of `demo-page`."""

    out: str = setting("", "folder for the page, index.html", min_length=1, free=True)
    serve: bool = setting(False, "serve the page on this computer until Ctrl-C")
    port: int = setting(8000, "port for --serve; 0: any free port", ge=0, le=65535)


class CacheFolder(shared_flags.Group):
    """The cache of a command that has no run folder beside which it could be."""

    cache: str | None = setting(
        "cache",
        "folder of decoded images and teacher outputs, shared by runs; default: cache/ beside the run",
        free=True,
    )


class CacheSettings(CacheFolder, shared_flags.Json):
    """Settings of `cache`."""

    prune: float | None = setting(None, "remove entries not used for this many days", ge=0, le=10**6)


class DoctorSettings(CacheFolder, shared_flags.Json):
    """Settings of `doctor`."""


_ALL = declared(RunSettings) | declared(CompareSettings) | declared(CurateSettings)
FREE = frozenset(name for name, one in _ALL.items() if one.metadata["free"])
