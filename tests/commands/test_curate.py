"""Curation by retrieval, for real: what is found, what is kept out, and that only the images decide."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tutelage
from conftest import draw
from forked import Forked
from textures import CLASSES, texture
from tutelage.data.block_cache import BlockCache
from tutelage.data.manifest import read_manifest
from tutelage.errors import TutelageError

MODELS = {
    "teacher": "tf_efficientnet_lite0", "teacher_size": 64, "student": "mobilenetv3_small_050", "student_size": 32,
}  # fmt: skip


def picture(name: str, seed: int, size: int = 64) -> np.ndarray:
    """A texture with five blobs of its own, so that no two images are crops of each other: (size, size, 3) uint8."""
    random = np.random.default_rng([7, CLASSES.index(name), seed])
    pixels = texture(name, seed, size).astype(float)
    y, x = np.mgrid[0:size, 0:size] / size
    for _ in range(5):
        cx, cy, radius = *random.uniform(0.1, 0.9, 2), random.uniform(0.06, 0.16)
        inside = ((x - cx) ** 2 + (y - cy) ** 2 < radius**2)[..., None]
        pixels = np.where(inside, random.uniform(0, 255, 3), pixels)
    return pixels.astype(np.uint8)


def save(path: Path, pixels: np.ndarray, **more) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **more)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Dots and stripes to learn; a gallery of 60 of each and of 240 other things, and copies of six test images."""
    root = tmp_path_factory.mktemp("curate")
    for name in ("dots", "stripes"):
        for seed in range(8):
            save(root / "target" / "train" / name / f"{seed}.png", picture(name, seed))
            save(root / "target" / "test" / name / f"{seed}.png", picture(name, 1000 + seed))
        for seed in range(60):
            save(root / "gallery" / f"{name}-{seed:03d}.png", picture(name, 5000 + seed))
    for number in range(240):
        draw(root / "gallery" / f"other-{number:03d}.png", number % 3, number, 64)
    copies = root / "gallery" / "copies"
    for seed in range(3):
        for name in ("dots", "stripes"):
            pixels = picture(name, 1000 + seed)
            save(copies / f"{name}-{seed}-quality.jpg", pixels, quality=40)
            save(copies / f"{name}-{seed}-mirrored.png", pixels[:, ::-1])
    save(copies / "dots-7-same.png", picture("dots", 1007))
    (root / "gallery" / "broken.png").write_bytes(b"nothing")
    return root


def curate(data: Path, name: str, **more) -> dict:
    settings = {
        "target": str(data / "target"), "gallery": [str(data / "gallery")], "out": str(data / "runs" / name), "budget": 6,
        "strategy": "balanced", "total": 72, **MODELS, **more,
    }  # fmt: skip
    return tutelage.curate(**settings).to_json()


def chosen(data: Path, name: str) -> list[dict]:
    table = read_manifest(data / "runs" / name / "curate" / "manifest.parquet")[1].to_pylist()
    return [row for row in table if row["source"] == "gallery"]


def test_balanced_finds_what_the_queries_show(data):
    """Of a gallery that is two thirds other things, the chosen images are of the classes, each query having brought five."""
    result = curate(data, "balanced")
    rows = chosen(data, "balanced")
    assert result["images"]["transfer"] == 72 == len(rows) + 12
    right = [row["id"].startswith(row["query"].split("/")[1]) for row in rows]
    assert np.mean(right) > 0.8
    assert set(np.unique([row["query"] for row in rows], return_counts=True)[1]) == {5}
    assert all(row["strategy"] == "balanced" and -1 <= row["similarity"] <= 1 for row in rows)
    assert sorted({row["rank"] for row in rows}) == list(range(5))
    assert result["brought"] == {"dots": 30, "stripes": 30}
    assert result["distance"]["transfer_set"] < result["distance"]["gallery"]
    assert not {"nothing_near", "far_classes"} & set(result)
    files = sorted(p.name for p in (data / "runs" / "balanced" / "curate").iterdir())
    assert files == ["leaks.csv", "manifest.parquet", "montage.jpg", "result.json"]
    with Image.open(data / "runs" / "balanced" / "curate" / "montage.jpg") as picture:
        assert picture.width >= 400


@pytest.mark.parametrize("strategy", ["random", "best", "diverse", "hard", "balanced"])
def test_copies_of_test_images_stay_out(data, strategy):
    """Whatever the strategy, copies of test images that it would have chosen are listed and not learnt from, and others come instead."""
    name = f"leaks-{strategy}"
    result = curate(data, name, strategy=strategy, total=72)
    rows = chosen(data, name)
    assert len(rows) == 60
    assert not [row["id"] for row in rows if row["id"].startswith("copies/")]
    assert set(leaks_of(data, name)) <= {f"copies/{p.name}" for p in (data / "gallery" / "copies").iterdir()}
    assert len(leaks_of(data, name)) == result["leaks"]
    if strategy == "best":  # the copies are among the most similar
        assert {one["how"] for one in leaks_of(data, name).values()} > {"same pixels"}


@pytest.mark.parametrize("more", [{"strategy": "all", "total": None}, {"dedup": "gallery"}], ids=["all", "gallery"])
def test_all_copies_of_test_images_are_listed(data, more):
    """Where all of the gallery is looked at, re-encoded, mirrored and identical copies are listed, all of them and nothing else."""
    name = f"listed-{'-'.join(more)}"
    curate(data, name, **more)
    assert not [row["id"] for row in chosen(data, name) if row["id"].startswith("copies/")]
    leaks = leaks_of(data, name)
    assert set(leaks) == {f"copies/{p.name}" for p in (data / "gallery" / "copies").iterdir()}
    assert leaks["copies/dots-7-same.png"]["how"] == "same pixels"
    assert "mirrored" in leaks["copies/dots-0-mirrored.png"]["how"]
    assert leaks["copies/dots-0-mirrored.png"]["is"].endswith("test/dots/0.png")
    assert leaks["copies/dots-0-quality.jpg"]["split"] == "test"


def test_a_gallery_larger_than_memory(data, monkeypatch):
    """--dedup gallery is refused before it searches and memory is full, and the message says what goes; so is a choice too large."""
    more = {"memory": 1.0, "overwrite": True}
    monkeypatch.setattr("tutelage.curation.selection.EACH", 2**30 // 100)
    with monkeypatch.context() as patch:
        patch.setattr("tutelage.curation.candidates.near_leaks", None)
        with pytest.raises(
            TutelageError, match=r"--dedup gallery with 3\d\d images to compare.* GiB of memory"
        ) as error:
            curate(data, "larger", dedup="gallery", **more)
    assert "--dedup candidates, which compares what is chosen" in error.value.hint
    assert curate(data, "larger", dedup="candidates", **more)["images"]["transfer"] == 72
    with pytest.raises(TutelageError, match=r"--dedup candidates with 1\d\d images to compare") as error:
        curate(data, "larger", dedup="candidates", **{**more, "total": 152})
    assert "a smaller --total, --dedup none" in error.value.hint


@pytest.mark.slow
def test_an_inverted_file_that_memory_does_not_hold(data, go, tutelage, tmp_path, monkeypatch):
    """Of more images than are searched exactly, --index auto makes an inverted file where memory holds it, and says so where not."""
    monkeypatch.setattr("tutelage.curation.selection.EXACT", 100)
    for name in ("held", "too-large"):
        out = tmp_path / name
        done = go(words(data, out, "--memory", "4"))
        index = json.loads((out / "curate" / "result.json").read_text()).get("index")
        assert index == ("ivf" if name == "held" else None)
        assert ("inverted file over 373 images: finds" in done.stderr) == (name == "held")
        assert ("GiB of memory, but the limit is 4.0 GiB" in done.stderr) == (name == "too-large")
        assert done.stderr.count("the search is exact, and takes longer") == (name == "too-large")
        monkeypatch.setattr("tutelage.curation.ivf.OVERHEAD", 2**33)
    done = tutelage(*words(data, tmp_path / "asked", "--memory", "4", "--index", "ivf"))
    assert done.returncode == 2
    assert "error: --index ivf: 4.0 GiB of memory is too little for an approximate index of" in done.stderr
    assert "hint: use --index exact, which reads the rows block by block, or a larger --memory" in done.stderr


@pytest.mark.parametrize("strategy", ["balanced", "diverse", "hard", "best", "random"])
def test_a_small_gallery_is_used_up(data, tmp_path, strategy):
    """Where nearly all images are wanted, and some of them fall out as copies, the others are taken and the shortage is told."""
    for seed in range(38):
        save(tmp_path / "small" / f"{seed}.png", picture(CLASSES[seed % 2], 6000 + seed))
    for seed in range(2):
        save(tmp_path / "small" / f"copy-{seed}.png", picture("dots", 1000 + seed)[:, ::-1])
    result = curate(data, f"small-{strategy}", gallery=[str(tmp_path / "small")], strategy=strategy, total=12 + 40)
    names = [row["id"] for row in chosen(data, f"small-{strategy}")]
    assert len(names) == result["images"]["transfer"] - 12 == 38 - result["near_duplicates"]
    assert not [name for name in names if name.startswith("copy")]


def test_many_copies_of_one_test_image(data, tmp_path):
    """More copies of one picture than a search brings are all kept out, also where two held-out images show it."""
    target = Path(shutil.copytree(data / "target", tmp_path / "target"))
    save(target / "test" / "dots" / "twin.jpg", picture("dots", 1000), quality=95)
    for number in range(50):
        save(tmp_path / "many" / f"copy-{number}.jpg", picture("dots", 1000), quality=40 + number)
    for seed in range(60):
        save(tmp_path / "many" / f"own-{seed}.png", picture(CLASSES[seed % 2], 6000 + seed))
    result = curate(
        data, "many-copies", target=str(target), gallery=[str(tmp_path / "many")], strategy="best", total=12 + 40
    )
    assert not [row["id"] for row in chosen(data, "many-copies") if row["id"].startswith("copy")]
    assert result["images"]["transfer"] == 52


@pytest.mark.parametrize("total", [None, 12 + 8])
def test_a_gallery_of_nothing_but_copies(data, tmp_path, capsys, total):
    """A gallery of copies of test images is refused, one of them twice or not; one of labelled images is no fault, and is told."""
    for seed in range(8):
        save(tmp_path / "leaks" / f"{seed}.jpg", picture("dots", 1000 + seed), quality=60)
    shutil.copy(tmp_path / "leaks" / "0.jpg", tmp_path / "leaks" / "twice.jpg")
    more = {"strategy": "all" if total is None else "random", "total": total, "budget": None if total is None else 6}
    with pytest.raises(
        TutelageError,
        match="already labelled or held out: of 9 images 8 are validation or test images, 1 copies of these",
    ):
        curate(data, f"only-leaks-{total}", gallery=[str(tmp_path / "leaks")], **more)
    shutil.copytree(data / "target" / "train", tmp_path / "labelled")
    more["budget"], more["total"] = None, None if total is None else 16 + 8
    capsys.readouterr()
    result = curate(data, f"only-labelled-{total}", gallery=[str(tmp_path / "labelled")], **more)
    said = capsys.readouterr().err
    assert result["images"]["transfer"] == 16
    assert "nothing but the labelled images" in said
    assert "instead of" not in said


def leaks_of(data: Path, name: str) -> dict[str, dict[str, str]]:
    """The lines of leaks.csv, by gallery image."""
    with (data / "runs" / name / "curate" / "leaks.csv").open() as file:
        return {row["gallery_image"]: row for row in csv.DictReader(file)}


@pytest.mark.slow
def test_strategies_differ_and_repeat(data):
    """The strategies choose different sets, and the one with k-means in it the same one again."""
    curate(data, "diverse-again", strategy="diverse", total=72, cache=str(data / "other-cache"))
    sets = {}
    for strategy in ("random", "best", "balanced", "diverse", "hard"):
        curate(data, f"leaks-{strategy}", strategy=strategy, total=72)  # there already
        sets[strategy] = frozenset(row["id"] for row in chosen(data, f"leaks-{strategy}"))
    assert len(set(sets.values())) == 5
    assert chosen(data, "diverse-again") == chosen(data, "leaks-diverse")


def test_near_duplicates_are_chosen_once(data, tmp_path):
    """A gallery in which every picture stands four times gives each once, until the gallery has no others."""
    for seed in range(20):
        pixels = picture(CLASSES[seed % 2], 7000 + seed)
        save(tmp_path / "four" / f"{seed:02d}-a.png", pixels)
        save(tmp_path / "four" / f"{seed:02d}-b.jpg", pixels, quality=50)
        save(tmp_path / "four" / f"{seed:02d}-c.png", pixels[:, ::-1])
        small = Image.fromarray(pixels).resize((44, 44))
        save(tmp_path / "four" / f"{seed:02d}-d.png", np.asarray(small))
    result = curate(data, "four", gallery=[str(tmp_path / "four")], total=12 + 18)
    pictures = [row["id"][:2] for row in chosen(data, "four")]
    assert len(pictures) == 18
    assert len(set(pictures)) >= 17
    assert result["near_duplicates"] > 0
    curate(data, "four-none", gallery=[str(tmp_path / "four")], total=12 + 18, dedup="none")
    assert len({row["id"][:2] for row in chosen(data, "four-none")}) < 14


def manifest_bytes(out: Path) -> bytes:
    return (out / "curate" / "manifest.parquet").read_bytes()


def words(data: Path, out: Path, *more: str) -> list[str]:
    return [
        "curate", "--target", str(data / "target"), "--gallery", str(data / "gallery"),
        "--out", str(out), "--cache", str(out.parent / "cache"), "--budget", "6", "--strategy", "balanced", "--total", "72",
        "--teacher", "tf_efficientnet_lite0", "--teacher-size", "64", "--student", "mobilenetv3_small_050", "--student-size", "32",
        *more,
    ]  # fmt: skip


@pytest.fixture
def go(tutelage, monkeypatch):
    """go(words): the command, with small pieces."""
    monkeypatch.setattr("tutelage.curation.embed.PIECE_BITS", 4)

    def call(words: list[str]) -> subprocess.CompletedProcess[str]:
        done = tutelage(*words)
        assert done.returncode == 0, done.stderr
        return done

    return call


def killed_midway(words: list[str], cache: Path) -> int:
    """Begin a command and kill it when it has embedded three pieces of the gallery or a few more; how many it has."""
    pieces = lambda: len(list(cache.glob("embeddings-*/*.arrow")))  # noqa: E731
    before, deadline = pieces(), time.monotonic() + 240
    with Forked(words, piece_bits=4) as process:
        while pieces() < before + 3:
            assert process.poll() is None, process.read("stderr")
            assert time.monotonic() < deadline
        process.kill()
    return pieces() - before


@pytest.mark.slow
def test_killed_and_sharded_give_the_same_manifest(data, tmp_path, go):
    """Killed while it embeds and continued, or embedded by two shares in the wrong order, one of them killed too: the same manifest."""
    whole = tmp_path / "whole" / "run"
    go(words(data, whole))
    killed = tmp_path / "killed" / "run"
    killed_midway(words(data, killed), tmp_path / "killed" / "cache")
    assert not (killed / "curate" / "result.json").exists()
    go(words(data, killed))
    assert manifest_bytes(killed) == manifest_bytes(whole)
    shared, cache = tmp_path / "shared" / "run", tmp_path / "shared" / "cache"
    done = killed_midway(words(data, shared, "--shard", "1/2"), cache)
    for share in ("1/2", "0/2"):
        assert f"share {share[0]} of 2" in go(words(data, shared, "--shard", share)).stderr
        assert not (shared / "curate").exists()
        if share == "1/2":
            assert 3 <= done < len(list(cache.glob("embeddings-*/*.arrow"))), "it was killed midway"
    pieces = {p: p.stat().st_mtime_ns for p in cache.glob("embeddings-*/*.arrow")}
    go(words(data, shared))
    assert {p: p.stat().st_mtime_ns for p in cache.glob("embeddings-*/*.arrow")} == pieces
    assert manifest_bytes(shared) == manifest_bytes(whole)


@pytest.mark.slow
def test_more_images_tomorrow(data, tmp_path):
    """More gallery images tomorrow: only those are embedded, and the encoder is not asked again about labelled images."""
    cache = tmp_path / "cache"
    curate(data, "today", cache=str(cache))
    before = {p: p.stat().st_mtime_ns for p in cache.rglob("*") if p.is_file()}
    save(tmp_path / "new" / "one.png", picture("dots", 9000))
    curate(data, "tomorrow", cache=str(cache), gallery=[str(data / "gallery"), str(tmp_path / "new")])
    after = {p: p.stat().st_mtime_ns for p in cache.rglob("*") if p.is_file()}
    new = [p for p in after if p not in before and p.parent.name.startswith("embeddings-")]
    assert {p: after[p] for p in before} == before
    assert len(new) == 1  # one piece


def test_later_stages_take_the_embeddings_over(data, tmp_path):
    """A run that searched its gallery asks the teacher nothing again about whole images: the later stages find them."""
    cache = tmp_path / "cache"
    curate(data, "handed", cache=str(cache))
    (clean,) = cache.glob("outputs-*/clean")
    blocks = BlockCache(clean, ("key", "output"))
    keys = {key.tobytes() for path in clean.iterdir() for key in blocks.column(path.stem, "key")}
    table = read_manifest(data / "runs" / "handed" / "curate" / "manifest.parquet")[1]
    assert set(table.column("key").to_pylist()) <= keys


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"total": 12}, ["count towards it"]),
        ({"total": None}, ["--strategy balanced without --total"]),
        ({"per_query": 3}, ["--total 72 and --per-query 3"]),
        ({"per_query": 3, "total": None, "strategy": "best"}, ["--per-query 3 with --strategy best"]),
        ({"strategy": "all"}, ["--total 72 with --strategy all"]),
        ({"shard": "2/2"}, ["--shard 2/2", "0 <= i < n"]),
        ({"shard": "first"}, ["--shard first"]),
        ({"strategy": "nearest"}, ["--strategy nearest"]),
    ],
)
def test_what_cannot_work_is_told(data, more, said):
    """Numbers that contradict each other or the gallery get one clear error."""
    with pytest.raises(TutelageError) as error:
        curate(data, "wrong", **more)
    assert all(part in str(error.value) for part in said), str(error.value)


@pytest.mark.slow
def test_random_looks_further_where_most_are_duplicates(data, tmp_path):
    """`random` draws from a part of the gallery; where that is nearly all duplicates it looks at more, and fails no one."""
    for number in range(300):
        save(tmp_path / "many" / f"same-{number:03d}.png", picture("dots", 8000))
    for number in range(60):
        save(tmp_path / "many" / f"own-{number:03d}.png", picture("stripes", 8100 + number))
    result = curate(data, "further", gallery=[str(tmp_path / "many")], strategy="random", total=12 + 40)
    assert result["images"]["transfer"] == 52
    assert sum(row["id"].startswith("own") for row in chosen(data, "further")) >= 39


def test_broken_labelled_images_are_a_share_of_all(data, tmp_path):
    """Two broken images of 34 labelled ones are less than 5 % of all images, and stop nothing; they are listed."""
    target = Path(shutil.copytree(data / "target", tmp_path / "target"))
    for number in range(2):
        (target / "train" / "dots" / f"broken-{number}.png").write_bytes(b"")
    curate(data, "broken-label", target=str(target))
    with (data / "runs" / "broken-label" / "rejected.csv").open() as file:
        assert [row["set"] for row in csv.DictReader(file)] == ["target", "target", "gallery"]


def test_per_query_counts_for_each_query(data):
    """--per-query k brings k images for each labelled one."""
    result = curate(data, "per-query", total=None, per_query=3)
    assert result["images"]["transfer"] == 12 + 36


def near(gallery: np.ndarray, queries: np.ndarray, labels: list[int]) -> tuple[str, list[str]]:
    """What is said of queries (Q, D) of these classes, which bring three images each of a gallery (N, D)."""
    from tutelage.curation.selection import Pool, nothing_near
    from tutelage.curation.strategies import balanced
    from tutelage.curation.vectors import Vectors

    gallery, queries = ((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in (gallery, queries))
    usable = np.ones(len(gallery), bool)
    pool = Pool(None, Vectors((gallery,), None), usable, "exact", 2**28)  # type: ignore[arg-type]
    choice = balanced(*pool.neighbours(queries, 200, ""), np.tile(np.arange(len(queries)), 3), ~usable)
    assert choice is not None
    return nothing_near(pool, choice, np.array(labels), ["a", "b", "c"])


def test_what_is_near():
    """Queries that find no more than chance are told, together or by class; a gallery of one kind and a class of two queries are not."""
    random = np.random.default_rng(0)
    noise = lambda count, width=64: random.normal(size=(count, width))  # noqa: E731
    centres, labels = noise(20), [n // 8 for n in range(24)]
    clusters = centres[np.arange(2000) % 20] + 0.3 * noise(2000)
    of_centres = lambda numbers: centres[numbers] + 0.3 * noise(len(numbers))  # noqa: E731
    warning, far = near(noise(2000), noise(24), labels)
    assert warning.startswith("nothing in the gallery is near the queries")
    assert far == []
    assert near(clusters, of_centres(np.arange(24) % 20), labels) == ("", [])
    warning, far = near(clusters, np.concatenate([of_centres(np.arange(16)), noise(8)]), labels)
    assert warning.startswith("the queries of c find nothing near")
    assert far == ["c"]
    assert near(clusters, np.concatenate([of_centres(np.arange(16)), noise(2)]), labels[:18]) == ("", [])
    one_kind = noise(1, 3) + noise(2000, 3)  # three features: whatever is asked finds something
    assert near(one_kind, one_kind[:24] + 0.5 * noise(24, 3), labels) == ("", [])


def test_a_gallery_that_holds_runs_and_their_cache(data, tmp_path, capsys):
    """Runs, studies, exports and caches inside a gallery or target set are left out, so the same command again finds the same images."""
    everything = tmp_path / "everything"
    (everything / "photos").mkdir(parents=True)
    for number in range(30):
        draw(everything / "photos" / f"{number}.png", number % 3, number, 64)
    (everything / "export").mkdir()
    for name in ("export.json", "preprocess.json"):
        (everything / "export" / name).write_text("{}")
    draw(everything / "export" / "picture.png", 1, 1, 64)
    settings = {"gallery": [str(everything)], "out": str(everything / "runs" / "first"), "total": 24}
    first = curate(data, "", **settings)
    assert (everything / "runs" / "first" / "curate" / "montage.jpg").exists()
    again = curate(data, "", **settings)
    assert (first["gallery"], again["reused"]) == (30, True)
    told = capsys.readouterr().err
    for what in ("is a run of tutelage", "is an export of tutelage"):
        assert what in told
