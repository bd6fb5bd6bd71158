"""The adapted teacher: an encoder and its task head, as one network whose outputs can be cached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file
from torch import nn

from tutelage.errors import TutelageError
from tutelage.files import intact
from tutelage.image_size import Size
from tutelage.json_object import JSON
from tutelage.models.linear_probe import LinearHead
from tutelage.models.teachers import FrozenEncoder, build_teacher
from tutelage.models.transductive_head import CosineHead
from tutelage.models.weights import parameters_of, weights_hash

if TYPE_CHECKING:
    from accelerate import Accelerator

HEADS = {"probe": LinearHead, "transductive": CosineHead}  # mode -> head on the frozen encoder's features
MOST = 6e4  # logits are clamped to this, which fits in float16; softmax is 0 or 1 long before


@dataclass(frozen=True)
class FeatureExtractor:
    """A frozen network whose outputs are computed once and cached.

    forward: (B, 3, S, S) float32, normalised, on `device` -> (B, D) float. size: S in pixels. mean, std: of the input.
    width: D. hash: of the weights. precision: of the forward pass, as accelerate names it.
    output: "features" (a head turns them into logits) or "logits". shape: of one output before it was flattened to a row of D
    numbers, (channels, h, w); () for pooled outputs. levels: those shapes of features at several levels, finest first.
    """

    forward: Callable[[torch.Tensor], torch.Tensor]
    size: Size
    mean: tuple[float, ...]
    std: tuple[float, ...]
    width: int
    hash: str
    output: str
    name: str
    device: str = "cpu"
    precision: str = "no"
    shape: tuple[int, ...] = ()
    levels: tuple[tuple[int, int, int], ...] = ()


def half_precision(outputs: np.ndarray, name: str) -> np.ndarray:
    """Return a network's outputs as (n, D) float16, the type in which they are cached.

    Args:
        outputs: (n, D) float32. name: of the network, for the message.

    Raises:
        TutelageError: an output is NaN, infinite or too large for float16.
    """
    with np.errstate(over="ignore"):
        halves = outputs.astype(np.float16)
    bad = ~np.isfinite(halves).all(axis=1)
    if bad.any():
        raise TutelageError(
            f"the teacher, {name}, gives outputs that are NaN, infinite or beyond 65,504 for {bad.sum()} of {len(halves)} images",
            "use --precision fp32, or another teacher",
        )
    return halves


@dataclass(frozen=True)
class AdaptedTeacher:
    """network: gives the outputs that are cached. head: (B, D) float32 outputs of the network -> (B, C) float32 logits."""

    network: FeatureExtractor
    head: Callable[[np.ndarray], np.ndarray]
    module: nn.Module
    parameters: int


class FineTunedTeacher(nn.Module):
    """Backbone and linear head in one module; logits are divided by a calibrated temperature."""

    def __init__(self, backbone: nn.Module, features: int, classes: int):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(features, classes)
        self.register_buffer("temperature", torch.ones(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) float32 -> (B, C) logits."""
        return self.head(self.backbone(images)) / self.temperature


def whole_teacher(backbone: nn.Module, features: int, classes: int, head: LinearHead | None) -> FineTunedTeacher:
    """Return a teacher to fine-tune, whose head is a fitted probe or, if `head` is None, normal with standard deviation 0.02."""
    module = FineTunedTeacher(backbone, features, classes)
    if head is None:
        nn.init.trunc_normal_(module.head.weight, std=0.02)
        nn.init.zeros_(module.head.bias)
    else:
        module.head.load_state_dict({"weight": torch.from_numpy(head.weight), "bias": torch.from_numpy(head.bias)})
    return module


def network_of(encoder: FrozenEncoder, accelerator: Accelerator) -> FeatureExtractor:
    """Return the frozen encoder as a network whose outputs are pooled features."""
    module = encoder.module.eval().to(accelerator.device)
    return extractor(encoder, accelerator, module, encoder.features, encoder.hash, "features")


def extractor(
    encoder: FrozenEncoder,
    accelerator: Accelerator,
    forward: Callable[[torch.Tensor], torch.Tensor],
    width: int,
    digest: str,
    output: str,
    shape: tuple[int, ...] = (),
    levels: tuple[tuple[int, int, int], ...] = (),
) -> FeatureExtractor:
    """Return a network with the input of the encoder. Arguments as for `FeatureExtractor`."""

    def outputs(images: torch.Tensor) -> torch.Tensor:
        with accelerator.autocast():
            found = forward(images)
        return found.clamp(-MOST, MOST) if output == "logits" else found

    seen, how = (encoder.size, encoder.mean, encoder.std), (str(accelerator.device), accelerator.mixed_precision)
    return FeatureExtractor(outputs, *seen, width, digest, output, encoder.name, *how, shape, levels)


def load_adapted(folder: Path, result: JSON, weights: str, accelerator: Accelerator) -> AdaptedTeacher:
    """Load the adapted teacher of a run.

    Args:
        folder: adapt/ of the run. result: its result.json. weights: --teacher-weights of the run.
    """
    about = result["teacher"]
    if kind := HEADS.get(result["mode"]):
        encoder = same_encoder(folder, about, weights)
        head = kind(**load_arrays(intact(folder / "head.safetensors")))
        size = parameters_of(encoder.module) + sum(one.size for one in vars(head).values())
        return AdaptedTeacher(network_of(encoder, accelerator), head, encoder.module, size)
    encoder = fine_tuned_encoder(about)
    state = load_file(intact(folder / "weights.safetensors"))
    module = FineTunedTeacher(encoder.module, encoder.features, result["classes"])
    module.load_state_dict(state)
    module.eval().to(accelerator.device)
    network = extractor(encoder, accelerator, module, result["classes"], weights_hash(state), "logits")
    return AdaptedTeacher(network, lambda logits: logits, module, parameters_of(module))


def with_logits(teacher: AdaptedTeacher) -> AdaptedTeacher:
    """Return the same teacher with its head inside the network, so that logits are cached, which take less space than features."""
    network, head = teacher.network, teacher.head
    assert isinstance(head, LinearHead)
    arrays = {name: torch.from_numpy(one).to(network.device) for name, one in vars(head).items()}

    def forward(images: torch.Tensor) -> torch.Tensor:
        features = network.forward(images).float()
        if isinstance(head, CosineHead):
            features = nn.functional.normalize((features - arrays["mean"]) / arrays["std"], eps=1e-6)
        return features @ arrays["weight"].T + arrays["bias"]

    digest = weights_hash(arrays)
    inside = replace(
        network, forward=forward, width=len(head.bias), hash=f"{network.hash[:32]}{digest[:32]}", output="logits"
    )
    return replace(teacher, network=inside, head=lambda logits: logits)


def frozen(folder: Path, result: JSON, weights: str, accelerator: Accelerator) -> AdaptedTeacher:
    """Load the unadapted encoder of a run's teacher; its head returns (B, 0), no classes. Arguments as for `load_adapted`."""
    encoder = same_encoder(folder, result["teacher"], weights)
    size = parameters_of(encoder.module)
    return AdaptedTeacher(network_of(encoder, accelerator), without_classes, encoder.module, size)


def without_classes(features: np.ndarray) -> np.ndarray:
    """(B, D) features -> (B, 0) float32: the logits of a frozen teacher."""
    return np.zeros((len(features), 0), np.float32)


def fine_tuned_encoder(about: JSON) -> FrozenEncoder:
    """Build the encoder of a fine-tuned teacher, whose weights are still to be loaded. about: its entry in result.json."""
    encoder = build_teacher(about["name"], "scratch", about["size"], about.get("window"))
    return replace(encoder, mean=tuple(about["mean"]), std=tuple(about["std"]))


def same_encoder(folder: Path, about: JSON, weights: str) -> FrozenEncoder:
    """Build the encoder that a run's teacher in `folder` was adapted with. Raises TutelageError: the weights are others."""
    encoder = build_teacher(about["name"], weights, about["size"], about.get("window"))
    if encoder.hash != about["hash"]:
        message = f"--teacher-weights {weights} are not the weights that the teacher in {folder} was adapted with"
        raise TutelageError(message, "use the weights that were given to `adapt`, or another --out")
    return encoder
