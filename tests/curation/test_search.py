"""What nearest-neighbour search promises: exact, with ties settled, and the same however the rows are cut and read."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tutelage.curation.ivf import search_ivf
from tutelage.curation.search import best_query, search
from tutelage.curation.vectors import BLOCK, Part, Vectors, mean_of
from tutelage.data.block_cache import BlockCache
from tutelage.errors import TutelageError

CLOSE = 2e-6  # float32 products of unit vectors against float64


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows at unit length."""
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def gallery(count: int, width: int = 24, seed: int = 0, dtype=np.float16) -> np.ndarray:
    """Rows that are far from centred."""
    return (np.random.default_rng(seed).standard_normal((count, width)) + 1).astype(dtype)


def asked(count: int, width: int = 24, seed: int = 1) -> np.ndarray:
    """Queries (count, width) at unit length."""
    return unit(np.random.default_rng(seed).standard_normal((count, width)))


def cut(rows: np.ndarray, folder: Path | None, *cuts: int) -> tuple[Part, ...]:
    """The rows in parts that end at `cuts`, as blocks of a cache in a folder or in memory."""
    parts = np.split(rows, cuts)
    if folder is None:
        return tuple(parts)
    cache = BlockCache(folder, ("rows",))
    for index, part in enumerate(parts):
        cache.write({"rows": part}, str(index))
    return tuple(partial(cache.column, str(index), "rows") for index in range(len(parts)))


def prepared(rows: np.ndarray, mean: np.ndarray | None) -> np.ndarray:
    """Naive centring and unit length, float64."""
    rows = rows.astype(np.float64)
    if mean is None:
        return rows
    rows = rows - mean
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, length, out=np.zeros_like(rows), where=length > 0)


def naive(similarities: np.ndarray, k: int, usable: np.ndarray | None = None):
    """Similarities (Q, N) sorted by (-similarity, row), the first k, filled up with -inf and -1."""
    values = similarities if usable is None else np.where(usable, similarities, -np.inf)
    padded = np.pad(values, ((0, 0), (0, max(0, k - values.shape[1]))), constant_values=-np.inf)
    order = np.argsort(-padded, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(padded, order, axis=1)
    return best, np.where(np.isfinite(best), order, -1)


def whole(count: int, width: int, seed: int) -> np.ndarray:
    """Rows of small whole numbers: their products are exact in float32, and many are equal."""
    return np.random.default_rng(seed).integers(-2, 3, (count, width)).astype(np.float32)


def same(first, second) -> bool:
    """Whether two results agree to the last bit."""
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("count", [1, 20, 5000, 3 * BLOCK])
@pytest.mark.parametrize("centred", [True, False])
def test_the_best_rows_are_those_of_a_naive_search(count, centred):
    """Similarities and rows are those of float64 products of centred rows at unit length, best first."""
    rows, queries = gallery(count, dtype=np.float16 if centred else np.float32), asked(300)
    rows = rows if centred else unit(rows)
    mean = mean_of((rows,)) + np.float32(0.01) if centred else None
    similarities, found = search(Vectors((rows,), mean), queries, 10)
    all_similarities = queries.astype(np.float64) @ prepared(rows, mean).T
    expected, _ = naive(all_similarities, 10)
    assert (similarities.dtype, found.dtype, found.shape) == (np.float32, np.int64, (300, 10))
    filled = min(count, 10)
    assert np.allclose(similarities[:, :filled], expected[:, :filled], atol=CLOSE)
    assert np.allclose(
        np.take_along_axis(all_similarities, found[:, :filled], axis=1), expected[:, :filled], atol=CLOSE
    )
    assert all(len(set(row)) == filled for row in found[:, :filled].tolist())
    assert (similarities[:, filled:] == -np.inf).all()
    assert (found[:, filled:] == -1).all()


@pytest.mark.parametrize("k", [1, 7, 100, 3000])
def test_equal_rows_stand_in_the_order_of_their_number(k):
    """Of equal similarities the smaller row comes first, also at the k-th place and across blocks."""
    rows, queries = whole(2 * BLOCK + 777, 5, 0), whole(70, 5, 1)
    expected = naive(queries @ rows.T, k)
    assert len(np.unique(expected[0])) < 100  # the case is one of many ties
    assert same(search(Vectors((rows,), None), queries, k), expected)


@pytest.mark.parametrize("order", ["rising", "falling", "all equal"])
def test_the_order_of_the_gallery_does_not_matter(order):
    """A gallery sorted towards or away from the queries, or of one row over and over, gives the naive result."""
    line = np.arange(3 * BLOCK, dtype=np.float32) // 3
    rows = {"rising": line, "falling": line[::-1], "all equal": np.ones_like(line)}[order][:, None] * [[1, 0.5]]
    rows, queries = rows.astype(np.float32), np.array([[1, 0], [0, 1], [1, -2]], dtype=np.float32)
    assert same(search(Vectors((rows,), None), queries, 50), naive(queries @ rows.T, 50))


def test_copies_of_a_row_have_one_similarity_wherever_they_stand():
    """Equal rows get equal numbers in every block and place, and so do equal queries."""
    rows, queries = gallery(2 * BLOCK + 5, 100), asked(257, 100)
    copies = np.array([3, 4, 100, BLOCK - 1, BLOCK, 2 * BLOCK + 4])
    rows[copies] = rows[3]
    queries[[0, 1, 200, 256]] = unit(rows[3:4] - mean_of((rows,)))
    similarities, found = search(Vectors((rows,), mean_of((rows,))), queries, 8)
    for query in (0, 1, 200, 256):
        assert found[query, :6].tolist() == copies.tolist()
        assert len(np.unique(similarities[query, :6])) == 1
        assert (similarities[query] == similarities[0]).all()


def test_rows_that_are_not_usable_never_appear():
    """Masked rows are left out, NaN or not, and -inf and -1 stand where too few are left."""
    rows, queries = whole(BLOCK * 3 + 10, 6, 2), whole(20, 6, 3)
    usable = np.random.default_rng(0).random(len(rows)) < 0.3
    usable[BLOCK : 2 * BLOCK] = False
    rows[np.flatnonzero(~usable)[:2]] = np.nan
    expected = naive(queries @ np.nan_to_num(rows).T, 40, usable)
    assert same(search(Vectors((rows,), None), queries, 40, usable=usable), expected)
    few = np.zeros(len(rows), dtype=bool)
    few[np.flatnonzero(usable)[[5, 900]]] = True
    similarities, found = search(Vectors((rows,), None), queries, 4, usable=few)
    assert (np.sort(found[:, :2], axis=1) == np.flatnonzero(few)).all()
    assert (found[:, 2:] == -1).all()
    assert (similarities[:, 2:] == -np.inf).all()


def test_parts_on_disk_and_in_memory_give_one_result(tmp_path):
    """However the rows are cut, into files or arrays, read-only or not, the results agree to the last bit."""
    rows, queries = gallery(2 * BLOCK + 300), asked(40)
    mean = mean_of((rows,))
    one = search(Vectors((rows,), mean), queries, 20)
    fixed = rows.copy()
    fixed.flags.writeable = False
    odd = (1, 14, 14, 999, BLOCK + 1, 2 * BLOCK + 299)
    for parts in (
        cut(rows, None, *odd), cut(rows, tmp_path / "odd", *odd), cut(rows, tmp_path / "one"),
        (fixed,), (np.asfortranarray(rows),), (rows[:77], *cut(rows[77:].astype(np.float32), tmp_path / "mixed", 50)),
    ):  # fmt: skip
        assert Vectors(parts, mean).count == len(rows)
        assert np.array_equal(mean_of(parts), mean)
        assert same(search(Vectors(parts, mean), queries, 20), one)
        assert same(best_query(Vectors(parts, mean), queries), best_query(Vectors((rows,), mean), queries))


def test_little_memory_changes_nothing():
    """The least memory that is not refused gives the same bits, in one pass over the rows, whose number is told as progress."""
    rows, queries = gallery(BLOCK + 100, 16), asked(1000, 16)
    passes, told = [0], []

    class Counting(Vectors):
        def rows(self, positions):
            passes[0] += positions[0] == 0
            return super().rows(positions)

    vectors = Counting((rows,), mean_of((rows,)))
    plenty = search(vectors, queries, 1500)
    passes[0] = 0
    with pytest.raises(TutelageError, match=r"10\.0 MiB of memory .*, which need \d+ MiB\nhint: ") as refused:
        search(vectors, queries, 1500, memory=10 << 20)
    least = int(re.findall(r"need (\d+) MiB", str(refused.value))[0])  # it depends on the number of threads
    assert same(search(vectors, queries, 1500, memory=least << 20, advance=told.append), plenty)
    assert passes == [1]
    assert sum(told) == len(rows)


def test_memory_stays_within_the_limit(tmp_path):
    """A search in 40 MB of files with many neighbours takes less than its limit beyond the imported process."""
    rows = gallery(20 * BLOCK, 256)
    count = len(cut(rows, tmp_path, 777))
    program = f"""
import re
import numpy as np
from functools import partial
from pathlib import Path
from tutelage.curation.search import search
from tutelage.curation.vectors import Vectors
from tutelage.data.block_cache import BlockCache
def kilobytes(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1))
before = kilobytes("VmRSS")
queries = np.eye(512, 256, dtype=np.float32)
cache = BlockCache(Path({str(tmp_path)!r}), ("rows",))
parts = tuple(partial(cache.column, str(number), "rows") for number in range({count}))
search(Vectors(parts, None), queries, 500, memory={160 << 20})
print(kilobytes("VmHWM") - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 160 << 10


def test_the_same_search_gives_the_same_bits():
    """Two searches agree to the last bit."""
    rows, queries = gallery(BLOCK + 10, 50), asked(300, 50)
    vectors = Vectors((rows,), mean_of((rows,)))
    assert same(search(vectors, queries, 30), search(vectors, queries, 30))


def test_no_queries_and_no_rows_are_no_fault():
    """Empty queries give empty results; an empty gallery gives -inf and -1."""
    rows = gallery(30)
    assert search(Vectors((rows,), None), asked(0), 3)[1].shape == (0, 3)
    similarities, found = search(Vectors((rows[:0],), None), asked(2), 3)
    assert (similarities == -np.inf).all()
    assert (found == -1).all()
    assert best_query(Vectors((rows,), None), asked(0))[1].tolist() == [-1] * 30


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rows_and_queries_that_are_not_finite_are_named(value, tmp_path):
    """NaN and infinity stop the search with the numbers of the rows or queries."""
    rows, queries = gallery(BLOCK + 50), asked(10)
    rows[BLOCK + 7, 3] = rows[BLOCK + 9, 0] = value
    vectors = Vectors(cut(rows, tmp_path, 1000), np.zeros(24, dtype=np.float32))
    for run in (
        lambda: search(vectors, queries, 3),
        lambda: best_query(vectors, queries),
        lambda: list(vectors.blocks()),
    ):
        with pytest.raises(TutelageError, match=f"NaN or infinite numbers in row {BLOCK + 7}, {BLOCK + 9}\nhint: "):
            run()
    with pytest.raises(TutelageError, match=f"row {BLOCK + 9}\nhint: "):
        vectors.rows(np.array([4, BLOCK + 9]))
    queries[2, 1] = value
    with pytest.raises(TutelageError, match=r"NaN or infinite numbers in query 2\nhint: "):
        search(vectors, queries, 3)


def test_shapes_that_do_not_fit_are_refused(tmp_path):
    """Wrong widths, masks, parts, means, row numbers and files are told with what is allowed."""
    rows = gallery(30)
    vectors = Vectors((rows,), None)
    cache = BlockCache(tmp_path, ("rows",))
    (tmp_path / "text.arrow").write_text("rows")
    cache.write({"rows": rows}, "long")
    none, text, long = (partial(cache.column, name, "rows") for name in ("none", "text", "long"))
    shortened = Vectors((long,), None)
    with (tmp_path / "long.arrow").open("rb+") as file:
        file.truncate(128 + 48 * 20)
    lost = f"{tmp_path} has lost rows that it held a moment ago.*\nhint: run the same command again"
    faults = [
        (lambda: search(vectors, asked(3, 23), 2), r"queries of shape \(3, 23\) must be \(queries, 24\)"),
        (lambda: search(vectors, asked(3), 0), "0 neighbours"),
        (lambda: search(vectors, asked(3), 2, usable=np.ones(29, dtype=bool)), r"\(29,\) bool must be \(30,\) bool"),
        (lambda: best_query(vectors, asked(3), usable=np.ones(30)), "usable: .* float64"),
        (lambda: Vectors((rows, gallery(3, 9)), None), "parts with 9, 24 features"),
        (lambda: Vectors((), None), "parts with no features"),
        (lambda: Vectors((rows.astype(np.float64),), None), r"shape \(30, 24\), float64"),
        (lambda: Vectors((rows,), np.zeros(3, dtype=np.float32)), r"mean of shape \(3,\) must be \(24,\)"),
        (lambda: Vectors((none,), None), lost),
        (lambda: Vectors((text,), None), lost),
        (lambda: search(shortened, asked(1), 2), lost),
        (lambda: Vectors((long,), None), lost),
        (lambda: vectors.rows(np.array([1, 30, -1])), "no row 30, -1: rows are 0 to 29"),
        (lambda: mean_of((rows[:0],)), "no rows"),
        (lambda: search_ivf(vectors, asked(3), 0), "0 neighbours"),
    ]
    for run, message in faults:
        with pytest.raises(TutelageError, match=message):
            run()


def test_blocks_do_not_depend_on_the_parts_and_rows_agree_with_them(tmp_path):
    """Blocks cover all usable rows in order, whatever the parts, and `rows` gives the same bits in any order, also twice."""
    rows = gallery(1000)
    rows[400] = 1
    mean = np.ones(24, dtype=np.float32)
    for folder in (tmp_path, None):
        vectors = Vectors(cut(rows, folder, 300, 301, 301, 990), mean)
        blocks = list(vectors.blocks(256))
        assert [positions.tolist() for positions, _ in blocks] == [
            list(range(start, min(start + 256, 1000))) for start in range(0, 1000, 256)
        ]
        everything = np.concatenate([block for _, block in blocks])
        assert everything.dtype == np.float32
        assert np.allclose(everything, prepared(rows, mean), atol=CLOSE)
        assert not everything[400].any()
        usable = np.arange(1000) % 600 > 280
        some = list(vectors.blocks(256, usable))
        assert [positions[0] for positions, _ in some] == [281, 512, 881], "no block without a usable row"
        assert np.array_equal(np.concatenate([positions for positions, _ in some]), np.flatnonzero(usable))
        assert np.array_equal(np.concatenate([block for _, block in some]), everything[usable])
        positions = np.array([999, 0, 300, 300, 400, 299, 301, 990, 0])
        assert np.array_equal(vectors.rows(positions), everything[positions])
        assert vectors.rows(np.array([], dtype=np.int64)).shape == (0, 24)


def test_the_mean_is_that_of_an_even_sample():
    """All rows count where the sample allows, else evenly spaced ones, over all parts."""
    rows = gallery(5000, dtype=np.float32)
    assert np.allclose(mean_of((rows[:99], rows[99:])), rows.mean(axis=0), atol=1e-6)
    spaced = rows[np.linspace(0, 4999, 100).astype(int)]
    assert np.allclose(mean_of((rows,), sample=100), spaced.mean(axis=0), atol=1e-6)


@pytest.mark.parametrize("count", [1, 16, 300, 600])
def test_every_row_finds_its_best_query(count):
    """Each row's query is the naive one, the smaller of equals also across tiles, and none for unusable rows."""
    rows, queries = whole(BLOCK + 20, 4, 0), whole(count, 4, 1)
    usable = np.random.default_rng(0).random(len(rows)) < 0.5
    told: list[int] = []
    similarity, query = best_query(Vectors((rows,), None), queries, usable=usable, advance=told.append)
    products = rows @ queries.T
    assert (similarity.dtype, query.dtype, sum(told)) == (np.float32, np.int32, len(rows))
    assert np.array_equal(similarity, np.where(usable, products.max(axis=1), -np.inf))
    assert np.array_equal(query, np.where(usable, products.argmax(axis=1), -1))
    copied = np.concatenate([asked(count, 100)] * 2)
    assert best_query(Vectors((gallery(500, 100),), None), copied)[1].max() < count


def test_the_inverted_file_finds_most_neighbours_and_tells_how_many():
    """On clustered rows the recall is high, the one returned is the measured one, and a seed gives one result."""
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((80, 32))
    rows = (centres[generator.integers(0, 80, 20_000)] + 0.4 * generator.standard_normal((20_000, 32))).astype(
        np.float16
    )
    queries = unit(centres[:20] + 0.4 * generator.standard_normal((20, 32)))
    usable = generator.random(len(rows)) < 0.8
    vectors, told = Vectors((rows,), mean_of((rows,))), []
    similarities, found, recall = search_ivf(vectors, queries, 10, usable=usable, advance=told.append)
    exact_similarities, exact = search(vectors, queries, 10, usable=usable)
    assert usable[found].all()
    assert recall == np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.tolist(), exact.tolist(), strict=True)])
    assert recall > 0.9
    assert sum(told) == len(rows)
    assert np.allclose(similarities[found == exact], exact_similarities[found == exact], atol=2e-3)
    assert (np.diff(similarities, axis=1) <= 0).all()
    assert same(search_ivf(vectors, queries, 10, usable=usable)[:2], (similarities, found))
    small = Vectors((rows[:70],), None)
    assert search_ivf(small, queries, 10)[2] > 0.97  # it looks into all 8 lists: only rounding is left
    with pytest.raises(
        TutelageError, match=r"approximate index of 1[56],.* rows, which needs .* MiB\nhint: use --index exact"
    ):
        search_ivf(vectors, queries, 10, usable=usable, memory=1 << 20)
    few = np.zeros(len(rows), dtype=bool)
    few[[3, 9]] = True
    rows[~few] = np.nan  # looked at neither for the lists nor for the neighbours
    similarities, found, recall = search_ivf(vectors, queries, 4, usable=few)
    assert (np.sort(found[:, :2]) == [3, 9]).all()
    assert (found[:, 2:] == -1).all()
    assert (similarities[:, 2:] == -np.inf).all()
    assert recall == 1
