"""Cache of decoded images, memory-mapped; each image is decoded once for all runs.

An image is found by its source's fingerprint (path, size, time, position), so a rerun on the same files decodes nothing,
and only new images are decoded later. Images that cannot be used are tried again by the next process, because
permissions, memory and the formats that Pillow reads may have changed.
"""

from __future__ import annotations

import io
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from tutelage.data.block_cache import BlockCache, cache_folder
from tutelage.data.decode import content_key, decode, size_of
from tutelage.data.sources import ImageRef, Rejected, read_bytes
from tutelage.errors import TutelageError, Unreadable
from tutelage.image_size import Size, sides
from tutelage.progress import Advance

BLOCK, BLOCK_BYTES = 4096, 2**25  # most images in a block, and bytes of pixels after which it ends
SHARE = 1.15  # short side of a stored image over the larger of the two networks' sizes
AHEAD, IN_FLIGHT = (
    256,
    2**30,
)  # most images, and bytes that decoding them takes, that are begun before the first is used
SAMPLE = 32  # images decoded to estimate the disk space of all


T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class ImageCodec:
    """What a store holds. name: of its folder. channels: bytes per pixel. decode: a function like `decode.decode`. takes: bytes of memory
    for a pixel while an image is decoded; Pillow needs four, twice where it converts them."""

    name: str
    channels: int
    decode: Callable[[bytes, int | None], tuple[np.ndarray, tuple[int, int]]]
    takes: int = 8


PICTURES = ImageCodec("images", 3, decode)


def short_side(teacher_size: Size, student_size: Size) -> int:
    """Return the short side in pixels of the stored images for a teacher and a student of these input sizes."""
    return round(SHARE * max(*sides(teacher_size), *sides(student_size)))


@dataclass(frozen=True)
class Images:
    """A selection of stored images; indexing gives pixels, `take` gives a smaller selection.

    keys: (n, 32) uint8, content hashes. sizes: (n, 2) int32, height and width. places: (n, 2) int64, block and offset.
    """

    keys: np.ndarray
    sizes: np.ndarray
    places: np.ndarray
    blocks: tuple[np.ndarray, ...]
    channels: int = 3

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, position: int) -> np.ndarray:
        """Return (H, W, 3) uint8, or (H, W) for one channel, read-only, straight from the file."""
        height, width = self.sizes[position]
        block, offset = self.places[position]
        shape = (height, width) if self.channels == 1 else (height, width, self.channels)
        return self.blocks[block][offset : offset + height * width * self.channels].reshape(shape)

    @property
    def seeds(self) -> np.ndarray:
        """(n,) uint64: the first 8 bytes of each content hash, on which the image's views depend."""
        return np.ascontiguousarray(self.keys[:, :8]).view("<u8")[:, 0]

    def take(self, positions: np.ndarray) -> Images:
        """Return the images at these positions, in this order."""
        places = self.places[positions]
        return Images(self.keys[positions], self.sizes[positions], places, self.blocks, self.channels)


class Store:
    """All decoded images of one short side and one codec (pictures or masks)."""

    def __init__(self, cache: str | Path, side: int, kind: ImageCodec = PICTURES):
        what = f"decoded images, short side {side}" if side else "decoded masks"
        self.folder = cache_folder(cache, kind.name, what, {"codec": kind.name, "store_side": side})
        self.side, self.kind = side, kind
        # place: (n, 3) int64, height, width, and where the image begins in the block's pixels.
        self._blocks = BlockCache(self.folder, ("fingerprint", "key", "place", "pixels"))
        self._reasons: dict[bytes, str] = {}  # fingerprint -> why this object could not decode the image

    def add(self, refs: Sequence[ImageRef], advance: Advance = lambda n: None) -> None:
        """Decode the images that the store does not hold yet; remember why others cannot be used.

        Args:
            refs: what to decode; the same image may be named twice.
            advance: called with the number of images just decoded.

        Raises:
            TutelageError: the disk has too little space for them.
        """
        missing = self.missing(refs)
        if missing:
            self._check_disk(missing)
        rows, pixels = [], io.BytesIO()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for position, rgb, key in decoded(missing, self.side, pool, self.kind):
                if isinstance(rgb, str):
                    self._reasons[missing[position].fingerprint] = rgb
                else:
                    rows.append((missing[position], key, (*rgb.shape[:2], pixels.tell())))
                    pixels.write(rgb.data)
                advance(1)
                if len(rows) == BLOCK or pixels.tell() >= BLOCK_BYTES:
                    self._write(rows, pixels)
                    rows = []
        if rows:
            self._write(rows, pixels)

    def missing(self, refs: Sequence[ImageRef]) -> list[ImageRef]:
        """Return those of `refs` that must be decoded, each once: not in the store, and not tried in vain by this object."""
        lost = [refs[i] for i in self._blocks.find(_fingerprints(refs)).missing.tolist()]
        return [ref for ref in lost if ref.fingerprint not in self._reasons]

    def find(self, refs: Sequence[ImageRef]) -> tuple[Images, np.ndarray, list[Rejected]]:
        """Look up images that were added before.

        Returns:
            the usable images, in the order of `refs`; (n,) int64, their positions in `refs`; and the others with the
            reason why they cannot be used.

        Raises:
            TutelageError: another process has removed images since they were added.
        """
        found = self._blocks.find(_fingerprints(refs))
        good, bad = np.flatnonzero(found.places >= 0), np.flatnonzero(found.places < 0).tolist()
        if any(refs[i].fingerprint not in self._reasons for i in bad):
            raise self._blocks.lost()
        rejected = [Rejected(refs[i].id, self._reasons[refs[i].fingerprint]) for i in bad]
        keys = found.take("key", np.empty((len(good), 32), np.uint8), good)
        places = found.take("place", np.empty((len(good), 3), np.int64), good)
        block = np.searchsorted(found.starts, found.places[good], side="right") - 1
        pixels = tuple(block["pixels"] for block in found.blocks)
        sizes, places = places[:, :2].astype(np.int32), np.stack([block, places[:, 2]], axis=1)
        return Images(keys, sizes, places, pixels, self.kind.channels), good, rejected

    def _write(self, rows: Sequence[tuple[ImageRef, bytes, tuple[int, ...]]], pixels: io.BytesIO) -> None:
        """Write a block, and rewind `pixels`. rows: source, content hash and place of each image."""
        columns = {
            "fingerprint": _fingerprints([ref for ref, _, _ in rows]),
            "key": np.frombuffer(b"".join(key for _, key, _ in rows), np.uint8).reshape(-1, 32),
            "place": np.array([place for _, _, place in rows], np.int64),
            "pixels": np.frombuffer(pixels.getbuffer(), np.uint8, pixels.tell()),
        }
        self._blocks.write(columns)
        # the memory is used again: with fresh pages, adding 1,000 photos took 1.46 s of CPU instead of 1.29
        pixels.seek(0)

    def _check_disk(self, refs: Sequence[ImageRef]) -> None:
        sample = refs[:: max(1, len(refs) // SAMPLE)][:SAMPLE]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = decoded(sample, self.side, pool, self.kind)
            sizes = [rgb.nbytes for _, rgb, _ in found if isinstance(rgb, np.ndarray)]
        needed = float(np.mean(sizes)) * len(refs) if sizes else 0.0
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if needed > 0.95 * free:
            raise TutelageError(
                f"{len(refs):,} decoded images take about {needed / 2**30:,.3g} GiB in {self.folder}, but only "
                f"{free / 2**30:,.3g} GiB are free there",
                "free some space, or use a --cache on another disk, a smaller gallery, or a smaller --teacher-size and "
                "--student-size",
            )


def _fingerprints(refs: Sequence[ImageRef]) -> np.ndarray:
    """Return (n, 16) uint8."""
    return np.frombuffer(b"".join(ref.fingerprint for ref in refs), np.uint8).reshape(-1, 16)


def decoded(
    refs: Sequence[ImageRef], side: int, pool: ThreadPoolExecutor, kind: ImageCodec = PICTURES
) -> Iterator[tuple[int, np.ndarray | str, bytes]]:
    """Decode images in the pool's threads, in the order in which their containers are read. What is being decoded takes at most IN_FLIGHT
    bytes, or is a single image.

    Args:
        side: short side in pixels, as `decode` takes it.

    Yields:
        position in `refs`; pixels (H, W, 3) uint8, or why there are none; content hash (32 bytes, or empty).
    """

    def one(item: tuple[int, bytes | Unreadable]) -> tuple[int, np.ndarray | str, bytes]:
        position, data = item
        try:
            if isinstance(data, Unreadable):
                raise data
            rgb, original = kind.decode(data, side)
        except Unreadable as reason:
            return position, str(reason), b""
        return position, rgb, content_key(rgb, original)

    yield from in_turn(pool, one, ((item, memory_for(item[1], side, kind.takes)) for item in read_bytes(refs)))


def in_turn(pool: ThreadPoolExecutor, work: Callable[[T], R], items: Iterable[tuple[T, int]]) -> Iterator[R]:
    """Yield what `work` returns for each item, in their order, computed in the pool's threads. items: each with the bytes that work on it
    takes; those under way take at most IN_FLIGHT together, or are a single item."""
    waiting: deque[tuple[Future[R], int]] = deque()
    flight = 0
    for item, needed in items:
        while waiting and (len(waiting) == AHEAD or flight + needed > IN_FLIGHT):
            future, taken = waiting.popleft()
            flight -= taken
            yield future.result()
        waiting.append((pool.submit(work, item), needed))
        flight += needed
    for future, _ in waiting:
        yield future.result()


def memory_for(data: bytes | Unreadable, side: int, takes: int) -> int:
    """Return about how many bytes it takes to decode one image. side: short side of the result in pixels, 0 for the whole image. takes: of
    the codec."""
    if isinstance(data, Unreadable):
        return 0
    try:
        height, width = size_of(data)
    except Exception:  # Pillow's readers raise almost anything on broken data; decoding it gives the reason
        return len(data)
    scale = 1
    while data.startswith(b"\xff\xd8") and side and scale < 8 and min(height, width) >= 2 * scale * side:
        scale *= 2  # a JPEG is decoded at a fraction of its size
    return len(data) + takes * (height // scale) * (width // scale)
