"""Errors shown to the user: a sentence that says what is wrong with which value, then a hint on what to do."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable

# What a terminal takes for a command or cannot print, and what shows as nothing: Unicode's default-ignorable characters, without the tags
# by which flags differ, and the blank of Braille.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_INVISIBLE = re.compile(
    r"[\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u2800\u3164"
    r"\ufe00-\ufe0f\ufeff\uffa0\U000e0100-\U000e01ef]"
)
MOST_NAMED = 100  # up to this number a message names all missing files; of more it names the first 20


class TutelageError(Exception):
    """A fault that the user can fix; the command prints it without a traceback and exits with code 2.

    Args:
        message: what is wrong with which value, and where ("--budget -3: at least 1 label per class is needed").
        hint: what to do now.
    """

    def __init__(self, message: str, hint: str):
        self.message, self.hint = message, hint

    def __str__(self) -> str:
        lines = [self.message, *([f"hint: {self.hint}"] if self.hint else [])]
        return "\n".join(line.replace("\n", "\n  ") for line in lines)


class SeveralErrors(TutelageError):
    """All faults found in one pass, reported together."""

    def __init__(self, errors: list[TutelageError]):
        self.errors = errors
        super().__init__("\n".join(one.message for one in errors), "\n".join(one.hint for one in errors))

    def __str__(self) -> str:
        return "\n".join(str(error) for error in self.errors)


class FilesMissing(TutelageError):
    """Files that a list names but that do not exist.

    Args:
        place: the list. names: all missing files. where: what their paths are relative to, as text of the hint.
    """

    def __init__(self, place: object, names: list[str], where: str):
        self.place, self.names, self.where = place, names, where
        few = shown(names, MOST_NAMED if len(names) <= MOST_NAMED else 20)
        super().__init__(
            f"{place} names {number_of(len(names), 'file that does', 'files that do')} not exist: {few}",
            f"paths are {where}",
        )


class Unreadable(Exception):
    """An image that cannot be used; its text is the reason, written to rejected.csv. One such image never ends a run."""


def rendered(error: TutelageError) -> str:
    """Return the text that the command prints for an error: each fault after "error: "."""
    return harmless("\n".join(f"error: {one}" for one in single(error)))


def harmless(text: str) -> str:
    """Return a text for a terminal: control characters, but for ends of lines and tabs, as Python writes them."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def seen_as(name: str) -> str:
    """Return what is seen of a name: of names that differ in blanks, invisible characters or Unicode form only, the same."""
    return " ".join(unicodedata.normalize("NFC", _INVISIBLE.sub("", name)).split())


def single(error: TutelageError) -> list[TutelageError]:
    """Return the single faults that an error contains."""
    return [one for part in error.errors for one in single(part)] if isinstance(error, SeveralErrors) else [error]


def raise_all(errors: list[TutelageError]) -> None:
    """Raise the collected errors: a single one as itself, several as one SeveralErrors; do nothing without any."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise SeveralErrors(errors)


def did_you_mean(word: str, words: Iterable[str], otherwise: str, most: int = 3) -> str:
    """Return "did you mean 'a' or 'b'?" for the nearest words, or another text when none is near.

    Words much farther away than the nearest are left out: '--lr' resembles '--galery' only by its dashes. A word that only looks the same
    is shown with its code points.
    """
    words = list(words)
    if twin := next((one for one in words if one != word and seen_as(one) == seen_as(word) != ""), ""):
        return f"{word!a} and {twin!a} differ in blanks, invisible characters or Unicode form only: use the same"
    near = difflib.get_close_matches(word, words, n=most, cutoff=0.6)
    likeness = [difflib.SequenceMatcher(None, one, word).ratio() for one in near]
    near = [one for one, like in zip(near, likeness, strict=True) if like > likeness[0] - 0.1]
    return f"did you mean {' or '.join(repr(w) for w in near)}?" if near else otherwise


def number_of(count: int, one: str, many: str = "") -> str:
    """Return a number with its word: number_of(1, "class", "classes") == "1 class". many: default: `one` with an s."""
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"


def shown(items: Iterable[object], most: int = 5) -> str:
    """Return a list as text for a sentence: the first `most` items, then how many more there are."""
    items = list(items)
    text = ", ".join("".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(item)) for item in items[:most])
    return text if len(items) <= most else f"{text} and {len(items) - most} more"
