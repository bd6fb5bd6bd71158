"""Bytes to RGB: every odd kind of image, every reason to refuse one, and the one resize."""

from __future__ import annotations

import contextlib
import hashlib
import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops, features

from conftest import DATA
from tutelage.data.decode import MAX_PIXELS, RESIZES, content_key, decode, fit, size_of
from tutelage.data.masks import read_values
from tutelage.data.sources import list_images, read_bytes
from tutelage.deploy.runtime import files_in
from tutelage.errors import TutelageError, Unreadable

# How the EXIF standard stores an upright image, by which side its row 0 and its column 0 are: 6 is right and top.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> list:
    return decode(data)[0].tolist()


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_kinds_come_back_exactly(kind: str):
    """What was saved without loss is decoded without loss, contiguous and writable, with its size."""
    rgb = noise(5, 7)
    got, size = decode(encoded(Image.fromarray(rgb), kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert np.array_equal(got, rgb)
    assert size == (5, 7)
    assert got.dtype == np.uint8
    assert got.flags.c_contiguous
    assert got.flags.writeable


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind: str, orientation: int):
    """An image stored in any of the eight orientations is decoded upright, and its size is that of the upright one."""
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :24], upright[:16, 24:], upright[16:, :24] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    data = encoded(stored, kind, exif=exif, **options)
    for short_side in (None, 16):
        got, size = decode(data, short_side)
        assert size == (32, 48)
        assert got.shape[:2] == ((32, 48) if short_side is None else (16, 24))
        h, w = got.shape[0] // 4, got.shape[1] // 4
        corners = [got[h, w], got[h, 3 * w], got[3 * h, w], got[3 * h, 3 * w]]
        assert np.abs(np.stack(corners).astype(int) - [[255, 0, 0], [0, 255, 0], [0, 0, 255], [0, 0, 0]]).max() < 12


def corrupt() -> dict[str, bytes]:
    """Images whose pixels are whole and whose EXIF, animation header or tags make Pillow warn."""
    red = Image.new("RGB", (8, 6), "red")
    png = encoded(red, "PNG")
    chunk = b"acTL" + bytes(8)
    tagged = encoded(red, "TIFF", tiffinfo={315: "somebody of a name that does not fit into four bytes"})
    ifd = struct.unpack_from("<L", tagged, 4)[0]
    at = next(at for at in range(ifd + 2, len(tagged), 12) if struct.unpack_from("<H", tagged, at)[0] == 315)
    return {
        "JPEG": encoded(red, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09\x01\x12\0\x03"),
        "PNG": png[:33] + struct.pack(">L", 8) + chunk + struct.pack(">L", zlib.crc32(chunk)) + png[33:],
        "TIFF": tagged[: at + 4] + struct.pack("<L", 10**9) + tagged[at + 8 :],
    }


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_what_pillow_warns_of_costs_no_image(kind: str):
    """Corrupt EXIF and tags give the image as it is stored, in threads too."""
    data = corrupt()[kind]
    with pytest.warns(UserWarning, match="EXIF|APNG|larger|Truncated"):
        decode(data)
    with ThreadPoolExecutor(4) as pool:
        assert {got[0].shape for got in pool.map(decode, [data] * 40)} == {(6, 8, 3)}


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif(monkeypatch: pytest.MonkeyPatch):
    """AVIF is decoded upright, transparency on white, its first frame; cut off, or without support, it is told."""
    image = Image.new("RGBA", (32, 16), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (16, 0, 32, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(image, "AVIF", quality=95, exif=exif)
    got, size = decode(data)
    assert size == (32, 16)
    assert np.abs(got[[8, 24], 8].astype(int) - [[255, 0, 0], [255, 255, 255]]).max() < 12
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("blue", "lime")]
    got = decode(encoded(frames[0], "AVIF", save_all=True, append_images=frames[1:]))[0]
    assert np.abs(got[8, 8].astype(int) - [0, 0, 255]).max() < 12
    for end in range(0, len(data), 9):
        with contextlib.suppress(Unreadable):
            assert decode(data[:end])[0].shape == (32, 16, 3)
    monkeypatch.setattr("tutelage.data.image_kinds._AVIF", False)
    with pytest.raises(Unreadable, match="not an image"):
        decode(data)


@pytest.mark.parametrize("kind", ["JPEG", "plain JPEG", "TIFF"])
def test_cmyk(kind: str):
    """CMYK has its right colours, as JPEG with Adobe's marker (inverted), JPEG without it and TIFF (not inverted)."""
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # full magenta and yellow: red
    if kind == "plain JPEG":
        data = encoded(ImageChops.invert(image), "JPEG", quality=95)
        at = data.index(b"\xff\xee")  # Adobe's segment: marker, length, content
        data = data[:at] + data[at + 2 + struct.unpack_from(">H", data, at + 2)[0] :]
    else:
        data = encoded(image, kind, **({"quality": 95} if kind == "JPEG" else {}))
    assert (b"Adobe" in data) == (kind == "JPEG")
    for short_side in (None, 5):
        got = decode(data, short_side)[0]
        assert np.abs(got.astype(int) - [255, 0, 0]).max() <= 3


def test_transparency_is_laid_on_white():
    """Alpha, a transparent palette entry and a colour key all show white where nothing is."""
    rgba = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    rgba.putpixel((1, 0), (0, 0, 0, 128))
    assert pixels(encoded(rgba, "PNG")) == [[[255] * 3, [127] * 3]]
    grey = Image.new("LA", (2, 1), (0, 0))
    grey.putpixel((1, 0), (100, 255))
    assert pixels(encoded(grey, "PNG")) == [[[255] * 3, [100] * 3]]
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    assert pixels(encoded(palette, "PNG")) == [[[10, 20, 30], [200, 100, 50]]]
    assert pixels(encoded(palette, "PNG", transparency=0)) == [[[255] * 3, [200, 100, 50]]]
    assert pixels(encoded(palette, "PNG", transparency=b"\xff\x00")) == [[[10, 20, 30], [255] * 3]]
    assert pixels(encoded(palette, "GIF", transparency=0)) == [[[255] * 3, [200, 100, 50]]]
    key = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert pixels(encoded(key, "PNG", transparency=(1, 2, 3))) == [[[255] * 3, [4, 5, 6]]]


def test_one_bit_and_grey():
    """1-bit and 8-bit grey become RGB of the same brightness."""
    bits = Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")
    for kind in ("PNG", "TIFF", "BMP", "PPM"):
        assert pixels(encoded(bits, kind)) == [[[0] * 3, [255] * 3]]
    assert pixels(encoded(Image.fromarray(np.array([[0, 77, 255]], np.uint8)), "PNG")) == [
        [[0] * 3, [77] * 3, [255] * 3]
    ]


def bmp(pixels: np.ndarray, bits: int, palette: list[tuple[int, int, int]], headless: bool = False) -> bytes:
    """A BMP of 1, 4 or 8 bits a pixel with a palette, as Pillow cannot write all of them. headless: without the file's header."""
    rows = [
        np.packbits([v >> b & 1 for v in row for b in range(bits)[::-1]]).tobytes() for row in pixels[::-1].tolist()
    ]
    body = b"".join(row + bytes(-len(row) % 4) for row in rows)
    colours = b"".join(bytes([b, g, r, 0]) for r, g, b in palette)
    head = struct.pack("<IiiHHIIiiII", 40, *pixels.shape[::-1], 1, bits, 0, len(body), 0, 0, len(palette), 0)
    start = 14 + len(head) + len(colours)
    return (b"" if headless else b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start)) + head + colours + body


@pytest.mark.parametrize("headless", [False, True])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_a_bmp_of_black_and_white(bits: int, headless: bool):
    """A BMP with a palette of black and white is read right whatever its bits, as image and mask, or refused with what to do."""
    numbers = np.zeros((8, 16), np.uint8)
    numbers[:, 4:12] = 1
    data = bmp(numbers, bits, [(0, 0, 0), (255, 255, 255)], headless)
    if bits == 4:
        for read in (decode, read_values, size_of):
            with pytest.raises(Unreadable, match=r"a BMP of 4 bits a pixel .* save it as PNG"):
                read(data)
        return
    assert (decode(data)[0] == 255 * numbers[..., None]).all()
    assert np.array_equal(read_values(data).pixels, numbers)


def test_a_bmp_that_pillow_wrote():
    """A palette image of black and white, and one of black alone, come back from BMP as they were."""
    for numbers in (np.eye(9, 13, dtype=np.uint8), np.zeros((9, 13), np.uint8)):
        image = Image.fromarray(numbers)
        image.putpalette([0, 0, 0, 255, 255, 255][: 3 * (1 + int(numbers.max()))])
        data = encoded(image, "BMP")
        assert (decode(data)[0] == 255 * numbers[..., None]).all()
        assert np.array_equal(read_values(data).pixels, numbers)


@pytest.mark.parametrize("width", [3, 4, 16])
def test_a_bmp_of_few_greys(width: int):
    """A BMP of 4 bits whose palette is the numbers themselves is refused; one of 8 bits, or with other colours, is read."""
    numbers, ramp = np.arange(8 * width, dtype=np.uint8).reshape(8, width) % 16, [(n, n, n) for n in range(16)]
    with pytest.raises(Unreadable, match="save it as PNG"):
        decode(bmp(numbers, 4, ramp))
    assert np.array_equal(read_values(bmp(numbers, 8, ramp)).pixels, numbers)
    assert np.array_equal(read_values(bmp(numbers, 4, [(n, 0, n) for n in range(16)])).pixels, numbers)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_divided_by_257(kind: str):
    """65535 becomes 255, and every 8-bit value that was stored as 257 times itself comes back."""
    values = np.arange(256, dtype=np.uint16)[None] * 257
    got = decode(encoded(Image.fromarray(values), kind))[0]
    assert np.array_equal(got[0, :, 0], np.arange(256))
    assert np.array_equal(got[..., 0], got[..., 2])


def test_wide_grey():
    """32-bit integers and floats are read by their largest value: to 1, to 255, or 16-bit."""

    def first(values: list, dtype: type) -> list:
        return decode(encoded(Image.fromarray(np.array([values], dtype)), "TIFF"))[0][0, :, 0].tolist()

    assert first([0, 100, 255], np.int32) == [0, 100, 255]
    assert first([0, 257, 65535], np.int32) == [0, 1, 255]
    assert first([-5, 70000, 0], np.int32) == [0, 255, 0]
    assert first([0, 0.5, 1], np.float32) == [0, 128, 255]
    assert first([0, 100, 255], np.float32) == [0, 100, 255]
    assert first([0, 257, 65535], np.float32) == [0, 1, 255]
    assert first([float("nan"), 0, 1], np.float32) == [0, 0, 255]
    assert first([-3e38, 0, 1], np.float32) == [0, 0, 255]
    assert first([float("inf"), 0.5, 1], np.float32) == [255, 128, 255]
    assert first([float("-inf"), 100, 255], np.float32) == [0, 100, 255]


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_few_strange_pixels_do_not_change_the_range(dtype: type):
    """No-data, however large, and the brightest hundredth leave all other pixels as bright as they are without them."""

    def grey(values: np.ndarray) -> np.ndarray:
        return decode(encoded(Image.fromarray(values.astype(dtype)), "TIFF"))[0][..., 0]

    top = 1 if dtype is np.float32 else 255
    plain = np.linspace(0, top, 400).reshape(20, 20)
    strange = [2e9, 99999, 9999, -9999] + [1e38, 65535, 7.5, np.nan, np.inf] * (dtype is np.float32)
    for value in strange:
        odd = plain.copy()
        odd[3, 4] = value
        got = grey(odd)
        assert got[3, 4] == (255 if value > 0 else 0)
        got[3, 4] = grey(plain)[3, 4]
        np.testing.assert_array_equal(got, grey(plain))
    half = plain.copy()
    half[:10] = 1e9  # half of the image is no-data
    np.testing.assert_array_equal(grey(half)[10:], grey(plain)[10:])
    if dtype is np.float32:
        over = np.clip(plain * 1.05, 0, 1)
        np.testing.assert_allclose(grey(plain * 1.05), over * 255, atol=0.51)


def test_a_few_grey_strokes_on_black_keep_their_greys():
    """Black pixels do not count, so that the range of few bright pixels is their own."""
    page = np.zeros((40, 40), np.float32)
    page[5, :6] = 40, 80, 120, 160, 200, 240
    assert decode(encoded(Image.fromarray(page), "TIFF"))[0][5, :6, 0].tolist() == [40, 80, 120, 160, 200, 240]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("packing", ["raw", "tiff_lzw"])
def test_a_tiff_that_is_turned_by_xmp_only(orientation: int, packing: str):
    """Pixels, size and header agree about an orientation that only XMP holds."""
    upright = noise(6, 9)
    xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    data = encoded(stored, "TIFF", tiffinfo={700: xmp}, compression=packing)
    got, size = decode(data)
    np.testing.assert_array_equal(got, upright)
    assert size == size_of(data) == (6, 9)
    assert decode(data, 3)[1] == (6, 9)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_an_animation_gives_its_first_frame(kind: str):
    """Of several frames the first one is taken."""
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"WEBP": {"lossless": True}}.get(kind, {})
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert pixels(data)[3][3] == [255, 0, 0]


def test_shrinking_never_enlarges():
    """The short side becomes what was asked when the image is larger, and nothing changes when it is not."""
    data = encoded(Image.fromarray(noise(60, 100)), "PNG")
    assert [decode(data, side)[0].shape for side in (30, 60, 61, 1)] == [
        (30, 50, 3),
        (60, 100, 3),
        (60, 100, 3),
        (1, 2, 3),
    ]
    assert {decode(data, side)[1] for side in (None, 30, 61)} == {(60, 100)}
    assert np.array_equal(decode(data, 60)[0], decode(data)[0])
    assert decode(encoded(Image.new("L", (3000, 2)), "PNG"), 1)[0].shape == (1, 1500, 3)


@pytest.mark.parametrize("side", [(801, 1203), (1024, 768), (449, 448)])
def test_draft_sees_the_same_image(side: tuple[int, int]):
    """A large JPEG decoded at a fraction of its size looks as one decoded in full and then shrunk."""
    x, y = np.meshgrid(np.linspace(0, 9, side[0]), np.linspace(0, 7, side[1]))
    rgb = np.stack([128 + 100 * np.sin(x), 128 + 100 * np.cos(y), 128 + 60 * np.sin(x + y)], -1).astype(np.uint8)
    data = encoded(Image.fromarray(rgb), "JPEG", quality=95)
    got, size = decode(data, 100)
    assert size == (side[1], side[0])
    full = Image.fromarray(decode(data)[0]).resize((got.shape[1], got.shape[0]), Image.Resampling.BILINEAR)
    assert min(got.shape[:2]) == 100
    assert np.abs(got.astype(int) - np.asarray(full)).mean() < 1.0


def test_what_is_not_an_image_is_refused(tmp_path: Path):
    """Empty bytes, text, other kinds of files and cut-off images are unreadable, each with a short reason."""
    jpeg, png = encoded(Image.fromarray(noise(64, 64)), "JPEG"), encoded(Image.fromarray(noise(64, 64)), "PNG")
    for data, reason in [
        (b"", "empty"),
        (b"this is a text in a file called cat.jpg", "not an image"),
        (b"<html>404</html>", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (b"RIFF\x24\0\0\0WAVEfmt ", "not an image"),
        (jpeg[: len(jpeg) // 2], "cut off"),
        (png[: len(png) // 2], "cut off"),
        (jpeg[:20], "."),
        (png[:30], "."),
        (b"\xff\xd8\xff" + bytes(100), "cannot be decoded"),
        (b"P6 0 4 255\n", "."),
        (struct.pack("<6s2H3B", b"GIF89a", 0, 0, 0, 0, 0), "."),
    ]:
        with pytest.raises(Unreadable, match=reason) as caught:
            decode(data)
        assert 0 < len(str(caught.value)) < 160
        assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("error")
def test_every_cut_is_unreadable_or_an_image():
    """Wherever a file breaks off, decoding gives an image or says why not, and nothing else is raised."""
    image = Image.fromarray(noise(12, 12))
    for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
        data = encoded(image, kind)
        for end in range(0, len(data), max(1, len(data) // 60)):
            with contextlib.suppress(Unreadable):
                assert decode(data[:end])[0].shape == (12, 12, 3)


def test_too_many_pixels_are_refused_by_the_header():
    """A small file that claims 400 million pixels is refused with its size, before anything is decoded."""
    bomb = encoded(Image.new("1", (20000, 20000)), "PNG")
    assert len(bomb) < 200_000
    with pytest.raises(Unreadable, match=f"20000 x 20000 pixels, the limit is {MAX_PIXELS:,}"):
        decode(bomb)


def test_no_warning_and_no_changed_limit():
    """A large image within the limit is decoded without a warning, also in threads; Pillow's limits stay."""
    before = Image.MAX_IMAGE_PIXELS
    large = encoded(Image.new("1", (10_000, 9_000)), "PNG")  # 90 million pixels: Pillow's own opening warns from 89.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Image.DecompressionBombWarning):
            Image.open(io.BytesIO(large))
        assert decode(large, 9)[1] == (9_000, 10_000)
        small = encoded(Image.fromarray(noise(40, 40)), "JPEG")
        with ThreadPoolExecutor(2) as pool:
            assert len({got[0].tobytes() for got in pool.map(decode, [small] * 20)}) == 1
    assert before == Image.MAX_IMAGE_PIXELS


def test_fit_squashes_crops_and_pads():
    """All of the image, its centre square, or all of it on mid grey; always square, also from smaller images."""
    rgb = np.zeros((40, 80, 3), np.uint8)
    rgb[:, :20], rgb[:, 60:] = 255, 255  # white, black, black, white
    squash, crop, pad = (fit(rgb, 20, resize) for resize in RESIZES)
    assert squash[10, [1, 10, 18], 0].tolist() == [255, 0, 255]
    assert crop.max() == 0
    assert pad[[0, 4, 15, 19], 10, 0].tolist() == [128] * 4
    assert pad[10, [1, 10, 18], 0].tolist() == [255, 0, 255]
    for resize in RESIZES:
        for shape in ((40, 80), (80, 40), (20, 20), (1, 300), (7, 3)):
            got = fit(noise(*shape), 20, resize)
            assert got.shape == (20, 20, 3)
            assert got.dtype == np.uint8
            assert got.flags.c_contiguous
    same = noise(20, 20)
    assert all(np.array_equal(fit(same, 20, resize), same) for resize in RESIZES)
    with pytest.raises(TutelageError, match="did you mean 'squash'"):
        fit(rgb, 20, "sqash")


def test_fit_is_antialiased():
    """Shrinking a fine checkerboard gives its mean, not a pattern."""
    board = np.indices((200, 200)).sum(0)[..., None].repeat(3, -1) % 2 * 255
    got = fit(board.astype(np.uint8), 20, "squash")
    assert np.abs(got.astype(int) - 127).max() <= 3


def test_content_key_knows_pixels_and_sizes():
    """The key is SHA-256 of sizes and pixels: equal for equal images, other for another shape or another original."""
    rgb = noise(4, 6)
    key = content_key(rgb, (8, 12))
    assert key == hashlib.sha256(struct.pack("<4q", 4, 6, 8, 12) + rgb.tobytes()).digest()
    assert key == content_key(np.asfortranarray(rgb), (8, 12))
    others = [content_key(rgb, (12, 8)), content_key(rgb.reshape(6, 4, 3), (8, 12)), content_key(rgb ^ 1, (8, 12))]
    assert len({key, *others}) == 4


@pytest.mark.skipif(not (DATA / "photos1k").is_dir(), reason=f"no photos1k in {DATA}")
def test_all_photos_decode():
    """Every one of 1,000 real photos decodes, with the size that it says."""
    refs, rejected = list_images(DATA / "photos1k")
    assert (len(refs), rejected) == (1000, [])
    sizes = []
    for _, data in read_bytes(refs):
        assert isinstance(data, bytes)
        rgb, size = decode(data, 64)
        assert min(rgb.shape[:2]) == min(64, *size)
        sizes.append(min(size))
    assert max(sizes) <= 224


@pytest.mark.parametrize(
    ("ending", "kind"),
    [
        ("jfif", "JPEG"),
        ("JPE", "JPEG"),
        ("mpo", "MPO"),
        ("pnm", "PPM"),
        ("pbm", "PPM"),
        ("jp2", "JPEG2000"),
        ("j2k", "JPEG2000"),
    ],
)
def test_endings_that_cameras_and_scanners_write(tmp_path, ending: str, kind: str):
    """What Pillow reads under its usual endings is found, and read as the pixels that Pillow sees."""
    path = tmp_path / f"photo.{ending}"
    picture = Image.effect_noise((40, 30), 60).convert("1" if ending == "pbm" else "RGB")
    picture.save(path, kind)
    (found,), rejected = list_images(tmp_path)
    assert (found.id, rejected) == (path.name, [])
    rgb, size = decode(path.read_bytes())
    assert size == (30, 40)
    np.testing.assert_array_equal(rgb, np.asarray(Image.open(path).convert("RGB")))
    assert files_in([str(tmp_path)]) == [str(path)]


def test_photographs_that_are_not_read_are_listed(tmp_path):
    """HEIC and raw photographs among others are found and counted, so that they end in the list of rejected images."""
    Image.new("RGB", (8, 8)).save(tmp_path / "1.jpg")
    for name in ("2.HEIC", "3.cr2", "4.jxl"):
        (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic" + bytes(50))
    (tmp_path / "notes.txt").write_text("no image")
    refs, _ = list_images(tmp_path)
    assert [ref.id for ref in refs] == ["1.jpg", "2.HEIC", "3.cr2", "4.jxl"]
    for ref in refs[1:]:
        with pytest.raises(Unreadable, match="pip install pillow-heif"):
            decode((tmp_path / ref.id).read_bytes())
    assert [Path(one).name for one in files_in([str(tmp_path)])] == [ref.id for ref in refs]


def test_predict_walks_like_training(tmp_path):
    """Hidden names are skipped, links are followed, and a link back up is no circle; training finds the same files."""
    photos = tmp_path / "photos"
    for name in ("a/1.jpg", "a/._1.jpg", ".thumbs/2.jpg", "b/3.PNG"):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(photos / name, "JPEG")
    (photos / "b" / "up").symlink_to(photos)
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "elsewhere" / "4.jpg")
    (photos / "link").symlink_to(tmp_path / "elsewhere")
    found = [str(Path(one).relative_to(photos)) for one in files_in([str(photos)])]
    assert sorted(found) == ["a/1.jpg", "b/3.PNG", "link/4.jpg"]
    assert sorted(found) == [ref.id for ref in list_images(photos)[0]]
