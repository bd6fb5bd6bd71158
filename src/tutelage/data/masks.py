"""Masks: the class of every pixel, as PNG of class numbers, of palette indices, or of colours that classes.txt lists.

In memory a mask is (H, W) uint8: class numbers, IGNORE where no class is given. A mask is never interpolated: to resize
it, the nearest pixel is taken.
"""

from __future__ import annotations

import colorsys
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from tutelage.data import views
from tutelage.data.class_names import faults_of_names
from tutelage.data.decode import _open, _reason, turned
from tutelage.data.image_cache import ImageCodec, Images
from tutelage.errors import TutelageError, Unreadable, raise_all, shown
from tutelage.regular_file import text_in

IGNORE = 255
MOST_CLASSES = 255
TAKES = 64  # bytes of memory for a pixel while the colours of a mask are turned into numbers, as int64

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class MaskEncoding:
    """Meaning of a mask's values. classes: C names. colours: C triples, given or generated. coloured: masks hold these colours.

    ignored: the colours that stand for no class.
    """

    classes: tuple[str, ...]
    colours: tuple[Colour, ...]
    coloured: bool = False
    ignored: tuple[Colour, ...] = ()


@dataclass(frozen=True)
class Values:
    """Raw contents of one mask file.

    pixels: (H, W) int32 class numbers, or (H, W, 3) uint8 colours. palette: colours by number, if the file has a palette. bits: whether a
    pixel is one bit, and 1 is white.
    """

    pixels: np.ndarray
    palette: dict[int, Colour] = field(default_factory=dict)
    bits: bool = False


def read_coding(path: Path) -> MaskEncoding:
    """Read class names, one per line, each followed by three numbers if the data set has colours of its own.

    Raises:
        TutelageError: an unreadable file, too few or too many names, a repeated name, or colours for only some classes.
    """
    form = "one name per line, or `name red green blue`; `ignore red green blue` for a colour of no class"
    try:
        lines = [line.strip() for line in text_in(path, "utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8"
        hint = f"write the names of the classes into a text file: {form}"
        raise TutelageError(f"{path} cannot be read: {why}", hint) from error
    found = [re.fullmatch(r"(.*?)[,;\s]+(\d{1,3})[,;\s]+(\d{1,3})[,;\s]+(\d{1,3})", line) for line in lines]
    parts = [
        (m[1], (int(m[2]), int(m[3]), int(m[4]))) if m else (line, None) for m, line in zip(found, lines, strict=True)
    ]
    ignored = tuple(colour for name, colour in parts if colour and name.lower() in ("ignore", "void"))
    parts = [(name, colour) for name, colour in parts if not (colour and name.lower() in ("ignore", "void"))]
    parts = _by_number(parts, path)
    names = tuple(name for name, _ in parts)
    raise_all(faults_of_names(dict.fromkeys(names), path))
    twice = sorted({name for name in names if names.count(name) > 1})
    without = [name for name, colour in parts if colour is None]
    if twice or len(names) < 2 or len(names) > MOST_CLASSES:
        what = f"names {shown(twice)} twice" if twice else f"has {len(names)} names"
        raise TutelageError(f"{path} {what}", f"write 2 to {MOST_CLASSES} names, each once: {form}")
    if without and len(without) < len(names):
        raise TutelageError(f"{path} has no colour for {shown(without)}", "give colours to all classes, or to none")
    given = tuple(colour for _, colour in parts if colour)
    return MaskEncoding(names, given or made_colours(len(names)), bool(given), ignored)


def made_colours(count: int) -> tuple[Colour, ...]:
    """Return a colour for each class, alternately light and dark."""
    return tuple(hue(number, (0.42, 0.62, 0.52)[number % 3], 0.65) for number in range(count))


def hue(number: int, light: float, saturation: float) -> Colour:
    """Return the colour of a number, with lightness and saturation in [0, 1]; hues are a golden angle apart, so that neighbours differ."""
    red, green, blue = colorsys.hls_to_rgb((0.58 + 0.618034 * number) % 1, light, saturation)
    return round(255 * red), round(255 * green), round(255 * blue)


def _by_number(parts: list[tuple[str, Colour | None]], path: Path) -> list[tuple[str, Colour | None]]:
    """Return names and colours in the order of the numbers before the names, without them, if these are 0 to C - 1.

    Raises:
        TutelageError: the numbers are 1 to C, but masks begin at 0.
    """
    found = [re.fullmatch(r"(\d{1,3})[.:,;\s]+(\S.*)", name) for name, _ in parts]
    numbered = {int(m[1]): (m[2], colour) for m, (_, colour) in zip(found, parts, strict=True) if m}
    if len(numbered) == len(parts) and sorted(numbered) == list(range(1, len(parts) + 1)):
        hint = "number them from 0, as masks do, or write the names without numbers in the order of their numbers in the masks"
        raise TutelageError(f"{path} numbers its classes from 1", hint)
    if len(numbered) < len(parts) or sorted(numbered) != list(range(len(parts))):
        return parts
    return [numbered[number] for number in range(len(parts))]


def read_values(data: bytes) -> Values:
    """Decode one mask without interpreting its values.

    Raises:
        Unreadable: not an image, broken, or of a format that changes values (JPEG).
    """
    try:
        image = _open(data)
        if image.format == "JPEG":
            raise Unreadable("a JPEG changes the values of a mask: PNG is read")
        image = turned(image)
        if image.mode in ("RGB", "RGBA", "CMYK", "YCbCr"):
            return Values(np.array(image.convert("RGB")))
        palette = image.getpalette() if image.mode == "P" else None
        numbers = np.array(image if image.mode in ("P", "L", "1") or image.mode.startswith("I") else image.convert("L"))
    except Unreadable:
        raise
    except Exception as error:  # Pillow's readers raise almost anything on broken data
        raise Unreadable(_reason(error)) from None
    triples = np.array(palette or [], np.int64).reshape(-1, 3)[:MOST_CLASSES].tolist()
    known = {i: (r, g, b) for i, (r, g, b) in enumerate(triples)}
    return Values(numbers.astype(np.int32), known, image.mode == "1")


def numbered(values: Values, coding: MaskEncoding) -> tuple[np.ndarray, dict[str, int]]:
    """Return the class numbers of a mask, and the values that are not a class.

    Where classes have colours, the colour of a pixel counts however the file is packed: RGB, palette, grey or one bit. Only a file of one
    channel in which some colour is not listed is read by its numbers.

    Returns:
        (H, W) uint8, IGNORE where the value is not a class; such values or colours as text -> number of pixels.
    """
    classes, pixels = len(coding.classes), _as_colours(values, coding) if coding.coloured else values.pixels
    if pixels.ndim == 2:
        strange = (pixels < 0) | ((pixels >= classes) & (pixels != IGNORE))
        found, counts = np.unique(pixels[strange], return_counts=True)
        kept = np.where(strange, IGNORE, pixels).astype(np.uint8)
        return kept, {str(v): int(n) for v, n in zip(found.tolist(), counts.tolist(), strict=True)}
    codes = (pixels.astype(np.int64) * np.array([65536, 256, 1])).sum(axis=2)
    out, known = np.full(codes.shape, IGNORE, np.uint8), np.zeros(codes.shape, bool)
    for colour, number in [*zip(coding.colours, range(classes), strict=True), *((c, IGNORE) for c in coding.ignored)]:
        here = codes == colour[0] * 65536 + colour[1] * 256 + colour[2]
        out[here], known = number, known | here
    found, counts = np.unique(codes[~known], return_counts=True)
    names = [f"({v >> 16}, {v >> 8 & 255}, {v & 255})" for v in found.tolist()]
    return out, dict(zip(names, counts.tolist(), strict=True))


def _as_colours(values: Values, coding: MaskEncoding) -> np.ndarray:
    """Return the (H, W, 3) colours of a mask of one channel if all of them are listed, else its pixels as they are."""
    if values.pixels.ndim == 3:
        return values.pixels
    seen, places = np.unique(values.pixels, return_inverse=True)
    grey = 255 if values.bits else 1
    colours = [values.palette.get(number, (grey * number,) * 3) for number in seen.tolist()]
    if not set(colours) <= {*coding.colours, *coding.ignored}:
        return values.pixels
    return np.array(colours, np.int64)[places.reshape(values.pixels.shape)]


def truth_of(mask: np.ndarray) -> bytes:
    """Return 32 bytes that identify a mask: SHA-256 of the shape and the class numbers. mask: (H, W) uint8."""
    return hashlib.sha256(repr(mask.shape).encode() + mask.tobytes()).digest()


def kind_of(coding: MaskEncoding) -> ImageCodec:
    """Return the codec with which the image cache decodes such masks."""

    def decode(data: bytes, short_side: int | None = None) -> tuple[np.ndarray, tuple[int, int]]:
        mask = np.ascontiguousarray(numbered(read_values(data), coding)[0])
        return mask, (mask.shape[0], mask.shape[1])

    about = "by colour " + repr(
        (len(coding.classes), coding.colours, coding.ignored) if coding.coloured else len(coding.classes)
    )
    return ImageCodec(f"masks-{hashlib.sha256(about.encode()).hexdigest()[:8]}", 1, decode, TAKES)


@dataclass(frozen=True)
class Masks:
    """The masks of some images, at their own size, in the order of the images; they take the place of labels.

    images: the masks. shapes: (n, 2), height and width of the stored images that they belong to.
    """

    images: Images
    shapes: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, positions: np.ndarray) -> Masks:
        """Return the masks at these positions."""
        return replace(self, images=self.images.take(positions), shapes=self.shapes[positions])

    def numbers(self, most: int = 64) -> np.ndarray:
        """Return (N,) int64 class numbers of `most` x `most` pixels of each mask, without IGNORE, for counting classes."""
        every = self.seen(None, (most, most)).reshape(-1)
        return every[every != IGNORE].astype(np.int64)

    def one(self, position: int) -> np.ndarray:
        """Return one mask, (H, W) uint8."""
        return self.images[int(position)]

    def seen(self, drawn: views.Views | None, size: tuple[int, int]) -> np.ndarray:
        """Return the region of each mask that its view shows or, without views, whole masks.

        Args:
            drawn: views of the images, one for each mask. size: height and width of the result.

        Returns:
            (n, H, W) uint8: for each pixel the class at its centre.
        """
        out = np.empty((len(self), *size), np.uint8)
        for i in range(len(self)):
            mask, shape = self.one(i), self.shapes[i]
            box = np.array([0, 0, *shape]) if drawn is None else drawn.boxes[i]
            flips = (False, False) if drawn is None else drawn.flips[i]
            rows, columns = (
                nearest(int(box[axis]), int(box[axis + 2]), int(shape[axis]), mask.shape[axis], size[axis], flip)
                for axis, flip in ((0, flips[1]), (1, flips[0]))
            )
            out[i] = mask[rows[:, None], columns]
        return out


Labels = np.ndarray | Masks  # (n,) int64 in [0, C), or n masks


def nearest(start: int, length: int, whole: int, pixels: int, size: int, flip: bool = False) -> np.ndarray:
    """Return, along one axis, which pixel of a mask lies at the centre of each pixel of a view.

    nearest(0, 4, 4, 4, 2) == [1, 3]

    Args:
        start, length: of the view's region, in pixels of an image that is `whole` pixels long.
        pixels: length of the mask, which covers the same extent. size: length of the result.
    """
    centres = (start + (np.arange(size) + 0.5) * length / size) * pixels / whole
    found = np.minimum(centres.astype(np.int64), pixels - 1)
    return found[::-1] if flip else found


def painted(mask: np.ndarray, colours: Sequence[Colour]) -> np.ndarray:
    """(H, W) uint8 class numbers -> (H, W, 3) uint8 in the classes' colours, IGNORE black."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(colours)] = np.array(colours, np.uint8)
    return table[mask]
