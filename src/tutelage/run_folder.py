"""The run folder: its settings, the results of its stages, and its lock.

A stage is done when its result.json holds the hash of its inputs.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import filelock

from tutelage.environment import threads, versions
from tutelage.errors import TutelageError, shown
from tutelage.files import (
    damaged,
    file_hash,
    hash_of,
    no_room,
    read_json,
    remove_leftovers,
    temporary_beside,
    toml,
    toml_of,
    unused_beside,
    write_json,
    write_text,
)
from tutelage.json_object import JSON
from tutelage.regular_file import bytes_in, text_in
from tutelage.settings import declared, resolve
from tutelage.settings.command_flags import FREE
from tutelage.settings.shared_flags import Views
from tutelage.settings.stored import DEFAULT, same_place, stored

SETTINGS = "settings.toml"
FORMER = "transfer_set"  # folder of the first stage before it had the name of its command
LOCK = ".lock"
HOLDER = re.compile(rb"tutelage, process (\d+)")  # what the lock of a run says
TRAINED = ("curate", "adapt", "committee", "distill", "baseline", "finetune")  # stages that runs of a study share
STAGES = (*TRAINED, "evaluate")  # commands of a run, each with a folder of its name that holds its result.json
STUDY = "study.toml"  # marks a study's folder, whose runs (METHOD/budget-N/seed-N) share stages with the same inputs
KEPT = (".safetensors", ".npy", ".npz", ".parquet", ".json")  # files of a stage whose hashes are kept with its result
BESIDE = {"curate": ("target_set", "rejected.csv")}  # stage -> what it writes outside its own folder
TABLES = {"adapt": "teacher", "curate": "data"}  # stage -> its table in settings.toml, about model or data
# Free until this stage is finished: a student is not bit-identical if its teacher ran online, not from the cache.
HELD = {"cache_limit": "distill"}


def folder_name(method: str) -> str:
    """Return the name of a method in file paths: METHOD+LABEL for a variant, since not every file system allows a colon."""
    return method.replace(":", "+")


def check_owner(folder: Path) -> None:
    """Check that a folder is missing, empty or a run's, before anything is written to it.

    What makes it a run's is what tutelage writes first: a lock that names tutelage, or settings that name its version.

    Raises:
        TutelageError: it holds other files, or the lock of another program.
    """
    if not folder.is_dir():
        return
    lock = b""
    try:
        lock = bytes_in(folder / LOCK)
    except (FileNotFoundError, PermissionError):  # Windows lets nobody else read a lock that is held
        pass
    except OSError as error:  # no file
        message = f"--out {folder} contains a .lock that cannot be read: {error.strerror}"
        raise TutelageError(message, "choose another --out") from error
    run = bool(HOLDER.fullmatch(lock)) or _names_tutelage(folder / SETTINGS)
    if lock and not HOLDER.fullmatch(lock) and not (run and lock.isdigit()):
        message = f"--out {folder} contains a .lock file that belongs to another program"
        raise TutelageError(message, "choose another --out")
    if not run and (others := sorted(name for name in os.listdir(folder) if not name.startswith("."))):
        hint = f"use a new or empty folder, such as --out {folder / 'run'}, or the folder of a run"
        raise TutelageError(f"--out {folder} contains other files, such as {others[0]}", hint)


def _names_tutelage(settings: Path) -> bool:
    try:
        return "tutelage" in toml_of(text_in(settings)).get("versions", {})
    except (OSError, ValueError, TypeError):
        return False


class Run:
    """A run folder, locked by one process at a time."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._lock = filelock.FileLock(self.path / LOCK, preserve_lock_file=True)

    def __enter__(self) -> Self:
        """Create the folder and take its lock, which the system releases when the process is killed. A folder that cannot be written, a
        lock that another process holds, and files that are no run's are errors."""
        lock = self.path / LOCK
        try:
            check_owner(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0.5, poll_interval=0.05)  # the workers of a killed process end a moment after it
        except filelock.Timeout as error:
            holder = None
            with contextlib.suppress(OSError):  # Windows lets nobody else read it
                holder = HOLDER.fullmatch(bytes_in(lock))
            message = f"--out {self.path} is in use by process {holder[1].decode() if holder else 'unknown'}"
            raise TutelageError(message, "wait until it ends, or choose another --out") from error
        except OSError as error:
            if no_room(error, self.path):
                raise
            message = f"--out {self.path} is not a writable folder: {error.strerror}"
            raise TutelageError(message, "choose another --out") from error
        with contextlib.suppress(OSError):  # the process id only informs people; a full disk must not stop the run here
            lock.write_text(f"tutelage, process {os.getpid()}")
        remove_leftovers(self.path)
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    # Settings

    def settings(self) -> JSON:
        """Return the content of settings.toml; an empty dict in a new folder."""
        self._check_version()
        try:
            found = toml_of(text_in(self.path / SETTINGS))
            if odd := [name for name, table in found.items() if not isinstance(table, dict)]:
                raise ValueError(f"{shown(odd)} is not a table")
            if lost := {"settings", "versions", "machine"} - found.keys():  # written together
                raise ValueError(f"it lacks {shown(sorted(lost))}")
            return found
        except FileNotFoundError:
            return {}
        except (ValueError, OSError) as error:  # no TOML, no text, no file
            message = f"{self.path / SETTINGS} is not as tutelage wrote it: {getattr(error, 'strerror', None) or error}"
            raise TutelageError(message, "restore it, or run `tutelage run ... --overwrite`") from error

    def chosen(self) -> JSON:
        """Return the settings of the run, without those that are left to their default."""
        kept = {name: value for name, value in self.settings().get("settings", {}).items() if value != DEFAULT}
        try:
            resolve(Views, {name: value for name, value in kept.items() if name in declared(Views)})
        except TutelageError as error:
            raise damaged(self.path / SETTINGS, str(error).partition("\n")[0]) from error
        return {"resize": "squash"} | kept

    def claim(self, settings: JSON, overwrite: bool, stages: dict[str, frozenset[str]] | None = None) -> Path | None:
        """Write the settings; refuse when the folder holds a run with different ones.

        Settings that the folder does not hold yet are added: each stage's command brings its own. While no stage is
        finished, different values replace the old ones, so a setting can be corrected after an error in the same folder.

        Args:
            settings: resolved settings by name.
            overwrite: move the old run aside instead of refusing.
            stages: folder -> the settings whose change moves it (an empty set: any change), for a stage that keeps the
                results of earlier stages; None moves the whole run.

        Returns:
            the folder that now holds the old run, or the moved part of it; None if nothing was moved.
        """
        old = None
        try:
            before = self.settings().get("settings", {})
        except TutelageError:
            if not overwrite:
                raise
            old, before = self.move_aside(None if stages is None else [*stages, SETTINGS]), {}
        mine = {name: stored(name, value) for name, value in settings.items()}
        differing = {
            name: f"{name}: {before[name]} -> {value}"
            for name, value in sorted(mine.items())
            if not self._free(name) and not same_place(stored(name, before.get(name, value)), value)
        }
        if differing and not self._begun():
            before, differing = {}, {}
        if differing and not overwrite:
            way = "another --out, or --overwrite to move the old run aside"
            if stages is not None:
                way = f"--overwrite to move {', '.join(stages)} aside and redo them, or curate in another --out"
            raise TutelageError(
                f"--out {self.path} holds a run with other settings: {shown(differing.values(), 12)}",
                f"use the same settings to resume or reuse it, {way}",
            )
        if differing and stages is None:
            old, before = self.move_aside(), {}
        elif differing and stages:
            old = self.move_aside([name for name, named in stages.items() if not named or named & differing.keys()])
        made, known = {"versions": versions(), "machine": {"threads": threads()}}, self.settings()
        if self._begun():  # keep the versions and threads of the first start
            made = {name: known.get(name, one) for name, one in made.items()}
        self.update_settings({"settings": {**before, **mine}, **made})
        return old

    def update_settings(self, tables: JSON) -> None:
        """Merge tables (versions, data hashes, models) into settings.toml."""
        now = self.settings()
        merged = now | {name: {**now.get(name, {}), **table} for name, table in tables.items()}
        if merged != now:
            write_text(self.path / SETTINGS, toml(merged))

    def move_aside(self, names: Sequence[str] | None = None) -> Path | None:
        """Move the run's files, or those with these names, to a folder beside the run folder; nothing is deleted.

        Returns:
            the folder that now holds them, with a copy of their settings; None when there was nothing to move.
        """
        moved = [item for item in self.path.iterdir() if item.name != LOCK and (names is None or item.name in names)]
        if names is not None and not moved:
            return None
        old = unused_beside(self.path, "old")
        old.mkdir()
        if names is not None and (self.path / SETTINGS).exists():
            shutil.copy(self.path / SETTINGS, old)
        for item in moved:
            item.rename(old / item.name)
        return old

    def copy_aside(self) -> Path:
        """Copy the run, without its checkpoints, to a folder beside it, before its results are replaced. Returns that folder, which may be
        there since an earlier start that did not come to the end of the first stage."""
        mark = (self.path / "curate" / "result.json").read_bytes()
        for one in self.path.parent.glob(f"{glob.escape(self.path.name)}.old-*/curate/result.json"):
            if one.read_bytes() == mark:
                return one.parent.parent
        old, copy = unused_beside(self.path, "old"), temporary_beside(self.path)
        shutil.copytree(self.path, copy, ignore=shutil.ignore_patterns(LOCK, "checkpoints"))
        copy.rename(old)
        return old

    def _check_version(self) -> None:
        if (self.path / SETTINGS).exists() and (self.path / FORMER).is_dir():
            message = f"{self.path} holds a run of an earlier version of tutelage, with its stages in other folders ({FORMER}/)"
            raise TutelageError(message, "use another folder; `tutelage run` with --overwrite moves the old run aside")

    def _free(self, name: str) -> bool:
        """Whether a setting may differ from the stored value although stages are finished."""
        return name in FREE and not (name in HELD and (self.path / HELD[name] / "result.json").exists())

    def _begun(self) -> bool:
        """Whether any stage has finished or left a checkpoint."""
        return any(True for pattern in ("*/result.json", "checkpoints/*") for _ in self.path.glob(pattern))

    # Stages

    def kept(self, stage: str) -> JSON | None:
        """Return the content of a stage's result.json, whatever its inputs; None without one."""
        found = read_json(path := self.path / stage / "result.json")
        if found is not None and stage in TRAINED and "outputs" not in found:
            raise damaged(path, "it lacks outputs")
        return found

    def done(self, stage: str, inputs: str) -> JSON | None:
        """Return the result of a stage finished with these inputs, here or in another run of the same study; None without one."""
        result = self.kept(stage)
        if result and result.get("inputs") == inputs:
            if self.outdated(result):  # made without labels: valid for the same images with other labels too
                result["curated"] = self._transfer_set()
                write_json(self.path / stage / "result.json", result)
            return result
        return self._taken_over(stage, inputs) if stage in TRAINED else None

    def _taken_over(self, stage: str, inputs: str) -> JSON | None:
        """Copy a stage that another run of the study finished with the same inputs; return its result, None without one."""
        study = next((folder for folder in self.path.absolute().parents[:3] if (folder / STUDY).exists()), None)
        if study is None:
            return None
        for path in sorted(study.glob(f"*/*/*/{stage}/result.json")):
            result, other = read_json(path), path.parent.parent
            if result and result.get("inputs") == inputs and other.absolute() != self.path.absolute():
                break
        else:
            return None
        for name in (*BESIDE.get(stage, ()), stage):
            copy = temporary_beside(self.path / name)
            if (other / name).is_dir():
                shutil.copytree(other / name, copy)
                if name == stage:  # says where it is from, and belongs to this run's transfer set
                    own = {"curated": self._transfer_set()} if "curated" in result else {}
                    result = {**result, "taken_from": result.get("taken_from", "/".join(other.parts[-3:])), **own}
                    write_json(copy / "result.json", result)
                shutil.rmtree(self.path / name, ignore_errors=True)
                copy.rename(self.path / name)
            elif (other / name).exists():
                shutil.copy(other / name, self.path / name)
        if stage in TABLES and (about := Run(other).settings().get(TABLES[stage])):
            self.update_settings({TABLES[stage]: about})
        return result

    def result(self, stage: str, needed_by: str) -> JSON:
        """Return the result of an earlier stage.

        Raises:
            TutelageError: the stage is not finished in this folder, or was made from another transfer set or by an earlier version.
        """
        self._check_version()
        result, way = self.kept(stage), f"run `tutelage {stage} --out {self.path} ...`"
        if result is None:
            message = f"{self.path} has no {stage}/result.json, which {needed_by} needs"
            raise TutelageError(message, f"{way} first, or `tutelage run`, which does all stages")
        if self.outdated(result):
            message = f"{self.path / stage}, which {needed_by} needs, was made from another transfer set than the folder now holds"
            raise TutelageError(message, f"{way} again")
        return result

    def results(self) -> dict[str, JSON]:
        """Return the result of every stage by its folder; empty where it is missing or made from another transfer set."""
        found = {name: self.kept(name) or {} for name in STAGES}
        return {name: {} if self.outdated(one) else one for name, one in found.items()}

    def evaluation(self) -> JSON:
        """Return the result of `evaluate`. Raises TutelageError: there is none, or it is of other models than the run has now."""
        found = self.kept("evaluate")
        if found is None or "inputs" not in found:
            raise TutelageError(f"{self.path} has not been evaluated", f"run `tutelage evaluate {self.path}` first")
        if found["inputs"] != self.evaluation_inputs():
            message = f"{self.path / 'evaluate'} holds the scores of other models than the run does now"
            raise TutelageError(message, f"run `tutelage evaluate {self.path}`")
        return found

    def evaluation_inputs(self) -> str:
        """Return the hash of what an evaluation depends on: how images are resized, and the models."""
        stages = {name: self.kept(name) for name in TRAINED}
        outputs = {name: one["outputs"] if one and not self.outdated(one) else None for name, one in stages.items()}
        return hash_of(["evaluate", self.chosen().get("resize"), outputs])

    def outdated(self, result: JSON) -> bool:
        """Whether a stage's result was made from another transfer set than the folder holds now."""
        now = self._transfer_set()
        return result.get("curated", now) != now

    def _transfer_set(self) -> str | None:
        """Return the hash of the transfer set that the folder holds now; None without one."""
        return (self.kept("curate") or {}).get("outputs")

    def finish(self, stage: str, inputs: str, result: JSON) -> JSON:
        """Write a stage's result.json, which marks the stage as done, and remove its checkpoints."""
        made = (one for one in (self.path / stage).glob("*") if one.suffix in KEPT and not one.match("fold-*.npz"))
        hashes = {one.name: file_hash(one) for one in sorted(made) if one.is_file() and one.name != "result.json"}
        beside = (one for name in BESIDE.get(stage, ()) for one in (self.path / name).glob("*") if one.suffix in KEPT)
        hashes |= {one.relative_to(self.path).as_posix(): file_hash(one) for one in sorted(beside)}
        result = {"inputs": inputs, **result, "files": hashes, "made_with": {**versions(), "threads": threads()}}
        if "given" in result:
            self.update_settings({"data": {**result["given"], "transfer_set": result["outputs"]}})
        write_json(self.path / stage / "result.json", result)
        for path in sorted((self.path / "checkpoints").glob(f"{stage}-*")):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            (self.path / "checkpoints").rmdir()
        return result

    def clock(self, stage: str) -> Clock:
        """Return a clock that sums a stage's working time over restarts."""
        return Clock(self.path / stage / "seconds.json")


class Clock:
    """Wall time spent on one stage, in seconds, summed over restarts. `tick` saves it, at most once a second."""

    def __init__(self, path: Path):
        self._path = path
        before = (read_json(path) or {"seconds": 0.0}).get("seconds")
        if not isinstance(before, int | float):
            raise damaged(path, "it lacks the number of seconds")
        self._before: float = before
        self._start = self._saved = time.monotonic()

    def tick(self, force: bool = False) -> float:
        """Return the seconds so far; save them if the last save is a second old, or with `force`."""
        now = time.monotonic()
        seconds = self._before + now - self._start
        if force or now - self._saved >= 1:
            self._saved = now
            write_json(self._path, {"seconds": seconds})
        return seconds

    def ticking(self, advance: Callable[[int], None]) -> Callable[[int], None]:
        """Return a function that calls `advance` and then `tick`, for work that reports its progress."""

        def both(count: int) -> None:
            advance(count)
            self.tick()

        return both

    def stop(self) -> float:
        """Return the total seconds and remove the file: the stage's result.json records the number."""
        seconds = self._before + time.monotonic() - self._start
        self._path.unlink(missing_ok=True)
        return seconds
