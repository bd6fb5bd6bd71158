"""Kinds of image files: by their endings, and by their first bytes, which decide how a file is read.

Only readers of Pillow's that need no other program are used. `Image.open` is not: it warns about large images (and warning filters
are shared by all threads), and it tries every installed format. AVIF is read if the installed Pillow can, HEIC if pillow-heif is installed.
"""

from __future__ import annotations

import importlib
import io
import re
from collections.abc import Callable

from PIL import (
    BmpImagePlugin,
    DdsImagePlugin,
    GifImagePlugin,
    IcoImagePlugin,
    ImageFile,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PcxImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    QoiImagePlugin,
    SgiImagePlugin,
    TgaImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

try:
    from PIL import AvifImagePlugin
except ImportError:  # before Pillow 11.3
    AvifImagePlugin = None

Opener = Callable[[io.BytesIO], ImageFile.ImageFile]

# Endings of the images that are read, and of pictures that may not be: these are listed and counted, never passed over. A file with
# another ending, or none, counts as an image if its first bytes say so.
_READ = (
    ".jpg .jpeg .jpe .jfif .mpo .png .apng .bmp .dib .gif .tif .tiff .webp .avif .ppm .pgm .pbm .pnm "
    ".jp2 .j2k .jpx .jpf .jpc .j2c .ico .tga .pcx .sgi .dds .qoi"
)
_OTHERS = (
    ".heic .heif .heics .heifs .hif .jxl .dng .cr2 .cr3 .nef .nrw .arw .srw .orf .rw2 .raf .pef .psd .xcf .exr .hdr"
)
SUFFIXES, UNREAD_SUFFIXES = tuple(_READ.split()), tuple(_OTHERS.split())
HEAD = 64  # bytes of a file that tell its kind

_OPENERS: dict[bytes, Opener] = {
    b"\xff\xd8\xff": JpegImagePlugin.JpegImageFile,
    b"\x89PNG\r\n\x1a\n": PngImagePlugin.PngImageFile,
    **dict.fromkeys((b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"), Jpeg2KImagePlugin.Jpeg2KImageFile),
    b"GIF8": GifImagePlugin.GifImageFile,
    **dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), TiffImagePlugin.TiffImageFile),
    b"DDS ": DdsImagePlugin.DdsImageFile,
    b"qoif": QoiImagePlugin.QoiImageFile,
}
# Formats that begin with a byte or two that other files begin with too: more of the header decides. A TGA begins with nothing of its own.
_DIB = rb"[\x0c\x10\x28\x34\x38\x40\x6c\x7c]\x00\x00\x00"  # the size of the header
_TGA = (  # kind of the palette, packing, palette, origin, width, height, bits, flags
    rb".(?:\x01[\x01\x09].{4}[\x10\x18\x20]|\x00[\x02\x03\x0a\x0b].{5}).{4}(?!\x00\x00)..(?!\x00\x00)..[\x01\x08\x10\x18\x20][\x00-\x3f]"
)
_PATTERNS: dict[bytes, Opener] = {
    rb"RIFF....WEBP": WebPImagePlugin.WebPImageFile,
    rb"BM.{12}" + _DIB: BmpImagePlugin.BmpImageFile,
    _DIB + rb".{8}\x01\x00[\x01\x04\x08\x10\x18\x20]\x00": BmpImagePlugin.DibImageFile,
    rb"P[1-6]\s+[\d#]": PpmImagePlugin.PpmImageFile,
    rb"\x00\x00\x01\x00[^\x00]\x00...\x00": IcoImagePlugin.IcoImageFile,
    rb"\x0a[\x00\x02\x03\x05][\x00\x01][\x01\x02\x04\x08]": PcxImagePlugin.PcxImageFile,
    rb"\x01\xda[\x00\x01][\x01\x02]\x00[\x01-\x03]": SgiImagePlugin.SgiImageFile,
    _TGA: TgaImagePlugin.TgaImageFile,
}
_COMPILED = [(re.compile(pattern, re.DOTALL), opener) for pattern, opener in _PATTERNS.items()]
_UNREAD = {
    **dict.fromkeys((b"\0\0\0\x0cJXL ", b"\xff\x0a"), "JPEG XL"),
    **dict.fromkeys((b"IIRO", b"IIRS", b"MMOR", b"IIU\0", b"FUJIFILM"), "a raw photograph"),
    b"8BPS": "a Photoshop file",
    b"gimp xcf": "a GIMP file",
    b"v/1\1": "OpenEXR",
    b"#?RADIANCE": "Radiance HDR",
}
_AVIF = AvifImagePlugin is not None and AvifImagePlugin.SUPPORTED
_AVIF_BRANDS = {b"avif", b"avis"}
_HEIC_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs"}
_SHARED_BRANDS = {b"mif1", b"msf1"}  # of both
_HEIC = "HEIC, which needs pillow-heif: run `pip install pillow-heif`, or convert it to JPEG"
try:
    _HEIF: Opener | None = importlib.import_module("pillow_heif").HeifImageFile
except ImportError:
    _HEIF = None
_MAYBE = f"{'AVIF, ' if _AVIF else ''}{'HEIC, ' if _HEIF else ''}"
KINDS = f"JPEG, JPEG 2000, PNG, GIF, WebP, {_MAYBE}BMP, TIFF, PPM, ICO, TGA, PCX, SGI, DDS and QOI"


def opener_of(data: bytes) -> Opener | None:
    """Return what reads a file that begins with these bytes (HEAD of them, or more); None if it is no image of a kind that is read."""
    if brands := _brands(data):
        if _HEIF and brands & (_HEIC_BRANDS | _SHARED_BRANDS) and not brands & _AVIF_BRANDS:
            return _HEIF
        fits = brands & (_AVIF_BRANDS | _SHARED_BRANDS) and not brands & _HEIC_BRANDS
        return AvifImagePlugin.AvifImageFile if fits and AvifImagePlugin is not None and _AVIF else None
    found = next((opener for magic, opener in _OPENERS.items() if data.startswith(magic)), None)
    return found or next((opener for pattern, opener in _COMPILED if pattern.match(data)), None)


def unread_kind(data: bytes) -> str:
    """Return in words which kind of image begins with these bytes, if it is one that is not read; else an empty text."""
    brands = _brands(data)
    if brands & _HEIC_BRANDS:
        return _HEIC
    if brands & (_AVIF_BRANDS | {b"crx "}):
        return (
            f"{'AVIF' if brands & _AVIF_BRANDS else 'a raw photograph'}, not an image of a kind that is read ({KINDS})"
        )
    kind = next((kind for magic, kind in _UNREAD.items() if data.startswith(magic)), "")
    return f"{kind}, not an image of a kind that is read ({KINDS})" if kind else ""


def is_image(head: bytes) -> bool:
    """Return whether a file that begins with these bytes is an image, of a kind that is read or of another."""
    return opener_of(head) is not None or bool(unread_kind(head))


def is_raw(image: ImageFile.ImageFile, data: bytes) -> bool:
    """Return whether an opened TIFF is a raw photograph of a camera, of which Pillow would read the small preview that comes first."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return False
    subfile, dng = image.tag_v2.get(254, 0), 50706 in image.tag_v2
    return data[8:10] == b"CR" or dng or (isinstance(subfile, int) and subfile % 2 == 1)


def _brands(data: bytes) -> set[bytes]:
    """Return the brands in the box `ftyp` with which AVIF, HEIC and films begin; none of other files."""
    if data[4:8] != b"ftyp":
        return set()
    end = min(int.from_bytes(data[:4], "big"), HEAD)
    return {data[8:12], *(data[at : at + 4] for at in range(16, end, 4))}
