"""What the pixels of a mask mean: the same picture is the same classes however it is packed, and what could mean two things is refused."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_segmentation_set import curate, refused

from scenes import CLASSES, write_scenes
from tutelage.data.manifest import load_masks, load_task
from tutelage.data.masks import Masks, truth_of
from tutelage.data.segmentation_set import read_any_dense, read_dense_set
from tutelage.errors import TutelageError

VOID = 255
COLOURS = ((128, 64, 128), (220, 20, 60), (0, 0, 142))
GREYS = ((0, 0, 0), (85, 85, 85), (255, 255, 255))
COLOURED = [f"{name} {r} {g} {b}" for name, (r, g, b) in zip(CLASSES, COLOURS, strict=True)]

Packing = Callable[[np.ndarray], bytes]


def drawn(seed: int, void: bool = True) -> np.ndarray:
    """(6, 9) uint8 class numbers 0 to 2, all of them, and a pixel without a class."""
    mask = np.random.default_rng(seed).integers(0, 3, (6, 9)).astype(np.uint8)
    mask[0, :3] = 0, 1, 2
    mask[1, 1] = VOID if void else 0
    return mask


def write(folder: Path, files: list[bytes], lines: list[str] | tuple[str, ...], size: tuple[int, int] = (6, 9)) -> Path:
    """A target set of these masks, the last two for tests, with images of noise."""
    random = np.random.default_rng(0)
    for number, data in enumerate(files):
        split = "test" if number >= len(files) - 2 else "train"
        for kind in ("images", "masks"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (*size, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / split / f"{number}.png")
        (folder / "masks" / split / f"{number}.png").write_bytes(data)  # the bytes decide the kind, not the name
    (folder / "classes.txt").write_text("\n".join(lines))
    return folder


def read(folder: Path) -> list[list[list[int]]]:
    """The class numbers of each mask, in the order of their names; the masks load as they were read."""
    found = read_dense_set(folder)
    order = np.argsort([int(Path(ref.id).stem) for ref in found.refs])
    about = found.about(order) | {"classes": found.classes}
    masks = load_masks(folder / "cache", found.masks, np.array([[6, 9]] * len(order)), about, found.truths)
    assert [truth_of(masks.one(i)) for i in order.tolist()] == [found.truths[i] for i in order.tolist()]
    return [masks.one(i).tolist() for i in order.tolist()]


def expected(masks: list[np.ndarray], order: np.ndarray | None = None) -> list[list[list[int]]]:
    """The same as `read`, where line i of classes.txt is the class order[i]."""
    table = np.arange(256)
    table[:3] = range(3) if order is None else np.argsort(order)
    return [table[mask].tolist() for mask in masks]


def saved(pixels: np.ndarray | Image.Image, fmt: str = "PNG", **more) -> bytes:
    data = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(data, fmt, **more)
    return data.getvalue()


def grey_png(pixels: np.ndarray, bits: int, kind: int = 0, key: int | None = None) -> bytes:
    """A grey PNG (kind 0) of 1, 2, 4 or 16 bits, or 16 bits with alpha (4) or of colours (2), as Pillow cannot write it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = pixels.reshape(len(pixels), -1)
    if bits == 16:
        packed = [row.astype(">u2").tobytes() for row in rows]
    else:
        packed = [np.packbits([v >> b & 1 for v in row for b in range(bits)[::-1]]).tobytes() for row in rows.tolist()]
    head = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], bits, kind, 0, 0, 0)
    clear = chunk(b"tRNS", struct.pack(">H", key)) if key is not None else b""
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in packed)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + clear + body + chunk(b"IEND", b"")


def paletted(
    mask: np.ndarray, order: tuple[int, ...] = (0, 1, 2), void: tuple[int, ...] = (224, 224, 192), **more
) -> bytes:
    """A palette PNG in which class c has the index order[c] and its own colour, and 255 a colour that is not listed."""
    palette = np.full((256, 3), 7, np.uint8)
    palette[list(order)], palette[VOID] = COLOURS, void
    table = np.full(256, VOID, np.uint8)
    table[:3] = order
    image = Image.fromarray(table[mask])
    image.putpalette(palette.reshape(-1).tolist())
    return saved(image, **more)


def shown_in(colours: tuple[tuple[int, int, int], ...], mask: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 colours of a mask; void pixels get the first colour."""
    return np.array(colours, np.uint8)[np.where(mask == VOID, 0, mask)]


def with_alpha(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Pixels, transparent where the mask is void."""
    alpha = np.where(mask == VOID, 0, 255).astype(np.uint8)
    return np.dstack([pixels, alpha])


def pgm(pixels: np.ndarray, most: int) -> bytes:
    return (
        f"P5 {pixels.shape[1]} {pixels.shape[0]} {most}\n".encode()
        + pixels.astype("u1" if most < 256 else ">u2").tobytes()
    )


# The same classes


NUMBERS: dict[str, Packing] = {
    "grey": saved,
    "16 bits": lambda m: saved(m.astype(np.uint16)),
    "int32 TIFF": lambda m: saved(m.astype(np.int32), "TIFF"),
    "float TIFF": lambda m: saved(m.astype(np.float32), "TIFF"),
    "TIFF, 0 is white": lambda m: saved(m, "TIFF", tiffinfo={262: 0}),
    "BMP": lambda m: saved(m, "BMP"),
    "palette": paletted,
    "GIF": lambda m: saved(Image.open(io.BytesIO(paletted(m))), "GIF", optimize=False),
    "PGM": lambda m: pgm(m, 255),
    "PGM up to 300": lambda m: pgm(m, 300),
    "LA": lambda m: saved(with_alpha(np.where(m == VOID, 1, m), m)),
    "2 bits, transparent": lambda m: grey_png(np.where(m == VOID, 3, m), 2, key=3),
    "4 bits, transparent": lambda m: grey_png(np.where(m == VOID, 9, m), 4, key=9),
    "16 bits, transparent": lambda m: grey_png(np.where(m == VOID, 700, m.astype(int)), 16, key=700),
    "palette, transparent": lambda m: paletted(np.where(m == VOID, VOID, m), transparency=VOID),
}
SHOWN: dict[str, Packing] = {
    "RGBA": lambda m: saved(with_alpha(shown_in(COLOURS, m), m)),
    "palette": paletted,
    "palette backwards": lambda m: paletted(m, (2, 1, 0)),
    "palette anywhere": lambda m: paletted(m, (9, 200, 31)),
    "palette, transparent": lambda m: paletted(m, (2, 0, 1), transparency=b"\xff" * 255 + b"\0"),
}


@pytest.mark.parametrize("packing", NUMBERS)
def test_numbers_in_any_packing(tmp_path, packing):
    """Class numbers are the same in every file format and depth; 255 and transparent pixels are no class."""
    masks = [drawn(seed) for seed in range(4)]
    assert read(write(tmp_path, [NUMBERS[packing](mask) for mask in masks], CLASSES)) == expected(masks)


@pytest.mark.parametrize(("bits", "most"), [(1, 1), (2, 2), (4, 2)])
def test_numbers_of_few_bits(tmp_path, bits, most):
    """Grey of 1, 2 or 4 bits is read as it is stored, as PNG and as PGM, where a viewer shows the highest number white."""
    masks = [np.minimum(drawn(seed, void=False), most) for seed in range(4)]
    for packing in (lambda m: grey_png(m, bits), lambda m: pgm(m, most)):
        folder = write(tmp_path / packing(masks[0])[:2].hex(), [packing(mask) for mask in masks], CLASSES[: most + 1])
        assert read(folder) == expected(masks)


@pytest.mark.parametrize("packing", SHOWN)
def test_colours_in_any_packing(tmp_path, packing):
    """Listed colours are the same classes as RGB, with alpha and in a palette of any order; its index 255, if not listed, is no class."""
    masks = [drawn(seed) for seed in range(4)]
    assert read(write(tmp_path, [SHOWN[packing](mask) for mask in masks], COLOURED)) == expected(masks)


@pytest.mark.parametrize("seed", range(6))
def test_colours_in_mixed_packings(tmp_path, seed):
    """A set may mix packings: each file has a random one, with or without void pixels, and the order of classes.txt is any order."""
    random = np.random.default_rng(seed)
    masks = [drawn(10 * seed + i, void=bool(random.integers(2))) for i in range(8)]
    names = random.permutation(list(SHOWN))
    files = [SHOWN[names[i % len(names)]](mask) for i, mask in enumerate(masks)]
    order = random.permutation(3)
    assert read(write(tmp_path, files, [COLOURED[i] for i in order])) == expected(masks, order)


@pytest.mark.parametrize("seed", range(3))
def test_greys_in_any_packing(tmp_path, seed):
    """Listed greys are the same classes as RGB and in 2, 4 and 8 bits, with alpha or without, in any order of classes.txt."""
    random = np.random.default_rng(seed)
    masks = [drawn(seed + i, void=False) for i in range(6)]
    levels = np.array([0, 85, 255], np.uint8)
    packings: list[Packing] = [
        lambda m: saved(levels[m]),
        lambda m: saved(with_alpha(levels[m], m)),
        lambda m: saved(shown_in(GREYS, m)),
        lambda m: grey_png(levels[m] // 85, 2),
        lambda m: grey_png(levels[m] // 17, 4),
        lambda m: saved(levels[m], "TIFF", tiffinfo={262: 0}),
    ]
    order = random.permutation(3)
    lines = [f"{CLASSES[i]} {' '.join(map(str, GREYS[i]))}" for i in order]
    files = [packings[i](mask) for i, mask in enumerate(masks)]
    assert read(write(tmp_path, files, lines)) == expected(masks, order)


# One decision for a set


@pytest.mark.parametrize("line", ["ignore 0 0 0", "black"])
def test_numbers_beside_listed_colours(tmp_path, line):
    """Grey class numbers stay numbers, also in a mask of 0 alone, where 0 happens to be a listed colour."""
    masks = [*(drawn(seed) for seed in range(3)), np.zeros((6, 9), np.uint8), *(drawn(seed) for seed in (3, 4))]
    lines = [*COLOURED, line] if line != "black" else [*COLOURED[:2], "square 0 0 0"]
    folder = write(tmp_path, [saved(mask) for mask in masks], lines)
    assert read(folder) == expected(masks)
    assert not read_dense_set(folder).coloured


def test_a_palette_in_another_order_through_the_command(tutelage, tmp_path):
    """A palette whose order is not that of classes.txt counts by colour in the run too, whether or not a file has void pixels."""
    place = write_scenes(tmp_path)
    masks = {}
    for number, path in enumerate(sorted((place / "target" / "masks").rglob("*.png"))):
        mask = np.array(Image.open(path))
        masks[path.stem] = mask = np.where(mask == VOID, 0, mask) if number % 2 else mask
        path.write_bytes(paletted(mask, (2, 1, 0)))
    (place / "target" / "classes.txt").write_text("\n".join(COLOURED))
    done = curate(tutelage, place)
    assert done.returncode == 0, done.stderr
    train = load_task(place / "run", tmp_path / "cache").train
    assert isinstance(train.labels, Masks)
    for i, name in enumerate(train.ids):
        assert np.array_equal(train.labels.one(i), masks[Path(name).stem])


def test_a_palette_that_almost_fits(tutelage, tmp_path):
    """A palette in another order with a colour that is not listed is refused with number and colour, not read by its numbers."""
    place = write_scenes(tmp_path)
    for path in (place / "target" / "masks").rglob("*.png"):
        path.write_bytes(paletted(np.array(Image.open(path)), (2, 1, 0)))
    (place / "target" / "classes.txt").write_text("\n".join([*COLOURED[:2], "square 0 0 143"]))
    text = refused(curate(tutelage, place))
    assert "masks may hold numbers or the colours of classes.txt" in text
    assert "2 is square, but its colour (128, 64, 128) ground" in text
    assert "not listed: (0, 0, 142)" in text
    assert "remove the colours from classes.txt" in text


def test_some_masks_by_colour_and_some_by_number(tmp_path):
    """Masks of black and white beside masks of 0 and 1, a palette in another order beside numbers, and RGB beside numbers are refused."""
    masks = [drawn(seed, void=False) for seed in range(6)]
    two = [np.minimum(mask, 1) for mask in masks]
    files = [saved(mask * (255 if i % 2 else 1)) for i, mask in enumerate(two)]
    with pytest.raises(TutelageError, match="255 is no class, but its colour \\(255, 255, 255\\) crack"):
        read_dense_set(write(tmp_path / "two", files, ["whole 0 0 0", "crack 255 255 255"]))
    files = [paletted(mask, (1, 2, 0)) if i % 2 else saved(mask) for i, mask in enumerate(masks)]
    with pytest.raises(TutelageError, match="may hold numbers or the colours"):
        read_dense_set(write(tmp_path / "palette", files, COLOURED))
    files = [saved(shown_in(COLOURS, mask)) if i % 2 else saved(mask) for i, mask in enumerate(masks)]
    with pytest.raises(TutelageError, match=r"the colours of classes.txt\): .*\(2, 2, 2\) in 3 masks") as error:
        read_dense_set(write(tmp_path / "rgb", files, COLOURED))
    assert "masks of class numbers beside masks of RGB are not read" in error.value.hint


def test_a_set_of_one_value(tmp_path):
    """Masks of nothing but 0 are refused where black is listed as another class than 0, also for scoring."""
    files = [saved(np.zeros((6, 9), np.uint8))] * 4
    folder = write(tmp_path, files, [*COLOURED[:2], "square 0 0 0"])
    with pytest.raises(TutelageError, match=r"0 is ground, but its colour \(0, 0, 0\) square"):
        read_any_dense(folder, CLASSES)
    write(tmp_path, files, CLASSES)
    assert read_any_dense(folder, CLASSES).pixels.sum(axis=0).tolist() == [4 * 54, 0, 0]


def test_a_colour_of_two_classes(tmp_path):
    """A colour that is given to two classes does not go to the last of them: RGB is refused, numbers are read as numbers."""
    masks, lines = [drawn(seed, void=False) for seed in range(4)], [*COLOURED[:2], "square 128 64 128"]
    assert read(write(tmp_path / "numbers", [saved(mask) for mask in masks], lines)) == expected(masks)
    two = [np.minimum(mask, 1) for mask in masks]
    with pytest.raises(TutelageError, match=r"\(128, 64, 128\) in 4 masks"):
        read_dense_set(write(tmp_path / "rgb", [saved(shown_in(COLOURS, mask)) for mask in two], lines))


def test_other_colours_in_another_folder(tmp_path):
    """--test with other colours of the same classes is refused, not read with the colours of the target set."""
    files = [saved(shown_in(COLOURS, drawn(seed))) for seed in range(4)]
    target, test = write(tmp_path / "target", files, COLOURED), write(tmp_path / "test", files, COLOURED)
    (test / "classes.txt").write_text("ground 220 20 60\ndisc 128 64 128\nsquare 0 0 142")
    with pytest.raises(TutelageError, match="give other colours to the same classes"):
        read_dense_set(target, test=test)


# What is no class number


@pytest.mark.parametrize("value", [-9999, np.nan, 1.9, 300, np.inf])
def test_floats_that_are_no_class(tmp_path, value):
    """Of floats only whole numbers in range are classes; what else there is, is told."""
    masks = [drawn(seed).astype(np.float32) for seed in range(4)]
    masks[1][2, 2:5] = value
    with pytest.raises(TutelageError, match=rf"{value:g} in 1 mask \(3 pixels, most in train/1.png\)"):
        read_dense_set(write(tmp_path, [saved(mask, "TIFF") for mask in masks], CLASSES))


def test_floats_that_are_no_class_through_the_command(tutelage, tmp_path):
    """Nodata of a float TIFF is refused with its value, its pixels and what to do."""
    place = write_scenes(tmp_path)
    for path in sorted((place / "target" / "masks").rglob("*.png")):
        pixels = np.array(Image.open(path)).astype(np.float32)
        path.write_bytes(saved(np.where(pixels == VOID, -9999, pixels).astype(np.float32), "TIFF"))
    text = refused(curate(tutelage, place))
    assert "(0 to 2, and 255 for no class): -9999 in 13 masks (65 pixels" in text
    assert "set these pixels to 255" in text


def test_signed_bytes(tmp_path):
    """-1 in a TIFF of signed bytes is told as -1, not taken for 255."""
    masks = [drawn(seed) for seed in range(4)]
    files = [saved(mask, "TIFF", tiffinfo={339: 2}) for mask in masks]
    with pytest.raises(TutelageError, match="-1 in 4 masks"):
        read_dense_set(write(tmp_path, files, CLASSES))


def test_values_that_a_format_changes(tmp_path):
    """Colours and grey with alpha of 16 bits, which would lose their lower bytes, and JPEG in a TIFF are rejected with the reason."""
    mask = drawn(0, void=False)
    alpha = np.dstack([mask, np.full(mask.shape, 65535)])
    files = [grey_png(np.dstack([mask] * 3), 16, 2), grey_png(alpha, 16, 4), saved(mask, "TIFF", compression="jpeg")]
    found = read_dense_set(write(tmp_path, [*files, *(saved(drawn(seed)) for seed in range(5))], CLASSES))
    told = {Path(one.id).stem: one.reason for one in found.rejected}
    assert told.keys() == {"0", "1", "2"}
    assert "16 bits a channel are not read" in told["0"]
    assert "16 bits a channel are not read" in told["1"]
    assert "JPEG changes the values" in told["2"]


def test_masks_that_are_transparent_throughout(tmp_path):
    """Fully transparent masks show no class, and the error says why."""
    files = [saved(np.dstack([shown_in(COLOURS, drawn(seed)), np.zeros((6, 9), np.uint8)])) for seed in range(4)]
    with pytest.raises(TutelageError, match=r"no pixel of 3 classes(?s:.*)fully transparent have no class"):
        read_dense_set(write(tmp_path, files, COLOURED))


# Palettes that differ


def gif(mask: np.ndarray, colours: tuple[tuple[int, int, int], ...] = COLOURS) -> bytes:
    """A GIF as Pillow saves it: colours that no pixel has leave the palette, and the indices behind them move up."""
    image = Image.fromarray(mask)
    image.putpalette([part for colour in colours for part in colour])
    return saved(image, "GIF")


def lacking(seed: int, lost: int) -> np.ndarray:
    """A mask without one class."""
    mask = drawn(seed, void=False)
    return np.where(mask == lost, 0, mask).astype(np.uint8)


def test_gifs_with_palettes_of_their_own(tmp_path):
    """GIFs, of which each numbers its colours anew, are refused with index, colours and files, and read if classes.txt has the colours."""
    masks = [lacking(seed, 1 if seed == 2 else VOID) for seed in range(6)]
    folder = write(tmp_path, [gif(mask) for mask in masks], CLASSES)
    for reader in (read_dense_set, lambda place: read_any_dense(place, CLASSES)):
        with pytest.raises(TutelageError) as error:
            reader(folder)
        assert "palettes differ: index 1 is (220, 20, 60) in t" in error.value.message
        assert "and (0, 0, 142) in train/2.png" in error.value.message
        assert "list the colours in classes.txt, `name red green blue`" in error.value.hint
    assert read(write(tmp_path, [gif(mask) for mask in masks], COLOURED)) == expected(masks)


@pytest.mark.parametrize("seed", range(4))
def test_gifs_in_grey(tmp_path, seed):
    """Grey numbers saved as GIF, which renumbers them in files that lack one, are refused, or read where classes.txt lists their greys."""
    masks = [lacking(seed + i, i % 3 if i % 3 else VOID) for i in range(6)]
    masks[seed % 4][2, 2] = VOID
    files = [saved(mask, "GIF") for mask in masks]
    with pytest.raises(TutelageError, match=r"palettes differ: index 1 is \((1, 1, 1|2, 2, 2)\) in"):
        read_dense_set(write(tmp_path, files, CLASSES))
    greys = ["ground 0 0 0", "disc 1 1 1", "square 2 2 2", "ignore 255 255 255"]
    assert read(write(tmp_path, files, greys)) == expected(masks)
    assert read(write(tmp_path, [saved(mask) for mask in masks], CLASSES)) == expected(masks)


def test_indices_that_are_right(tmp_path):
    """Palettes of plain greys, and those that differ only in colours that no pixel has, of 255 or of clear pixels, count by index."""
    masks = [drawn(seed, void=False) for seed in range(3)]
    bare = Image.fromarray(masks[1])
    bare.putpalette([part for n in range(256) for part in (n, n, n)])
    less = Image.fromarray(np.minimum(masks[2], 1))
    less.putpalette([*COLOURS[0], *COLOURS[1], 9, 9, 9])
    voids = [paletted(drawn(seed), void=(seed, 9, 9)) for seed in (3, 4)]
    clear = [Image.fromarray(np.where(drawn(seed) == VOID, 7, drawn(seed)).astype(np.uint8)) for seed in (5, 6)]
    for seed, image in enumerate(clear):
        image.putpalette([*sum(COLOURS, ()), *([0] * 12), seed, 1, 1])
    files = [paletted(masks[0]), saved(bare), saved(less), *voids, *(saved(image, transparency=7) for image in clear)]
    found = read(write(tmp_path, [*files, saved(drawn(7)), gif(drawn(8, void=False))], CLASSES))
    assert found == expected(
        [*masks[:2], np.minimum(masks[2], 1), *(drawn(seed) for seed in range(3, 8)), drawn(8, void=False)]
    )


# Masks that cannot be used


@pytest.mark.parametrize("lost", ["train", "val", "test"])
def test_a_split_whose_masks_are_all_rejected(tmp_path, lost):
    """A split that loses all its masks is an error with the reasons, not a set without that split."""
    masks = [drawn(seed) for seed in range(6)]
    folder = write(tmp_path, [saved(mask) for mask in masks], CLASSES)
    for kind in ("images", "masks"):
        (folder / kind / "val").mkdir()
        for name in ("2.png", "3.png"):
            (folder / kind / "train" / name).rename(folder / kind / "val" / name)
    first, second = sorted((folder / "masks" / lost).iterdir())
    first.write_bytes(saved(np.zeros((6, 9), np.uint8), "JPEG"))
    assert len(read_dense_set(folder).rejected) == 1
    second.write_bytes(b"P7\nWIDTH 9\n")
    with pytest.raises(TutelageError) as error:
        read_dense_set(folder)
    told = error.value.message
    assert (
        f"has no {lost} mask that can be used, of 2: a JPEG changes the values of a mask: PNG is read (1 mask: {lost}/"
        in told
    )
    assert "not an image" in told
    assert "save these masks as PNG" in error.value.hint
    for path in (first, second):
        path.write_bytes(saved(drawn(9)))
    assert len(read_dense_set(folder).refs) == 6
    first.write_bytes(b"junk")
    second.write_bytes(b"junk")
    assert len(read_any_dense(folder, CLASSES).refs) == 4  # scored whatever the split


@pytest.mark.parametrize("junk", [b"P7\nWIDTH 9\n", b"Pf\n9 6\n-1.0\n", b"junk", b""])
def test_masks_that_are_all_rejected(tmp_path, junk):
    """Where no mask can be used, the reason is told, for training and for scoring, and nothing about the names of folders."""
    folder = write(tmp_path, [saved(np.zeros((6, 9), np.uint8), "JPEG"), *([junk] * 4)], CLASSES)
    for reader in (read_dense_set, lambda place: read_any_dense(place, CLASSES)):
        with pytest.raises(TutelageError) as error:
            reader(folder)
        told = str(error.value)
        assert "has no mask that can be used, of 5: " in told
        assert "a JPEG changes the values" in told
        assert "(4 masks: " in told
        assert "folders" not in told


def test_a_test_split_of_jpegs_through_the_command(tutelage, tmp_path):
    """Few rejected masks that are the whole test split are refused, however many --max-rejected allows."""
    place = write_scenes(tmp_path)
    for path in (place / "target" / "masks" / "test").iterdir():
        path.write_bytes(saved(np.array(Image.open(path)), "JPEG"))
    text = refused(curate(tutelage, place, "--max-rejected", "0.9"))
    assert "has no test mask that can be used, of 4: a JPEG changes the values of a mask" in text


# Hints that lead out


def told_of(folder: Path) -> TutelageError:
    with pytest.raises(TutelageError, match="values that are not a class") as error:
        read_dense_set(folder)
    return error.value


@pytest.mark.parametrize("void", [False, True])
@pytest.mark.parametrize("packing", ["grey", "16 bits", "palette"])
def test_numbers_with_gaps(tmp_path, packing, void):
    """Masks of 0, 127 and 254 are refused with lines for classes.txt that make them readable, and so do other numbers."""
    masks, levels = [drawn(seed, void) for seed in range(4)], np.full(256, VOID, np.uint8)
    levels[:3] = 0, 127, 254
    spread = [levels[mask] for mask in masks]
    files = [saved(mask.astype(np.uint16) if packing == "16 bits" else mask) for mask in spread]
    if packing == "palette":
        files = [paletted(mask, (0, 127, 254)) for mask in masks]
    hint = told_of(write(tmp_path / "spread", files, CLASSES)).hint
    lines = [line for line in hint.split("`") if line.startswith(("name", "ignore"))]
    assert lines[:3] == [
        f"name {r} {g} {b}" for r, g, b in (COLOURS if packing == "palette" else [(n, n, n) for n in (0, 127, 254)])
    ]
    lines[:3] = [line.replace("name", name) for line, name in zip(lines[:3], CLASSES, strict=True)]
    assert read(write(tmp_path / "named", files, lines)) == expected(masks)
    assert "number the classes from 0 without gaps" in hint
    assert read(write(tmp_path / "numbered", [saved(mask) for mask in masks], CLASSES)) == expected(masks)


def test_numbers_from_1(tmp_path):
    """Masks of 1 to 3 with three names are refused with the advice to subtract 1, which makes them readable."""
    masks = [drawn(seed) for seed in range(4)]
    files = [saved(np.where(mask == VOID, VOID, mask + 1).astype(np.uint8)) for mask in masks]
    assert told_of(write(tmp_path, files, CLASSES)).hint.startswith("the masks number the classes from 1: subtract 1")
    assert read(write(tmp_path, [saved(mask) for mask in masks], CLASSES)) == expected(masks)


def test_numbers_with_a_class_too_many(tmp_path):
    """Masks of 0 to 2 with two names are refused with three ways out: another name, no class, or 0 as none and the others less 1."""
    masks = [drawn(seed) for seed in range(4)]
    hint = told_of(write(tmp_path, [saved(mask) for mask in masks], CLASSES[1:])).hint
    assert "set these pixels to 255" in hint
    assert "name 3 classes in classes.txt" in hint
    assert "if 0 is no class, set it to 255 and subtract 1 from all others" in hint
    assert read(write(tmp_path, [saved(mask) for mask in masks], CLASSES)) == expected(masks)
    less = [np.where((mask == VOID) | (mask == 0), VOID, mask - 1).astype(np.uint8) for mask in masks]
    assert read(write(tmp_path, [saved(mask) for mask in less], CLASSES[1:])) == [one.tolist() for one in less]


def test_a_number_far_off_beside_listed_colours(tmp_path):
    """Where classes.txt has colours but the masks hold numbers, no hint says to write colours."""
    masks = [drawn(seed, void=False) for seed in range(4)]
    masks[0][3, 3] = 77
    hint = told_of(write(tmp_path, [saved(mask) for mask in masks], COLOURED)).hint
    assert "set these pixels to 255" in hint
    assert "colours" not in hint


@pytest.mark.parametrize("splits", [("train", "test"), ("test",)])
def test_a_class_that_is_left_out(tmp_path, splits):
    """A class without a pixel in a split can be left out as the hint says, also where the others have pixels of it."""
    masks = [lacking(seed, 1 if ("test" if seed > 3 else "train") in splits else VOID) for seed in range(6)]
    with pytest.raises(TutelageError, match=r"no pixel of 1 class in the 2 test images: disc") as error:
        read_dense_set(write(tmp_path, [saved(mask) for mask in masks], CLASSES))
    assert "set its pixels to 255, subtract 1 from the numbers above it and remove its name" in str(error.value)
    less = [np.where(mask == 1, VOID, mask // 2).astype(np.uint8) for mask in masks]
    assert read(write(tmp_path, [saved(mask) for mask in less], CLASSES[::2])) == [one.tolist() for one in less]
    files = [saved(shown_in(COLOURS, mask)) for mask in masks]
    with pytest.raises(TutelageError, match="write `ignore red green blue` in place of its name"):
        read_dense_set(write(tmp_path, files, COLOURED))
    lines = [COLOURED[0], COLOURED[1].replace("disc", "ignore"), COLOURED[2]]
    assert read(write(tmp_path, files, lines)) == [one.tolist() for one in less]


def test_the_last_class_left_out(tmp_path):
    """To leave out the last class, no number has to change."""
    with pytest.raises(TutelageError, match="square") as error:
        read_dense_set(write(tmp_path, [saved(lacking(seed, 2)) for seed in range(4)], CLASSES))
    assert "subtract" not in str(error.value)


# classes.txt


@pytest.mark.parametrize(
    "form",
    [
        "{n} {name}", "{n}: {name}", "{n}) {name}", "({n}) {name}", "{n}={name}", "{n} = {name}", "{n} - {name}", "{n}. {name}",
        "{n},{name}",
        "{n}\t{name}", "{name} {n}", "{name}: {n}", "{name}={n}", "{name} ({n})", "{name}, {n}", "{name} - {n}", "{name}\t{n}",
        "{n} -> {name}", "{n}->{name}", "{n} => {name}", "{n} → {name}", "{n} – {name}", "{name} -> {n}", "{name} => {n}",
    ],
)  # fmt: skip
def test_lines_with_numbers(tmp_path, form):
    """A number before or after every name is its class number, however it is set apart, and no part of the name."""
    masks = [drawn(seed) for seed in range(4)]
    lines = [form.format(n=n, name=name) for n, name in reversed([*enumerate(CLASSES)])]
    for more in ([], [form.format(n=255, name="void")], [form.format(n=255, name="Unlabelled")]):
        folder = write(tmp_path, [saved(mask) for mask in masks], [*lines, *more])
        assert read(folder) == expected(masks)
        assert read_dense_set(folder).classes == CLASSES


@pytest.mark.parametrize(
    "form",
    [
        "{name} {r} {g} {b}", "{name}: {r} {g} {b}", "{name},{r},{g},{b}",
        "{name} ({r}, {g}, {b})", "{name}({r},{g},{b})",
        "{name} = [{r}, {g}, {b}]",
        "{name} rgb({r}, {g}, {b})", "{name} #{r:02x}{g:02x}{b:02x}", "{name}: #{r:02X}{g:02X}{b:02X}", "{r} {g} {b} {name}",
        "{r},{g},{b},{name}",
        "({r}, {g}, {b}) {name}", "#{r:02x}{g:02x}{b:02x} {name}", "{n} {name} {r} {g} {b}", "{n}: {name}: {r} {g} {b}",
        "{name} {n} {r} {g} {b}",
        "{n} {r} {g} {b} {name}", "{n};{name};{r};{g};{b}", "{n} #{r:02x}{g:02x}{b:02x} {name}",
        "{name} -> {r} {g} {b}", "{name} => ({r}, {g}, {b})", "{r} {g} {b} -> {name}", "{n} -> {name} -> {r},{g},{b}",
        "{name}:{r},{g},{b}::",
    ],
)  # fmt: skip
def test_lines_with_colours(tmp_path, form):
    """A colour before or after every name is understood in any usual form, with a class number or without, and is no part of the name."""
    rows = [(n, name, *COLOURS[n]) for n, name in enumerate(CLASSES)]
    lines = [form.format(n=n, name=name, r=r, g=g, b=b) for n, name, r, g, b in rows]
    lines.append(form.format(n=255, name="void", r=1, g=2, b=3))
    masks = [drawn(seed) for seed in range(4)]
    files = [
        saved(np.where((mask == VOID)[..., None], (1, 2, 3), shown_in(COLOURS, mask)).astype(np.uint8))
        for mask in masks
    ]
    folder = write(tmp_path, files, lines)
    assert read(folder) == expected(masks)
    found = read_dense_set(folder)
    assert (found.classes, found.colours, found.ignored) == (CLASSES, COLOURS, ((1, 2, 3),))


@pytest.mark.parametrize(
    "names",
    [
        ("phase 0", "phase 1", "phase 2"), ("phase 2", "ground", "disc"), ("3 wheeler", "car", "bus 2"), ("5 ground", "6 disc", "7 square"),
        ("Boeing 747", "Airbus 320", "Airbus 380"), ("16:9", "4:3", "1:1"), ("0.5 mm", "1.7 mm", "2.1 mm"),
        ("grade=0", "grade=1", "grade=2"),
        ("road: wet", "road: dry", "grass"), ("carbon-14", "beta-2", "T 1000"), ("house", "house (2)", "house (3)"),
    ],
)  # fmt: skip
def test_numbers_that_are_part_of_a_name(tmp_path, names):
    """Numbers that not all lines have, that alone tell names apart, or that masks of so few classes cannot hold stay in the names."""
    masks = [drawn(seed) for seed in range(4)]
    assert read_dense_set(write(tmp_path, [saved(mask) for mask in masks], names)).classes == names


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (["1 a", "2 b", "3 c"], "numbers its classes from 1"),
        (["a 1", "b 2", "c 3"], "numbers its classes from 1"),
        (["a 0", "b 1", "c 3"], "numbers its classes 0, 1, 3, not 0 to 2"),
        (["a: 7", "b: 8", "c: 11"], "numbers its classes 7, 8, 11, not 0 to 2"),
        (["0: a", "0: b", "1: c"], "numbers its classes 0, 0, 1, not 0 to 2"),
        (["0: a", "b", "2: c"], r"numbers some classes \(0, 2\) and 1 not"),
        (["-1 void", "0 a", "1 b"], "numbers its classes -1, 0, 1, not 0 to 2"),
        (["0: a", "255: crack"], "write `name 0 0 0`, `name 255 255 255`"),
        (["0 / a", "1 / b"], "leave a sign in the name: '/ a', '/ b'"),
        (["a * 0", "b * 1"], "leave a sign in the name"),
        (["a 0.1 0.5 0.5", "b 0.1 0.2 0.3"], "could mean several things"),
        (["a 0xff8040", "b 0x000000"], "could mean several things"),
        (["a rgb(1, 2, 3) x", "b rgb(4, 5, 6) x"], "could mean several things"),
        (["a" * 20_000, "b"], "names of more than 1,000 characters"),
        (["a 1 2 3", "4 5 6 b"], "could mean several things: 'a 1 2 3', '4 5 6 b'"),
        (["1 2 3 a 4 5 6", "1 2 3 b 7 8 9"], "could mean several things"),
        (["a 0 0 300", "b 0 0 0"], "could mean several things: 'a 0 0 300'"),
        (["0 255 0 0 1 1 1 a", "1 0 0 0 1 1 1 b"], "could mean several things"),
    ],
)
def test_lines_that_could_mean_several_things(tmp_path, lines, told):
    """Numbers that masks could hold but that are not 0 to C - 1, and lines of several forms, are refused with what to write."""
    with pytest.raises(TutelageError, match=told) as error:
        read_dense_set(write(tmp_path, [saved(drawn(seed)) for seed in range(4)], lines))
    assert error.value.hint


@pytest.mark.parametrize(
    "form",
    [
        "{n} {name} {r} {g} {b} {a}", "{n}: {name} ({r},{g},{b},{a})", "{n},{name},{r},{g},{b},{a}", "{n}\t{name}\t{r}\t{g}\t{b}\t{a}",
        "{name} {r} {g} {b} {a}", "{name}: {r} {g} {b} {a}", "{name} [{r}, {g}, {b}, {a}]", "{name} rgba({r}, {g}, {b}, 0.5)",
        "({r},{g},{b},{a}) {name}", "{r} {g} {b} {a} {name}", "{n} ({r},{g},{b},{a}) {name}", "{name} #{r:02x}{g:02x}{b:02x}{a:02x}",
    ],
)  # fmt: skip
@pytest.mark.parametrize("alpha", [255, 128])
@pytest.mark.parametrize("colours", [COLOURS, GREYS, ((0, 0, 0), (1, 1, 1), (2, 2, 2))])
def test_colours_with_an_opacity(tmp_path, form, alpha, colours):
    """A fourth number of a colour becomes no part of the name and no colour: such lines are refused, and read when it is left out."""
    rows = [(n, name, *colours[n]) for n, name in enumerate(CLASSES)]
    lines = [form.format(n=n, name=name, r=r, g=g, b=b, a=alpha) for n, name, r, g, b in rows]
    folder = write(tmp_path, [saved(shown_in(colours, drawn(seed, void=False))) for seed in range(4)], lines)
    if (
        alpha != 255
        and colours[1] == (1, 1, 1)
        and form.startswith(("{name} {r} {g}", "{name}: {r} {g}", "{r} {g} {b} {a}"))
    ):
        return  # numbers 0 to 2, and colours of their own
    with pytest.raises(TutelageError, match="lines of four numbers, which may be a colour with its opacity") as error:
        read_dense_set(folder)
    assert "leave out the opacity" in error.value.hint
    for cut in ("0.5", "{a:02x}", "{a}"):
        form = (
            form.replace(f", {cut}", "")
            .replace(f",{cut}", "")
            .replace(f" {cut}", "")
            .replace(f"\t{cut}", "")
            .replace(cut, "")
        )
    (folder / "classes.txt").write_text(
        "\n".join(form.replace("rgba", "rgb").format(n=n, name=name, r=r, g=g, b=b) for n, name, r, g, b in rows)
    )
    assert (read_dense_set(folder).classes, read_dense_set(folder).colours) == (CLASSES, colours)


def test_names_with_a_number_beside_colours(tmp_path):
    """Names that end with a number are read beside colours where brackets, or nothing but the numbers, tell names apart."""
    files, names = (
        [saved(shown_in(COLOURS, drawn(seed, void=False))) for seed in range(4)],
        ("phase 1", "phase 2", "gas"),
    )
    plain = [f"{name} {r} {g} {b}" for name, (r, g, b) in zip(names, COLOURS, strict=True)]
    numbered = [f"{n}: {name} ({r}, {g}, {b})" for n, (name, (r, g, b)) in enumerate(zip(names, COLOURS, strict=True))]
    for lines in (plain, numbered):
        assert read_dense_set(write(tmp_path, files, lines)).classes == names


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (["# label : colour", "a", "b", "c"], "look like comments: '# label : colour'"),
        (["#classes", "a", "b"], "look like comments"),
        (["// classes", "a", "b"], "look like comments"),
        (["a # the first", "b"], "look like comments"),
        (["a 1 2 3 // the first", "b 4 5 6"], "look like comments"),
        (["a #fff", "b #000"], "colours that are cut short: 'a #fff', 'b #000'"),
        (["#fff: a", "#000: b"], "colours that are cut short"),
        (["a #000", "b #111"], "colours that are cut short"),
    ],
)
def test_lines_with_a_sharp(tmp_path, lines, told):
    """Comments, which would become classes, and colours of three digits, which would stay in names, are refused with what to do."""
    with pytest.raises(TutelageError, match=told) as error:
        read_dense_set(write(tmp_path, [saved(drawn(seed)) for seed in range(4)], lines))
    assert error.value.hint


@pytest.mark.parametrize(
    "names",
    [
        ("Room #101", "Room #102", "hall"),
        ("#", "!", "?"),
        ("#wet", "#dry", "#new"),
        ("C#", "C++", "F#"),
        ("a->b", "b->c", "c -> a"),
    ],
)
def test_signs_that_are_part_of_a_name(tmp_path, names):
    """Sharps and arrows within names stay as they are."""
    assert read_dense_set(write(tmp_path, [saved(drawn(seed)) for seed in range(4)], names)).classes == names


def test_greys_whose_numbers_stand_in_classes_txt(tmp_path):
    """`127: disc` for masks of 0, 127 and 255 is refused with lines that make them readable."""
    masks, levels = [drawn(seed, void=False) for seed in range(4)], np.array([0, 127, 255], np.uint8)
    files = [saved(levels[mask]) for mask in masks]
    lines = [f"{number}: {name}" for number, name in zip(levels, CLASSES, strict=True)]
    with pytest.raises(TutelageError, match="numbers its classes 0, 127, 255") as error:
        read_dense_set(write(tmp_path, files, lines))
    lines = [line for line in error.value.hint.split("`") if line.startswith("name")]
    lines = [line.replace("name", name) for line, name in zip(lines, CLASSES, strict=True)]
    assert read(write(tmp_path, files, lines)) == expected(masks)


def test_numbers_and_bits_through_the_command(tutelage, tmp_path):
    """Grey PNG of 2 bits with `name number` lines and a named 255 gives the classes by their numbers and names."""
    place = write_scenes(tmp_path)
    for path in (place / "target" / "masks").rglob("*.png"):
        mask = np.array(Image.open(path))
        path.write_bytes(grey_png(np.where(mask == VOID, 3, mask), 2, key=3))
    (place / "target" / "classes.txt").write_text("square 2\nground 0\ndisc 1\nvoid 255\n")
    done = curate(tutelage, place)
    assert done.returncode == 0, done.stderr
    assert "ground 6, disc 6, square 6" in done.stderr
