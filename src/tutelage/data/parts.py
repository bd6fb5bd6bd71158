"""Parts of views: what is said of every place of a view is said of any part of it too.

A dense teacher's word on a view is kept once; in each pass the student sees another part of the view, mirrored or not, and
the same part of the word. So few views, which cost the teacher, become as many as there are passes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from tutelage.data.views import Views, uniforms

PART_SEED = 0x70617274  # parts and views of one seed have nothing to do with each other
_DRAWS = 4


@dataclass(frozen=True)
class Parts:
    """views: what the parts show of the images. within: (B, 4) float64, top, left, height and width in shares of the view as it is
    shown. mirrored: (B,) bool, beside what the view does.
    """

    views: Views
    within: np.ndarray
    mirrored: np.ndarray


def draw_parts(
    views: Views, keys: np.ndarray, number: int | np.ndarray, seed: int, *, area: float, mirror: bool
) -> Parts:
    """Draw a part of each view, in the view's own proportions.

    Args:
        views: B of them. keys, number, seed: as of `views.draw`; number is that of the pass.
        area: smallest share of a view that a part shows, in (0, 1]. mirror: whether parts may be mirrored.
    """
    u = uniforms(seed ^ PART_SEED, keys, number, _DRAWS)
    top, left, height, width = views.boxes.T
    side = np.sqrt(area + (1 - area) * u[:, 0])
    h, w = (np.clip(np.round(side * whole), 1, whole).astype(np.int64) for whole in (height, width))
    down, right = (
        np.floor(u[:, i] * (whole - part + 1)).astype(np.int64) for i, whole, part in ((1, height, h), (2, width, w))
    )
    mirrored = (u[:, 3] < 0.5) & mirror
    flips = views.flips.copy()
    flips[:, 0] ^= mirrored
    boxes = np.stack([top + down, left + right, h, w], axis=1)
    # as it is shown: a flipped view is measured from its other end
    shown_down = np.where(views.flips[:, 1], height - down - h, down)
    shown_right = np.where(views.flips[:, 0], width - right - w, right)
    within = np.stack([shown_down / height, shown_right / width, h / height, w / width], axis=1)
    return Parts(replace(views, boxes=boxes, flips=flips), within, mirrored)


def of_grid(values: np.ndarray, parts: Parts) -> np.ndarray:
    """What lies on the parts' own grids, between the views' cells bilinearly, beyond the outermost centres as these.

    Args:
        values: (B, D, h, w) float32 of whole views.

    Returns:
        (B, D, h, w) float32.
    """
    import torch
    from torch.nn.functional import affine_grid, grid_sample

    top, left, high, wide = parts.within.T
    lines = np.zeros((len(values), 2, 3), np.float32)  # output places in [-1, 1] to places in the view
    lines[:, 0, 0], lines[:, 1, 1] = np.where(parts.mirrored, -wide, wide), high
    lines[:, 0, 2], lines[:, 1, 2] = 2 * left + wide - 1, 2 * top + high - 1
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    grid = affine_grid(torch.from_numpy(lines), list(tensor.shape), align_corners=False)
    return grid_sample(tensor, grid, mode="bilinear", padding_mode="border", align_corners=False).numpy()
