"""Small images of three textures, drawn with a seed: enough for a real run of every stage in seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("dots", "stripes", "waves")


def texture(name: str, seed: int, size: int = 32) -> np.ndarray:
    """One image: (size, size, 3) uint8. Frequency, phase, colours and noise differ from seed to seed."""
    draw = np.random.default_rng([CLASSES.index(name), seed])
    y, x = np.mgrid[0:size, 0:size] / size * 2 * np.pi
    frequency, phase = draw.uniform(2, 4), draw.uniform(0, 6, 2)
    pattern = {
        "stripes": np.sin(frequency * x + phase[0]),
        "dots": np.sin(frequency * x + phase[0]) * np.sin(frequency * y + phase[1]),
        "waves": np.sin(frequency * (x + np.sin(y + phase[1])) + frequency * y),
    }[name]
    low, high = draw.uniform(0, 110, 3), draw.uniform(140, 255, 3)
    image = low + (high - low) * (pattern[..., None] + 1) / 2 + draw.normal(0, 8, (size, size, 3))
    return np.clip(image, 0, 255).astype(np.uint8)


def write_textures(
    folder: Path, train: int = 8, test: int = 10, gallery: int = 90, size: int = 32
) -> tuple[Path, Path]:
    """Write a target set and a gallery.

    Args:
        train, test: images of a class. gallery: images in all.

    Returns:
        the folders target/ (train|test/<class>/*.png) and gallery/.
    """
    for name in CLASSES:
        for split, first, count in (("train", 0, train), ("test", 1000, test)):
            place = folder / "target" / split / name
            place.mkdir(parents=True, exist_ok=True)
            for seed in range(first, first + count):
                Image.fromarray(texture(name, seed, size)).save(place / f"{seed}.png")
    (folder / "gallery").mkdir(exist_ok=True)
    for seed in range(gallery):
        Image.fromarray(texture(CLASSES[seed % 3], 5000 + seed, size)).save(folder / "gallery" / f"{seed:04d}.png")
    return folder / "target", folder / "gallery"
