"""What the files of an export folder may say. Their hashes show that nobody changed them, not that they were right.

Checked once, when an export is opened: by `tutelage predict`, by the predict.py of every export, and by `tutelage demo-page`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from tutelage.errors import TutelageError
from tutelage.image_size import sides
from tutelage.json_object import JSON
from tutelage.regular_file import json_of

MOST_PIXELS = 2048  # of a side of the input, as --student-size allows


def _is_number(value: object, least: float = -math.inf, most: float = math.inf) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def _is_whole(value: object, least: int, most: float) -> bool:
    return isinstance(value, int) and _is_number(value, least, most)


def _is_size(value: object) -> bool:
    try:
        return (
            isinstance(value, int | str)
            and not isinstance(value, bool)
            and all(_is_whole(side, 1, MOST_PIXELS) for side in sides(value))
        )
    except ValueError:
        return False


def _is_three(value: object, least: float, most: float) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(_is_number(one, least, most) for one in value)


def _is_colour(value: object) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(_is_whole(one, 0, 255) for one in value)


def _is_input(value: object) -> bool:
    if not (isinstance(value, dict) and isinstance(value.get("name"), str)):
        return False
    return (value.get("dtype"), value.get("layout")) in (("float32", "NCHW"), ("uint8", "NHWC"))


def _is_output(value: object) -> bool:
    if not (isinstance(value, dict) and isinstance(value.get("name"), str)):
        return False
    return value.get("kind") in ("logits", "probabilities")


# key of preprocess.json -> whether a value is possible, and what is
RULES: dict[str, tuple[Callable[[object], bool], str]] = {
    "task": (lambda one: one in (None, "classification", "segmentation"), "classification or segmentation"),
    "decode_short_side": (lambda one: one is None or _is_whole(one, 1, 1e6), "null or a number of pixels"),
    "size": (_is_size, f"1 to {MOST_PIXELS} pixels, or HEIGHTxWIDTH"),
    "resize": (lambda one: one in ("squash", "crop", "pad"), "squash, crop or pad"),
    "mean": (lambda one: _is_three(one, -1e6, 1e6), "three numbers"),
    "std": (lambda one: _is_three(one, 1e-6, 1e6), "three numbers above 0"),
    "input": (_is_input, "a name, dtype and layout, float32 and NCHW, or uint8 and NHWC"),
    "output": (_is_output, "a name and kind, logits or probabilities"),
    "unsure_below": (lambda one: one is None or _is_number(one), "null or a number"),
}


def recommended_of(about: JSON, names: tuple[str, ...], place: object) -> str:
    """Return the file that export.json recommends.

    Args:
        about: contents of export.json. names: of the files that it may recommend. place: the path of export.json, for the message.
    """
    if about.get("recommended") not in names:
        raise _wrong(place, f"recommended is {_short(about.get('recommended'))}, not one of {', '.join(names)}")
    return str(about["recommended"])


def preprocess_of(data: bytes, place: object) -> JSON:
    """Return the contents of preprocess.json. place: its path, for the message.

    Raises:
        TutelageError: it is not a JSON object, or a value in it is missing or impossible.
    """
    try:
        about = json_of(data)
    except ValueError as error:
        raise _wrong(place, f"it is not valid JSON: {error}") from None
    if not isinstance(about, dict):
        raise _wrong(place, "a JSON object is expected")
    for name, (possible, expected) in RULES.items():
        if not possible(about.get(name)):
            raise _wrong(place, f"{name} is {_short(about.get(name))}, not {expected}")
    return about


def labels_of(data: bytes, about: JSON, preprocess: JSON, place: object) -> list[str]:
    """Return the C class names of labels.txt.

    Args:
        about: contents of export.json, which says how many there are. preprocess: contents of preprocess.json, whose colours of masks
            must be as many. place: the path of labels.txt, for the message.
    """
    try:
        labels = data.decode("utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError:
        raise _wrong(place, "it is not UTF-8") from None
    if about.get("classes", len(labels)) != len(labels):
        raise _wrong(place, f"it has {len(labels)} names, but the model has {_short(about['classes'])} classes")
    colours = preprocess.get("colours")
    if preprocess.get("task") == "segmentation" and not (
        isinstance(colours, list) and len(colours) == len(labels) and all(map(_is_colour, colours))
    ):
        raise _wrong(place, f"preprocess.json beside it has no colour for each of the {len(labels)} classes")
    return labels


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _wrong(place: object, why: str) -> TutelageError:
    return TutelageError(f"{place} does not fit its model: {why}", "export again")
