"""Every setting, declared once: its name, type, range, default and help text, in groups that the commands share.

The name is the flag (`--teacher-size`), the key in a TOML file (`teacher-size` or `teacher_size`) and the argument in Python
(`teacher_size`). A setting that is free changes where or how fast a command computes, or what it prints, but not its results.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal, dataclass_transform

from tutelage.image_size import sides

MOST_IMAGES = 10**10  # in a gallery
MOST_GIB = 10**9


def setting(
    default: object, help: str, *, free: bool = False, reads: Callable[[object], object] | None = None, **limits: float
) -> Any:  # whatever type the field is declared with, as of `dataclasses.field`
    """Declare a setting as a field of a group.

    Args:
        default: its value where none is given; a tuple stands for a list of several values.
        help: text for `--help` and the docs. free: whether it leaves the results of a command as they are.
        reads: turns a given value into the form that is stored. limits: pydantic's, such as ge=1 or min_length=1.
    """
    metadata = {"help": help, "free": free, "reads": reads, "limits": limits}
    if isinstance(default, tuple):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Group:
    """Base of all groups of settings: each is a frozen dataclass that takes keyword arguments only."""

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, kw_only=True)(cls)


def size(value: object) -> int | str | None:
    """Return a size in its canonical form: a number if height and width are equal, else text HEIGHTxWIDTH."""
    if value is None:
        return None
    both = sides(str(value)) if re.fullmatch(r"\d{1,5}(x\d{1,5})?", str(value)) else (0, 0)
    if min(both) < 16 or max(both) > 2048:
        raise ValueError("16 to 2048 pixels, such as 224, or HEIGHTxWIDTH, such as 256x320")
    return both[0] if both[0] == both[1] else f"{both[0]}x{both[1]}"


@functools.cache
def declared(settings: Any) -> dict[str, Field[object]]:  # for type checkers, a class of settings is a callable
    """Return the declarations of a class of settings by name, in the order of its groups, its own last."""
    names: dict[str, None] = {}
    for base in settings.__bases__:
        names |= dict.fromkeys(declared(base)) if issubclass(base, Group) and base is not Group else {}
    names |= dict.fromkeys(inspect.get_annotations(settings))
    found = {one.name: one for one in fields(settings)}
    return {name: found[name] for name in names}


def default_of(one: Field[object]) -> object:
    """Return the default value of a setting."""
    return one.default if one.default_factory is MISSING else one.default_factory()


class Labelled(Group):
    """The labelled images."""

    task: Literal["classification", "segmentation"] = setting(
        "classification", "type of the labels: one class per image, or masks"
    )
    target: str = setting(
        "", "labelled images: a folder, a CSV or Parquet list, Parquet shards or WebDataset tars", min_length=1
    )
    val: str | None = setting(None, "validation images: a path like --target, or a share of train such as 0.1")
    test: str | None = setting(None, "test images: a path like --target, or a share of train such as 0.2")
    classes: str | None = setting(None, "use only these classes: names separated by commas")
    group_by: str | None = setting(
        None, "regular expression on image names; images with the same match stay in one split"
    )


class Gallery(Group):
    """The unlabelled images, and how the transfer set is chosen among them."""

    gallery: list[str] = setting((), "unlabelled images: folders, tar or Parquet shards; several at once", min_length=1)
    strategy: Literal["auto", "all", "random", "best", "balanced", "diverse", "hard", "text"] = setting(
        "auto", "how gallery images are chosen; auto: balanced if --total or --per-query is given, else all"
    )
    total: int | None = setting(None, "size of the transfer set, labelled images included", ge=1, le=MOST_IMAGES)
    per_query: int | None = setting(None, "gallery images per query, instead of --total", ge=1, le=MOST_IMAGES)
    balance: Literal["query", "class"] = setting(
        "query", "what takes turns in choosing images: each labelled image, or each class"
    )
    dedup: Literal["candidates", "gallery", "none"] = setting(
        "candidates",
        "where copies of validation and test images, and near duplicates, are searched and removed: among the chosen images "
        "(with --strategy all: only the copies), or in the whole gallery; none: only identical images are removed",
    )
    max_rejected: float = setting(
        0.05, "stop before training if a larger share of images is unusable", ge=0, le=1, free=True
    )


class Search(Group):
    """How the gallery is embedded and searched."""

    index: Literal["auto", "exact", "ivf"] = setting(
        "auto",
        "exact search, or an inverted file, its recall measured; auto: exact up to 5 million images or if memory is short",
    )
    memory: float | None = setting(
        None, "GiB of memory for the search; default: half of the free memory", gt=0, le=MOST_GIB, free=True
    )
    embeddings: list[str] = setting(
        (), "precomputed embeddings of the gallery, by image name: Parquet, .npy with names, or a clip-retrieval folder"
    )
    text_embeddings: str | None = setting(
        None, "with --strategy text: embeddings of the class names, from the model of --embeddings", min_length=1
    )
    clip: str = setting("openclip-b", "with --strategy text: CLIP model, an alias or an open_clip name", min_length=1)
    clip_weights: str = setting("pretrained", "weights of --clip: pretrained (hub), scratch, or a file", min_length=1)
    templates: list[str] = setting((), "with --strategy text: sentences with {} for the class name")
    engine: Literal["local", "ray"] = setting(
        "local",
        "where the gallery is embedded: in this process, or on a Ray cluster (RAY_ADDRESS, or a local one)",
        free=True,
    )


class TeacherWeights(Group):
    """Where the teacher's weights come from."""

    teacher_weights: str = setting(
        "pretrained", "pretrained (installed package or hub), scratch, or a file", min_length=1
    )


class Teacher(TeacherWeights):
    """The teacher."""

    teacher: str = setting("dinov2-s", "foundation model: an alias such as dinov2-s, or any timm name", min_length=1)
    teacher_size: int | str | None = setting(None, "input pixels or HxW; default: the model's own", reads=size)
    teacher_window: int | str | None = setting(
        None,
        "segmentation: pixels, or HxW, of the windows that the teacher runs on; default: --teacher-size, one window",
        reads=size,
    )


class Adaptation(Group):
    """How the teacher is adapted."""

    adapt: Literal["probe", "transductive", "probe-then-full", "full", "auto"] = setting(
        "probe",
        "how the teacher is adapted to the task; transductive: a head fitted on labels and pool (classification)",
    )


class StudentInput(Group):
    """The student and the size of its input."""

    student: str = setting(
        "mobilenetv4-s", "model to train: an alias such as mobilenetv4-s, or any timm name", min_length=1
    )
    student_size: int | str | None = setting(None, "input pixels or HxW; default: the model's own", reads=size)


class Student(StudentInput):
    """A student to train."""

    student_weights: str = setting("pretrained", "pretrained, scratch, or a file", min_length=1)
    decoder: Literal["lraspp", "fpn", "deeplabv3plus"] = setting(
        "lraspp", "with --task segmentation: the student's decoder"
    )


class TeacherCache(Group):
    """How much of the teacher's outputs is cached."""

    cache_limit: float = setting(
        20.0,
        "GiB of cached teacher outputs; above it, logits or coarser grids are cached, or the teacher runs online",
        ge=0,
        le=MOST_GIB,
        free=True,
    )


class Distillation(TeacherCache):
    """The targets and the losses of the distillation."""

    task_agnostic_loss: Literal["contrastive", "queue", "cosine"] = setting(
        "contrastive", "how --objective task-agnostic compares features"
    )
    task_agnostic_features: Literal["patches", "global"] = setting(
        "patches",
        "with --task segmentation: whether --objective task-agnostic compares features of patches or of whole images",
    )
    committee: Literal["auto", "none", "only"] = setting(
        "auto",
        "auto: targets from teacher and labels-only students, weighted on held-out labels; none: teacher only; only: students only",
    )
    label_share: float | None = setting(
        None,
        "share of each batch that is labelled images with their labels; default: 4 x labelled / transfer set, at most 3/8",
        ge=0,
        lt=1,
    )
    temperature: float = setting(1.0, "softens targets and student outputs in the distillation", gt=0, le=100)
    feature_weight: float = setting(
        2.0,
        "weight of the loss on the teacher's pooled features, added to the loss on the targets; 0: off",
        ge=0,
        le=1e6,
    )


class Schedule(Group):
    """Length and learning rate of a student's training."""

    epochs: int | None = setting(
        None,
        "passes over the transfer set; default: 400,000 images in total (segmentation: 8,000), in 4 to 100 passes",
        ge=1,
        le=10**6,
    )
    steps: int | None = setting(None, "optimizer steps, instead of --epochs", ge=1, le=10**8)
    batch_size: int = setting(128, "images per step, over all processes; default for segmentation: 8", ge=2, le=2**16)
    lr: float | None = setting(
        None,
        "learning rate at batch 128, scaled by sqrt(batch / 128); default: 0.008 from random weights, else 0.002; masks: 0.02, 0.005",
        gt=0,
        le=1,
    )


class Resize(Group):
    """How images get the shape of a model's input."""

    resize: Literal["squash", "crop", "pad"] = setting("squash", "how images are made square")


class Views(Resize):
    """The views of an image."""

    flip: Literal["none", "horizontal", "both"] = setting(
        "horizontal", "mirrored views; text needs none, aerial images both"
    )
    crop_area: float = setting(
        0.8, "smallest share of the image that a view shows; default for segmentation: 0.35", gt=0, le=1
    )
    view_seed: int = setting(
        0, "seed of the students' augmentations; unlike --seed, it is shared by all runs", ge=0, lt=2**63
    )


class Training(Views):
    """What all trainings have in common."""

    class_weight: Literal["none", "balanced"] = setting(
        "none", "class weights in the losses; balanced: rare classes count more, for a better balanced accuracy"
    )


class LastStage(Group):
    """The last stage, on the labels."""

    finetune: Literal["auto", "keep", "head", "full"] = setting(
        "auto", "last stage, on the labels; auto: the best on --val, else keep"
    )


class Cache(Group):
    """The cache."""

    cache: str | None = setting(
        None, "folder of decoded images and teacher outputs, shared by runs; default: cache/ beside the run", free=True
    )


class Machine(Cache):
    """What a command computes on, and its cache."""

    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "device to compute on", free=True)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting("auto", "auto: bf16 if the GPU supports it, else fp32")


class ConfigFile(Group):
    """Settings from a file."""

    config: str | None = setting(None, "TOML file with any of these settings; flags override it", free=True)


class Seed(Group):
    """The seed."""

    seed: int = setting(0, "seed of random draws, initialisation and image order", ge=0, lt=2**63)


class Stage(Machine, ConfigFile, Seed):
    """What all stages of a run have in common."""

    out: str = setting("", "run folder", min_length=1, free=True)
    overwrite: bool = setting(False, "move aside a finished run that has other settings", free=True)


class TrainingStage(Training, Stage):
    """What all stages that train have in common."""

    tracker: Literal["none", "tensorboard", "wandb", "mlflow"] = setting(
        "none", "experiment tracker besides metrics.jsonl", free=True
    )


class Smoke(Group):
    """A short trial of the real command."""

    smoke: bool = setting(False, "run the real command, reduced to a minute on a CPU")


class Json(Group):
    """Output for other programs."""

    json: bool = setting(False, "print one JSON object for other programs", free=True)


class FinishedRun(Group):
    """The run that a command is about."""

    run: str = setting("", "run folder", min_length=1)


class FinishedExport(Group):
    """The export that a command is about."""

    export: str = setting("", "folder written by `tutelage export`, or its run", min_length=1)
