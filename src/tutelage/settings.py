"""Settings: their names, ranges and help texts; the signature of a command defines its configuration.

Every setting is an annotated type below. A command takes those it needs as keyword arguments, so the same name is the
flag (`--teacher-size`), the key in a TOML file (`teacher-size` or `teacher_size`) and the argument in Python
(`teacher_size`). `command` checks a call: explicit arguments override `config`, which overrides the defaults; all faults
are reported at once, before data or weights are loaded.
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
    """Return a size in its canonical form: a number if height and width are equal, else text HEIGHTxWIDTH."""
    if value is None:
        return None
    both = sides(str(value)) if re.fullmatch(r"\d{1,5}(x\d{1,5})?", str(value)) else (0, 0)
    if min(both) < 16 or max(both) > 2048:
        raise ValueError("16 to 2048 pixels, such as 224, or HEIGHTxWIDTH, such as 256x320")
    return both[0] if both[0] == both[1] else f"{both[0]}x{both[1]}"


# Data
Task = Annotated[Literal["classification", "segmentation"], _say("type of the labels: one class per image, or masks")]
Target = Annotated[
    str, Field(min_length=1), _say("labelled images: a folder, a CSV or Parquet list, or Parquet shards")
]
NewTarget = Annotated[str | None, _say("other labelled images to evaluate the models on")]
Paths = Annotated[
    list[str],
    Field(min_length=1),
    _say("unlabelled images: folders, tar or Parquet shards; several at once", consume_multiple=True, negative=()),
]
Val = Annotated[str | None, _say("validation images: a path like --target, or a share of train such as 0.1")]
Test = Annotated[str | None, _say("test images: a path like --target, or a share of train such as 0.2")]
Classes = Annotated[str | None, _say("use only these classes: names separated by commas")]
Budget = Annotated[
    int | None, Field(ge=1), _say("number of labels per class to use, or of masks in total; default: all")
]
GroupBy = Annotated[str | None, _say("regular expression on image names; images with the same match stay in one split")]
Resize = Annotated[Literal["squash", "crop", "pad"], _say("how images are made square")]
Strategy = Annotated[
    Literal["auto", "all", "random", "best", "balanced", "diverse", "hard", "text"],
    _say("how gallery images are chosen; auto: balanced if --total or --per-query is given, else all"),
]
Total = Annotated[int | None, Field(ge=1), _say("size of the transfer set, labelled images included")]
PerQuery = Annotated[int | None, Field(ge=1), _say("gallery images per query, instead of --total")]
Balance = Annotated[
    Literal["query", "class"], _say("what takes turns in choosing images: each labelled image, or each class")
]
Dedup = Annotated[
    Literal["candidates", "gallery", "none"],
    _say(
        "where copies of validation and test images, and near duplicates, are searched and removed: among the chosen images (with "
        "--strategy all: only the copies), or in the whole gallery; none: only identical images are removed"
    ),
]
Index = Annotated[
    Literal["auto", "exact", "ivf"],
    _say(
        "exact search, or an inverted file, its recall measured; auto: exact up to 5 million images or if memory is short"
    ),
]
Memory = Annotated[float | None, Field(gt=0), _say("GiB of memory for the search; default: half of the free memory")]
Embeddings = Annotated[
    list[str],
    _say(
        "precomputed embeddings of the gallery, by image name: Parquet, .npy with names, or a clip-retrieval folder",
        consume_multiple=True, negative=(),
    ),
]  # fmt: skip
TextEmbeddings = Annotated[
    str | None,
    Field(min_length=1),
    _say("with --strategy text: embeddings of the class names, from the model of --embeddings"),
]
Clip = Annotated[str, Field(min_length=1), _say("with --strategy text: CLIP model, an alias or an open_clip name")]
ClipWeights = Annotated[str, Field(min_length=1), _say("weights of --clip: pretrained (hub), scratch, or a file")]
Templates = Annotated[
    list[str],
    _say("with --strategy text: sentences with {} for the class name", consume_multiple=True, negative=()),
]
Shard = Annotated[
    str | None,
    _say("embed only part i of n of the gallery: i/n, i from 0; env: from RANK and WORLD_SIZE (torchrun, job arrays)"),
]
Engine = Annotated[
    Literal["local", "ray"],
    _say("where the gallery is embedded: in this process, or on a Ray cluster (RAY_ADDRESS, or a local one)"),
]
MaxRejected = Annotated[float, Field(ge=0, le=1), _say("stop before training if a larger share of images is unusable")]

# Models
Teacher = Annotated[str, Field(min_length=1), _say("foundation model: an alias such as dinov2-s, or any timm name")]
TeacherWeights = Annotated[str, Field(min_length=1), _say("pretrained (installed package or hub), scratch, or a file")]
OtherWeights = Annotated[str | None, Field(min_length=1), _say("the teacher's weights; default: those of the run")]
TeacherSize = Annotated[int | str | None, BeforeValidator(_size), _say("input pixels or HxW; default: the model's own")]
TeacherWindow = Annotated[
    int | str | None,
    BeforeValidator(_size),
    _say("segmentation: pixels, or HxW, of the windows that the teacher runs on; default: --teacher-size, one window"),
]
Student = Annotated[str, Field(min_length=1), _say("model to train: an alias such as mobilenetv4-s, or any timm name")]
StudentWeights = Annotated[str, Field(min_length=1), _say("pretrained, scratch, or a file")]
Decoder = Annotated[Literal["lraspp", "fpn", "deeplabv3plus"], _say("with --task segmentation: the student's decoder")]
StudentSize = Annotated[int | str | None, BeforeValidator(_size), _say("input pixels or HxW; default: the model's own")]
Adapt = Annotated[Literal["probe", "probe-then-full", "full", "auto"], _say("how the teacher is adapted to the task")]
ClassWeight = Annotated[
    Literal["none", "balanced"],
    _say("class weights in the losses; balanced: rare classes count more, for a better balanced accuracy"),
]

# Views and targets
ViewSeed = Annotated[
    int, Field(ge=0, lt=2**63), _say("seed of the students' augmentations; unlike --seed, it is shared by all runs")
]
Flip = Annotated[Literal["none", "horizontal", "both"], _say("mirrored views; text needs none, aerial images both")]
CropArea = Annotated[
    float, Field(gt=0, le=1), _say("smallest share of the image that a view shows; default for segmentation: 0.35")
]
CacheLimit = Annotated[
    float,
    Field(ge=0),
    _say("GiB of cached teacher outputs; above it, logits or coarser grids are cached, or the teacher runs online"),
]

# Training
Objective = Annotated[
    Literal["oriented", "agnostic", "pseudo-label", "dino"],
    _say("distillation objective: match class probabilities (oriented), features (agnostic), or a rival method"),
]
AgnosticLoss = Annotated[Literal["contrastive", "queue", "cosine"], _say("how --objective agnostic compares features")]
AgnosticFeatures = Annotated[
    Literal["patches", "global"],
    _say("with --task segmentation: whether --objective agnostic compares features of patches or of whole images"),
]
Seed = Annotated[int, Field(ge=0, lt=2**63), _say("seed of random draws, initialisation and image order")]
Epochs = Annotated[
    int | None,
    Field(ge=1),
    _say("passes over the transfer set; default: 400,000 images in total (segmentation: 8,000), in 4 to 100 passes"),
]
Steps = Annotated[int | None, Field(ge=1), _say("optimizer steps, instead of --epochs")]
BatchSize = Annotated[int, Field(ge=2), _say("images per step, over all processes; default for segmentation: 8")]
LearningRate = Annotated[
    float | None, Field(gt=0, le=1),
    _say("learning rate at batch 128, scaled by sqrt(batch / 128); default: 0.008 from random weights, else 0.002; masks: 0.02, 0.005"),
]  # fmt: skip
FeatureWeight = Annotated[
    float,
    Field(ge=0),
    _say("weight of the loss on the teacher's pooled features, added to the loss on the targets; 0: off"),
]
Temperature = Annotated[float, Field(gt=0, le=100), _say("softens targets and student outputs in the distillation")]
Committee = Annotated[
    Literal["auto", "none", "only"],
    _say("auto: targets from teacher and labels-only students, weighted on held-out labels; none: teacher only; only: students only"),
]  # fmt: skip
Sharpness = Annotated[
    float | None, Field(gt=0, le=100),
    _say("factor on the targets' log probabilities, 1: as calibrated; default: 1 to 2, closest to a mean confidence of 0.8"),
]  # fmt: skip
LabelShare = Annotated[
    float | None, Field(ge=0, lt=1),
    _say("share of each batch that is labelled images with their labels; default: 4 x labelled / transfer set, at most 3/8"),
]  # fmt: skip
Finetune = Annotated[
    Literal["auto", "keep", "head", "full"], _say("last stage, on the labels; auto: the best on --val, else keep")
]
Pilot = Annotated[
    bool,
    _say("without --val: compare with the baseline by one run per label fold; 10 to 15 times as long", negative=()),
]
NoBaseline = Annotated[bool, _say("do not train the baseline, the same student on the labels only", negative=())]

# Studies
Arms = Annotated[
    list[str],
    Field(min_length=1),
    _say(
        "arms, separated by commas or spaces: scratch imagenet clip dino agnostic oriented pseudo-label "
        "teacher-only self-training paper baseline-plus; NAME:LABEL is a variant with its own settings",
        consume_multiple=True, negative=(),
    ),
]  # fmt: skip
Budgets = Annotated[
    list[str],
    Field(min_length=1),
    _say("labels per class, or masks in total; one or several values", consume_multiple=True, negative=()),
]
Seeds = Annotated[
    list[str],
    Field(min_length=1),
    _say("seeds of random draws and training; one or several", consume_multiple=True, negative=()),
]
Set = Annotated[
    list[str],
    _say("settings of one arm, as ARM.SETTING=VALUE: agnostic.lr=3e-3", consume_multiple=True, negative=()),
]
Match = Annotated[
    Literal["images", "flops"],
    _say("training budget that is equal for all arms: images seen, or FLOPs, the teacher's included"),
]
Results = Annotated[str | None, _say("folder with results of finished runs, not repeated; default: results/ in --out")]
DryRun = Annotated[bool, _say("print the plan with estimated time and disk, and stop", negative=())]
StudyOut = Annotated[str, Field(min_length=1), _say("folder of the study, with its runs in ARM/budget-N/seed-N")]

# Deployment
Formats = Annotated[
    list[str],
    Field(min_length=1),
    _say("formats to export besides model.onnx: torchscript, executorch, coreml", consume_multiple=True, negative=()),
]
Bake = Annotated[bool, _say("put normalisation and softmax into the graph: pixels in, probabilities out", negative=())]
NoInt8 = Annotated[bool, _say("do not make an int8 model", negative=())]
Int8Loss = Annotated[float, Field(gt=0, le=1), _say("largest accuracy loss of int8; layers stay float until it is met")]
Calibration = Annotated[int, Field(ge=1), _say("images of the transfer set to calibrate int8 with")]
Tolerance = Annotated[
    float, Field(gt=0, le=1), _say("largest difference from the student, as a share of its largest output")
]
Export = Annotated[str, Field(min_length=1), _say("folder written by `tutelage export`, or its run")]
ImagePaths = Annotated[
    list[str], Field(min_length=1), _say("images, or folders of images", consume_multiple=True, negative=())
]
PredictionsOut = Annotated[str, Field(min_length=1), _say("file for the predictions: .csv or .parquet")]
Top = Annotated[int, Field(ge=1), _say("number of classes per image, the most likely first")]
Which = Annotated[Literal["auto", "float", "int8"], _say("model to use; auto: the one that the export recommends")]
Threads = Annotated[int | None, Field(ge=1), _say("threads of onnxruntime; default: all cores")]
PageOut = Annotated[str, Field(min_length=1), _say("folder for the page, index.html")]
Serve = Annotated[bool, _say("serve the page on this computer until Ctrl-C", negative=())]
Port = Annotated[int, Field(ge=0, le=65535), _say("port for --serve; 0: any free port")]

# Machine and run
Out = Annotated[str, Field(min_length=1), _say("run folder")]
Cache = Annotated[
    str | None, _say("folder of decoded images and teacher outputs, shared by runs; default: cache/ beside the run")
]
Device = Annotated[Literal["auto", "cpu", "cuda", "mps"], _say("device to compute on")]
Precision = Annotated[Literal["auto", "fp32", "bf16", "fp16"], _say("auto: bf16 if the GPU supports it, else fp32")]
Tracker = Annotated[Literal["none", "tensorboard", "wandb", "mlflow"], _say("experiment tracker besides metrics.jsonl")]
Prune = Annotated[float | None, Field(ge=0), _say("remove entries not used for this many days")]
Overwrite = Annotated[bool, _say("move aside a finished run that has other settings", negative=())]
Preset = Annotated[
    Literal["none", "paper"],
    _say("defaults to start from, which flags override; paper: KL to the adapted teacher only, then --finetune full"),
]
Smoke = Annotated[bool, _say("run the real command, reduced to a minute on a CPU", negative=())]
Json = Annotated[bool, _say("print one JSON object for other programs", negative=())]
Config = Annotated[str | None, _say("TOML file with any of these settings; flags override it")]


def command(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a command so that its settings are checked before it runs.

    The wrapped function takes keyword arguments only. If `config` is among them, it names a TOML file with values for
    arguments that were not given.

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
    """Return the checked settings of one call: explicit arguments over the file over defaults.

    Args:
        function: its signature names the settings.
        given: explicit arguments; values of the task and of --preset are used for what neither they nor the file give.

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
    """Return the flag of a setting: `teacher_size` -> `--teacher-size`."""
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
    for name, value in values.items():  # accept any sequence or a single item for a list, and a Path for text
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
        if isinstance(value, bool) and not isinstance(parameter.default, bool):  # otherwise true would count as 1
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
    """Return the help text of a setting."""
    return str(next(note for note in typing.get_args(hint) if isinstance(note, Parameter)).help)
