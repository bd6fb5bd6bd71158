"""Small scenes with masks: a striped ground, a bright disc, a dark square."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("ground", "disc", "square")
SIZE = (48, 64)  # height, width


def scene(seed: int, size: tuple[int, int] = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """An image (H, W, 3) uint8 and its mask (H, W) uint8; a few pixels at the edge have no class."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]]
    image = (
        110
        + 25 * np.sin(x / random.uniform(1.5, 4) + random.uniform(0, 6))[..., None]
        + random.normal(0, 8, (*size, 3))
    )
    mask = np.zeros(size, np.uint8)
    cy, cx, radius = random.uniform(14, size[0] - 14), random.uniform(14, size[1] // 2), random.uniform(7, 12)
    disc = (y - cy) ** 2 + (x - cx) ** 2 < radius**2
    top, left, side = (
        int(random.integers(4, size[0] - 22)),
        int(random.integers(size[1] // 2, size[1] - 18)),
        int(random.integers(10, 16)),
    )
    square = (y >= top) & (y < top + side) & (x >= left) & (x < left + side)
    for number, place, colour in ((1, disc, (230, 210, 120)), (2, square, (20, 40, 90))):
        image[place] = np.array(colour) + random.normal(0, 8, (int(place.sum()), 3))
        mask[place] = number
    mask[0, :5] = 255
    return np.clip(image, 0, 255).astype(np.uint8), mask


def write_pair(folder: Path, split: str, name: str, image: np.ndarray, mask: np.ndarray) -> None:
    """images/SPLIT/NAME.png and masks/SPLIT/NAME.png."""
    for kind, pixels in (("images", image), ("masks", mask)):
        path = folder / kind / split / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


def write_scenes(folder: Path, counts: dict[str, int] | None = None, gallery: int = 10) -> Path:
    """target/ with images, masks and classes.txt, gallery/ with images alone; the folder is returned."""
    seed = 0
    for split, count in (counts or {"train": 6, "val": 3, "test": 4}).items():
        for number in range(count):
            write_pair(folder / "target", split, f"{split}{number}", *scene(seed := seed + 1))
    (folder / "target" / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    for number in range(gallery):
        path = folder / "gallery" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene(1000 + number)[0]).save(path)
    return folder
