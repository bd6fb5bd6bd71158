"""Decide whether two thumbnails show the same picture: one image's thumbnail against all crops of the other, also mirrored.

Images are compared as 16 x 16 thumbnails in three opponent colours (grey; red - blue; red - 2 green + blue).
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np

from tutelage.data.decode import fit

THUMB = 16
DETAIL = 64  # side in pixels to which a held-out image is resized before it is cropped
CROPS = (0.95, 0.9)  # sides of the crops relative to the image's; sides in between are reached by SHIFT below
OVERSHOOT = 1.35  # largest ratio of a crop's variance to the whole image's
STEP = 0.025  # distance of the crops' corners, in sides of the image; half of it is 0.2 pixels of a thumbnail
HOW = ("", "same picture", "mirrored", "cropped", "cropped and mirrored")

# A copy's residual is at most LOCAL of the local structure everywhere, and at most OVERALL of the whole picture's.
# Of 1,000 copies (32 and 224 px, a third as JPEG of quality 40) 99.5 % stay below 0.75 and 0.21. Of different pictures,
# CIFAR's 5,000 most similar pairs that are not copies start at 1.0, emoji (another face on the same disc) at 0.76.
LOCAL, OVERALL = 0.8, 0.3
WORTH = 0.45  # crops whose layouts differ by more are not compared: copies reach 0.32, and their contrast may change
BLOCK = 1024  # pairs compared at once: 80 MB
NOISE = 16.0  # levels of structure assumed at least in a window: rounding and JPEG noise are not a difference
FAINT = 1.5  # levels of residual allowed in a picture without structure
WINDOW = 3  # side in pixels of a thumbnail; with 4, 5 emoji instead of 3 pass as another face
SHIFT, GAIN = 0.75, 0.12  # how far a crop may be moved (in pixels of a thumbnail) and its contrast changed to agree
COLOUR = 0.5  # weight of colour relative to grey: JPEG of quality 40 distorts colour twice as much

_OPPONENT = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]], np.float32) / np.sqrt([[3], [2], [6]], dtype=np.float32)
_OPPONENT = np.ascontiguousarray((_OPPONENT * np.array([[1], [COLOUR], [COLOUR]], np.float32)).T)


def thumbnail(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> (16, 16, 3) uint8: the whole image, squashed to a square, antialiased."""
    return fit(image, THUMB, "squash")


def opponent(images: np.ndarray) -> np.ndarray:
    """(..., 3) uint8 RGB -> (..., 3) float32: grey and two colours; lengths are kept, except that COLOUR weights colours."""
    return images.astype(np.float32) @ _OPPONENT


def layout(thumbs: np.ndarray) -> np.ndarray:
    """Return where a picture is light and where it is dark, as a vector for a search by inner product.

    Args:
        thumbs: (n, 16, 16, 3) uint8.

    Returns:
        (n, 192) float32: 8 x 8 pixels minus their mean colour, at unit length; shorter where there is hardly any
        structure, so that rounding errors of a blank image match nothing.
    """
    flat = _less_mean(_halved(opponent(thumbs)))
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), THUMB // 2)  # one level per pixel


def confirm(image: np.ndarray, thumbs: np.ndarray) -> np.ndarray:
    """Return which thumbnails show the same picture as an image, a crop of it, or a picture of which it is a crop.

    Args:
        image: (H, W, 3) uint8. thumbs: (m, 16, 16, 3) uint8.

    Returns:
        (m,) int64, index in HOW: 0 a different picture, 1 the same, 2 mirrored, 3 cropped, 4 cropped and mirrored.
    """
    how = np.zeros(len(thumbs), np.int64)
    small, own = opponent(thumbs), opponent(thumbnail(image)[None])
    rest = np.flatnonzero(may_agree(colours_of(small), colours_of(own)))
    if len(rest):
        detail = opponent(fit(image, DETAIL, "squash")[None])
        how[rest] = compare(detail, small[rest], 0 * rest, np.arange(len(rest)))
    rest = rest[how[rest] == 0]
    how[rest] = compare(small[rest], own, np.arange(len(rest)), 0 * rest)
    return how


def colours_of(small: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(m, 16, 16, 3) float32 -> mean and standard deviation of each colour, (m, 3) each."""
    return small.mean(axis=(1, 2)), small.std(axis=(1, 2))


def may_agree(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """(m,) bool: False where mean colours differ so much that no crop of either can pass `_agree`; most pairs then need no crops.

    The mean of a share p of an image is at most sqrt((1 - p) / p) standard deviations from the whole image's (Cauchy-Schwarz). Its
    variance is at most 1 / p times the whole image's, and OVERSHOOT times with the lobes of the cubic that enlarges it.
    """
    share = min(CROPS) ** 2
    spread = np.maximum(one[1], other[1])
    contrast = np.sqrt(np.square(spread).sum(axis=1) * OVERSHOOT)
    most = _most_shift(contrast) + np.float32(np.sqrt((1 - share) / share)) * spread + 1  # one level for rounding
    return np.all(np.abs(one[0] - other[0]) <= most, axis=1)


def compare(images: np.ndarray, thumbs: np.ndarray, image: np.ndarray, thumb: np.ndarray) -> np.ndarray:
    """Return how each pair of an image and a thumbnail is related, trying the whole image and the crop whose layout fits best.

    Args:
        images: (n, S, S, 3) float32. thumbs: (t, 16, 16, 3) float32. Both in opponent colours.
        image, thumb: (p,) int64, index of each pair's image and thumbnail; ordered by image.

    Returns:
        (p,) int64, index in HOW: the simplest relation that agrees, 0 if none does.
    """
    layouts = _layouts_of_crops(images)
    mirrored = thumbs[:, :, ::-1]
    small = _halved(thumbs)
    small = np.stack([small, small[:, :, ::-1]])
    wanted = _less_mean(small)
    length = squared_length(wanted)
    worth = FAINT**2 * (THUMB // 2) ** 2 + WORTH**2 * length
    crop = np.zeros((2, 2, len(image)), np.int64)  # axes: whole or cropped; plain or mirrored; pair
    near = np.zeros(crop.shape, bool)
    ends = np.searchsorted(image, np.arange(len(images) + 1))
    for number, (start, end) in enumerate(pairwise(ends)):
        here = wanted[:, thumb[start:end]]
        apart = length[:, thumb[start:end], None] + squared_length(layouts[number]) - 2 * here @ layouts[number].T
        best = 1 + apart[:, :, 1:].argmin(axis=2)
        crop[1, :, start:end] = best
        least = np.stack([apart[:, :, 0], np.take_along_axis(apart, best[:, :, None], 2)[:, :, 0]])
        near[:, :, start:end] = least <= worth[:, thumb[start:end]]
    agree = np.zeros(crop.shape, bool)
    cropped, turned, pair = np.nonzero(near)
    for start in range(0, len(pair), BLOCK):
        which = tuple(index[start : start + BLOCK] for index in (cropped, turned, pair))
        shown = _crop(images[image[which[2]]], crop[which])
        targets = np.where(which[1][:, None, None, None] == 1, mirrored[thumb[which[2]]], thumbs[thumb[which[2]]])
        agree[which] = _agree(shown, targets)
    ordered = agree.reshape(4, -1)  # whole, whole mirrored, cropped, cropped and mirrored
    return np.where(ordered.any(axis=0), ordered.argmax(axis=0) + 1, 0)


def squared_length(vectors: np.ndarray) -> np.ndarray:
    """(..., d) float32 -> (...): squared lengths."""
    return np.einsum("...d,...d->...", vectors, vectors)


def _halved(thumbs: np.ndarray) -> np.ndarray:
    """(..., 16, 16, 3) float32 -> (..., 8, 8, 3): means of 2 x 2 pixels."""
    rows = thumbs[..., ::2, :, :] + thumbs[..., 1::2, :, :]  # 20 times as fast as mean() over two short axes
    return (rows[..., ::2, :] + rows[..., 1::2, :]) / np.float32(4)


def _less_mean(images: np.ndarray) -> np.ndarray:
    """(..., h, w, 3) float32 -> (..., h * w * 3): the pixels minus their mean colour."""
    *others, height, width, colours = images.shape
    flat = images.reshape(*others, height * width, colours)
    return (flat - flat.mean(axis=-2, keepdims=True)).reshape(*others, height * width * colours)


@cache
def _lines(size: int, pixels: int) -> np.ndarray:
    """(9, pixels, size) float32: weights that resize a line of `size` pixels, whole (first) or cropped, to `pixels`.

    Lines are shrunk like Pillow's bilinear resize and enlarged by the cubic with a = -0.75: bilinear crops of thumbnails
    are so blurred that 39 of 100 copies cropped to 90 % were missed, and 7 of 100 with the cubic.
    """
    lines = []
    for side in (1.0, *CROPS):
        for corner in np.arange(0, 1 - side + 1e-6, STEP):
            scale = side * size / pixels
            centres = corner * size + (np.arange(pixels) + 0.5) * scale
            x = np.abs(np.arange(size) + 0.5 - centres[:, None]) / max(scale, 1)
            near, far = 1.25 * x**3 - 2.25 * x**2 + 1, -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
            cubic = np.where(x < 1, near, np.where(x < 2, far, 0))
            weights = cubic if scale < 1 else np.maximum(1 - x, 0)
            lines.append(weights / weights.sum(axis=1, keepdims=True))
    return np.array(lines, np.float32)


def _layouts_of_crops(images: np.ndarray) -> np.ndarray:
    """(n, S, S, 3) float32 -> (n, 81, 192) float32: 8 x 8 pixels of the whole image, then of every crop, minus their mean."""
    half = THUMB // 2
    lines = _lines(images.shape[1], half)
    flat = lines.reshape(-1, lines.shape[2])
    every = flat @ images.transpose(0, 3, 1, 2) @ flat.T
    every = every.reshape(len(images), 3, len(lines), half, len(lines), half)
    mean = lines.mean(axis=1)
    every -= (mean @ images.transpose(0, 3, 1, 2) @ mean.T)[:, :, :, None, :, None]
    return np.ascontiguousarray(every.transpose(0, 2, 4, 3, 5, 1)).reshape(len(images), len(lines) ** 2, 3 * half**2)


def _crop(images: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """(m, S, S, 3) float32 and (m,) numbers of crops in [0, 81) -> the crops, (m, 16, 16, 3) float32."""
    lines = _lines(images.shape[1], THUMB)
    down, across = np.divmod(numbers, len(lines))
    crops = lines[down][:, None] @ images.transpose(0, 3, 1, 2) @ lines[across][:, None].transpose(0, 1, 3, 2)
    return crops.transpose(0, 2, 3, 1)


def _agree(shown: np.ndarray, thumbs: np.ndarray) -> np.ndarray:
    """(m, 16, 16, 3) float32 each -> (m,) bool: mean colours agree, which is cheap to see, and `_structure_agrees` with `shown` moved."""
    a, b = (images - images.mean(axis=(1, 2), keepdims=True) for images in (shown, thumbs))
    contrast = np.sqrt((np.square(a) + np.square(b)).sum(axis=3).mean(axis=(1, 2)) / 2)
    agree = (np.abs(shown.mean(axis=(1, 2)) - thumbs.mean(axis=(1, 2))) <= _most_shift(contrast)).all(axis=1)
    if agree.any():
        agree[agree] = _structure_agrees(a[agree], b[agree], contrast[agree])
    return agree


def _most_shift(contrast: np.ndarray) -> np.ndarray:
    """(m, 3) float32: levels by which mean colours of copies may differ, given the contrast (m,) of both.

    Brightness may change by 17 of 255 levels and colour by half of that, but not where the picture is nothing but colour.
    """
    grey, colour = np.minimum(4 + 0.3 * contrast, 30), np.minimum(2 + 0.06 * contrast, 8)
    return np.stack([grey, colour, colour], axis=-1)


def _structure_agrees(a: np.ndarray, b: np.ndarray, contrast: np.ndarray) -> np.ndarray:
    """Return whether the residual between two thumbnails is small overall, and everywhere relative to the local structure.

    First, `a` is moved and stretched by up to SHIFT pixels and its contrast changed by up to GAIN so that it agrees best
    with `b` (least squares on the first derivatives, as Lucas and Kanade, IJCAI 1981).

    a, b: (m, 16, 16, 3) float32, minus their means. contrast: (m,). Returns (m,) bool.
    """
    down, across = np.gradient(a, axis=(1, 2))
    place = ((np.arange(THUMB) + 0.5) / THUMB * 2 - 1).astype(np.float32)
    x, y = place[:, None], place[:, None, None]
    ways = np.stack([across, across * x, down, down * y, a], axis=1)
    ways = (ways - ways.mean(axis=(2, 3), keepdims=True)).reshape(len(a), 5, -1)
    left = (b - a).reshape(len(a), -1, 1)
    normal = ways @ ways.transpose(0, 2, 1) + np.eye(5, dtype=np.float32)  # a blank image is not moved
    most = np.array([SHIFT, SHIFT, SHIFT, SHIFT, GAIN], np.float32)
    amount = np.clip(np.linalg.solve(normal, ways @ left)[:, :, 0], -most, most)
    rest = np.square(left[:, :, 0] - (amount[:, None] @ ways)[:, 0]).reshape(a.shape).sum(axis=3)

    overall = rest.mean(axis=(1, 2)) <= FAINT**2 + np.square(OVERALL * contrast)
    structure = (_variance(a) + _variance(b)) / 2 + NOISE**2
    return overall & (_window(rest) <= LOCAL**2 * structure).all(axis=(1, 2))


def _window(values: np.ndarray) -> np.ndarray:
    """(m, 16, 16, ...) float32 -> (m, 14, 14, ...): means over all windows of 3 x 3 pixels."""
    most = THUMB - WINDOW + 1
    rows = np.add.reduce([values[:, at : at + most] for at in range(WINDOW)])
    return np.add.reduce([rows[:, :, at : at + most] for at in range(WINDOW)]) / np.float32(WINDOW**2)


def _variance(values: np.ndarray) -> np.ndarray:
    """(m, 16, 16, 3) float32 -> (m, 14, 14): variance within all windows, summed over the colours."""
    return _window(np.square(values).sum(axis=3)) - np.square(_window(values)).sum(axis=3)
