"""Predictions replace nothing of the user's: neither photos, nor tables, nor files beside them."""

from __future__ import annotations

import contextlib
import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tutelage.data.decode import RECORDS, predicted_files
from tutelage.deploy.prediction_files import outputs, write_predictions
from tutelage.deploy.runtime import Predictions
from tutelage.errors import TutelageError


def hashes(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, and its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def table(path: Path, *rows: tuple[str, ...]) -> Path:
    """A CSV of these rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def predict(out: Path, *images: str, masks: bool = False, rejected: tuple[str, ...] = ()) -> None:
    """What `predict` writes, without a model."""
    with outputs(out, masks, images) as place:
        columns = Predictions(["cat", "dog"], None, [*images], [np.array([0.3, 0.7])] * len(images)).columns(1)
        if place.masks is not None:
            for image in images:
                (place.staged / place.masks.name).mkdir(exist_ok=True)
                Image.new("L", (4, 4)).save(place.staged / place.masks.name / Path(image).name)
        write_predictions(place, columns, [(one, "no image") for one in rejected])


@pytest.mark.parametrize(
    "name",
    [
        *("p", "p.json", "photo.jpg", "labels.csv", "broken.parquet", "folder.csv", "nul\0.csv", "n" * 300 + ".csv"),
        *("ours.csv", "photo.jpg/p.csv", "n" * 246 + ".csv", "link.csv", "/proc/p.csv", "a/b.csv/c.png"),
    ],
)
@pytest.mark.parametrize("masks", [False, True])
def test_outputs_that_would_replace_something(tmp_path: Path, name: str, masks: bool):
    """Another ending, a photo, tables of the user's, also such as `predict` writes, folders, links, and names that no file can have are one
    error; nothing changes."""
    Image.new("RGB", (4, 4)).save(tmp_path / "photo.jpg")
    table(tmp_path / "labels.csv", ("path", "label"), ("photo.jpg", "cat"))
    table(tmp_path / "ours.csv", ("path", "mask" if masks else "class"), ("photo.jpg", "photo.jpg"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing else")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "link.csv").symlink_to(tmp_path / "nowhere")
    before = hashes(tmp_path)
    with pytest.raises(TutelageError) as error:
        predict(tmp_path / name, "photo.jpg", masks=masks)
    assert error.value.hint
    assert hashes(tmp_path) == before


@pytest.mark.parametrize("head", [("order", "reason"), ("path", "reason")])
def test_the_users_list_of_rejected_images_stays(tmp_path: Path, head: tuple[str, str]):
    """A file that has the name of the list of rejected images stops the call, whatever its columns."""
    table(tmp_path / "p.rejected.csv", head, ("7", "late"))
    before = hashes(tmp_path)
    with pytest.raises(TutelageError, match=r"p\.rejected\.csv"):
        predict(tmp_path / "p.csv", "1.png")
    assert hashes(tmp_path) == before


def test_photos_and_masks_are_not_painted_over(tmp_path: Path):
    """--out cam.csv beside a folder of photos, or of masks that a list of the user's names, is refused for masks; for classes the folder
    does not matter."""
    (tmp_path / "cam").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "cam" / "1.png")
    before = hashes(tmp_path)
    with pytest.raises(TutelageError, match=r"cam/1\.png is there already"):
        predict(tmp_path / "cam.csv", "1.png", masks=True)
    assert hashes(tmp_path) == before
    predict(tmp_path / "cam.csv", "1.png")
    assert hashes(tmp_path).items() > before.items()


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize("masks", [False, True])
def test_earlier_predictions_are_replaced(tmp_path: Path, ending: str, masks: bool, monkeypatch):
    """The same call again replaces its own files, from any folder, for fewer images too, and stops where one was changed or has joined."""
    out = tmp_path / f"p.{ending}"
    predict(out, "1.png", "2.png", masks=masks, rejected=("3.png",))
    first = {*hashes(tmp_path)}
    (record,) = (path.name for path in tmp_path.glob(RECORDS))
    assert first == {record, out.name, "p.rejected.csv", *(["p/1.png", "p/2.png"] if masks else [])}
    assert predicted_files(str(tmp_path)) >= {out.name, "p.rejected.csv"}
    assert predicted_files(str(tmp_path / "p")) == ({"1.png", "2.png"} if masks else frozenset())
    monkeypatch.chdir(tmp_path)
    predict(Path(out.name), "1.png", masks=masks)
    assert {*hashes(tmp_path)} == {record, out.name, *(["p/1.png"] if masks else [])}
    predict(tmp_path / "q.csv", "1.png", masks=masks)  # another table in the same folder
    predict(Path(out.name), "1.png", masks=masks)
    for name in ("p/1.png", "p/mine.png") if masks else (out.name,):
        was = (tmp_path / name).read_bytes() if (tmp_path / name).exists() else None
        (tmp_path / name).write_bytes(b"mine")
        with pytest.raises(TutelageError, match=name.replace(".", r"\.")):
            predict(out, "1.png", masks=masks)
        assert (tmp_path / name).read_bytes() == b"mine"
        if was is not None:
            (tmp_path / name).write_bytes(was)


def test_an_interrupted_call_leaves_nothing(tmp_path: Path):
    """After Ctrl-C on the way there are no new files, those of before are whole, and the same call works."""
    out = tmp_path / "p.csv"
    predict(out, "1.png", masks=True)
    before = hashes(tmp_path)
    with contextlib.suppress(KeyboardInterrupt), outputs(out, True, ["1.png", "2.png"]) as place:
        (place.staged / "p").mkdir()
        (place.staged / "p" / "1.png").write_bytes(b"half")
        raise KeyboardInterrupt
    assert hashes(tmp_path) == before
    predict(out, "1.png", "2.png", masks=True)


def test_odd_names_of_images_in_tables(tmp_path: Path):
    """A carriage return in a name is quoted; a name that is not UTF-8 is kept in a CSV, and refused for Parquet before anything is done."""
    names = ["a\rb.png", "\udce9.png", 'c"d.png', "e\nf.png"]
    predict(tmp_path / "p.csv", *names)
    with (tmp_path / "p.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert [row["path"] for row in csv.DictReader(file)] == names
    with pytest.raises(TutelageError, match="not UTF-8"):
        predict(tmp_path / "p.parquet", *names)
    assert not (tmp_path / "p.parquet").exists()


def test_masks_that_were_corrected_are_the_users(tmp_path: Path):
    """A predicted mask that was painted over by hand is an image of the user's again, and is not replaced."""
    out = tmp_path / "p.csv"
    predict(out, "1.png", "2.png", masks=True)
    Image.new("L", (4, 4), 1).save(tmp_path / "p" / "2.png")
    assert predicted_files(str(tmp_path / "p")) == {"1.png"}


def test_what_comes_while_it_predicts_stays(tmp_path: Path):
    """A file that appears at the place of the table during the call is not replaced."""
    with outputs(tmp_path / "p.csv", False, ["1.png"]) as place:
        (tmp_path / "p.csv").write_text("mine")
        with pytest.raises(TutelageError, match="there already"):
            write_predictions(place, {"path": ["1.png"], "class": ["cat"]}, [])
    assert (tmp_path / "p.csv").read_text() == "mine"


def test_a_record_that_names_other_files_deletes_none(tmp_path: Path):
    """Masks that an earlier call wrote are removed only where the record's hash says that they are these, below the folder of masks."""
    out = tmp_path / "p.csv"
    predict(out, "1.png", "2.png", masks=True)
    (tmp_path / "mine.txt").write_text("mine")
    (record,) = tmp_path.glob(RECORDS)
    about = json.loads(record.read_text())
    about["files"] |= {"p/../mine.txt": ["0" * 64], "p/../../mine.txt": ["0" * 64]}
    record.write_text(json.dumps(about))
    predict(out, "1.png", masks=True)
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert not (tmp_path / "p" / "2.png").exists()
