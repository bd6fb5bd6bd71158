"""The transfer set of a run as a torch Dataset: new views of each image, its target, and its label if it has one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from tutelage.custom_loop.student import Preprocess
from tutelage.data.manifest import load_task
from tutelage.data.masks import IGNORE
from tutelage.distillation.targets import Targets
from tutelage.errors import TutelageError
from tutelage.features.view_batches import view_input, view_truth
from tutelage.image_size import Size, sides
from tutelage.results import CurationResult
from tutelage.run_folder import Run
from tutelage.settings import declared
from tutelage.settings.command_flags import DistillSettings

UNLABELLED = -1


class DistillationItem(NamedTuple):
    """One view of one image.

    view: (3, H, W) float32, normalised. target: (C,) float32 class probabilities, softened by the run's --temperature (1 by default); of
    masks (C, h, w), cropped like the view. label: () int64 class, -1 without a label; of masks (H, W) int64, -1 for pixels without one.
    """

    view: torch.Tensor
    target: torch.Tensor
    label: torch.Tensor


class DistillationDataset(Dataset[DistillationItem]):
    """The transfer set of a run with the views and targets that `tutelage distill` trains on, for a loop of one's own.

    Item i in epoch e is view e of image i: in every epoch another region, flip and colour, at every call the same (but for the last
    bit, which depends on what else is in the batch). Labelled images come first. Outputs of the adapted teacher that the cache lacks
    are computed; nothing is written into the run folder. With accelerate, construct the dataset before the `Accelerator`.

    Args:
        run: run folder, after `curate`, `adapt` and usually `committee`.
        student: name whose mean and standard deviation normalise the views; None for the run's student.
        size: of the views, pixels or "HEIGHTxWIDTH"; None for that of the run's student.
        committee: "auto", the committee's probabilities; "none", the adapted teacher's; "only", those of the labels-only students. None:
            as the run distils; after `curate` and `adapt` alone, "none".
        cache: folder of decoded images and teacher outputs; None: cache/ beside the run.

    Attributes:
        classes: C names. labelled: number of labelled images. preprocess: turns whole images into input of this size, for evaluation.

    Raises:
        TutelageError: a stage is not finished, images are gone or have changed, or the teacher's outputs exceed the run's --cache-limit.
    """

    def __init__(
        self,
        run: str | Path,
        *,
        student: str | None = None,
        size: Size | None = None,
        committee: Literal["auto", "none", "only"] | None = None,
        cache: str | Path | None = None,
    ):
        from tutelage.commands.distill import distillation_of, targets_of
        from tutelage.compute_cost import CostMeter
        from tutelage.device import accelerator
        from tutelage.models.teachers import input_statistics, resolve, size_of

        folder = Run(Path(run).absolute())
        curated = CurationResult(**folder.result("curate", "DistillationDataset"))
        settings = _settings(folder, student, size, committee)
        self._run, self._cache = folder.path, Path(cache) if cache else folder.path.parent / "cache"
        job = distillation_of(folder, self._cache, settings)
        if job.level is None:
            message = f"{run}: the teacher's outputs exceed --cache-limit {settings.cache_limit}, and are not kept"
            raise TutelageError(message, "run `tutelage committee` again with a larger --cache-limit")
        task, hardware = load_task(self._run, self._cache), accelerator(settings.device, settings.precision)
        self._targets, self._labels = targets_of(job, task, hardware, None, CostMeter()), task.train.labels
        self._temperature = settings.temperature
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # also changes in workers that live on
        self.classes, self.labelled = task.classes, len(task.train)
        statistics = input_statistics(resolve(settings.student, "student"))
        self.preprocess = Preprocess(
            size_of(settings, "student"), *statistics, folder.chosen()["resize"], curated.store_side
        )

    def set_epoch(self, epoch: int) -> None:
        """Choose the views of the next pass, from 0 up, as DistributedSampler.set_epoch chooses its order."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self._targets.images)

    def __getitem__(self, position: int) -> DistillationItem:
        return self.__getitems__([range(len(self))[position]])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[DistillationItem]:
        """Return several items, computed together; a DataLoader gets its batches here."""
        batch = self.batch(positions, [int(self._epoch)] * len(positions))
        return [DistillationItem(*one) for one in zip(*batch, strict=True)]

    def batch(self, positions: Sequence[int] | np.ndarray, epochs: Sequence[int] | np.ndarray) -> DistillationItem:
        """Return items of any epochs as one batch: view (B, 3, H, W), target (B, C) or (B, C, h, w), label (B,) or (B, H, W).

        Args:
            positions, epochs: B integers each.
        """
        at, passes = np.asarray(positions, np.int64), np.asarray(epochs, np.int64)
        at = np.where(at < 0, at + len(self), at)
        images, views, shape = self._targets.images, self._targets.settings, sides(self.preprocess.size)
        targets = torch.from_numpy(self._targets.probabilities(at, passes, self._temperature))
        masks, known = not isinstance(self._labels, np.ndarray), at < self.labelled
        labels = torch.full((len(at), *(shape if masks else ())), IGNORE if masks else UNLABELLED)
        if known.any():
            labels[torch.from_numpy(known)] = view_truth(images, self._labels, at[known], passes[known], views, shape)
        labels = labels.masked_fill(labels == IGNORE, UNLABELLED) if masks else labels
        return DistillationItem(view_input(images, at, passes, views, self.preprocess), targets, labels)

    def __getstate__(self) -> dict[str, Any]:
        """Return what workers that are not forked need: the targets as rows, without the teacher and the pixels."""
        every, targets = np.arange(len(self)), self._targets
        rows = np.concatenate([targets.log_probabilities(every[i : i + 1024]) for i in range(0, len(self), 1024)])
        state = {**vars(self), "_kept": (targets.settings, rows)}
        return {name: one for name, one in state.items() if name not in ("_targets", "_labels")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        views, rows = state.pop("_kept")
        vars(self).update(state)
        task = load_task(self._run, self._cache)
        self._labels = task.train.labels
        self._targets = Targets(task.transfer, views, rows.__getitem__)


def _settings(run: Run, student: str | None, size: Size | None, committee: str | None) -> DistillSettings:
    """Return the settings with which `distill` would prepare the run's targets; arguments that are not None replace the run's."""
    there = (run.path / "committee" / "result.json").exists()
    given = {"student": student, "student_size": size, "committee": committee}
    chosen: dict[str, Any] = {"committee": "auto" if there else "none"}
    for settings in (run.chosen(), given):
        chosen |= {name: one for name, one in settings.items() if one is not None and name in declared(DistillSettings)}
    return replace(DistillSettings(**chosen), objective="task-oriented", feature_weight=0.0)
