"""Names of classes: which are refused, so that all others leave every file just as they came."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable

from tutelage.errors import TutelageError, shown

BREAKS = {"Cc", "Cs", "Zl", "Zp"}  # Unicode categories: control characters, surrogates, ends of lines and paragraphs


def faults_of_names(names: Iterable[str], place: object) -> list[TutelageError]:
    """Return an error for names that a line of text cannot hold, and one for names that differ in nothing that can be seen.

    Args:
        names: of the classes, each once. place: where they were read, for the messages.
    """
    names, errors, alike = list(names), [], defaultdict(list)
    broken = [name for name in names if not name.strip() or any(unicodedata.category(one) in BREAKS for one in name)]
    if broken:
        which = shown((ascii(name) for name in broken), 10)
        message = f"{place} has class names that are blank, not valid Unicode, or hold control characters: {which}"
        errors.append(TutelageError(message, "rename these classes"))
    for name in names:
        alike[" ".join(unicodedata.normalize("NFC", name).split())].append(name)
    pairs = [" and ".join(ascii(name) for name in group) for group in alike.values() if len(group) > 1]
    if pairs:
        message = f"{place} has classes whose names differ in blanks or Unicode form only: {shown(pairs)}"
        errors.append(TutelageError(message, "give them the same name if they are one class, else names that differ"))
    return errors
