"""What every training loop here shares: randomness by step, schedule, optimizer, average, batches, checkpoints.

Randomness is a function of (seed, purpose, step), never of what ran before, so a run that was killed goes on as if
nothing had happened: the checkpoint holds weights and optimizer state, and no generator.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from threadpoolctl import threadpool_limits
from torch import nn

from tutelage.compute import to_device
from tutelage.errors import TutelageError
from tutelage.runs import whole

WARM_UP = 0.06  # share of the steps
WEIGHT_DECAY = 0.05
CLIP = 1.0  # largest norm of the gradient
EMA_DECAY = 0.998
REFERENCE_BATCH = 128

LOGGED = 200  # rows of a loop's log, about

T = TypeVar("T")


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
class Resumable:
    """Where a loop keeps its checkpoints. every: steps between two of them."""

    folder: Path
    stage: str
    inputs: str
    every: int

    @property
    def start(self) -> int:
        """The steps that are done already."""
        return newest_step(self.folder, self.stage, self.inputs)


@dataclass(frozen=True)
class Watch:
    """What a loop reports while it runs, and to whom.

    what: the loop's name in errors. log: takes step, loss, rate and images, about LOGGED times. advance: takes images seen.
    """

    what: str
    log: Callable[[dict[str, Any]], None] = lambda row: None
    advance: Callable[[int], object] = lambda n: None


def seed_of(*parts: object) -> int:
    """A seed in [0, 2**63) for a purpose: seed_of(run_seed, "transfer", step)."""
    text = "/".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 6 % of the steps, then a cosine to 0.

    Worked example: step 0 of 100 at peak 1: 1/6; step 5: 1; step 53: 0.5.
    """
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def scaled_rate(rate: float, batch_size: int) -> float:
    """Learning rate at this batch size: scaled by the square root of batch / 128."""
    return rate * math.sqrt(batch_size / REFERENCE_BATCH)


def optimizer_for(module: nn.Module, rate: float, device: torch.device | str) -> torch.optim.AdamW:
    """AdamW with decoupled weight decay on matrices and kernels, none on biases and norms."""
    decayed = [p for p in module.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in module.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
    fused = torch.device(device).type in ("cpu", "cuda")
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=rate, fused=fused)


def batch_of(step: int, batch_size: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which images a step sees: the stream of reshuffled passes over the data, cut into batches.

    No image is dropped: a batch may hold the end of one pass and the beginning of the next.

    Args:
        step: from 0.
        batch_size: B, over all processes.
        count: number of images n.
        seed: of the order.

    Returns:
        positions (B,) int64 in [0, n) and the pass (epoch) of each, (B,) int64.
    """
    stream = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = stream // count
    positions = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        order = np.random.default_rng([seed, int(epoch)]).permutation(count)
        positions[here] = order[stream[here] % count]
    return positions, epochs


def ahead(make: Callable[[int], T], steps: range, workers: int = 1, depth: int = 2) -> Iterator[tuple[int, T]]:
    """Make the batches of the coming steps in threads while the present one is used; in order.

    Args:
        make: step -> batch; called from threads, must depend on the step alone.
        steps: which.
        workers: threads.
        depth: batches made ahead per worker.
    """
    waiting: deque = deque()
    # NumPy's BLAS threads wait actively: beside a training step on 2 cores they halved the images per second
    with ThreadPoolExecutor(workers) as pool, threadpool_limits(1, user_api="blas"):
        upcoming = iter(steps)
        try:
            for step in upcoming:
                waiting.append((step, pool.submit(make, step)))
                if len(waiting) > depth * workers:
                    number, future = waiting.popleft()
                    yield number, future.result()
            while waiting:
                number, future = waiting.popleft()
                yield number, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


class Average:
    """Exponential moving average of a module's weights and buffers.

    a <- d a + (1 - d) w with d = min(decay, (1 + t) / (10 + t)) after step t, so that early weights are forgotten; steady:
    d = decay from the first step on.
    """

    def __init__(self, module: nn.Module, decay: float = EMA_DECAY, steady: bool = False):
        self.decay, self.steady, self.step = decay, steady, 0
        self.state = {name: value.detach().clone() for name, value in module.state_dict().items()}

    def update(self, module: nn.Module) -> None:
        """Take in the weights after one more step."""
        decay = self.decay if self.steady else min(self.decay, (1 + self.step) / (10 + self.step))
        self.step += 1
        now = module.state_dict()
        floats = [name for name, value in self.state.items() if value.is_floating_point()]
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            [self.state[n] for n in floats], [now[n].detach() for n in floats], 1 - decay
        )
        for name in self.state.keys() - set(floats):
            self.state[name].copy_(now[name])


def train(
    module: nn.Module, plan: Plan, make: Callable[[int], Iterable[torch.Tensor]], loss_of: Callable[..., torch.Tensor], hardware: Any,
    watch: Watch, *, optimizer: Any, average: Average, resumable: Resumable | None = None, images: int | None = None,
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
    for step, made in ahead(make, range(start, plan.steps), workers):
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


# Checkpoints: plain safetensors, the last two of the stage under way.


def save_checkpoint(
    folder: Path,
    stage: str,
    step: int,
    inputs: str,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Average,
) -> None:
    """Write weights, average and optimizer state after `step` steps; older ones than the last two go."""
    tensors = {f"model.{name}": value for name, value in module.state_dict().items()}
    tensors |= {f"average.{name}": value for name, value in average.state.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    with whole(folder / f"{stage}-{step:08d}.safetensors") as path:
        save_file(tensors, path, metadata={"inputs": inputs, "step": str(step)})
    for old in sorted(folder.glob(f"{stage}-*.safetensors"))[:-2]:
        old.unlink()


def load_checkpoint(
    folder: Path, stage: str, inputs: str, module: nn.Module, optimizer: torch.optim.Optimizer, average: Average
) -> int:
    """Take up the newest checkpoint of this stage that was made from these inputs.

    Returns:
        the number of steps that are done; 0 where there is no checkpoint.
    """
    path, step = _newest(folder, stage, inputs)
    if path is None:
        return 0
    tensors = load_file(path)
    module.load_state_dict(_under("model.", tensors))
    for name, value in _under("average.", tensors).items():
        average.state[name].copy_(value)
    average.step = step
    layout = optimizer.state_dict()
    layout["state"] = {}
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for name, value in _under("optimizer.", tensors).items():
        index, field = name.split(".", 1)
        weight = weights[int(index)]
        if (
            value.shape == weight.shape
        ):  # fused AdamW reads the raw memory: it must lie as the weight's does (channels_last)
            value = torch.empty_like(weight).copy_(value)
        layout["state"].setdefault(int(index), {})[field] = value
    optimizer.load_state_dict(layout)
    return step


def newest_step(folder: Path, stage: str, inputs: str) -> int:
    """Steps that are done according to the newest checkpoint made from these inputs; 0 without one."""
    return _newest(folder, stage, inputs)[1]


def _newest(folder: Path, stage: str, inputs: str) -> tuple[Path | None, int]:
    from safetensors import safe_open

    for path in sorted(folder.glob(f"{stage}-*.safetensors"), reverse=True):
        with safe_open(path, "pt") as file:
            about = file.metadata()
        if about.get("inputs") == inputs:
            return path, int(about["step"])
    return None, 0


def _under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
