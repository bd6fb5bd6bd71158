"""Target sets that hypothesis makes up: any packing of a mask, any name of a class, any tree of folders."""

from __future__ import annotations

import csv
import logging
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as some
from test_mask_packings import COLOURED, NUMBERS, SHOWN, VOID, expected, read, write
from test_target_set import PNG, shard

from scenes import CLASSES
from tutelage.data.class_names import faults_of_names
from tutelage.data.target_set import TargetSet, read_target_set
from tutelage.deploy.export_contents import labels_of
from tutelage.deploy.prediction_files import Outputs, write_csv, write_predictions
from tutelage.errors import TutelageError, rendered

PIXELS = some.lists(some.sampled_from([0, 1, 2, VOID]), min_size=54, max_size=54)


@contextmanager
def folder() -> Iterator[Path]:
    """A new folder: hypothesis calls a test many times in the same tmp_path."""
    with tempfile.TemporaryDirectory() as place:
        yield Path(place)


def read_or_refused(place: Path, **more: Any) -> TargetSet | TutelageError:
    """The target set, or the error that refuses it, every fault of which has a hint."""
    try:
        return read_target_set(place, **more)
    except TutelageError as error:
        faults = rendered(error)
    assert faults.count("error: ") == faults.count("hint: "), faults
    return TutelageError(faults, "as it says")


def mask_of(pixels: list[int]) -> np.ndarray:
    """(6, 9) uint8 class numbers; a set that lacks a class in every mask would be another set."""
    mask = np.array(pixels, np.uint8).reshape(6, 9)
    mask[0, :3] = 0, 1, 2
    return mask


@given(some.lists(some.tuples(PIXELS, some.sampled_from(sorted(NUMBERS))), min_size=4, max_size=8))
def test_any_masks_of_numbers(drawn):
    """Whatever the pixels, and whatever packing each mask of a set has, its class numbers are read as they are."""
    masks = [mask_of(pixels) for pixels, _ in drawn]
    with folder() as place:
        files = [NUMBERS[packing](mask) for mask, (_, packing) in zip(masks, drawn, strict=True)]
        assert read(write(place, files, CLASSES)) == expected(masks)


@given(
    some.lists(some.tuples(PIXELS, some.sampled_from(sorted(SHOWN))), min_size=4, max_size=8),
    some.permutations(range(3)),
)
def test_any_masks_of_colours(drawn, order):
    """Whatever the pixels, the packing of each mask, and the order of classes.txt, a listed colour is its class."""
    masks = [mask_of(pixels) for pixels, _ in drawn]
    with folder() as place:
        files = [SHOWN[packing](mask) for mask, (_, packing) in zip(masks, drawn, strict=True)]
        assert read(write(place, files, [COLOURED[i] for i in order])) == expected(masks, np.array(order))


SEEN = some.characters(categories=("L", "N", "P", "S"), exclude_characters="/\\")
PLAIN = some.text(SEEN, min_size=1, max_size=20).map("c{}".format)  # not hidden, and no word for a split


@given(some.lists(some.text(min_size=1, max_size=20), min_size=2, max_size=5, unique=True))
@example(["New  York", "New York"])
@example(["cat", " cat"])
@example(["a\rb", "b"])
@example(["\ud800", "b"])
def test_any_names_leave_as_they_came(names):
    """Names of classes, whatever they are, are refused when they are read, or leave as they came: as labels, in CSV, in Parquet."""
    with folder() as place:
        found = read_or_refused(shard(place / "train.parquet", [0, 1, *range(len(names))] * 2, names), test=0.34)
        if isinstance(found, TutelageError):
            assert faults_of_names(names, place) or not all(names)
            return
        assert list(found.classes) == names
        text = "".join(f"{name}\n" for name in names).encode()
        assert labels_of(text, {"classes": len(names)}, {}, place) == names
        write_csv(place / "names.csv", {"prediction": names})
        with (place / "names.csv").open(newline="", encoding="utf-8") as file:
            assert [row["prediction"] for row in csv.DictReader(file)] == names
        (place / "staged").mkdir()
        write_predictions(Outputs(place / "names.parquet", None, place / "staged"), {"prediction": names}, [])
        assert pq.read_table(place / "names.parquet")["prediction"].to_pylist() == names


@given(some.lists(PLAIN, min_size=2, max_size=5, unique=True))
def test_no_name_that_can_be_seen_is_refused(names):
    """Folders whose names are letters, digits, punctuation and signs are classes by these names, unless two look the same."""
    with folder() as place:
        for name in names:
            (place / name).mkdir()
            for number in range(3):
                (place / name / f"{number}.png").write_bytes(PNG)
        if any("differ in blanks" in str(fault) for fault in faults_of_names(names, place)):
            with pytest.raises(TutelageError, match="Unicode form"):
                read_target_set(place)
            return
        assert sorted(read_target_set(place).classes) == sorted(names)


CLASSES_OF_ANIMALS = ("cat", "dog", "fox", "cow 2")
SPLITS = (
    ("",),
    ("train/", "test/"),
    ("training/", "testing/"),
    ("train/", "val/", "test/"),
    ("train2017/", "val2017/"),
)
WORDS = ("train", "test", "val", "training", "images", "cat", "dog", "data", "set 1", "@eaDir", ".thumbnails", "x.tar")
COUNTS = some.integers(min_value=1, max_value=4)
STRAYS = some.dictionaries(
    some.lists(some.sampled_from(WORDS), min_size=1, max_size=4).map("/".join), COUNTS, max_size=2
)


@some.composite
def trees(draw):
    """Folders, each with its number of images: classes in a usual layout, and up to two folders anywhere."""
    around, inside = draw(some.sampled_from(["", "", "", "data/"])), draw(some.sampled_from(["", "", "", "images/"]))
    names = draw(some.lists(some.sampled_from(CLASSES_OF_ANIMALS), min_size=2, unique=True))
    usual = {
        f"{around}{split}{inside}{name}": 1 + draw(COUNTS)
        for split in draw(some.sampled_from(SPLITS))
        for name in names
    }
    return usual | draw(STRAYS)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # caplog is cleared each time
@given(tree=trees())
@example(tree={"train/cat": 3, "train/dog": 3, "test/cat": 2, "test/dog": 2})
@example(tree={"cat": 3, "dog": 3})
@example(tree={"training/cat": 3, "training/dog": 3, "test/cat": 1, "test/dog": 1})
@example(tree={"data/train/cat": 3, "data/train/dog": 3})
@example(tree={"cat/set 1": 3, "dog": 3})
def test_any_tree_of_folders(tree, caplog):
    """A tree of folders is read whole, or refused with what to do; images that are passed over are named or counted, never dropped."""
    with folder() as place, caplog.at_level(logging.INFO):
        caplog.clear()
        for below, count in tree.items():
            (place / below).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                (place / below / f"{number}.png").write_bytes(PNG)
        found = read_or_refused(place)
        if isinstance(found, TutelageError):
            return
        used = {ref.id for ref in found.refs} | {one.id for one in found.rejected}
        assert len(used) == len(found.refs) + len(found.rejected)
        system = [below for below in tree if {"@eaDir", ".thumbnails"} & {*below.split("/")}]
        assert not any(name.startswith(f"{below}/") for name in used for below in system)
        lost = {
            below
            for below, count in tree.items()
            for i in range(count)
            if below not in system and f"{below}/{i}.png" not in used
        }
        said = "\n".join([*found.notes, *(record.getMessage() for record in caplog.records)])
        for below in lost:
            assert any(re.search(rf"\b{re.escape(word)}\b", said) for word in below.split("/")), (below, said)
