"""Cache of a teacher's outputs: each image's output is computed once and reused by every run that needs it.

A cache folder belongs to one combination of encoder weights, input size and preprocessing; outputs are found by the
image's content hash. For a frozen teacher, pooled features are stored, so that every head, budget and seed shares them
and logits are a matrix product; a fine-tuned teacher has a different weights hash, and its logits are stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tutelage.data.block_cache import BlockCache, Rows, cache_folder
from tutelage.data.image_cache import BLOCK, Images
from tutelage.features.view_batches import CLEAN, MIRRORED, ViewSettings, view_input
from tutelage.models.adapted_teacher import FeatureExtractor, half_precision
from tutelage.progress import Advance

CHUNK = 64  # images in one forward pass of the teacher


@dataclass(frozen=True)
class Outputs:
    """Cached outputs of one view for a selection of images. found: their rows in the cache. width: D."""

    found: Rows
    width: int

    @property
    def missing(self) -> np.ndarray:
        """(m,) int64 positions of the images without an output in the cache, one of each content."""
        return self.found.missing

    def rows(self, positions: np.ndarray | None = None) -> np.ndarray:
        """(B, D) float32 outputs of the images at these positions (default: all)."""
        count = len(self.found.places) if positions is None else len(positions)
        return self.found.take("output", np.empty((count, self.width), np.float32), positions)


class OutputCache:
    """Outputs of one network for whole images, float16, in blocks on disk. resize: how an image is made square."""

    def __init__(self, cache: str | Path, network: FeatureExtractor, resize: str, side: int):
        about = {
            "encoder": network.name,
            "weights": network.hash,
            "output": network.output,
            "width": network.width,
            "size": network.size,
            "mean": network.mean,
            "std": network.std,
            "store_side": side,
            "precision": network.precision,
            "views": {"resize": resize},
        }
        self.width, self.name = network.width, network.name
        self.folder = cache_folder(cache, "outputs", f"{network.name} at {network.size} px, {network.output}", about)
        views = {CLEAN: "clean", MIRRORED: "mirrored"}
        self._views = {number: BlockCache(self.folder / name, ("key", "output")) for number, name in views.items()}

    def table(self, images: Images, number: int) -> Outputs:
        """Return where each image's output for view `number` is stored; `Outputs.missing` lists the images without one."""
        return Outputs(self._views[number].find(images.keys), self.width)

    def add(self, keys: np.ndarray, outputs: np.ndarray, number: int) -> None:
        """Write one block: keys (n, 32) uint8, outputs (n, D).

        Raises:
            TutelageError: an output is NaN, infinite, or too large for float16.
        """
        self._views[number].write({"key": keys, "output": half_precision(outputs, self.name)})


def run_network(
    network: FeatureExtractor,
    images: Images,
    positions: np.ndarray,
    number: int,
    settings: ViewSettings,
    advance: Advance = lambda n: None,
) -> np.ndarray:
    """Run the network on one view of each image, without the cache: (B, D) float32 outputs. advance: called with numbers of images."""
    import torch

    parts = [np.zeros((0, network.width), np.float32)]
    for start in range(0, len(positions), CHUNK):
        batch = view_input(images, positions[start : start + CHUNK], number, settings, network)
        with torch.inference_mode():
            parts.append(network.forward(batch.to(network.device)).float().cpu().numpy())
        advance(len(batch))
    return np.concatenate(parts)


def compute_outputs(
    cache: OutputCache,
    network: FeatureExtractor,
    images: Images,
    numbers: Sequence[int],
    settings: ViewSettings,
    advance: Advance = lambda n: None,
    share: tuple[int, int] = (0, 1),
) -> int:
    """Make sure that the cache holds the network's outputs for these views of these images.

    Args:
        cache: of this network and these view settings.
        images: images with the same content are computed once.
        numbers: views: CLEAN, MIRRORED.
        advance: called with the number of outputs just computed or found.
        share: (rank, processes): each process computes the images whose content hash modulo processes is its rank.

    Returns:
        the number of outputs that this call computed.
    """
    rank, processes = share
    computed = 0
    for number in numbers:
        missing = cache.table(images, number).missing
        advance(len(images) - len(missing))
        # By content hash, so that what other processes have finished does not change a process's share.
        missing = missing[images.keys[missing, -1] % processes == rank]
        for start in range(0, len(missing), BLOCK):
            positions = missing[start : start + BLOCK]
            outputs = run_network(network, images, positions, number, settings, advance)
            cache.add(images.keys[positions], outputs, number)
        computed += len(missing)
    return computed


def gibibytes(images: int, views_each: int, width: int) -> float:
    """GiB that cached outputs take, as float16."""
    return images * views_each * width * 2 / 2**30
