"""The distillation loop: each step draws new views of a batch with their targets, then updates the weights and their average."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from tutelage.data.masks import Labels
from tutelage.data.views import NetworkInput
from tutelage.distillation.objectives import QUEUE, Batch, objective_loss
from tutelage.distillation.targets import Targets
from tutelage.features.view_batches import view_input, view_truth
from tutelage.image_size import sides
from tutelage.tasks import Task
from tutelage.training import batches, cross_entropy, loop

if TYPE_CHECKING:
    from accelerate import Accelerator

LEAST_SHARE = 1e-3  # a class's weight is computed as if it had at least this share


@dataclass(frozen=True)
class Plan(loop.Plan):
    """The optimizer steps of a distillation, and its objective.

    labelled: how many images of a batch are labelled images with their true labels.
    features: weight of the feature distance, which is added to the loss on the targets.
    class_weights: (C,) float32; a row weighs what its target's classes weigh on average.
    """

    temperature: float = 1.0
    objective: str = "task-oriented"
    task_agnostic_loss: str = "contrastive"
    labelled: int = 0
    features: float = 0.0
    class_weights: torch.Tensor | None = None


def labelled_images(share: float | None, labelled: int, transfer: int, batch_size: int) -> int:
    """Return how many images of a batch are labelled images.

    Default share: 4 x labelled / all images of the transfer set, at most 3/8. True labels help most when the transfer set holds little
    else; in a large transfer set, showing the labelled images this often does harm.

    labelled_images(None, 100, 1000, 128) == 48; with 10,100 images instead of 1000: 5.

    Args:
        share: of a batch, in [0, 1), or None for the default. labelled: number of labelled images. transfer: of all images, them included.
    """
    share = min(3 / 8, 4 * labelled / transfer) if share is None else share
    return min(round(share * batch_size), batch_size - 1)


def class_weights(targets: Targets, kind: Task) -> torch.Tensor:
    """Return (C,) float32 class weights, (C x share)^-RARE_CLASSES, with each class's share estimated from the targets of some images.

    kind: the task. Classification uses the square root (RARE_CLASSES 0.5): targets of a rare class are often wrong, and with the full
    inverse share they would count as much in total as those of a common class.
    """
    sample = np.linspace(0, len(targets.images) - 1, min(kind.COUNTED, len(targets.images))).astype(np.int64)
    each = (np.exp(targets.log_probabilities(sample[i : i + 1])[0]) for i in range(len(sample)))
    shares = np.mean([one.reshape(len(one), -1).mean(axis=1) for one in each], axis=0)
    return torch.from_numpy((len(shares) * np.maximum(shares, LEAST_SHARE)) ** -kind.RARE_CLASSES).float()


def distill_student(
    state: loop.TrainState,
    student: NetworkInput,
    targets: Targets,
    plan: Plan,
    hardware: Accelerator,
    watch: loop.Watch,
    labels: Labels,
    classes: int,
) -> None:
    """Train a student to match the targets on new views of the transfer set.

    Args:
        state: of a plain student, or of a `StudentWithProjector`. student: its size, mean and std.
        targets: of all images. labels: of the labelled images, which come first in the transfer set; used only if
            `plan.labelled` > 0, and then these images have no soft target. classes: C.

    Raises:
        TutelageError: the loss is NaN or infinite.
    """
    weights = None if plan.class_weights is None else plan.class_weights.to(hardware.device)
    distance = objective_loss(plan.objective, plan.task_agnostic_loss)

    def loss_of(step, images, soft, truth, features, queue) -> torch.Tensor:
        with hardware.autocast():
            output = state.module(images)
        known = cross_entropy.one_hot(truth, classes)
        batch = Batch(soft, known, features, queue, plan.temperature, weights, plan.features)
        return distance(output if isinstance(output, tuple) else (output, None), batch)

    make = _batches(targets, plan, student, labels, hardware.process_index, hardware.num_processes)
    state.module.train()
    loop.train(state, plan, make, loss_of, hardware, watch)


def _batches(
    targets: Targets, plan: Plan, student: NetworkInput, labels: Labels, rank: int, processes: int
) -> Callable[[int], tuple[torch.Tensor, ...]]:
    """Return a function: step -> this process's images, soft targets, labels of the first ones, features, queue."""
    order, labelled_order = batches.seed_of(plan.seed, "order"), batches.seed_of(plan.seed, "labelled order")
    queued = plan.objective == "task-agnostic" and plan.task_agnostic_loss == "queue"
    images, views, hard = targets.images, targets.settings, plan.objective == "pseudo-label"
    first = len(labels) if plan.labelled and len(labels) < len(images) else 0  # the first image with a soft target

    def make(step: int) -> tuple[torch.Tensor, ...]:
        rest, passes = batches.batch_of(step, plan.batch_size - plan.labelled, len(images) - first, order)
        known, again = batches.batch_of(step, plan.labelled, len(labels), labelled_order)
        known, again = known[rank::processes], again[rank::processes]
        turn = (rank - plan.labelled) % processes  # so that all processes get the same number of images
        rest, passes = first + rest[turn::processes], passes[turn::processes]
        positions, numbers = np.concatenate([known, rest]), np.concatenate([again, passes])
        soft = torch.from_numpy(targets.probabilities(rest, passes, plan.temperature, hard))
        truth = torch.zeros(0, dtype=torch.int64)
        if plan.labelled:
            truth = view_truth(images, labels, known, again, views, sides(student.size))
        features = torch.from_numpy(targets.matched(positions, numbers))
        return view_input(images, positions, numbers, views, student), soft, truth, features, queue_of(step)

    def queue_of(step: int) -> torch.Tensor:
        if not queued:
            return torch.zeros(0, 0)
        random = np.random.default_rng(batches.seed_of(plan.seed, "queue", step))
        others = random.integers(0, len(images), QUEUE)
        return torch.from_numpy(targets.matched(others, np.full(QUEUE, step)))

    return make
