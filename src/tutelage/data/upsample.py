"""Upsampling of a small grid of logits to a mask of any size, for evaluation, export and `predict`. Only numpy."""

from __future__ import annotations

import numpy as np

ROWS = 64  # rows of the mask computed at once, to save memory


def decided(logits: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the class of every pixel: argmax of bilinearly enlarged logits, as torch's `interpolate` with align_corners=False.

    Args:
        logits: (C, h, w) float32. height, width: of the mask, in pixels.

    Returns:
        (height, width) uint8.
    """
    if logits.shape[1:] == (height, width):
        return logits.argmax(0).astype(np.uint8)
    top, bottom, down = _between(logits.shape[1], height)
    left, right, along = _between(logits.shape[2], width)
    mask = np.empty((height, width), np.uint8)
    for start in range(0, height, ROWS):
        rows = slice(start, start + ROWS)
        weight = down[rows, None]
        lines = logits[:, top[rows]] * (1 - weight) + logits[:, bottom[rows]] * weight
        mask[rows] = (lines[:, :, left] * (1 - along) + lines[:, :, right] * along).argmax(0)
    return mask


def _between(given: int, wanted: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return, for each of `wanted` places on `given` samples, the sample before, the one after, and the latter's weight."""
    place = np.maximum((np.arange(wanted) + 0.5) * (given / wanted) - 0.5, 0)
    before = np.minimum(place.astype(np.int64), given - 1)
    return before, np.minimum(before + 1, given - 1), (place - before).astype(np.float32)
