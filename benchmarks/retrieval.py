"""Exact nearest-neighbour search against faiss, in time and memory: python benchmarks/retrieval.py

Synthetic float16 embeddings with 384 features that are far from centred; 1,000 queries, 128 neighbours. Measures the time in memory
against `faiss.IndexFlatIP` on the same centred float32 vectors (building its index not counted), what 500 queries more cost (the
check for leaks), the share of neighbours on which both agree, the peak memory of a search in memory, and, from files, the peak memory
under a limit and how the time grows with the number of rows. Runs are interleaved, medians are told, the ratios are what counts.

Needs 768 MB of disk for each million rows (--folder) and 3 GB of memory for each million of --millions.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # two OpenMP libraries must not wait for each other's threads

import numpy as np
from PIL import Image

from tutelage.curation.candidates import near_leaks
from tutelage.curation.embed import EmbeddingTable
from tutelage.curation.image_match import layout
from tutelage.curation.search import search
from tutelage.curation.selection import Pool, SelectionRequest, choose
from tutelage.curation.vectors import Part, Vectors, mean_of

WIDTH, QUERIES, MORE_QUERIES, K = 384, 1000, 500, 128
MEGABYTE = 2**20


def write_vectors(path: Path, count: int, seed: int) -> None:
    """A .npy file of (count, WIDTH) float16, normal around 0.5, written in blocks."""
    generator = np.random.Generator(np.random.SFC64(seed))
    with path.open("wb") as file:
        header = {"descr": "<f2", "fortran_order": False, "shape": (count, WIDTH)}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, count, 65536):
            rows = generator.standard_normal((min(65536, count - start), WIDTH), dtype=np.float32) + 0.5
            file.write(rows.astype(np.float16).tobytes())


def queries_of(count: int) -> np.ndarray:
    """(count, WIDTH) float32, unit length."""
    rows = np.random.default_rng(7).standard_normal((count, WIDTH), dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def timed(run) -> tuple[dict[str, float], tuple]:
    """Seconds of one run on the clock and of all cores together, which other jobs disturb less; and its result."""
    wall, cores = time.perf_counter(), time.process_time()
    result = run()
    return {"seconds": time.perf_counter() - wall, "core_seconds": time.process_time() - cores}, result


def told(runs: list[dict], over: list[dict], name: str) -> dict:
    """Ratios of the medians of two lists of runs, on the clock and of the cores."""
    ratios = {}
    for kind in ("seconds", "core_seconds"):
        first, second = (statistics.median(run[kind] for run in taken) for taken in (runs, over))
        ratios[f"{name}_{kind}"] = round(first / second, 3)
    return ratios


def status(name: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS now, VmHWM at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name + ":")).split()[1])


def mapped(path: Path | str) -> Part:
    """The rows of a .npy file, as a part that is mapped while it is read."""
    return partial(np.load, path, mmap_mode="r")


def child(path: str, in_memory: bool, limit: int) -> None:
    """One search in this process: time, and peak memory beyond the imported process, as JSON."""
    before = status("VmRSS")
    mean = mean_of((mapped(path),))
    vectors = Vectors((np.load(path) if in_memory else mapped(path),), mean)
    queries = queries_of(QUERIES)
    took, _ = timed(lambda: search(vectors, queries, K, memory=limit or None))
    print(json.dumps({**took, "peak": status("VmHWM") - before}))


def in_child(path: Path, in_memory: bool, limit: int = 0) -> dict:
    """`child` in a process of its own."""
    command = [sys.executable, __file__, "--child", str(path), str(int(in_memory)), str(limit)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def against_faiss(path: Path, repeats: int) -> dict:
    """Times in memory beside those of faiss, interleaved."""
    import faiss

    rows = np.load(path)
    vectors = Vectors((rows,), mean_of((mapped(path),)))
    index = faiss.IndexFlatIP(WIDTH)
    for _, block in vectors.blocks(65536):
        index.add(block)
    queries, more = queries_of(QUERIES), queries_of(QUERIES + MORE_QUERIES)
    runs: dict[str, list[dict]] = {"faiss": [], "search": [], "with_leak_check": []}
    agree = 0.0
    for _ in range(repeats):
        took, theirs = timed(lambda: index.search(queries, K))
        runs["faiss"].append(took)
        took, ours = timed(lambda: search(vectors, queries, K))
        runs["search"].append(took)
        runs["with_leak_check"].append(timed(lambda: search(vectors, more, K))[0])
        agree = float((np.sort(theirs[1], axis=1) == np.sort(ours[1], axis=1)).mean())
    return {
        "seconds": {name: [round(run["seconds"], 2) for run in taken] for name, taken in runs.items()},
        **told(runs["search"], runs["faiss"], "search_to_faiss"),
        **told(runs["with_leak_check"], runs["search"], "with_leak_check_to_search"),
        "agree_with_faiss": round(agree, 5),
    }


def windows(count: int, seed: int) -> np.ndarray:
    """(count, 16, 16, 3) uint8: places in shrunken photos of $TUTELAGE_TEST_DATA/photos1k."""
    data = Path(os.environ.get("TUTELAGE_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    photos = []
    for path in sorted((data / "photos1k").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in filter(tarfile.TarInfo.isfile, tar):
                photos.append(np.asarray(Image.open(tar.extractfile(member)).convert("RGB").resize((96, 96))))  # type: ignore[arg-type]
    random = np.random.default_rng(seed)
    every = np.lib.stride_tricks.sliding_window_view(np.array(photos), (16, 16), axis=(1, 2))  # (n, 81, 81, 3, 16, 16)
    which = random.integers(0, len(photos), count), *random.integers(0, 81, (2, count))
    return np.ascontiguousarray(every[which].transpose(0, 2, 3, 1))


def curation(path: Path, folder: Path, repeats: int) -> dict:
    """What `curate` does once the gallery is embedded, over the search alone: the choice, leaks of 500 test images, near duplicates.

    The search alone: 1,000 queries, 128 neighbours. The choice: `balanced`, 10 images for each of the 1,000 queries. Not in it: reading
    the labels, decoding the chosen images, the montage.
    """
    count = len(np.load(path, mmap_mode="r"))
    thumbs = windows(count, 1)
    parts = []
    for start in range(0, count, 2048):
        np.save(folder / f"{start}.layouts.npy", layout(thumbs[start : start + 2048]).astype(np.float16))
        parts.append(mapped(folder / f"{start}.layouts.npy"))
    embedded = EmbeddingTable(
        (mapped(path),),
        np.arange(count),
        np.zeros((0, 32), np.uint8),
        np.array([0, count]),
        (lambda: thumbs,),
        tuple(parts),
        [],
    )
    held = [np.repeat(np.repeat(one, 4, axis=0), 4, axis=1) for one in windows(MORE_QUERIES, 2)]
    vectors, queries = Vectors((mapped(path),), mean_of((mapped(path),))), queries_of(QUERIES)
    more = queries_of(QUERIES + MORE_QUERIES)[QUERIES:]
    runs: dict[str, list[dict]] = {"search": [], "curate": []}
    for _ in range(repeats):
        pool = Pool(embedded, vectors, np.ones(count, bool), "exact", 2**33)

        def leaks(among: np.ndarray | None, pool: Pool = pool) -> int:
            found = near_leaks(pool, held, more, among)
            pool.usable[[row for row, *_ in found]] = False
            return len(found)

        def all_of_it(pool: Pool = pool) -> None:
            wish = SelectionRequest(
                "balanced", 10 * QUERIES, np.arange(QUERIES), 0, "candidates", lambda rows: rows[:, 0]
            )
            choose(pool, queries, wish, leaks)

        runs["search"].append(timed(lambda: search(vectors, queries, K))[0])
        runs["curate"].append(timed(all_of_it)[0])
    return {
        "seconds": {name: [round(run["seconds"], 2) for run in taken] for name, taken in runs.items()},
        **told(runs["curate"], runs["search"], "curate_to_search"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, default=1, help="millions of rows in memory")
    parser.add_argument("--disk-millions", type=float, default=10, help="millions of rows in files; 0: not measured")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--disk-repeats", type=int, default=1)
    parser.add_argument("--limit-mb", type=int, default=1024, help="memory that the search in files may take")
    parser.add_argument(
        "--folder", type=Path, help="where the files are written; default: the system's temporary folder"
    )
    parser.add_argument(
        "--curate", action="store_true", help="measure what `curate` adds to the search, and nothing else"
    )
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.child:
        return child(settings.child[0], settings.child[1] == "1", int(settings.child[2]))
    with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
        small, large = Path(folder) / "small.npy", Path(folder) / "large.npy"
        count, large_count = int(settings.millions * 1e6), int(settings.disk_millions * 1e6)
        write_vectors(small, count, 0)
        if settings.curate:
            print(json.dumps(curation(small, Path(folder), settings.repeats), indent=2))
            return
        result: dict = {"rows": count, "width": WIDTH, "queries": QUERIES, "k": K}
        result["in_memory"] = against_faiss(small, settings.repeats)
        held = in_child(small, in_memory=True)["peak"]
        result["in_memory"]["peak_mb"] = round(held / MEGABYTE)
        result["in_memory"]["peak_to_vectors"] = round(held / (count * WIDTH * 2), 3)
        if large_count:
            write_vectors(large, large_count, 1)
            limit = settings.limit_mb * MEGABYTE
            runs: dict[Path, list[dict]] = {small: [], large: []}
            for _ in range(settings.disk_repeats):
                for path in (small, large, small):  # the small one before and after: the machine may have changed
                    runs[path].append(in_child(path, in_memory=False, limit=limit))
            result["on_disk"] = {
                "rows": large_count,
                "limit_mb": settings.limit_mb,
                "peak_mb": round(max(run["peak"] for taken in runs.values() for run in taken) / MEGABYTE),
                "seconds_small": [round(run["seconds"], 2) for run in runs[small]],
                "seconds_large": [round(run["seconds"], 2) for run in runs[large]],
                "rows_ratio": round(large_count / count, 2),
                **told(runs[large], runs[small], "large_to_small"),
            }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
