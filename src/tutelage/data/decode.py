"""From bytes to RGB: the only decoder and the only resize of training, evaluation, export and `predict`.

Only Pillow and numpy. How unusual kinds of images are converted is decided here and nowhere else:

- EXIF orientation is applied; of an animation the first frame is taken.
- Transparency (alpha channel, palette or colour key) is composited on white.
- CMYK JPEGs are inverted if they have Adobe's marker, as nearly all of them do, and otherwise used unchanged.
- 16-bit grey is divided by 257, so that 65535 becomes 255. 32-bit integer grey is taken as 16-bit unless its largest value is at
  most 255. Floats are taken as [0, 1], as [0, 255] or as 16-bit, depending on the largest value. What no pixel can hold (no-data) and
  the brightest hundredth, which may be no-data or an overshoot, do not count; nor does an overshoot of a tenth.

The file's bytes decide its kind, not its name (image_kinds.py); formats that start other programs (EPS) are never opened. Pillow's
warnings, such as of a corrupt EXIF block, do not reject an image.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import BmpImagePlugin, Image, ImageChops, ImageFile, JpegImagePlugin, TiffImagePlugin

from tutelage.data.image_kinds import KINDS, is_raw, opener_of, unread_kind
from tutelage.errors import TutelageError, Unreadable, did_you_mean
from tutelage.image_size import Size, sides
from tutelage.regular_file import json_of, text_in

# Folders that systems and tools make, with previews, copies and deleted files in them: names in lower case. Those that begin with a
# dot are passed over anyway.
SYSTEM_FOLDERS = (
    *("$recycle.bin", "system volume information", "found.000", "msocache"),  # Windows
    *("$windows.~bt", "$windows.~ws"),
    *("__macosx", "temporary items", "network trash folder", "thevolumesettingsfolder"),  # macOS
    *("lost+found", "lost.dir"),  # Linux, Android
    *("@recycle", "@recently-snapshot", "@__thumb", "@qsync", "@transcode"),  # QNAP
    *("@eadir", "#recycle", "#snapshot", "@tmp", "@sharebin", "@sharesnap"),  # Synology
    *("@synologydrive", "@synologycloudsync"),
    *("~snapshot", "@snapshots", "files_trashbin", "files_versions"),  # NetApp, snapper, Nextcloud
    *("__pycache__", "node_modules"),  # Python, npm
)
RECORDS = ".tutelage-predictions-*.json"  # of each table of `predict`, beside it: what the call has written
MAX_PIXELS = 178_956_970  # Pillow's own limit: 2 x 1 GiB / 4 / 3
RESIZES = ("squash", "crop", "pad")
PAD_GREY = 128
_OVERSHOOT = 0.1  # share by which resampling may exceed the range of floats

_ORIENTATION, _SIDEWAYS = 0x0112, (5, 6, 7, 8)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def hidden(name: str) -> bool:
    """Return whether a file or folder of this name is passed over: hidden ones, and those of systems and tools."""
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS or name == "RECYCLER"  # recycler may be a class


def written_here(folder: str) -> dict[str, list[str]]:
    """Return the files that predictions wrote in a folder, or in the folders directly below it, by their path there, with their SHA-256."""
    return {
        name: digests for record in sorted(Path(folder).glob(RECORDS)) for name, digests in recorded(record).items()
    }


def recorded(record: Path) -> dict[str, list[str]]:
    """Return what one record of predictions lists; nothing if it is missing or damaged."""
    try:
        files = json_of(text_in(record))["files"]
        return {str(name): list(map(str, digests)) for name, digests in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def predicted_files(folder: str) -> frozenset[str]:
    """Return the names of those files of a folder that are as predictions wrote them, such as masks: no images of the user's."""
    above, name = os.path.split(os.path.abspath(folder))
    below = {path.partition("/"): digests for path, digests in written_here(above).items()}
    listed = written_here(folder) | {rest: digests for (first, _, rest), digests in below.items() if first == name}
    return frozenset(one for one, digests in listed.items() if file_digest(Path(folder, one)) in digests)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file in hex; "" if it is missing."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def decode(data: bytes, short_side: int | None = None) -> tuple[np.ndarray, tuple[int, int]]:
    """Decode one image.

    Args:
        data: the bytes of an image file.
        short_side: shrink so that the short side has this many pixels (antialiased); smaller images keep their size,
            nothing is ever enlarged. None keeps the size.

    Returns:
        rgb: (H, W, 3) uint8, C-contiguous, writable.
        original_size: (height, width) in pixels before shrinking, after the EXIF rotation.

    Raises:
        Unreadable: empty, not an image, cut off, broken, more than MAX_PIXELS, or zero-sized.
    """
    try:
        return shrunken(_open(data), short_side)
    except Unreadable:
        raise
    except MemoryError:
        raise Unreadable("decoding needs more memory than there is") from None
    except Exception as error:  # Pillow's readers raise almost anything on broken data
        raise Unreadable(_reason(error)) from None


def shrunken(image: Image.Image, short_side: int | None) -> tuple[np.ndarray, tuple[int, int]]:
    """Convert an image of Pillow to RGB, shrink and turn it. Arguments and results as for `decode`; Pillow's errors are raised."""
    rgb, (width, height) = _rgb(image, short_side)
    turn = _turn(image)
    return np.array(_turned(rgb, turn)), (width, height) if turn in _SIDEWAYS else (height, width)


def turned(image: Image.Image) -> Image.Image:
    """Return an image of Pillow, loaded, as its EXIF orientation says that it is seen."""
    image.load()
    return _turned(image, _turn(image))


def _turned(image: Image.Image, turn: int) -> Image.Image:
    how = _TURNS.get(turn)
    return image if how is None else image.transpose(how)


def size_of(data: bytes) -> tuple[int, int]:
    """Return height and width of an image as it is seen, from its header; any error of Pillow's readers, or Unreadable, is raised."""
    image = _open(data)
    width, height = image.size
    swapped = _orientation(image) in _SIDEWAYS
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(_ORIENTATION) in _SIDEWAYS:
        swapped = False  # Pillow has swapped them while it read the header
    return (width, height) if swapped else (height, width)


def _turn(image: Image.Image) -> int:
    """Return the orientation, 1 to 8, by which a loaded image still has to be turned: Pillow turns a TIFF while it loads."""
    return 1 if isinstance(image, TiffImagePlugin.TiffImageFile) else _orientation(image)


def fit(rgb: np.ndarray, size: Size, resize: str) -> np.ndarray:
    """Resize an image to a network's input size. This is the only resize of evaluation, export and `predict`.

    Args:
        rgb: (H, W, 3) uint8.
        size: of the result; smaller images are enlarged.
        resize: "squash" the whole image, ignoring its proportions; for a square size also "crop", the centre square of
            the short side, and "pad", the whole image, centred on mid grey.

    Returns:
        (*sides(size), 3) uint8, C-contiguous. Bilinear, antialiased when shrinking.
    """
    height, width = rgb.shape[:2]
    if resize == "squash":
        return _resized(rgb, *sides(size))
    if isinstance(size, str):
        raise TutelageError(f"resize {resize} to {size} needs a square size", "use squash, or a square size")
    if resize == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return _resized(rgb[top : top + side, left : left + side], size, size)
    if resize == "pad":
        scale = size / max(height, width)
        inner = _resized(rgb, max(1, round(height * scale)), max(1, round(width * scale)))
        canvas = np.full((size, size, 3), PAD_GREY, np.uint8)
        top, left = (size - inner.shape[0]) // 2, (size - inner.shape[1]) // 2
        canvas[top : top + inner.shape[0], left : left + inner.shape[1]] = inner
        return canvas
    raise TutelageError(
        f"resize {resize!r} is unknown", did_you_mean(resize, RESIZES, f"use one of {', '.join(RESIZES)}")
    )


def content_key(rgb: np.ndarray, original_size: tuple[int, int]) -> bytes:
    """Return the key that identifies an image whatever its file is called: 32 bytes, SHA-256 of the sizes and the pixels.

    Args:
        rgb: (H, W, 3) uint8, as stored.
        original_size: (height, width) before shrinking.
    """
    digest = hashlib.sha256(struct.pack("<4q", rgb.shape[0], rgb.shape[1], *original_size))
    digest.update(np.ascontiguousarray(rgb, np.uint8).data)
    return digest.digest()


def _open(data: bytes) -> ImageFile.ImageFile:
    """Read the header and check the size; no pixels are decoded yet."""
    if not data:
        raise Unreadable("the file is empty")
    opener = opener_of(data)
    if opener is None:
        raise Unreadable(unread_kind(data) or f"not an image ({KINDS} are read)")
    image = opener(io.BytesIO(data))
    if is_raw(image, data):
        raise Unreadable("a raw photograph, of which only the preview could be read: convert it to JPEG or TIFF")
    width, height = image.size
    if width <= 0 or height <= 0:
        raise Unreadable(f"zero-sized: {width} x {height} pixels")
    if width * height > MAX_PIXELS:
        raise Unreadable(f"{width} x {height} pixels, the limit is {MAX_PIXELS:,} pixels in all")
    if isinstance(image, BmpImagePlugin.BmpImageFile):
        _unpack_greys(image, data)
    return image


def _unpack_greys(image: BmpImagePlugin.BmpImageFile, data: bytes) -> None:
    """Have a BMP of greys unpacked by the bits of its header: by its palette alone Pillow takes one of 4 or 8 bits for one of 1 or 8.

    Raises:
        Unreadable: Pillow cannot unpack such pixels.
    """
    header = data[14:] if data.startswith(b"BM") else data
    bits = header[10 if header[0] == 12 else 14]
    name, area, start, how = image.tile[0]
    if (
        (image.mode, bits) in (("1", 1), ("L", 8))
        or image.mode not in ("1", "L")
        or (image.mode == "L" and name != "raw")
    ):
        return
    if (image.mode, bits, name) != ("1", 8, "raw") or not isinstance(how, tuple):
        raise Unreadable(f"a BMP of {bits} bits a pixel with a palette of greys is not read: save it as PNG")
    a_byte_each = (name, area, start, ("1;8", *how[1:]))  # a named tuple only in newer Pillows
    image.tile = [cast(Any, a_byte_each)]


def _rgb(image: Image.Image, short_side: int | None) -> tuple[Image.Image, tuple[int, int]]:
    """Decode, convert and shrink: mode RGB, not yet turned, and the (width, height) before shrinking."""
    size, box = image.size, None
    if short_side is not None and isinstance(image, JpegImagePlugin.JpegImageFile) and min(size) > 2 * short_side:
        draft = image.draft(None, (2 * short_side, 2 * short_side))  # decodes at 1/2, 1/4 or 1/8, never below this
        box = draft[1] if draft else None
    image.load()
    if box is None:
        size = image.size  # a TIFF is turned, and its size swapped, while it loads
    rgb = _to_rgb(image)
    if short_side is not None and min(size) > short_side:
        scale = short_side / min(size)
        target = (max(short_side, round(size[0] * scale)), max(short_side, round(size[1] * scale)))
        rgb = rgb.resize(target, Image.Resampling.BILINEAR, box=box, reducing_gap=None)
    return rgb, size


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode of Pillow to RGB, compositing transparency on white."""
    if image.mode == "CMYK" and isinstance(image, JpegImagePlugin.JpegImageFile) and "adobe" not in image.info:
        image = ImageChops.invert(image)  # Pillow inverts every CMYK JPEG, whoever wrote it
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_grey8(np.asarray(image))).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _grey8(values: np.ndarray) -> np.ndarray:
    """Convert (H, W) uint16, int32 or float32 of any byte order to uint8, with the range described at the top of this file."""
    if values.dtype.kind == "f":
        top = _top(values)
        scale = 255.0 if top <= 1 + _OVERSHOOT else 1.0 if top <= 255 * (1 + _OVERSHOOT) else 1 / 257
        values = np.clip(np.nan_to_num(values, nan=0.0, posinf=np.inf), 0, 255 / scale)
        return np.rint(values * scale).astype(np.uint8)
    if values.dtype.itemsize > 2 and _top(values) <= 255:
        return np.clip(values, 0, 255).astype(np.uint8)
    return ((np.clip(values, 0, 65535).astype(np.uint32) + 128) // 257).astype(np.uint8)


def _top(values: np.ndarray) -> float:
    """Return the value that tells the range of 32-bit pixels: the largest, without no-data and the brightest hundredth; 0 if there is none.

    Black is left out too: of a few grey strokes on black more than a hundredth must count.
    """
    known = values[(values > 0) & (values <= 65535)]  # false for NaN
    if not known.size:
        return np.inf if (values > 65535).any() else 0.0
    known = known[:: 1 + known.size // 2**20]  # a million are enough
    return float(np.quantile(known, 0.99 if known.size >= 16 else 1, method="lower"))


def _orientation(image: Image.Image) -> int:
    """Return the EXIF (or XMP) orientation, 1 to 8; 1 if there is none or it cannot be read."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
        return value if isinstance(value, int) else 1
    except Exception:  # a broken EXIF block does not make the pixels unusable
        return 1


def _resized(rgb: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize (H, W, 3) uint8 to (height, width, 3) uint8, bilinear, antialiased when shrinking."""
    image = Image.fromarray(np.ascontiguousarray(rgb))
    return np.array(image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=None))


def _reason(error: Exception) -> str:
    """Return Pillow's message as one short line for rejected.csv."""
    text = " ".join(str(error).split())[:120]
    if isinstance(error, EOFError) or "truncated" in text.lower() or "unexpected end" in text.lower():
        return f"cut off: {text or 'the file ends too early'}"
    return f"cannot be decoded: {text or type(error).__name__}"
