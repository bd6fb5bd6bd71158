"""Files that hold something else than they should, pipes in their place, and values of an impossible size: one error and a hint each."""

from __future__ import annotations

import io
import json
import os
import tarfile
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from conftest import draw, refused
from tutelage.data import segmentation_set
from tutelage.data.block_cache import cache_folder
from tutelage.data.segmentation_set import read_dense_set
from tutelage.data.target_set import read_target_set
from tutelage.errors import TutelageError
from tutelage.files import write_json
from tutelage.run_folder import Run
from tutelage.study.study_page import write_study

DEEP = "[" * 100_000
DIGITS = "1" * 5000


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "PNG")
    return buffer.getvalue()


PNG = picture()
IMAGES = pa.array([{"bytes": PNG, "path": None}] * 4, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
LABELS = ["a", "a", "b", "b"]


def table(**columns: object) -> pa.Table:
    return pa.table({name: one if isinstance(one, pa.Array) else pa.array(one) for name, one in columns.items()})


def not_text() -> pa.Array:
    """Four texts, one of which is not UTF-8."""
    data = b"a\xffbb"
    offsets = np.array([0, 1, 2, 3, 4], np.int32)
    return pa.StringArray.from_buffers(4, pa.py_buffer(offsets.tobytes()), pa.py_buffer(data))


def described(features: str) -> pa.Table:
    """Images and whole numbers as labels, with these metadata of Hugging Face."""
    made = table(image=IMAGES, label=[0, 0, 1, 1])
    return made.replace_schema_metadata({"huggingface": features})


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (table(image=IMAGES, label=[[one] for one in LABELS]), "column label holds list"),
        (table(image=IMAGES, label=[b"a", b"a", b"b", b"b"]), "column label holds binary"),
        (
            table(image=IMAGES, label=pa.array([b"a", b"a", b"b", b"b"], pa.binary(1))),
            "column label holds fixed_size_binary",
        ),
        (table(image=IMAGES, label=[{"name": one} for one in LABELS]), "column label holds struct"),
        (table(path=[[one] for one in LABELS], label=LABELS), "column path holds list"),
        (table(path=[b"a", b"b", b"c", b"d"], label=LABELS), "column path holds binary"),
        (table(image=[[1], [2], [3], [4]], label=LABELS), "column image holds list"),
        (table(image=[1, 2, 3, 4], label=LABELS), "names 4 files that do not exist"),
        (table(image=IMAGES, label=not_text()), "column label cannot be read as text"),
        (
            pa.Table.from_arrays([IMAGES, pa.array(LABELS), pa.array(LABELS)], ["image", "label", "label"]),
            "2 columns called label",
        ),
        (
            described('{"info": {"features": {"label": {"_type": "ClassLabel", "names": 5}}}}'),
            "metadata are no list: 5",
        ),
    ],
)
def test_columns_of_another_kind(tmp_path, made, said):
    """A Parquet file whose columns hold lists, bytes or no text, or have one name twice, is one error that names the column."""
    pq.write_table(made, tmp_path / "a.parquet")
    with pytest.raises(TutelageError, match=said) as error:
        read_target_set(tmp_path / "a.parquet")
    assert error.value.hint


def test_metadata_that_cannot_be_read(tmp_path):
    """Metadata that are nested too deeply, or are of a column that is not there, count as none."""
    for features in (DEEP, '{"info": {"features": {"other": {"_type": "ClassLabel", "names": ["x", "y"]}}}}'):
        pq.write_table(described(features), tmp_path / "a.parquet")
        assert read_target_set(tmp_path / "a.parquet").classes == ("0", "1")


@pytest.mark.parametrize("dense", [False, True])
def test_damaged_pages(tmp_path, dense):
    """A Parquet file whose end is whole and whose rows are not is one error."""
    path, masks = tmp_path / "a.parquet", {"mask": IMAGES} if dense else {"label": [name * 50 for name in LABELS]}
    (tmp_path / "classes.txt").write_text("a\nb\n")
    pq.write_table(table(image=IMAGES, **masks), path, compression="none", use_dictionary=False)
    data = bytearray(path.read_bytes())
    place = pq.ParquetFile(path).metadata.row_group(0).column(2).data_page_offset
    data[place : place + 40] = b"\xff" * 40
    path.write_bytes(data)
    with pytest.raises(TutelageError, match=r"a\.parquet cannot be read") as error:
        (read_dense_set if dense else read_target_set)(path)
    assert "copy it again" in error.value.hint


def tar_of(path: Path, ending: str, text: str) -> Path:
    """A tar of four images in two classes, each image with its label beside it; the first label is `text`."""
    with tarfile.open(path, "w") as tar:
        for number, label in enumerate((text, "a", "b", "b")):
            for name, data in ((f"{number}.png", PNG), (f"{number}.{ending if not number else 'cls'}", label.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def test_labels_that_are_no_names(tmp_path):
    """A label of thousands of digits is refused as a name; a .json that is nested too deeply holds no label."""
    with pytest.raises(TutelageError, match="class names of more than 1,000 characters: 1111") as error:
        read_target_set(tar_of(tmp_path / "a.tar", "cls", DIGITS))
    assert "rename these classes" in str(error.value)
    with pytest.raises(TutelageError, match="one train image"):
        read_target_set(tar_of(tmp_path / "b.tar", "json", DEEP))


# Settings


@pytest.mark.parametrize("name", ["gallery", "cache", "classes", "group-by", "out", "target"])
def test_settings_that_are_not_utf8(tutelage, task, name):
    """A path or a word that is not UTF-8 is refused with the name of its flag, and nothing is written."""
    text = refused(tutelage(*task.words("curate", f"--{name}", os.fsdecode(b"a\xff"))))
    assert text.startswith(f"error: --{name} is not valid UTF-8: 'a\\udcff'\nhint: ")
    assert text.count("error: ") == 1
    assert not task.out.parent.exists()


@pytest.mark.parametrize(
    ("words", "most"),
    [
        (("curate", "--memory", "1e300"), "1000000000"),
        (("run", "--cache-limit", "1e300"), "1000000000"),
        (("run", "--batch-size", "999999999999999999"), "65536"),
        (("run", "--steps", "9" * 30), "100000000"),
        (("run", "--epochs", "9" * 30), "1000000"),
        (("curate", "--per-query", "9" * 30), "10000000000"),
        (("predict", "--threads", "99999999"), "1024"),
    ],
)
def test_values_beyond_all_sense(tutelage, words, most, tmp_path, monkeypatch):
    """Sizes that no machine has are refused with the largest that is taken."""
    monkeypatch.chdir(tmp_path)
    needed = ("e", "i") if words[0] == "predict" else ("--target", "t", "--gallery", "g", "--out", "o")
    text = refused(tutelage(words[0], *needed, *words[1:]))
    assert text.startswith(f"error: {words[1]} {words[2]} must be less than or equal to {most}\nhint: ")
    assert text.count("error: ") == 1


@pytest.mark.parametrize("text", [DEEP, "seed = " + "[" * 100_000, f"seed = {DIGITS}"])
def test_a_config_that_cannot_be_parsed(tutelage, task, text):
    """A file of settings that is nested too deeply, or has numbers of thousands of digits, is one error."""
    (task.root / "a.toml").write_text(text)
    said = refused(tutelage(*task.words("curate", "--config", str(task.root / "a.toml"))))
    assert said.startswith(f"error: --config {task.root / 'a.toml'}: ")
    assert "hint: name a TOML file" in said


def test_seeds_and_shards_of_too_many_digits(tutelage, task):
    """Numbers of thousands of digits in lists are refused like other impossible ones."""
    words = ("compare", "--target", "t", "--gallery", "g", "--out", str(task.root / "o"))
    assert "--seeds 111" in refused(tutelage(*words, "--seeds", DIGITS))
    assert "--shard 111" in refused(tutelage(*task.words("curate", "--shard", f"{DIGITS}/{DIGITS}")))


# Pipes


def test_pipes_instead_of_files_of_data(tmp_path):
    """A pipe where a file of labelled images is expected is an error at once: nothing waits for a writer."""
    for name in ("t/x.parquet", "s/classes.txt", "s/list.csv", "u/x.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        os.mkfifo(tmp_path / name)
    with pytest.raises(TutelageError, match=r"x\.parquet cannot be read: not a regular file"):
        read_target_set(tmp_path / "t")
    with pytest.raises(TutelageError, match=r"classes\.txt cannot be read: not a regular file"):
        read_dense_set(tmp_path / "s")
    os.remove(tmp_path / "s" / "classes.txt")
    (tmp_path / "s" / "classes.txt").write_text("a\nb\n")
    with pytest.raises(TutelageError, match=r"list\.csv cannot be read: not a regular file"):
        read_dense_set(tmp_path / "s" / "list.csv")
    with pytest.raises(TutelageError, match="not a regular file"):
        read_target_set(tmp_path / "u" / "x.tar")


def test_pipes_instead_of_vectors(tutelage, task):
    """A pipe where precomputed embeddings or their names are expected is an error at once."""
    pipe = task.root / "e.npy"
    words = task.words("curate", "--strategy", "best", "--total", "20", "--embeddings", str(pipe))
    os.mkfifo(pipe)
    assert "e.npy is not a regular file" in refused(tutelage(*words))
    pipe.unlink()
    np.save(pipe, np.zeros((2, 3), np.float32))
    os.mkfifo(task.root / "e.txt")
    assert "e.txt is not a regular file" in refused(tutelage(*words))


def test_pipes_instead_of_files_of_ours(tutelage, task):
    """A pipe, or a device that never ends, in the place of a file that tutelage wrote, or that the user names, is an error at once."""
    for name in (
        "a.toml",
        "run/settings.toml",
        "made/curate/result.json",
        "export/export.json",
        "study/study.toml",
        "lock/.lock",
    ):
        (task.root / name).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(task.root / name)
    entry = cache_folder(task.root / "cache", "images", "images", {"a": 1})
    (entry / "about.json").unlink()
    os.mkfifo(entry / "about.json")
    assert "a.toml: not a regular file" in refused(tutelage("run", "--config", str(task.root / "a.toml")))
    assert "/dev/zero: not a regular file" in refused(tutelage("compare", "/dev/zero"))
    assert "(export.json: not a regular file)" in refused(
        tutelage("predict", str(task.root / "export"), str(task.gallery), "--out", str(task.root / "a.csv"))
    )
    assert "contains other files, such as settings.toml" in refused(tutelage("evaluate", str(task.root / "run")))
    with pytest.raises(TutelageError, match=r"settings\.toml is not as tutelage wrote it: not a regular file"):
        Run(task.root / "run").settings()
    (task.root / "made" / "settings.toml").write_text(
        '[settings]\nseed = 0\n[versions]\ntutelage = "0"\n[machine]\nthreads = 1\n'
    )
    assert "curate/result.json is not as tutelage wrote it" in refused(tutelage("evaluate", str(task.root / "made")))
    with pytest.raises(
        TutelageError, match=r"study\.toml is not as `tutelage compare` wrote it \(not a regular file\)"
    ):
        write_study(task.root / "study")
    assert "a .lock that cannot be read: not a regular file" in refused(
        tutelage(*task.words("curate", "--out", str(task.root / "lock")))
    )
    done = tutelage("cache", "--cache", str(task.root / "cache"), "--json")
    assert json.loads(done.stdout)["entries"] == []


# Files of a run and of the cache


@pytest.mark.parametrize("text", ['{"a": 1}', "[]", DEEP])
def test_a_result_of_something_else(tutelage, tmp_path, text):
    """A result.json with other contents is one error that names it."""
    (tmp_path / "settings.toml").write_text(
        '[settings]\nseed = 0\n[versions]\ntutelage = "0"\n[machine]\nthreads = 1\n'
    )
    (tmp_path / "curate").mkdir()
    (tmp_path / "curate" / "result.json").write_text(text)
    assert "curate/result.json is not as tutelage wrote it" in refused(tutelage("evaluate", str(tmp_path)))


def test_settings_that_are_no_tables(tutelage, task):
    """A settings.toml with values where tables are expected is one error."""
    task.out.mkdir(parents=True)
    (task.out / "settings.toml").write_text('settings = 5\n[versions]\ntutelage = "0"\n')
    assert "settings is not a table" in refused(tutelage(*task.words("curate")))


def test_the_cache_beside_a_writer(tutelage, tmp_path):
    """`cache` lists what is there while another process adds and removes blocks."""
    entry = cache_folder(tmp_path, "images", "decoded images", {"a": 1})
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            write_json(entry / "more" / f"{(number := number + 1) % 50}.json", number)
            (entry / "more" / f"{(number + 25) % 50}.json").unlink(missing_ok=True)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(20):
            done = tutelage("cache", "--cache", str(tmp_path), "--json")
            assert done.returncode == 0, done.stderr
            assert [one["name"] for one in json.loads(done.stdout)["entries"]] == [entry.name]
    finally:
        stop.set()
        writer.join()


# Memory


def test_masks_are_decoded_within_bounds(tmp_path, monkeypatch):
    """Masks are examined a few at a time, by how much memory decoding takes, not by how many cores there are."""
    (tmp_path / "classes.txt").write_text("a 0 0 0\nb 255 255 255\n")
    for number in range(6):
        draw(tmp_path / "images" / "train" / f"{number}.png", 0, number)
        pixels = np.zeros((48, 48, 3), np.uint8)
        pixels[:24] = 255
        (tmp_path / "masks" / "train").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "masks" / "train" / f"{number}.png")
    under_way, most, lock, whole = 0, 0, threading.Lock(), segmentation_set._pair

    def counted(*given: object) -> object:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        try:
            return whole(*given)
        finally:
            with lock:
                under_way -= 1

    monkeypatch.setattr(segmentation_set, "_pair", counted)
    monkeypatch.setattr("tutelage.data.image_cache.IN_FLIGHT", 1000)
    assert len(read_dense_set(tmp_path).refs) == 6
    assert most == 1
