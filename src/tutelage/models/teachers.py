"""Teachers: a vision foundation model as a frozen encoder, and its learning rates per layer for fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from tutelage.errors import TutelageError, did_you_mean, shown
from tutelage.image_size import Size, sides
from tutelage.models.aliases import STUDENTS, TEACHERS, check_size, full_name
from tutelage.models.weights import TimmModel, WeightSource, create, first_line, timm_entry, weights_hash
from tutelage.progress import logger
from tutelage.settings.shared_flags import Group


@dataclass(frozen=True)
class FrozenEncoder:
    """A frozen encoder with the data needed to run and identify it.

    module: (B, 3, S, S) float32, normalised with mean and std -> (B, D) float32 pooled features; in eval mode.
    name: timm's. size: S in pixels. mean, std: per channel, for images in [0, 1]. features: D.
    licence: of the weights. weights: where they come from, for the log. hash: SHA-256 of the weights, hex. window: input size of the
    module, if it is smaller than `size` and runs window by window.
    """

    module: nn.Module
    name: str
    size: Size
    mean: tuple[float, ...]
    std: tuple[float, ...]
    features: int
    licence: str
    weights: str
    hash: str
    window: Size | None = None

    @property
    def at_once(self) -> Size:
        """The input size of the module: the window, if there is one."""
        return self.window or self.size


def resolve(name: str, kind: str = "teacher") -> str:
    """Return timm's name for an alias, or a name of timm's unchanged, with or without a tag.

    Args:
        name: "dinov2-s", "vit_small_patch14_dinov2" or "vit_small_patch14_dinov2.lvd142m".
        kind: "teacher" or "student": whose aliases are searched first, and the flag in the message.

    Raises:
        TutelageError: unknown name; the hint gives the most similar ones.
    """
    if full := full_name(name, kind):
        return full
    import timm
    from timm.models import get_arch_pretrained_cfgs

    own, other = (STUDENTS, TEACHERS) if kind == "student" else (TEACHERS, STUDENTS)
    arch, _, tag = name.partition(".")
    if not timm.is_model(arch) or ":" in name:
        known = timm.list_models()
        near = did_you_mean(arch, [*own, *other, *known], "")
        hint = f"use a short name ({shown(own, 30)}) or one of timm's {len(known)} names"
        hint = f"{near} Otherwise {hint}" if near else f"{hint}, which timm.list_models('*vit*') searches"
        raise TutelageError(f"--{kind} {name}: no such model", hint)
    tags = [full.partition(".")[2] for full in get_arch_pretrained_cfgs(arch)]
    if tag and tag not in tags:
        hint = did_you_mean(name, [f"{arch}.{t}" for t in tags], f"use {arch}, without a tag, to get the usual weights")
        raise TutelageError(f"--{kind} {name}: no weights with that tag ({arch} has {shown(tags) or 'none'})", hint)
    return as_trained(name)


def as_trained(name: str) -> str:
    """Return the architecture that a model's weights were trained with: timm builds some CLIP weights with GELU under their first name,
    though they were trained with QuickGELU and have a name that says so. `name`: timm's."""
    import timm

    other = name.replace("_clip_", "_clip_quickgelu_")
    trained = any("QuickGELU" in note for note in timm_entry(name).notes or ())
    return other if trained and "quickgelu" not in name and timm.is_model(other) else name


def default_size(name: str) -> int:
    """Return the input side in pixels that a model was trained at, without building it. `name`: alias or timm's."""
    return int(timm_entry(resolve(name)).input_size[-1])


def size_of(settings: Group, kind: str) -> Size:
    """Return the input size of the model that settings name, its own if they give none. kind: "teacher" or "student"."""
    return getattr(settings, f"{kind}_size") or default_size(resolve(getattr(settings, kind), kind))


def input_statistics(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of a timm model's input, for images in [0, 1]."""
    entry = timm_entry(name)
    return entry.mean, entry.std


def unusual_size(name: str, size: Size) -> bool:
    """Return whether an architecture of fixed input size, other than a ViT, is to be used at another size. `name`: timm's."""
    entry = timm_entry(name)
    return bool(entry.fixed_input_size and size != entry.input_size[-1] and "patch" not in name)


def build(
    name: str, weights: str, classes: int, size: Size, kind: str, output_stride: int | None = None
) -> tuple[nn.Module, WeightSource]:
    """Build a model by `weights.create` after checking its size; failures of the architecture become TutelageErrors.

    Args: as there; `size` is required.

    Raises:
        TutelageError: the architecture does not accept the size, or the weights are unavailable or do not fit.
    """
    check_size(name, size, kind)
    unusual = unusual_size(name, size)
    try:
        module, source = create(name, weights, classes, size, kind, output_stride)
        if unusual:  # some architectures fail only in the forward pass
            with torch.no_grad():
                module.eval()(torch.zeros(1, 3, *sides(size)))
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        hint = f"use {timm_entry(name).input_size[-1]} px" if unusual else ""
        raise TutelageError(f"--{kind} {name} cannot be built at {size} px: {first_line(error)}", hint) from error
    return module, source


def build_teacher(
    name: str, weights: str = "pretrained", size: Size | None = None, window: Size | None = None
) -> FrozenEncoder:
    """Build a frozen encoder in eval mode.

    Args:
        name: alias or any name of timm's.
        weights: "pretrained", "scratch" (random, but the same at every call, because a teacher's outputs are cached) or
            the path of a file.
        size: of the input; None for the model's own. window: input size of the module, if smaller than `size`.

    Raises:
        TutelageError: unknown name, a size that the model does not accept, or weights that are unavailable or do not fit.
    """
    given, name = name, resolve(name)
    if "quickgelu" in name and "quickgelu" not in given:
        say_once(f"--teacher {given} was trained with QuickGELU: it is built as {name}")
    size = default_size(name) if size is None else size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module, source = build(name, weights, 0, window or size, "teacher")
    module.eval().requires_grad_(False)
    features = int(getattr(module, "head_hidden_size", None) or getattr(module, "num_features"))  # noqa: B009
    digest = weights_hash(module.state_dict())
    return FrozenEncoder(
        module, name, size, *input_statistics(name), features, source.licence, source.text, digest, window
    )


@lru_cache
def say_once(text: str) -> None:
    """Log a line, once in a process."""
    logger.info(text)


def decayed_parameter_groups(
    module: TimmModel, lr: float, weight_decay: float, layer_decay: float
) -> list[dict[str, object]]:
    """Return optimizer groups whose learning rate shrinks by `layer_decay` per layer from the output to the input side.

    Only parameters that require a gradient are included: call `module.requires_grad_(True)` on a frozen encoder first.
    Biases, norms and parameters that the model exempts (position embeddings) get no weight decay. timm's layer-wise
    decay; Bao et al., BEiT, ICLR 2022.

    Returns:
        Groups with `params`, `lr` (lr x lr_scale), `lr_scale` in (0, 1] and `weight_decay`.
    """
    from timm.optim import param_groups_layer_decay  # pyright: ignore[reportPrivateImportUsage]

    exempt = module.no_weight_decay() if hasattr(module, "no_weight_decay") else set()
    groups = param_groups_layer_decay(module, weight_decay, exempt, layer_decay=layer_decay)
    return [{**group, "lr": lr * group["lr_scale"]} for group in groups]
