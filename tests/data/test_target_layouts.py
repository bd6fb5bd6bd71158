"""What lies where in a target set: names of shards, files beside folders, lists without names of columns."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_target_set import PNG, counts, listed, message, put, shard

from tutelage.data.target_set import read_target_set


def test_a_list_without_names_of_columns_has_two(tmp_path):
    """A list with splits but no line that names its columns is refused: its test images would be trained on."""
    rows = "".join(f"{i}.png,{'ab'[i % 2]},{'test' if i < 4 else 'train'}\n" for i in range(8))
    text = message(listed(tmp_path, rows))
    assert "has 3 columns, but no line that names them: it begins with 0.png, a, test" in text
    assert counts(read_target_set(listed(tmp_path, f"path,label,split\n{rows}")))["test", "a"] == 2


@pytest.mark.parametrize("mark", [" ", "|", ":"])
def test_columns_with_another_mark_between(tmp_path, mark):
    """A list whose columns have another mark between them is told which marks are read, with or without names of the columns."""
    for text in (f"0.png{mark}a\n1.png{mark}b\n", f"path{mark}label\n0.png{mark}a\n"):
        assert "separate columns by commas, semicolons or tabs" in message(listed(tmp_path, text))


def test_a_row_without_a_path(tmp_path):
    """Rows without a path are counted, not named as files that do not exist."""
    rows = "".join(f"{i}.png,{'ab'[i % 2]}\n" for i in range(8))
    text = message(listed(tmp_path, f"path,label\n{rows},a\n"))
    assert "has 1 row without a path" in text
    assert "not exist" not in text


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("imagenet1k-train-0000", "imagenet1k-validation-00"),
        ("train2017", "val2017"),
        ("cifar10_train", "cifar10_test"),
        ("train0", "test0"),
        ("my train", "my testing"),
        ("train-00000-of-00001", "test-00000-of-00001"),
    ],
)
@pytest.mark.parametrize("form", ["parquet", "tar"])
def test_splits_in_the_names_of_shards(tmp_path, train, test, form):
    """A split is read from a shard's name wherever it stands in it; a word inside counts only where the shards are of several splits."""
    for name in (train, test):
        if form == "parquet":
            shard(tmp_path / f"{name}.parquet", ["a", "b"] * 4)
        else:
            webdataset(tmp_path / f"{name}.tar", ["a", "b"] * 4)
    other = "val" if "val" in test else "test"
    given = {} if other == "test" else {"test": 0.3}
    found = read_target_set(tmp_path, **given)
    assert sum(count for (split, _), count in counts(found).items() if split == other) == 8
    (tmp_path / f"{test}.{form}").rename(tmp_path / f"{train}-1.{form}")
    assert counts(read_target_set(tmp_path, test=0.25)) == {
        ("train", "a"): 6,
        ("train", "b"): 6,
        ("test", "a"): 2,
        ("test", "b"): 2,
    }


def test_a_shard_whose_name_says_no_split_beside_others_that_do(tmp_path):
    """A shard that says no split beside one that does is asked about: dev.tar would be trained on."""
    for name in ("train", "dev"):
        webdataset(tmp_path / f"{name}.tar", ["a", "b"] * 4)
    assert "dev.tar says no split, but train.tar beside it does" in message(tmp_path)


def test_shards_about_a_crash_test(tmp_path):
    """A word inside the names of all shards is what they are about, not their split."""
    for number in range(2):
        webdataset(tmp_path / f"crash-test-{number}.tar", ["a", "b"] * 4)
    assert (
        sum(count for (split, _), count in counts(read_target_set(tmp_path, test=0.25)).items() if split == "train")
        == 12
    )


def webdataset(path: Path, labels: list[str], **more: bytes) -> Path:
    """A tar with a .cls beside each image. more: other members, dots as double underscores."""
    path.parent.mkdir(parents=True, exist_ok=True)
    members = {
        f"{i:03}.{end}": data for i, one in enumerate(labels) for end, data in (("png", PNG), ("cls", one.encode()))
    }
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as tar:
        for name, data in {**members, **{name.replace("__", "."): data for name, data in more.items()}}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_what_lies_beside_what_is_read_is_named(tmp_path):
    """Images, shards and archives beside folders of splits, and folders beside shards, are named where they are not read."""
    put(tmp_path / "splits", {f"{split}/{name}": 3 for split in ("train", "val") for name in "ab"})
    webdataset(tmp_path / "splits" / "test.tar", ["a", "b"])
    (tmp_path / "splits" / "loose.png").write_bytes(PNG)
    (tmp_path / "splits" / "more.zip").write_bytes(b"PK")
    (tmp_path / "splits" / "README.md").write_text("-")
    notes = "\n".join(read_target_set(tmp_path / "splits").notes)
    assert "files beside train that are not read: loose.png, more.zip, test.tar" in notes
    put(tmp_path / "shards", {"a": 3, "b": 3})
    shard(tmp_path / "shards" / "x.parquet", ["q", "r"] * 4)
    found = read_target_set(tmp_path / "shards")
    assert found.classes == ("q", "r")
    assert "folders beside x.parquet that are not read: a, b" in "\n".join(found.notes)


def test_embeddings_beside_class_folders(tmp_path):
    """A Parquet file without images, beside folders of classes, stops nothing; it is named as not used."""
    put(tmp_path, {"a": 3, "b": 3})
    pq.write_table(pa.table({"embedding": [[0.5, 0.25]]}), tmp_path / "embeddings.parquet")
    found = read_target_set(tmp_path)
    assert found.classes == ("a", "b")
    assert [one.id for one in found.rejected] == ["embeddings.parquet"]


@pytest.mark.parametrize("name", ["c.parquet", "c.tar", "c.jpg", "TRAIN.PARQUET"])
def test_folders_called_like_files(tmp_path, name):
    """A folder is a class whatever its name ends with."""
    put(tmp_path, {"b": 3, name: 3})
    assert set(read_target_set(tmp_path).classes) == {"b", name}


def test_shards_in_capitals(tmp_path):
    """The ending of a shard may be in capitals."""
    shard(tmp_path / "TRAIN.PARQUET", ["a", "b"] * 4)
    assert read_target_set(tmp_path).classes == ("a", "b")


@pytest.mark.parametrize("split", ["", "train/"])
def test_tars_beside_folders_without_images(tmp_path, split):
    """Tars are read though a folder lies beside them, as a run does after the first command; not if it holds images."""
    webdataset(tmp_path / f"{split}0.tar", ["a", "b"] * 4)
    (tmp_path / f"{split}logs").mkdir()
    (tmp_path / f"{split}runs" / "curate").mkdir(parents=True)
    (tmp_path / f"{split}runs" / "settings.toml").write_text('[versions]\ntutelage = "0.1.0"\n')
    (tmp_path / f"{split}runs" / "curate" / "montage.jpg").write_bytes(PNG)
    assert len(read_target_set(tmp_path).refs) == 8


def test_other_pictures_of_a_sample(tmp_path):
    """A mask or thumbnail in a WebDataset sample is not one more image of its class; a dot in a name alone changes nothing."""
    webdataset(tmp_path / "0.tar", ["a", "b"] * 4, **{f"{i:03}__seg__png": PNG for i in range(8)})
    found = read_target_set(tmp_path)
    assert len(found.refs) == 8
    assert not any(".seg." in ref.id for ref in found.refs)
    assert len(found.rejected) == 8


def test_numbers_and_names_in_one_tar(tmp_path):
    """Where samples have a .cls and some a .json too, the classes are those of the .cls; whole floats in JSON are numbers."""
    webdataset(tmp_path / "both" / "0.tar", ["0", "1"] * 4, **{"000__json": b'{"label": "cat"}'})
    assert read_target_set(tmp_path / "both").classes == ("0", "1")
    more = {f"{i:03}__json": b'{"label": %d.0}' % (i % 2) for i in range(8)}
    webdataset(tmp_path / "json" / "0.tar", [""] * 8, **more)
    assert read_target_set(tmp_path / "json").classes == ("0", "1")


@pytest.mark.parametrize(
    ("folder", "text"), [("recycler", "name = 'x'\n"), ("study", "name = 'x'\n"), ("study", "[study]\nname = 'x'\n")]
)
def test_classes_that_are_called_like_other_things(tmp_path, folder, text):
    """A class of recycling bins is a class, and so is a folder in which another program keeps a study.toml."""
    put(tmp_path, {"b": 3, folder: 3})
    (tmp_path / "study" / "study.toml").write_text(text) if folder == "study" else None
    assert set(read_target_set(tmp_path).classes) == {"b", folder}


def test_classes_of_a_split_that_is_replaced(tmp_path):
    """A class that only the target's own test images have is none where --test names other images."""
    put(tmp_path / "own", {"train/a": 3, "train/b": 3, "test/a": 1, "test/c": 1})
    put(tmp_path / "other", {"a": 2, "b": 2})
    assert read_target_set(tmp_path / "own", test=tmp_path / "other").classes == ("a", "b")


def test_a_folder_whose_name_is_a_number(tmp_path, monkeypatch):
    """--test 2012, where there is a folder of that name, is told how to name it."""
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "train", {"a": 3, "b": 3})
    (tmp_path / "2012").mkdir()
    assert "use, for example, --test ./2012" in message("train", test="2012")
