"""What the parts of every training loop promise."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import nn

from tutelage.errors import TutelageError
from tutelage.training import batches, checkpoints, loop, optimization

# Seeds


def test_seeds_differ_by_purpose_and_step_only():
    """A seed is a function of run seed, purpose and step, different for each, and fits torch and numpy."""
    seeds = {batches.seed_of(r, p, s) for r in range(3) for p in ("order", "step", "queue") for s in range(50)}
    assert len(seeds) == 450
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert batches.seed_of(0, "order") == batches.seed_of(0, "order")
    assert batches.seed_of(1, 23) != batches.seed_of(12, 3)


def test_seeds_are_those_of_yesterday():
    """Seeds do not change with the version, or a run that was stopped would go on differently."""
    assert batches.seed_of(0, "order") == 1152760118607444429
    assert batches.seed_of(7, "step", 12) == 5313813695893355298


# Schedule


def test_schedule_worked_examples():
    """The learning rates in the docstring are right: warm-up over 6 %, half of the peak half-way down the cosine."""
    assert optimization.learning_rate(0, 100, 1.0) == pytest.approx(1 / 6)
    assert optimization.learning_rate(5, 100, 1.0) == 1.0
    assert optimization.learning_rate(6, 100, 1.0) == 1.0
    assert optimization.learning_rate(53, 100, 1.0) == pytest.approx(0.5)
    assert optimization.learning_rate(53, 100, 3e-3) == pytest.approx(1.5e-3)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 1000])
def test_schedule_rises_then_falls_towards_zero(steps: int):
    """The rate rises to the peak once, falls from there, never reaches below 0, and ends near 0 in long runs."""
    rates = [optimization.learning_rate(step, steps, 0.2) for step in range(steps)]
    top = rates.index(max(rates))
    assert rates[top] == pytest.approx(0.2)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert min(rates) > 0
    assert steps < 1000 or rates[-1] < 1e-5


def test_rate_goes_with_the_root_of_the_batch():
    """The peak rate is that of batch 128, times sqrt(batch / 128)."""
    assert optimization.scaled_rate(1e-3, 128) == 1e-3
    assert optimization.scaled_rate(1e-3, 512) == pytest.approx(2e-3)
    assert optimization.scaled_rate(1e-3, 32) == pytest.approx(5e-4)


def test_biases_and_norms_do_not_decay():
    """Matrices and kernels decay by 0.05; biases, norms and frozen weights do not."""
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    module[3].weight.requires_grad_(False)
    groups = optimization.optimizer_for(module, 1e-3, "cpu").param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    named = {name: decay.get(id(p)) for name, p in module.named_parameters()}
    assert named == {"0.weight": 0.05, "0.bias": 0.0, "1.weight": 0.0, "1.bias": 0.0, "3.weight": None, "3.bias": 0.0}


# Batches


@pytest.mark.parametrize(("count", "batch"), [(10, 4), (7, 3), (5, 5), (3, 8), (1, 4), (64, 1)])
def test_no_image_is_dropped(count: int, batch: int):
    """Over whole passes every image is seen equally often, also where a batch straddles two passes or holds several."""
    steps = count * 3 // math.gcd(count, batch)  # a whole number of passes
    taken = [batches.batch_of(step, batch, count, seed=5) for step in range(steps)]
    positions = np.concatenate([p for p, _ in taken])
    epochs = np.concatenate([e for _, e in taken])
    assert all(len(p) == batch for p, _ in taken)
    assert (np.diff(epochs) >= 0).all()
    for epoch in np.unique(epochs):
        assert sorted(positions[epochs == epoch]) == list(range(count))


def test_a_batch_straddles_two_passes():
    """A batch may hold the end of one pass and the beginning of the next, each with its own number."""
    _, epochs = batches.batch_of(2, 4, 10, seed=0)
    assert epochs.tolist() == [0, 0, 1, 1]


def test_a_batch_depends_on_the_step_alone():
    """What a step sees does not depend on the steps before, and other seeds and passes see another order."""
    late = batches.batch_of(17, 8, 50, seed=3)
    for step in (0, 3, 17):
        again = batches.batch_of(step, 8, 50, seed=3)
    np.testing.assert_array_equal(late[0], again[0])
    np.testing.assert_array_equal(late[1], again[1])
    first = [batches.batch_of(0, 50, 50, seed=s)[0].tolist() for s in (3, 4)]
    assert first[0] != first[1]
    assert batches.batch_of(1, 50, 50, seed=3)[0].tolist() != first[0]


# Batches ahead


@pytest.mark.parametrize("workers", [1, 3])
def test_ahead_keeps_the_order(workers: int):
    """Batches come in the order of the steps, however long each takes to make."""

    def make(step: int) -> int:
        time.sleep(0.002 * ((step * 7) % 3))
        return step * step

    assert list(batches.prefetch(make, range(4, 24), workers)) == [(s, s * s) for s in range(4, 24)]
    assert list(batches.prefetch(make, range(0), workers)) == []


def test_ahead_is_ahead_but_not_far():
    """While a batch is used the coming ones are made, and no more than `depth` of them are kept in memory."""
    made: list[int] = []
    coming = batches.prefetch(lambda step: made.append(step) or step, range(100), workers=1, depth=2)
    next(coming)
    deadline = time.monotonic() + 5
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.05)
    assert made == [0, 1, 2]
    coming.close()


def test_ahead_passes_errors_on_and_stops_its_threads():
    """An error in making a batch is raised at its step; its threads end then, and also when the loop stops early."""
    before = threading.active_count()

    def make(step: int) -> int:
        if step == 3:
            raise ValueError("no such image")
        return step

    failing = batches.prefetch(make, range(100), workers=2)
    assert [next(failing)[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="no such image"):
        next(failing)
    assert threading.active_count() == before
    stopped = batches.prefetch(lambda step: step, range(100), workers=2)
    next(stopped)
    assert threading.active_count() > before
    stopped.close()
    assert threading.active_count() == before


def test_ahead_makes_nothing_more_when_the_loop_stops():
    """Batches that are still waiting when the loop stops are not made."""
    made: list[int] = []

    def make(step: int) -> int:
        if step:
            time.sleep(0.1)
        made.append(step)
        return step

    coming = batches.prefetch(make, range(100), workers=1, depth=4)
    next(coming)
    coming.close()
    assert len(made) <= 2  # the first, and the one under way


# Average


def test_average_by_hand():
    """The average is a <- d a + (1 - d) w with d = min(decay, (1 + t) / (10 + t)) after step t."""
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, 1.0)
    average = optimization.EMA(module, decay=0.15)
    expected = 1.0
    for step, value in enumerate([3.0, -2.0, 5.0]):
        nn.init.constant_(module.weight, value)
        average.update(module)
        decay = [1 / 10, 0.15, 0.15][step]  # (1 + 1) / (10 + 1) = 0.18 is above 0.15
        expected = decay * expected + (1 - decay) * value
        assert average.state["weight"].item() == pytest.approx(expected, rel=1e-6)
    assert module.weight.item() == 5.0


def test_average_covers_buffers():
    """Floating buffers are averaged, integer ones are taken as they are."""
    module = nn.BatchNorm1d(1)
    average = optimization.EMA(module)
    for _ in range(2):
        module(torch.tensor([[10.0], [30.0]]))
        average.update(module)
    assert average.state["num_batches_tracked"].item() == 2
    first = 0.9 * 2.0  # decay 1/10 of 0; the running mean is 2, then 3.8
    assert average.state["running_mean"].item() == pytest.approx(2 / 11 * first + 9 / 11 * 3.8, rel=1e-6)


# Losses of a loop


def test_the_log_names_the_step_of_a_broken_loss():
    """A loss that is NaN or infinite stops the run with the first such step, what was at work, and a hint."""
    losses = [(step, torch.tensor(value)) for step, value in ((7, 1.0), (8, math.nan), (9, math.inf))]
    with pytest.raises(TutelageError, match=r"distill: the loss of step 8 is nan") as error:
        loop.mean_loss(losses, "distill")
    assert "--lr" in error.value.hint
    assert loop.mean_loss([(0, torch.tensor(1.0)), (1, torch.tensor(2.0))], "x") == 1.5


# Checkpoints


def small(format: torch.memory_format) -> nn.Module:
    """A network with everything that can go wrong: convolutions, BatchNorm, dropout."""
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(8, 4),
    )  # fmt: skip
    return nn.Sequential(*layers).to(memory_format=format)


class Killed(Exception):
    """The process ends here."""


def train(folder: Path, stop: int, steps: int = 12, format: torch.memory_format = torch.contiguous_format):
    """The loop, killed after step `stop` of `steps`; from a checkpoint where there is one."""
    module = small(format)
    optimizer, average = optimization.optimizer_for(module, 1e-2, "cpu"), optimization.EMA(module)
    resumable = checkpoints.Resumable(folder, "stage", "inputs", every=3)
    start, done = resumable.start, [resumable.start]
    images = torch.randn(20, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(20) % 4

    def make(step: int):
        positions, _ = batches.batch_of(step, 8, 20, seed=0)
        return images[positions], labels[positions]

    def loss_of(step: int, inputs: torch.Tensor, truth: torch.Tensor):
        return nn.functional.cross_entropy(module(inputs), truth)

    def advance(count: int) -> None:
        assert count == 8
        done[0] += 1
        if done[0] == stop < steps:
            raise Killed

    plan, watch = loop.Plan(steps, 8, 1e-2), loop.Watch("loop", advance=advance)
    state = loop.TrainState(module, optimizer, average, resumable)
    with contextlib.suppress(Killed):
        loop.train(state, plan, make, loss_of, Accelerator(cpu=True), watch)
    assert done[0] == stop
    return start, {**module.state_dict(), **{f"average.{n}": v for n, v in average.state.items()}}


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_stopped_and_resumed_is_never_stopped(tmp_path: Path, format: torch.memory_format):
    """A loop that was stopped, also twice and between checkpoints, ends with the weights of one that was not: bit for bit."""
    _, never = train(tmp_path / "never", 12, format=format)
    assert train(tmp_path / "stopped", 4, format=format)[0] == 0
    assert train(tmp_path / "stopped", 8, format=format)[0] == 3
    start, resumed = train(tmp_path / "stopped", 12, format=format)
    assert start == 6
    assert never.keys() == resumed.keys()
    differing = {n: (v - resumed[n]).abs().max().item() for n, v in never.items() if not torch.equal(v, resumed[n])}
    assert not differing


def test_only_the_last_two_checkpoints_are_kept(tmp_path: Path):
    """The folder holds the last two checkpoints of the stage and no half-written file; other stages' stay."""
    (tmp_path / "other-00000001.safetensors").touch()
    train(tmp_path, 12)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["other-00000001.safetensors", "stage-00000006.safetensors", "stage-00000009.safetensors"]


def test_a_checkpoint_of_other_inputs_is_not_taken(tmp_path: Path):
    """A checkpoint made from other inputs, or of another stage, is not taken up: the loop starts anew."""
    train(tmp_path, 6)
    module = small(torch.contiguous_format)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    optimizer, average = optimization.optimizer_for(module, 1e-2, "cpu"), optimization.EMA(module)
    for stage, inputs in (("stage", "other"), ("other", "inputs")):
        resumable = checkpoints.Resumable(tmp_path, stage, inputs, every=3)
        assert resumable.load(module, optimizer, average) == 0
        assert resumable.start == 0
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not optimizer.state
    assert checkpoints.Resumable(tmp_path, "stage", "inputs", every=3).start == 6


def test_the_newest_checkpoint_of_these_inputs_is_taken(tmp_path: Path):
    """Where a newer checkpoint is of other inputs, the newest of these inputs counts."""
    train(tmp_path, 6)
    save_file({"x": torch.zeros(1)}, tmp_path / "stage-00000099.safetensors", metadata={"inputs": "x", "step": "99"})
    assert checkpoints.Resumable(tmp_path, "stage", "inputs", every=3).start == 6


@pytest.mark.parametrize("place", [0.01, 0.5, 0.99])
def test_a_damaged_checkpoint_is_not_taken(tmp_path: Path, place: float):
    """With one other byte in the newest checkpoint, or a part of it, training goes on from the one before, to the same weights."""
    whole = train(tmp_path / "whole", 12)[1]
    train(tmp_path / "run", 8)
    path = max((tmp_path / "run").glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 4
    path.write_bytes(data)
    start, weights = train(tmp_path / "run", 12)
    assert start == 3
    assert all(torch.equal(weights[name], value) for name, value in whole.items())
    path = max((tmp_path / "run").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:100])
    assert train(tmp_path / "run", 12)[0] == 6


def test_a_folder_without_checkpoints(tmp_path: Path):
    """Without a checkpoint, or without the folder, the loop starts at step 0."""
    assert checkpoints.Resumable(tmp_path / "none", "stage", "inputs", every=3).start == 0
    assert train(tmp_path / "none", 1)[0] == 0
