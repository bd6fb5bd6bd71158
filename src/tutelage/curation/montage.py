"""Montage: queries and the images that they retrieved in one picture, for people to check. Imports no torch."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tutelage.data.masks import Colour, hue
from tutelage.files import atomic_write

MOST_WIDTH, MOST_HEIGHT = 3_000, 6_000  # pixels
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
        labels: (n,) integers, the class of each query; a negative one is never chosen.
        most: queries in all. If there are more classes, `most` of them are taken, evenly spaced.

    Returns:
        (k,) int64 positions, k <= most: one query of each shown class, then a second one of each that has more, ...
    """
    labels = np.asarray(labels)
    classes = np.unique(labels[labels >= 0])
    if len(classes) == 0 or most < 1:
        return np.zeros(0, np.int64)
    classes = _spaced(classes, most)
    each = max(1, min(PER_CLASS, most // len(classes)))
    chosen = [_spaced(np.flatnonzero(labels == one), each) for one in classes]
    return np.array([own[turn] for turn in range(each) for own in chosen if turn < len(own)], np.int64)


def _spaced(values: np.ndarray, most: int) -> np.ndarray:
    """Return at most this many of the values, evenly spaced."""
    return values[np.unique(np.linspace(0, len(values) - 1, min(most, len(values))).round().astype(int))]


def montage(
    rows: Sequence[Row], title: str = "", kept_out: Sequence[KeptOut] = (), tile: int = 64, columns: int = 10
) -> Image.Image:
    """Draw the picture: one line per query, which is framed in its class's colour, and the excluded images at the end.

    Args:
        rows: in the order to be shown. title: one line above, cut if too long.
        kept_out: images excluded as leaks or duplicates; as many are shown as fit on three lines.
        tile: side in pixels at which every image is shown, its proportions kept; 16 to 256. columns: images per line.

    Returns:
        RGB, at most 3,000 x 6,000 pixels. Columns and lines that do not fit are left out; the number of such lines is written.
    """
    tile = min(max(tile, 16), 256)
    pen = _Pen(tile)
    names = min(max(NAME_WIDTH, 2 * tile), max([40, *(pen.width(row.name, pen.name) for row in rows)]))
    first = MARGIN + names + 2 * GAP  # left edge of the query; its images follow
    images = first + tile + 4 * GAP
    fitting = (MOST_WIDTH - MARGIN - images + GAP) // (tile + GAP)
    columns = max(1, min(columns, fitting, max([6, *(len(row.brought) for row in rows)])))
    width = images + columns * (tile + GAP) - GAP + MARGIN
    strip = _strip(kept_out, width - 2 * MARGIN, pen)
    line = tile + pen.caption + 3 * GAP
    top = MARGIN + (pen.title + 4 * GAP if title else 0)
    room = MOST_HEIGHT - top - MARGIN - (strip.height if strip else 0) - pen.name - GAP
    shown = rows[: room // line]
    hidden = len(rows) - len(shown)
    height = top + line * len(shown) + (pen.name + GAP) * bool(hidden) + (strip.height if strip else 0) + MARGIN

    picture = Image.new("RGB", (width, height), GROUND)
    draw = ImageDraw.Draw(picture)
    if title:
        pen.write(draw, (MARGIN, MARGIN), title, pen.title, TEXT, width - 2 * MARGIN)
    colours = _colours(row.name for row in rows)
    for number, row in enumerate(shown):
        y = top + number * line
        pen.write(draw, (MARGIN, y + (tile - pen.name) // 2), row.name, pen.name, TEXT, names, align=1)
        outside = (first - FRAME, y - FRAME, first + tile + FRAME - 1, y + tile + FRAME - 1)
        draw.rectangle(outside, fill=colours[row.name])
        picture.paste(_tile(row.query, tile), (first, y))
        for column, (image, caption) in enumerate(row.brought[:columns]):
            x = images + column * (tile + GAP)
            picture.paste(_tile(image, tile), (x, y))
            pen.write(draw, (x, y + tile + 3), caption, pen.caption, FAINT, tile, align=0.5)
        if not row.brought:
            pen.write(draw, (images, y + (tile - pen.name) // 2), "no images found", pen.name, FAINT)
    bottom = top + line * len(shown)
    if hidden:
        pen.write(draw, (first, bottom), f"and {hidden:,} more", pen.name, FAINT)
        bottom += pen.name + GAP
    if strip:
        picture.paste(strip, (MARGIN, bottom))
    return picture


def save_montage(path: Path, picture: Image.Image) -> None:
    """Write a picture as JPEG of quality 85, atomically."""
    with atomic_write(path) as temporary:
        picture.save(temporary, "JPEG", quality=85, subsampling=0, optimize=True)


def _strip(kept_out: Sequence[KeptOut], width: int, pen: _Pen) -> Image.Image | None:
    """Draw pairs of images side by side under a heading, `width` pixels wide; return None if there are none."""
    if not kept_out:
        return None
    tile = pen.tile
    wide, high = 2 * tile + 3 * GAP, tile + pen.caption + 3 * GAP
    across = max(1, (width + 2 * GAP) // wide)
    shown = kept_out[: across * KEPT_OUT_LINES]
    top = 4 * GAP + pen.name + 2 * GAP
    strip = Image.new("RGB", (width, top + high * -(-len(shown) // across)), GROUND)
    draw = ImageDraw.Draw(strip)
    draw.line((0, GAP, strip.width, GAP), fill=EDGE)
    more = f" ({len(shown):,} of {len(kept_out):,})" if len(shown) < len(kept_out) else ""
    heading = f"Kept out{more}: each beside the image that it duplicates"
    pen.write(draw, (0, 4 * GAP), heading, pen.name, TEXT, strip.width)
    for number, one in enumerate(shown):
        x, y = number % across * wide, top + number // across * high
        strip.paste(_tile(one.image, tile), (x, y))
        strip.paste(_tile(one.twin, tile), (x + tile + GAP // 3, y))
        pen.write(draw, (x, y + tile + 3), one.caption, pen.caption, FAINT, 2 * tile + GAP // 3, align=0.5)
    return strip


def _tile(image: np.ndarray, side: int) -> Image.Image:
    """(H, W, 3) uint8 -> a square that shows the whole image, with a thin edge to set white images off the light ground."""
    source = Image.fromarray(np.ascontiguousarray(image))
    scale = side / max(source.size)
    inside = (max(1, round(source.width * scale)), max(1, round(source.height * scale)))
    square = Image.new("RGB", (side, side), TILE)
    square.paste(source.resize(inside, Image.Resampling.BICUBIC), ((side - inside[0]) // 2, (side - inside[1]) // 2))
    ImageDraw.Draw(square).rectangle((0, 0, side - 1, side - 1), outline=EDGE)
    return square


def _colours(names: Iterable[str]) -> dict[str, Colour]:
    """Return a colour for each name, in order of appearance."""
    return {name: hue(number, 0.45, 0.62) for number, name in enumerate(dict.fromkeys(names))}


class _Pen:
    """Writes text in sizes (pixels) that depend on the side of a tile."""

    def __init__(self, tile: int):
        self.tile, self.title = tile, max(16, tile * 5 // 16)
        self.name, self.caption = max(12, tile // 5), max(9, tile // 6)

    def width(self, text: str, size: int) -> int:
        """Return the width of a text in pixels, as `write` would draw it."""
        text, font = _writable(text, size)
        return round(font.getlength(text) + 0.5)

    def write(
        self,
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
