"""Task heads on a teacher's dense features: linear on the patch tokens of a ViT, a small decoder on the levels of a CNN.

Both are fitted on features of the whole labelled images, which are computed once; their number of steps is chosen on
held-out masks. The functions have the same names as those in models/linear_probe.py, which are for classification.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from tutelage.files import atomic_write
from tutelage.training import batches, cross_entropy, loop, optimization

STRENGTHS = (100, 300)  # numbers of steps to choose from: 300 is better on 20 street scenes, 100 on 5
UNVALIDATED_STRENGTH, UNVALIDATED_TEMPERATURE = 100, 1.0  # if no label can be held out
WIDTH = 64  # channels of the decoder
BATCH = 8
RATE = 4e-3  # peak learning rate of AdamW

Layout = tuple[tuple[int, int, int], ...]  # (channels, h, w) of each level


class LinearMask(nn.Module):
    """BatchNorm and a 1x1 convolution on one level: [(B, D, h, w)] -> (B, C, h, w)."""

    def __init__(self, channels: Sequence[int], classes: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels[-1])
        self.classify = nn.Conv2d(channels[-1], classes, 1)

    def forward(self, levels: list[torch.Tensor]) -> torch.Tensor:
        return self.classify(self.norm(levels[-1]))


class PyramidMask(nn.Module):
    """1x1 convolutions on all levels, summed on the finest grid, then two more layers: [(B, D, h, w), ...] -> (B, C, h, w)."""

    def __init__(self, channels: Sequence[int], classes: int):
        super().__init__()
        self.lateral = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(one), nn.Conv2d(one, WIDTH, 1, bias=False)) for one in channels
        )
        self.mix = nn.Sequential(
            nn.BatchNorm2d(WIDTH),
            nn.ReLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH, bias=False),
            nn.Conv2d(WIDTH, WIDTH, 1, bias=False),
            nn.BatchNorm2d(WIDTH),
            nn.ReLU(),
        )
        self.classify = nn.Conv2d(WIDTH, classes, 1)

    def forward(self, levels: list[torch.Tensor]) -> torch.Tensor:
        total = self.lateral[0](levels[0])
        for one, level in zip(self.lateral[1:], levels[1:], strict=True):
            total = total + F.interpolate(one(level), total.shape[-2:], mode="bilinear", align_corners=False)
        return self.classify(self.mix(total))


def new_head(layout: Layout, classes: int) -> nn.Module:
    """Return a new head for these levels: linear for one level, a decoder for several."""
    channels = [one[0] for one in layout]
    return (LinearMask if len(layout) == 1 else PyramidMask)(channels, classes)


@dataclass(frozen=True)
class DenseHead:
    """A fitted head. module: levels -> (B, C, h, w) logits. layout: shapes of the levels in a row of features."""

    module: nn.Module
    layout: Layout
    temperature: float = 1.0

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """(B, D) features, all levels in a row -> (B, C, h, w) float32 logits on the finest level's grid."""
        rows = torch.from_numpy(features)
        self.module.eval()
        with torch.inference_mode():
            parts = [self.module(unfolded(part, self.layout)) / self.temperature for part in rows.split(BATCH)]
        return torch.cat(parts).numpy()

    def calibrated(self, temperature: float) -> DenseHead:
        """Return the head with its logits divided by a temperature."""
        return DenseHead(self.module, self.layout, temperature)

    def save(self, folder: Path) -> None:
        """Write the head, its temperature included, to folder/head.safetensors."""
        state = {**self.module.state_dict(), "temperature": torch.tensor(float(self.temperature))}
        with atomic_write(folder / "head.safetensors") as path:
            save_file({name: value.contiguous() for name, value in state.items()}, path)


def unfolded(rows: torch.Tensor, layout: Layout) -> list[torch.Tensor]:
    """Split (B, D) rows of features into their levels, each (B, c, h, w)."""
    parts = rows.split([c * h * w for c, h, w in layout], dim=1)
    return [part.reshape(len(rows), *shape) for part, shape in zip(parts, layout, strict=True)]


def fit_probe(
    features: np.ndarray, labels: np.ndarray, classes: int, strength: float, scale: Layout, class_weight: str = "none"
) -> DenseHead:
    """Train a head on features.

    Args:
        features: (B, D) float32, all levels in a row. labels: (B, h, w) int64 on the finest level's grid, IGNORE for no class.
        strength: number of steps. scale: shapes of the levels.
    """
    steps = int(strength)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = new_head(scale, classes)
        truth, optimizer = torch.from_numpy(labels), optimization.optimizer_for(head, RATE, "cpu")
        weights = cross_entropy.class_weights(truth[truth < classes], classes, class_weight)
        size = max(2, min(BATCH, len(features)))
        head.train()
        for step in range(steps):
            positions, epochs = batches.batch_of(step, size, len(features), 0)
            turned = torch.from_numpy(epochs % 2 == 1)  # every other pass mirrored
            levels = unfolded(torch.from_numpy(features[positions]), scale)
            levels = [torch.where(turned[:, None, None, None], one.flip(3), one) for one in levels]
            masks = torch.where(turned[:, None, None], truth[positions].flip(2), truth[positions])
            for group in optimizer.param_groups:
                group["lr"] = optimization.learning_rate(step, steps, RATE)
            loss = cross_entropy.soft_cross_entropy(head(levels), cross_entropy.one_hot(masks, classes), weights)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(head.parameters(), loop.CLIP)
            optimizer.step()
    return DenseHead(head.eval(), scale)
