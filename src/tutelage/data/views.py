"""Views: reproducible augmentations of images, which show the same region to teacher and student.

A view is a function of (view seed, image key, view number) and of nothing else: there is no generator state, so
any process may make any view in any order and gets the same bytes. The random numbers come from a counter-based
generator (the finaliser of SplitMix64, Steele, Lea and Flood, OOPSLA 2014) evaluated for a whole batch at once.

`draw` decides what a view shows (numpy, no pixels); `render` computes its pixels at one resolution. Teacher and
student render the same `Views` at their own size and with their own mean and standard deviation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from tutelage.image_size import Size, sides

if TYPE_CHECKING:
    import torch

# Share of the image that a view shows. 5 epochs from scratch on CIFAR-10: accuracy 0.461; with (0.35, 1.0) 0.436.
CROP_AREA = (0.6, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)  # width / height of the region
COLOUR = 0.2  # brightness, contrast and saturation each in [1 - COLOUR, 1 + COLOUR]
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow converts to grey

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_DRAWS = 8  # random numbers that one view needs


@dataclass(frozen=True)
class Views:
    """What a batch of views shows.

    boxes: (B, 4) int64, top, left, height, width in pixels of each image. flips: (B, 2) bool, horizontal and vertical.
    colours: (B, 3) float32, factors of brightness, contrast and saturation; 1 leaves the image unchanged.
    """

    boxes: np.ndarray
    flips: np.ndarray
    colours: np.ndarray

    def __len__(self) -> int:
        return len(self.boxes)


class NetworkInput(Protocol):
    """Input of a network. size: in pixels. mean, std: 3 numbers each, per channel, for images in [0, 1]."""

    @property
    def size(self) -> Size: ...
    @property
    def mean(self) -> tuple[float, ...]: ...
    @property
    def std(self) -> tuple[float, ...]: ...


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: uint64 in, well mixed uint64 out."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms(seed: int, keys: np.ndarray, number: int | np.ndarray, count: int) -> np.ndarray:
    """Return random numbers that depend on (seed, key, number) only.

    Args:
        seed: any integer from 0 to 2**63.
        keys: (B,) uint64, one per image.
        number: which view, from 0; one for all images or (B,) integers.
        count: how many numbers for each image.

    Returns:
        (B, count) float64 in [0, 1).
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is intended
        start = _mix(np.uint64(seed) * _GOLDEN + np.asarray(number, dtype=np.uint64) + np.uint64(1))
        state = _mix(np.asarray(keys, dtype=np.uint64) ^ start)
        steps = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
        bits = _mix(state[:, None] + steps[None, :])
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw(
    keys: np.ndarray,
    sizes: np.ndarray,
    number: int | np.ndarray,
    seed: int,
    *,
    flip: str = "horizontal",
    area: tuple[float, float] = CROP_AREA,
    colour: float = COLOUR,
    follow: bool = False,
) -> Views:
    """Draw view `number` of each image: random resized crop, flip, light colour.

    The region follows Szegedy et al. (CVPR 2015) as torchvision's RandomResizedCrop does it: area uniform in
    `area`, log-ratio uniform; a region that would leave the image is cut at the image's edge.

    Args:
        keys: (B,) uint64, one per image.
        sizes: (B, 2) integers, height and width in pixels.
        number: which view, from 0; one for all or (B,) integers.
        seed: the view seed.
        flip: "none", "horizontal" or "both".
        area: smallest and largest share of the image, in (0, 1].
        colour: half-width of the colour factors, in [0, 1).
        follow: the region's proportions vary around the image's own instead of a square's.
    """
    u = uniforms(seed, keys, number, _DRAWS)
    sizes = np.asarray(sizes, dtype=np.int64).reshape(len(u), 2)
    height, width = sizes[:, 0], sizes[:, 1]
    share = area[0] + (area[1] - area[0]) * u[:, 0]
    low, high = np.log(CROP_RATIO[0]), np.log(CROP_RATIO[1])
    ratio = np.exp(low + (high - low) * u[:, 1])
    ratio = ratio * width / height if follow else ratio
    pixels = share * height * width
    h = np.clip(np.round(np.sqrt(pixels / ratio)), 1, height).astype(np.int64)
    w = np.clip(np.round(np.sqrt(pixels * ratio)), 1, width).astype(np.int64)
    top = np.floor(u[:, 2] * (height - h + 1)).astype(np.int64)
    left = np.floor(u[:, 3] * (width - w + 1)).astype(np.int64)
    allowed = {"none": (False, False), "horizontal": (True, False), "both": (True, True)}[flip]
    flips = (u[:, 7:8] * np.array([[2.0, 4.0]]) % 2 >= 1) & np.array(allowed)
    colours = (1 + colour * (2 * u[:, 4:7] - 1)).astype(np.float32)
    return Views(np.stack([top, left, h, w], axis=1), flips, colours)


def render(images: list[np.ndarray], views: Views, size: Size) -> torch.Tensor:
    """Render the views' regions at one resolution, antialiased; colours are not applied here.

    Args:
        images: B arrays (H, W, 3) uint8.
        views: what to show of each image.
        size: of the result.

    Returns:
        (B, 3, *sides(size)) uint8, channels_last.
    """
    import torch
    from torch.nn.functional import interpolate

    shape = sides(size)
    out = torch.empty((len(images), *shape, 3), dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left, h, w = views.boxes[i]
        region = torch.from_numpy(image[top : top + h, left : left + w].copy())  # a mapped file is read-only
        if (h, w) != shape:
            region = interpolate(
                region.permute(2, 0, 1)[None], size=shape, mode="bilinear", antialias=True, align_corners=False
            )[0].permute(1, 2, 0)
        if views.flips[i, 0]:
            region = region.flip(1)
        if views.flips[i, 1]:
            region = region.flip(0)
        out[i] = region
    return out.permute(0, 3, 1, 2)


def to_input(
    pixels: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...], colours: np.ndarray | None = None
) -> torch.Tensor:
    """Convert pixels to a network's input: colour factors and normalisation as one affine map per image.

    With x in [0, 1], m the image's mean grey, b, c, s the factors of brightness, contrast and saturation and
    g(x) the grey of a pixel, a view shows  s (c b x + (1 - c) b m) + (1 - s) g(c b x + (1 - c) b m), which is
    linear in x. Nothing is clipped: the factors are light and both networks get the same values.

    Args:
        pixels: (B, 3, H, W) uint8.
        mean, std: of the network's input, 3 numbers each, in units of [0, 1].
        colours: (B, 3) float32, or None for unchanged images.

    Returns:
        (B, 3, H, W) float32, channels_last.
    """
    import torch

    batch, _, height, width = pixels.shape
    x = pixels.permute(0, 2, 3, 1).reshape(batch, height * width, 3).to(torch.float32)
    std_t = torch.tensor(std, dtype=torch.float32, device=pixels.device)
    mean_t = torch.tensor(mean, dtype=torch.float32, device=pixels.device)
    if colours is None:
        out = x * (1 / (255 * std_t)) - mean_t / std_t
    else:
        luma = torch.tensor(LUMA, dtype=torch.float32, device=pixels.device)
        b, c, s = torch.from_numpy(colours).to(pixels.device).unbind(1)
        grey = (x.mean(1) / 255) @ luma
        eye = torch.eye(3, device=pixels.device)
        saturate = s[:, None, None] * eye + (1 - s)[:, None, None] * luma[:, None]  # x @ saturate
        matrix = (b * c)[:, None, None] * saturate / (255 * std_t)
        offset = ((1 - c) * b * grey)[:, None] / std_t - mean_t / std_t  # saturation does not change a grey
        out = torch.baddbmm(offset[:, None, :], x, matrix)
    return out.reshape(batch, height, width, 3).permute(0, 3, 1, 2)
