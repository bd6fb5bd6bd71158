"""The target set: every form, every split rule, every fault; budgets and folds."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from conftest import DATA, draw
from tutelage.data.label_budget import draw_budget, folds, shortfalls
from tutelage.data.sources import read_bytes
from tutelage.data.target_set import TargetSet, read_any, read_target_set
from tutelage.deploy.runtime import file_bytes
from tutelage.errors import TutelageError, Unreadable, rendered
from tutelage.models.aliases import weights_path


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "PNG")
    return buffer.getvalue()


PNG = png()


def put(root: Path, counts: dict[str, int], start: int = 0) -> Path:
    """Folders with that many images each."""
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(start, start + count):
            (root / folder / f"{i:03}.png").write_bytes(PNG)
    return root


def listed(root: Path, text: str, name: str = "list.csv") -> Path:
    """A list, and an empty image for every cell that looks like one."""
    root.mkdir(parents=True, exist_ok=True)
    for word in text.replace("\n", ",").replace(";", ",").replace("\r", ",").split(","):
        if word.strip().endswith((".png", ".jpg")):
            (root / word.strip()).parent.mkdir(parents=True, exist_ok=True)
            (root / word.strip()).write_bytes(PNG)
    (root / name).write_bytes(text.encode())
    return root / name


def shard(path: Path, labels: list, names: list[str] | None = None, **columns: list) -> Path:
    """A Parquet file as Hugging Face writes it."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": PNG, "path": None} for _ in labels], kind)
    table = pa.table({"image": images, "label": labels, **columns})
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({b"huggingface": json.dumps({"info": {"features": features}}).encode()})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


def counts(found: TargetSet) -> dict[tuple[str, str], int]:
    return dict(
        Counter((s, found.classes[i]) for s, i in zip(found.splits.tolist(), found.labels.tolist(), strict=True))
    )


def ids(found: TargetSet, split: str) -> set[str]:
    return {ref.id for ref, s in zip(found.refs, found.splits, strict=True) if s == split}


def message(*args, **kwargs) -> str:
    with pytest.raises(TutelageError) as caught:
        read_target_set(*args, **kwargs)
    return rendered(caught.value)


def test_split_folders(tmp_path: Path):
    """train, val (or valid, validation) and test folders are the splits; classes are sorted; strays are told."""
    for word in ("val", "valid", "Validation"):
        root = put(tmp_path / word, {"train/b": 3, "train/a/deep": 2, f"{word}/a": 1, "test/b": 2, "other/x": 1})
        (root / "train" / "stray.png").write_bytes(PNG)
        found = read_target_set(root)
        assert found.task == "classification"
        assert found.classes == ("a", "b")
        assert counts(found) == {("train", "b"): 3, ("train", "a"): 2, ("val", "a"): 1, ("test", "b"): 2}
        assert found.labels.dtype == np.int64
        assert set(found.groups) == {""}
        assert "train/a/deep/000.png" in ids(found, "train")
        assert [(r.id, r.reason) for r in found.rejected] == [("train/stray.png", "lies in no class folder")]
        assert found.notes[0].endswith(": other")


def test_a_plain_folder_is_split_and_says_so(tmp_path: Path):
    """Without a test split a fifth of every class is held out, the same images every time, and a note says so."""
    root = put(tmp_path / "pets", {"cat": 10, "dog": 20})
    found = read_target_set(root)
    assert counts(found) == {("train", "cat"): 8, ("train", "dog"): 16, ("test", "cat"): 2, ("test", "dog"): 4}
    assert "no test split is given" in " ".join(found.notes)
    assert "test: 6 of the train images (20% of each class)" in " ".join(found.notes)
    assert ids(read_target_set(str(root)), "test") == ids(found, "test")
    moved = put(tmp_path / "elsewhere", {"cat": 10, "dog": 20})
    assert ids(read_target_set(moved), "test") == ids(found, "test")
    with_val = read_target_set(root, val="0.25")
    assert ids(with_val, "test") == ids(found, "test")
    assert counts(with_val)["val", "dog"] == 4
    more = read_target_set(put(root, {"cat": 5}, start=50))
    assert len(ids(more, "test") & ids(found, "test")) >= 4


@pytest.mark.parametrize("form", ["folder", "list", "parquet"])
def test_val_and_test_may_be_given_as_paths(tmp_path: Path, form: str):
    """All images of the given place go to that split, instead of the target set's own, and ids stay unique."""
    root = put(tmp_path / "t", {"train/a": 4, "train/b": 4, "test/a": 3})
    place = {
        "folder": lambda: put(tmp_path / "more", {"a": 2, "b": 1}),
        "list": lambda: listed(tmp_path / "more", "path,label\n1.png,a\n2.png,a\n3.png,b\n"),
        "parquet": lambda: shard(tmp_path / "more" / "x.parquet", [1, 1, 0], ["b", "a"]),
    }[form]()
    found = read_target_set(root, test=place)
    assert counts(found) == {("train", "a"): 4, ("train", "b"): 4, ("test", "a"): 2, ("test", "b"): 1}
    assert "own 3 test images are left out" in found.notes[0]
    found = read_target_set(root / "train", test=root / "test", val=place)
    assert Counter(found.splits.tolist()) == {"train": 8, "test": 3, "val": 3}
    assert len({ref.id for ref in found.refs}) == len(found.refs) == 14
    assert "test/a/000.png" in ids(found, "test")


def test_lists(tmp_path: Path):
    """CSV lists with or without a header, with split and group, BOM, CRLF, semicolons and quotes are read."""
    rows = "1.png,a,train,g1 2.png,a,train,g1  3.png,b,train, 4.png,b,train,g2 5.png,b,valid,g3 6.png,a,test, "
    path = listed(tmp_path, "\ufeffpath,label,split,group\r\n" + rows.replace(" ", "\r\n"))
    found = read_target_set(path)
    assert found.splits.tolist() == ["train"] * 4 + ["val", "test"]
    assert found.groups.tolist() == ["g1", "g1", "", "g2", "g3", ""]
    assert found.notes == ()
    assert [ref.id for ref in found.refs] == [f"{i}.png" for i in range(1, 7)]
    listed(tmp_path, "Label;Path;x\na;1.png;\nb;./3.png;\nb;4.png;\na;2.png;\na;2.png;\n", "semi.csv")
    found = read_target_set(tmp_path / "semi.csv", test=0.3)
    assert len(found.refs) == 4
    assert "1 row repeats another row" in found.notes[0]
    assert "3.png" in {ref.id for ref in found.refs}
    (tmp_path / "a,b.png").write_bytes(PNG)
    (tmp_path / "plain.txt").write_text('"a,b.png",a\n1.png,a\n3.png,b\n4.png,b\n')
    assert "a,b.png" in {ref.id for ref in read_target_set(tmp_path / "plain.txt").refs}


def test_a_parquet_list(tmp_path: Path):
    """A Parquet file of paths and labels is a list like a CSV."""
    listed(tmp_path, "1.png,2.png,3.png,4.png,5.png")
    columns = {"path": [f"{i}.png" for i in range(1, 6)], "label": list("aabbb"), "split": ["train"] * 4 + ["test"]}
    pq.write_table(pa.table(columns), tmp_path / "l.parquet")
    assert counts(read_target_set(tmp_path / "l.parquet")) == {("train", "a"): 2, ("train", "b"): 2, ("test", "b"): 1}


def test_parquet_shards(tmp_path: Path):
    """Shards are split by their file names, classes keep the order of the metadata, rows without label are told."""
    names = ["zebra", "ape", "never", "cow"]
    shard(tmp_path / "hf" / "data" / "train-00000-of-00002.parquet", [0, 1, 3, -1], names)
    shard(tmp_path / "hf" / "data" / "train-00001-of-00002.parquet", [3, 0, 1, None], names)
    shard(tmp_path / "hf" / "data" / "validation-00000-of-00001.parquet", [0], names)
    shard(tmp_path / "hf" / "data" / "test-00000-of-00001.parquet", [1, 3], names)
    assert "1 class name of the target set has no images: 'never'" in message(tmp_path / "hf")
    found = read_target_set(tmp_path / "hf", classes=["cow", "ape", "zebra"])
    assert found.classes == ("zebra", "ape", "cow")
    assert counts(found)["train", "zebra"] == 2
    assert Counter(found.splits.tolist()) == {"train": 6, "test": 2, "val": 1}
    assert [r.reason for r in found.rejected] == ["has no label"] * 2
    for i, data in read_bytes(found.refs):
        assert data == PNG, found.refs[i]
    text = shard(tmp_path / "text.parquet", list("bbbaaa"), group=list("xyzuvw"), split=["train"] * 5 + ["test"])
    found = read_target_set(text)
    assert found.classes == ("a", "b")
    assert found.groups.tolist() == list("xyzuvw")
    assert found.splits.tolist() == ["train"] * 5 + ["test"]
    assert read_target_set(shard(tmp_path / "n.parquet", [2, 10, 2, 10, 2, 10])).classes == ("2", "10")
    shard(tmp_path / "hf" / "data" / "test-00001-of-00002.parquet", [1, 3], names[::-1])
    assert "its class names are not those of" in message(tmp_path / "hf")


def test_a_folder_of_shards_per_split(tmp_path: Path):
    """`train/*.parquet` and `test/*.parquet` are splits; bare numbers are classes though no file has all of them."""
    names = ["zebra", "ape"]
    for split in ("train", "validation", "test"):
        shard(tmp_path / "hf" / split / "0000.parquet", [0, 1, 0, 1, -1], names)
    found = read_target_set(tmp_path / "hf")
    assert found.classes == ("zebra", "ape")
    assert Counter(found.splits.tolist()) == {"train": 4, "val": 4, "test": 4}
    assert len({ref.id for ref in found.refs}) == 12
    assert "validation/0000.parquet#3" in ids(found, "val")
    assert "train/0000.parquet#4" in {bad.id for bad in found.rejected}
    shard(tmp_path / "n" / "train" / "0.parquet", [10, 10, 2])
    shard(tmp_path / "n" / "train" / "1.parquet", [2, 7, 7])
    shard(tmp_path / "n" / "test" / "0.parquet", [7])
    assert read_target_set(tmp_path / "n").classes == ("2", "7", "10")
    put(tmp_path / "mixed", {"train/ape": 2, "train/cow": 2})
    shard(tmp_path / "mixed" / "test" / "0.parquet", [1], names)
    assert read_target_set(tmp_path / "mixed").classes == ("ape", "cow")


def test_any_labelled_images_by_the_classes_of_a_run(tmp_path: Path):
    """All images of a path are read, whatever their split and form, with the numbers that the run gave its classes."""
    classes = ("dog", "cat", "owl")
    root = put(tmp_path / "t", {"train/cat": 3, "val/dog": 1, "test/cat": 1, "test/dog": 2})
    (root / "test" / "stray.png").write_bytes(PNG)
    found = read_any(root, classes)
    assert found.classes == classes
    assert counts(found) == {("train", "cat"): 3, ("val", "dog"): 1, ("test", "cat"): 1, ("test", "dog"): 2}
    assert sorted(found.labels.tolist()) == [0, 0, 0, 1, 1, 1, 1]
    assert [bad.id for bad in found.rejected] == ["test/stray.png"]
    assert read_any(put(tmp_path / "one", {"owl": 1}), classes).labels.tolist() == [2]
    assert read_any(str(listed(tmp_path / "l", "1.png,owl\n2.png,dog\n")), classes).labels.tolist() == [2, 0]
    assert read_any(shard(tmp_path / "s.parquet", [1, 0], ["cat", "dog"]), classes).labels.tolist() == [0, 1]
    put(root, {"train/cats": 1, "test/elk": 1})
    with pytest.raises(TutelageError) as caught:
        read_any(root, classes)
    assert "2 classes that the run does not have: 'cats', 'elk'" in caught.value.message
    assert caught.value.hint == "the run's classes are 'dog', 'cat', 'owl'; 'cats': did you mean 'cat'?"
    with pytest.raises(TutelageError, match="no such file or folder"):
        read_any(tmp_path / "tt", classes)
    (tmp_path / "empty").mkdir()
    with pytest.raises(TutelageError, match="no labelled images"):
        read_any(tmp_path / "empty", classes)


def test_a_fraction_does_not_depend_on_other_places(tmp_path: Path):
    """The held-out images and the groups are the same whether or not a val place uses the same names."""
    root = put(tmp_path / "t", {"cat": 20, "dog": 20})
    for name, start in (("free", 100), ("same", 0)):
        put(tmp_path / name, {"cat": 3, "dog": 3}, start)
    alone, free = (ids(read_target_set(root, val=val, test=0.25), "test") for val in (None, tmp_path / "free"))
    same = ids(read_target_set(root, val=tmp_path / "same", test=0.25), "test")
    assert len(alone) == 10
    assert alone == free == {id.removeprefix("t/") for id in same}
    assert all(id.startswith("t/") for id in same)
    given = message(root, val=tmp_path / "same", group_by=r"^(\w+/\d+)")
    assert "6 groups are in several splits: cat/000" in given


def test_classes_may_be_chosen(tmp_path: Path):
    """Only the named classes are kept, in the order of the class list; an unknown name is told with the nearest."""
    root = put(tmp_path, {"cat": 5, "dog": 5, "horse": 5})
    found = read_target_set(root, classes=["horse", "cat"])
    assert found.classes == ("cat", "horse")
    assert set(found.labels.tolist()) == {0, 1}
    text = message(root, classes=["hors", "dgo"])
    assert all(f"did you mean '{name}'?" in text for name in ("horse", "dog"))


def test_groups_are_kept_whole(tmp_path: Path):
    """Groups come from the ids by a regular expression, and held-out fractions never divide one."""
    root = tmp_path / "g"
    for name in ("cat", "dog"):
        for patient in range(10):
            (root / name).mkdir(parents=True, exist_ok=True)
            for i in range(1 + patient % 3):
                (root / name / f"{name[0]}{patient}_{i}.png").write_bytes(PNG)
    found = read_target_set(root, group_by=r"/(\w\d)_", val=0.2)
    assert len(set(found.groups)) == 20
    for group in set(found.groups):
        assert len(set(found.splits[found.groups == group])) == 1
    assert all(counts(found)[split, name] >= 2 for split in ("train", "val", "test") for name in ("cat", "dog"))
    assert "finds nothing in 38 ids: cat/c0_0.png" in message(root, group_by="patient-(.*)")
    other = put(tmp_path / "x", {"cat": 1, "dog": 1})
    assert set(read_target_set(root, group_by=r"c\d_|d\d_|$", test=other).groups[-2:]) == {""}


def test_few_large_groups_still_give_every_class_a_test_image(tmp_path: Path):
    """A class that consists of few large groups has its smallest one held out."""
    rows = [f"{name}{g}_{i}.png,{name},{name}{g}" for name in "ab" for g in range(2) for i in range(10 + g)]
    found = read_target_set(listed(tmp_path, "path,label,group\n" + "\n".join(rows)))
    assert set(found.groups[found.splits == "test"]) == {"a0", "b0"}


def test_settings_are_checked_before_anything_is_read(tmp_path: Path):
    """Missing paths, bad fractions and a bad pattern are told together."""
    (tmp_path / "pets").mkdir()
    text = message(tmp_path / "pest", val=1.5, test="0", group_by="(")
    assert "did you mean 'pets'?" in text
    assert "val 1.5" in text
    assert "test 0" in text
    assert "--group-by '(': missing )" in text
    assert text.count("error: ") == 4
    assert "tset: no such file" in message(tmp_path / "pets", test=str(tmp_path / "tset"))
    for bad in (1, 0.0, -0.2, float("nan"), "1e9"):
        assert "a fraction above 0 and below 1" in message(tmp_path / "pets", test=bad)


def test_faults_of_the_images(tmp_path: Path):
    """Empty folders, one class, single images, unknown classes and torn groups are errors that name them."""
    (tmp_path / "empty").mkdir()
    assert "no labelled images" in message(tmp_path / "empty")
    put(tmp_path / "stray", {"train": 2})
    assert "lies in no class folder" in message(tmp_path / "stray")
    assert "one class only (a)" in message(put(tmp_path / "one", {"a": 9}))
    assert "2 classes have one train image: a, c" in message(put(tmp_path / "few", {"a": 1, "b": 9, "c": 1}))
    root = put(tmp_path / "lack", {"train/cat": 2, "train/dog": 2, "test/cats": 2, "test/owl": 1, "val/elk": 1})
    text = message(root)
    assert "test has classes that train lacks: cats, owl" in text
    assert "did you mean 'cat'?" in text
    assert "val has classes that train lacks: elk" in text
    assert "no train images" in message(put(tmp_path / "no", {"test/a": 2, "test/b": 2}))
    assert "one of the two" in message(put(tmp_path / "two", {"train/a": 3, "train/b": 3, "test/a": 1}), test=0.2)
    rows = "1.png,a,train,g 2.png,a,train, 3.png,b,train,h 4.png,b,train, 5.png,a,test,g 6.png,b,val,h 7.png,b,test,"
    text = message(listed(tmp_path / "torn", "path,label,split,group\n" + rows.replace(" ", "\n")))
    assert "2 groups are in several splits: g (test, train), h (train, val)" in text
    same = put(tmp_path / "same", {"a": 3, "b": 3})
    assert "6 images are in two splits" in message(same, test=same)
    (tmp_path / "x.zip").write_bytes(b"")
    assert "a folder train|val|test/<class>/*" in message(tmp_path / "x.zip")


def test_faults_of_lists(tmp_path: Path):
    """Missing files are all told at once; so are missing columns, two labels for one path, and unknown splits."""
    path = listed(tmp_path, "path,label\n")
    assert "no labelled images" in message(path)
    path.write_text("path,label\n" + "".join(f"no{i:02}.png,a\n" for i in range(30)))
    text = message(path)
    assert "names 30 files that do not exist: no00.png" in text
    assert all(f"no{i:02}.png" in text for i in range(30))
    path.write_text("path,label\n" + "".join(f"no{i:03}.png,a\n" for i in range(101)))
    assert "no019.png and 81 more" in message(path)  # rejected.csv of a run lists them all
    path.write_text("path,species\n1.png,a\n")
    assert "no label column (columns: path, species)" in message(path)
    path.write_text("x,y\n1,2\n")
    assert "no path and no label column (columns: x, y)" in message(path)
    path.write_text("1.png\n2.png\n")
    assert "no label column" in message(path)
    path.write_text("")
    assert "an empty list" in message(path)
    listed(
        tmp_path,
        "path,label,split\n1.png,a,train\n./1.png,b,train\n2.png,b,dev\n3.png,,test\n4.png,a,test\n4.png,a,val\n",
    )
    text = message(path)
    assert "2 paths are listed twice with two labels, splits or groups: ./1.png, 4.png" in text
    assert "1 row without a label: 3.png" in text
    assert "column split holds 'dev'" in text
    pq.write_table(pa.table({"path": ["1.png"], "x": [1]}), tmp_path / "l.parquet")
    assert "no label column (columns: path, x)" in message(tmp_path / "l.parquet")
    (tmp_path / "l.parquet").write_bytes(b"rubbish")
    assert "whole Parquet file" in message(tmp_path / "l.parquet")


def keys(n: int) -> list[bytes]:
    return [hashlib.sha256(str(i).encode()).digest() for i in range(n)]


def test_a_budget_is_nested_and_knows_no_order():
    """A smaller budget is part of a larger one; order and other classes change nothing; seeds differ."""
    labels, names = np.arange(300) % 3, keys(300)
    small, large = draw_budget(labels, names, 5, 0), draw_budget(labels, names, 20, 0)
    assert np.bincount(labels[small]).tolist() == [5, 5, 5]
    assert set(small) < set(large)
    assert (np.diff(small) > 0).all()
    assert set(small) != set(draw_budget(labels, names, 5, 1))
    order = np.random.default_rng(0).permutation(300)
    again = draw_budget(labels[order], [names[i] for i in order], 5, 0)
    assert set(order[again]) == set(small)
    other = np.where(labels == 2, 1, labels)
    assert {i for i in draw_budget(other, names, 5, 0) if labels[i] == 0} == {i for i in small if labels[i] == 0}
    assert (
        draw_budget(labels, np.frombuffer(b"".join(names), np.uint8).reshape(-1, 32), 5, 0).tolist() == small.tolist()
    )
    assert draw_budget(labels, names, None, 0).tolist() == list(range(300))
    assert draw_budget(labels[:0], [], 5, 0, np.array([], np.str_)).tolist() == []


def test_a_budget_spreads_over_groups():
    """With groups no group gives a second image before every group of the class has given one; still nested."""
    labels, groups = np.repeat([0, 1], 40), np.array([f"g{i // 10}" for i in range(80)])
    chosen = draw_budget(labels, keys(80), 4, 0, groups)
    assert len(set(groups[chosen])) == 8
    assert set(chosen) < set(draw_budget(labels, keys(80), 6, 0, groups))
    alone = draw_budget(labels, keys(80), 4, 0, np.full(80, ""))
    assert alone.tolist() == draw_budget(labels, keys(80), 4, 0).tolist()


def test_shortfalls_name_the_classes():
    """Classes with fewer images than the budget are told with both numbers."""
    labels = np.array([0, 0, 0, 2])
    assert shortfalls(labels, 2, ["a", "b", "c"]) == [
        "class 'b' has 0 train images, fewer than the budget of 2",
        "class 'c' has 1 train images, fewer than the budget of 2",
    ]
    assert shortfalls(labels, None, ["a", "b", "c"]) == []


def test_folds_are_stratified():
    """Five folds with equally many of every class, two when a class has under five; the same for the same seed."""
    labels = np.repeat([0, 1, 2], [10, 25, 7])
    fold = folds(labels, None, 0)
    for label in range(3):
        per_fold = np.bincount(fold[labels == label], minlength=5)
        assert per_fold.max() - per_fold.min() <= 1
        assert len(per_fold) == 5
    assert np.ptp(np.bincount(fold)) <= 1
    assert np.array_equal(fold, folds(labels, np.full(42, ""), 0))
    assert not np.array_equal(fold, folds(labels, None, 1))
    few = folds(np.repeat([0, 1, 2], [10, 4, 1]), None, 0)
    assert [np.bincount(part).tolist() for part in (few[:10], few[10:14])] == [[5, 5], [2, 2]]
    assert folds(labels[:0], None, 0).shape == (0,)


def test_folds_keep_groups_whole():
    """All images of a group are in one fold; under five groups in a class make two folds; one group is still placed."""
    rng = np.random.default_rng(0)
    groups = np.array([f"g{g}" for g in rng.integers(0, 40, 400)])
    labels = np.array([int(g[1:]) % 4 for g in groups])
    fold = folds(labels, groups, 0)
    assert set(fold) == set(range(5))
    assert all(len(set(fold[groups == g])) == 1 for g in set(groups))
    for label in range(4):
        assert np.bincount(fold[labels == label], minlength=5).min() >= 10
    labels, groups = np.repeat([0, 1], [12, 6]), np.array([f"a{i // 3}" for i in range(12)] + ["b"] * 6)
    fold = folds(labels, groups, 3)
    assert set(fold) == {0, 1}
    assert np.bincount(fold[:12]).tolist() == [6, 6]
    assert len(set(fold[12:])) == 1


@pytest.mark.skipif(not (DATA / "cifar10").is_dir(), reason=f"no cifar10 in {DATA}")
def test_cifar10():
    """Real shards of Hugging Face give 50,000 train and 10,000 test images of ten classes in their own order."""
    found = read_target_set(DATA / "cifar10")
    assert Counter(found.splits.tolist()) == {"train": 50_000, "test": 10_000}
    assert " ".join(found.classes) == "airplane automobile bird cat deer dog frog horse ship truck"
    assert (found.notes, found.rejected) == ((), ())
    some = found.refs[::997]
    assert all(isinstance(data, bytes) and data[:2] == b"\xff\xd8" for _, data in read_bytes(some))
    chosen = draw_budget(found.labels, [ref.fingerprint for ref in found.refs], 10, 0)
    assert np.bincount(found.labels[chosen]).tolist() == [10] * 10


@pytest.mark.skipif(not (DATA / "splits").is_dir(), reason=f"no splits in {DATA}")
def test_official_lists(tmp_path: Path):
    """The official EuroSAT lists parse as they are, with images beside them or in a folder per class."""
    lists = {}
    for split, name in (("train", "train_10img_per_class.txt"), ("val", "train_25img_per_class.txt")):
        lists[split] = tmp_path / split / name
        lists[split].parent.mkdir()
        lists[split].write_bytes((DATA / "splits" / "EuroSAT" / name).read_bytes())
        for line in lists[split].read_text().splitlines():
            image, label = line.split(",")
            path = lists[split].parent / (image if split == "train" else f"{label}/{image}")
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(PNG)
    found = read_target_set(lists["train"], val=lists["val"], test=0.2)
    assert len(found.classes) == 10
    assert Counter(found.splits.tolist()) == {"train": 80, "val": 250, "test": 20}
    assert "names 100 files that do not exist" in message(DATA / "splits" / "EuroSAT" / "train_10img_per_class.txt")
    assert "no label column" in message(DATA / "splits" / "ADE20K" / "val.txt")


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("training", "testing"),
        ("train2017", "test2017"),
        ("Train_Set", "TEST-set"),
        ("training_images", "validation_images"),
        ("train", "Testing"),
    ],
)
def test_usual_names_of_splits(tmp_path, train: str, test: str):
    """Folders of splits under their usual names are splits, not classes."""
    put(tmp_path, {f"{train}/cat": 3, f"{train}/dog": 3, f"{test}/cat": 2, f"{test}/dog": 2})
    found = read_any(str(tmp_path), ("cat", "dog"))
    assert found.classes == ("cat", "dog")
    whole = read_target_set(str(tmp_path))
    other = "val" if test.startswith("val") else "test"
    assert Counter(whole.splits.tolist())[other] == 4


def test_classes_that_are_called_like_splits(tmp_path):
    """A class called training, alone among other classes, stays a class."""
    put(tmp_path, {"cooking": 5, "training": 5, "sleeping": 5})
    assert read_target_set(str(tmp_path)).classes == ("cooking", "sleeping", "training")


def test_folders_of_storage_systems_are_no_classes(tmp_path):
    """What a NAS, an archive or a recycle bin leaves beside splits and classes, and inside them, is passed over."""
    left = (
        *(
            "@eaDir",
            "@Recycle",
            "#recycle",
            "#snapshot",
            "@Recently-Snapshot",
            "__MACOSX",
            "Temporary Items",
            "lost+found",
        ),
        *("$RECYCLE.BIN", "RECYCLER", "System Volume Information", "__pycache__", ".Trash-1000", ".ipynb_checkpoints"),
    )
    for prefix in ("", "train/", "test/"):
        put(tmp_path / prefix[:1], {f"{prefix}{name}": 4 for name in ("cat", "dog")})
        put(tmp_path / prefix[:1], {f"{inside}{name}": 1 for name in left for inside in ("", prefix, f"{prefix}cat/")})
    for place, count in ((tmp_path / "t", 16), (tmp_path / "t" / "test", 8)):
        found = read_target_set(place)
        assert (found.classes, len(found.refs)) == (("cat", "dog"), count)
    put(tmp_path / "trains", {"train": 4, "train/@eaDir": 1, "bus": 4})
    assert read_target_set(tmp_path / "trains").classes == ("bus", "train")
    members = {f"{folder}{i}.{ending}": data for folder in ("", "__MACOSX/", "@eaDir/") for i in range(8)
               for ending, data in (("png", PNG), ("cls", str(i % 2).encode()))}  # fmt: skip
    assert len(read_target_set(tar_of(tmp_path / "tars" / "0.tar", members)).refs) == 8


@pytest.mark.parametrize("name", ["two\nlines", "tab\tname", "next\x85line", "page\u2028break", " "])
def test_names_that_a_line_of_text_cannot_hold(tmp_path, name):
    """A class is refused if its name could not be written to labels.txt and read back the same; the name is shown in ASCII."""
    said = message(put(tmp_path, {"cat": 5, "dog": 5, name: 5}))
    assert "blank, not valid Unicode, or hold control characters" in said
    assert ascii(name) in said
    assert "not valid Unicode" in message(
        shard(tmp_path / "shards" / "a.parquet", [0, 0, 1, 1], ["cat", "lone \ud800"])
    )


@pytest.mark.parametrize("other", ["New  York", "New York ", "New\u00a0York"])
def test_names_that_look_the_same(tmp_path, other):
    """Classes whose names differ in blanks or in the form of their letters only are refused; unusual names on their own are kept."""
    put(tmp_path, {"New York": 5, "Paris": 5, other: 5})
    assert "differ in blanks, invisible characters or Unicode form only" in message(tmp_path)
    names = ["caf\u00e9", "cafe\u0301"]
    assert "differ in blanks, invisible characters or Unicode form only" in message(
        shard(tmp_path / "shards" / "a.parquet", [0, 0, 1, 1], names)
    )
    put(tmp_path / "kept", {other: 5, "Paris": 5, " one": 5})
    assert read_target_set(str(tmp_path / "kept")).classes == tuple(sorted((other, "Paris", " one")))


@pytest.mark.parametrize("more", ["\u200b", "\ufeff", "\u00ad", "\u202e", "\u2060", "\ufe0f", "\u3164", "\u200d"])
def test_names_that_differ_in_nothing_that_is_seen(tmp_path, more):
    """Characters that show as nothing tell no classes apart, and make no name alone; where no other class looks the same they stay."""
    put(tmp_path / "alike", {"owl": 4, f"o{more}wl": 4})
    said = message(tmp_path / "alike")
    assert "differ in blanks, invisible characters or Unicode form only" in said
    assert ascii(f"o{more}wl") in said
    put(tmp_path / "alone", {"owl": 4, more: 4})
    assert "blank" in message(tmp_path / "alone")
    put(tmp_path / "kept", {"elk": 4, f"o{more}wl": 4})
    assert f"o{more}wl" in read_target_set(tmp_path / "kept").classes


def test_joined_and_tagged_emoji_are_different_classes(tmp_path):
    """Emoji and words that need joiners, and flags that differ in their tags, are names like others."""
    flags = [f"\U0001f3f4{''.join(chr(0xE0000 + ord(one)) for one in land)}\U000e007f" for land in ("gbeng", "gbsct")]
    names = ["\U0001f468\u200d\U0001f33e", "\U0001f468", "\u0928\u094d\u200d\u092f", *flags]
    assert set(read_target_set(put(tmp_path, dict.fromkeys(names, 4))).classes) == set(names)


def test_folders_whose_names_are_not_utf8(tmp_path):
    """A class folder in another encoding is refused by its bytes; photos with such names are read."""
    put(tmp_path, {"train/elk": 4, "train/owl": 4})
    (tmp_path / "train" / "owl" / os.fsdecode(b"\xfcber.png")).write_bytes(PNG)
    assert len(read_target_set(tmp_path).refs) == 9
    (tmp_path / "train" / os.fsdecode(b"m\xf6we")).mkdir()
    assert r"class folders whose names are not UTF-8: b'm\xf6we'" in message(tmp_path)


def test_lists_that_are_not_utf8(tmp_path):
    """A list in another encoding is refused with its first such line, whatever its kind."""
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(PNG)
    text = "path,label\n0.png,elk\n1.png,elk\n2.png,Möwe\n3.png,Möwe\n"
    for name, coding in (("a.csv", "latin-1"), ("b.txt", "cp437"), ("c.tsv", "utf-16")):
        (tmp_path / name).write_bytes(text.replace(",", "\t" if name == "c.tsv" else ",").encode(coding))
        assert f"{name} is not UTF-8: line {1 if coding == 'utf-16' else 4} is b'" in message(tmp_path / name)
    column = pa.array([b"elk", b"elk", b"M\xf6we", b"M\xf6we"]).view(pa.string())
    pq.write_table(pa.table({"path": [f"{i}.png" for i in range(4)], "label": column}), tmp_path / "d.parquet")
    assert "d.parquet: column label cannot be read as text" in message(tmp_path / "d.parquet")


def test_labels_of_a_list_are_those_of_a_parquet_file(tmp_path):
    """Labels keep their blanks in both, so that those that differ in blanks only are refused in both; the blank after a comma is none."""
    rows = {"path": [f"{i}.png" for i in range(4)], "label": ["owl ", "owl ", "elk", "elk"]}
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(PNG)

    def written(labels: list[str]) -> list[Path]:
        pq.write_table(pa.table({**rows, "label": labels}), tmp_path / "l.parquet")
        lines = [f'{path}, "{label}"' for path, label in zip(rows["path"], labels, strict=True)]
        (tmp_path / "l.csv").write_text("\n".join(["path, label", *lines]))
        return [tmp_path / "l.parquet", tmp_path / "l.csv"]

    for place in written(rows["label"]):
        assert read_target_set(place).classes == ("elk", "owl ")
    for place in written(["owl ", "owl", "elk", "elk"]):
        assert "'owl' and 'owl '" in message(place)


def test_labels_in_tars_are_utf8(tmp_path):
    """A .cls or .json that is not UTF-8 is refused by its name; what is UTF-8 keeps its blanks, but not the end of its line."""

    def shard_of(labels: dict[str, bytes]) -> Path:
        with tarfile.open(tmp_path / "s.tar", "w") as tar:
            for stem, label in enumerate(labels.items()):
                for name, data in ((f"{stem}.png", PNG), (f"{stem}.{label[0][0]}", label[1])):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        return tmp_path / "s.tar"

    for ending, label in (("cls", b"M\xf6we\n"), ("json", b'{"label": "M\xf6we"}')):
        assert f"s.tar: 1.{ending} is not UTF-8" in message(shard_of({("cls", 0): b"elk", (ending, 1): label}))
    good = {
        ("cls", 0): b"\xef\xbb\xbfelk\r\n",
        ("json", 1): b'{"label": "elk"}',
        ("cls", 2): b"owl \n",
        ("cls", 3): b"owl ",
    }
    assert read_target_set(shard_of(good)).classes == ("elk", "owl ")


def test_a_class_in_another_unicode_form_is_told_with_its_code_points(tmp_path):
    """What only looks the same as a class of the run is told apart by code points."""
    put(tmp_path, {"M\u006f\u0308we": 1, "elk": 1})
    with pytest.raises(TutelageError) as caught:
        read_any(tmp_path, ("M\u00f6we", "elk"))
    assert (
        r"'Mo\u0308we' and 'M\xf6we' differ in blanks, invisible characters or Unicode form only" in caught.value.hint
    )


def test_pipes_are_not_waited_for(tmp_path):
    """A named pipe given as list, weights or image is an error, or a rejected image, at once: nothing waits for a writer."""
    pipes = [tmp_path / name for name in ("list.csv", "weights.safetensors", "photo.jpg")]
    for pipe in pipes:
        os.mkfifo(pipe)
    with pytest.raises(TutelageError, match="regular file"):
        read_any(str(pipes[0]), ("cat",))
    with pytest.raises(TutelageError, match="regular file"):
        weights_path(str(pipes[1]))
    with pytest.raises(Unreadable, match="regular file"):
        file_bytes(str(pipes[2]))


@pytest.mark.parametrize(
    "folders",
    [
        ("animal/cat", "animal/dog", "plant/rose", "plant/oak"),  # classes in groups
        ("Art/bike", "Art/desk", "Clipart/bike", "Clipart/desk"),  # classes of each domain
        ("cat/2021", "cat/2022", "dog"),  # sessions of one class
        ("train/animal/cat", "train/animal/dog", "train/plant", "test/animal/cat", "test/plant"),
        ("animal/images/cat", "animal/images/dog", "plant/images/rose"),  # folders that say nothing between them
        ("animal/pets/cat", "animal/wild/cat", "plant/green/herbs/rose", "plant/green/herbs/oak"),
        ("cat/2021/0.tar", "cat/2022/0.tar", "dog"),
    ],
)
def test_folders_inside_class_folders(tmp_path, folders):
    """Whether folders of images inside a class folder are classes is asked, in one error; --group-by answers that they are not."""
    put(tmp_path, dict.fromkeys(folders, 6))
    with pytest.raises(TutelageError, match="has no images of its own, but folders of images") as error:
        read_target_set(tmp_path)
    assert "move these folders up" in error.value.hint
    assert all(
        word in error.value.hint for word in ("a list (.csv)", "which also keeps each folder's images in one split")
    )
    found = read_target_set(tmp_path, group_by=group_by_of(error.value))
    assert set(found.classes) == {name.removeprefix("train/").removeprefix("test/").split("/")[0] for name in folders}
    assert len(set(found.groups)) == len({name if "train/" in folders[0] else name.split("/")[-1] for name in folders})


def group_by_of(error: TutelageError) -> str:
    """The pattern that a hint proposes."""
    found = re.search("--group-by '([^']+)'", error.hint)
    assert found, error.hint
    return found[1]


@pytest.mark.parametrize(
    ("folders", "told"),
    [
        (
            ("apprentissage/cat", "essai/cat"),
            "if apprentissage is a split, call it train, val or test, with the classes in it",
        ),
        (("Training Set 1/cat", "Training Set 2/dog"), "such as train/cat"),
        (("set_a/images/cat", "set_b/images/dog"), "a list (.csv)"),
        (("train/x/cat", "train/y/dog", "test/x/cat"), "if several, move these folders up, beside x"),
        (("apprentissage/cat", "essai/dog", "figures"), "if apprentissage is a split"),
    ],
)
def test_one_folder_inside_each_class_folder_of_another_name(tmp_path, folders, told):
    """Folders that each hold one folder of images may be splits or classes: asked, and --group-by says that they are classes."""
    put(tmp_path, dict.fromkeys(folders, 4))
    with pytest.raises(TutelageError, match="has no images of its own, but folders of images") as error:
        read_target_set(tmp_path)
    assert told in error.value.hint
    found = read_target_set(tmp_path, group_by=group_by_of(error.value))
    assert set(found.classes) == {name.removeprefix("train/").removeprefix("test/").split("/")[0] for name in folders}


def test_a_stray_image_beside_the_folders(tmp_path):
    """Images beside the folders of a class folder make it no class, unless they are at least as many as those inside."""
    put(tmp_path, {"animal": 2, "animal/cat": 4, "animal/dog": 4, "plant": 5, "plant/seeds": 1, "plant/leaves": 1})
    with pytest.raises(TutelageError, match=r"animal has few images of its own, but folders of images \(cat, dog\)"):
        read_target_set(tmp_path)
    put(tmp_path, {"animal": 8})
    assert read_target_set(tmp_path).classes == ("animal", "plant")


@pytest.mark.parametrize(
    ("layout", "told"),
    [
        ("{label}/{split}", "put the splits above the classes: test/cat and train/cat"),
        ("{label}/{split}/images", "put the splits above the classes: test/cat and train/cat"),
        ("2021/{split}/{label}", "give the folder 2021 itself, which holds them: --target .../2021"),
        ("a/b/{split}/{label}", "give the folder a/b itself, which holds them: --target .../a/b"),
    ],
)
def test_splits_below_other_folders(tmp_path, layout, told):
    """Splits inside class folders, or inside one folder around them, are told where to put, or which folder to give."""
    put(
        tmp_path,
        {layout.format(label=label, split=split): 3 for label in ("cat", "dog") for split in ("train", "test")},
    )
    with pytest.raises(TutelageError, match="folders of images") as error:
        read_target_set(tmp_path)
    assert told in error.value.hint


@pytest.mark.parametrize(
    "layout", ["{0}_{1}/{0}_{1}/{2}", "{1}/{1}/{2}", "{1}/images/{2}", "{1}/{2}/images", "{1}/{2}/{2}", "{1}/data/{2}"]
)
def test_doubled_folders(tmp_path, layout):
    """Doubled folders of splits and classes, as archives are unpacked, and folders called images between them, say nothing."""
    put(tmp_path, {layout.format("scenes", split, label): 3 for split in ("train", "test") for label in ("sea", "ice")})
    found = read_target_set(tmp_path)
    assert found.classes == ("ice", "sea")
    assert set(counts(found).values()) == {3}
    assert set(found.splits) == {"train", "test"}


def test_doubled_folders_of_classes(tmp_path):
    """Classes in doubled folders are classes, also one whose name ends with the name of a split."""
    put(tmp_path, {"steam_train/steam_train": 5, "bus/bus": 5, "crash_test/crash_test": 5})
    assert read_target_set(tmp_path).classes == ("bus", "crash_test", "steam_train")


def test_one_folder_inside_each_class_folder(tmp_path):
    """A folder that every class has, such as images/, is no class."""
    put(tmp_path, {"cat/images": 6, "dog/images": 6})
    assert read_target_set(tmp_path).classes == ("cat", "dog")


@pytest.mark.parametrize("folders", [("train/cat", "train/dog", "test/cat", "test/dog"), ("cat", "dog")])
def test_a_folder_around_the_splits_or_classes(tmp_path, folders):
    """A target whose only folder holds the splits or classes says to give that folder."""
    put(tmp_path, {f"photos/{name}": 3 for name in folders})
    with pytest.raises(TutelageError, match="class folder photos has no images of its own") as error:
        read_target_set(tmp_path)
    assert "give the folder photos itself, which holds them: --target .../photos" in error.value.hint


def test_a_class_called_train(tmp_path):
    """Beside other classes, a folder called train that holds images is a class of trains."""
    put(tmp_path, {"train": 6, "bus": 6, "tram": 6})
    found = read_target_set(tmp_path)
    assert found.classes == ("bus", "train", "tram")
    assert set(found.splits) == {"train", "test"}


@pytest.mark.parametrize("place", ["horse", "train/horse"])
def test_class_folders_without_images(tmp_path, place):
    """A class whose folder holds no image is named; --classes leaves it out, and one that is empty in one split only is read."""
    prefix = "train/" if "/" in place else ""
    put(tmp_path, {f"{prefix}cat": 6, f"{prefix}dog": 6, place: 0})
    (tmp_path / place / "notes.md").write_text("no photos yet")
    with pytest.raises(TutelageError, match=f"1 class folder holds no images: {place}") as error:
        read_target_set(tmp_path)
    assert "--classes" in error.value.hint
    assert read_target_set(tmp_path, classes=["cat", "dog"]).classes == ("cat", "dog")
    if prefix:
        put(tmp_path, {"train/horse": 3, "test/cat": 2, "test/dog": 2, "test/horse": 0})
        assert read_target_set(tmp_path).classes == ("cat", "dog", "horse")


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(labels: list[str], form: str, start: int = 0) -> dict[str, bytes]:
    """Members of a WebDataset tar."""
    found = {}
    for i, label in enumerate(labels, start):
        key = f"n{i:02}.{i}" if "dots" in form else f"part/{i:04}" if "folder" in form else f"{i:04}"
        found[f"{key}.jpg"] = PNG
        found |= (
            {f"{key}.cls": f"{label}\n".encode()}
            if "cls" in form
            else {f"{key}.json": json.dumps({"label": label}).encode()}
        )
    return found


@pytest.mark.parametrize("form", ["cls", "json", "cls with dots", "json in a folder"])
@pytest.mark.parametrize("layout", ["shards", "splits", "named", "gz", "one file"])
def test_webdataset_tars(tmp_path, form, layout):
    """Labels of WebDataset tars are read from .cls or .json, numbers in the order of numbers; tars are no classes."""
    labels = ["10", "2"] * 6 if "cls" in form else ["cat", "dog"] * 6
    names = {
        "shards": ("0.tar", "1.tar"), "splits": ("train/0.tar", "test/0.tar"), "named": ("train-0.tar", "test-0.tar"),
        "gz": ("0.tar.gz", "1.tar.gz"), "one file": ("0.tar", "0.tar"),
    }[layout]  # fmt: skip
    for number, name in enumerate(names):
        tar_of(tmp_path / name, samples(labels, form, 20 * number))
    found = read_target_set(tmp_path / "0.tar" if layout == "one file" else tmp_path)
    assert found.classes == (("2", "10") if "cls" in form else ("cat", "dog"))
    assert len(found.refs) == (12 if layout == "one file" else 24)
    ((_, data),) = read_bytes(found.refs[:1])
    assert data == PNG
    if layout in ("splits", "named"):
        assert Counter(found.splits.tolist()) == {"train": 12, "test": 12}


def test_tars_without_labels(tmp_path):
    """Tars of images without labels are one error with the forms that are read; images without a label among others are listed."""
    tar_of(tmp_path / "0.tar", {"a.jpg": PNG, "a.txt": b"a caption"})
    with pytest.raises(TutelageError, match=r"no image in it has a label, such as 0\.tar/a\.jpg") as error:
        read_target_set(tmp_path)
    assert "put a .cls or a .json with a key label beside each image" in error.value.hint
    tar_of(tmp_path / "1.tar", samples(["cat", "dog"] * 3, "json") | {"b.jpg": PNG, "c.jpg": PNG, "c.json": b"[1, 2"})
    assert {bad.id for bad in read_target_set(tmp_path).rejected} == {"0.tar/a.jpg", "1.tar/b.jpg", "1.tar/c.jpg"}


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("part-a/0.tar", "part-b/1.tar"), "move the shards into {0} itself"),
        (("train/a/0.tar", "train/b/1.tar", "val/0.tar"), "move the shards into {0}/train itself; if a is"),
        (("year=2021/0.parquet", "year=2022/0.parquet"), "move the shards into {0} itself"),
        (("full/train-0.parquet", "full/test-0.parquet", "small/train-0.parquet"), "such as --target {0}/full;"),
        (("cat/0.tar", "dog/0.parquet"), "if cat is right, write the shards without labels"),
        (("shards/0.tar", "shards/1.tar"), "give the folder that holds the shards: --target {0}/shards"),
        (
            ("plain_text/train/0.parquet", "plain_text/test/0.parquet"),
            "give the folder that holds the shards: --target {0}/plain_text",
        ),
    ],
)
def test_shards_with_labels_in_class_folders(tmp_path, names, told):
    """Shards that hold labels are not read by the names of their folders: refused with what to give, which then is read."""
    for number, name in enumerate(names):
        labels = ["cat", "owl"] * 4
        if name.endswith("tar"):
            tar_of(tmp_path / name, samples(labels, "cls", 10 * number))
        else:
            shard(tmp_path / name, [0, 1] * 4, ["cat", "owl"])
    with pytest.raises(TutelageError, match="holds labels of its own: ") as error:
        read_target_set(tmp_path)
    assert told.format(tmp_path) in error.value.hint
    if given := re.search(r"--target ([^ ;]+)", error.value.hint):
        assert read_target_set(given[1]).classes == ("cat", "owl")


@pytest.mark.parametrize("form", ["tar", "tgz", "parquet", "labelled alike"])
def test_shards_without_labels_in_class_folders(tmp_path, form):
    """Tars and Parquet files of images without labels, or with that of their folder, belong to the class of their folder."""
    for label in ("cat", "dog"):
        for folder in (label, f"{label}/images") if form == "tar" else (label,):
            if form == "parquet":
                images = pa.array(
                    [{"bytes": PNG, "path": None}] * 4, pa.struct([("bytes", pa.binary()), ("path", pa.string())])
                )
                (tmp_path / folder).mkdir()
                pq.write_table(pa.table({"image": images, "width": [1] * 4}), tmp_path / folder / "0.parquet")
            elif form == "labelled alike":
                shard(tmp_path / folder / "0.parquet", [label.title()] * 4)
            else:
                members = {f"{i}.{ending}": PNG for i in range(4) for ending in ("png", "txt")}
                tar_of(tmp_path / folder / f"0.{form}", members)
    found = read_target_set(tmp_path)
    assert found.classes == ("cat", "dog")
    assert len(found.refs) == (16 if form == "tar" else 8)


def test_class_names_without_rows(tmp_path):
    """Names of the metadata without an image are told, numbers too; --classes leaves them out; those of --test do not count."""
    digits = [str(i) for i in range(4)]
    shard(tmp_path / "d" / "train-0.parquet", [0, 1, 3] * 2, digits)
    assert "1 class name of the target set has no images: '2'" in message(tmp_path / "d")
    assert read_target_set(tmp_path / "d", classes=["0", "1", "3"]).classes == ("0", "1", "3")
    put(tmp_path / "own", {"ape": 4, "cow": 4})
    other = shard(tmp_path / "other.parquet", [0, 1], ["ape", "cow", "never"])
    assert read_target_set(tmp_path / "own", test=other).classes == ("ape", "cow")


@pytest.mark.parametrize(
    ("header", "rows", "told"),
    [
        ("path,label,label", "{}.png,{},x", "2 columns called label"),
        ("path,Label,label", "{}.png,{},x", "2 columns called label"),
        ("path,path,label", "{}.png,x,{}", "2 columns called path"),
        ("path,label,split,split", "{}.png,{},train,test", "2 columns called split"),
        ("path,class,label", "{}.png,x,{}", "two columns that may be the label, label and class, and they differ"),
        (
            "path,filename,label",
            "{0}.png,x{0}.png,{1}",
            "two columns that may be the path, path and filename, and they differ",
        ),
    ],
)
def test_two_columns_for_one_thing(tmp_path, header, rows, told):
    """Two columns that may be the path, the label or the split are told by name, in text and Parquet; nothing is taken for the other."""
    lines = [rows.format(i, "ab"[i % 2]).split(",") for i in range(8)]
    path = listed(tmp_path, "\n".join([header, *map(",".join, lines)]))
    assert told in message(path)
    table = pa.Table.from_arrays([pa.array(column) for column in zip(*lines, strict=True)], header.split(","))
    pq.write_table(table, tmp_path / "list.parquet")
    assert told in message(tmp_path / "list.parquet")


def test_two_columns_that_agree(tmp_path):
    """A path beside the same path, its last part or a number is one path; in Parquet with bytes other names of files do not matter."""
    lines = [f"./in/{i}.png,in\\{i}.png,{i}.png,{i},{'ab'[i % 2]},{'ab'[i % 2]}" for i in range(8)]
    put(tmp_path, {"in": 8})
    for i in range(8):
        (tmp_path / "in" / f"{i:03}.png").rename(tmp_path / "in" / f"{i}.png")
    (tmp_path / "list.csv").write_text("\n".join(["path,file_name,filename,image,label,class", *lines]))
    assert len(read_target_set(tmp_path / "list.csv").refs) == 8
    names = {"filename": [f"{i}.png" for i in range(8)], "file_name": [f"was {i}.tif" for i in range(8)]}
    assert len(read_target_set(shard(tmp_path / "bytes.parquet", list("abababab"), **names)).refs) == 8


def test_a_list_with_backslashes(tmp_path):
    """A list written on Windows names its files with backslashes; they are found."""
    put(tmp_path, {"cat": 4, "dog": 4})
    rows = [f"{label}\\{i:03}.png,{label}" for label in ("cat", "dog") for i in range(4)]
    (tmp_path / "list.csv").write_text("path,label\n" + "\n".join(rows))
    assert len(read_target_set(tmp_path / "list.csv").refs) == 8


def test_a_damaged_compressed_tar(tmp_path):
    """A compressed tar whose middle is damaged gives the samples before that, and says that it is broken."""
    draw = np.random.default_rng(0)
    members = {
        f"{i:03}.{ending}": draw.bytes(3000) if ending == "jpg" else b"cat" if i % 2 else b"dog"
        for i in range(20)
        for ending in ("cls", "jpg")
    }
    path = tar_of(tmp_path / "0.tar.gz", members)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 2000] = draw.bytes(2000)
    path.write_bytes(bytes(data))
    found = read_target_set(tmp_path)
    assert found.classes == ("cat", "dog")
    assert 4 < len(found.refs) < 20
    assert any("images before that are used" in bad.reason for bad in found.rejected)


def test_classes_that_are_called_like_splits_alone(tmp_path):
    """Classes `train` and `test` alone are told to be read as splits, and what to do."""
    with pytest.raises(TutelageError, match="lies in no class folder") as error:
        read_target_set(put(tmp_path, {"train": 3, "test": 3}))
    assert error.value.hint.startswith(
        "test and train are read as splits; rename them, or use a list, if they are classes"
    )


@pytest.mark.parametrize("form", ["list", "shard"])
def test_numbers_with_gaps_as_labels(tmp_path, form):
    """A column of labels with gaps, which pandas turns into floats with NaN, has the classes 0 and 1, and the rows without are named."""
    labels = pa.array([0.0, 0.0, 1.0, 1.0, float("nan"), None])
    names = [f"{i}.png" for i in range(6)]
    for i, name in enumerate(names):
        draw(tmp_path / name, i % 2, i)
    data = [(tmp_path / name).read_bytes() for name in names]
    column = {"path": names} if form == "list" else {"image": pa.array(data)}
    pq.write_table(pa.table({**column, "label": labels}), tmp_path / "a.parquet")
    if form == "list":
        assert "2 rows without a label: 4.png, 5.png" in message(tmp_path / "a.parquet")
    else:
        found = read_target_set(str(tmp_path / "a.parquet"))
        assert found.classes == ("0", "1")
        assert [one.reason for one in found.rejected] == ["has no label"] * 2


def test_classes_that_differ_in_case(tmp_path):
    """Classes cat and Cat are kept apart, as a and A must be, and a note names them."""
    put(tmp_path, {"cat": 3, "Cat": 3, "dog": 3})
    found = read_target_set(str(tmp_path))
    assert found.classes == ("Cat", "cat", "dog")
    assert any("differ in case only are kept apart: Cat and cat" in note for note in found.notes)


def test_a_misspelt_split(tmp_path):
    """A folder beside the splits that is none of them is named where it is why there are no train images."""
    for split in ("trian", "test"):
        put(tmp_path / split, {"cat": 3, "dog": 3})
    assert "has no train images" in (said := message(tmp_path))
    assert "folders beside test that are not read: trian" in said
    assert "hint: if trian holds the train images, rename it to train" in said
