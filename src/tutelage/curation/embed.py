"""Embeddings of a gallery: the encoder sees each image once, and its pixels are not kept.

`cache/embeddings-<hash>/` belongs to one encoder (weights, size, preprocessing). A piece, 2,048 images on average, is
`<name>.npy` (float16 features), `<name>.thumbs.npy` and `<name>.layouts.npy` (small pixels for finding copies) and
`<name>.parquet` (content hash of each image, or why it cannot be used), which is renamed into place last: a piece is
complete or absent. Where pieces end depends only on the images, so that every machine, restart and share computes the
same batches and gets the same bits; adding an image to a folder changes one piece.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tutelage.curation.image_match import THUMB, layout, thumbnail
from tutelage.data import views
from tutelage.data.decode import fit
from tutelage.data.image_cache import decoded
from tutelage.data.sources import ImageRef, Rejected
from tutelage.models.adapted_teacher import FeatureExtractor, half_precision
from tutelage.run_folder import atomic_write, hash_of, write_json

PIECE_BITS = 11  # a piece ends after an image whose fingerprint ends in this many zero bits: 2,048 images on average
BATCH = 64  # images in one forward pass


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
    ends = []
    mask = (1 << PIECE_BITS) - 1
    for at, ref in enumerate(refs):
        last = at + 1 == len(refs)
        other = not last and (refs[at + 1].kind, refs[at + 1].kind != "file" and refs[at + 1].container) != (
            ref.kind, ref.kind != "file" and ref.container,
        )  # fmt: skip
        if last or other or not int.from_bytes(ref.fingerprint[-2:], "little") & mask:
            ends.append(at + 1)
    starts = [0, *ends[:-1]]
    return [
        Piece(part := refs[a:b], a, hashlib.sha256(b"".join(ref.fingerprint for ref in part)).hexdigest()[:24])
        for a, b in zip(starts, ends, strict=True)
    ]


@dataclass(frozen=True)
class EmbeddingTable:
    """The usable images of a gallery, in the gallery's order.

    parts: files of float16 features, one for each piece. positions: (N,) int64 in the gallery. keys: (N, 32) uint8 content hashes.
    starts: (P + 1,) int64, rows where the pieces begin. thumb_parts: memory-mapped (n, 16, 16, 3) uint8, one for each piece.
    layout_parts: files of (n, 192) float16 layouts.
    """

    parts: tuple[Path, ...]
    positions: np.ndarray
    keys: np.ndarray
    starts: np.ndarray
    thumb_parts: tuple[np.ndarray, ...]
    layout_parts: tuple[Path, ...]
    rejected: list[Rejected]

    def __len__(self) -> int:
        return len(self.positions)

    def thumbs(self, rows: np.ndarray) -> np.ndarray:
        """Return the (m, 16, 16, 3) uint8 thumbnails of these rows."""
        out = np.empty((len(rows), THUMB, THUMB, 3), np.uint8)
        piece = np.searchsorted(self.starts, rows, side="right") - 1
        for number in np.unique(piece):
            here = piece == number
            out[here] = self.thumb_parts[number][rows[here] - self.starts[number]]
        return out


class EmbeddingSource(Protocol):
    """Source of embeddings. about: what they depend on, hashed into the cache's name. width: number of features."""

    about: dict[str, Any]
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
        self.about: dict[str, Any] = {
            "encoder": network.name, "weights": network.hash, "width": network.width, "size": network.size,
            "mean": network.mean, "std": network.std, "resize": resize, "precision": network.precision,
        }  # fmt: skip

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
            return half_precision(network.forward(batch.to(network.device)).float().cpu().numpy(), network.name)


class EmbeddingCache:
    """Embeddings from one source, on disk. side: short side in pixels of the decoded images."""

    def __init__(self, cache: str | Path, source: EmbeddingSource, side: int):
        about = {**source.about, "store_side": side, "copies": "layouts"}
        self.folder = Path(cache) / f"embeddings-{hash_of(about)[:24]}"
        self.source, self.side = source, side
        if not (self.folder / "about.json").exists():
            write_json(self.folder / "about.json", about)

    def has(self, piece: Piece) -> bool:
        """Return whether a piece is done."""
        return (self.folder / f"{piece.name}.parquet").exists()

    def embed(self, piece: Piece, advance: Callable[[int], None] = lambda n: None) -> None:
        """Embed one piece. advance: called with the number of images that were read.

        Raises:
            TutelageError: the encoder gives NaN, or values too large for float16.
        """
        keys: list[bytes | None] = [None] * len(piece.refs)
        reasons: list[str | None] = [None] * len(piece.refs)
        rows, features, thumbs = [], [], []
        with ThreadPoolExecutor(os.cpu_count()) as pool, ThreadPoolExecutor(1) as reader:
            batches = self._batches(piece.refs, keys, reasons, pool)
            coming = reader.submit(next, batches, None)
            while (batch := coming.result()) is not None:
                coming = reader.submit(next, batches, None)  # decode it while the encoder works
                positions, pixels, small, seen = batch
                if positions:
                    features.append(self.source.features([piece.refs[i] for i in positions], pixels))
                    rows += positions
                    thumbs += small
                advance(seen)
        order = np.argsort(np.array(rows, np.int64))
        table = np.concatenate([np.zeros((0, self.source.width), np.float16), *features])[order]
        small = np.array(thumbs, np.uint8).reshape(-1, THUMB, THUMB, 3)[order]
        arrays = {".npy": table, ".thumbs.npy": small, ".layouts.npy": layout(small).astype(np.float16)}
        for suffix, array in arrays.items():
            with atomic_write(self.folder / f"{piece.name}{suffix}") as path, path.open("wb") as file:
                np.save(file, array)
        with atomic_write(self.folder / f"{piece.name}.parquet") as path:
            pq.write_table(
                pa.table({"key": pa.array(keys, pa.binary(32)), "reason": pa.array(reasons, pa.string())}), path
            )

    def load(self, pieces: Sequence[Piece]) -> EmbeddingTable:
        """Open the embeddings of these pieces, all of which must be done."""
        positions, keys, starts, rejected = [], [], [0], []
        for piece in pieces:
            table = pq.read_table(self.folder / f"{piece.name}.parquet")
            known = table.column("key").combine_chunks()
            good = np.flatnonzero(np.asarray(known.is_valid()))
            positions.append(good + piece.first)
            keys += known.drop_null().to_pylist()
            starts.append(starts[-1] + len(good))
            reasons = table.column("reason").to_pylist()
            rejected += [Rejected(ref.id, why) for ref, why in zip(piece.refs, reasons, strict=True) if why is not None]
        return EmbeddingTable(
            tuple(self.folder / f"{piece.name}.npy" for piece in pieces),
            np.concatenate([np.zeros(0, np.int64), *positions]),
            np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32), np.array(starts),
            tuple(np.load(self.folder / f"{piece.name}.thumbs.npy", mmap_mode="r") for piece in pieces),
            tuple(self.folder / f"{piece.name}.layouts.npy" for piece in pieces), rejected,
        )  # fmt: skip

    def _batches(
        self, refs, keys, reasons, pool
    ) -> Iterator[tuple[list[int], list[np.ndarray], list[np.ndarray], int]]:
        """Yield positions, prepared pixels and thumbnails of up to BATCH usable images, and how many images were read for them."""
        positions: list[int] = []
        pixels: list[np.ndarray] = []
        thumbs: list[np.ndarray] = []
        seen = 0
        for position, rgb, key in decoded(refs, self.side, pool):
            seen += 1
            why = self.source.lacks(refs[position])
            if isinstance(rgb, str) or why:
                reasons[position] = rgb if isinstance(rgb, str) else why
                continue
            keys[position] = key
            positions.append(position)
            pixels.append(self.source.prepare(rgb))
            thumbs.append(thumbnail(rgb))
            if len(positions) == BATCH:
                yield positions, pixels, thumbs, seen
                positions, pixels, thumbs, seen = [], [], [], 0
        if seen:
            yield positions, pixels, thumbs, seen
