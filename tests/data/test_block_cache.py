"""What the cache of rows promises: blocks that are complete or absent, whoever writes them and whatever happens to them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import tutelage
from conftest import environment
from tutelage.data import block_cache
from tutelage.data.block_cache import BlockCache, cache_folder, gather
from tutelage.errors import TutelageError

COLUMNS = ("key", "value", "bytes")

# Writes blocks 0, 1, 2, ... of rows that follow from the block's number, over and over.
WRITER = f"""
import sys
from pathlib import Path
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]
from test_block_cache import COLUMNS, BlockCache, block
cache, number = BlockCache(Path(sys.argv[1]), COLUMNS), 0
while True:
    cache.write(block(number % 40, 20_000), str(number % 40))
    number += 1
"""


def block(number: int, rows: int = 50) -> dict[str, np.ndarray]:
    """Rows whose key and values are a function of the block's number."""
    random = np.random.default_rng(number)
    return {
        "key": random.integers(0, 256, (rows, 32), np.uint8),
        "value": random.normal(size=(rows, 3, 2)).astype(np.float16),
        "bytes": random.integers(0, 256, 7 * rows + number, np.uint8),
    }


def same(found: dict[str, np.ndarray] | None, number: int, rows: int = 50) -> bool:
    """Whether a block is there, to the last bit."""
    expected = block(number, rows)
    return found is not None and all(
        np.array_equal(found[name], expected[name]) and found[name].dtype == expected[name].dtype for name in COLUMNS
    )


@pytest.fixture
def cache(tmp_path: Path) -> BlockCache:
    """Three blocks."""
    cache = BlockCache(tmp_path / "rows", COLUMNS)
    for number in range(3):
        cache.write(block(number), str(number))
    return cache


def test_rows_come_back_by_key(cache: BlockCache):
    """Rows are found by key in all blocks, in any order and twice; a key without a row is missing, and told once."""
    keys = np.concatenate([block(number)["key"][[4, 40, 4]] for number in (2, 0, 9)])
    found = cache.find(keys)
    assert found.missing.tolist() == [6, 7]
    assert (found.places < 0).tolist() == [False] * 6 + [True] * 3
    expected = np.concatenate([block(number)["value"][[4, 40, 4]] for number in (2, 0)])
    values = found.take("value", np.empty((6, 3, 2), np.float32), np.arange(6))
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(
        found.take("value", np.empty((2, 3, 2), np.float16), np.array([5, 1])), values[[5, 1]]
    )
    with pytest.raises(AssertionError, match="written before"):
        found.take("value", np.empty((9, 3, 2), np.float32))
    read = cache.read("1")
    assert same(read, 1)
    assert not read["value"].flags.writeable


def test_a_cache_without_rows(tmp_path: Path):
    """Before anything is written all keys are missing; no keys find nothing; blocks may be empty."""
    cache = BlockCache(tmp_path / "none", COLUMNS)
    assert cache.read("0") is None
    assert cache.find(block(0)["key"]).missing.tolist() == list(range(50))
    assert cache.find(block(0, 0)["key"]).take("value", np.empty((0, 3, 2))).shape == (0, 3, 2)
    cache.write(block(0, 0), "empty")
    assert same(cache.read("empty"), 0, 0)
    assert len(cache.find(block(0)["key"]).missing) == 50


def test_a_block_cut_anywhere_is_absent(cache: BlockCache):
    """However short a file is cut, its rows are missing and the others there; written again, they are there."""
    path = cache.folder / "1.arrow"
    whole = path.read_bytes()
    keys = np.concatenate([block(number)["key"] for number in range(3)])
    for length in [*range(0, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert cache.read("1") is None, length
    assert cache.find(keys).missing.tolist() == list(range(50, 100))
    with pytest.raises(TutelageError, match=r"lost rows that it held a moment ago.*\nhint: run the same command again"):
        cache.column("1", "value")
    cache.write(block(1), "1")
    assert path.read_bytes() == whole
    assert not len(cache.find(keys).missing)


@pytest.mark.parametrize("content", [b"", b"half", b"PAR1" * 500, bytes(5000), b"\xff" * 5000])
def test_a_file_that_is_no_block_is_absent(cache: BlockCache, content: bytes):
    """Nothing, a word, another format, zeros, ones: no error and no row."""
    (cache.folder / "1.arrow").write_bytes(content)
    assert cache.read("1") is None
    assert len(cache.find(block(1)["key"]).missing) == 50
    assert not len(cache.find(block(2)["key"]).missing)


@pytest.mark.slow
def test_a_writer_that_is_killed_leaves_whole_blocks(tmp_path: Path):
    """SIGKILL at any time: every block is right or absent, also one that was being replaced, and the rest can be written."""
    folder = tmp_path / "rows"
    deadline, seen_partly = time.monotonic() + 120, 0
    for wanted in (5, 15, 25, *[40] * 20):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], env=environment())
        while len(list(folder.glob("*.arrow"))) < wanted or not list(folder.glob(".tutelage-partial-*")):
            assert process.poll() is None
            assert time.monotonic() < deadline
        process.send_signal(signal.SIGKILL)
        process.wait()
        cache = BlockCache(folder, COLUMNS)
        names = [path.stem for path in folder.glob("*.arrow")]
        assert names
        assert all(same(cache.read(name), int(name), 20_000) for name in names)
        seen_partly += bool(list(folder.glob(".tutelage-partial-*")))
        for path in folder.glob(".tutelage-partial-*"):
            path.unlink()
        if seen_partly >= 3:
            break
    assert seen_partly >= 3, "it was hardly ever killed while it wrote"
    for number in range(40):
        if cache.read(str(number)) is None:
            cache.write(block(number, 20_000), str(number))
    keys = np.concatenate([block(number, 20_000)["key"][:5] for number in range(40)])
    assert not len(cache.find(keys).missing)


@pytest.mark.parametrize("place", [0, 8, 100, 1500, -5, -1])
def test_a_flipped_byte_makes_a_block_absent(cache: BlockCache, place: int):
    """A block with one other byte, wherever it is, is absent, and its rows are written again."""
    path = cache.folder / "1.arrow"
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    assert cache.read("1") is None
    assert len(cache.find(block(1)["key"]).missing) == 50
    cache.write(block(1), "1")
    assert same(cache.read("1"), 1)


def test_an_error_on_the_way_leaves_nothing(cache: BlockCache):
    """A block whose columns do not all exist is not written, and the one of before stays."""
    with pytest.raises(KeyError):
        cache.write({"key": block(5)["key"]}, "2")
    assert same(cache.read("2"), 2)
    assert sorted(path.name for path in cache.folder.iterdir()) == ["0.arrow", "1.arrow", "2.arrow"]


@pytest.mark.slow
def test_many_writers_at_once(tmp_path: Path):
    """Two processes and eight threads write the same and other blocks while they are read: what is read is right."""
    folder = tmp_path / "rows"
    cache = BlockCache(folder, COLUMNS)
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], env=environment()) for _ in range(2)]
    try:
        deadline = time.monotonic() + 60
        while not (folder / "3.arrow").exists():
            assert time.monotonic() < deadline
        with ThreadPoolExecutor(8) as pool:
            numbers = [number % 12 for number in range(96)]
            list(pool.map(lambda number: cache.write(block(number, 20_000), str(number)), numbers))
            assert all(pool.map(lambda number: same(cache.read(str(number)), number, 20_000), numbers))
            found = cache.find(np.concatenate([block(number, 20_000)["key"][:3] for number in range(12)]))
        assert all(process.poll() is None for process in writers)
    finally:
        for process in writers:
            process.kill()
            process.wait()
    expected = np.concatenate([block(number, 20_000)["value"][:3] for number in range(12)])
    np.testing.assert_array_equal(found.take("value", np.empty((36, 3, 2), np.float16)), expected)


def test_many_blocks_take_no_file_handles(cache: BlockCache):
    """A mapped block holds no open file: there may be more blocks than files that a process may open."""
    before = len(os.listdir("/proc/self/fd"))
    held = [cache.read("0") for _ in range(100)]
    assert len(os.listdir("/proc/self/fd")) == before
    assert all(same(one, 0) for one in held)


def test_rows_of_parts():
    """Rows numbered through all parts come in the order asked for, from empty parts none, and each part is opened once."""
    parts, opened = [np.arange(3), np.arange(0), 10 + np.arange(4)], []

    def open_part(number: int) -> np.ndarray:
        opened.append(number)
        return parts[number]

    rows = np.array([6, 0, 3, 3, 2])
    assert gather(open_part, np.array([0, 3, 3, 7]), rows, np.empty(5, np.int64)).tolist() == [13, 0, 10, 10, 2]
    assert opened == [0, 2]


def test_the_folder_follows_from_what_rows_depend_on(tmp_path: Path, monkeypatch):
    """Other facts, kinds and formats have other folders, each with its facts; the same facts have the same one."""
    about = {"encoder": "tiny", "size": 32}
    folders = [cache_folder(tmp_path, "outputs", "tiny", about)]
    written = (folders[0] / "about.json").stat().st_mtime_ns
    assert cache_folder(tmp_path, "outputs", "tiny", dict(reversed(about.items()))) == folders[0]
    assert (folders[0] / "about.json").stat().st_mtime_ns == written
    folders.append(cache_folder(tmp_path, "outputs", "tiny", {**about, "size": 33}))
    folders.append(cache_folder(tmp_path, "images", "tiny", about))
    monkeypatch.setattr(block_cache, "FORMAT", block_cache.FORMAT + 1)
    folders.append(cache_folder(tmp_path, "outputs", "tiny", about))
    assert len(set(folders)) == 4


def test_only_what_a_cache_wrote_is_listed_and_removed(tmp_path: Path):
    """`tutelage cache` knows its folders by what they say of themselves: others of such names stay, and so do files put into its own."""
    folders = []
    for side in (258, 64):
        folders.append(cache_folder(tmp_path, "images", f"decoded images, short side {side}", {"store_side": side}))
        BlockCache(folders[-1], COLUMNS).write(block(0))
    users = [
        *(
            "images-258/a.pixels",
            "images-summer/1.jpg",
            "embeddings-dinov2/train.npy",
            "outputs-experiment/results.parquet",
        ),
        *(
            "images-json/about.json",
            f"{folders[0].name}-copy/about.json",
            f"{folders[1].name}/mine.arrow",
            "masks-2024/a/b.json",
        ),
    ]
    for name in users:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"what": "mine", "store_side": 258}')
    result = tutelage.cache(cache=str(tmp_path)).to_json()
    assert {entry["name"]: entry["what"] for entry in result["entries"]} == {
        folder.name: f"decoded images, short side {side}" for folder, side in zip(folders, (258, 64), strict=True)
    }
    for path in tmp_path.rglob("*"):
        os.utime(path, None if path.name == "about.json" else (0, 0))  # that one is read by the listing itself
    removed = tutelage.cache(cache=str(tmp_path), prune=30).to_json()["removed"]
    assert removed == sorted(folder.name for folder in folders)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {*users}
