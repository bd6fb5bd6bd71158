"""Montage: queries and the images that they retrieved in one picture, for people to check. Imports no torch."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tutelage.data.masks import Colour, hue

SIDE = 64  # of every image in pixels; its proportions are kept
TITLE, NAME, CAPTION = 20, 12, 10  # sizes of text in pixels
MARGIN, GAP, FRAME = 24, 6, 3
NAME_WIDTH = 150  # pixels at most for a class name; about 20 letters
KEPT_OUT_LINES = 3
PER_CLASS = 3  # most queries of one class
GROUND, TILE, EDGE = (250, 250, 248), (238, 238, 235), (218, 218, 214)
TEXT, FAINT = (32, 33, 36), (110, 112, 116)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# Pillow's own font lacks accented letters; other text uses the first of these that is installed and has all letters.
FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "arial.ttf",
    "Arial Unicode.ttf",
    "NotoSansCJK-Regular.ttc",
    "msyh.ttc",
    "Hiragino Sans GB.ttc",
)


@dataclass(frozen=True)
class Row:
    """One query. name: of its class. query: (H, W, 3) uint8. brought: retrieved images, best first, each with a caption."""

    name: str
    query: np.ndarray
    brought: list[tuple[np.ndarray, str]] = field(default_factory=list)


@dataclass(frozen=True)
class KeptOut:
    """An excluded image, the image that it duplicates (both (H, W, 3) uint8), and a caption."""

    image: np.ndarray
    twin: np.ndarray
    caption: str = ""


def choose_rows(labels: np.ndarray, most: int = 30) -> np.ndarray:
    """Choose the queries to show: equally many of each class, evenly spaced, with the classes taking turns.

    choose_rows([0, 0, 0, 1, 1, 1], most=4) == [0, 3, 2, 5]

    Args:
        labels: (n,) integers, the class of each query.
        most: queries in all. If there are more classes, `most` of them are taken, evenly spaced.

    Returns:
        (k,) int64 positions, k <= most: one query of each shown class, then a second one of each that has more, ...
    """
    classes = _spaced(np.unique(labels), most)
    each = max(1, min(PER_CLASS, most // len(classes)))
    chosen = [_spaced(np.flatnonzero(labels == one), each) for one in classes]
    return np.array([own[turn] for turn in range(each) for own in chosen if turn < len(own)], np.int64)


def _spaced(values: np.ndarray, most: int) -> np.ndarray:
    """Return at most this many of the values, evenly spaced."""
    return values[np.unique(np.linspace(0, len(values) - 1, min(most, len(values))).round().astype(int))]


def montage(rows: Sequence[Row], title: str, kept_out: Sequence[KeptOut] = (), leaks: int = 0) -> Image.Image:
    """Draw the picture: one line per query, which is framed in its class's colour, and the excluded images at the end.

    Args:
        rows: in the order to be shown, each as wide as its images. title: one line above, cut if too long.
        kept_out: images excluded as leaks; as many are shown as fit on three lines. leaks: how many were excluded in all.

    Returns:
        RGB.
    """
    names = min(NAME_WIDTH, max([40, *(_width(row.name, NAME) for row in rows)]))
    first = MARGIN + names + 2 * GAP  # left edge of the query; its images follow
    images = first + SIDE + 4 * GAP
    columns = max([6, *(len(row.brought) for row in rows)])
    width = images + columns * (SIDE + GAP) - GAP + MARGIN
    strip = _strip(kept_out, leaks, width - 2 * MARGIN)
    line, top = SIDE + CAPTION + 3 * GAP, MARGIN + TITLE + 4 * GAP
    bottom = top + line * len(rows)

    picture = Image.new("RGB", (width, bottom + (strip.height if strip else 0) + MARGIN), GROUND)
    draw = ImageDraw.Draw(picture)
    _write(draw, (MARGIN, MARGIN), title, TITLE, TEXT, width - 2 * MARGIN)
    colours = {name: hue(number, 0.45, 0.62) for number, name in enumerate(dict.fromkeys(row.name for row in rows))}
    for number, row in enumerate(rows):
        y = top + number * line
        _write(draw, (MARGIN, y + (SIDE - NAME) // 2), row.name, NAME, TEXT, names, align=1)
        outside = (first - FRAME, y - FRAME, first + SIDE + FRAME - 1, y + SIDE + FRAME - 1)
        draw.rectangle(outside, fill=colours[row.name])
        picture.paste(_tile(row.query), (first, y))
        for column, (image, caption) in enumerate(row.brought):
            x = images + column * (SIDE + GAP)
            picture.paste(_tile(image), (x, y))
            _write(draw, (x, y + SIDE + 3), caption, CAPTION, FAINT, SIDE, align=0.5)
        if not row.brought:
            _write(draw, (images, y + (SIDE - NAME) // 2), "no images found", NAME, FAINT)
    if strip:
        picture.paste(strip, (MARGIN, bottom))
    return picture


def _strip(kept_out: Sequence[KeptOut], leaks: int, width: int) -> Image.Image | None:
    """Draw pairs of images side by side under a heading, `width` pixels wide; return None if there are none. leaks: how many there are."""
    if not kept_out:
        return None
    wide, high = 2 * SIDE + 3 * GAP, SIDE + CAPTION + 3 * GAP
    across = max(1, (width + 2 * GAP) // wide)
    shown = kept_out[: across * KEPT_OUT_LINES]
    top = 4 * GAP + NAME + 2 * GAP
    strip = Image.new("RGB", (width, top + high * -(-len(shown) // across)), GROUND)
    draw = ImageDraw.Draw(strip)
    draw.line((0, GAP, strip.width, GAP), fill=EDGE)
    more = f" ({len(shown):,} of {leaks:,})" if len(shown) < leaks else ""
    heading = f"Kept out{more}: each beside the image that it duplicates"
    _write(draw, (0, 4 * GAP), heading, NAME, TEXT, strip.width)
    for number, one in enumerate(shown):
        x, y = number % across * wide, top + number // across * high
        strip.paste(_tile(one.image), (x, y))
        strip.paste(_tile(one.twin), (x + SIDE + GAP // 3, y))
        _write(draw, (x, y + SIDE + 3), one.caption, CAPTION, FAINT, 2 * SIDE + GAP // 3, align=0.5)
    return strip


def _tile(image: np.ndarray) -> Image.Image:
    """(H, W, 3) uint8 -> a square that shows the whole image, with a thin edge to set white images off the light ground."""
    source = Image.fromarray(np.ascontiguousarray(image))
    scale = SIDE / max(source.size)
    inside = (max(1, round(source.width * scale)), max(1, round(source.height * scale)))
    square = Image.new("RGB", (SIDE, SIDE), TILE)
    square.paste(source.resize(inside, Image.Resampling.BICUBIC), ((SIDE - inside[0]) // 2, (SIDE - inside[1]) // 2))
    ImageDraw.Draw(square).rectangle((0, 0, SIDE - 1, SIDE - 1), outline=EDGE)
    return square


def _width(text: str, size: int) -> int:
    """Return the width of a text in pixels, as `_write` would draw it."""
    text, font = _writable(text, size)
    return round(font.getlength(text) + 0.5)


def _write(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    text: str,
    size: int,
    colour: Colour,
    width: int | None = None,
    align: float = 0,
) -> None:
    """Write one line with its top at `place`, cut to `width` and aligned in it: left (0), centred (0.5) or right (1)."""
    text, font = _writable(text, size)
    if width is not None and font.getlength(text) > width:
        kept = len(text)
        while kept and font.getlength(text[:kept].rstrip() + "...") > width:
            kept -= 1
        text = text[:kept].rstrip() + "..."
    shift = 0 if width is None else max(0, width - font.getlength(text)) * align
    draw.text((place[0] + shift, place[1]), text, font=font, fill=colour)


@lru_cache(maxsize=256)
def _font(name: str, size: int) -> Font | None:
    """Return a font by its file's name, or Pillow's own for an empty name; None if it is not installed."""
    try:
        return ImageFont.truetype(name, size) if name else ImageFont.load_default(size=size)
    except (OSError, ImportError, TypeError):  # no such font; a Pillow without FreeType; a Pillow before 10.1
        return None if name else ImageFont.load_default()


@lru_cache(maxsize=4096)
def _writable(text: str, size: int) -> tuple[str, Font]:
    """Return the text on one line and a font for it; letters that no font has lose their accents or become ?."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    own = _font("", size)
    assert own is not None  # Pillow's
    if not isinstance(own, ImageFont.FreeTypeFont):
        return text.encode("latin-1", "replace").decode("latin-1"), own
    for name in ("", *FONTS):
        font = _font(name, size)
        if font is not None and all(_has(font, c) for c in text):
            return text, font
    plain = (unicodedata.normalize("NFKD", c)[:1] for c in text)
    best = _font(FONTS[0], size) or own
    return "".join(c if _has(best, c) else p if _has(best, p) else "?" for c, p in zip(text, plain, strict=True)), best


def _has(font: Any, character: str) -> bool:
    """Return whether a font has a character, instead of drawing the box that stands for missing ones. font: whose `getmask` may be read."""
    return character.isspace() or bytes(font.getmask(character)) != bytes(font.getmask("\uffff"))
