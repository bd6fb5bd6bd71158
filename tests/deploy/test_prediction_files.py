"""Predictions replace nothing of the user's: neither photos, nor tables, nor files beside them."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tutelage.deploy.prediction_files import check_outputs, write_predictions
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


@pytest.mark.parametrize(
    "name", ["p", "p.json", "photo.jpg", "labels.csv", "broken.parquet", "folder.csv", "nul\0.csv", "n" * 300 + ".csv"]
)
@pytest.mark.parametrize("masks", [False, True])
def test_outputs_that_would_replace_something(tmp_path: Path, name: str, masks: bool):
    """Another ending, a photo, a table of the user's, a folder, and names that no file can have are one error; nothing changes."""
    Image.new("RGB", (4, 4)).save(tmp_path / "photo.jpg")
    table(tmp_path / "labels.csv", ("path", "label"), ("photo.jpg", "cat"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing else")
    (tmp_path / "folder.csv").mkdir()
    before = hashes(tmp_path)
    with pytest.raises(TutelageError) as error:
        check_outputs(tmp_path / name, masks)
    assert error.value.hint
    assert hashes(tmp_path) == before


def test_the_users_list_of_rejected_images_stays(tmp_path: Path):
    """A file beside --out that has the name of the list of rejected images and is none stops the call."""
    table(tmp_path / "p.rejected.csv", ("order", "reason"), ("7", "late"))
    with pytest.raises(TutelageError, match=r"p\.rejected\.csv"):
        check_outputs(tmp_path / "p.csv", masks=False)


def test_photos_are_not_painted_over(tmp_path: Path):
    """--out cam.csv beside a folder of photos, cam/, is refused for masks; for classes the folder does not matter."""
    (tmp_path / "cam").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "cam" / "1.png")
    before = hashes(tmp_path)
    with pytest.raises(TutelageError, match=r"cam.*holds other files"):
        check_outputs(tmp_path / "cam.csv", masks=True)
    check_outputs(tmp_path / "cam.csv", masks=False)
    assert hashes(tmp_path) == before


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_earlier_predictions_are_replaced(tmp_path: Path, ending: str):
    """The same call again replaces its own table and its own masks, and stops where a file has joined these."""
    out, mask = tmp_path / f"p.{ending}", tmp_path / "p" / "1.png"
    result = Predictions(["cat", "dog"], None, ["1.png"], [np.array([0.3, 0.7])])
    write_predictions(out, result.columns(1), result.rejected)
    check_outputs(out, masks=False)
    out.unlink()
    mask.parent.mkdir()
    Image.new("L", (4, 4)).save(mask)
    if ending == "csv":
        table(out, ("path", "mask", "share_cat"), ("1.png", str(mask), "1.0"))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"path": ["1.png"], "mask": [str(mask)], "share_cat": [1.0]}), out)
    check_outputs(out, masks=True)
    shutil.copy(mask, mask.with_name("mine.png"))
    with pytest.raises(TutelageError, match=r"mine\.png"):
        check_outputs(out, masks=True)
