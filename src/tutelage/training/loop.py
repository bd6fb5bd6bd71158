"""The loop with which all networks are trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from tutelage.device import to_device
from tutelage.errors import TutelageError
from tutelage.training.batches import prefetch, seed_of
from tutelage.training.checkpoints import Resumable
from tutelage.training.optimization import EMA, learning_rate

if TYPE_CHECKING:
    from accelerate import Accelerator

CLIP = 1.0  # largest norm of the gradient
LOGGED = 200  # approximate number of rows in a loop's log


@dataclass(frozen=True)
class Plan:
    """The optimizer steps of one loop.

    steps: their number. batch_size: images per batch, over all processes. rate: peak learning rate, already scaled to the batch size.
    """

    steps: int
    batch_size: int
    rate: float
    seed: int = 0


@dataclass(frozen=True)
class TrainState:
    """What a loop changes in place: a network with its optimizer and the moving average of its weights.

    module: prepared by accelerate. optimizer: its groups may have an "lr_scale". average: of the plain module's weights.
    resumable: where checkpoints are kept and from where training resumes; None: no checkpoints.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    average: EMA
    resumable: Resumable | None = None


@dataclass(frozen=True)
class Watch:
    """Callbacks through which a loop reports its progress.

    what: the loop's name in errors. log: takes step, loss, rate and images, about LOGGED times. advance: takes the images of each step.
    """

    what: str
    log: Callable[[dict[str, float]], None] = lambda row: None
    advance: Callable[[int], object] = lambda n: None


def train(
    state: TrainState,
    plan: Plan,
    make: Callable[[int], Iterable[torch.Tensor]],
    loss_of: Callable[..., torch.Tensor],
    hardware: Accelerator,
    watch: Watch,
    images: int | None = None,
) -> None:
    """Train a network: each step makes a batch, computes its loss, updates the weights and their moving average.

    Args:
        make: step -> tensors of this process's batch, on the CPU; called ahead in threads, must depend on nothing but the step.
        loss_of: step and those tensors, on the device -> scalar loss.
        images: number of images that a step counts as, if other than the batch size.

    Raises:
        TutelageError: the loss is NaN or infinite.
    """
    module, optimizer, average, kept = state.module, state.optimizer, state.average, state.resumable
    plain, shown = hardware.unwrap_model(module), images or plan.batch_size
    losses: list[
        tuple[int, torch.Tensor]
    ] = []  # since the last log, on the device so that no step waits for a transfer
    start, every = (kept.load(plain, optimizer, average), kept.every) if kept else (0, 2**62)
    scales = [group.get("lr_scale", 1.0) for group in optimizer.param_groups]
    workers = 1 if hardware.device.type == "cpu" else 8
    for step, made in prefetch(make, range(start, plan.steps), workers):
        done, rate = step + 1, learning_rate(step, plan.steps, plan.rate)
        for group, scale in zip(optimizer.param_groups, scales, strict=True):
            group["lr"] = rate * scale
        torch.manual_seed(seed_of(plan.seed, "step", step, hardware.process_index))
        loss = loss_of(step, *(to_device(part, hardware.device) for part in made))
        optimizer.zero_grad(set_to_none=True)
        hardware.backward(loss)
        hardware.clip_grad_norm_(module.parameters(), CLIP)
        optimizer.step()
        average.update(plain)
        losses.append((done, loss.detach()))
        due = done % every == 0 and done < plan.steps
        if due or done % max(1, plan.steps // LOGGED) == 0 or done == plan.steps:
            watch.log({"step": done, "loss": mean_loss(losses, watch.what), "rate": rate, "images": done * shown})
            losses.clear()
        if due and kept and hardware.is_main_process:  # after the loss check above: no checkpoint holds NaN
            kept.save(done, plain, optimizer, average)
        watch.advance(shown)


def mean_loss(losses: list[tuple[int, torch.Tensor]], what: str) -> float:
    """Return the mean loss of some steps. losses: number and loss of each. what: the loop's name in errors.

    Raises:
        TutelageError: a loss is NaN or infinite; the message names the first such step.
    """
    values = torch.stack([loss for _, loss in losses]).tolist()
    for (step, _), value in zip(losses, values, strict=True):
        if not math.isfinite(value):
            raise TutelageError(
                f"{what}: the loss of step {step} is {value}",
                "lower --lr or use --precision fp32, with --overwrite; decoded images and teacher outputs stay cached",
            )
    return sum(values) / len(values)
