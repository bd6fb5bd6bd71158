"""The targets of a run: the adapted teacher's outputs, cached or online, and the committee's where there is one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tutelage.compute_cost import CostMeter
from tutelage.data.manifest import TaskData
from tutelage.distillation.targets import TeacherOutputs
from tutelage.errors import TutelageError
from tutelage.features.output_cache import OutputCache, as_void, compute_outputs, gibibytes, run_network
from tutelage.features.principal_axes import principal_axes
from tutelage.features.view_batches import CLEAN, ViewSettings, as_rows
from tutelage.metrics import log_softmax, softmax
from tutelage.models.adapted_teacher import AdaptedTeacher, half_precision
from tutelage.progress import progress, say
from tutelage.run_folder import Clock

REDUCED = 32  # images on which the error of a coarser grid is measured
SURE, SHARPEST = 0.8, 2.0
SAMPLE = 2048  # images whose features give the axes on which the student matches them


def teacher_outputs(
    task: TaskData, teacher: AdaptedTeacher, settings: ViewSettings, looks: tuple[int, ...], cache_limit: float, cache_dir: Path,
    hardware: Any, clock: Clock, meter: CostMeter,
) -> TeacherOutputs:  # fmt: skip
    """Compute the teacher's outputs for the transfer set, or find them in the cache.

    Args:
        looks: the views of an image that the teacher is asked about. cache_limit: GiB of outputs, above which the teacher runs online.
        clock: takes the time. meter: takes the outputs that are needed.
    """
    network, images = teacher.network, task.transfer
    needed = gibibytes(len(images), len(looks), network.width)
    if needed > cache_limit:
        say(
            f"teacher outputs would take {needed:.2f} GiB, more than --cache-limit {cache_limit:g}: the teacher runs online"
        )
        return TeacherOutputs(images, network, teacher.head, settings, looks, None)
    say(f"teacher outputs: {len(images):,} images x {len(looks)} views, {needed:.2f} GiB in {cache_dir}")
    cache = OutputCache(cache_dir, network, settings.resize, task.side)
    share = (hardware.process_index, hardware.num_processes)
    with progress("targets", len(images) * len(looks)) as advance:
        tick = clock.ticking(advance) if hardware.is_main_process else advance
        computed = compute_outputs(cache, network, images, looks, settings, tick, share)
    meter.output_bytes = 2 * network.width  # float16
    hardware.wait_for_everyone()
    for look in looks:
        meter.asked(look, b"transfer", len(images), computed if look == looks[0] else 0)
    return TeacherOutputs(images, network, teacher.head, settings, looks, {n: cache.table(images, n) for n in looks})


def projected_features(outputs: TeacherOutputs) -> Callable[[np.ndarray], np.ndarray]:
    """The features that a student matches: the teacher's, of whole images, on their principal axes.

    Returns:
        positions (B,) -> (B, d) float32, or (B, d, h, w) where the teacher's features have a grid.
    """
    shape = outputs.network.shape
    few = SAMPLE // 8 if shape else SAMPLE  # a grid has many rows an image
    sample = np.sort(np.random.default_rng(0).permutation(len(outputs.images))[:few])
    mean, basis = principal_axes(as_rows(outputs.rows(sample), shape))

    def of(positions: np.ndarray) -> np.ndarray:
        features = (as_rows(outputs.rows(positions), shape) - mean) @ basis
        return np.moveaxis(features.reshape(len(positions), *shape[1:], -1), -1, 1) if shape else features

    return of


@dataclass(frozen=True)
class Mixture:
    """How the committee's members are mixed: p ~ (teacher^(1 - weight) students^weight)^(sharpness / temperature).

    weight: of the students, in [0, 1]. temperature: calibrated on held-out labels. sharpness: beyond what is calibrated.
    """

    weight: float = 0.0
    temperature: float = 1.0
    sharpness: float = 1.0

    @classmethod
    def of(cls, members: dict[str, Any], committee: str, sharpness: float = 1.0) -> Mixture:
        """The mixture that a committee's result stands for. committee: "auto", or "only" for the students alone.

        Raises:
            TutelageError: the students alone are asked for, and there are none.
        """
        if committee != "only":
            return cls(members["weight"], members["temperature"], sharpness)
        if not members["folds"]:
            raise TutelageError(
                "--committee only needs a class with two labels or more: no class has labels to hold out, so there is no committee",
                "label more images, or use --committee auto",
            )
        return cls(1.0, members["students_temperature"], sharpness)

    def __call__(self, teacher: np.ndarray, students: np.ndarray | None) -> np.ndarray:
        """Log probabilities (B, C) or (B, C, h, w) float32 of both -> mixed ones; without students the teacher's alone."""
        mixed = teacher if students is None else (1 - self.weight) * teacher + self.weight * students
        return log_softmax(mixed * np.float32(self.sharpness / self.temperature))


def sharpness_of(log_probabilities: np.ndarray) -> float:
    """How much sharper than calibrated the targets are made: until their largest probability is SURE on the mean, 1 to SHARPEST.

    Targets calibrated on few labels are flat where the teacher is unsure, and a student of few steps does not get from them to a
    decision; where they are sure already, sharper ones are only learnt by heart.

    Args:
        log_probabilities: (n, C) float32 of some images, or (n, C, h, w).
    """

    def sure(sharpness: float) -> float:
        return float(np.exp(log_softmax(log_probabilities * np.float32(sharpness))).max(axis=1).mean())

    return min(np.linspace(1, SHARPEST, 21).tolist(), key=lambda one: abs(sure(one) - SURE))


def member_outputs(folder: Path, grid: tuple[int, int] | None) -> Callable[[np.ndarray], np.ndarray]:
    """What the committee's students predict, as its stage left it in a folder.

    Returns:
        positions (B,) -> (B, C) float32 log probabilities, or (B, C, *grid) where they have a grid.
    """
    import torch

    from tutelage.models.segmentation_grids import regrid

    kept = np.load(folder / "students.npy", mmap_mode="r")

    def of(positions: np.ndarray) -> np.ndarray:
        rows = np.asarray(kept[positions], np.float32)
        return rows if grid is None else regrid(torch.from_numpy(rows), grid).numpy()

    return of


def tell_reduction(whole: AdaptedTeacher, reduced: AdaptedTeacher, images: Any, settings: ViewSettings) -> float:
    """Say by how much the loss is off when logits are kept on a coarser grid than the student's; the same is returned.

    The mean of | KL(p | q) - KL(p' | q) | over the pixels of some images, p the teacher's probabilities, p' what is left of them on
    the coarser grid, and q those of the next image, which is as far from p as an untrained student's.
    """
    few = np.arange(min(REDUCED, len(images)))
    p, r = (
        softmax(
            np.moveaxis(one.head(half_precision(run_network(one.network, images, few, CLEAN, settings), "")), 1, -1)
        )
        for one in (whole, reduced)
    )
    log_q = np.log(np.roll(p, 1, axis=0).clip(1e-6))
    losses = [(one * (np.log(one.clip(1e-12)) - log_q)).sum(axis=-1) for one in (p, r)]
    error = float(np.abs(losses[0] - losses[1]).mean())
    shape, kept = whole.network.shape, reduced.network.shape
    say(
        f"teacher outputs are kept on a grid of {kept[1]} x {kept[2]} instead of {shape[1]} x {shape[2]} to stay within --cache-limit: "
        f"the loss of a pixel is off by {error:.3f} on the mean, of {losses[0].mean():.3f}"
    )
    return error


def without_labels(task: TaskData) -> TaskData:
    """The task with its transfer set in the order of the images' content: it does not tell which of them are labelled."""
    order = np.argsort(as_void(task.transfer.keys), kind="stable")
    return replace(task, transfer=task.transfer.take(order), transfer_ids=[task.transfer_ids[i] for i in order])
