"""The loop of the distillation: new views of a batch, their targets, one loss, one step, one update of the average."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tutelage.data.masks import Masks
from tutelage.distillation.objectives import QUEUE, Batch, objective_loss
from tutelage.distillation.targets import Targets
from tutelage.features.view_batches import view_input, view_truth
from tutelage.image_size import sides
from tutelage.training import batches, loop, losses

LEAST_SHARE = 1e-3  # of a class, for its weight


@dataclass(frozen=True)
class Plan(loop.Plan):
    """The steps of a distillation, and what is distilled.

    labelled: images of a batch that are drawn from the labelled ones, with their true labels. grid: of the student's logits, for masks.
    features: weight of their distance beside the targets.
    """

    temperature: float = 1.0
    objective: str = "oriented"
    agnostic_loss: str = "contrastive"
    labelled: int = 0
    grid: tuple[int, int] | None = None
    features: float = 0.0


def labelled_images(share: float | None, labelled: int, transfer: int, batch_size: int) -> int:
    """How many images of a batch are drawn from the labelled ones.

    The rule, where no share is asked for: 4 x labelled / all images of the transfer set, at most 3/8. True labels matter where there
    is little else, and cost where the pool is large.

    labelled_images(None, 100, 1000, 128) == 48; of 10,100 images: 5.

    Args:
        share: of a batch, in [0, 1), or None for the rule. labelled, transfer: images; the latter holds the former.
    """
    share = min(3 / 8, 4 * labelled / transfer) if share is None else share
    return min(round(share * batch_size), batch_size - 1)


def class_weights(targets: Targets, kind: Any) -> torch.Tensor:
    """(C,) float32 weights of the classes, (C share)^-RARE_CLASSES by the targets of some images; kind: the task.

    For images the root: targets of a rare class are often wrong, and the inverse share itself asks for as many of them as of a common one.
    """
    sample = np.linspace(0, len(targets.images) - 1, min(kind.COUNTED, len(targets.images))).astype(np.int64)
    each = (np.exp(targets.log_probabilities(sample[i : i + 1])[0]) for i in range(len(sample)))
    shares = np.mean([one.reshape(len(one), -1).mean(axis=1) for one in each], axis=0)
    return torch.from_numpy((len(shares) * np.maximum(shares, LEAST_SHARE)) ** -kind.RARE_CLASSES).float()


def distill(
    module: Any, student: Any, targets: Targets, plan: Plan, hardware: Any, watch: loop.Watch, *, labels: np.ndarray | Masks,
    classes: int, class_weights: torch.Tensor | None = None, **more: Any,
) -> None:  # fmt: skip
    """Let a student match targets on new views of the transfer set.

    Args:
        module: a plain student, or a `StudentWithProjector`, prepared by `hardware`; changed in place. student: its size, mean and std.
        targets: of all images. labels: of the first images of the transfer set, the labelled ones; read only where the
            plan draws from them, and then these images carry no soft target.
        class_weights: (C,) float32, by what the targets take a row for.
        more: optimizer, average and resumable of `loop.train`.

    Raises:
        TutelageError: the loss is NaN or infinite.
    """
    if class_weights is not None:
        class_weights = class_weights.to(hardware.device)
    distance = objective_loss(plan.objective, plan.agnostic_loss)

    def loss_of(step, images, soft, one_hot, features, queue) -> torch.Tensor:
        with hardware.autocast():
            output = module(images)
        batch = Batch(soft, one_hot, features, queue, plan.temperature, class_weights, plan.features)
        return distance(output if isinstance(output, tuple) else (output, None), batch)

    make = _batches(targets, plan, student, labels, classes, hardware.process_index, hardware.num_processes)
    module.train()
    loop.train(module, plan, make, loss_of, hardware, watch, **more)


def _batches(
    targets: Targets, plan: Plan, student: Any, labels: np.ndarray | Masks, classes: int, rank: int, processes: int
) -> Callable[[int], tuple[torch.Tensor, ...]]:
    """step -> images, soft targets, one-hot labels, features and a queue of features, for this process."""
    order, labelled_order = batches.seed_of(plan.seed, "order"), batches.seed_of(plan.seed, "labelled order")
    queued = plan.objective == "agnostic" and plan.agnostic_loss == "queue"
    images, views, hard = targets.images, targets.settings, plan.objective == "pseudo-label"
    first = len(labels) if plan.labelled and len(labels) < len(images) else 0  # of those with a soft target

    def make(step: int) -> tuple[torch.Tensor, ...]:
        rest, passes = batches.batch_of(step, plan.batch_size - plan.labelled, len(images) - first, order)
        known, again = batches.batch_of(step, plan.labelled, len(labels), labelled_order)
        known, again = known[rank::processes], again[rank::processes]
        turn = (rank - plan.labelled) % processes  # so that all processes have equally many images
        rest, passes = first + rest[turn::processes], passes[turn::processes]
        positions, numbers = np.concatenate([known, rest]), np.concatenate([again, passes])
        soft = torch.from_numpy(targets.probabilities(rest, passes, plan.temperature, hard))
        soft = torch.cat([soft.new_zeros(len(known), *soft.shape[1:]), soft])
        one_hot = torch.zeros(len(positions), 0)
        if plan.labelled:
            truth = view_truth(images, labels, known, again, views, plan.grid or sides(student.size))
            one_hot = losses.one_hot(truth, classes)
            one_hot = torch.cat([one_hot, one_hot.new_zeros(len(rest), *one_hot.shape[1:])])
        features = torch.from_numpy(targets.matched(positions, numbers))
        return view_input(images, positions, numbers, views, student), soft, one_hot, features, queue_of(step)

    def queue_of(step: int) -> torch.Tensor:
        if not queued:
            return torch.zeros(0, 0)
        random = np.random.default_rng(batches.seed_of(plan.seed, "queue", step))
        others = random.integers(0, len(images), QUEUE)
        return torch.from_numpy(targets.matched(others, np.full(QUEUE, step)))

    return make
