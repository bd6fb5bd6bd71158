"""The loop of the transfer: views of a batch, what is told of them, one loss, one step, one update of the average."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tutelage import training
from tutelage.compute import to_device
from tutelage.data.parts import of_grid
from tutelage.models.heads import log_loss
from tutelage.recipes.objectives import QUEUE, Told, Weights, hardened, loss_of
from tutelage.targets import Targets, part_input, view_input

SPREAD_SAMPLE = 1024  # images whose features give the variance of each axis


@dataclass(frozen=True)
class Plan:
    """steps: optimizer steps. batch_size: over all processes. rate: peak, already scaled. mixup: alpha, 0 = none.
    features: weight of the features' distance beside the KL divergence. part: smallest share of a view that the student sees of it in one
    pass, where the teacher's word has a grid; 1 = the view. labelled: images of a batch that are drawn from the
    labelled ones, which come first in the transfer set.
    """

    steps: int
    batch_size: int
    rate: float
    temperature: float = 1.0
    features: float = 0.0
    mixup: float = 0.0
    seed: int = 0
    objective: str = "oriented"
    agnostic_loss: str = "contrastive"
    labelled: int = 0
    part: float = 1.0


def teach(
    module: Any, student: Any, targets: Targets, plan: Plan, hardware: Any, *, optimizer: Any, average: Any, start: int = 0,
    labels: np.ndarray | None = None, class_weights: torch.Tensor | None = None,
    log: Callable[[dict[str, Any]], None] = lambda row: None, save: Callable[[int], None] = lambda step: None,
    every: int = 2**62, advance: Callable[[int], None] = lambda n: None,
) -> None:  # fmt: skip
    """Teach a student.

    Args:
        module: a plain student, or a `Taught`, prepared by `hardware`; changed in place. student: its size, mean and std.
        targets: what the teacher says. average: of the student's weights.
        start: steps that are done already. labels: (n,) int64 of the first n images, for a plan that reads labels.
        class_weights: (C,) float32, by what the teacher takes a row for.
        log: called about 200 times with step, loss, rate, images. save: called with the steps done, each `every` steps.
        advance: called with images seen.

    Raises:
        TutelageError: the loss is no number any more.
    """
    rank, processes, plain = hardware.process_index, hardware.num_processes, hardware.unwrap_model(module)
    if class_weights is not None:
        class_weights = class_weights.to(hardware.device)
    seen, weights = training.LossLog("transfer"), Weights(plan.temperature, plan.features, class_weights)
    loss_at, make = (
        loss_of(plan.objective, plan.agnostic_loss),
        _batches(targets, plan, student, labels, rank, processes),
    )
    spread = _spread(targets, plan).to(hardware.device)
    module.train()
    workers = 1 if hardware.device.type == "cpu" else 8
    for step, (images, logits, features, truth, queue) in training.ahead(make, range(start, plan.steps), workers):
        now = rate_at(step, plan)
        for group in optimizer.param_groups:
            group["lr"] = now
        torch.manual_seed(training.seed_of(plan.seed, "step", step, rank))
        images, logits, features, truth, queue = (
            to_device(part, hardware.device) for part in (images, logits, features, truth, queue)
        )
        soft = hardened(torch.softmax(logits / plan.temperature, dim=1), plan.objective)
        parts = [soft, features, truth]
        told = torch.cat([part.flatten(1) for part in parts], dim=1)
        images, told = training.mixup(images, told, plan.mixup, training.seed_of(plan.seed, "mixup", step))
        told = told.split([part[0].numel() for part in parts], dim=1)
        soft, features, truth = (one.reshape(part.shape) for one, part in zip(told, parts, strict=True))
        with hardware.autocast():
            output = module(images)
        output = output if isinstance(output, tuple) else (output, None, None)
        loss = loss_at(step / plan.steps)(output, Told(soft, features, truth, queue, spread), weights)
        optimizer.zero_grad(set_to_none=True)
        hardware.backward(loss)
        hardware.clip_grad_norm_(module.parameters(), training.CLIP)
        optimizer.step()
        average.update(plain)
        seen.add(step + 1, loss)
        done, due = step + 1, (step + 1) % every == 0 and step + 1 < plan.steps
        if due or done % max(1, plan.steps // 200) == 0 or done == plan.steps:
            log({"step": done, "loss": seen.mean(), "rate": now, "images": done * plan.batch_size})
        if due:  # after the losses were looked at: a checkpoint never holds what is no number
            save(done)
        advance(plan.batch_size)


def rate_at(step: int, plan: Plan) -> float:
    """The learning rate of a step; an objective of two halves has a warm-up and a cosine in each."""
    if plan.objective != "agnostic-oriented":
        return training.learning_rate(step, plan.steps, plan.rate)
    half = (plan.steps + 1) // 2
    first = step < half
    return training.learning_rate(step if first else step - half, half if first else plan.steps - half, plan.rate)


def _batches(targets: Targets, plan: Plan, student: Any, labels: np.ndarray | None, rank: int, processes: int) -> Any:
    """step -> images, logits, features, one-hot labels and a queue of features, for this process."""
    order, labelled_order = training.seed_of(plan.seed, "order"), training.seed_of(plan.seed, "labelled order")
    queued = plan.objective.startswith("agnostic") and plan.agnostic_loss == "queue"

    def make(step: int) -> tuple[torch.Tensor, ...]:
        positions, passes = training.batch_of(step, plan.batch_size - plan.labelled, len(targets.images), order)
        if plan.labelled and labels is not None:
            more, again = training.batch_of(step, plan.labelled, len(labels), labelled_order)
            positions, passes = np.concatenate([more, positions]), np.concatenate([again, passes])
        positions, passes = positions[rank::processes], passes[rank::processes]
        told, of = targets.of(positions, passes), (targets.images, positions)
        if plan.part < 1:
            images, parts = part_input(*of, passes, targets.views, targets.settings, student, plan.part)
            told = tuple(of_grid(one, parts) if one.ndim == 4 else one for one in told)
        else:
            images = view_input(*of, passes % targets.views, targets.settings, student)
        logits, features = (torch.from_numpy(one) for one in told)
        return images, logits, features, _one_hot(positions, labels, logits.shape[1]), queue_of(step)

    def queue_of(step: int) -> torch.Tensor:
        if not queued:
            return torch.zeros(0, 0)
        random = np.random.default_rng(training.seed_of(plan.seed, "queue", step))
        others = random.integers(0, len(targets.images), QUEUE)
        return torch.from_numpy(targets.of(others, np.full(QUEUE, step % targets.views))[1])

    return make


def _one_hot(positions: np.ndarray, labels: np.ndarray | None, classes: int) -> torch.Tensor:
    """(B, C) float32, rows of 0 for images without a label; (B, 0) where no labels are read."""
    if labels is None:
        return torch.zeros(len(positions), 0)
    out = torch.zeros(len(positions), classes)
    known = np.flatnonzero(positions < len(labels))
    out[torch.from_numpy(known), torch.from_numpy(labels[positions[known]])] = 1
    return out


def _spread(targets: Targets, plan: Plan) -> torch.Tensor:
    """(d,) float32: variance of the teacher's features on each axis, at least 1e-6 of the largest."""
    if targets.embedding is None or plan.agnostic_loss != "specmatch":
        return torch.ones(0)
    sample = np.sort(np.random.default_rng(0).permutation(len(targets.images))[:SPREAD_SAMPLE])
    variance = torch.from_numpy(targets.of(sample, np.zeros_like(sample))[1]).var(dim=0)
    return variance.clamp(min=1e-6 * float(variance.max()))


def mix_heads(module: Any, share: float) -> None:
    """Fold the second head of a `Taught` into the student's own: weights and biases, `share` of the second.

    Logits of the mean are the mean of the logits: the probabilities are the normalised geometric mean of both heads'. (DHO mixes
    them arithmetically, which no single head can.)
    """
    own = module.student.get_classifier()
    with torch.no_grad():
        for parameter, other in zip(own.parameters(), module.labels_head.parameters(), strict=True):
            parameter.lerp_(other, share)


def best_share(own: np.ndarray, second: np.ndarray, labels: np.ndarray) -> float:
    """The share of the second head, among 0, 0.1, ... 1, with the smallest log loss on validation images.

    Args:
        own, second: (n, C) float32 logits. labels: (n,) int64.
    """
    shares = [i / 10 for i in range(11)]
    return min(shares, key=lambda share: log_loss((1 - share) * own + share * second, labels).mean())
