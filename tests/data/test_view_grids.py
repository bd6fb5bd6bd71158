"""Grids over images: what is known of a place of an image is known of the same place of a view of it."""

from __future__ import annotations

import numpy as np
import pytest

from tutelage.data.view_grids import crop_grid
from tutelage.data.views import Views, draw, render

GRID = (24, 32)


def slopes(height: int, width: int, shape: tuple[int, int] | None = None) -> np.ndarray:
    """(3, H, W) float32 over an image of these sides: the first two channels say where a place lies, from 0 to 200."""
    rows, columns = shape or (height, width)
    y, x = np.mgrid[0:rows, 0:columns]
    return np.stack([200 * (y + 0.5) / rows, 200 * (x + 0.5) / columns, 0 * y + 7]).astype(np.float32)


def views_of(boxes: list[list[int]], flips: list[tuple[bool, bool]]) -> Views:
    """Views of these regions; flips: from left to right, from top to bottom."""
    return Views(np.array(boxes), np.array(flips), np.zeros((len(boxes), 3), np.float32))


def random_grids(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3, 6, 8)).astype(np.float32)


def test_a_view_of_the_whole_image_has_the_images_grid():
    """Nothing is moved or smoothed where a view shows all of an image, whatever the image's size."""
    values, sizes = random_grids(3), np.array([[90, 120], [41, 77], [300, 20]])
    whole = views_of([[0, 0, *size] for size in sizes.tolist()], [(False, False)] * 3)
    np.testing.assert_allclose(crop_grid(values, whole, sizes), values, atol=1e-5)


def test_flipped_views_have_the_grid_flipped():
    """A mirrored view has the image's grid from right to left, one upside down from bottom to top, each by its own flips."""
    values, sizes = random_grids(4), np.full((4, 2), 60)
    flips = [(False, False), (True, False), (False, True), (True, True)]
    found = crop_grid(values, views_of([[0, 0, 60, 60]] * 4, flips), sizes)
    expected = [values[0], values[1][:, :, ::-1], values[2][:, ::-1], values[3][:, ::-1, ::-1]]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_quarter_of_an_image_has_a_quarter_of_its_grid():
    """By hand: a view of the upper right quarter lies between the cells there, and beyond the outermost centres stays as they are."""
    values = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
    view = views_of([[0, 50, 50, 50]], [(False, False)])
    # centres of the view's cells, in cells of the image: rows -0.25, 0.25, 0.75, 1.25 and columns 1.75, 2.25, 2.75, 3.25
    rows, columns = np.array([0, 0.25, 0.75, 1.25]), np.array([1.75, 2.25, 2.75, 3.0])
    expected = 4 * rows[:, None] + columns
    np.testing.assert_allclose(crop_grid(values, view, np.array([[100, 100]]))[0, 0], expected, atol=1e-5)


@pytest.mark.parametrize("flip", ["none", "horizontal", "both"])
def test_a_grid_says_of_a_place_what_the_view_shows_there(flip):
    """Colours encode the position: the cropped grid has those that the rendered view has; flipped ones too."""
    images = [slopes(120 + 4 * i, 160 + 8 * i) for i in range(16)]
    keys, sizes = np.arange(16, dtype=np.uint64), np.array([one.shape[1:] for one in images])
    views = draw(keys, sizes, 2, 7, flip=flip, area=(0.2, 1.0), colour=0.0, follow=True)
    known = np.stack([slopes(*size, GRID) for size in sizes.tolist()])
    said = crop_grid(known, views, sizes)
    pixels = [np.ascontiguousarray(one.transpose(1, 2, 0).round()).astype(np.uint8) for one in images]
    seen = render(pixels, views, "x".join(map(str, GRID))).numpy().astype(np.float32)
    assert said.shape == seen.shape == (16, 3, *GRID)
    inner = (
        slice(None),
        slice(0, 2),
        slice(2, -2),
        slice(2, -2),
    )  # at the edges the outermost centres stand for what is beyond
    assert np.abs(said[inner] - seen[inner]).max() < 4, "of 200 levels from end to end"
    assert np.abs(said[inner] - seen[inner]).mean() < 1
    assert np.abs(said[:, 2] - 7).max() < 1e-4
    assert said.dtype == np.float32
    turned = said[:, 1, 0, 0] > said[:, 1, 0, -1]
    assert turned.any() == (flip != "none")
    np.testing.assert_array_equal(turned, views.flips[:, 0])
    np.testing.assert_array_equal(said[:, 0, 0, 0] > said[:, 0, -1, 0], views.flips[:, 1])


def test_views_of_one_image_do_not_mix():
    """Each row is cropped by its own view: in one batch as one by one."""
    sizes = np.array([[80, 60], [50, 90], [64, 64]])
    values, views = random_grids(3, 1), draw(np.arange(3, dtype=np.uint64), sizes, 1, 3, area=(0.3, 1.0))
    together = crop_grid(values, views, sizes)
    for i in range(3):
        one = Views(views.boxes[i : i + 1], views.flips[i : i + 1], views.colours[i : i + 1])
        np.testing.assert_allclose(crop_grid(values[i : i + 1], one, sizes[i : i + 1])[0], together[i], atol=1e-6)
