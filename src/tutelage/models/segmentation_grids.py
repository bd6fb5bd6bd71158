"""Code shared by all dense networks: the levels of an encoder, and resampling between grids.

Every timm encoder with `forward_intermediates` works. A ViT gives one level, its patch tokens without class and register
tokens; a CNN gives one level per stride. All grids cover the same image: a point of the image is at the same fraction
of height and width in every grid.
"""

from __future__ import annotations

import inspect
import itertools
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from tutelage.errors import TutelageError, shown
from tutelage.image_size import Size, sides
from tutelage.models.weights import TimmModel, first_line

FINEST = 4  # smallest stride used; finer features cost the most and carry the least information


@dataclass(frozen=True)
class Level:
    """Features of an encoder at one stride. index: for `forward_intermediates`. stride: pixels of the image per grid cell."""

    index: int
    channels: int
    stride: int


def levels_of(module: TimmModel, name: str, size: Size, kind: str = "teacher") -> list[Level]:
    """Return the level of the deepest features at each stride >= FINEST, finest first, determined by one forward pass.

    Args:
        module: a timm model; its train or eval mode is kept. name: timm's. size: of its input.

    Raises:
        TutelageError: the model gives no features of intermediate layers, or cannot take its size.
    """
    was, device = module.training, next(module.parameters()).device
    height, width = (-(-side // 32) * 32 if "patch" not in name else side for side in sides(size))
    module.eval()
    try:
        with torch.no_grad():
            every = module.forward_intermediates(
                torch.zeros(1, 3, height, width, device=device), intermediates_only=True
            )
    except (AttributeError, TypeError, NotImplementedError) as error:
        message = f"--{kind} {name} gives no features of intermediate layers"
        raise TutelageError(message, "use a timm model with forward_intermediates, which nearly all have") from error
    except (RuntimeError, ValueError, AssertionError) as error:
        message = f"--{kind} {name} cannot be used at {size} pixels: {first_line(error)}"
        raise TutelageError(message, f"use another --{kind}-size, or another --{kind}") from error
    finally:
        module.train(was)
    found = {}
    for index, one in enumerate(every):
        stride = round(height / one.shape[2])
        if stride >= FINEST:
            found[stride] = Level(index, one.shape[1], stride)
    return [found[stride] for stride in sorted(found)]


class Pyramid(nn.Module):
    """An encoder that gives its features at each level: (B, 3, H, W) -> one (B, C, h, w) per level, finest first."""

    def __init__(self, encoder: TimmModel, levels: list[Level], prune: bool = False):
        super().__init__()
        self.encoder, self.levels = encoder, levels
        self._indices = [level.index for level in levels]
        if prune:  # removes layers that no level needs, and the classifier
            encoder.prune_intermediate_layers(self._indices, prune_norm=False, prune_head=True)
        known = inspect.signature(encoder.forward_intermediates).parameters
        self._options = {"norm": True} if "norm" in known and len(levels) == 1 else {}

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        more = {"indices": self._indices, "intermediates_only": True, **self._options}
        return self.encoder.forward_intermediates(images, **more)


class Windows(Pyramid):
    """A pyramid over windows that overlap by half or more, for inputs larger than the encoder was built for.

    Features of overlapping windows are averaged. Windows begin at multiples of the largest stride, so that their cells coincide at
    every level; sides of inputs and windows must be multiples of it, which `check_windows` verifies.
    """

    def __init__(self, encoder: TimmModel, levels: list[Level], window: tuple[int, int]):
        super().__init__(encoder, levels)
        self.window, self.unit = window, levels[-1].stride

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        places = [window_starts(*both, self.unit) for both in zip(images.shape[-2:], self.window, strict=True)]
        if [len(one) for one in places] == [1, 1]:
            return super().forward(images)
        sums: list[torch.Tensor] = []
        counts: list[torch.Tensor] = []
        high, wide = self.window
        for top, left in itertools.product(*places):
            found = super().forward(images[..., top : top + high, left : left + wide])
            if not sums:
                whole = [tuple(side // level.stride for side in images.shape[-2:]) for level in self.levels]
                sums = [one.new_zeros(*one.shape[:2], *grid) for one, grid in zip(found, whole, strict=True)]
                counts = [one.new_zeros(grid) for one, grid in zip(found, whole, strict=True)]
            for level, one, total, count in zip(self.levels, found, sums, counts, strict=True):
                rows, columns = (
                    slice(start // level.stride, start // level.stride + size)
                    for start, size in zip((top, left), one.shape[-2:], strict=True)
                )
                total[..., rows, columns] += one
                count[rows, columns] += 1
        return [total / count for total, count in zip(sums, counts, strict=True)]


def check_windows(encoder: TimmModel, levels: list[Level], window: Size, size: Size) -> None:
    """Check that window and input are whole numbers of cells of the encoder's deepest level.

    The stride that timm states counts too: encoders pad their inputs, so at stride 64 a window of 96 px gives two rows, from which the
    stride would be measured as 48.

    Raises:
        TutelageError: a side is not a multiple of the deepest stride.
    """
    stated = getattr(encoder, "feature_info", None) or []
    unit = max([levels[-1].stride, *(one.get("reduction", 1) for one in stated)])
    if not any(side % unit for side in (*sides(window), *sides(size))):
        return
    fits = ["x".join(str(max(1, (side + unit // 2) // unit) * unit) for side in sides(one)) for one in (window, size)]
    raise TutelageError(
        f"--teacher-window {window} with --teacher-size {size} must be multiples of {unit} px, the teacher's deepest stride",
        f"use --teacher-window {fits[0]} --teacher-size {fits[1]}, the nearest that fit",
    )


def window_starts(side: int, window: int, unit: int) -> list[int]:
    """Return where windows begin along a side: at multiples of `unit`, from 0 to side - window, at most half a window apart.

    window_starts(512, 256, 32) == [0, 128, 256]

    Args:
        side, window: pixels, multiples of unit; if the window is as long as the side or longer, the result is [0].
    """
    if window >= side:
        return [0]
    half = max(window // 2 // unit, 1) * unit
    count = math.ceil((side - window) / half)
    return [round((side - window) * i / count / unit) * unit for i in range(count + 1)]


def regrid(values: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Resample (B, C, h, w) to another grid over the same image: by means if it is coarser, bilinearly if it is finer."""
    if values.shape[-2:] == grid:
        return values
    if values.shape[-2] >= grid[0] and values.shape[-1] >= grid[1]:
        return F.adaptive_avg_pool2d(values, grid)
    return F.interpolate(values, grid, mode="bilinear", align_corners=False)


def padded(images: torch.Tensor, multiple: int) -> torch.Tensor:
    """Pad (B, 3, H, W) with grey at the bottom and right until both sides are multiples of `multiple`."""
    height, width = images.shape[-2:]
    low, right = -height % multiple, -width % multiple
    return F.pad(images, (0, right, 0, low)) if low or right else images


class DenseNetwork(nn.Module):
    """A pyramid encoder and a head: (B, 3, H, W) -> (B, C, H, W) logits, divided by a calibrated temperature.

    Inputs are padded internally to multiples of `multiple` pixels; outputs for the padding are cut off.
    """

    def __init__(self, pyramid: Pyramid, head: nn.Module, multiple: int):
        super().__init__()
        self.pyramid, self.head, self.multiple = pyramid, head, multiple
        self.temperature: torch.Tensor
        self.register_buffer("temperature", torch.ones(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[-2:]
        inside = padded(images, self.multiple)
        logits = self.head(self.pyramid(inside)) / self.temperature
        logits = F.interpolate(logits, inside.shape[-2:], mode="bilinear", align_corners=False)
        return logits[..., :height, :width]

    def get_classifier(self) -> nn.Module:
        """Return the head, as timm's models do."""
        return self.head

    def on_grid(self, images: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """(B, 3, H, W) -> (B, C, *grid) logits."""
        inside = padded(images, self.multiple)
        return self._inside(self.head(self.pyramid(inside)) / self.temperature, inside, images, grid)

    def features(self, images: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """(B, 3, H, W) -> (B, D, *grid) features of the deepest level."""
        inside = padded(images, self.multiple)
        return self._inside(self.pyramid(inside)[-1], inside, images, grid)

    def with_features(
        self, images: torch.Tensor, grid: tuple[int, int], deepest: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, H, W) -> (B, C, *grid) logits and (B, D, *deepest) features of the deepest level, from one pass."""
        inside = padded(images, self.multiple)
        levels = self.pyramid(inside)
        logits = self.head(levels) / self.temperature
        return self._inside(logits, inside, images, grid), self._inside(levels[-1], inside, images, deepest)

    def _inside(
        self, values: torch.Tensor, inside: torch.Tensor, images: torch.Tensor, grid: tuple[int, int]
    ) -> torch.Tensor:
        """Resample values that cover the padded images to a grid that covers only the images."""
        height, width = images.shape[-2:]
        if inside.shape != images.shape:
            values = F.interpolate(values, inside.shape[-2:], mode="bilinear", align_corners=False)
            values = values[..., :height, :width]
        return regrid(values, grid)


def grid_of(size: Size, stride: int) -> tuple[int, int]:
    """Return rows and columns of the grid of a stride over an input."""
    height, width = sides(size)
    return -(-height // stride), -(-width // stride)


def needed_level(levels: list[Level], stride: int, name: str, decoder: str) -> Level:
    """Return the level with this stride.

    Raises:
        TutelageError: the encoder has no such level.
    """
    for level in levels:
        if level.stride == stride:
            return level
    have = shown(str(level.stride) for level in levels)
    raise TutelageError(
        f"--decoder {decoder} on --student {name}: the encoder has no features at stride {stride} (only at {have})",
        "use a --student with features at strides 4, 8, 16 and 32, as CNNs have, such as mobilenetv3_small_100",
    )
