"""Check all settings before anything is read or written, and report every one that cannot work in one message.

Checks that need neither torch nor timm come first, so a mistyped path is reported within a second; a model name that is not
in our own table needs timm's list (5 s) and is reported in the same message. The hub is asked whether it has the weights, and
weight files are loaded once on trial, before the first image is decoded.
"""

from __future__ import annotations

import importlib.util
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tutelage.errors import SeveralErrors, TutelageError, raise_all
from tutelage.models.aliases import check_size, full_name, weights_path
from tutelage.progress import processes
from tutelage.run_folder import Run
from tutelage.settings import flag
from tutelage.settings import groups as g
from tutelage.settings.commands import WITHOUT_TARGETS, Curation
from tutelage.tasks import task_of

KINDS = ("teacher", "student")
FIXED = ("patch", "efficientvit_m")  # in names of our own table: the input size is part of the architecture


def preflight(settings: g.Stage, cache: Path) -> None:
    """Check the settings of `run` or of one stage; a stage's own are checked, and no others.

    Args:
        cache: the folder that will hold decoded images and teacher outputs.

    Raises:
        TutelageError: all faults found, in one message.
    """
    if isinstance(settings, g.Labelled):
        task = settings.task
    else:  # a later stage
        task = Run(settings.out).result("curate", "this stage").get("task", "classification")
    faults: list[TutelageError] = []
    faults += _contradictions(settings)
    _try(faults, lambda: _check_folders(settings, cache))
    _try(faults, lambda: _check_data(settings))
    _try(faults, lambda: _check_package("tracker", getattr(settings, "tracker", "none")))
    _try(faults, lambda: _check_package("engine", getattr(settings, "engine", "local")))
    _try(faults, lambda: _check_cluster(settings))
    for kind in KINDS:
        if hasattr(settings, f"{kind}_weights"):
            _try(faults, lambda kind=kind: weights_path(getattr(settings, f"{kind}_weights"), kind))
    named = [kind for kind in KINDS if hasattr(settings, kind)]
    ours = {kind: full_name(getattr(settings, kind), kind) for kind in named}
    if not faults or not all(ours.values()):
        _check_machine(faults, settings)
        for kind in named:
            hub = not faults and not (kind == "teacher" and _embeds_otherwise(settings))
            _try(faults, lambda kind=kind, hub=hub: _check_model(settings, kind, hub=hub))
    else:
        for kind in named:
            _try(faults, lambda kind=kind: _check_alias_size(ours[kind], getattr(settings, f"{kind}_size", None), kind))
    if task and not any(f"--{kind} {getattr(settings, kind)}" in fault.message for kind in named for fault in faults):
        faults += task_of(task).check(settings)
    raise_all(faults)
    for kind in named:
        _try(faults, lambda kind=kind: _try_file(settings, kind))
    raise_all(faults)


def _try(faults: list[TutelageError], check: Callable[[], object]) -> None:
    """Run one check and collect the faults that it raises."""
    try:
        check()
    except SeveralErrors as several:
        faults += several.errors
    except TutelageError as error:
        faults.append(error)


def _contradictions(settings: Any) -> list[TutelageError]:
    """Return the faults of settings that are valid one by one but not together."""
    faults: list[TutelageError] = []
    faults += _of_the_choice(settings)
    epochs, steps = getattr(settings, "epochs", None), getattr(settings, "steps", None)
    if epochs is not None and steps is not None:
        message = f"--epochs {epochs} and --steps {steps} cannot be used together"
        faults.append(TutelageError(message, "leave one of them out"))
    if getattr(settings, "pilot", None):
        against = {name: getattr(settings, name) for name in ("val", "no_baseline")}
        against |= {"finetune": settings.finetune != "auto", "task": settings.task != "classification"}
        against["objective"] = settings.objective in WITHOUT_TARGETS
        wrong = [flag(name) for name, one in against.items() if one] + ["several processes"] * (processes() > 1)
        if wrong:
            needs = "class labels, --objective task-oriented or pseudo-label, no --val, a baseline, --finetune auto and one process"
            message = f"--pilot with {', '.join(wrong)} is not possible: it needs {needs}"
            faults.append(TutelageError(message, "leave --pilot out (with --val the validation images judge)"))
    count, batch = processes(), getattr(settings, "batch_size", 0)
    if batch % count:
        near = max(2, batch // count) * count
        message = f"--batch-size {batch} on {count} processes is not a multiple of {count}"
        faults.append(TutelageError(message, f"use --batch-size {near}"))
    return faults


def _of_the_choice(settings: Any) -> list[TutelageError]:
    """Return the faults in how gallery images are to be chosen: strategy, total, per_query, embeddings, shard."""
    faults: list[TutelageError] = []
    strategy, total, per_query = (getattr(settings, name, None) for name in ("strategy", "total", "per_query"))
    if strategy not in ("auto", "all", None) and total is None and per_query is None:
        message = f"--strategy {strategy} without --total does not say how many images to choose"
        faults.append(TutelageError(message, "add --total N"))
    if strategy == "all" and (total or per_query):
        number = f"--total {total}" if total else f"--per-query {per_query}"
        message = f"{number} with --strategy all is not possible: all takes the whole gallery"
        hint = "use --strategy balanced (near the labelled images) or random, or leave the number out"
        faults.append(TutelageError(message, hint))
    if total and per_query:
        message = f"--total {total} and --per-query {per_query} cannot be used together"
        faults.append(TutelageError(message, "leave one of them out"))
    elif per_query and strategy in ("random", "best"):
        message = f"--per-query {per_query} with --strategy {strategy} is not possible: queries take no turns there"
        faults.append(TutelageError(message, "use --total N instead, or --strategy balanced"))
    faults += _of_words(settings)
    if getattr(settings, "shard", None) is not None:
        _try(faults, lambda: share_of(settings.shard))
    return faults


def strategy_of(settings: g.Gallery) -> str:
    """Return the strategy that the settings ask for: "auto" means `balanced` where a number is given, else `all`."""
    if settings.strategy != "auto":
        return settings.strategy
    return "all" if settings.total is None and settings.per_query is None else "balanced"


def _of_words(settings: Any) -> list[TutelageError]:
    """Return the faults in the settings of precomputed embeddings and of text queries."""
    if not isinstance(settings, Curation):
        return []
    strategy, given = strategy_of(settings), settings.embeddings
    words, templates = settings.text_embeddings, settings.templates
    faults: list[TutelageError] = []
    if given and strategy in ("all", "random"):
        message = f"--embeddings with --strategy {strategy} is not possible: it does not search"
        hint = "add --total N with --strategy balanced, best, diverse, hard or text, or leave --embeddings out"
        faults.append(TutelageError(message, hint))
    if words and strategy != "text":
        message = f"--text-embeddings with --strategy {strategy} is not possible: they are for --strategy text"
        faults.append(TutelageError(message, "add --strategy text"))
    if words and not given:
        message = "--text-embeddings without --embeddings: the gallery needs vectors of the same model"
        faults.append(TutelageError(message, "add --embeddings"))
    if strategy == "text" and given and not words:
        message = "--strategy text with --embeddings alone has no vectors of the class names"
        faults.append(TutelageError(message, "add --text-embeddings FILE, made by the same model"))
    if templates:
        from tutelage.models.clip import class_prompts

        _try(faults, lambda: class_prompts(["class"], templates))
    if faults or strategy != "text" or words:
        return faults
    from tutelage.models.clip import check_clip

    _try(faults, lambda: check_clip(settings.clip, settings.clip_weights))
    return faults


def _embeds_otherwise(settings: Any) -> bool:
    """Whether these are settings of the `curate` command in which another model than the teacher embeds the gallery."""
    return not isinstance(settings, g.Student) and bool(
        getattr(settings, "embeddings", None) or getattr(settings, "strategy", None) == "text"
    )


def share_of(shard: str) -> tuple[int, int]:
    """Return (i, n) for "i/n", or for "env" from the variables RANK and WORLD_SIZE."""
    text = shard
    if shard == "env":
        text = f"{os.environ.get('RANK', '?')}/{os.environ.get('WORLD_SIZE', '?')}"
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        place = shard if text == shard else f"{shard}, which is {text}"
        raise TutelageError(
            f"--shard {place}: expected i/n with 0 <= i < n, or env, which reads RANK and WORLD_SIZE",
            "use --shard 0/4 for the first of four machines and --shard 3/4 for the last",
        )
    return int(found[1]), int(found[2])


def _check_folders(settings: g.Stage, cache: Path) -> None:
    faults: list[TutelageError] = []
    out = Path(settings.out)
    for name, folder in (("out", out), ("cache", cache)):
        if why := _not_writable(folder):
            hint = f"use a writable --{name}" if name == "out" or settings.cache else "add --cache DIR"
            faults.append(TutelageError(f"--{name} {folder}: {why}", hint))
    if not faults and (others := _others(out)):
        hint = f"use a new or empty folder, such as --out {out / 'run'}, or the folder of a run"
        faults.append(TutelageError(f"--out {out} contains other files, such as {others[0]}", hint))
    raise_all(faults)


def _not_writable(folder: Path) -> str:
    """Return why a folder cannot be created or written to; an empty text if it can."""
    folder = folder.absolute()
    there = next(place for place in (folder, *folder.parents) if place.exists() or place.is_symlink())
    if not there.is_dir():
        return f"{'it' if there == folder else there} is a file" if there.exists() else f"{there} is a link to nothing"
    try:
        read_only = bool(os.statvfs(there).f_flag & os.ST_RDONLY)
    except OSError:
        read_only = False
    if read_only:
        return f"{there} is on a disk that is mounted read-only"
    return "" if os.access(there, os.W_OK | os.X_OK) else f"no permission to write in {there}"


def _others(out: Path) -> list[str]:
    """Return the files in a folder that is not a run folder; an empty list for a run folder, an empty and a missing folder."""
    if not out.is_dir() or (out / ".lock").exists() or (out / "curate").is_dir():
        return []
    return sorted(name for name in os.listdir(out) if not name.startswith("."))


def _check_data(settings: Any) -> None:
    if not isinstance(settings, Curation):
        return
    from tutelage.data.sources import missing
    from tutelage.data.target_set import check_places

    faults: list[TutelageError] = []
    splits = {"val": settings.val, "test": settings.test}
    _try(faults, lambda: check_places(settings.target, splits, settings.group_by))
    faults += [missing(place, "--gallery ") for place in settings.gallery if not Path(place).exists()]
    raise_all(faults)


def _check_package(name: str, value: str) -> None:
    """Check that the package of a tracker or an engine is installed; its name is the setting's value."""
    if value not in ("none", "local") and importlib.util.find_spec(value) is None:
        hint = f"run pip install 'tutelage[{value}]', or use another --{name}"
        raise TutelageError(f"--{name} {value}: the package is not installed", hint)


def _check_cluster(settings: Any) -> None:
    """Check that something listens at RAY_ADDRESS: Ray itself would end the process without a helpful message."""
    address = os.environ.get("RAY_ADDRESS", "").removeprefix("ray://")
    host, _, port = address.rpartition(":")
    if getattr(settings, "engine", None) != "ray" or not (host and port.isdigit()):
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise TutelageError(
            f"--engine ray: no cluster at RAY_ADDRESS={address}: {error.strerror or error}",
            "set RAY_ADDRESS to the head of a Ray cluster (`ray start --head` prints it), or unset it for a local cluster",
        ) from error


def _check_machine(faults: list[TutelageError], settings: g.Machine) -> None:
    device, precision = settings.device, settings.precision
    if device in ("auto", "cpu") and precision != "fp16":
        return
    from tutelage.device import check_hardware

    _try(faults, lambda: check_hardware(device, "auto"))
    if precision == "fp16":
        _try(faults, lambda: check_hardware("auto" if faults else device, precision))


def _check_alias_size(name: str | None, size: int | None, kind: str) -> None:
    if name and size is not None:
        check_size(name, size, kind)


def _check_model(settings: Any, kind: str, hub: bool) -> None:
    """Check name, size and, with `hub`, that pretrained weights can be obtained."""
    name, weights, size = (
        getattr(settings, kind),
        getattr(settings, f"{kind}_weights", "scratch"),
        getattr(settings, f"{kind}_size", None),
    )
    full = full_name(name, kind)
    _check_alias_size(full, size, kind)
    if full and size is not None and weights != "pretrained" and not any(word in full for word in FIXED):
        return  # timm is not needed
    from tutelage.models.teachers import build, resolve, unusual_size
    from tutelage.models.weights import check_within_reach

    full = resolve(name, kind)
    if size is not None:
        check_size(full, size, kind)
        if unusual_size(full, size):
            build(full, "scratch", 0, size, kind)
    if hub and weights == "pretrained":
        check_within_reach(full, kind)


def _try_file(settings: Any, kind: str) -> None:
    weights = getattr(settings, f"{kind}_weights", "scratch")
    if weights_path(weights, kind) is None:
        return
    from tutelage.models.teachers import default_size, resolve
    from tutelage.models.weights import create

    name = resolve(getattr(settings, kind), kind)
    create(name, weights, 0, getattr(settings, f"{kind}_size", None) or default_size(name), kind)
