"""classes.txt: the names of the classes of masks, one per line, with a number or a colour of each if the data set has them.

Numbers and colours are understood before and after the name, in the usual forms: `2: square`, `square 2`, `2 -> square`,
`square 0 0 142`, `(0, 0, 142) square`, `square #00008e`. What could be a number as well as a part of a name counts as a number only if
all lines together give 0 to C - 1; numbers that masks could hold but that do not fit are an error, and so are colours with an opacity,
comments and #fff.
"""

from __future__ import annotations

import re
from pathlib import Path

from tutelage.data.class_names import LONGEST, faults_of_names
from tutelage.data.masks import IGNORE, MOST_CLASSES, Colour, MaskEncoding, made_colours
from tutelage.errors import TutelageError, raise_all, shown
from tutelage.regular_file import text_in

FORM = (
    "one name per line, `number: name` or `name red green blue`; `ignore red green blue` for a colour of no class, "
    "all lines in one form"
)
UNLISTED = ("ignore", "void")  # with a colour, no class
VOID = (
    *UNLISTED,
    "ignored",
    "unlabelled",
    "unlabeled",
    "unknown",
    "undefined",
    "none",
    "no class",
    "nodata",
    "no data",
)

_Line = tuple[str, Colour | None]

_ARROW, _DASH = r"(?:[-=]+>|[→⇒])", r"\s+[-–—]\s+"
_GAP = (
    rf"(?>(?:{_DASH}|{_ARROW}|(?:(?!=+>)[\s,;:=|])+|(?=[(\[#]))+)"  # atomic, or long blanks would take exponential time
)
_COLOUR = (
    r"(?:(?:rgb\s*)?[(\[]?\s*(?P<red>\d{1,3})[,;\s]+(?P<green>\d{1,3})[,;\s]+(?P<blue>\d{1,3})\s*[)\]]?"
    r"|#(?P<hex>[0-9a-f]{6}))"
)
_COLOUR_LAST = re.compile(rf"(?P<name>.*?\S){_GAP}{_COLOUR}(?:[,;:|][\s,;:|]*+)?", re.IGNORECASE)
_COLOUR_FIRST = re.compile(rf"(?:(?P<number>\d{{1,3}}){_GAP})?{_COLOUR}{_GAP}(?P<name>[^\d\s].*)", re.IGNORECASE)
_NUMBER = r"[(\[]?(?P<number>-?\d{1,3})"
_NUMBER_FIRST = re.compile(
    rf"{_NUMBER}(?P<sign>\s*{_ARROW}\s*|\s*[:=,;|.)\]]+(?:\s+|(?!\d))|{_DASH}|\s+)(?P<name>\S.*)"
)
_NUMBER_LAST = re.compile(rf"(?P<name>.*?\S)(?P<sign>\s*{_ARROW}\s*|(?<!\d)\s*[:=,;|]\s*|{_DASH}|\s+){_NUMBER}[)\]]?")

# What is neither a name nor a colour that is read.
_BYTE, _SEP = r"(?:1?\d?\d|2[0-4]\d|25[0-5])", r"[,;\s]+"
_OPAQUE = re.compile(
    rf"\brgba\s*[(\[]|[(\[{{]\s*[\d.]+(?:{_SEP}[\d.]+){{3}}\s*[)\]}}]|#[0-9a-f]{{8}}(?!\w)", re.IGNORECASE
)
_FOUR_LAST = re.compile(rf"(?<![\w.])({_BYTE}){_SEP}{_BYTE}{_SEP}{_BYTE}{_SEP}({_BYTE})[\s,;:|]*$")
_FOUR_FIRST = re.compile(rf"({_BYTE}){_SEP}{_BYTE}{_SEP}{_BYTE}{_SEP}({_BYTE})(?![\w.])")
_THREE = re.compile(
    rf"(?<![\w.])\d+(?:\.\d+)?(?:{_SEP}\d+(?:\.\d+)?){{2}}|\brgb\s*[(\[]|\b0x[0-9a-f]{{6}}", re.IGNORECASE
)
_SHORT_HEX = re.compile(r"(?<![^\s,;:=|(\[])#([0-9a-f]{3,4})(?![^\s,;:=|)\]])", re.IGNORECASE)
_COMMENT = re.compile(r"(?:#(?![0-9a-f]{3,8}(?!\w))|//)\s*\S.*|.*\S\s(?:#|//)\s.*", re.IGNORECASE)
_MARKS = r"[-–—=<>→⇒:|,;/\\~*+.&]+"
_MARKED = re.compile(rf"{_MARKS}\s.*|.*\s{_MARKS}")


def read_coding(path: Path) -> MaskEncoding:
    """Read class names, one per line, with the numbers and colours that the data set gives them; `coloured` says whether it gives colours.

    Raises:
        TutelageError: an unreadable file, too few or too many names, a repeated name, colours for only some classes, or lines that
            could mean several things.
    """
    try:
        lines = [line.strip() for line in text_in(path, "utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8"
        hint = f"write the names of the classes into a text file: {FORM}"
        raise TutelageError(f"{path} cannot be read: {why}", hint) from error
    long = [
        line for line in lines if len(line) > LONGEST + 100
    ]  # with number and colour; some expressions take long on longer lines
    raise_all([*faults_of_names(dict.fromkeys(long), path), *_unread([] if long else lines, path)])
    parts = _coloured(lines, path)
    ignored = tuple(colour for line, colour in parts if colour and _no_class((line, colour)))
    parts = _by_number([part for part in parts if not _no_class(part)], path)
    names = tuple(name for name, _ in parts)
    raise_all(faults_of_names(dict.fromkeys(names), path))
    if marked := [name for name in names if name not in lines and _MARKED.fullmatch(name)]:
        message = f"{path} has lines that leave a sign in the name: {shown(map(repr, marked))}"
        raise TutelageError(message, f"write {FORM}")
    twice = sorted({name for name in names if names.count(name) > 1})
    without = [name for name, colour in parts if colour is None]
    if twice or len(names) < 2 or len(names) > MOST_CLASSES:
        what = f"names {shown(twice)} twice" if twice else f"has {len(names)} names"
        raise TutelageError(f"{path} {what}", f"write 2 to {MOST_CLASSES} names, each once: {FORM}")
    if without and len(without) < len(names):
        raise TutelageError(f"{path} has no colour for {shown(without)}", "give colours to all classes, or to none")
    given = tuple(colour for _, colour in parts if colour)
    return MaskEncoding(names, given or made_colours(len(names)), bool(given), ignored)


def _unread(lines: list[str], path: Path) -> list[TutelageError]:
    """Return errors for lines that may be comments, and for colours such as #fff, which may be a part of the name too."""
    errors = []
    comments = [line for line in lines if _COMMENT.fullmatch(line)]
    if comments and (len(comments) < len(lines) or any(line[0] not in "#/" for line in comments)):
        hint = "every line is a class: remove comments, also behind names, and rename classes that look like one"
        errors.append(TutelageError(f"{path} has lines that look like comments: {shown(map(repr, comments))}", hint))
    short = [
        line for line in lines if line not in comments and _SHORT_HEX.search(line) and _SHORT_HEX.sub("", line).strip()
    ]
    letters = any(not found.isdecimal() for line in short for found in _SHORT_HEX.findall(line))
    if letters or (
        short and len(short) == len(lines) == len({_SHORT_HEX.sub("", line) for line in short})
    ):  # not `Room #101`
        hint = "write colours as #RRGGBB or `name red green blue`, and numbers that belong to a name without #"
        errors.append(TutelageError(f"{path} has colours that are cut short: {shown(map(repr, short))}", hint))
    return errors


def _coloured(lines: list[str], path: Path) -> list[_Line]:
    """Return each line without its colour, and the colour. Of `2 0 0 142 square` remains `2: square`.

    Raises:
        TutelageError: more numbers than a colour and a class number, colours beyond 255 or with an opacity, colours before some names and
            after others.
    """
    parts: list[_Line] = []
    before, after, unclear = [], [], []
    for line in lines:
        last, first = _COLOUR_LAST.fullmatch(line), _COLOUR_FIRST.fullmatch(line)
        name, colour = line, None
        if found := last or first:
            name, colour = found["name"], _colour(found)
            if found is first and found["number"]:
                name = f"{found['number']}: {name}"
        most = 2 if colour else 3
        row = rf"(?:\d{{1,3}}[,;\s]+){{{most}}}.*|.*?(?:[,;\s]+\d{{1,3}}){{{most}}}"
        several = re.fullmatch(row, name) or _THREE.search(name)
        if (last and first) or several or (colour and max(colour) > 255):
            unclear.append(line)
        if colour and not _no_class((name, colour)):
            (after if last else before).append(line)
        parts.append((name, colour))
    if opaque := _with_opacity(lines, parts):
        hint = (
            "leave out the opacity, the fourth number of a colour; set numbers that belong to the name apart from the colour by "
            "brackets: `name (red, green, blue)`"
        )
        message = (
            f"{path} has lines of four numbers, which may be a colour with its opacity: {shown(map(repr, opaque))}"
        )
        raise TutelageError(message, hint)
    if unclear or (before and after):
        which = shown(repr(line) for line in (unclear or [after[0], before[0]]))
        raise TutelageError(f"{path} has lines whose numbers could mean several things: {which}", f"write {FORM}")
    return parts


def _with_opacity(lines: list[str], parts: list[_Line]) -> list[str]:
    """Return lines of four numbers that may be a colour with its opacity. They are a class number and a colour if the first numbers are
    0 to C - 1, and the first are part of the names if these are the same without them, unless all end in 255."""
    if certain := [line for line in lines if _OPAQUE.search(line)]:
        return certain
    classes = [line for line, part in zip(lines, parts, strict=True) if not _no_class(part)]
    found = {line: run for line in classes if (run := _FOUR_FIRST.match(line) or _FOUR_LAST.search(line))}
    numbered = sorted(int(run[1]) for run in found.values()) == list(range(len(classes)))
    same = len({line.replace(run[0], "") for line, run in found.items()}) < len(found)
    inside = all(run.start() and line[0] in "([0123456789" for line, run in found.items())  # `0 road 128 64 128 255`
    full = all(run[2] == "255" for run in found.values())
    return [] if (numbered or same) and not inside and not full else [*found]


def _colour(found: re.Match[str]) -> Colour:
    red, green, blue = bytes.fromhex(found["hex"]) if found["hex"] else map(int, found.group("red", "green", "blue"))
    return red, green, blue


def _no_class(part: _Line) -> bool:
    """Return whether a line names what is no class: `ignore` or `void` with a colour, or number 255 under one of the names in VOID."""
    line, colour = part
    found = _NUMBER_FIRST.fullmatch(line) or _NUMBER_LAST.fullmatch(line)
    if found and int(found["number"]) == IGNORE:
        return re.sub(r"[-_\s]+", " ", found["name"].lower()) in VOID
    return colour is not None and line.lower() in UNLISTED


def _by_number(parts: list[_Line], path: Path) -> list[_Line]:
    """Return names and colours in the order of the numbers before or after the names, without them, if these are 0 to C - 1.

    Numbers are part of the names if without them names would be the same, if only blanks set them apart and not every line has
    one, or if none is below C, so that no mask could hold them.

    Raises:
        TutelageError: other numbers than 0 to C - 1.
    """
    for form in (_NUMBER_FIRST, _NUMBER_LAST):
        found = [form.fullmatch(name) for name, _ in parts]
        numbers = {int(m["number"]): (m["name"], colour) for m, (_, colour) in zip(found, parts, strict=True) if m}
        every, different = all(found), len({m["name"] for m in found if m}) == sum(map(bool, found))
        if every and different and sorted(numbers) == list(range(len(parts))):
            return [numbers[number] for number in range(len(parts))]
        signs = any(m["sign"].strip(" \t.") for m in found if m)
        four = form is _NUMBER_LAST and any(colour for _, colour in parts)  # `name 0 0 142 255`, with an opacity
        meant = signs or (every and (four or any(number < len(parts) for number in numbers)))
        if different and meant:
            raise _misnumbered([m and int(m["number"]) for m in found], path)
    return parts


def _misnumbered(numbers: list[int | None], path: Path) -> TutelageError:
    """Return the error for class numbers that are not 0 to C - 1; None where a line has no number."""
    given = sorted(number for number in numbers if number is not None)
    if given == list(range(1, len(numbers) + 1)):
        hint = "number them from 0, and subtract 1 from the masks if these count from 1; or name what 0 is, if masks show it"
        return TutelageError(f"{path} numbers its classes from 1", hint)
    hint = "number them from 0, as masks do, without gaps"
    if IGNORE in given:
        hint = "255 is no class: name it `ignore`, and number the classes from 0"
    if len({*given}) == len(numbers) and 0 <= given[0] <= given[-1] <= IGNORE:
        lines = shown((f"`name {number} {number} {number}`" for number in given), 20)
        hint += f"; if the masks are greys of these numbers, write {lines}"
    if None in numbers:
        hint = "number all of them from 0, as masks do, or write the names without numbers in the order of their numbers in the masks"
        return TutelageError(f"{path} numbers some classes ({shown(given)}) and {numbers.count(None)} not", hint)
    return TutelageError(f"{path} numbers its classes {shown(given)}, not 0 to {len(numbers) - 1}, each once", hint)
