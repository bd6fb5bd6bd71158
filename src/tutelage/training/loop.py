"""The loop that all training of networks is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tutelage.device import to_device
from tutelage.errors import TutelageError
from tutelage.training.batches import prefetch, seed_of
from tutelage.training.checkpoints import Resumable, load_checkpoint, save_checkpoint
from tutelage.training.optimization import EMA, learning_rate

CLIP = 1.0  # largest norm of the gradient
LOGGED = 200  # rows of a loop's log, about


@dataclass(frozen=True)
class Plan:
    """The optimizer steps of one loop.

    steps: how many. batch_size: images of a batch, over all processes. rate: peak learning rate, already scaled to the batch.
    """

    steps: int
    batch_size: int
    rate: float
    seed: int = 0


@dataclass(frozen=True)
class Watch:
    """What a loop reports while it runs, and to whom.

    what: the loop's name in errors. log: takes step, loss, rate and images, about LOGGED times. advance: takes images seen.
    """

    what: str
    log: Callable[[dict[str, Any]], None] = lambda row: None
    advance: Callable[[int], object] = lambda n: None


def train(
    module: nn.Module, plan: Plan, make: Callable[[int], Iterable[torch.Tensor]], loss_of: Callable[..., torch.Tensor], hardware: Any,
    watch: Watch, *, optimizer: Any, average: EMA, resumable: Resumable | None = None, images: int | None = None,
) -> None:  # fmt: skip
    """The loop that all training of networks is: a batch, its loss, a step, an update of the average.

    Args:
        module: prepared by `hardware`; changed in place.
        make: step -> tensors of this process's batch, on the CPU; called ahead in threads, must depend on the step alone.
        loss_of: step and those tensors, on the device -> scalar loss.
        optimizer: its groups may have an "lr_scale". average: of the plain module's weights.
        resumable: where checkpoints are kept, and one of before is taken up; None: nothing is kept.
        images: that a step shows, where these are not those of the batch.

    Raises:
        TutelageError: the loss is NaN or infinite.
    """
    plain, shown, seen = hardware.unwrap_model(module), images or plan.batch_size, LossLog(watch.what)
    kept, start, every = resumable, 0, resumable.every if resumable else 2**62
    if kept:
        start = load_checkpoint(kept.folder, kept.stage, kept.inputs, plain, optimizer, average)
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
        seen.add(done, loss)
        due = done % every == 0 and done < plan.steps
        if due or done % max(1, plan.steps // LOGGED) == 0 or done == plan.steps:
            watch.log({"step": done, "loss": seen.mean(), "rate": rate, "images": done * shown})
        if due and kept and hardware.is_main_process:  # after the losses were looked at: a checkpoint never holds NaN
            save_checkpoint(kept.folder, kept.stage, done, kept.inputs, plain, optimizer, average)
        watch.advance(shown)


class LossLog:
    """Losses since the last look, kept on the device so that no step waits for them."""

    def __init__(self, what: str):
        self._what = what
        self._seen: list[tuple[int, torch.Tensor]] = []

    def add(self, step: int, loss: torch.Tensor) -> None:
        """Take the loss of one step."""
        self._seen.append((step, loss.detach()))

    def mean(self) -> float:
        """Mean loss since the last call.

        Raises:
            TutelageError: a loss is NaN or infinite; names the first such step.
        """
        values = torch.stack([loss for _, loss in self._seen]).tolist()
        for (step, _), value in zip(self._seen, values, strict=True):
            if not math.isfinite(value):
                raise TutelageError(
                    f"{self._what}: the loss of step {step} is {value}",
                    "lower --lr or use --precision fp32, with --overwrite; decoded images and teacher outputs stay cached",
                )
        self._seen.clear()
        return sum(values) / len(values)
