"""Students: the small models to ship."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tutelage.errors import TutelageError
from tutelage.models.teachers import build, default_size, input_statistics, resolve, undecayed


@dataclass(frozen=True)
class Student:
    """A small model and what it needs to be trained and shipped.

    module: (B, 3, S, S) float32, normalised with mean and std -> (B, C) float32 logits; in train mode.
    name: timm's. size: S in pixels. mean, std: per channel, for images in [0, 1]. parameters: count. classes: C.
    initialisation: "scratch", or where the weights come from. channels_last: whether to train in that memory format.
    """

    module: nn.Module
    name: str
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    parameters: int
    classes: int
    initialisation: str
    channels_last: bool

    def about(self) -> dict[str, Any]:
        """What result.json says of the student: enough to build it again."""
        names = ("name", "size", "mean", "std", "parameters", "initialisation", "channels_last")
        return {name: getattr(self, name) for name in names}


def build_student(name: str, classes: int, weights: str = "scratch", size: int | None = None) -> Student:
    """A student with a head of `classes` classes, always newly initialised.

    Seeding is the caller's business: `torch.manual_seed(seed)` right before this call fixes the random weights.

    Args:
        name: alias or any name of timm's.
        classes: C, at least 1.
        weights: "scratch", "pretrained" or the path of a file.
        size: input side in pixels; None for the model's own.

    Raises:
        TutelageError: unknown name, size that the model cannot take, or weights that cannot be had or do not fit.
    """
    name = resolve(name, "student")
    if classes < 1:
        raise TutelageError(f"{classes} classes for the student {name}", "one class or more")
    size = default_size(name) if size is None else size
    module, source = build(name, weights, classes, size, "student")
    module.train()
    mean, std = input_statistics(name)
    count = sum(p.numel() for p in module.parameters())
    return Student(module, name, size, mean, std, count, classes, source.text, channels_last(module))


class Taught(nn.Module):
    """A student with a projection of its pooled features to the teacher's; for the transfer only.

    forward: (B, 3, S, S) -> (B, C) logits and (B, D) projected features. The student's own logits are the same.
    """

    def __init__(self, student: nn.Module, width: int, size: int):
        super().__init__()
        self.student = student
        with torch.no_grad():
            features = self._features(torch.zeros(2, 3, size, size))
        self.projection = nn.Linear(features.shape[1], width)

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        return self.student.forward_head(self.student.forward_features(images), pre_logits=True)  # pyright: ignore[reportCallIssue]

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self._features(images)
        return self.student.get_classifier()(features), self.projection(features)  # pyright: ignore[reportCallIssue]

    @staticmethod
    def possible(student: nn.Module, size: int) -> bool:
        """Whether the student's head is one layer on pooled features, as in most of timm (not: several heads)."""
        was, images = student.training, torch.linspace(0, 1, 6 * size * size).reshape(2, 3, size, size)
        student.eval()
        try:
            with torch.no_grad():
                features = student.forward_head(student.forward_features(images), pre_logits=True)  # pyright: ignore[reportCallIssue]
                again = student.get_classifier()(features)  # pyright: ignore[reportCallIssue]
                return features.ndim == 2 and torch.allclose(again, student(images), atol=1e-5)
        except (AttributeError, TypeError, RuntimeError):
            return False
        finally:
            student.train(was)


def channels_last(module: nn.Module) -> bool:
    """Whether to train a model in the channels_last memory format.

    It pays for most CNNs (one step on 2 cores, 16 images at 96 px: tf_efficientnet_lite0 370 ms instead of 554,
    mobilenetv4_hybrid_medium 647 instead of 1065). The exceptions:

    - a strided 1x1 convolution that reads the image itself: its backward pass on CPU writes out of bounds and kills the
      process (torch 2.14.1). Found in the stems of FastViT, MobileCLIP, MobileOne and RepVGG;
    - MobileViT v2 is slower for it (534 ms instead of 406);
    - transformers: but for the patch embedding they have no convolution.
    """
    convolutions = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    crashes = any(c.in_channels <= 4 and c.kernel_size == (1, 1) and c.stride != (1, 1) for c in convolutions)
    slower = str(getattr(module, "pretrained_cfg", {}).get("architecture", "")).startswith("mobilevit")
    return len(convolutions) > 1 and not crashes and not slower


def feature_width(module: nn.Module) -> int:
    """D: the width of the pooled features that the head reads."""
    return int(getattr(module, "head_hidden_size", None) or getattr(module, "num_features"))  # noqa: B009


def head_of(module: nn.Module) -> nn.Module:
    """The classifier of a timm model; a ModuleList where it has several (LeViT, EfficientFormer)."""
    head = module.get_classifier()  # pyright: ignore[reportCallIssue]
    return nn.ModuleList(head) if isinstance(head, (tuple, list)) else head


def split_parameters(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups: no weight decay on norms, biases and what the model exempts; `weight_decay` on the rest."""
    from timm.optim import param_groups_weight_decay  # pyright: ignore[reportPrivateImportUsage]

    return param_groups_weight_decay(module, weight_decay, no_weight_decay_list=undecayed(module))
