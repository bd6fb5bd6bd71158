"""Embeddings made elsewhere, and queries of words: read as people write them, and told when they do not fit."""

from __future__ import annotations

import csv
import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import tutelage as package
from conftest import TINY_CLIP, Task
from tutelage.curation.embed import COLUMNS as EMBEDDED
from tutelage.curation.precomputed_embeddings import PrecomputedEmbeddings, names_of
from tutelage.data.block_cache import BlockCache
from tutelage.data.gallery import list_gallery
from tutelage.data.manifest import read_manifest
from tutelage.errors import TutelageError
from vectors import WIDTH, gallery_vectors, target_vectors, vector, write


def curate(task: Task, *embeddings: Path, **more) -> dict:
    """`curate` with a total of 9 labelled and 9 gallery images."""
    settings = {
        "target": str(task.target), "gallery": [str(task.gallery)], "out": str(task.out), "budget": 3, "total": 18,
        "strategy": "balanced", "embeddings": [str(path) for path in embeddings], "dedup": "none", **more,
        "teacher": "test_efficientnet", "teacher_weights": "scratch", "teacher_size": 32,
        "student": "test_resnet", "student_size": 32,
    }  # fmt: skip
    return package.curate(**settings).to_json()


def chosen(task: Task) -> list[dict]:
    table = read_manifest(task.out / "curate" / "manifest.parquet")[1].to_pylist()
    return [row for row in table if row["source"] == "gallery"]


def right(task: Task) -> float:
    """Share of chosen images that show the class of the query that brought them."""
    classes = {f"{i}.png": f"c{i % 3}" for i in range(24)}
    rows = chosen(task)
    assert len(rows) == 9
    return float(np.mean([classes[row["id"]] in row["query"].split("/")[-2:] + row["query"].split() for row in rows]))


def test_the_gallery_is_searched_by_given_vectors(task):
    """Images whose given vectors are near the labelled images' are chosen, and no teacher is asked."""
    result = curate(task, write(task.root / "all.parquet", {**gallery_vectors(), **target_vectors(task)}))
    assert right(task) == 1
    assert result["images"] == {"train": 9, "val": 0, "test": 12, "transfer": 18}
    cache = task.out.parent / "cache"
    assert not list(cache.glob("outputs-*"))
    (piece,) = cache.glob("embeddings-*/*.arrow")
    assert BlockCache(piece.parent, EMBEDDED).column(piece.stem, "features").shape[1] == WIDTH
    assert curate(task, task.root / "all.parquet")["reused"]
    write(task.root / "all.parquet", {**target_vectors(task), **gallery_vectors(), "other": vector(0, 1)})
    assert "reused" not in curate(task, task.root / "all.parquet")  # the file has changed


def test_every_way_of_writing_is_read_alike(task):
    """Parquet, .npy with a text file, .npy with Parquet, and clip-retrieval's folder give the same choice."""
    vectors = {**gallery_vectors(), **target_vectors(task)}
    root, rows = task.root, np.array(list(vectors.values()))
    ways = {"parquet": write(root / "a.parquet", vectors)}
    np.save(root / "b.npy", rows.astype(np.float64))
    (root / "b.txt").write_text("\n".join(vectors) + "\n")
    ways["text"] = root / "b.npy"
    np.save(root / "c.npy", rows)
    pq.write_table(pa.table({"path": list(vectors)}), root / "c.parquet")
    ways["table"] = root / "c.npy"
    folder = root / "clip"
    for part in ("img_emb", "text_emb", "metadata"):
        (folder / part).mkdir(parents=True)
    paths = [str((task.gallery if "/" not in name else task.target) / name) for name in vectors]
    for number, half in ((2, slice(0, 20)), (10, slice(20, None))):  # 10 comes after 2
        np.save(folder / "img_emb" / f"img_emb_{number}.npy", rows[half].astype(np.float16))
        np.save(folder / "text_emb" / f"text_emb_{number}.npy", rows[half])
        pq.write_table(pa.table({"image_path": paths[half], "caption": [""] * len(paths[half])}),
                       folder / "metadata" / f"metadata_{number}.parquet")  # fmt: skip
    ways["clip-retrieval"] = folder
    found = {}
    for name, path in ways.items():
        own = Task(task.root)
        curate(own, path, out=str(task.root / "runs" / name))
        table = read_manifest(task.root / "runs" / name / "curate" / "manifest.parquet")[1].to_pylist()
        found[name] = [(row["id"], row["query"]) for row in table]
    assert all(one == found["parquet"] for one in found.values())


def test_members_of_a_tar_go_by_their_keys(tmp_path, task):
    """An image in a tar may be called by shard and member, by its member, or by its key without a suffix."""
    shards = tmp_path / "shards"
    shards.mkdir()
    with tarfile.open(shards / "00000.tar", "w") as tar:
        for i in range(2):
            data = (task.gallery / f"{i}.png").read_bytes()
            member = tarfile.TarInfo(f"00000000{i}.png")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    refs = list_gallery([shards])[0]
    whole = str(shards / "00000.tar" / "000000001")
    assert names_of(refs[1]) == [
        f"{whole}.png", "00000.tar/000000001.png", "000000001.png", whole, "00000.tar/000000001", "000000001",
    ]  # fmt: skip
    for name in names_of(refs[1]):
        given = PrecomputedEmbeddings(
            [write(tmp_path / "keys.parquet", {"x": vector(0, 0), name: vector(1, 1)}, "key")]
        )
        assert given.find(refs, "images").tolist() == [-1, 1]
        assert given.lacks(refs[0])
        assert not given.lacks(refs[1])
        found = given.features(refs[1:], [])[0].astype(float)
        assert found / np.linalg.norm(found) == pytest.approx(vector(1, 1) / np.linalg.norm(vector(1, 1)), abs=1e-2)


def test_words_by_given_vectors(task):
    """Each class's vector brings its images, in turns; labelled and test images need no vectors then."""
    words = write(task.root / "words.parquet", {f"c{c}": 5 * vector(c, 9) for c in (2, 0, 1)}, "class")
    gallery = write(task.root / "gallery.parquet", gallery_vectors())
    result = curate(task, gallery, strategy="text", text_embeddings=str(words))
    assert right(task) == 1
    assert {row["query"] for row in chosen(task)} == {"text: c0", "text: c1", "text: c2"}
    assert result["brought"] == {"c0": 3, "c1": 3, "c2": 3}
    assert "distance" not in result
    assert (task.out / "curate" / "montage.jpg").exists()
    curate(
        task, gallery, strategy="text", text_embeddings=str(words), total=None, per_query=2, out=str(task.root / "two")
    )
    table = read_manifest(task.root / "two" / "curate" / "manifest.parquet")[1].to_pylist()
    assert sum(row["source"] == "gallery" for row in table) == 6


def test_words_by_a_clip_model(task, tiny_clip):
    """With a CLIP model the class names are the queries, in the templates that were given; another template asks anew."""
    settings = {"strategy": "text", "clip": TINY_CLIP, "clip_weights": "scratch"}
    curate(task, **settings)
    first = [(row["id"], row["query"], row["similarity"]) for row in chosen(task)]
    assert len(first) == 9
    assert {query for _, query, _ in first} == {"text: c0", "text: c1", "text: c2"}
    assert curate(task, **settings)["reused"]
    curate(task, **settings, templates=["one {} only"], out=str(task.root / "other"))
    table = read_manifest(task.root / "other" / "curate" / "manifest.parquet")[1].to_pylist()
    assert [row["similarity"] for row in table if row["source"] == "gallery"] != [s for *_, s in first]


def test_test_images_without_vectors_are_still_kept_out(task, capsys):
    """Copies of test images are found by their pixels when only the labelled images have vectors."""
    copy = (task.target / "test" / "c1" / "2.png").read_bytes()
    (task.gallery / "24.png").write_bytes(copy + b"\0")  # other bytes, the same pixels
    vectors = {**gallery_vectors(), "24.png": vector(1, 0), **target_vectors(task, ("train",))}
    curate(task, write(task.root / "train.parquet", vectors), dedup="candidates")
    assert "by their pixels only" in capsys.readouterr().err
    assert "24.png" not in {row["id"] for row in chosen(task)}
    with (task.out / "curate" / "leaks.csv").open() as file:
        assert "24.png" in {row["gallery_image"] for row in csv.DictReader(file)}


def spoilt(task: Task, what: str) -> Path:
    """A file of embeddings with one fault."""
    vectors, path = {**gallery_vectors(), **target_vectors(task)}, task.root / "bad.parquet"
    if what == "twice":
        table = {"id": ["0.png", *vectors], "v": [vector(0, 0).tolist(), *(v.tolist() for v in vectors.values())]}
        pq.write_table(pa.table(table), path)
    elif what == "names of others":
        write(path, {f"other-{i}": v for i, v in enumerate(vectors.values())})
    elif what == "gallery alone":
        write(path, gallery_vectors())
    elif what == "some labelled":
        write(path, {**gallery_vectors(), "train/c0/0.png": vector(0, 0)})
    elif what == "ragged":
        write(path, {**vectors, "0.png": vector(0, 0)[:7]})
    elif what == "no names":
        write(path, vectors, "number")
    elif what == "no vectors":
        pq.write_table(pa.table({"id": list(vectors)}), path)
    elif what == "cut":
        path.write_bytes(write(path, vectors).read_bytes()[:900])
    elif what == "cut npy":
        path = task.root / "bad.npy"
        np.save(path, np.array(list(vectors.values())))
        path.write_bytes(path.read_bytes()[:1000])
        (task.root / "bad.txt").write_text("\n".join(vectors))
    elif what == "few names":
        path = task.root / "bad.npy"
        np.save(path, np.array(list(vectors.values())))
        (task.root / "bad.txt").write_text("\n".join(list(vectors)[:-1]))
    elif what == "pickle":
        path = task.root / "bad.npy"
        np.save(path, np.array([{}, {}], dtype=object), allow_pickle=True)
        (task.root / "bad.txt").write_text("0.png\n1.png")
    return path


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("twice", "two vectors for '0.png'"),
        ("names of others", "none of its 54 names is one of the 24 gallery images"),
        ("gallery alone", "no vector for any labelled image"),
        ("some labelled", "labelled images have no vector"),
        ("ragged", "vectors of 12, 7 features|vectors of 7, 12 features"),
        ("no names", "a column of names"),
        ("no vectors", "0 columns of vectors"),
        ("cut", "a whole Parquet file"),
        ("cut npy", "a whole .npy file"),
        ("few names", "54 vectors and 53 names"),
        ("pickle", "a whole .npy file of numbers"),
        ("missing", "no such file or folder"),
    ],
)
def test_embeddings_that_do_not_fit(task, what, said):
    """Each fault of a file is told with the flag and the file, and the run folder holds no choice."""
    with pytest.raises(TutelageError, match=said):
        curate(task, spoilt(task, what), budget=6, total=24)
    assert not (task.out / "curate" / "result.json").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"strategy": "random"}, "--embeddings with --strategy random"),
        ({"strategy": "text"}, "--strategy text with --embeddings alone"),
        ({"text_embeddings": "words.parquet"}, "--text-embeddings with --strategy balanced"),
        ({"strategy": "text", "templates": ["a photo"]}, "no {} in it"),
    ],
)
def test_settings_that_contradict(task, more, said):
    """What cannot go together is told before anything is read."""
    with pytest.raises(TutelageError) as error:
        curate(task, write(task.root / "a.parquet", gallery_vectors()), **more)
    assert said in str(error.value)


def test_through_the_command(task, tutelage):
    """The flags do what the arguments do, and a fault ends with exit code 2."""
    path = write(task.root / "all.parquet", {**gallery_vectors(), **target_vectors(task)})
    words = task.words(
        "curate", "--embeddings", str(path), "--strategy", "balanced", "--total", "27", "--dedup", "none"
    )
    done = tutelage(*words)
    assert done.returncode == 0, done.stderr
    assert len(chosen(task)) == 9
    done = tutelage(*words[:-4], "--total", "27", "--embeddings", str(task.root / "none.parquet"), "--overwrite")
    assert done.returncode == 2
    assert "none.parquet: no such file or folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_one_vector_is_not_given_to_two_images(task):
    """A name that a labelled and a gallery image share is refused, whole paths tell them apart, and the same file is one image."""
    for name in ("train/c0/0.png", "train/c1/0.png"):
        (task.gallery / name).parent.mkdir(parents=True)
        (task.gallery / name).write_bytes((task.gallery / f"{len(name) % 24}.png").read_bytes() + bytes(len(name)))
    vectors = {**gallery_vectors(), **target_vectors(task)}
    with pytest.raises(TutelageError, match=r"names train/c0/0\.png of the"):
        curate(task, write(task.root / "short.parquet", vectors), budget=6, total=24)
    places = {name: task.gallery if "/" not in name else task.target for name in vectors}
    whole = {str(places[name] / name): one for name, one in vectors.items()}
    whole |= {str(task.gallery / name): vector(2, 1) for name in ("train/c0/0.png", "train/c1/0.png")}
    curate(task, write(task.root / "whole.parquet", whole))
    assert curate(
        task, task.root / "whole.parquet", gallery=[str(task.gallery), str(task.target)], out=str(task.root / "both")
    )["images"]


@pytest.mark.parametrize("length", [1e-9, 1e6])
def test_vectors_of_any_length(task, length):
    """Vectors that half precision cannot hold as they are bring the same images as others."""
    vectors = {**gallery_vectors(), **target_vectors(task)}
    curate(task, write(task.root / "long.parquet", {name: length * one for name, one in vectors.items()}))
    assert right(task) == 1


def test_the_cache_tells_of_them(task, tutelage):
    """`tutelage cache` lists what was made from given vectors beside the rest."""
    curate(task, write(task.root / "all.parquet", {**gallery_vectors(), **target_vectors(task)}))
    done = tutelage("cache", "--cache", str(task.out.parent / "cache"))
    assert done.returncode == 0, done.stderr
    assert "embeddings made elsewhere" in done.stdout


def test_without_a_number_nothing_is_searched(task):
    """`--embeddings` with the default strategy and no --total is told before an image is read; a teacher's weights are not asked for."""
    path = write(task.root / "all.parquet", {**gallery_vectors(), **target_vectors(task)})
    with pytest.raises(TutelageError, match="--embeddings with --strategy all"):
        curate(task, path, strategy="auto", total=None)
    assert not (task.out.parent / "cache").exists()
    assert curate(task, path, teacher_weights="pretrained", teacher="vit_tiny_patch16_224", teacher_size=None)["images"]
