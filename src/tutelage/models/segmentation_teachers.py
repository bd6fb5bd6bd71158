"""The adapted segmentation teacher: an encoder with features at several levels and a head, whose logits on a grid are cached."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file

from tutelage.files import hash_of, intact
from tutelage.image_size import sides
from tutelage.json_object import JSON
from tutelage.models.adapted_teacher import (
    AdaptedTeacher,
    FeatureExtractor,
    extractor,
    fine_tuned_encoder,
    same_encoder,
    without_classes,
)
from tutelage.models.segmentation_grids import DenseNetwork, Pyramid, Windows, check_windows, levels_of, regrid
from tutelage.models.segmentation_heads import DenseHead, new_head
from tutelage.models.teachers import FrozenEncoder
from tutelage.models.weights import parameters_of, weights_hash

if TYPE_CHECKING:
    from accelerate import Accelerator


def pyramid_of(encoder: FrozenEncoder, copy: torch.nn.Module | None = None) -> Pyramid:
    """Return the encoder's module, or this copy of it, as a module that gives its features at each level."""
    module = encoder.module if copy is None else copy
    levels = levels_of(module, encoder.name, encoder.at_once)
    if encoder.window is None:
        return Pyramid(module, levels)
    check_windows(module, levels, encoder.window, encoder.size)
    return Windows(module, levels, sides(encoder.window))


def multiple_of(encoder: FrozenEncoder) -> int:
    """Return the number of pixels to whose multiples inputs are padded; 1 for a ViT, whose size is a multiple of its patch."""
    return 1 if "patch" in encoder.name else 32


def network_of(encoder: FrozenEncoder, accelerator: Accelerator) -> FeatureExtractor:
    """Return the frozen encoder as a network that gives the features of all levels, flattened to one row per image."""
    encoder.module.eval().to(accelerator.device)
    pyramid = pyramid_of(encoder).eval()
    with torch.no_grad():
        levels = pyramid(torch.zeros(1, 3, *sides(encoder.size), device=accelerator.device))
    layout = tuple((one.shape[1], one.shape[2], one.shape[3]) for one in levels)

    def rows(images: torch.Tensor) -> torch.Tensor:
        return torch.cat([one.flatten(1) for one in pyramid(images)], dim=1)

    width = sum(c * h * w for c, h, w in layout)
    digest = _digest(encoder, encoder.hash, "levels")
    return extractor(encoder, accelerator, rows, width, digest, "features", levels=layout)


def _digest(encoder: FrozenEncoder, *parts: str) -> str:
    """Hash everything that the outputs depend on, including the window; the input size is recorded elsewhere."""
    return hash_of([*parts, *([f"window {encoder.window}"] if encoder.window else [])])


def whole_teacher(
    encoder: FrozenEncoder, module: torch.nn.Module, classes: int, head: DenseHead | None
) -> DenseNetwork:
    """Return a teacher to fine-tune, with a fitted head or, if `head` is None, a new one. module: a copy of the encoder's."""
    pyramid = pyramid_of(encoder, module)
    layout = tuple((level.channels, 0, 0) for level in pyramid.levels)
    network = DenseNetwork(pyramid, new_head(layout, classes), multiple_of(encoder))
    if head is not None:
        network.head.load_state_dict(head.module.state_dict())
        network.temperature.fill_(head.temperature)
    return network


def load_adapted(
    folder: Path,
    result: JSON,
    weights: str,
    accelerator: Accelerator,
    grid: tuple[int, int],
    kept: tuple[int, int] | None = None,
) -> AdaptedTeacher:
    """Load the adapted teacher of a run, to give logits on a grid.

    Args:
        folder, result, weights, accelerator: as for `adapted_teacher.load_adapted`.
        grid: rows and columns of the logits. kept: rows and columns of the cached logits, if coarser; None = the same.
    """
    about, classes, probe = result["teacher"], result["classes"], result["mode"] == "probe"
    encoder = same_encoder(folder, about, weights) if probe else fine_tuned_encoder(about)
    module = whole_teacher(encoder, encoder.module, classes, None)
    state = load_file(intact(folder / ("head.safetensors" if probe else "weights.safetensors")))
    if probe:
        digest = _digest(encoder, encoder.hash, weights_hash(state))
        module.temperature.copy_(state.pop("temperature"))
        module.head.load_state_dict(state)
    else:
        digest = _digest(encoder, weights_hash(state)) if encoder.window else weights_hash(state)
        module.load_state_dict(state)
    module.requires_grad_(False).eval().to(accelerator.device)
    kept = kept or grid
    shape = (classes, *kept)

    def forward(images: torch.Tensor) -> torch.Tensor:
        return module.on_grid(images, kept).flatten(1)

    def head(outputs: np.ndarray) -> np.ndarray:
        return regrid(torch.from_numpy(outputs.reshape(len(outputs), *shape)), grid).numpy()

    network = extractor(encoder, accelerator, forward, classes * kept[0] * kept[1], digest, "logits", shape=shape)
    return AdaptedTeacher(network, head, module, parameters_of(module))


def frozen(folder: Path, result: JSON, weights: str, accelerator: Accelerator, grid: tuple[int, int]) -> AdaptedTeacher:
    """Load the unadapted encoder of a run's teacher, to give the features of its deepest level on a grid."""
    encoder = same_encoder(folder, result["teacher"], weights)
    module = whole_teacher(encoder, encoder.module, 1, None).requires_grad_(False).eval().to(accelerator.device)
    shape = (module.pyramid.levels[-1].channels, *grid)

    def forward(images: torch.Tensor) -> torch.Tensor:
        return module.features(images, grid).flatten(1)

    digest = _digest(encoder, encoder.hash, "deepest level")
    network = extractor(encoder, accelerator, forward, shape[0] * grid[0] * grid[1], digest, "features", shape=shape)
    return AdaptedTeacher(network, without_classes, module, parameters_of(encoder.module))
