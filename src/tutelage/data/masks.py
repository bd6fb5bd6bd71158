"""Masks: the class of every pixel, as PNG of class numbers, of palette indices, or of colours that classes.txt lists.

Whether colours or numbers say the class is decided once for a set (`colours_count`), never for a file.

In memory a mask is (H, W) uint8: class numbers, IGNORE where no class is given. A mask is never interpolated: to resize
it, the nearest pixel is taken.
"""

from __future__ import annotations

import colorsys
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image, ImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, SAMPLEFORMAT

from tutelage.data import views
from tutelage.data.decode import _open, _reason, turned
from tutelage.data.image_cache import ImageCodec, Images
from tutelage.errors import TutelageError, Unreadable, shown

IGNORE = 255
UNKNOWN = -1  # the meaning of what is not a class
MOST_CLASSES = 255
MOST_STRANGE = 100  # values of one mask that are not a class: of floats there can be as many as pixels
TAKES = 64  # bytes of memory for a pixel while the colours of a mask are turned into numbers, as int64

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class MaskEncoding:
    """Meaning of a mask's values. classes: C names. colours: C triples, given or generated. coloured: colours, not numbers, say the class.

    ignored: the colours that stand for no class.
    """

    classes: tuple[str, ...]
    colours: tuple[Colour, ...]
    coloured: bool = False
    ignored: tuple[Colour, ...] = ()

    def by_colour(self) -> dict[Colour, int]:
        """Return the class of each colour: its number, IGNORE, or UNKNOWN where a colour is given to two classes."""
        found: dict[Colour, int] = {}
        for colour, number in [
            *zip(self.colours, range(len(self.classes)), strict=True),
            *((c, IGNORE) for c in self.ignored),
        ]:
            found[colour] = number if found.get(colour, number) == number else UNKNOWN
        return found


@dataclass(frozen=True)
class Shade:
    """A number in a mask of one channel. colour: that it shows, None if its palette ends before. indexed: whether there is a palette."""

    number: int
    colour: Colour | None
    indexed: bool


@dataclass(frozen=True)
class Values:
    """Raw contents of one mask file.

    pixels: (H, W) int32 or float32 numbers as they are stored, or (H, W, 3) uint8 colours. colours: those that numbers show, of the
    palette if indexed, else grey. paletted: whether a palette of the file gives numbers their colours: one of plain greys, 0 to n, does
    so only in a GIF, which is never without. clear: (H, W) bool, where the mask is fully transparent, if it is anywhere.
    """

    pixels: np.ndarray
    colours: dict[int, Colour] = field(default_factory=dict)
    indexed: bool = False
    clear: np.ndarray | None = None
    paletted: bool = False

    def shade(self, number: int) -> Shade:
        """Return what a number shows."""
        return Shade(number, self.colours.get(number), self.indexed)

    def shades(self) -> frozenset[Shade]:
        """Return the numbers from 0 to 255 in a mask of one channel, without transparent pixels, and what they show."""
        seen = self.pixels if self.clear is None else self.pixels[~self.clear]
        numbers, odd = _small(seen)
        return frozenset(self.shade(number) for number in np.flatnonzero(np.bincount(numbers[~odd])).tolist())


def made_colours(count: int) -> tuple[Colour, ...]:
    """Return a colour for each class, alternately light and dark."""
    return tuple(hue(number, (0.42, 0.62, 0.52)[number % 3], 0.65) for number in range(count))


def hue(number: int, light: float, saturation: float) -> Colour:
    """Return the colour of a number, with lightness and saturation in [0, 1]; hues are a golden angle apart, so that neighbours differ."""
    red, green, blue = colorsys.hls_to_rgb((0.58 + 0.618034 * number) % 1, light, saturation)
    return round(255 * red), round(255 * green), round(255 * blue)


def read_values(data: bytes) -> Values:
    """Decode one mask without interpreting its values: numbers as they are stored, also where Pillow scales them to white.

    Raises:
        Unreadable: not an image, broken, or of a format that changes values (JPEG, colours of 16 bits).
    """
    try:
        image = _open(data)
        if image.format == "JPEG" or str(image.info.get("compression")).endswith("jpeg"):
            raise Unreadable("a JPEG changes the values of a mask: PNG is read")
        white, signed = _white(image, data), getattr(image, "tag_v2", {}).get(SAMPLEFORMAT) == (2,)
        gif, image = image.format == "GIF", turned(image)
        if image.mode not in ("1", "L", "LA", "P", "PA", "F") and not image.mode.startswith("I"):
            if white > 255:
                raise Unreadable("16 bits a channel are not read: save its colours with 8 bits")
            rgb = np.array(image.convert("RGB"))
            return Values(rgb, clear=_clear(image, rgb))
        pixels = np.array(image.getchannel(0) if image.mode in ("LA", "PA") else image)
        palette = np.reshape(image.getpalette() or [], (-1, 3)).tolist() if image.mode in ("P", "PA") else []
    except Unreadable:
        raise
    except Exception as error:  # Pillow's readers raise almost anything on broken data
        raise Unreadable(_reason(error)) from None
    numbers = _as_stored(image.mode, pixels, white, signed)
    most = white if image.mode in ("1", "L") else 255
    greys = [(round(255 * number / most),) * 3 for number in range(most + 1)]
    indexed = palette != [[number] * 3 for number in range(len(palette))]
    colours = {number: (r, g, b) for number, (r, g, b) in enumerate(palette if indexed else greys)}
    return Values(numbers, colours, indexed, _clear(image, numbers), indexed or gif)


def _as_stored(mode: str, pixels: np.ndarray, white: int, signed: bool) -> np.ndarray:
    """Return (H, W) numbers as they are in the file, from Pillow's, which it scales to white. signed: whether its bytes are."""
    top = {"L": 255, "I": 65535}.get(mode)
    if top and white < top:
        pixels = np.rint(pixels * (white / top))
    elif mode == "L" and signed:
        pixels = pixels.view(np.int8)
    return pixels.astype(np.float32 if mode == "F" else np.int32)


def _white(image: ImageFile.ImageFile, data: bytes) -> int:
    """Return the number of white in a file that is not loaded yet, from its bits a channel: 255 for 8 of them."""
    if image.format == "PNG":
        return 2 ** data[24] - 1
    if image.format == "TIFF":
        return 2 ** max(getattr(image, "tag_v2", {}).get(BITSPERSAMPLE, (1,))) - 1
    if image.format == "PPM" and image.tile[0][0] != "raw" and isinstance(args := image.tile[0][3], tuple):
        return int(args[-1])
    return {"1": 1, "I": 65535}.get(image.mode, 255)


def _clear(image: Image.Image, pixels: np.ndarray) -> np.ndarray | None:
    """Return where an image is fully transparent, (H, W) bool, by its alpha channel or the key of its palette, number or colour.

    pixels: (H, W) numbers as they are stored, or (H, W, 3) colours.
    """
    key = image.info.get("transparency")
    if image.getbands()[-1] == "A":
        clear = np.asarray(image.getchannel("A")) == 0
    elif isinstance(key, bytes):
        clear = np.isin(pixels, np.flatnonzero(np.frombuffer(key, np.uint8) == 0))
    elif key is None:
        return None
    else:
        clear = pixels == (min(key, 1) if image.mode == "1" else key)
        clear = clear.all(axis=2) if clear.ndim == 3 else clear
    return clear if clear.any() else None


def _small(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return numbers as uint8, and where they are none: not whole, below 0 or above 255. Both have the shape of `pixels`."""
    numbers = np.clip(np.nan_to_num(pixels), 0, 255).astype(np.uint8)
    return numbers, numbers != pixels


def _meanings(shades: Iterable[Shade], coding: MaskEncoding) -> list[int]:
    """Return the class of each shade, IGNORE or UNKNOWN. In a palette 255 stands for no class unless its colour is listed."""
    if not coding.coloured:
        known = {number: number for number in (*range(len(coding.classes)), IGNORE)}
        return [known.get(shade.number, UNKNOWN) for shade in shades]
    listed = coding.by_colour()
    void = [IGNORE if shade.indexed and shade.number == IGNORE else UNKNOWN for shade in shades]
    return [listed.get(shade.colour, none) if shade.colour else none for shade, none in zip(shades, void, strict=True)]


def colours_count(masks: Sequence[frozenset[Shade]], coding: MaskEncoding) -> bool:
    """Return whether the colours of all masks of one channel in a set say the class, and not their numbers. Classes have colours.

    Colours count if all are listed, else numbers; where values are no class either way, what leaves fewer of them. A listed colour
    that means another class than its number is a doubt, unless it is a grey beside greys that are not listed, as 0 beside 1 and 2.

    Raises:
        TutelageError: the masks could be meant either way.
    """
    shades = sorted(frozenset().union(*masks), key=lambda shade: (shade.number, shade.indexed, str(shade.colour)))
    number, colour = (
        dict(zip(shades, _meanings(shades, replace(coding, coloured=way)), strict=True)) for way in (False, True)
    )
    unlisted = {shade for shade in shades if colour[shade] == UNKNOWN}
    impossible = {shade for shade in shades if number[shade] == UNKNOWN}
    differ = [shade for shade in shades if shade not in unlisted and colour[shade] != number[shade]]
    if impossible or not differ:
        return len(unlisted) <= len(impossible)
    if not unlisted and len([shade for shade in shades if {number[shade], colour[shade]} != {IGNORE}]) > 1:
        return True
    beside = frozenset().union(*(mask for mask in masks if mask & unlisted))
    greys = not any(shade.indexed for shade in differ)
    if unlisted and greys and beside.issuperset(differ) and len(differ) <= len(unlisted):
        return False
    names = {**dict(enumerate(coding.classes)), IGNORE: "no class"}
    both = [f"{s.number} is {names[number[s]]}, but its colour {s.colour} {names[colour[s]]}" for s in differ]
    rest = [shade.colour or shade.number for shade in shades if shade in unlisted]
    hint = (
        "if they hold numbers, remove the colours from classes.txt; if they hold colours, list all of them, with "
        "`ignore red green blue` for those of no class, or save all masks as RGB"
    )
    message = f"masks may hold numbers or the colours of classes.txt: {shown(both)}"
    raise TutelageError(message + (f"; not listed: {shown(rest)}" if rest else ""), hint)


def numbered(values: Values, coding: MaskEncoding) -> tuple[np.ndarray, dict[str, int]]:
    """Return the class numbers of a mask, and the values that are not a class. Fully transparent pixels have no class.

    Returns:
        (H, W) uint8, IGNORE where the value is not a class; the most frequent of such values or colours as text -> number of pixels.
    """
    pixels = values.pixels
    if pixels.ndim == 3:
        pixels = (pixels.astype(np.int32) * np.array([65536, 256, 1], np.int32)).sum(axis=2)
        kept = np.full(pixels.shape, UNKNOWN, np.int16)
        for (red, green, blue), number in coding.by_colour().items():
            kept[pixels == red * 65536 + green * 256 + blue] = number
    else:
        small, odd = _small(pixels)
        table = np.array(_meanings([values.shade(number) for number in range(256)], coding), np.int16)
        kept = np.where(odd, UNKNOWN, table[small])
    if values.clear is not None:
        kept[values.clear] = IGNORE
    strange = kept == UNKNOWN
    found, counts = np.unique(pixels[strange], return_counts=True)
    named: dict[str, int] = defaultdict(int)
    for place in np.argsort(-counts, kind="stable")[:MOST_STRANGE].tolist():
        named[_text(found[place].item(), values, coding.coloured)] += int(counts[place])
    return np.where(strange, IGNORE, kept).astype(np.uint8), dict(named)


def _text(value: float, values: Values, coloured: bool) -> str:
    """Return a value that is not a class as text: a colour, or a number."""
    if values.pixels.ndim == 3:
        return str((int(value) >> 16, int(value) >> 8 & 255, int(value) & 255))
    if coloured and value in values.colours:
        return str(values.colours[int(value)])
    return f"{value:.7g}" if isinstance(value, float) else str(value)


def truth_of(mask: np.ndarray) -> bytes:
    """Return 32 bytes that identify a mask: SHA-256 of the shape and the class numbers. mask: (H, W) uint8."""
    return hashlib.sha256(repr(mask.shape).encode() + mask.tobytes()).digest()


def kind_of(coding: MaskEncoding) -> ImageCodec:
    """Return the codec with which the image cache decodes such masks."""

    def decode(data: bytes, short_side: int | None = None) -> tuple[np.ndarray, tuple[int, int]]:
        mask = np.ascontiguousarray(numbered(read_values(data), coding)[0])
        return mask, (mask.shape[0], mask.shape[1])

    about = "as stored, by colour " + repr(
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
