"""Settings: one vocabulary of names, ranges and help texts; a command's signature is its configuration.

Every setting is one annotated type below. A command takes those it needs as keyword arguments, so the same name is the
flag (`--teacher-size`), the key in a TOML file (`teacher-size` or `teacher_size`) and the argument in Python
(`teacher_size`). `command` checks a call: explicit arguments beat `config`, which beats the defaults; all faults are
reported at once, before data or weights load.
"""

from __future__ import annotations

import functools
import inspect
import re
import tomllib
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from tutelage import presets
from tutelage.errors import TutelageError, did_you_mean, raise_all
from tutelage.image_size import sides


def _say(text: str, **more: Any) -> Parameter:
    return Parameter(help=text, **more)


def _size(value: Any) -> Any:
    """A size as it is written: a number where both sides are one, else text."""
    if value is None:
        return None
    both = sides(str(value)) if re.fullmatch(r"\d{1,5}(x\d{1,5})?", str(value)) else (0, 0)
    if min(both) < 16 or max(both) > 2048:
        raise ValueError("16 to 2048 pixels, such as 224, or HEIGHTxWIDTH, such as 256x320")
    return both[0] if both[0] == both[1] else f"{both[0]}x{both[1]}"


# Data
Task = Annotated[Literal["classification", "segmentation"], _say("what the labels are: a class an image, or a mask")]
Target = Annotated[
    str, Field(min_length=1), _say("labelled images: a folder, a CSV or Parquet list, or Parquet shards")
]
NewTarget = Annotated[str | None, _say("other labelled images to score the models on")]
Paths = Annotated[
    list[str],
    Field(min_length=1),
    _say("unlabelled images: folders, tar or Parquet shards; several at once", consume_multiple=True, negative=()),
]
Val = Annotated[str | None, _say("validation images: a path like --target, or a share of train such as 0.1")]
Test = Annotated[str | None, _say("test images: a path like --target, or a share of train such as 0.2")]
Classes = Annotated[str | None, _say("use only these classes: names with commas between")]
Budget = Annotated[
    int | None, Field(ge=1), _say("labels per class that may be used, or masks in all; default: all that are there")
]
GroupBy = Annotated[str | None, _say("regular expression on the image's name; what it matches is never split apart")]
Resize = Annotated[Literal["squash", "crop", "pad"], _say("how an image becomes a square")]
Strategy = Annotated[
    Literal["auto", "all", "random", "best", "balanced", "diverse", "hard", "text"],
    _say("how the gallery is searched; auto: balanced when --total or --per-query says how many, else all"),
]
Total = Annotated[int | None, Field(ge=1), _say("size of the transfer set, labelled images included")]
PerQuery = Annotated[int | None, Field(ge=1), _say("gallery images for each query, instead of --total")]
Balance = Annotated[
    Literal["query", "class"], _say("who takes turns in the choice: every labelled image, or every class")
]
Dedup = Annotated[
    Literal["candidates", "gallery", "none"],
    _say(
        "copies of validation and test images, and near duplicates: looked for among what the strategy chose (all: copies only), or in the "
        "whole gallery; none: only identical images go"
    ),
]
Index = Annotated[
    Literal["auto", "exact", "ivf"],
    _say(
        "exact search, or an inverted file whose recall is measured; auto: exact to 5 million, and where memory is too small"
    ),
]
Memory = Annotated[float | None, Field(gt=0), _say("GiB that the search may take; default: half of what is free")]
Embeddings = Annotated[
    list[str],
    _say(
        "vectors of the gallery made elsewhere, by name: Parquet, .npy with names, or clip-retrieval's folder",
        consume_multiple=True, negative=(),
    ),
]  # fmt: skip
TextEmbeddings = Annotated[
    str | None,
    Field(min_length=1),
    _say("with --strategy text: a vector for each class name, of the model of --embeddings"),
]
Clip = Annotated[str, Field(min_length=1), _say("with --strategy text: model of words and images, a name of open_clip")]
ClipWeights = Annotated[str, Field(min_length=1), _say("pretrained (hub), scratch, or a file")]
Templates = Annotated[
    list[str],
    _say("with --strategy text: sentences with {} for the class name", consume_multiple=True, negative=()),
]
Shard = Annotated[
    str | None,
    _say(
        "only embed part i of n of the gallery, as i/n from 0; env: RANK of WORLD_SIZE, as torchrun or a job array sets"
    ),
]
Engine = Annotated[
    Literal["local", "ray"],
    _say("who embeds the gallery: this process, or a Ray cluster (RAY_ADDRESS, or a local one)"),
]
MaxRejected = Annotated[
    float, Field(ge=0, le=1), _say("stop before training when a larger share of images is unusable")
]

# Models
Teacher = Annotated[str, Field(min_length=1), _say("foundation model: an alias such as dinov2-s, or any timm name")]
TeacherWeights = Annotated[str, Field(min_length=1), _say("pretrained (installed package or hub), scratch, or a file")]
OtherWeights = Annotated[str | None, Field(min_length=1), _say("the teacher's weights; default: those of the run")]
TeacherSize = Annotated[int | str | None, BeforeValidator(_size), _say("pixels, or HxW; default: the model's own size")]
TeacherWindow = Annotated[
    int | str | None,
    BeforeValidator(_size),
    _say("masks: pixels, or HxW, that the teacher sees at once, window by window; default: --teacher-size"),
]
Student = Annotated[str, Field(min_length=1), _say("model to ship: an alias such as mobilenetv4-s, or any timm name")]
StudentWeights = Annotated[str, Field(min_length=1), _say("pretrained, scratch, or a file")]
Decoder = Annotated[
    Literal["lraspp", "fpn", "deeplabv3plus"], _say("with --task segmentation: what stands on the student's encoder")
]
StudentSize = Annotated[int | str | None, BeforeValidator(_size), _say("pixels, or HxW; default: the model's own size")]
Adapt = Annotated[Literal["probe", "probe-then-full", "full", "auto"], _say("how the teacher learns the task")]
ClassWeight = Annotated[
    Literal["none", "balanced"],
    _say("weight of the classes in the losses: balanced counts rare ones more, for balanced accuracy"),
]

# Views and targets
ViewSeed = Annotated[
    int, Field(ge=0, lt=2**63), _say("seed of the views that students see; other than --seed it is shared by all runs")
]
Flip = Annotated[Literal["none", "horizontal", "both"], _say("mirror views: never for text, both for aerial images")]
CropArea = Annotated[
    float, Field(gt=0, le=1), _say("smallest share of the image that a view shows; default for masks: 0.35")
]
CacheLimit = Annotated[
    float,
    Field(ge=0),
    _say("GiB of teacher outputs; above it less is kept (logits, coarser grids), or the teacher runs online"),
]

# Training
Objective = Annotated[
    Literal["oriented", "agnostic", "pseudo-label", "dino"],
    _say("distillation objective: class probabilities, the teacher's features, or how rivals do it"),
]
AgnosticLoss = Annotated[Literal["contrastive", "queue", "cosine"], _say("how agnostic compares features")]
AgnosticFeatures = Annotated[
    Literal["patches", "global"],
    _say("with --task segmentation: whether agnostic compares features of places, or of whole images"),
]
Seed = Annotated[int, Field(ge=0, lt=2**63), _say("seed of draws, initialisation and order")]
Epochs = Annotated[
    int | None,
    Field(ge=1),
    _say("passes over the transfer set; default: 400,000 images in all, of masks 8,000, but 4 to 100 passes"),
]
Steps = Annotated[int | None, Field(ge=1), _say("optimizer steps, instead of --epochs")]
BatchSize = Annotated[int, Field(ge=2), _say("images per step, over all processes; default for masks: 8")]
LearningRate = Annotated[
    float | None, Field(gt=0, le=1),
    _say("at batch 128, scaled by the root of batch / 128; default: 0.008 from random weights, else 0.002; masks: 0.02, 0.005"),
]  # fmt: skip
FeatureWeight = Annotated[
    float,
    Field(ge=0),
    _say("weight of matching the teacher's pooled features beside the targets; 0: none"),
]
Temperature = Annotated[float, Field(gt=0, le=100), _say("softens targets and student in the distillation")]
Committee = Annotated[
    Literal["auto", "none", "only"],
    _say("the targets: of teacher and labels-only students, weighed by held-out labels; none: teacher alone; only: those students alone"),
]  # fmt: skip
Sharpness = Annotated[
    float | None, Field(gt=0, le=100),
    _say("multiplies the targets' log probabilities, 1: as calibrated; default: 1 to 2, until they are sure of 0.8 on the mean"),
]  # fmt: skip
LabelShare = Annotated[
    float | None, Field(ge=0, lt=1),
    _say("share of a batch that is labelled images with their labels; default: 4 x labelled / transfer set, at most 3/8"),
]  # fmt: skip
Finetune = Annotated[
    Literal["auto", "keep", "head", "full"], _say("last stage on the labels; auto: what is best on --val, else keep")
]
Pilot = Annotated[
    bool,
    _say("without --val: runs without each fold of the labels judge the baseline; 10 to 15 times as long", negative=()),
]
NoBaseline = Annotated[bool, _say("do not train the baseline, the same student on the labels only", negative=())]

# Studies
Arms = Annotated[
    list[str],
    Field(min_length=1),
    _say(
        "arms, with commas or spaces between: scratch imagenet clip dino agnostic oriented pseudo-label "
        "teacher-only self-training paper baseline-plus; NAME:LABEL is a variant with settings of its own",
        consume_multiple=True, negative=(),
    ),
]  # fmt: skip
Budgets = Annotated[
    list[str],
    Field(min_length=1),
    _say("labels per class, or masks in all, one or several", consume_multiple=True, negative=()),
]
Seeds = Annotated[
    list[str],
    Field(min_length=1),
    _say("seeds of draws and training, one or several", consume_multiple=True, negative=()),
]
Set = Annotated[
    list[str],
    _say("settings of one arm, as ARM.SETTING=VALUE: agnostic.lr=3e-3", consume_multiple=True, negative=()),
]
Match = Annotated[
    Literal["images", "flops"],
    _say("what every arm may spend in training: images seen, or FLOPs, the teacher's counted"),
]
Results = Annotated[
    str | None, _say("folder of finished runs' results, which count as done; default: results/ in --out")
]
DryRun = Annotated[bool, _say("print the plan with estimated time and disk, and stop", negative=())]
StudyOut = Annotated[str, Field(min_length=1), _say("folder of the study; its runs are ARM/budget-N/seed-N in it")]

# Deployment
Formats = Annotated[
    list[str],
    Field(min_length=1),
    _say("files beside model.onnx: torchscript, executorch, coreml", consume_multiple=True, negative=()),
]
Bake = Annotated[bool, _say("normalisation and softmax inside the graph: pixels in, probabilities out", negative=())]
NoInt8 = Annotated[bool, _say("no eight-bit model", negative=())]
Int8Loss = Annotated[float, Field(gt=0, le=1), _say("accuracy that int8 may lose; layers stay float until it holds")]
Calibration = Annotated[int, Field(ge=1), _say("images of the transfer set that give the ranges of int8")]
Tolerance = Annotated[
    float, Field(gt=0, le=1), _say("largest difference to the student, as a share of its largest output")
]
Export = Annotated[str, Field(min_length=1), _say("folder that `tutelage export` has written, or its run")]
ImagePaths = Annotated[
    list[str], Field(min_length=1), _say("images, or folders of images", consume_multiple=True, negative=())
]
PredictionsOut = Annotated[str, Field(min_length=1), _say("predictions: .csv, or .parquet")]
Top = Annotated[int, Field(ge=1), _say("how many classes of each image, the likeliest first")]
Which = Annotated[Literal["auto", "float", "int8"], _say("which model; auto: the one that the export recommends")]
Threads = Annotated[int | None, Field(ge=1), _say("threads of onnxruntime; default: all cores")]
PageOut = Annotated[str, Field(min_length=1), _say("folder for the page, index.html")]
Serve = Annotated[bool, _say("serve the page to this computer until Ctrl-C", negative=())]
Port = Annotated[int, Field(ge=0, le=65535), _say("with --serve: where; 0 takes any port that is free")]

# Machine and run
Out = Annotated[str, Field(min_length=1), _say("run folder")]
Cache = Annotated[
    str | None, _say("decoded images and teacher outputs, shared by runs; default: cache/ beside the run")
]
Device = Annotated[Literal["auto", "cpu", "cuda", "mps"], _say("where to compute")]
Precision = Annotated[Literal["auto", "fp32", "bf16", "fp16"], _say("auto: bf16 where the GPU has it, else fp32")]
Tracker = Annotated[Literal["none", "tensorboard", "wandb", "mlflow"], _say("experiment tracker beside metrics.jsonl")]
Prune = Annotated[float | None, Field(ge=0), _say("remove what has not been used for so many days")]
Overwrite = Annotated[bool, _say("move a finished run with other settings aside", negative=())]
Preset = Annotated[
    Literal["none", "paper"],
    _say("settings to start from, which flags beat; paper: KL to the adapted teacher alone, then --finetune full"),
]
Smoke = Annotated[bool, _say("the real command, cut down to a minute on a CPU", negative=())]
Json = Annotated[bool, _say("print one JSON object for machines", negative=())]
Config = Annotated[str | None, _say("TOML file with any of these settings; flags beat it")]


def command(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command its checked settings.

    The wrapped function takes keyword arguments only. `config`, when among them, names a TOML file whose values
    stand in for arguments that were not given.

    Raises:
        TutelageError: unknown, missing or impossible settings, all of them in one message.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(**given: Any) -> Any:
        return function(**resolve(function, given))

    checked.__signature__ = signature  # type: ignore[attr-defined]
    return checked


def resolve(function: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    """Settings of one call: explicit over file over default, each within its range.

    Args:
        function: whose signature names the settings.
        given: explicit arguments; the task's and a preset's stand in for what neither they nor a file give.

    Returns:
        A value for every parameter of `function`.
    """
    parameters = inspect.signature(function).parameters
    errors = [_unknown(name, parameters, "argument") for name in given if name not in parameters]
    values = {name: value for name, value in given.items() if name in parameters}
    if "config" in parameters and values.get("config"):
        from_file, faults = _read_toml(Path(values["config"]), parameters)
        errors += faults
        if faults and not from_file:
            raise_all(errors)
        values = {**from_file, **values}
    values = {**{name: value for name, value in presets.of(values).items() if name in parameters}, **values}
    checked, faults = _validate(function, values)
    errors += faults
    raise_all(errors)
    return checked


def flag(name: str) -> str:
    """`teacher_size` -> `--teacher-size`."""
    return "--" + name.replace("_", "-")


def _unknown(name: str, parameters: Any, kind: str) -> TutelageError:
    hint = did_you_mean(name, parameters) or f"use one of {', '.join(parameters)}"
    return TutelageError(f"{kind} {name!r} is unknown", hint)


def _read_toml(path: Path, parameters: Any) -> tuple[dict[str, Any], list[TutelageError]]:
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*.toml")] if path.parent.is_dir() else [])
        return {}, [TutelageError(f"--config {path} does not exist", near or "name a TOML file of settings")]
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        return {}, [TutelageError(f"--config {path}: {error}", "name a TOML file of settings, such as budget = 10")]
    values = {name.replace("-", "_"): value for name, value in raw.items()}
    errors = [_unknown(name, parameters, f"{path}: setting") for name in values if name not in parameters]
    return {name: value for name, value in values.items() if name in parameters}, errors


def _validate(function: Callable[..., Any], values: dict[str, Any]) -> tuple[dict[str, Any], list[TutelageError]]:
    hints = typing.get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters
    for name, value in values.items():  # a list may be given as any sequence or as its only item, a path as a Path
        if isinstance(value, (tuple, list)):
            values[name] = [str(item) for item in value]
        elif isinstance(value, bool) or not isinstance(value, (str, Path, int, float)):
            continue
        elif _takes_list(hints[name]):
            values[name] = [str(value)] if value != "" else []
        elif isinstance(value, Path) or _takes_text(hints[name]):
            values[name] = str(value)
    checked: dict[str, Any] = {}
    errors: list[TutelageError] = []
    for name, parameter in parameters.items():
        value = values.get(name, parameter.default)
        if isinstance(value, bool) and not isinstance(parameter.default, bool):  # else true would count as 1
            hint = f"give a value: {_help(hints[name])}"
            errors.append(TutelageError(f"{flag(name)} {value} must not be a boolean", hint))
            continue
        try:
            checked[name] = TypeAdapter(hints[name]).validate_python(value)
        except ValidationError as error:
            errors.append(_fault(name, value, error.errors()[0], hints[name]))
    return checked, errors


def _takes_text(hint: Any) -> bool:
    base = _base(hint)
    return base is str or (isinstance(base, types.UnionType) and str in typing.get_args(base))


def _takes_list(hint: Any) -> bool:
    return _base(hint) == list[str]


def _base(hint: Any) -> Any:
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def _fault(name: str, value: Any, fault: Any, hint: Any) -> TutelageError:
    if value in ("", [], ()):
        message = f"no {flag(name)} was given ({_help(hint)})"
        return TutelageError(message, f"add {flag(name)} to the command or the TOML file")
    said = fault["msg"].partition(", unable to")[0]
    message = re.sub(r": (Input should be|Value error,) ", " must be ", f"{flag(name)} {value}: {said}", count=1)
    choices = typing.get_args(typing.get_args(hint)[0]) if fault["type"] == "literal_error" else ()
    return TutelageError(message, did_you_mean(str(value), [str(c) for c in choices]))


def _help(hint: Any) -> str:
    """The help text of a setting."""
    return str(next(note for note in typing.get_args(hint) if isinstance(note, Parameter)).help)
