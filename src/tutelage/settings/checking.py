"""Check the settings of a call: explicit arguments override `config`, which overrides the defaults; all faults are reported at once."""

from __future__ import annotations

import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import pydantic
from cyclopts import Parameter
from pydantic import BeforeValidator, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from tutelage.errors import TutelageError, did_you_mean, raise_all, shown
from tutelage.files import file_hash, toml_of
from tutelage.regular_file import text_in
from tutelage.settings import presets
from tutelage.settings.shared_flags import Group, declared, default_of

P = ParamSpec("P")
NO_PATHS = {"classes", "group_by", "templates", "methods", "set"}  # texts that are never a path
ANY_BYTES = {"images"}  # of `predict`, whose table can hold any name of a file
LONGEST_NAME = 255  # bytes of one part of a path
LONGEST_PATH = 4000  # bytes; Linux takes 4,095, with what is put below it

S = TypeVar("S", bound=Group)
R = TypeVar("R")


def command(settings: Callable[P, S]) -> Callable[[Callable[[S], R]], Callable[P, R]]:
    """Return a decorator that makes a function of one group of settings a command: a function of keyword arguments, checked first.

    If `config` is among the settings, it names a TOML file with values for arguments that were not given.

    Args:
        settings: the class of the command's settings; the command has its names, types and defaults.
    """

    def decorate(function: Callable[[S], R]) -> Callable[P, R]:
        @functools.wraps(function)
        def checked(*args: P.args, **given: P.kwargs) -> R:
            checked_settings = resolve(settings, given)
            try:
                return function(checked_settings)
            except ValidationError as error:  # of a result.json, which `tutelage.results` describes
                what = f"{error.title}, {'.'.join(map(str, error.errors()[0]['loc']))}: {error.errors()[0]['msg']}"
                message = f"a result.json of this run is damaged or of another version of tutelage ({what})"
                raise TutelageError(message, "use another folder, or --overwrite to move the old run aside") from error

        made: Any = checked
        del made.__wrapped__
        hints, own = hints_of(settings), declared(settings)
        made.settings, made.__annotations__ = settings, hints
        made.__signature__ = inspect.Signature(
            [
                inspect.Parameter(
                    name, inspect.Parameter.KEYWORD_ONLY, default=default_of(one), annotation=_base(hints[name])
                )
                for name, one in own.items()
            ]
        )
        lines = [f"    {name} ({one.type}, {default_of(one)!r}): {one.metadata['help']}" for name, one in own.items()]
        made.__doc__ = "\n".join(
            [
                f"{inspect.getdoc(function)}\n\nArgs:",
                *lines,
                f"\nReturns:\n    {function.__annotations__['return']}: described in `tutelage.results`",
            ]
        )
        return checked

    return decorate


def identity(settings: Group, known_otherwise: Collection[str] = ()) -> dict[str, object]:
    """Return the settings that determine a stage's results: all but the free ones; a file of weights stands as its content.

    Args:
        known_otherwise: settings left out too: without effect on this task, or represented by a hash of what they refer to.
    """
    return {
        name: _content(getattr(settings, name)) if name.endswith("_weights") else getattr(settings, name)
        for name, one in declared(type(settings)).items()
        if not one.metadata["free"] and name not in known_otherwise
    }


def _content(weights: str) -> str:
    """Return a hash of a file of weights, wherever it lies; another value as it is."""
    path = Path(weights)
    return _hash(path, path.stat().st_mtime_ns) if path.is_file() else weights


@functools.cache
def _hash(path: Path, changed: int) -> str:
    return file_hash(path)


@functools.cache
def hints_of(settings: Callable[..., Group]) -> dict[str, Any]:  # types
    """Return the type of each setting, annotated with its limits for pydantic and its help text for cyclopts."""
    found, types_of = {}, typing.get_type_hints(settings)
    for name, one in declared(settings).items():
        base, notes = types_of[name], one.metadata
        negative, several = () if base in (bool, list[str]) else None, True if base == list[str] else None
        parameter = Parameter(help=notes["help"], consume_multiple=several, negative=negative)
        limits = notes["limits"] | ({"allow_inf_nan": False} if float in (base, *typing.get_args(base)) else {})
        checks: list[object] = [pydantic.Field(**limits)] if limits else []
        checks += [BeforeValidator(notes["reads"])] if notes["reads"] else []
        found[name] = Annotated[base, parameter, *checks]
    return found


def resolve(settings: Callable[..., S], given: Mapping[str, object]) -> S:
    """Return the checked settings of one call: explicit arguments over the file over defaults.

    Args:
        settings: the class of settings.
        given: explicit arguments; values of the task and of --preset are used for what neither they nor the file give.

    Raises:
        TutelageError: unknown, missing or impossible settings, all of them in one message.
    """
    known = declared(settings)
    errors = [_unknown(name, known, "argument") for name in given if name not in known]
    values = {name: value for name, value in given.items() if name in known}
    if "config" in known and values.get("config"):
        from_file, faults = _read_toml(Path(str(values["config"])), known)
        errors += faults
        if faults and not from_file:
            raise_all(errors)
        values = {**from_file, **values}
    values = {**{name: value for name, value in presets.of(values).items() if name in known}, **values}
    checked, faults = _validate(settings, values)
    raise_all(errors + faults)
    return settings(**checked)


def flag(name: str) -> str:
    """Return the flag of a setting: `teacher_size` -> `--teacher-size`."""
    return "--" + name.replace("_", "-")


def _unknown(name: str, known: Collection[str], kind: str) -> TutelageError:
    hint = did_you_mean(name, known, f"use one of {', '.join(known)}")
    return TutelageError(f"{kind} {name!r} is unknown", hint)


def _read_toml(path: Path, known: Collection[str]) -> tuple[dict[str, object], list[TutelageError]]:
    try:
        raw = toml_of(text_in(path))
    except FileNotFoundError:
        beside = [one.name for one in path.parent.glob("*.toml")] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, beside, "name a TOML file of settings")
        return {}, [TutelageError(f"--config {path} does not exist", hint)]
    except (OSError, ValueError) as error:  # no file, no text, no TOML
        why = getattr(error, "strerror", None) or error
        return {}, [TutelageError(f"--config {path}: {why}", "name a TOML file of settings, such as budget = 10")]
    values = {name.replace("-", "_"): value for name, value in raw.items()}
    errors = [_unknown(name, known, f"{path}: setting") for name in values if name not in known]
    for name in values:
        if len(spelt := [one for one in raw if one.replace("-", "_") == name]) > 1:
            errors.append(TutelageError(f"{path} has {shown(spelt)}, which are one setting", "keep one of them"))
    return {name: value for name, value in values.items() if name in known}, errors


def _validate(
    settings: Callable[..., Group], values: dict[str, object]
) -> tuple[dict[str, object], list[TutelageError]]:
    checked, errors = {}, []
    for name, one in declared(settings).items():
        try:
            checked[name] = checked_value(settings, name, values.get(name, default_of(one)))
        except TutelageError as error:
            errors.append(error)
    return checked, errors


def checked_value(settings: Callable[..., Group], name: str, value: object) -> object:
    """Return the value of one setting in its type: any sequence or a single item for a list, a Path for text.

    Raises:
        TutelageError: the setting cannot have this value.
    """
    hints, default = hints_of(settings), default_of(declared(settings)[name])
    if isinstance(value, (tuple, list)):
        value = [str(item) for item in value]
    elif not isinstance(value, bool) and isinstance(value, (str, Path, int, float)):
        if _base(hints[name]) == list[str]:
            value = [str(value)]
        elif isinstance(value, Path) or _takes_text(hints[name]):
            value = str(value)
    if isinstance(value, bool) and not isinstance(default, bool):  # otherwise true would count as 1
        raise TutelageError(f"{flag(name)} {value} must not be a boolean", f"give a value: {_help(hints[name])}")
    fault = _empty(name, value, hints[name]) if value != default else None
    if fault := fault or _no_utf8(name, value) or _impossible_text(name, value):
        raise fault
    try:
        return TypeAdapter(hints[name]).validate_python(value)
    except ValidationError as error:
        raise _fault(name, value, error.errors()[0], hints[name], "config" in hints) from None


def _empty(name: str, value: object, hint: object) -> TutelageError | None:
    """Return an error for an empty text, which as a path would be the current folder."""
    if value == "" or (isinstance(value, list) and "" in value):
        here = "" if name in NO_PATHS or not _takes_text(hint) else "; the current folder is `.`"
        return TutelageError(f"{flag(name)} is empty", f"give it a value, or leave it out{here}")
    return None


def _no_utf8(name: str, value: object) -> TutelageError | None:
    """Return an error for a text that no file of a run can hold: one that is not UTF-8, as Linux permits for names of files."""
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and name not in ANY_BYTES and any("\ud800" <= one <= "\udfff" for one in text):
            hint = "give it in UTF-8; a file or folder with such a name must be renamed first"
            return TutelageError(f"{flag(name)} is not valid UTF-8: {text!a}", hint)
    return None


def _impossible_text(name: str, value: object) -> TutelageError | None:
    """Return an error for a text that can be no path, if the setting may be one: it holds control characters, which a terminal would obey,
    or is too long in all or in one name."""
    for text in value if isinstance(value, list) else [value]:
        if not isinstance(text, str) or name in NO_PATHS:
            continue
        if "\0" in text:
            return TutelageError(f"{flag(name)} {text!r} holds a NUL character", "leave it out: no path can hold one")
        if re.search(r"[\x00-\x1f\x7f-\x9f]", text):
            message = f"{flag(name)} {ascii(text)[:120]} holds control characters"
            return TutelageError(message, "rename the file or folder, or leave them out")
        if (count := len(text.encode("utf-8", "surrogateescape"))) > LONGEST_PATH:
            message = f"{flag(name)} {text[:40]}... has {count} bytes, but systems take paths of at most {LONGEST_PATH}"
            return TutelageError(message, "use a shorter path")
        count = max(len(part.encode("utf-8", "surrogateescape")) for part in text.split("/"))
        if count > LONGEST_NAME:
            message = (
                f"{flag(name)} {text[:40]}... has a name of {count} bytes, but file systems take at most {LONGEST_NAME}"
            )
            return TutelageError(message, "use a shorter path")
    return None


def _takes_text(hint: object) -> bool:
    base = _base(hint)
    return base is str or (isinstance(base, types.UnionType) and str in typing.get_args(base))


def _base(hint: object) -> object:
    return typing.get_args(hint)[0]


def _fault(name: str, value: object, fault: ErrorDetails, hint: object, toml: bool) -> TutelageError:
    if value in ("", [], ()):
        message = f"no {flag(name)} was given ({_help(hint)})"
        return TutelageError(message, f"add {flag(name)} to the command{' or the TOML file' * toml}")
    reason = fault["msg"].partition(", unable to")[0]
    message = re.sub(r": (Input should be|Value error,) ", " must be ", f"{flag(name)} {value}: {reason}", count=1)
    message = message.replace("must be a valid integer", "must be a whole number").replace("a valid number", "a number")
    choices = typing.get_args(_base(hint)) if fault["type"] == "literal_error" else ()
    otherwise = f"give a value that fits: {_help(hint)}"
    return TutelageError(message, did_you_mean(str(value), [str(c) for c in choices], otherwise))


def _help(hint: object) -> str:
    """Return the help text of a setting."""
    return str(next(note for note in typing.get_args(hint) if isinstance(note, Parameter)).help)
