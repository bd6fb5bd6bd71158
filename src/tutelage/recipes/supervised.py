"""The loop on labels: full fine-tuning of the teacher, the student alone, and the last stage share it.

Each pass over the images sees new views (view number = pass). Batches and views are functions of the step, so
the loop may stop after any step and go on from a checkpoint with the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from tutelage import losses, training
from tutelage.compute import to_device
from tutelage.data.masks import Masks
from tutelage.data.store import Images
from tutelage.sizes import sides
from tutelage.targets import ViewSettings, view_input, view_truth


@dataclass(frozen=True)
class Plan:
    """How to train on labels.

    steps: optimizer steps. batch_size: images per step. rate: peak learning rate (already scaled).
    backbone: whether more than the head is trained; without, the network stays in evaluation mode (its BatchNorm rests).
    statistics: whether BatchNorm takes each batch's mean and spread and learns them; without, it uses those it has.
    """

    steps: int
    batch_size: int
    rate: float
    seed: int
    classes: int
    backbone: bool = True
    statistics: bool = True


@dataclass(frozen=True)
class Resumable:
    """Where a loop keeps its checkpoints. every: steps between two of them."""

    folder: Any
    stage: str
    inputs: str
    every: int


def train_on_labels(
    module: nn.Module,
    network: Any,
    images: Images,
    labels: np.ndarray | Masks,
    plan: Plan,
    views: ViewSettings,
    *,
    groups: list[dict[str, Any]] | None = None,
    class_weights: torch.Tensor | None = None,
    accelerator: Any,
    resumable: Resumable | None = None,
    advance: Callable[[int], None] = lambda n: None,
    log: Callable[[dict[str, Any]], None] = lambda row: None,
    what: str = "training on labels",
) -> dict[str, torch.Tensor]:
    """Train a network on labelled images.

    Args:
        module: (B, 3, H, W) -> (B, C) logits, or (B, C, H, W) for masks; changed in place.
        network: size, mean and std of its input.
        images: n of them. labels: (n,) int64 in [0, C), or n masks.
        groups: parameter groups with their own "lr" and "lr_scale", or None for AdamW on everything that is trainable.
        class_weights: (C,) float32 or None.
        log: called with step, loss and rate about a hundred times.

    Returns:
        the state of the averaged weights, on the device of `module`.

    Raises:
        TutelageError: the loss is no number any more.
    """
    device = accelerator.device
    optimizer = torch.optim.AdamW(groups, lr=plan.rate) if groups else training.optimizer_for(module, plan.rate, device)
    optimizer = accelerator.prepare_optimizer(optimizer)  # with fp16 it unscales, and skips a step that overflowed
    average = training.Average(module)
    start = 0
    if resumable:
        start = training.load_checkpoint(
            resumable.folder, resumable.stage, resumable.inputs, module, optimizer, average
        )
    advance(start * plan.batch_size)
    order = training.seed_of(plan.seed, "order")
    every_log = max(1, plan.steps // 100)
    seen = training.LossLog(what)
    scales = [group.get("lr_scale", 1.0) for group in optimizer.param_groups]

    def make(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        positions, epochs = training.batch_of(step, plan.batch_size, len(labels), order)
        truth = view_truth(images, labels, positions, epochs, views, sides(network.size))
        return view_input(images, positions, epochs, views, network), truth

    module.train(plan.backbone)
    if not plan.statistics:
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.eval()
    for step, (inputs, truth) in training.ahead(make, range(start, plan.steps)):
        rate = training.learning_rate(step, plan.steps, plan.rate)
        for group, scale in zip(optimizer.param_groups, scales, strict=True):
            group["lr"] = rate * scale
        torch.manual_seed(training.seed_of(plan.seed, "step", step))
        inputs, truth = to_device(inputs, device), truth.to(device)
        targets = losses.one_hot(truth, plan.classes)
        with accelerator.autocast():
            loss = losses.soft_cross_entropy(module(inputs), targets, class_weights)
        optimizer.zero_grad(set_to_none=True)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(module.parameters(), training.CLIP)
        optimizer.step()
        average.update(module)
        seen.add(step + 1, loss)
        save = resumable is not None and (step + 1) % resumable.every == 0 and step + 1 < plan.steps
        if save or (step + 1) % every_log == 0 or step + 1 == plan.steps:
            log({"step": step + 1, "loss": seen.mean(), "rate": rate})
        if resumable and save:
            training.save_checkpoint(
                resumable.folder, resumable.stage, step + 1, resumable.inputs, module, optimizer, average
            )
        advance(plan.batch_size)
    return average.state


def chosen_state(module: nn.Module, state: dict[str, torch.Tensor]) -> nn.Module:
    """Put averaged weights into a module."""
    module.load_state_dict(state)
    return module.eval()


def epochs_to_steps(epochs: float, images: int, batch_size: int) -> int:
    """Optimizer steps of so many passes over the images; at least 1."""
    return max(1, round(epochs * images / batch_size))


def paired_gain(correct: Sequence[float] | np.ndarray, reference: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean difference of scores on the same images, and its standard error.

    Args:
        correct, reference: (n,) scores, or bool for right and wrong.

    Returns:
        mean difference and standard error.
    """
    difference = np.asarray(correct, dtype=float) - np.asarray(reference, dtype=float)
    return float(difference.mean()), float(difference.std(ddof=1) / np.sqrt(len(difference))) if len(
        difference
    ) > 1 else 0.0
