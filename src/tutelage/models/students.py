"""Students: the small models that are trained for deployment."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from tutelage.image_size import Size, sides
from tutelage.json_object import JSON
from tutelage.models.teachers import build, default_size, input_statistics, resolve
from tutelage.models.weights import TimmModel, parameters_of


@dataclass(frozen=True)
class Student:
    """A small model with the data needed to train and export it.

    module: (B, 3, S, S) float32, normalised with mean and std -> (B, C) float32 logits; in train mode.
    name: timm's. size: S in pixels. mean, std: per channel, for images in [0, 1]. parameters: count. classes: C.
    initialisation: "scratch", or where the weights come from. channels_last: whether to train in that memory format.
    decoder: its name, for segmentation; "" for a classifier.
    """

    module: nn.Module
    name: str
    size: Size
    mean: tuple[float, ...]
    std: tuple[float, ...]
    parameters: int
    classes: int
    initialisation: str
    channels_last: bool
    decoder: str = ""

    def about(self) -> JSON:
        """Return the student's entry in result.json, from which it can be built again."""
        names = ("name", "size", "mean", "std", "parameters", "initialisation", "channels_last")
        return {name: getattr(self, name) for name in (*names, *(("decoder",) if self.decoder else ()))}


def build_student(name: str, classes: int, weights: str = "scratch", size: Size | None = None) -> Student:
    """Build a student with a newly initialised head of `classes` classes.

    The caller sets the seed: `torch.manual_seed(seed)` right before this call makes the random weights reproducible.

    Args:
        name: alias or any name of timm's.
        classes: C, at least 1.
        weights: "scratch", "pretrained" or the path of a file.
        size: of the input; None for the model's own.

    Raises:
        TutelageError: unknown name, a size that the model does not accept, or weights that are unavailable or do not fit.
    """
    name = resolve(name, "student")
    size = default_size(name) if size is None else size
    module, source = build(name, weights, classes, size, "student")
    more = (parameters_of(module), classes, source.text, channels_last(module))
    return Student(module.train(), name, size, *input_statistics(name), *more)


class StudentWithProjector(nn.Module):
    """A student with a projection of its features that is discarded after the distillation.

    forward: (B, 3, S, S) -> (B, C) logits of the student and (B, D) projected features.
    """

    def __init__(self, student: TimmModel, width: int, size: Size):
        super().__init__()
        self.student = student
        self.projection = nn.Linear(pooled_width(student, size), width)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = pooled(self.student, images)
        return self.student.get_classifier()(features), self.projection(features)

    @staticmethod
    def possible(student: TimmModel, size: Size) -> bool:
        """Return whether the student has a single head on pooled features, as most timm models do."""
        module, (height, width) = copy.deepcopy(student).eval(), sides(size)
        images = torch.linspace(0, 1, 6 * height * width).reshape(2, 3, height, width)
        try:
            with torch.no_grad():
                features = pooled(module, images)
                again = module.get_classifier()(features)
                return features.ndim == 2 and torch.allclose(again, module(images), atol=1e-5)
        except (AttributeError, TypeError, RuntimeError):
            return False


class DINOStudent(nn.Module):
    """A student with DINO's head: (B, 3, S, S) -> (B, K) outputs, to be compared with those of another crop.

    Two hidden layers with GELU, a bottleneck at unit length, and K prototypes at unit length (Caron et al., ICCV 2021). If the student
    has BatchNorm, so has the head: features of an untrained CNN are nearly the same for all images, and without BatchNorm every image
    had the same prototype after 13 steps (loss 0.002, a probe on the features at chance). `centre` (1, K) is the running mean of the
    averaged network's outputs.
    """

    HIDDEN, BOTTLENECK, PROTOTYPES = 512, 128, 1024

    def __init__(self, student: TimmModel, size: Size):
        super().__init__()
        self.student = student
        student.get_classifier().requires_grad_(False)  # unused
        normed = any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in student.modules())
        layers: list[nn.Module] = []
        for width in (pooled_width(student, size), self.HIDDEN):
            layers += [nn.Linear(width, self.HIDDEN), *([nn.BatchNorm1d(self.HIDDEN)] if normed else []), nn.GELU()]
        self.head = nn.Sequential(*layers, nn.Linear(self.HIDDEN, self.BOTTLENECK))
        self.prototypes = nn.Parameter(torch.empty(self.PROTOTYPES, self.BOTTLENECK))
        self.register_buffer("centre", torch.zeros(1, self.PROTOTYPES))
        for layer in self.head:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        nn.init.trunc_normal_(self.prototypes, std=0.02)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        bottleneck = nn.functional.normalize(self.head(pooled(self.student, images)), dim=1)
        return bottleneck @ nn.functional.normalize(self.prototypes, dim=1).T


def pooled(student: TimmModel, images: torch.Tensor) -> torch.Tensor:
    """(B, 3, S, S) -> (B, D): the pooled features that the student's classifier takes."""
    return student.forward_head(student.forward_features(images), pre_logits=True)


def pooled_width(student: TimmModel, size: Size) -> int:
    """Return D of `pooled`, measured by one forward pass of a copy, so that the student and its BatchNorm are unchanged."""
    images = torch.zeros(1, 3, *sides(size), device=next(student.parameters()).device)
    with torch.no_grad():
        return pooled(copy.deepcopy(student).eval(), images).shape[1]


def channels_last(module: TimmModel) -> bool:
    """Return whether to train a model in the channels_last memory format.

    It speeds up most CNNs (one step on 2 cores, 16 images at 96 px: tf_efficientnet_lite0 370 ms instead of 554,
    mobilenetv4_hybrid_medium 647 instead of 1065). The exceptions:

    - models with a strided 1x1 convolution on the image itself: its backward pass on CPU writes out of bounds and kills
      the process (torch 2.14.1). The stems of FastViT, MobileCLIP, MobileOne and RepVGG have one;
    - MobileViT v2, which gets slower (534 ms instead of 406);
    - transformers, whose only convolution is the patch embedding.
    """
    convolutions = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    crashes = any(c.in_channels <= 4 and c.kernel_size == (1, 1) and c.stride != (1, 1) for c in convolutions)
    slower = str(getattr(module, "pretrained_cfg", {}).get("architecture", "")).startswith("mobilevit")
    return len(convolutions) > 1 and not crashes and not slower


def plain_head(module: TimmModel, size: Size) -> bool:
    """Return whether the student's head is one linear layer on pooled features, which can be fitted, copied and mixed."""
    return StudentWithProjector.possible(module, size) and isinstance(module.get_classifier(), nn.Linear)


def head_of(module: TimmModel) -> nn.Module:
    """Return a student's classifier or decoder; a ModuleList if it has several classifiers (LeViT, EfficientFormer)."""
    head = module.get_classifier()
    return nn.ModuleList(head) if isinstance(head, (tuple, list)) else head
