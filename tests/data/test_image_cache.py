"""What the store of decoded images promises."""

from __future__ import annotations

import io
import os
import shutil
import threading
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tutelage.data import image_cache as store_module
from tutelage.data.decode import content_key, decode
from tutelage.data.image_cache import Store, short_side
from tutelage.data.manifest import read_manifest, write_manifest
from tutelage.data.sources import ImageRef, list_images
from tutelage.errors import TutelageError


def write_image(path: Path, seed: int, size: tuple[int, int] = (40, 60)) -> None:
    """A PNG of noise, height x width."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten images of different sizes."""
    for i in range(10):
        write_image(tmp_path / "images" / f"{i}.png", i, (30 + 4 * i, 50))
    return tmp_path / "images"


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """Grows by one with each image that is decoded."""
    calls: list[int] = []

    def counting(data: bytes, side: int):
        calls.append(side)
        return decode(data, side)

    monkeypatch.setattr(store_module, "decode", counting)
    return calls


def refs_of(folder: Path) -> list[ImageRef]:
    refs, rejected = list_images(folder)
    assert not rejected
    return refs


def files(store: Store) -> dict[str, tuple[int, int]]:
    """Name -> (inode, time) of each file."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in sorted(store.folder.iterdir())}


def test_pixels_are_those_of_decode(folder: Path, tmp_path: Path):
    """A stored image, its size and its key are what decode gives, in the order of the references."""
    refs = refs_of(folder)[::-1]
    store = Store(tmp_path / "cache", 32)
    store.add(refs)
    images, good, bad = store.find(refs)
    assert good.tolist() == list(range(10))
    assert bad == []
    for i, ref in enumerate(refs):
        rgb, original = decode(Path(ref.container).read_bytes(), 32)
        np.testing.assert_array_equal(images[i], rgb)
        assert images.sizes[i].tolist() == list(rgb.shape[:2])
        assert images.keys[i].tobytes() == content_key(rgb, original)
    assert not images[0].flags.writeable


def test_images_are_shrunk_and_never_enlarged(folder: Path, tmp_path: Path):
    """The short side becomes that of the store; what is smaller already keeps its size."""
    store = Store(tmp_path / "cache", 48)
    refs = refs_of(folder)
    store.add(refs)
    sizes = store.find(refs)[0].sizes
    for i, (height, width) in enumerate(sizes.tolist()):
        original = (30 + 4 * i, 50)
        assert (height, width) == original if min(original) <= 48 else min(height, width) == 48
    assert (sizes.min(axis=1) == 48).any()
    assert (sizes.min(axis=1) < 48).any()


def test_short_side_rule():
    """The short side is 1.15 times the larger of the two networks' sizes."""
    assert short_side(224, 160) == 258
    assert short_side(64, 128) == 147
    assert short_side(100, 100) == 115


def test_nothing_is_decoded_twice(folder: Path, tmp_path: Path, decoded: list[int]):
    """Adding the same images again decodes nothing and touches no file, also from another process's point of view."""
    refs = refs_of(folder)
    told: list[int] = []
    store = Store(tmp_path / "cache", 32)
    store.add(refs, told.append)
    assert sum(told) == 10
    before, calls = files(store), len(decoded)
    told.clear()
    Store(tmp_path / "cache", 32).add(refs_of(folder), told.append)
    assert len(decoded) == calls
    assert told == []
    assert files(store) == before


def test_more_images_tomorrow_cost_only_themselves(folder: Path, tmp_path: Path, decoded: list[int]):
    """New images go to a block of their own; the old blocks stay as they are; all are found together."""
    store = Store(tmp_path / "cache", 32)
    store.add(refs_of(folder))
    before = files(store)
    for i in range(3):
        write_image(folder / f"new-{i}.png", 100 + i)
    refs, told = refs_of(folder), []
    assert len(store.missing(refs)) == 3
    store.add(refs, told.append)
    assert sum(told) == 3
    assert before.items() <= files(store).items()
    images, good, _ = store.find(refs)
    assert len(good) == 13
    for i, ref in enumerate(refs):
        np.testing.assert_array_equal(images[i], decode(Path(ref.container).read_bytes(), 32)[0])


def test_another_file_under_the_same_name_is_decoded_anew(folder: Path, tmp_path: Path):
    """A file that was replaced, of the same length too, is another image."""
    store = Store(tmp_path / "cache", 32)
    store.add(refs_of(folder))
    write_image(folder / "0.png", 77, (30, 50))
    os.utime(folder / "0.png", (1e9, 1e9))
    refs = refs_of(folder)
    assert [ref.id for ref in store.missing(refs)] == ["0.png"]
    store.add(refs)
    images, _, _ = store.find(refs)
    np.testing.assert_array_equal(images[0], decode((folder / "0.png").read_bytes(), 32)[0])


def test_sizes_do_not_share(folder: Path, tmp_path: Path):
    """Stores of two short sides in one cache hold their own pixels."""
    refs = refs_of(folder)
    small, large = Store(tmp_path / "cache", 16), Store(tmp_path / "cache", 32)
    small.add(refs)
    assert len(large.missing(refs)) == 10
    large.add(refs)
    assert small.find(refs)[0].sizes[5].min() == 16
    assert large.find(refs)[0].sizes[5].min() == 32


def test_many_blocks(folder: Path, tmp_path: Path, monkeypatch):
    """Images are found across blocks, in any order and selection."""
    monkeypatch.setattr(store_module, "BLOCK", 3)
    refs = refs_of(folder)
    store = Store(tmp_path / "cache", 32)
    store.add(refs)
    assert len(list(store.folder.glob("*.arrow"))) == 4
    order = np.random.default_rng(0).permutation(10)
    images, _, _ = store.find([refs[i] for i in order])
    chosen = images.take(np.array([7, 0, 7]))
    for image, i in zip((images[4], chosen[0], chosen[1], chosen[2]), order[[4, 7, 0, 7]], strict=True):
        np.testing.assert_array_equal(image, decode((folder / f"{i}.png").read_bytes(), 32)[0])
    assert chosen.seeds.tolist() == images.seeds[[7, 0, 7]].tolist()


def test_killed_in_mid_block(folder: Path, tmp_path: Path, monkeypatch):
    """A process that dies while a block is written leaves nothing that is taken for a block; a rerun makes it whole."""
    monkeypatch.setattr(store_module, "BLOCK", 5)
    refs, store, seen = refs_of(folder), Store(tmp_path / "cache", 32), []

    def dies(n: int) -> None:
        seen.append(n)
        if len(seen) == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.add(refs, dies)
    assert len(store.missing(refs)) == 5
    assert sorted(p.suffix for p in store.folder.iterdir()) == [".arrow", ".json"]  # the first block, nothing half
    first = next(store.folder.glob("*.arrow"))
    first.write_bytes(b"half")
    assert len(store.missing(refs)) == 10
    store.add(refs)
    images, good, _ = store.find(refs)
    assert len(good) == 10
    for i, ref in enumerate(refs):
        np.testing.assert_array_equal(images[i], decode(Path(ref.container).read_bytes(), 32)[0])
    assert len(list(store.folder.iterdir())) == 3


def test_the_same_image_named_twice(folder: Path, tmp_path: Path):
    """An image that is named twice is decoded once and found at both places; a copy has the same key."""
    shutil.copy(folder / "3.png", folder / "copy.png")
    refs, told = refs_of(folder), []
    store = Store(tmp_path / "cache", 32)
    store.add([*refs, *refs], told.append)
    assert sum(told) == 11
    images, good, _ = store.find([*refs, *refs])
    assert len(good) == len(images) == 22
    np.testing.assert_array_equal(images[4], images[15])
    ids = [ref.id for ref in refs]
    np.testing.assert_array_equal(images.keys[ids.index("3.png")], images.keys[ids.index("copy.png")])
    assert len({key.tobytes() for key in images.keys}) == 10


def test_reasons_are_kept(folder: Path, tmp_path: Path, decoded: list[int]):
    """An image that cannot be used is told with its reason, each time, and one store tries it once."""
    (folder / "bad.png").write_bytes(b"no image")
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:200])
    (folder / "gone.png").write_bytes(b"x")
    refs = refs_of(folder)
    (folder / "gone.png").unlink()
    store = Store(tmp_path / "cache", 32)
    store.add(refs)
    calls = len(decoded)
    for _ in range(2):
        store.add(refs)
        images, good, bad = store.find(refs)
        assert len(images) == 10
        assert [refs[i].id for i in good] == [f"{i}.png" for i in range(10)]
        assert [b.id for b in bad] == ["bad.png", "cut.png", "gone.png"]
        assert "not an image" in bad[0].reason
        assert "No such file" in bad[2].reason
        assert all(b.reason for b in bad)
    assert len(decoded) == calls


def test_failures_are_tried_again_by_the_next_process(folder: Path, tmp_path: Path):
    """What could not be used yesterday is tried anew and, once it can be, is never decoded again."""
    refs, away = refs_of(folder), folder.rename(tmp_path / "away")
    folder.mkdir()
    shutil.copy2(away / "0.png", folder)
    Store(tmp_path / "cache", 32).add(refs)
    for _ in range(2):
        store = Store(tmp_path / "cache", 32)
        assert len(store.missing(refs)) == 9
        store.add(refs)
        assert len(store.find(refs)[2]) == 9
    folder.rename(tmp_path / "empty")
    away.rename(folder)
    store = Store(tmp_path / "cache", 32)
    store.add(refs)
    for one in (store, Store(tmp_path / "cache", 32)):
        assert one.missing(refs) == []
        images, good, bad = one.find(refs)
        assert (len(good), bad) == (10, [])
        for i, ref in enumerate(refs):
            np.testing.assert_array_equal(images[i], decode(Path(ref.container).read_bytes(), 32)[0])


def test_nothing_usable_and_nothing_asked(tmp_path: Path):
    """A store of unusable images only, and an empty selection, give empty results."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "bad.png").write_bytes(b"no image")
    refs, store = refs_of(tmp_path / "images"), Store(tmp_path / "cache", 32)
    store.add(refs)
    images, good, bad = store.find(refs)
    assert (len(images), len(good), len(bad)) == (0, 0, 1)
    store.add([])
    images, good, bad = store.find([])
    assert (len(images), len(good), len(bad)) == (0, 0, 0)
    assert images.seeds.shape == (0,)


def test_images_of_a_parquet_file(tmp_path: Path):
    """Rows of a Parquet file are stored like files."""
    data = []
    for i in range(6):
        buffer = io.BytesIO()
        Image.fromarray(np.full((20, 20, 3), 40 * i, np.uint8)).save(buffer, "PNG")
        data.append({"bytes": buffer.getvalue(), "path": None})
    pq.write_table(pa.table({"image": data}), tmp_path / "rows.parquet")
    refs, store = refs_of(tmp_path / "rows.parquet"), Store(tmp_path / "cache", 32)
    store.add(refs)
    images, _, _ = store.find(refs)
    assert [int(images[i].mean()) for i in range(6)] == [0, 40, 80, 120, 160, 200]


def test_a_full_disk_is_told_first(folder: Path, tmp_path: Path, monkeypatch):
    """Where the images would not fit, nothing is written, and the message says what they take and what is free."""
    usage = namedtuple("usage", "total used free")
    refs, store = refs_of(folder), Store(tmp_path / "cache", 32)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 0, 2**14))
    with pytest.raises(TutelageError, match="are free there") as error:
        store.add(refs)
    assert str(store.folder) in error.value.message
    assert "10 decoded images" in error.value.message
    assert "--cache" in error.value.hint
    assert [path.name for path in store.folder.iterdir()] == ["about.json"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 0, 2**17))
    store.add(refs)
    assert not store.missing(refs)


def test_the_seed_of_an_image_is_its_content(folder: Path, tmp_path: Path):
    """What a view depends on is the content alone: renaming and moving a file changes nothing."""
    store = Store(tmp_path / "cache", 32)
    store.add(refs_of(folder))
    before = store.find(refs_of(folder))[0].seeds
    shutil.copytree(folder, tmp_path / "moved")
    refs = refs_of(tmp_path / "moved")
    store.add(refs)
    np.testing.assert_array_equal(store.find(refs)[0].seeds, before)
    assert len(set(before.tolist())) == 10


def test_manifests_come_back(folder: Path, tmp_path: Path):
    """A manifest gives back the references it was written from, in order, and its other columns."""
    refs = refs_of(folder)
    write_manifest(tmp_path / "run" / "manifest.parquet", refs, {"label": list(range(10))})
    again, table = read_manifest(tmp_path / "run" / "manifest.parquet")
    assert again == refs
    assert table.column("label").to_pylist() == list(range(10))
    assert os.listdir(tmp_path / "run") == ["manifest.parquet"]


@pytest.mark.parametrize(("limit", "most"), [(2**30, 4), (30_000_000, 1), (50_000_000, 2)])
def test_memory_of_images_being_decoded(tmp_path: Path, monkeypatch, limit: int, most: int):
    """Large images are decoded beside each other only as far as the memory that they take stays within the limit; all are decoded."""
    monkeypatch.setattr(store_module, "IN_FLIGHT", limit)
    for number in range(6):  # 18 MB while they are decoded
        pixels = np.full((1500, 1500, 3), 40 * number, np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    lock, now, seen, reached = threading.Lock(), [0], [0], threading.Event()

    def counted(data: bytes, side: int | None) -> tuple[np.ndarray, tuple[int, int]]:
        with lock:
            now[0] += 1
            seen[0] = max(seen[0], now[0])
            if seen[0] == most:
                reached.set()
        reached.wait(10)  # on a busy machine the others take their time
        time.sleep(0.1)
        try:
            return decode(data, side)
        finally:
            with lock:
                now[0] -= 1

    refs, _ = list_images(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        found = list(store_module.decoded(refs, 32, pool, store_module.ImageCodec("images", 3, counted)))
    assert [int(rgb[0, 0, 0]) for _, rgb, _ in found] == [0, 40, 80, 120, 160, 200]
    assert seen[0] == most
