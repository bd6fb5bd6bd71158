"""Errors that a user reads: what was given and where, what is allowed, and the mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

MOST_NAMED = 100  # missing files in a message; more are a wall of text


class TutelageError(Exception):
    """One clear message in three parts; the command prints it without a traceback and exits with 2.

    Args:
        given: what was given, and where ("--budget -3", "row 7 of labels.csv: no file cats/1.jpg").
        allowed: what is allowed there.
        mend: what to do now; may be empty where `allowed` says it already.
    """

    def __init__(self, given: str, allowed: str, mend: str = ""):
        self.given, self.allowed, self.mend = given, allowed, mend
        super().__init__(str(self))

    def __reduce__(self) -> tuple[Any, ...]:  # or it could not be sent from one process to another
        return type(self), (self.given, self.allowed, self.mend)

    def __str__(self) -> str:
        lines = [f"given:   {self.given}", f"allowed: {self.allowed}"]
        if self.mend:
            lines.append(f"mend:    {self.mend}")
        return "\n".join(line.replace("\n", "\n         ") for line in lines)


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
        place: the list. names: of all of them. allowed: where they are looked for.
    """

    def __init__(self, place: object, names: list[str], allowed: str):
        self.place, self.names = place, names
        few = shown(names, MOST_NAMED if len(names) <= MOST_NAMED else 20)
        super().__init__(f"{place}: {len(names)} files are not there: {few}", allowed, "copy them there")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.place, self.names, self.allowed)


class Unreadable(Exception):
    """An image that cannot be used; the text is the reason, written to rejected.csv. Never fatal by itself."""


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
