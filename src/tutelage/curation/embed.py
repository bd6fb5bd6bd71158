"""Embeddings of a gallery: the encoder sees each image once, and its pixels are not kept.

A cache folder belongs to one encoder (weights, size, preprocessing). A piece, 2,048 images on average, is one block of it:
features, and small pixels for finding copies. Where pieces end depends only on the images, so that every machine, restart
and share computes the same batches and gets the same bits; adding an image to a folder changes one piece.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np

from tutelage.curation.image_match import THUMB, layout, thumbnail
from tutelage.curation.vectors import Part
from tutelage.data import views
from tutelage.data.block_cache import BlockCache, cache_folder, gather
from tutelage.data.decode import fit
from tutelage.data.image_cache import decoded
from tutelage.data.sources import ImageRef, Rejected
from tutelage.features.view_batches import at_least
from tutelage.models.adapted_teacher import FeatureExtractor, half_precision
from tutelage.progress import Advance

PIECE_BITS = 11  # a piece ends after an image whose fingerprint ends in this many zero bits: 2,048 images on average
BATCH = 64  # images in one forward pass
# Of a block. position: in the piece. rejected: JSON, position and reason of each image that cannot be used.
COLUMNS = ("key", "position", "features", "thumbs", "layouts", "rejected")


@dataclass(frozen=True)
class Piece:
    """Consecutive images of a gallery that are embedded together. first: position of the first in the gallery."""

    refs: Sequence[ImageRef]
    first: int
    name: str


def pieces_of(refs: Sequence[ImageRef]) -> list[Piece]:
    """Cut a gallery into pieces; none crosses the end of a tar or Parquet file."""
    if not refs:
        return []
    mask = (1 << PIECE_BITS) - 1

    def shard(ref: ImageRef) -> tuple[str, str]:
        return ref.kind, ref.container if ref.kind != "file" else ""

    ends = [
        at
        for at, (ref, after) in enumerate(pairwise(refs), 1)
        if shard(ref) != shard(after) or not int.from_bytes(ref.fingerprint[-2:], "little") & mask
    ]
    return [
        Piece(part := refs[a:b], a, hashlib.sha256(b"".join(ref.fingerprint for ref in part)).hexdigest()[:24])
        for a, b in pairwise([0, *ends, len(refs)])
    ]


@dataclass(frozen=True)
class EmbeddingTable:
    """The usable images of a gallery, in the gallery's order.

    parts, layout_parts, thumb_parts: functions that map a piece's features (n, D) float16, layouts (n, 192) float16, thumbnails
    (n, 16, 16, 3) uint8. positions: (N,) int64 in the gallery. keys: (N, 32) uint8 content hashes. starts: (P + 1,) int64, rows
    where the pieces begin.
    """

    parts: tuple[Part, ...]
    positions: np.ndarray
    keys: np.ndarray
    starts: np.ndarray
    thumb_parts: tuple[Callable[[], np.ndarray], ...]
    layout_parts: tuple[Part, ...]
    rejected: list[Rejected]

    def __len__(self) -> int:
        return len(self.positions)

    def thumbs(self, rows: np.ndarray) -> np.ndarray:
        """Return the (m, 16, 16, 3) uint8 thumbnails of these rows."""
        out = np.empty((len(rows), THUMB, THUMB, 3), np.uint8)
        return gather(lambda piece: self.thumb_parts[piece](), self.starts, rows, out)


class EmbeddingSource(Protocol):
    """Source of embeddings. about: what they depend on, hashed into the cache's name. width: number of features."""

    about: dict[str, object]
    width: int

    def lacks(self, ref: ImageRef) -> str | None:
        """Return why an image cannot be embedded; None if it can."""

    def prepare(self, rgb: np.ndarray) -> np.ndarray:
        """Return what `features` needs of an image (H, W, 3) uint8."""
        ...

    def features(self, refs: Sequence[ImageRef], pixels: Sequence[np.ndarray]) -> np.ndarray:
        """Return the (B, D) float16 embeddings of prepared images."""
        ...


class ByNetwork:
    """Embeddings computed by a network. resize: how an image becomes a square."""

    def __init__(self, network: FeatureExtractor, resize: str):
        self.network, self.resize, self.width = network, resize, network.width
        self.about: dict[str, object] = {
            "encoder": network.name,
            "weights": network.hash,
            "width": network.width,
            "size": network.size,
            "mean": network.mean,
            "std": network.std,
            "resize": resize,
            "precision": network.precision,
        }

    def lacks(self, ref: ImageRef) -> str | None:
        """Return None: a network can embed every image."""
        return None

    def prepare(self, rgb: np.ndarray) -> np.ndarray:
        """Return (S, S, 3) uint8 pixels at the network's input size."""
        return fit(rgb, self.network.size, self.resize)

    def features(self, refs: Sequence[ImageRef], pixels: Sequence[np.ndarray]) -> np.ndarray:
        """Return the (B, D) float16 features of (S, S, 3) uint8 images."""
        import torch

        network = self.network
        batch = views.to_input(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), network.mean, network.std)
        with torch.inference_mode():
            features = at_least(network.forward, batch.to(network.device))
            return half_precision(features.float().cpu().numpy(), network.name)


class EmbeddingCache:
    """Embeddings from one source, on disk. side: short side in pixels of the decoded images."""

    def __init__(self, cache: str | Path, source: EmbeddingSource, side: int):
        about = {**source.about, "store_side": side}
        known = f"{about['encoder']} at {about['size']} px, embeddings of galleries" if "encoder" in about else ""
        what = known or "embeddings made elsewhere"
        self.folder = cache_folder(cache, "embeddings", what, about)
        self.source, self.side = source, side
        self._blocks = BlockCache(self.folder, COLUMNS)

    def has(self, piece: Piece) -> bool:
        """Return whether a piece is done."""
        return self._blocks.read(piece.name) is not None

    def embed(self, piece: Piece, advance: Advance = lambda n: None) -> None:
        """Embed one piece. advance: called with the number of images that were read.

        Raises:
            TutelageError: the encoder gives NaN, or values too large for float16.
        """
        features = [np.zeros((0, self.source.width), np.float16)]
        rows: list[tuple[int, bytes, np.ndarray]] = []  # position, key and thumbnail of each usable image
        rejected: list[tuple[int, str]] = []
        with ThreadPoolExecutor(os.cpu_count()) as pool, ThreadPoolExecutor(1) as reader:
            batches = self._batches(piece.refs, rejected, pool)
            coming = reader.submit(next, batches, None)
            while (batch := coming.result()) is not None:
                coming = reader.submit(next, batches, None)  # decode it while the encoder works
                usable, pixels, seen = batch
                if usable:
                    features.append(self.source.features([piece.refs[position] for position, *_ in usable], pixels))
                rows += usable
                advance(seen)
        positions = np.array([position for position, *_ in rows], np.int64)
        order = np.argsort(positions)
        keys = np.frombuffer(b"".join(key for _, key, _ in rows), np.uint8).reshape(-1, 32)
        thumbs = np.array([thumb for *_, thumb in rows], np.uint8).reshape(-1, THUMB, THUMB, 3)[order]
        columns = {
            "key": keys[order],
            "position": positions[order],
            "features": np.concatenate(features)[order],
            "thumbs": thumbs,
            "layouts": layout(thumbs).astype(np.float16),
            "rejected": np.frombuffer(json.dumps(sorted(rejected)).encode(), np.uint8),
        }
        self._blocks.write(columns, piece.name)

    def load(self, pieces: Sequence[Piece]) -> EmbeddingTable:
        """Open the embeddings of these pieces, all of which must be done."""
        positions, keys, starts, rejected = [np.zeros(0, np.int64)], [np.zeros((0, 32), np.uint8)], [0], []
        for piece in pieces:
            if (block := self._blocks.read(piece.name)) is None:
                raise self._blocks.lost()
            positions.append(block["position"] + piece.first)
            keys.append(block["key"].copy())  # or all blocks would stay mapped
            starts.append(starts[-1] + len(keys[-1]))
            rejected += [Rejected(piece.refs[at].id, why) for at, why in json.loads(bytes(block["rejected"]))]
        features, thumbs, layouts = (
            tuple(partial(self._blocks.column, piece.name, column) for piece in pieces)
            for column in ("features", "thumbs", "layouts")
        )
        return EmbeddingTable(
            features, np.concatenate(positions), np.concatenate(keys), np.array(starts), thumbs, layouts, rejected
        )

    def _batches(
        self, refs: Sequence[ImageRef], rejected: list[tuple[int, str]], pool: ThreadPoolExecutor
    ) -> Iterator[tuple[list[tuple[int, bytes, np.ndarray]], list[np.ndarray], int]]:
        """Yield position, key and thumbnail of up to BATCH usable images, their prepared pixels, and how many images were read."""
        usable, pixels, seen = [], [], 0
        for position, rgb, key in decoded(refs, self.side, pool):
            seen += 1
            why = self.source.lacks(refs[position])
            if isinstance(rgb, str) or why:
                rejected.append((position, rgb if isinstance(rgb, str) else str(why)))
                continue
            usable.append((position, key, thumbnail(rgb)))
            pixels.append(self.source.prepare(rgb))
            if len(usable) == BATCH:
                yield usable, pixels, seen
                usable, pixels, seen = [], [], 0
        if seen:
            yield usable, pixels, seen
