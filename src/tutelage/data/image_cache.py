"""Cache of decoded images, memory-mapped; each image is decoded once for all runs.

`cache/images-<short side>/` holds blocks of up to 4,096 images: `<name>.pixels`, the raw RGB bytes one after another,
and `<name>.parquet`, the index. The index is renamed into place last, so a block is complete or absent. An image is
found by its source's fingerprint (path, size, time, position), so a rerun on the same files decodes nothing, and only
new images are decoded later. Images that cannot be used are in the index with the reason; the next process tries them
again, because permissions, memory and the formats that Pillow reads may have changed.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tutelage.data.decode import content_key, decode
from tutelage.data.sources import ImageRef, Rejected, read_bytes
from tutelage.errors import TutelageError, Unreadable
from tutelage.image_size import Size, sides
from tutelage.run_folder import atomic_write

BLOCK = 4096  # images in a block
SHARE = 1.15  # short side of a stored image over the larger of the two networks' sizes
SAMPLE = 32  # images decoded to estimate the disk space of all

_INDEX = pa.schema(
    [
        ("fingerprint", pa.binary(16)), ("key", pa.binary(32)), ("height", pa.int32()), ("width", pa.int32()),
        ("offset", pa.int64()), ("reason", pa.string()),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class ImageCodec:
    """What a store holds. name: of its folder. channels: bytes per pixel. decode: a function like `decode.decode`."""

    name: str
    channels: int
    decode: Callable[[bytes, int | None], tuple[np.ndarray, tuple[int, int]]]


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
        self.folder = Path(cache) / f"{kind.name}-{side}"
        self.side, self.kind = side, kind
        self._tried: set[bytes] = set()  # fingerprints that this object has tried to decode

    def add(self, refs: Sequence[ImageRef], advance: Callable[[int], None] = lambda n: None) -> None:
        """Decode the images that the store does not hold yet; unusable images are recorded with the reason.

        Args:
            refs: what to decode; the same image may be named twice.
            advance: called with the number of images just decoded.

        Raises:
            TutelageError: the disk has too little space for them.
        """
        missing = self.missing(refs)
        if missing:
            self._check_disk(missing)
        self._tried.update(ref.fingerprint for ref in missing)
        for start in range(0, len(missing), BLOCK):
            self._add_block(missing[start : start + BLOCK], advance)

    def missing(self, refs: Sequence[ImageRef]) -> list[ImageRef]:
        """Return those of `refs` that must be decoded, each once: never tried, or failed in another store object."""
        index = self._index()
        rows = self._lookup(refs, index)
        failed = np.asarray(index.column("reason").is_valid())
        unique = {
            ref.fingerprint: ref
            for ref, row in zip(refs, rows, strict=True)
            if row < 0 or (failed[row] and ref.fingerprint not in self._tried)
        }
        return list(unique.values())

    def find(self, refs: Sequence[ImageRef]) -> tuple[Images, np.ndarray, list[Rejected]]:
        """Look up images that were added before.

        Returns:
            the usable images, in the order of `refs`; (n,) int64, their positions in `refs`; and the others with the
            reason why they cannot be used.
        """
        index = self._index()
        rows = self._lookup(refs, index)
        assert (rows >= 0).all(), "add() comes before find()"
        taken = index.take(pa.array(rows))
        reasons = taken.column("reason")
        bad = [Rejected(refs[i].id, reasons[i].as_py()) for i in np.flatnonzero(reasons.is_valid()).tolist()]
        good = np.flatnonzero(reasons.is_null())
        taken = taken.take(pa.array(good))
        keys = np.frombuffer(b"".join(taken.column("key").to_pylist()), dtype=np.uint8).reshape(-1, 32)
        sizes = np.stack([taken.column("height").to_numpy(), taken.column("width").to_numpy()], axis=1)
        names, numbers = np.unique(taken.column("block").to_numpy(), return_inverse=True)
        places = np.stack([numbers, taken.column("offset").to_numpy()], axis=1)
        blocks = tuple(np.memmap(self.folder / f"{name}.pixels", dtype=np.uint8, mode="r") for name in names)
        return Images(keys, sizes, places, blocks, self.kind.channels), good, bad

    def _index(self) -> pa.Table:
        """Return all rows, ordered so that an image's first row, which `_lookup` takes, is a success, else the newest failure."""
        tables = []
        for path in sorted(self.folder.glob("*.parquet"), key=lambda path: path.stat().st_mtime_ns, reverse=True):
            table = pq.read_table(path)
            tables.append(table.append_column("block", pa.array([path.stem] * len(table), pa.string())))
        empty = _INDEX.append(pa.field("block", pa.string())).empty_table()
        index = pa.concat_tables([empty, *tables])
        return index.take(pa.array(np.argsort(index.column("reason").is_valid(), kind="stable"))).combine_chunks()

    @staticmethod
    def _lookup(refs: Sequence[ImageRef], index: pa.Table) -> np.ndarray:
        """Return (n,) int64 rows of the index, -1 where there is none."""
        asked = pa.array([ref.fingerprint for ref in refs], pa.binary(16))
        known = index.column("fingerprint").combine_chunks()
        rows = pc.index_in(asked, value_set=known)  # pyright: ignore[reportAttributeAccessIssue]
        return rows.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)

    def _add_block(self, refs: Sequence[ImageRef], advance: Callable[[int], None]) -> None:
        name = hashlib.sha256(b"".join(ref.fingerprint for ref in refs)).hexdigest()[:24]
        rows: list[dict[str, object]] = []
        offset = 0
        with (
            atomic_write(self.folder / f"{name}.pixels") as path,
            ThreadPoolExecutor(os.cpu_count()) as pool,
            path.open("wb") as file,
        ):
            for position, rgb, key in decoded(refs, self.side, pool, self.kind):
                row = {"fingerprint": refs[position].fingerprint, "height": 0, "width": 0, "offset": offset}
                if isinstance(rgb, str):
                    rows.append({**row, "reason": rgb})
                else:
                    rows.append({**row, "key": key, "height": rgb.shape[0], "width": rgb.shape[1]})
                    file.write(rgb.data)
                    offset += rgb.nbytes
                advance(1)
            if not offset:
                file.write(b"\0")  # an empty file cannot be mapped
        with atomic_write(self.folder / f"{name}.parquet") as path:
            pq.write_table(pa.Table.from_pylist(rows, _INDEX), path)

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


def decoded(
    refs: Sequence[ImageRef], side: int, pool: ThreadPoolExecutor, kind: ImageCodec = PICTURES
) -> Iterator[tuple[int, np.ndarray | str, bytes]]:
    """Decode images in the pool's threads, in the order in which their containers are read.

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

    read = read_bytes(refs)
    while some := list(itertools.islice(read, 256)):
        yield from pool.map(one, some)
