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
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec

from tutelage.data.sources import missing
from tutelage.data.target_set import check_places
from tutelage.device import check_hardware
from tutelage.errors import TutelageError, raise_all, single
from tutelage.image_size import Size
from tutelage.models.aliases import check_size, full_name, weights_path
from tutelage.pipeline.trial import try_student, try_teacher
from tutelage.progress import processes
from tutelage.run_folder import Run, check_owner
from tutelage.settings import flag, shared_flags
from tutelage.settings.command_flags import WITHOUT_TARGETS, CurateSettings, Curation, RunSettings
from tutelage.tasks import task_of

P = ParamSpec("P")
KINDS = ("teacher", "student")
FIXED = ("patch", "efficientvit_m")  # in names of our own table: the input size is part of the architecture


def preflight(settings: shared_flags.Stage, cache: Path) -> None:
    """Check the settings of `run` or of one stage; a stage's own are checked, and no others.

    Args:
        cache: the folder that will hold decoded images and teacher outputs.

    Raises:
        TutelageError: all faults found, in one message.
    """
    if isinstance(settings, shared_flags.Labelled):
        task = settings.task
    else:  # a later stage
        task = Run(settings.out).result("curate", "this stage").get("task", "classification")
    faults = [*_contradictions(settings), *_of_folders(settings, cache), *_of_data(settings), *_of_packages(settings)]
    faults += _raised(_check_cluster, settings)
    for kind in KINDS:
        if hasattr(settings, f"{kind}_weights"):
            faults += _raised(weights_path, getattr(settings, f"{kind}_weights"), kind)
    named = [kind for kind in KINDS if hasattr(settings, kind)]
    ours = {kind: full_name(getattr(settings, kind), kind) for kind in named}
    if not faults or not all(ours.values()):
        faults += _of_machine(settings)
        for kind in named:
            other = isinstance(settings, CurateSettings) and (settings.embeddings or settings.strategy == "text")
            hub = not faults and not (kind == "teacher" and other)  # else another model embeds the gallery
            faults += _raised(_check_model, settings, kind, hub)
    else:
        for kind, name in ours.items():
            faults += _raised(_check_alias_size, name, getattr(settings, f"{kind}_size", None), kind)
    if task and not any(f"--{kind} {getattr(settings, kind)}" in fault.message for kind in named for fault in faults):
        faults += task_of(task).check(settings)
    raise_all(faults)
    raise_all([fault for kind in named for fault in _raised(_try_file, settings, kind)])
    raise_all([fault for attempt in (try_teacher, try_student) for fault in _raised(attempt, settings, task_of(task))])


def _raised(check: Callable[P, object], *given: P.args, **named: P.kwargs) -> list[TutelageError]:
    """Return the faults that a check raises."""
    try:
        check(*given, **named)
    except TutelageError as error:
        return single(error)
    return []


def _contradictions(settings: shared_flags.Stage) -> Iterator[TutelageError]:
    """Yield the faults of settings that are valid one by one but not together."""
    yield from _of_the_choice(settings)
    if isinstance(settings, shared_flags.Schedule) and settings.epochs is not None and settings.steps is not None:
        message = f"--epochs {settings.epochs} and --steps {settings.steps} cannot be used together"
        yield TutelageError(message, "leave one of them out")
    if isinstance(settings, RunSettings) and settings.pilot:
        against = {"val": settings.val, "no_baseline": settings.no_baseline, "finetune": settings.finetune != "auto"}
        against |= {"task": not task_of(settings.task).PILOT, "objective": settings.objective in WITHOUT_TARGETS}
        wrong = [flag(name) for name, one in against.items() if one] + ["several processes"] * (processes() > 1)
        if wrong:
            needs = "class labels, --objective task-oriented or pseudo-label, no --val, a baseline, --finetune auto and one process"
            message = f"--pilot with {', '.join(wrong)} is not possible: it needs {needs}"
            yield TutelageError(message, "leave --pilot out (with --val the validation images judge)")
    count, batch = processes(), settings.batch_size if isinstance(settings, shared_flags.Schedule) else 0
    if batch % count:
        near = max(2, batch // count) * count
        message = f"--batch-size {batch} on {count} processes is not a multiple of {count}"
        yield TutelageError(message, f"use --batch-size {near}")


def _of_the_choice(settings: shared_flags.Stage) -> Iterator[TutelageError]:
    """Yield the faults in how gallery images are to be chosen: strategy, total, per_query, embeddings, shard."""
    if not isinstance(settings, Curation):
        return
    strategy, total, per_query = settings.strategy, settings.total, settings.per_query
    if strategy not in ("auto", "all") and total is None and per_query is None:
        message = f"--strategy {strategy} without --total does not say how many images to choose"
        yield TutelageError(message, "add --total N")
    if strategy == "all" and (total or per_query):
        number = f"--total {total}" if total else f"--per-query {per_query}"
        message = f"{number} with --strategy all is not possible: all takes the whole gallery"
        hint = "use --strategy balanced (near the labelled images) or random, or leave the number out"
        yield TutelageError(message, hint)
    if total and per_query:
        message = f"--total {total} and --per-query {per_query} cannot be used together"
        yield TutelageError(message, "leave one of them out")
    elif per_query and strategy in ("random", "best"):
        message = f"--per-query {per_query} with --strategy {strategy} has no effect: this strategy does not go query by query"
        yield TutelageError(message, "use --total N instead, or --strategy balanced")
    yield from _of_words(settings)
    if isinstance(settings, CurateSettings) and settings.shard is not None:
        yield from _raised(share_of, settings.shard)


def strategy_of(settings: shared_flags.Gallery) -> str:
    """Return the strategy that the settings ask for: "auto" means `balanced` where a number is given, else `all`."""
    if settings.strategy != "auto":
        return settings.strategy
    return "all" if settings.total is None and settings.per_query is None else "balanced"


def _of_words(settings: Curation) -> list[TutelageError]:
    """Return the faults in the settings of precomputed embeddings and of text queries."""
    strategy, given, words = strategy_of(settings), settings.embeddings, settings.text_embeddings
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
    if settings.templates:
        from tutelage.models.clip import class_prompts

        faults += _raised(class_prompts, ["class"], settings.templates)
    if not faults and strategy == "text" and not words:
        from tutelage.models.clip import check_clip

        faults += _raised(check_clip, settings.clip, settings.clip_weights)
    return faults


def share_of(shard: str) -> tuple[int, int]:
    """Return (i, n) for "i/n", or for "env" from the variables RANK and WORLD_SIZE."""
    text = shard
    if shard == "env":
        text = f"{os.environ.get('RANK', '?')}/{os.environ.get('WORLD_SIZE', '?')}"
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if not found or int(found[1]) >= int(found[2]):
        place = shard if text == shard else f"{shard}, which is {text}"
        raise TutelageError(
            f"--shard {place}: expected i/n with 0 <= i < n, or env, which reads RANK and WORLD_SIZE",
            "use --shard 0/4 for the first of four machines and --shard 3/4 for the last",
        )
    return int(found[1]), int(found[2])


def _of_folders(settings: shared_flags.Stage, cache: Path) -> list[TutelageError]:
    """Return the faults of the run folder and the cache: not writable, or with files that are no run."""
    faults: list[TutelageError] = []
    out = Path(settings.out)
    for name, folder in (("out", out), ("cache", cache)):
        if why := _not_writable(folder):
            hint = f"use a writable --{name}" if name == "out" or settings.cache else "add --cache DIR"
            faults.append(TutelageError(f"--{name} {folder}: {why}", hint))
    return faults or _raised(check_owner, out)


def _not_writable(folder: Path) -> str:
    """Return why a folder cannot be created or written to; an empty text if it can."""
    folder = folder.absolute()
    there = next(place for place in (folder, *folder.parents) if place.exists() or place.is_symlink())
    if not there.is_dir():
        return f"{'it' if there == folder else there} is a file" if there.exists() else f"{there} is a link to nothing"
    try:
        read_only = bool(os.statvfs(there).f_flag & os.ST_RDONLY)
    except (OSError, AttributeError):  # the latter on Windows
        read_only = False
    if read_only:
        return f"{there} is on a disk that is mounted read-only"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"no permission to write in {there}"
    try:
        with tempfile.TemporaryFile(dir=there):  # /proc, for one, permits it and does not do it
            return ""
    except OSError as error:
        return f"{there} cannot be written to: {error.strerror}"


def _of_data(settings: shared_flags.Stage) -> list[TutelageError]:
    """Return the faults of the places of the labelled images and the gallery."""
    if not isinstance(settings, Curation):
        return []
    faults = _raised(check_places, settings.target, {"val": settings.val, "test": settings.test}, settings.group_by)
    return faults + [missing(place, "--gallery ") for place in settings.gallery if not Path(place).exists()]


def _of_packages(settings: shared_flags.Stage) -> Iterator[TutelageError]:
    """Yield a fault for a tracker and an engine whose package, named like the setting's value, is not installed."""
    for name in ("tracker", "engine"):
        value = getattr(settings, name, "none")
        if value not in ("none", "local") and importlib.util.find_spec(value) is None:
            hint = f"run pip install 'tutelage[{value}]', or use another --{name}"
            yield TutelageError(f"--{name} {value}: the package is not installed", hint)


def _check_cluster(settings: shared_flags.Stage) -> None:
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


def _of_machine(settings: shared_flags.Machine) -> list[TutelageError]:
    """Return the faults of device and precision."""
    device, precision = settings.device, settings.precision
    if device in ("auto", "cpu") and precision != "fp16":
        return []
    faults = _raised(check_hardware, device, "auto")
    if precision == "fp16":
        faults += _raised(check_hardware, "auto" if faults else device, precision)
    return faults


def _check_alias_size(name: str | None, size: Size | None, kind: str) -> None:
    if name and size is not None:
        check_size(name, size, kind)


def _check_model(settings: shared_flags.Stage, kind: str, hub: bool) -> None:
    """Check name, size and, with `hub`, that pretrained weights can be obtained."""
    name, size = getattr(settings, kind), getattr(settings, f"{kind}_size", None)
    weights = getattr(settings, f"{kind}_weights", "scratch")
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


def _try_file(settings: shared_flags.Stage, kind: str) -> None:
    """Load a model's weights, if they are a file."""
    weights = getattr(settings, f"{kind}_weights", "scratch")
    if weights_path(weights, kind) is None:
        return
    from tutelage.models.teachers import default_size, resolve
    from tutelage.models.weights import create

    name = resolve(getattr(settings, kind), kind)
    create(name, weights, 0, getattr(settings, f"{kind}_size", None) or default_size(name), kind)
