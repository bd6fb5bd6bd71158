"""Preparation of a run's targets from the adapted teacher's outputs, cached or online, and the committee's if there is one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tutelage.compute_cost import CostMeter
from tutelage.data.block_cache import as_void
from tutelage.data.image_cache import Images
from tutelage.data.manifest import TaskData
from tutelage.distillation.targets import TeacherOutputs
from tutelage.features.output_cache import OutputCache, compute_outputs, gibibytes, run_network
from tutelage.features.principal_axes import principal_axes
from tutelage.features.view_batches import CLEAN, ViewSettings, as_rows
from tutelage.files import intact
from tutelage.metrics import softmax
from tutelage.models.adapted_teacher import AdaptedTeacher, half_precision
from tutelage.progress import logger, progress
from tutelage.run_folder import Clock

if TYPE_CHECKING:
    from accelerate import Accelerator

REDUCED = 32  # images on which the error of a coarser grid is measured
SAMPLE = 2048  # images whose features determine the principal axes on which the student matches them


def teacher_outputs(
    images: Images,
    teacher: AdaptedTeacher,
    settings: ViewSettings,
    looks: tuple[int, ...],
    cache: OutputCache | None,
    hardware: Accelerator,
    clock: Clock | None,
    meter: CostMeter,
) -> TeacherOutputs:
    """Return the teacher's outputs for the transfer set, computing those that are not in the cache.

    Args:
        looks: the views of an image that the teacher runs on. cache: None if they are too large for it: the teacher runs online.
        clock: measures the time, if there is one. meter: counts the outputs that are needed.
    """
    network = teacher.network
    needed = gibibytes(len(images), len(looks), network.width)
    if cache is None:
        logger.info(f"teacher outputs would take {needed:.2f} GiB, more than --cache-limit: the teacher runs online")
        return TeacherOutputs(images, network, teacher.head, settings, looks, None)
    logger.info(f"teacher outputs: {len(images):,} images x {len(looks)} views, {needed:.2f} GiB in {cache.folder}")
    share = (hardware.process_index, hardware.num_processes)
    with progress("targets", len(images) * len(looks)) as advance:
        tick = clock.ticking(advance) if clock and hardware.is_main_process else advance
        computed = compute_outputs(cache, network, images, looks, settings, tick, share)
    meter.output_bytes = 2 * network.width  # float16
    hardware.wait_for_everyone()
    for look in looks:
        meter.asked(look, b"transfer", len(images), computed if look == looks[0] else 0)
    return TeacherOutputs(images, network, teacher.head, settings, looks, {n: cache.table(images, n) for n in looks})


def projected_features(outputs: TeacherOutputs) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that looks up the features a student matches: the teacher's, of whole images, on their principal axes.

    Returns:
        positions (B,) -> (B, d) float32, or (B, d, h, w) if the teacher's features have a grid.
    """
    shape = outputs.network.shape
    few = SAMPLE // 8 if shape else SAMPLE  # a grid has many rows per image
    sample = np.sort(np.random.default_rng(0).permutation(len(outputs.images))[:few])
    mean, basis = principal_axes(as_rows(outputs.rows(sample), shape))

    def of(positions: np.ndarray) -> np.ndarray:
        features = (as_rows(outputs.rows(positions), shape) - mean) @ basis
        return np.moveaxis(features.reshape(len(positions), *shape[1:], -1), -1, 1) if shape else features

    return of


def member_outputs(folder: Path, grid: tuple[int, int] | None) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that looks up the predictions of the committee's students, read from the folder of the committee stage.

    Returns:
        positions (B,) -> (B, C) float32 log probabilities, or (B, C, *grid) if they have a grid.
    """
    import torch

    from tutelage.models.segmentation_grids import regrid

    kept = np.load(intact(folder / "students.npy"), mmap_mode="r")

    def of(positions: np.ndarray) -> np.ndarray:
        rows = np.asarray(kept[positions], np.float32)
        return rows if grid is None else regrid(torch.from_numpy(rows), grid).numpy()

    return of


def log_reduction(whole: AdaptedTeacher, reduced: AdaptedTeacher, images: Images, settings: ViewSettings) -> None:
    """Log the error of the loss that results from keeping logits on a coarser grid than the student's.

    The mean of | KL(p | q) - KL(p' | q) | over the pixels of some images: p are the teacher's probabilities, p' the same after storage
    on the coarser grid, and q those of the next image, which are about as far from p as an untrained student's.
    """
    few = np.arange(min(REDUCED, len(images)))

    def probabilities(one: AdaptedTeacher) -> np.ndarray:
        outputs = half_precision(run_network(one.network, images, few, CLEAN, settings), one.network.name)
        return softmax(np.moveaxis(one.head(outputs), 1, -1))

    p, r = probabilities(whole), probabilities(reduced)
    log_q = np.log(np.roll(p, 1, axis=0).clip(1e-6))
    losses = [(one * (np.log(one.clip(1e-12)) - log_q)).sum(axis=-1) for one in (p, r)]
    error = float(np.abs(losses[0] - losses[1]).mean())
    shape, kept = whole.network.shape, reduced.network.shape
    logger.info(
        f"teacher outputs are kept on a grid of {kept[1]} x {kept[2]} instead of {shape[1]} x {shape[2]} to stay within --cache-limit: "
        f"this changes the loss of a pixel by {error:.3f} on average; the loss itself is about {losses[0].mean():.3f}"
    )


def without_labels(task: TaskData) -> TaskData:
    """Return the task with its transfer set sorted by content hash, so that the order does not reveal which images are labelled."""
    order = np.argsort(as_void(task.transfer.keys), kind="stable")
    return replace(task, transfer=task.transfer.take(order))
