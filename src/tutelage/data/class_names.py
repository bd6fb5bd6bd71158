"""Names of classes: which are refused, so that all others leave every file just as they came."""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from tutelage.errors import TutelageError, seen_as, shown

BREAKS = {"Cc", "Cs", "Zl", "Zp"}  # Unicode categories: control characters, surrogates, ends of lines and paragraphs
LONGEST = 1000  # characters of a name; some file that was taken for a label has more
MOST_DIGITS = 18


def are_numbers(names: Iterable[str]) -> bool:
    """Whether all names are whole numbers, by which classes can be sorted."""
    return all(name.isdecimal() and len(name) <= MOST_DIGITS for name in names)


def faults_of_names(names: Iterable[str], place: object) -> list[TutelageError]:
    """Return an error for names that a line of text cannot hold, and one for names that differ in nothing that can be seen.

    Args:
        names: of the classes, each once. place: where they were read, for the messages.
    """
    names, errors, alike = list(names), [], defaultdict(list)
    broken = [name for name in names if not seen_as(name) or any(unicodedata.category(one) in BREAKS for one in name)]
    if broken:
        which = shown((ascii(name) for name in broken), 10)
        message = f"{place} has class names that are blank, not valid Unicode, or hold control characters: {which}"
        errors.append(TutelageError(message, "rename these classes"))
    if long := [name for name in names if len(name) > LONGEST]:
        which = shown(f"{name[:40]}... with {len(name):,}" for name in long)
        message = f"{place} has class names of more than {LONGEST:,} characters: {which}"
        errors.append(TutelageError(message, "rename these classes"))
    for name in names:
        alike[seen_as(name)].append(name)
    pairs = [" and ".join(ascii(name) for name in group) for group in alike.values() if len(group) > 1]
    if pairs:
        message = f"{place} has classes whose names differ in blanks, invisible characters or Unicode form only: {shown(pairs)}"
        errors.append(
            TutelageError(
                message, "give them the same name if they are one class, or clearly different names if they are not"
            )
        )
    return errors


def differ_in_case(names: Iterable[str]) -> list[str]:
    """Return a note for classes whose names differ in case only: letters may, but a folder Cat beside cat is often a slip."""
    alike: dict[str, list[str]] = defaultdict(list)
    for name in names:
        alike[name.casefold()].append(name)
    pairs = [" and ".join(group) for group in alike.values() if len(group) > 1]
    return [f"classes whose names differ in case only are kept apart: {shown(pairs)}"] if pairs else []


def check_folders(folder: Path) -> None:
    """Raise TutelageError if the name of a folder directly in this one, which becomes that of a class, is not UTF-8."""
    names = sorted(os.fsencode(item.name) for item in folder.iterdir() if item.is_dir())
    if broken := [name for name in names if not is_utf8(name)]:
        message = f"{folder} has class folders whose names are not UTF-8: {shown(broken, 10)}"
        raise TutelageError(message, "rename these folders")


def is_utf8(name: bytes) -> bool:
    """Return whether bytes are a text in UTF-8."""
    try:
        name.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
