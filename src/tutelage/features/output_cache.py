"""Cache of a teacher's outputs: each image's output is computed once and reused by every run that needs it.

A cache folder belongs to one combination of encoder weights, input size and preprocessing, recorded in its `about.json`.
Outputs are stored in blocks of up to 4,096 images and found by the image's content hash. For a frozen teacher, pooled features
are stored, so that every head, budget and seed shares them and logits are a matrix product; a fine-tuned teacher has a
different weights hash, and its logits are stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tutelage.data.image_cache import BLOCK, Images
from tutelage.features.view_batches import CLEAN, MIRRORED, ViewSettings, view_input
from tutelage.models.adapted_teacher import FeatureExtractor, half_precision
from tutelage.run_folder import atomic_write, hash_of, write_json

CHUNK = 64  # images in one forward pass of the teacher


class OutputCache:
    """Outputs of one network for whole images, float16, in blocks on disk. resize: how an image is made square."""

    def __init__(self, cache: str | Path, network: FeatureExtractor, resize: str, side: int):
        about = {
            "encoder": network.name, "weights": network.hash, "output": network.output, "width": network.width,
            "size": network.size, "mean": network.mean, "std": network.std, "store_side": side,
            "precision": network.precision, "views": {"resize": resize},
        }  # fmt: skip
        self.width, self.name = network.width, network.name
        self.folder = self._made(Path(cache), about)

    @staticmethod
    def _made(cache: Path, about: dict[str, Any]) -> Path:
        folder = cache / f"outputs-{hash_of(about)[:24]}"
        if not (folder / "about.json").exists():
            write_json(folder / "about.json", about)
        return folder

    def table(self, images: Images, number: int) -> Outputs:
        """Return where each image's output for view `number` is stored; `Outputs.missing` lists the images without one."""
        folder = self._view(number)
        paths = sorted(folder.glob("*.keys.npy"))
        keys = [np.load(path) for path in paths]
        blocks = tuple(np.load(str(path).replace(".keys.npy", ".npy"), mmap_mode="r") for path in paths)
        every = np.concatenate([np.zeros((0, 32), np.uint8), *keys])
        block = np.repeat(np.arange(len(keys)), [len(k) for k in keys])
        row = np.concatenate([np.zeros(0, np.int64), *[np.arange(len(k)) for k in keys]])
        order = np.argsort(as_void(every), kind="stable")
        known, asked = as_void(every)[order], as_void(images.keys)
        at = np.searchsorted(known, asked)
        at = np.minimum(at, max(len(known) - 1, 0))
        hit = known[at] == asked if len(known) else np.zeros(len(asked), bool)
        chosen = order[at] if len(known) else np.zeros(len(asked), np.int64)
        return Outputs(
            np.where(hit, block[chosen] if len(known) else 0, -1),
            row[chosen] if len(known) else chosen,
            blocks,
            self.width,
        )

    def add(self, keys: np.ndarray, outputs: np.ndarray, number: int) -> None:
        """Write one block: keys (n, 32) uint8, outputs (n, D).

        Raises:
            TutelageError: an output is NaN, infinite, or too large for float16.
        """
        halves = half_precision(outputs, self.name)
        name = hashlib.sha256(keys.tobytes()).hexdigest()[:24]
        for suffix, array in ((".npy", halves), (".keys.npy", keys)):
            with atomic_write(self._view(number) / f"{name}{suffix}") as path, path.open("wb") as file:
                np.save(file, array)

    def _view(self, number: int) -> Path:
        return self.folder / {CLEAN: "clean", MIRRORED: "mirrored"}[number]


def as_void(keys: np.ndarray) -> np.ndarray:
    """View (n, 32) uint8 keys as (n,) 32-byte strings, which NumPy can compare, sort and search."""
    return np.ascontiguousarray(keys).view("S32")[:, 0] if len(keys) else np.zeros(0, "S32")


@dataclass(frozen=True)
class Outputs:
    """Cached outputs of one view for a selection of images."""

    block: np.ndarray
    row: np.ndarray
    blocks: tuple[np.ndarray, ...]
    width: int

    @property
    def missing(self) -> np.ndarray:
        """(m,) positions of the images without an output in the cache."""
        return np.flatnonzero(self.block < 0)

    def rows(self, positions: np.ndarray | None = None) -> np.ndarray:
        """(B, D) float32 outputs of the images at these positions (default: all)."""
        block = self.block if positions is None else self.block[positions]
        row = self.row if positions is None else self.row[positions]
        assert (block >= 0).all(), "compute_outputs() comes before rows()"
        out = np.empty((len(block), self.width), dtype=np.float32)
        for number in np.unique(block):
            here = np.flatnonzero(block == number)
            out[here] = self.blocks[number][row[here]]
        return out


def run_network(
    network: FeatureExtractor, images: Images, positions: np.ndarray, number: int, settings: ViewSettings
) -> np.ndarray:
    """Run the network on one view of each image, without the cache: (B, D) float32 outputs."""
    import torch

    parts = []
    for start in range(0, len(positions), CHUNK):
        batch = view_input(images, positions[start : start + CHUNK], number, settings, network)
        with torch.inference_mode():
            parts.append(network.forward(batch.to(network.device)).float().cpu().numpy())
    return np.concatenate([np.zeros((0, network.width), np.float32), *parts])


def compute_outputs(
    cache: OutputCache,
    network: FeatureExtractor,
    images: Images,
    numbers: Sequence[int],
    settings: ViewSettings,
    advance: Callable[[int], None] = lambda n: None,
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
        _, first = np.unique(as_void(images.keys[missing]), return_index=True)
        unique = missing[np.sort(first)]
        advance(len(images) - len(unique))
        unique = unique[
            images.keys[unique, -1] % processes == rank
        ]  # by content hash, so that what other processes have finished does not change a process's share
        for start in range(0, len(unique), BLOCK):
            positions, parts = unique[start : start + BLOCK], []
            for at in range(0, len(positions), CHUNK):
                parts.append(run_network(network, images, positions[at : at + CHUNK], number, settings))
                advance(len(parts[-1]))
            cache.add(images.keys[positions], np.concatenate(parts), number)
            computed += len(positions)
    return computed


def gibibytes(images: int, views_each: int, width: int) -> float:
    """GiB that cached outputs take, as float16."""
    return images * views_each * width * 2 / 2**30
