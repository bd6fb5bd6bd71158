"""What views promise: reproducible, the same region for every network, and photometrically right."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from tutelage.data.views import COLOUR, CROP_AREA, CROP_RATIO, Views, draw, render, to_input, uniforms

KEYS = np.array([3, 2**63 + 11, 12345678901234567890, 7, 0], dtype=np.uint64)
SIZES = np.array([[120, 90], [64, 64], [50, 200], [33, 47], [224, 224]])


def images(seed: int = 0, sizes: np.ndarray = SIZES) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in sizes]


def digest(views: Views) -> str:
    parts = (views.boxes.astype("<i8"), views.flips, views.colours.astype("<f4"))
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


def whole(size: tuple[int, int], horizontal: bool = False, vertical: bool = False) -> Views:
    """A view that shows all of one image."""
    return Views(np.array([[0, 0, *size]]), np.array([[horizontal, vertical]]), np.ones((1, 3), np.float32))


# Randomness


def test_views_are_those_of_yesterday():
    """What a view shows is the same on every run, machine and version, or cached outputs would be of other regions."""
    views = [draw(KEYS, SIZES, n, 0, flip="both", area=(0.35, 1.0), colour=0.2) for n in range(50)]
    together = Views(*(np.concatenate([getattr(v, f) for v in views]) for f in ("boxes", "flips", "colours")))
    assert digest(together) == "959694d3b65896f8e838f1736c1723f2efe6b697dba7d1b99ba59250d02032af"


def test_uniforms_are_uniform():
    """The random numbers look uniform and independent over images, views, seeds and their place in a view."""
    keys = np.arange(4000, dtype=np.uint64)  # the worst case: keys in sequence
    for u in (
        uniforms(0, keys, 0, 8),
        uniforms(0, np.zeros(4000, np.uint64), np.arange(4000), 8),
        np.concatenate([uniforms(seed, keys[:1], 0, 8) for seed in range(4000)]),
    ):
        assert u.min() >= 0
        assert u.max() < 1
        counts = np.stack([np.histogram(column, 20, (0, 1))[0] for column in u.T])
        chi = ((counts - 200) ** 2 / 200).sum(axis=1)  # 19 degrees of freedom: above 50 once in 10,000
        assert chi.max() < 50
        together = np.concatenate([u, np.roll(u, 1, axis=0)], axis=1)
        correlation = np.corrcoef(together.T) - np.eye(16)
        assert np.abs(correlation).max() < 0.08  # 5 standard deviations


def test_seed_key_and_number_each_count():
    """Another view seed, image or view number gives other random numbers."""
    base = uniforms(0, KEYS[:1], 0, 8)
    assert not np.isin(uniforms(1, KEYS[:1], 0, 8), base).any()
    assert not np.isin(uniforms(0, KEYS[1:2], 0, 8), base).any()
    assert not np.isin(uniforms(0, KEYS[:1], 1, 8), base).any()
    np.testing.assert_array_equal(uniforms(0, KEYS[:1], 0, 3), base[:, :3])


def test_large_seeds_are_seeds():
    """Every seed from 0 to 2**63 can be given, without a warning."""
    seen = {uniforms(seed, KEYS[:1], 0, 1).item() for seed in (0, 1, 2**31, 2**62, 2**63 - 1)}
    assert len(seen) == 5


def test_one_number_or_one_for_each():
    """A number for each image gives the view that the same number gives alone."""
    numbers = np.array([4, 0, 9, 4, 123])
    together = draw(KEYS, SIZES, numbers, 1, flip="both")
    for i, number in enumerate(numbers.tolist()):
        alone = draw(KEYS[i : i + 1], SIZES[i : i + 1], number, 1, flip="both")
        np.testing.assert_array_equal(together.boxes[i], alone.boxes[0])
        np.testing.assert_array_equal(together.flips[i], alone.flips[0])
        np.testing.assert_array_equal(together.colours[i], alone.colours[0])


# Regions


def test_regions_keep_their_bounds():
    """Regions lie inside the image; their area and proportions keep to what was asked, up to rounding and the edge."""
    keys = np.arange(3000, dtype=np.uint64)
    for size, area in (((200, 200), CROP_AREA), ((200, 200), (0.1, 0.2)), ((400, 100), (0.05, 0.1))):
        boxes = draw(keys, np.tile(size, (3000, 1)), 0, 0, area=area).boxes
        top, left, height, width = boxes.T
        assert (boxes[:, :2] >= 0).all()
        assert (top + height <= size[0]).all()
        assert (left + width <= size[1]).all()
        free = (height < size[0]) & (width < size[1])  # not cut at the edge
        share, ratio = (height * width / (size[0] * size[1]))[free], (width / height)[free]
        assert area[0] * 0.97 <= share.min() < area[0] * 1.05
        assert area[1] * 0.95 < share.max() <= area[1] * 1.03
        assert CROP_RATIO[0] * 0.95 <= ratio.min() < CROP_RATIO[0] * 1.05
        assert CROP_RATIO[1] * 0.95 < ratio.max() <= CROP_RATIO[1] * 1.05
        if area[1] < 1:
            assert free.all()
            np.testing.assert_allclose(np.log(ratio).mean(), 0, atol=0.02)  # as often wide as high
            assert share.mean() == pytest.approx(np.mean(area), rel=0.02)
            centre = (top + height / 2).mean() / size[0], (left + width / 2).mean() / size[1]
            np.testing.assert_allclose(centre, 0.5, atol=0.02)


def test_the_smallest_images():
    """Images of one pixel and strips of one pixel have views."""
    sizes = np.array([[1, 1], [1, 300], [300, 1]])
    for number in range(20):
        views = draw(KEYS[:3], sizes, number, 0)
        shown = render(images(sizes=sizes), views, 8)
        assert shown.shape == (3, 3, 8, 8)


@pytest.mark.parametrize(
    ("flip", "horizontal", "vertical"), [("none", 0, 0), ("horizontal", 0.5, 0), ("both", 0.5, 0.5)]
)
def test_flips(flip: str, horizontal: float, vertical: float):
    """Views are flipped as asked: never, half of them horizontally, or half in each direction independently."""
    flips = draw(np.arange(4000, dtype=np.uint64), np.full((4000, 2), 32), 0, 0, flip=flip).flips
    np.testing.assert_allclose(flips.mean(axis=0), [horizontal, vertical], atol=0.03)
    if flip == "both":
        assert (flips[:, 0] & flips[:, 1]).mean() == pytest.approx(0.25, abs=0.03)


def test_flipping_does_not_change_the_region():
    """The kind of flips changes neither region nor colours."""
    none, both = draw(KEYS, SIZES, 3, 0, flip="none"), draw(KEYS, SIZES, 3, 0, flip="both")
    np.testing.assert_array_equal(none.boxes, both.boxes)
    np.testing.assert_array_equal(none.colours, both.colours)


def test_colour_factors():
    """Each factor is uniform in [1 - colour, 1 + colour]; 0 leaves all images as they are."""
    keys, sizes = np.arange(4000, dtype=np.uint64), np.full((4000, 2), 32)
    colours = draw(keys, sizes, 0, 0).colours
    assert colours.dtype == np.float32
    assert 1 - COLOUR <= colours.min() < 1 - 0.99 * COLOUR
    assert 1 + 0.99 * COLOUR < colours.max() <= 1 + COLOUR
    np.testing.assert_allclose(colours.mean(axis=0), 1, atol=0.01)
    assert (draw(keys, sizes, 0, 0, colour=0.0).colours == 1).all()


# Rendering


def test_rendering_flips_the_pixels():
    """A horizontal flip mirrors left and right, a vertical one top and bottom, both turn the image by 180 degrees."""
    image = images()[0]
    plain = render([image], whole((120, 90)), 24)[0]
    assert torch.equal(render([image], whole((120, 90), horizontal=True), 24)[0], plain.flip(2))
    assert torch.equal(render([image], whole((120, 90), vertical=True), 24)[0], plain.flip(1))
    assert torch.equal(render([image], whole((120, 90), True, True), 24)[0], plain.flip(1, 2))


def test_a_region_at_its_own_size_is_the_pixels():
    """A region that has the size asked for is shown pixel by pixel."""
    image = images()[0]
    views = Views(np.array([[10, 20, 32, 32]]), np.array([[True, False]]), np.ones((1, 3), np.float32))
    np.testing.assert_array_equal(render([image], views, 32)[0].permute(1, 2, 0).numpy(), image[10:42, 20:52][:, ::-1])


def test_shrinking_is_antialiased():
    """A checkerboard shrunk to a sixth is grey, not black and white nor a pattern of its own."""
    board = np.indices((128, 128)).sum(axis=0) % 2 * 255
    image = np.repeat(board[:, :, None], 3, axis=2).astype(np.uint8)
    for size in (16, 21, 25):
        shown = render([image], whole((128, 128)), size)[0, :, 1:-1, 1:-1].numpy()
        assert np.abs(shown.astype(int) - 128).max() <= 4


def test_the_result_is_channels_last():
    """Views come as uint8 in channels_last, inputs as float32 in channels_last."""
    shown = render(images(), draw(KEYS, SIZES, 0, 0), 16)
    assert (shown.dtype, shown.shape) == (torch.uint8, (5, 3, 16, 16))
    assert shown.is_contiguous(memory_format=torch.channels_last)
    for colours in (None, np.ones((5, 3), np.float32)):
        inputs = to_input(shown, (0.5,) * 3, (0.5,) * 3, colours)
        assert (inputs.dtype, inputs.shape) == (torch.float32, (5, 3, 16, 16))
        assert inputs.is_contiguous(memory_format=torch.channels_last)


def shown(positions: list[int], numbers: list[int], size: int = 32) -> torch.Tensor:
    pixels = images()
    views = draw(KEYS[positions], SIZES[positions], np.array(numbers), 0, flip="both")
    return to_input(
        render([pixels[i] for i in positions], views, size), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), views.colours
    )


def test_views_do_not_depend_on_the_batch():
    """A view has the same bytes whatever else is in the batch, in any order, and however often it is asked for."""
    together = shown([0, 1, 2, 3, 4], [5, 6, 7, 8, 9])
    assert torch.equal(together, shown([0, 1, 2, 3, 4], [5, 6, 7, 8, 9]))
    assert torch.equal(together, shown([4, 3, 2, 1, 0], [9, 8, 7, 6, 5]).flip(0))
    for i in range(5):
        assert torch.equal(together[i], shown([i], [5 + i])[0])
    twice = shown([2, 0, 2], [7, 1, 7])
    assert torch.equal(twice[0], together[2])
    assert torch.equal(twice[2], together[2])


def test_views_do_not_depend_on_the_thread():
    """Threads that make views at the same time, in any order, get the bytes that one thread gets."""
    work = [([i % 5, (i + 2) % 5], [i, i + 1]) for i in range(40)]
    alone = [shown(*item) for item in work]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda item: shown(*item), work))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_views_do_not_depend_on_torch_seeds():
    """Views use no generator of torch or numpy and leave them as they were."""
    torch.manual_seed(0)
    np.random.seed(0)
    first = shown([0, 1], [3, 4])
    assert torch.rand(1).item() == torch.rand(1, generator=torch.Generator().manual_seed(0)).item()
    assert torch.equal(first, shown([0, 1], [3, 4]))


def test_teacher_and_student_see_the_same_region():
    """At two sizes a view shows the same part of the image: what lies at each place agrees to a pixel."""
    height, width = 240, 200
    rows, columns = np.indices((height, width))
    image = np.stack([rows, columns, np.zeros_like(rows)], axis=2).astype(np.uint8)  # colour says where a pixel is
    for number in range(40):
        views = draw(KEYS[:1], np.array([[height, width]]), number, 0, flip="both")
        large, small = (render([image], views, size)[0, :2].float() for size in (224, 64))
        torch.testing.assert_close(large.mean(dim=(1, 2)), small.mean(dim=(1, 2)), rtol=0, atol=1.0)
        shrunk = torch.nn.functional.interpolate(large[None], size=(64, 64), mode="bilinear", antialias=True)[0]
        assert (shrunk - small)[:, 2:-2, 2:-2].abs().max() <= 1.5
        top, left, h, w = views.boxes[0]
        middle = torch.tensor([top + (h - 1) / 2, left + (w - 1) / 2], dtype=torch.float32)
        torch.testing.assert_close(small.mean(dim=(1, 2)), middle, rtol=0, atol=1.0)


# Colours


def torchvision_input(pixels: torch.Tensor, colours: np.ndarray, mean, std) -> torch.Tensor:
    out = []
    for image, (brightness, contrast, saturation) in zip(pixels.float() / 255, colours.tolist(), strict=True):
        image = v2.functional.adjust_brightness(image, brightness)
        image = v2.functional.adjust_contrast(image, contrast)
        image = v2.functional.adjust_saturation(image, saturation)
        out.append(v2.functional.normalize(image, list(mean), list(std)))
    return torch.stack(out)


def test_colours_are_those_of_torchvision():
    """Brightness, contrast and saturation in this order, then normalisation: torchvision's, where nothing is clipped."""
    generator = np.random.default_rng(0)
    pixels = torch.from_numpy(generator.integers(80, 170, (6, 3, 20, 20), dtype=np.uint8))
    colours = generator.uniform(0.8, 1.2, (6, 3)).astype(np.float32)
    colours[0] = 1
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    theirs = torchvision_input(pixels, colours, mean, std)
    raw = theirs * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    assert raw.min() > 0
    assert raw.max() < 1  # nothing is clipped
    # torchvision's grey has 0.2989 for red where BT.601 has 0.299
    torch.testing.assert_close(to_input(pixels, mean, std, colours), theirs, rtol=0, atol=1e-3)
    single = colours.copy()
    single[:, 1:] = 1  # each factor counts: leaving two out makes a difference
    assert (to_input(pixels, mean, std, single) - theirs).abs().max() > 0.05


def test_without_colours_only_normalised():
    """Without colours, or with factors of 1, an input is (x / 255 - mean) / std."""
    pixels = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (2, 3, 9, 7), dtype=np.uint8))
    mean, std = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.2, 0.5, 1.0])
    expected = (pixels / 255 - mean[:, None, None]) / std[:, None, None]
    for colours in (None, np.ones((2, 3), np.float32)):
        inputs = to_input(pixels, tuple(mean.tolist()), tuple(std.tolist()), colours)
        torch.testing.assert_close(inputs, expected, rtol=1e-5, atol=1e-5)


def test_two_networks_get_the_same_colours():
    """Networks of other mean and std see the same picture: undoing the normalisation gives equal pixels, unclipped."""
    pixels = torch.from_numpy(np.random.default_rng(2).integers(0, 256, (3, 3, 9, 9), dtype=np.uint8))
    colours = np.array([[1.2, 1.2, 1.2], [0.8, 0.8, 0.8], [1.2, 0.8, 1.1]], np.float32)
    raw = []
    for mean, std in (((0.5,) * 3, (0.5,) * 3), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))):
        inputs = to_input(pixels, mean, std, colours)
        raw.append(inputs * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None])
    torch.testing.assert_close(raw[0], raw[1], rtol=0, atol=2e-6)
    assert raw[0].max() > 1.05
