"""What `curate` says and leaves behind when something is wrong with the gallery, or with vectors of it: through the command."""

from __future__ import annotations

import csv
import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from conftest import BEGUN, Task, draw, refused, rejected
from scenes import write_scenes
from tutelage.data.manifest import read_manifest
from vectors import WIDTH, gallery_vectors, target_vectors, vector, write


def chosen(task: Task) -> list[str]:
    """Names of the gallery images in the transfer set."""
    rows = read_manifest(task.out / "curate" / "manifest.parquet")[1].to_pylist()
    return [row["id"] for row in rows if row["source"] == "gallery"]


def result(task: Task) -> dict[str, Any]:
    return json.loads((task.out / "curate" / "result.json").read_text())


def by_vectors(task: Task, vectors: dict[str, np.ndarray], *more: str) -> list[str]:
    """The words of `curate` that choose 12 gallery images by these vectors."""
    path = write(task.root / "vectors.parquet", vectors)
    return task.words("curate", "--embeddings", str(path), "--total", "30", *more)


def test_smaller_than_the_total(tutelage, task):
    """A total that the gallery cannot fill is refused with the largest that it can, which then works in the same folder."""
    text = refused(tutelage(*task.words("curate", "--total", "500", "--dedup", "none")))
    assert "--total 500 is more than the 42 images that can be used: 18 labelled and 24 of the gallery's own" in text
    assert "lower --total" in text
    assert task.files() == BEGUN
    done = tutelage(*task.words("curate", "--total", "42", "--dedup", "none"))
    assert done.returncode == 0, done.stderr
    assert len(chosen(task)) == 24


@pytest.mark.parametrize("what", ["no better than random", "of another encoder"])
def test_nothing_near(tutelage, task, what):
    """Similarities no better than random, as vectors of two encoders give too, are warned of, and the set is made."""
    vectors = {**gallery_vectors(), **target_vectors(task)}
    if what == "of another encoder":  # as wide, with features that mean other things
        vectors |= {name: np.roll(one, 5) for name, one in target_vectors(task).items()}
    else:
        for i in range(24, 100):
            draw(task.gallery / f"{i}.png", i % 3, 1000 + i)
            vectors[f"{i}.png"] = vector(i % 3, i)
        noise = np.random.default_rng(0).normal(size=(len(vectors), 64)).astype(np.float32)
        vectors = dict(zip(vectors, noise, strict=True))
    done = tutelage(*by_vectors(task, vectors))
    assert done.returncode == 0, done.stderr
    assert "nothing in the gallery is near the queries: the nearest image that each of them found" in done.stderr
    assert "look at montage.jpg, and give a --gallery that shows such things" in done.stderr
    assert result(task)["nothing_near"]
    assert len(chosen(task)) == 12
    assert "curate/montage.jpg" in task.files()


@pytest.mark.parametrize(("strategy", "said"), [("balanced", "find nothing near"), ("best", "find nothing new")])
def test_a_class_that_brings_nothing_new(tutelage, task, strategy, said):
    """A class whose near images are all labelled ones again is named, also where its queries take far images in their turns."""
    for number in range(0, 24, 3):
        shutil.copy(task.target / "train" / "c0" / f"{number // 3 % 6}.png", task.gallery / f"{number}.png")
    done = tutelage(*by_vectors(task, {**gallery_vectors(), **target_vectors(task)}, "--strategy", strategy))
    assert done.returncode == 0, done.stderr
    assert f"the queries of c0 {said}: " in done.stderr
    assert "of c0, c" not in done.stderr
    assert "nothing in the gallery" not in done.stderr
    assert result(task)["duplicates"] == 8
    assert result(task).get("far_classes") == (["c0"] if strategy == "balanced" else None)
    assert (result(task)["brought"]["c0"] == 0) == (strategy == "best")
    assert {int(name[:-4]) % 3 for name in chosen(task)} == {1, 2}


def test_vectors_of_two_widths(tutelage, task):
    """Images embedded by one encoder and labelled images by another, of other width, are refused with both widths."""
    short = {name: one[:7] for name, one in target_vectors(task).items()}
    other = write(task.root / "other.parquet", short)
    words = by_vectors(task, gallery_vectors())
    at = words.index("--embeddings") + 2
    text = refused(tutelage(*words[:at], str(other), *words[at:]))
    assert "different numbers of features: 7, 12" in text
    assert "one encoder" in text
    assert task.files() == BEGUN


def test_words_of_another_model(tutelage, task):
    """Vectors of words with another width than the images', or without one of the classes, are refused."""
    for words, told in (
        ({f"c{c}": vector(c, 0)[:5] for c in range(3)}, "--text-embeddings with 5 features, --embeddings with 12"),
        ({f"c{c}": vector(c, 0) for c in range(2)}, "--text-embeddings: no vector for 'c2'"),
        ({f"c{c}": vector(c, 0) * np.float32(np.nan) for c in range(3)}, "NaN or infinite numbers for c0, c1, c2"),
    ):
        path = write(task.root / "words.parquet", words, "class")
        more = ("--strategy", "text", "--text-embeddings", str(path))
        assert told in refused(tutelage(*by_vectors(task, gallery_vectors(), *more)))
        assert not (task.out / "curate").exists()


def test_vectors_that_are_no_numbers(tutelage, task):
    """Gallery images without a vector or with NaN in it are listed; labelled images with NaN are refused by name."""
    vectors = {**gallery_vectors(), **target_vectors(task), "4.png": np.full(WIDTH, np.nan, np.float32)}
    del vectors["3.png"]
    text = refused(tutelage(*by_vectors(task, vectors, "--max-rejected", "0.01")))
    assert "2 of 54 images cannot be used" in text
    assert task.files() == ["rejected.csv", *BEGUN]
    done = tutelage(*by_vectors(task, vectors))
    assert done.returncode == 0, done.stderr
    told = rejected(task)
    assert set(told) == {"3.png", "4.png"}
    assert "no vector of its name" in told["3.png"]
    assert "NaN or infinite numbers" in told["4.png"]
    assert not {"3.png", "4.png"} & set(chosen(task))
    vectors |= {f"train/c0/{i}.png": np.full(WIDTH, np.nan, np.float32) for i in range(2)}
    text = refused(tutelage(*by_vectors(task, vectors, "--out", str(task.root / "other"))))
    assert "NaN or infinite numbers for train/c0/0.png, train/c0/1.png" in text


def pack(task: Task, path: Path, *more: tuple[str, bytes, str]) -> bytes:
    """Write a tar of the 24 gallery images and of more members (name, kind, link); its bytes."""
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for name, kind, link in (*more, *((f"{i:02d}.png", tarfile.REGTYPE, "") for i in range(24))):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, link
            data = (task.gallery / f"{int(Path(name).stem)}.png").read_bytes() if kind == tarfile.REGTYPE else b""
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path.read_bytes()


def test_a_shard_that_breaks_off(tutelage, task):
    """Of a tar that ends in its middle the images before that are used, and the rest is listed."""
    shard = task.root / "shards" / "0.tar"
    whole = pack(task, shard)
    shard.write_bytes(whole[: len(whole) // 2])
    done = tutelage(*task.words("curate", "--gallery", str(shard.parent)))
    assert done.returncode == 0, done.stderr
    names = chosen(task)
    assert names == [f"0.tar/{i:02d}.png" for i in range(len(names))]
    assert 8 < len(names) < 16
    told = rejected(task)
    assert set(told) == {"0.tar"}
    assert f"the tar breaks off at byte {len(whole) // 2}, inside {len(names):02d}.png" in told["0.tar"]
    assert "images before that are used" in told["0.tar"]
    assert "1 of " in done.stderr
    assert "cannot be used" in done.stderr


def test_a_hostile_shard(tutelage, task):
    """Members with absolute paths or .., links and devices are listed; nothing of them is written or read anywhere."""
    outside = str(task.root / "outside" / "1.png")
    hostile = {
        outside: (tarfile.REGTYPE, "", "an absolute path"),
        "a/../../../2.png": (tarfile.REGTYPE, "", "a path with .."),
        "link.png": (tarfile.SYMTYPE, str(task.target / "test" / "c0" / "0.png"), "a link"),
        "hard.png": (tarfile.LNKTYPE, "00.png", "a link"),
        "null.png": (tarfile.CHRTYPE, "", "a device"),
    }
    shard = task.root / "shards" / "0.tar"
    pack(task, shard, *((name, kind, link) for name, (kind, link, _) in hostile.items()))
    before = sorted(task.root.rglob("*"))
    done = tutelage(*task.words("curate", "--gallery", str(shard.parent), "--max-rejected", "0.2"))
    assert done.returncode == 0, done.stderr
    assert sorted(path for path in task.root.rglob("*") if task.out.parent not in (path, *path.parents)) == before
    assert not list(task.out.parent.rglob("*.png"))
    told = rejected(task)
    assert {name.removeprefix("0.tar/") for name in told} == set(hostile)
    assert all(why in told[f"0.tar/{name}"] for name, (_, _, why) in hostile.items())
    assert chosen(task) == [f"0.tar/{i:02d}.png" for i in range(24)]


def test_images_of_any_name(tutelage, task):
    """A gallery whose files have no endings, or odd ones, is read as a whole; archives, texts and HEIC in it are named."""
    for number in range(24):
        path = task.gallery / f"{number}.png"
        kind, name = (("PNG", str(number)), ("TGA", f"{number}.targa"), ("BMP", f"{number}.bmp.7"))[number % 3]
        Image.open(path).save(task.gallery / name, kind)
        path.unlink()
    (task.gallery / "more.tbz2").write_bytes(b"BZh91AY&SY")
    (task.gallery / "readme").write_text("photos of waves")
    (task.gallery / "IMG_1").write_bytes(b"\0\0\0\x18ftypheix\0\0\0\0mif1heix" + bytes(50))
    done = tutelage(*task.words("curate", "--dedup", "none"))
    assert done.returncode == 0, done.stderr
    assert result(task)["gallery"] == 25
    assert len(chosen(task)) == 24
    assert set(rejected(task)) == {"IMG_1"}
    assert "1 file of 27 in" in done.stderr
    assert "is no image: readme" in done.stderr
    assert "archives that are not read: more.tbz2" in done.stderr


def test_a_gallery_of_links_and_runs(tutelage, task):
    """Links in circles and upwards bring no image twice and none from elsewhere; the pictures of a run are no gallery."""
    for name in ("x", "y"):
        (task.gallery / name).mkdir()
        (task.gallery / name / "up").symlink_to("../..")
        (task.gallery / name / "all").symlink_to(task.gallery)
    shutil.move(task.gallery / "7.png", task.gallery / "x" / "7.png")
    (task.gallery / "y" / "x").symlink_to("../x")
    done = tutelage(*task.words("curate", "--dedup", "none"))
    assert done.returncode == 0, done.stderr
    assert result(task)["gallery"] == 24
    assert "x/7.png" in chosen(task)
    words = task.words("curate", "--gallery", str(task.out / "curate"), "--out", str(task.root / "second"))
    assert f"lies in {task.out}, a run of tutelage" in refused(tutelage(*words))


@pytest.mark.slow
def test_images_that_only_xmp_turns(tutelage, tmp_path):
    """TIFF images that lie on their side, as only their XMP says, fit masks that stand upright."""
    data = write_scenes(tmp_path)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="8"/></x:xmpmeta>'
    paths = sorted((data / "target" / "images").rglob("*.png"))
    for path in paths:
        stored = Image.open(path).transpose(Image.Transpose.ROTATE_270)
        stored.save(path.with_suffix(".tif"), tiffinfo={700: xmp})
        path.unlink()
    task = Task(data)
    sizes = ("--teacher-size", "64x96", "--student-size", "64x96")
    done = tutelage(*task.words("curate", "--task", "segmentation", "--dedup", "none", *sizes))
    assert done.returncode == 0, done.stderr
    assert paths
    assert not (task.out / "rejected.csv").exists()


def test_the_target_set_inside(tutelage, task):
    """Of a target set that lies in the gallery, test images are kept out and listed, and labelled images taken once."""
    shutil.copytree(task.target, task.gallery / "mine")
    done = tutelage(*task.words("curate", "--dedup", "none"))
    assert done.returncode == 0, done.stderr
    assert "12 gallery images are validation or test images and stay out" in done.stderr
    with (task.out / "curate" / "leaks.csv").open(newline="") as file:
        leaks = {row["gallery_image"]: row["is"] for row in csv.DictReader(file)}
    assert leaks == {f"mine/test/c{c}/{i}.png": f"test/c{c}/{i}.png" for c in range(3) for i in range(4)}
    assert result(task)["duplicates"] == 18
    assert len(chosen(task)) == 24
    assert not [name for name in chosen(task) if name.startswith("mine")]


def test_more_for_each_query_than_there_is(tutelage, task):
    """The message names the flag that was given."""
    text = refused(tutelage(*task.words("curate", "--per-query", "500")))
    assert "--per-query 500 asks for 9,000 images, more than the 42 images that can be used" in text
    assert "lower --per-query" in text
    assert "--total" not in text
