"""Supervised training, shared by the full fine-tuning of the teacher, the labels-only students and the last stage.

Each pass over the images uses new views (view number = pass). Batches and views are functions of the step, so
training may stop after any step and resume from a checkpoint with the same result.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.optimizer import ParamsT

from tutelage.data.manifest import Labelled
from tutelage.features.view_batches import ViewSettings, plain_labels, view_input, view_truth
from tutelage.image_size import sides
from tutelage.models.students import Student
from tutelage.models.teachers import FrozenEncoder
from tutelage.training import batches, checkpoints, cross_entropy, loop, optimization


@dataclass(frozen=True)
class Plan(loop.Plan):
    """How to train on labels.

    backbone: whether more than the head is trained; if not, the network stays in evaluation mode (BatchNorm frozen).
    statistics: whether BatchNorm normalises by each batch's mean and variance and updates its own; if not, it uses its own unchanged.
    class_weight: of the loss, "none" or "balanced". views: of the images.
    """

    classes: int = 0
    class_weight: str = "none"
    backbone: bool = True
    statistics: bool = True
    views: ViewSettings = field(kw_only=True)


def train_on_labels(
    module: nn.Module,
    network: FrozenEncoder | Student,
    labelled: Labelled,
    plan: Plan,
    hardware: Accelerator,
    watch: loop.Watch,
    *,
    groups: ParamsT | None = None,
    resumable: checkpoints.Resumable | None = None,
) -> nn.Module:
    """Train a network on labelled images.

    Args:
        module: (B, 3, H, W) -> (B, C) logits, or (B, C, H, W) for masks; changed in place.
        network: size, mean and std of its input.
        groups: parameter groups with their own "lr" and "lr_scale", or None for AdamW on all trainable parameters.

    Returns:
        the module, with the averaged weights, in evaluation mode.

    Raises:
        TutelageError: the loss is NaN or infinite.
    """
    optimizer = torch.optim.AdamW(groups, lr=plan.rate) if groups else None
    optimizer = optimizer or optimization.optimizer_for(module, plan.rate, hardware.device)
    optimizer = hardware.prepare_optimizer(optimizer)  # with fp16 it unscales gradients and skips steps that overflowed
    average, order = optimization.EMA(module), batches.seed_of(plan.seed, "order")
    images, labels = labelled.images, labelled.labels
    weights = cross_entropy.class_weights(torch.from_numpy(plain_labels(labels)), plan.classes, plan.class_weight)
    weights = None if weights is None else weights.to(hardware.device)

    def make(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        positions, epochs = batches.batch_of(step, plan.batch_size, len(labels), order)
        truth = view_truth(images, labels, positions, epochs, plan.views, sides(network.size))
        return view_input(images, positions, epochs, plan.views, network), truth

    def loss_of(step: int, inputs: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        with hardware.autocast():
            logits = module(inputs)
        return cross_entropy.soft_cross_entropy(logits, cross_entropy.one_hot(truth, plan.classes), weights)

    module.train(plan.backbone)
    if not plan.statistics:
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.eval()
    loop.train(loop.TrainState(module, optimizer, average, resumable), plan, make, loss_of, hardware, watch)
    module.load_state_dict(average.state)
    return module.eval()


def epochs_to_steps(epochs: float, images: int, batch_size: int) -> int:
    """Return the optimizer steps that `epochs` passes over the images take; at least 1."""
    return max(1, round(epochs * images / batch_size))
