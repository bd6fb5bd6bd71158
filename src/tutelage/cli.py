"""The command line: results to stdout, messages to stderr; exit codes 0 (done), 2 (a fault the user can fix), 130 (Ctrl-C)."""

from __future__ import annotations

import ast
import errno
import importlib
import inspect
import json
import logging
import os
import shlex
import shutil
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tutelage.device import prepare_process
from tutelage.errors import TutelageError, did_you_mean, raise_all, rendered
from tutelage.files import files_below
from tutelage.json_object import JSON
from tutelage.progress import logger, main_process
from tutelage.version import __version__

if TYPE_CHECKING:
    from tutelage.results import Result

# in the order of `--help`; each is a function of a module of the same name in commands/, whose signature defines its settings
COMMANDS = (
    "demo", "run", "compare", "curate", "adapt", "committee", "distill", "finetune", "baseline", "evaluate", "report", "export",
    "benchmark", "predict", "demo-page", "cache", "doctor",
)  # fmt: skip

# flags that the first positional words of a command stand for; the last flag takes all remaining words
FIRST = {
    "compare": ("--config",),
    **dict.fromkeys(("report", "evaluate", "export", "benchmark"), ("--run",)),
    "demo-page": ("--export",),
    "predict": ("--export", "--images"),
}

NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
NO_WRITING = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}


def function_of(name: str) -> Callable[..., Result]:
    """Return the function behind a command."""
    function = name.replace("-", "_")
    return getattr(importlib.import_module(f"tutelage.commands.{function}"), function)


def main() -> None:
    """Run the command `tutelage`: its entry point."""
    prepare_process()
    sys.exit(call(sys.argv[1:]))


def call(words: list[str]) -> int:
    """Run one command.

    Args:
        words: the command line without the program's name.

    Returns:
        the exit code.
    """
    given: dict[str, object] = {}
    level = logger.level
    try:
        logger.setLevel(_level("--quiet" in words))
        function, given = _parsed([word for word in words if word != "--quiet"])
        if function is None:
            return 0
        result = function(**given)
        _show(function.__name__, result.to_json(), bool(given.get("json")))
        return 0
    except TutelageError as error:
        print(rendered(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = shlex.join(["tutelage", *words])
        print(f"\nstopped; finished work is kept. To resume, run the same command again:\n  {again}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError as error:
        why = f": {error}" if str(error) else ""
        hint = "use smaller images or batches (--batch-size, --student-size, --teacher-size), or a machine with more memory"
        print(rendered(TutelageError(f"there is too little memory{why}", hint)), file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno is None:
            raise
        print(rendered(_file_fault(error, given)), file=sys.stderr)
        return 2
    finally:
        logger.setLevel(level)


def _level(quiet: bool) -> int:
    """Return the level of the log: WARNING with --quiet, else that of TUTELAGE_LOG, INFO by default."""
    name = "WARNING" if quiet else os.environ.get("TUTELAGE_LOG") or "INFO"
    levels = logging.getLevelNamesMapping()
    if name.upper() not in levels:
        hint = did_you_mean(name, [*levels], "use INFO or WARNING")
        raise TutelageError(f"TUTELAGE_LOG={name} is not a logging level", hint)
    return levels[name.upper()]


def _file_fault(error: OSError, given: dict[str, object]) -> TutelageError:
    """Return the error for a file that could not be read or written, with a hint on what to free or which folder to choose."""
    where = f"{error.filename or 'a file of the run or the cache'}: {error.strerror}"
    out = Path(str(given.get("out") or given.get("run") or ".")).absolute()
    cache = Path(str(given.get("cache") or out.parent / "cache"))
    if error.errno in NO_WRITING:
        others = " and ".join(f"another --{name}" for name in ("out", "cache") if name in given)
        return TutelageError(where, f"{f'choose {others}, or ' * bool(others)}get write permission there")
    if error.errno not in NO_ROOM:
        return TutelageError(where, "check this path and its disk, then run the same command again to resume")
    full = Path(error.filename or cache).absolute()
    room = next(place for place in (full, *full.parents) if place.is_dir())
    taken = sum(status.st_size for _, status in files_below(cache)) / 2**20
    return TutelageError(
        f"{where} ({shutil.disk_usage(room).free / 2**20:,.1f} MiB are free on its disk)",
        f"free some space there, then run the same command again to resume (the cache, {cache}, takes {taken:,.1f} MiB: "
        f"`tutelage cache --cache {cache}` lists it, and --prune DAYS removes what is old)",
    )


def _parsed(words: list[str]) -> tuple[Callable[..., Result] | None, dict[str, object]]:
    """Return the function and its explicit arguments; (None, {}) when help or the version was shown. Raises TutelageError."""
    import cyclopts

    words = _with_flags(words)
    app = cyclopts.App(
        name="tutelage",
        version=__version__,
        help_format="plaintext",
        version_flags=["--version"],
        help="Turn a few labelled images and many unlabelled ones into a small, fast vision model, distilled from a foundation model. "
        "--quiet with any command prints warnings and errors only.",
    )
    if words and not words[0].startswith("-") and words[0] not in COMMANDS:
        hint = did_you_mean(words[0], COMMANDS, "run `tutelage --help` to see what each one does")
        message = f"unknown command {words[0]!r}; the commands are {', '.join(COMMANDS)}"
        raise TutelageError(message, hint)
    if words and words[0] in COMMANDS:
        app.command(function_of(words[0]), name=words[0])
    else:
        for name in COMMANDS:
            app.command(_summary_of(name), name=name)
    if not words or {"--help", "-h", "--version"} & set(words):
        app(words or ["--help"], exit_on_error=False, print_error=False, result_action="return_value")
        return None, {}
    _check_flags(words)
    app = cyclopts.App(help_flags=[], version_flags=[])
    app.command(_as_text(function_of(words[0])), name=words[0])
    try:
        _, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
    except cyclopts.CycloptsError as error:
        message, _, hint = " ".join(str(error).split()).removesuffix(".").partition(". ")
        hint = f"{hint}; " if hint else ""
        raise TutelageError(message, f"{hint}run `tutelage {words[0]} --help` for its flags and values") from error
    return function_of(words[0]), dict(bound.arguments)


def _summary_of(name: str) -> Callable[[], None]:
    """Return a function with the docstring of a command, read from its file: importing them all takes most of a second."""

    def summary() -> None: ...

    function = name.replace("-", "_")
    tree = ast.parse(Path(__file__).with_name("commands").joinpath(f"{function}.py").read_text(encoding="utf-8"))
    found = next(one for one in tree.body if isinstance(one, ast.FunctionDef) and one.name == function)
    summary.__doc__ = ast.get_docstring(found)
    return summary


def _with_flags(words: list[str]) -> list[str]:
    """Return the command line with the flags inserted that its first positional words stand for."""
    given, rest = words[:1], words[1:]
    for flag in FIRST.get(words[0], ()) if words else ():
        if rest and not rest[0].startswith("-"):
            given, rest = [*given, flag, rest[0]], rest[1:]
    return [*given, *rest]


def _as_text(function: Callable[..., Result]) -> Callable[..., None]:
    """Return a function with the same flags but text values: `settings.resolve` turns them into numbers and reports all faults at once."""

    import cyclopts

    def words(**given: object) -> None: ...

    hints, parameters = dict(function.__annotations__), []
    for parameter in inspect.signature(function).parameters.values():
        base, *notes = typing.get_args(hints[parameter.name])  # as `settings.checking.hints_of` annotates them
        kind = base if base in (bool, list[str]) else str | None
        kept = [note for note in notes if isinstance(note, cyclopts.Parameter)]
        hints[parameter.name] = typing.Annotated[kind, *kept]
        default = parameter.default if kind in (bool, list[str]) else None  # cyclopts checks defaults too
        parameters.append(parameter.replace(annotation=hints[parameter.name], default=default))
    words.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    words.__annotations__ = hints
    return words


def _check_flags(words: list[str]) -> None:
    """Report all unknown flags, each with the known flags nearest to it, before any value is checked."""
    from tutelage.settings import flag

    faults: list[TutelageError] = []
    known = [flag(name) for name in inspect.signature(function_of(words[0])).parameters]
    for word in words[1:]:
        name = word.split("=", 1)[0]
        if name.startswith("--") and len(name) > 2 and name.replace("_", "-") not in known:
            hint = did_you_mean(name, known, "use one of " + " ".join(known))
            faults.append(TutelageError(f"tutelage {words[0]} has no flag {name}", hint))
    raise_all(faults)


def _show(command: str, result: JSON, as_json: bool) -> None:
    """Print the result to stdout: one JSON object, or a table."""
    from tutelage.reporting.table import text_of

    if not (main_process() or "shard" in result):  # each process of a job array prints its share
        return
    if as_json:
        print(json.dumps(result), flush=True)
        return
    print(text_of(command, result), flush=True)
