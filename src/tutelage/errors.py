"""Errors that a user reads: one sentence that says what is wrong with which value, then a hint what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

MOST_NAMED = 100  # missing files in a message; more are a wall of text


class TutelageError(Exception):
    """A fault that the user can fix; the command prints it without a traceback and exits with 2.

    Args:
        message: what is wrong with which value, and where ("--budget -3: at least 1 label per class is needed").
        hint: what to do now; empty where the message says it already.
    """

    def __init__(self, message: str, hint: str = ""):
        self.message, self.hint = message, hint
        super().__init__(str(self))

    def __reduce__(self) -> tuple[Any, ...]:  # or it could not be sent from one process to another
        return type(self), (self.message, self.hint)

    def __str__(self) -> str:
        lines = [self.message, *([f"hint: {self.hint}"] if self.hint else [])]
        return "\n".join(line.replace("\n", "\n  ") for line in lines)


class SeveralErrors(TutelageError):
    """All faults that were found in one pass, told at once."""

    def __init__(self, errors: list[TutelageError]):
        self.errors = errors
        Exception.__init__(self, str(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.errors,)

    def __str__(self) -> str:
        return "\n".join(str(error) for error in self.errors)


class FilesMissing(TutelageError):
    """Files that a list names and that are not there.

    Args:
        place: the list. names: of all of them. where: where they are looked for.
    """

    def __init__(self, place: object, names: list[str], where: str):
        self.place, self.names, self.where = place, names, where
        few = shown(names, MOST_NAMED if len(names) <= MOST_NAMED else 20)
        super().__init__(f"{place} names {len(names)} files that do not exist: {few}", f"paths are {where}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.place, self.names, self.where)


class Unreadable(Exception):
    """An image that cannot be used; the text is the reason, written to rejected.csv. Never fatal by itself."""


def rendered(error: TutelageError) -> str:
    """What the command prints of an error: each fault after "error: "."""
    return "\n".join(f"error: {one}" for one in single(error))


def single(error: TutelageError) -> list[TutelageError]:
    """The faults that an error tells, one by one."""
    return [one for part in error.errors for one in single(part)] if isinstance(error, SeveralErrors) else [error]


def raise_all(errors: list[TutelageError]) -> None:
    """Raise what was collected: nothing, the one error, or all of them in one."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise SeveralErrors(errors)


def did_you_mean(word: str, words: Iterable[str], most: int = 3) -> str:
    """ "did you mean 'a' or 'b'?" for the nearest words, or an empty text when nothing is near.

    Words that are much farther than the nearest are left out: '--lr' shares its dashes with '--galery'.
    """
    near = difflib.get_close_matches(word, list(words), n=most, cutoff=0.6)
    likeness = [difflib.SequenceMatcher(None, one, word).ratio() for one in near]
    near = [one for one, like in zip(near, likeness, strict=True) if like > likeness[0] - 0.1]
    return f"did you mean {' or '.join(repr(w) for w in near)}?" if near else ""


def shown(items: Iterable[object], most: int = 5) -> str:
    """A list in a sentence: the first `most`, then how many more there are."""
    items = list(items)
    text = ", ".join(str(item) for item in items[:most])
    return text if len(items) <= most else f"{text} and {len(items) - most} more"
