"""Parts of views: what the student sees and what is said of it lie over one another."""

from __future__ import annotations

import numpy as np
import pytest

from tutelage.data.parts import draw_parts, of_grid
from tutelage.data.views import draw, render

GRID = "24x32"


def slopes(height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8: the first two colours say where a pixel lies."""
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([20 + 200 * rows / height, 20 + 200 * columns / width, 0 * rows], axis=2).astype(np.uint8)


@pytest.mark.parametrize("flip", ["none", "horizontal", "both"])
def test_the_word_on_a_part_is_of_the_place_that_the_part_shows(flip):
    """Colours encode the position: those of a part are those that the whole view has there, flipped and mirrored views too."""
    images = [slopes(120 + 4 * i, 160 + 8 * i) for i in range(16)]
    keys, sizes = np.arange(16, dtype=np.uint64), np.array([one.shape[:2] for one in images])
    views = draw(keys, sizes, 2, 7, flip=flip, area=(0.4, 1.0), colour=0.0, follow=True)
    parts = draw_parts(views, keys, 5, 7, area=0.3, mirror=flip != "none")
    said = of_grid(render(images, views, GRID).numpy().astype(np.float32), parts)
    seen = render(images, parts.views, GRID).numpy().astype(np.float32)
    inner = (
        slice(None),
        slice(0, 2),
        slice(2, -2),
        slice(2, -2),
    )  # at the edges the outermost centres stand for what is beyond
    assert np.abs(said[inner] - seen[inner]).max() < 4, "of 200 levels from end to end"
    assert np.abs(said[inner] - seen[inner]).mean() < 1
    flat = (parts.within[:, 2] * parts.within[:, 3]).round(2)
    assert flat.min() >= 0.29
    assert flat.max() <= 1
    assert len(np.unique(flat)) > 8
    assert parts.mirrored.any() == (flip != "none")
    assert not parts.mirrored.all()


def test_parts_differ_by_pass_and_repeat():
    """Another pass shows another part of the same view; the same pass the same."""
    keys, sizes = np.arange(8, dtype=np.uint64), np.full((8, 2), 100)
    views = draw(keys, sizes, 0, 1, follow=True)
    first, again, later = (draw_parts(views, keys, number, 1, area=0.5, mirror=True) for number in (4, 4, 8))
    assert np.array_equal(first.views.boxes, again.views.boxes)
    assert not np.array_equal(first.views.boxes, later.views.boxes)
    whole = draw_parts(views, keys, 4, 1, area=1.0, mirror=False)
    assert np.array_equal(whole.views.boxes, views.boxes)
    assert np.array_equal(whole.within, np.tile([0.0, 0.0, 1.0, 1.0], (8, 1)))
    values = np.random.default_rng(0).normal(size=(8, 3, 5, 6)).astype(np.float32)
    assert np.allclose(of_grid(values, whole), values, atol=1e-5)
