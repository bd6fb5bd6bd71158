"""Grids of values over images, such as logits or features of every place, cropped to the region that a view shows."""

from __future__ import annotations

import numpy as np

from tutelage.data.views import Views


def crop_grid(values: np.ndarray, views: Views, sizes: np.ndarray) -> np.ndarray:
    """Return the values on the views' own grids, bilinear between the image's cells; beyond the outermost centres, theirs.

    Args:
        values: (B, D, h, w) float32 of whole images.
        views: B views, one for each image.
        sizes: (B, 2) integers, height and width of the images that the views' boxes are measured in.

    Returns:
        (B, D, h, w) float32, mirrored as the views are.
    """
    import torch
    from torch.nn.functional import affine_grid, grid_sample

    top, left, high, wide = (views.boxes / np.tile(sizes, 2)).T
    lines = np.zeros((len(values), 2, 3), np.float32)  # maps places of the result, in [-1, 1], to places in the image
    lines[:, 0, 0] = np.where(views.flips[:, 0], -wide, wide)
    lines[:, 1, 1] = np.where(views.flips[:, 1], -high, high)
    lines[:, 0, 2], lines[:, 1, 2] = 2 * left + wide - 1, 2 * top + high - 1
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    grid = affine_grid(torch.from_numpy(lines), list(tensor.shape), align_corners=False)
    return grid_sample(tensor, grid, mode="bilinear", padding_mode="border", align_corners=False).numpy()
