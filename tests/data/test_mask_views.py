"""Views of images with masks: image, mask and targets show the same places."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tutelage.data.decode import content_key
from tutelage.data.image_cache import Images
from tutelage.data.masks import IGNORE, Masks, nearest
from tutelage.data.views import draw
from tutelage.distillation.targets import Targets
from tutelage.features.view_batches import CLEAN, ViewSettings, view_input, view_truth
from tutelage.image_size import sides

HEIGHT, WIDTH = 90, 120
CELL = 15  # pixels of one colour and one class


class Shape:
    """What `view_input` asks of a network."""

    def __init__(self, size):
        self.size, self.mean, self.std = size, (0.0,) * 3, (1.0,) * 3


def stored(images: list[np.ndarray]) -> Images:
    """Images as the store gives them."""
    keys = np.stack(
        [
            np.frombuffer(content_key(np.repeat(i.reshape(*i.shape[:2], -1)[..., :1], 3, 2), i.shape[:2]), np.uint8)
            for i in images
        ]
    )
    sizes = np.array([image.shape[:2] for image in images], np.int32)
    offsets = np.cumsum([0, *(image.size for image in images)])[:-1]
    places = np.stack([np.zeros(len(images), np.int64), offsets], axis=1)
    channels = 1 if images[0].ndim == 2 else 3
    return Images(keys, sizes, places, (np.concatenate([image.reshape(-1) for image in images]),), channels)


def board(scale: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """An image whose colour is its cell's class times 5, and its mask, which may be `scale` times as large."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    classes = (y // CELL * (WIDTH // CELL) + x // CELL).astype(np.uint8)
    image = np.repeat((classes * 5)[..., None], 3, axis=2)
    return image, np.kron(classes, np.ones((scale, scale), np.uint8))


def inner(truth: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels whose neighbours have their class, where resampling mixes no colours."""
    same = np.ones(truth.shape, bool)
    for axis in (0, 1):
        for step in (-2, -1, 1, 2):
            same &= np.roll(truth, step, axis) == truth
    same[:2], same[-2:], same[:, :2], same[:, -2:] = False, False, False, False
    return same


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("size", [64, "48x80"])
def test_image_and_mask_agree_in_every_pixel(size, scale):
    """In flipped, cropped and resized views each pixel's colour says its mask's class; teacher's and student's sizes alike."""
    image, mask = board(scale)
    images, masks = stored([image]), stored([mask])
    settings = ViewSettings(seed=1, flip="both", crop_area=0.3, colour=0.0, follow=True)
    labels, checked = Masks(masks, images.sizes), 0
    for number in (CLEAN, *range(12)):
        pixels = view_input(images, np.array([0]), number, settings, Shape(size))[0, 0].numpy() * 51
        truth = view_truth(images, labels, np.array([0]), number, settings, sides(size))[0].numpy()
        assert truth.shape == pixels.shape
        sure = inner(truth)
        checked += sure.sum()
        assert np.abs(pixels - truth)[sure].max() < 0.05
    assert checked > 10_000


def test_two_networks_see_the_same_places():
    """At two sizes of other proportions a view shows the same region: its masks agree where both have the cell's inside."""
    image, mask = board()
    images, labels = stored([image]), None
    labels = Masks(stored([mask]), images.sizes)
    settings = ViewSettings(seed=2, flip="both", crop_area=0.3, follow=True)
    for number in range(8):
        one, other = (
            view_truth(images, labels, np.array([0]), number, settings, size)[0].numpy()
            for size in ((60, 80), (120, 80))
        )
        assert (one == other[::2])[inner(one)].all()
        assert (one == other[1::2])[inner(one)].all()


def test_targets_and_masks_show_the_same_places():
    """A target that says of each place the mask's class is, cropped for a pass, the mask that the pass shows of a labelled image."""
    image, mask = board()
    images = stored([image])
    labels, settings = (
        Masks(stored([mask]), images.sizes),
        ViewSettings(seed=3, flip="both", crop_area=0.2, follow=True),
    )
    one_hot = np.eye(48, dtype=np.float32)[mask.astype(int)].transpose(2, 0, 1)[None]
    given = Targets(images, settings, lambda positions: np.log(one_hot[positions] + 1e-6))
    for number in range(8):
        said = given.probabilities(np.array([0]), np.array([number]))[0].argmax(axis=0)
        truth = view_truth(images, labels, np.array([0]), np.array([number]), settings, (HEIGHT, WIDTH))[0].numpy()
        assert (said == truth)[inner(truth)].all()
        assert (said == truth).mean() > 0.95


def test_regions_follow_the_images_proportions():
    """With `follow` a region's proportions lie around the image's; crops are of many scales."""
    keys, sizes = np.arange(400, dtype=np.uint64), np.tile([[300, 400]], (400, 1))
    boxes = draw(keys, sizes, 0, 0, area=(0.2, 1.0), follow=True).boxes
    ratio = boxes[:, 3] / boxes[:, 2]
    assert np.quantile(ratio, [0.02, 0.98]) == pytest.approx([1.0, 16 / 9], abs=0.08)
    assert np.median(np.log(ratio)) == pytest.approx(np.log(4 / 3), abs=0.03)
    share = boxes[:, 2] * boxes[:, 3] / 120_000
    assert share.min() < 0.25
    assert share.max() > 0.9


def test_no_class_stays_no_class():
    """IGNORE is neither mixed with a class nor lost: a view has it exactly where its region has it."""
    mask = np.full((40, 40), 1, np.uint8)
    mask[:, 20:] = IGNORE
    images = stored([np.zeros((40, 40, 3), np.uint8)])
    settings = ViewSettings(seed=0, flip="none", crop_area=1.0, follow=True)
    truth = view_truth(images, Masks(stored([mask]), images.sizes), np.array([0]), CLEAN, settings, (64, 64))[0]
    assert torch.equal(truth[:, :32], torch.ones(64, 32, dtype=torch.int64))
    assert torch.equal(truth[:, 32:], torch.full((64, 32), IGNORE))


def test_nearest_takes_the_pixel_at_the_centre():
    """Along one side a pixel of a view is that pixel of the mask in which its centre lies."""
    assert nearest(0, 4, 4, 4, 2).tolist() == [1, 3]
    assert nearest(0, 4, 4, 4, 4).tolist() == [0, 1, 2, 3]
    assert nearest(0, 4, 4, 8, 4).tolist() == [1, 3, 5, 7]
    assert nearest(2, 2, 4, 4, 4, flip=True).tolist() == [3, 3, 2, 2]
