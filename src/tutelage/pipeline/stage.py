"""What every stage does at its start: open the run folder, take its lock, claim its settings, find the cache."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tutelage.device import check_group
from tutelage.errors import TutelageError
from tutelage.files import atomic_write, write_text
from tutelage.json_object import JSON
from tutelage.pipeline.preflight import preflight
from tutelage.progress import logger, main_process, processes
from tutelage.regular_file import json_of
from tutelage.results import StageResult
from tutelage.run_folder import Run
from tutelage.settings.command_flags import WITHOUT_TARGETS, Curation, DistillSettings, EvaluateSettings, ExportSettings
from tutelage.settings.shared_flags import Group, Schedule, Stage
from tutelage.tasks import task_of

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

HELD_OUT_LOGITS = "validation.npz"  # teacher's calibrated logits of images that its head was not trained on
HELD_OUT = "held_out.npz"  # beside the student's weights: its confidence on images that it was not fine-tuned on

# Settings that the baseline shares with the distilled student: another value of any of them makes another baseline.
_BASELINE = frozenset((
    "student", "student_weights", "student_size", "decoder", "epochs", "steps", "batch_size", "lr", "class_weight", "resize",
    "flip", "crop_area", "view_seed", "seed", "precision",
))  # fmt: skip
_ANY: frozenset[str] = frozenset()
# setting that only this stage has -> what --overwrite moves aside: the stage's folder and those of later stages
_SCORES = {"evaluate": _ANY, "report": _ANY}
_LATER = {
    "adapt": {"adapt": _ANY, "committee": _ANY, "distill": _ANY, "finetune": _ANY, "baseline": _BASELINE, **_SCORES},
    "objective": {"committee": _BASELINE, "distill": _ANY, "finetune": _ANY, "baseline": _BASELINE, **_SCORES},
    "finetune": {"finetune": _ANY, **_SCORES},
    "cache_limit": {"committee": _ANY, "distill": _ANY, "finetune": _ANY, "baseline": _BASELINE, **_SCORES},
    "student": {"baseline": _ANY, "finetune": _ANY, **_SCORES},
}
_HELD: dict[Path, Run] = {}  # folders that this process has locked: `run` calls the stages inside its own lock


@contextlib.contextmanager
def open_run(settings: Stage | EvaluateSettings | ExportSettings, together: bool = False) -> Iterator[tuple[Run, Path]]:
    """Hold the lock of a run folder for the duration of a stage, or of a command that only reads a finished run.

    Args:
        settings: they name the run folder, and the cache folder if it is not cache/ beside it. Those of a stage are checked: all faults are
            reported before anything is read or written. They are refused when the folder holds a run with different ones, unless
            `overwrite` is among them: a run is then moved aside, by a later stage only its own results and later ones.
        together: whether several processes may run this stage, one of which holds the lock.

    Yields:
        the run, and the cache folder.

    Raises:
        TutelageError: several processes where only one is supported, or that cannot reach each other; settings that cannot work.
    """
    stage = settings if isinstance(settings, Stage) else None
    out = settings.out if isinstance(settings, Stage) else settings.run
    path = Path(os.path.abspath(out))  # without .., beside whose name nothing could be put
    if processes() > 1 and not together and path not in _HELD:
        raise TutelageError(
            f"running this stage in {processes()} processes (WORLD_SIZE in the environment) is not supported: "
            "only `tutelage run` and `tutelage distill` share their work among several",
            "leave torchrun out, or unset WORLD_SIZE (`tutelage curate --shard env` embeds a gallery on several machines)",
        )
    check_group()
    cache_dir = Path(settings.cache) if settings.cache else path.parent / "cache"
    if path in _HELD or not main_process():
        yield _HELD.get(path) or Run(path), cache_dir
        return
    if stage:
        preflight(stage, cache_dir)
    with Run(path) as run:
        if stage and (old := run.claim(_used(run, stage), stage.overwrite, _moved_by(stage))):
            logger.info(f"the previous run in {out}, or the part of it that is redone, is now in {old}")
        _HELD[path] = run
        try:
            yield run, cache_dir
        finally:
            del _HELD[path]


def _moved_by(settings: Stage) -> dict[str, frozenset[str]] | None:
    """Return the folders that a stage redoes, in the form that `Run.claim` takes; None (all folders) for `run` and `curate`."""
    if isinstance(settings, Curation):
        return None
    return next((folders for name, folders in _LATER.items() if hasattr(settings, name)), {})


def _used(run: Run, settings: Stage) -> JSON:
    """Return the settings that the folder's task uses; the others are not compared with those of earlier stages."""
    result = run.kept("curate") or {}
    kind = task_of(getattr(settings, "task", None) or result.get("task", "classification"))
    return {name: value for name, value in vars(settings).items() if name not in kind.UNUSED}


class PilotResult(StageResult):
    """Result of `run --pilot`. distilled, baseline: accuracies on held-out images. gain: of the baseline over the distilled student."""

    images: int
    distilled: float
    baseline: float
    gain: float
    standard_error: float


def judged_by(run: Run) -> PilotResult | None:
    """Return the result of `--pilot`; None if it has not run, or ran on another transfer set."""
    found = run.kept("pilot")
    return PilotResult(**found) if found and not run.outdated(found) else None


def save_weights(path: Path, module: nn.Module) -> None:
    """Write a network's weights as safetensors; weights that layers share are written for each."""
    from safetensors.torch import save_file

    with atomic_write(path) as temporary:
        save_file(
            {name: one.detach().cpu().contiguous().clone() for name, one in module.state_dict().items()}, temporary
        )


class MetricsLog:
    """Writer of metrics.jsonl, and of one of accelerate's trackers if asked for. Only the main process writes."""

    def __init__(self, path: Path, start: int, tracker: str, run_path: Path, hardware: Accelerator):
        self.last: float | None = None
        self._path, self._hardware, self._tracker = path, hardware, tracker if hardware.is_main_process else "none"
        if hardware.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = path.read_text(encoding="utf-8", errors="replace").splitlines() if start and path.is_file() else []
            write_text(path, "".join(f"{row}\n" for row in rows if _step_of(row) <= start))
        if tracker != "none":
            from accelerate.tracking import filter_trackers

            hardware.log_with = filter_trackers([tracker], str(run_path / "trackers"))
            hardware.project_configuration.set_directories(str(run_path / "trackers"))
            hardware.init_trackers(f"{run_path.name}-{path.parent.name}")

    def write(self, row: JSON) -> None:
        """Append one row of numbers."""
        self.last = row["loss"]
        if self._hardware.is_main_process:
            with self._path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        if self._tracker != "none":
            self._hardware.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def close(self) -> None:
        """Close the tracker."""
        if self._tracker != "none":  # accelerate's end_training would end the process group too
            for one in self._hardware.trackers:
                one.finish()
            self._hardware.trackers.clear()


def write_metrics(run: Run, stage: str, rows: Sequence[JSON], tracker: str, hardware: Accelerator) -> None:
    """Write metrics.jsonl, and the tracker's log, of a stage that restarts from its beginning; nothing where no steps were trained.

    Args:
        stage: name of its folder. rows: dicts with step, loss and rate.
    """
    path = run.path / stage / "metrics.jsonl"
    path.unlink(missing_ok=True)
    if rows:
        log = MetricsLog(path, 0, tracker, run.path, hardware)
        for row in rows:
            log.write(row)
        log.close()


def _step_of(row: str) -> float:
    """Return the step of one row; infinity for an incomplete row: a full disk leaves half a line."""
    try:
        return json_of(row)["step"]
    except (ValueError, TypeError, KeyError):
        return float("inf")


def training_steps(settings: Schedule, count: int, images: int) -> int:
    """Return the optimizer steps on a transfer set of `count` images: as set, or as many as its passes take; at least 1.

    Args:
        images: number of images shown where neither steps nor epochs are set; each task defines it.
    """
    epochs = settings.epochs or min(100, max(4, round(images / count)))
    return settings.steps or max(1, round(epochs * count / settings.batch_size))


def needed(names: Sequence[str], settings: DistillSettings) -> list[str]:
    """Return these stages, without the committee if the objective or --committee needs none."""
    without = settings.objective in WITHOUT_TARGETS or settings.committee == "none"
    return [name for name in names if name != "committee" or not without]


def settings_of(stage: Callable[..., object], settings: Group) -> JSON:
    """Return the part of a run's settings that a stage takes; they are already checked, so the config file is left out."""
    taken = inspect.signature(stage).parameters
    return {name: one for name, one in vars(settings).items() if name in taken and name != "config"}


def checkpoint_steps(steps: int, batch_size: int) -> int:
    """Return the steps between two checkpoints: an eighth of all, and at most 60,000 images (a minute or two on a CPU)."""
    return max(1, min(steps // 8, 60_000 // batch_size))
