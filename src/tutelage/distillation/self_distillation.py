"""DINO: a student learns from the moving average of itself, without teacher or labels (Caron et al., ICCV 2021).

Each image gives two large and four small crops; the averaged student sees only the large ones. Images seen are counted
by their pixels: two crops of S x S and four of S/2 x S/2 count as three images of S x S, so there are fewer steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from tutelage.data.image_cache import Images
from tutelage.data.views import draw, render, to_input
from tutelage.device import flops
from tutelage.distillation import losses
from tutelage.features.view_batches import ViewSettings, crop_or_pad
from tutelage.models.students import Student, pooled_width
from tutelage.training import batches, loop, optimization

if TYPE_CHECKING:
    from accelerate import Accelerator

LARGE, SMALL = 2, 4  # crops of each image
LARGE_AREA, SMALL_AREA = (0.4, 1.0), (0.05, 0.4)  # share of the image, as in the paper
COLOUR = 0.4  # colour augmentation; stronger than in distillation, where the teacher has to recognise the image
DECAY = 0.99  # of the average: short schedules must forget faster than with the paper's 0.996
CENTRE = 0.9  # decay of the running mean of the outputs


def small_side(module: torch.nn.Module, size: int) -> int:
    """Side of the small crops: half of the student's input side if the student accepts that size, else the full side."""
    try:
        pooled_width(module, size // 2)
        return size // 2
    except (RuntimeError, AssertionError, ValueError):
        return size


def images_in_a_step(batch_size: int, size: int, small: int) -> float:
    """Number of images of size x size that have as many pixels as all crops of a step."""
    return batch_size * (LARGE + SMALL * (small / size) ** 2)


def extra_flops(module: torch.nn.Module, student: Student, steps_an_image: float) -> int:
    """FLOPs per image counted, beyond those of training on it: the averaged network's passes, and the head's on every crop.

    Args:
        module: a `DINOStudent`. student: the student in it, for its size. steps_an_image: batch size / `images_in_a_step`.
    """
    whole, backbone = flops(module, student.size), flops(module.get_submodule("student"), student.size)
    head = max(0, whole - backbone)
    crops = LARGE + SMALL
    trained = 3 * head * (crops * steps_an_image - 1)  # the training pass already counts one head per image
    return round(LARGE * steps_an_image * whole + trained)


def averaged(module: torch.nn.Module, state: Mapping[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """Return the float32 outputs (B, K) of a module for images, with the weights and buffers of its average, which stay as they are."""
    now = {name: value.clone() for name, value in state.items()}  # copies: its BatchNorm must not change
    # weights that layers share are in the average under each of their names, with the same values
    return torch.func.functional_call(module, now, (images,), tie_weights=False).float()


def self_distill(
    state: loop.TrainState,
    student: Student,
    small: int,
    images: Images,
    views: ViewSettings,
    plan: loop.Plan,
    hardware: Accelerator,
    watch: loop.Watch,
) -> None:
    """Train a student with DINO.

    Args:
        state: of a `DINOStudent`; its average, with DECAY, gives the targets. small: side of the small crops in pixels.
    """
    module, rank, processes = state.module, hardware.process_index, hardware.num_processes
    plain, order = hardware.unwrap_model(module), batches.seed_of(plan.seed, "order")
    large, waiting = int(student.size), True
    kinds = [(LARGE_AREA, large)] * LARGE + [(SMALL_AREA, small)] * SMALL

    def make(step: int) -> list[torch.Tensor]:
        """Return each crop of the images of a step: (B, 3, side, side) float32, normalised for the student, channels_last."""
        positions, passes = batches.batch_of(step, plan.batch_size, len(images), order)
        positions, passes = positions[rank::processes], passes[rank::processes]
        pixels = [crop_or_pad(images[int(i)], views.resize) for i in positions]
        sizes, seeds, crops = np.array([one.shape[:2] for one in pixels]), images.seeds[positions], []
        for number, (area, size) in enumerate(kinds):
            numbers = passes * len(kinds) + number
            drawn = draw(seeds, sizes, numbers, views.seed, flip=views.flip, area=area, colour=COLOUR)
            crops.append(to_input(render(pixels, drawn, size), student.mean, student.std, drawn.colours))
        return crops

    def loss_of(step: int, *crops: torch.Tensor) -> torch.Tensor:
        nonlocal waiting
        waiting = step < optimization.WARM_UP * plan.steps
        with torch.no_grad(), hardware.autocast():
            targets = averaged(plain, state.average.state, torch.cat(crops[:LARGE]))
        with hardware.autocast():
            outputs = [*module(torch.cat(crops[:LARGE])).chunk(LARGE), *module(torch.cat(crops[LARGE:])).chunk(SMALL)]
        loss = losses.self_distillation(outputs, list(targets.chunk(LARGE)), plain.centre)
        plain.centre.lerp_(hardware.reduce(targets.mean(dim=0, keepdim=True), "mean"), 1 - CENTRE)
        return loss

    # as in the paper's first epoch, prototypes stay fixed until the features differ between images
    hook = plain.prototypes.register_hook(lambda gradient: torch.zeros_like(gradient) if waiting else gradient)
    module.train()
    shown = round(images_in_a_step(plan.batch_size, large, small))
    loop.train(state, plan, make, loss_of, hardware, watch, images=shown)
    hook.remove()
