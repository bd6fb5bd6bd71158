"""What all stages do at their beginning: open the run folder, hold its lock, claim its settings, find the cache."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tutelage.device import check_group
from tutelage.errors import TutelageError
from tutelage.pipeline.preflight import WITHOUT_TARGETS, preflight
from tutelage.progress import main_process, processes, say
from tutelage.run_folder import Run, atomic_write, read_json, write_text
from tutelage.tasks import task_of

HELD_OUT_LOGITS = "validation.npz"  # of the teacher, calibrated, for labelled images that its head had not met
HELD_OUT = "held_out.npz"  # beside the student's weights: how sure it was of images it had not been fine-tuned on

# What the baseline shares with the distilled student: another value of these makes it another baseline.
_BASELINE = frozenset((
    "student", "student_weights", "student_size", "decoder", "epochs", "steps", "batch_size", "lr", "class_weight", "resize",
    "flip", "crop_area", "view_seed", "seed",
))  # fmt: skip
_ANY: frozenset[str] = frozenset()
# setting that only this stage has -> what --overwrite moves aside: its folder and those of the stages after it
_LATER = {
    "adapt": {
        "teacher": _ANY,
        "committee": _ANY,
        "transfer": _ANY,
        "student": _ANY,
        "alone": _BASELINE,
        "report": _ANY,
    },
    "objective": {"committee": _BASELINE, "transfer": _ANY, "student": _ANY, "alone": _BASELINE, "report": _ANY},
    "finetune": {"student": _ANY, "report": _ANY},
    "cache_limit": {"committee": _ANY, "transfer": _ANY, "student": _ANY, "alone": _BASELINE, "report": _ANY},
    "student": {"alone": _ANY, "student": _ANY, "report": _ANY},
}
_HELD: dict[Path, Run] = {}  # run folders that this process holds already: `run` calls the stages inside its own lock


@contextlib.contextmanager
def open_run(
    out: str, cache: str | None, settings: dict[str, Any], overwrite: bool, together: bool = False
) -> Iterator[tuple[Run, Path]]:
    """Hold a run folder for the length of a stage.

    Args:
        out: the folder. cache: of decoded images and teacher outputs; None means cache/ beside the run folder.
        settings: of the stage, by name; all that cannot work is reported before anything is read or written. Refused when
            the folder holds a run with other ones.
        overwrite: move a run with other settings aside; a later stage moves its own results and those that follow.
        together: whether several processes may do this, one of which holds the folder.

    Yields:
        the run, and the cache folder.

    Raises:
        TutelageError: several processes where one is wanted, or that cannot find each other, and all that cannot work.
    """
    path = Path(out).absolute()
    if processes() > 1 and not together and path not in _HELD:
        raise TutelageError(
            f"running this stage in {processes()} processes (WORLD_SIZE in the environment) is not supported: "
            "only `tutelage run` and `tutelage transfer` share their work among several",
            "leave torchrun out, or unset WORLD_SIZE (`tutelage curate --shard env` embeds a gallery on several machines)",
        )
    check_group()
    cache_dir = Path(cache) if cache else path.parent / "cache"
    if path in _HELD or not main_process():
        yield _HELD.get(path) or Run(path), cache_dir
        return
    if settings:
        preflight({**settings, "out": out}, cache_dir)
    with Run(path) as run:
        if old := run.claim(_used(run, settings), overwrite, _moved_by(settings)):
            say(f"the run that was in {out}, or the part that is made anew, is now in {old}")
        _HELD[path] = run
        try:
            yield run, cache_dir
        finally:
            del _HELD[path]


def _moved_by(settings: dict[str, Any]) -> dict[str, frozenset[str]] | None:
    """The folders that a stage makes anew, as `Run.claim` takes them; None for `run` and `curate`: all."""
    if "target" in settings:
        return None
    return next((folders for name, folders in _LATER.items() if name in settings), {})


def _used(run: Run, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that change something in a stage, by the folder's task: the others are not compared with another stage's."""
    result = read_json(run.path / "transfer_set" / "result.json") or {}
    kind = task_of(settings.get("task") or result.get("task", "classification"))
    return {name: value for name, value in settings.items() if name not in kind.UNUSED}


def judged_by(run: Run) -> dict[str, Any]:
    """What `--pilot` has found; empty where it has not run, or for another transfer set."""
    found = read_json(run.path / "pilot" / "result.json") or {}
    return {} if run.outdated(found) else found


def save_weights(path, state) -> None:
    """Write a state dict as safetensors."""
    from safetensors.torch import save_file

    with atomic_write(path) as temporary:
        save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, temporary)


def file_hash(path) -> str:
    """SHA-256 (hex) of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


class MetricsLog:
    """metrics.jsonl, and a tracker of accelerate's when one is asked for. Only the main process writes."""

    def __init__(self, path, start: int, tracker: str, run_path, hardware):
        self.last: float | None = None
        self._path, self._hardware, self._tracker = path, hardware, tracker if hardware.is_main_process else "none"
        if hardware.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = path.read_text(encoding="utf-8", errors="replace").splitlines() if start and path.exists() else []
            write_text(path, "".join(f"{row}\n" for row in rows if _step_of(row) <= start))
        if tracker != "none":
            from accelerate.tracking import filter_trackers

            hardware.log_with = filter_trackers([tracker], str(run_path / "trackers"))
            hardware.project_configuration.set_directories(str(run_path / "trackers"))
            hardware.init_trackers(f"{run_path.name}-{path.parent.name}")

    def write(self, row: dict[str, Any]) -> None:
        """Add one row of numbers."""
        self.last = row["loss"]
        if self._hardware.is_main_process:
            with self._path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        if self._tracker != "none":
            self._hardware.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def close(self) -> None:
        """End the tracker."""
        if self._tracker != "none":  # accelerate's end_training would end the process group too
            for one in self._hardware.trackers:
                one.finish()
            self._hardware.trackers.clear()


def write_metrics(run: Run, stage: str, rows: Sequence[dict[str, Any]], tracker: str, hardware: Any) -> None:
    """metrics.jsonl of a stage that begins anew after a stop, and the tracker's; none where nothing was trained in steps.

    Args:
        stage: its folder. rows: with step, loss and rate.
    """
    path = run.path / stage / "metrics.jsonl"
    path.unlink(missing_ok=True)
    if rows:
        log = MetricsLog(path, 0, tracker, run.path, hardware)
        for row in rows:
            log.write(row)
        log.close()


def _step_of(row: str) -> float:
    """The step of one row; infinity for what is no whole row: a full disk leaves half a line."""
    try:
        return json.loads(row)["step"]
    except (ValueError, TypeError, KeyError):
        return float("inf")


def default_epochs(count: int, images: int) -> int:
    """Passes over a transfer set of `count` images where nothing is asked for: `images` in all, at least 4 passes, at most 100."""
    return int(min(100, max(4, round(images / count))))


def training_steps(settings: dict[str, Any], count: int, images: int) -> int:
    """Optimizer steps on a transfer set of `count` images: as asked for, or as many as the passes over it take; at least 1.

    Args:
        settings: steps, epochs, batch_size. images: that are seen where neither steps nor passes are asked for; the task says how many.
    """
    steps, epochs, batch_size = (settings[name] for name in ("steps", "epochs", "batch_size"))
    return steps or max(1, round((epochs or default_epochs(count, images)) * count / batch_size))


def needed(names: Sequence[str], settings: dict[str, Any]) -> list[str]:
    """These stages without the committee, where nothing asks for one."""
    without = settings["objective"] in WITHOUT_TARGETS or settings["committee"] == "none"
    return [name for name in names if name != "committee" or not without]


def settings_of(stage: Callable[..., Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The part of a run's settings that a stage takes; they are checked already, so without the file they may come from."""
    names = inspect.signature(stage).parameters
    return {name: settings[name] for name in names if name in settings and name != "config"}


def checkpoint_steps(steps: int, batch_size: int) -> int:
    """Steps between two checkpoints: an eighth of the way, and at most 60,000 images (a minute or two on a CPU)."""
    return max(1, min(steps // 8, 60_000 // batch_size))
