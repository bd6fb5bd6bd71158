"""Labelled images that are copies of images in another split are found, listed and said; other photos are not."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from PIL import Image

import tutelage
from conftest import DATA

PHOTOS = DATA / "whurs19"
CLASSES = ("beach", "forest", "meadow")
pytestmark = pytest.mark.skipif(not PHOTOS.exists(), reason=f"no photos of WHU-RS19 under {DATA} (TUTELAGE_TEST_DATA)")


def changed(photo: Image.Image, kind: str) -> Image.Image:
    """Return a copy of one kind; "quality" is made by saving it as JPEG."""
    width, height = photo.size
    if kind == "mirrored":
        return photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if kind == "resized":
        return photo.resize((width // 3, height // 3), Image.Resampling.BICUBIC)
    if kind == "cropped":
        return photo.crop((width // 30, height // 40, width - width // 50, height - height // 30))
    return photo


def write(place: Path, photo: Image.Image, quality: int = 92) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    photo.save(place, quality=quality)


@pytest.fixture
def target(tmp_path) -> Path:
    """Three photos of each of three classes for each split."""
    for label in CLASSES:
        photos = sorted((PHOTOS / "train" / label).glob("*.jpg"))
        for at, path in enumerate(photos[:9]):
            write(tmp_path / "target" / ("train", "val", "test")[at % 3] / label / path.name, Image.open(path))
    return tmp_path / "target"


def curate(target: Path, **more) -> tutelage.results.CurationResult:
    models = {"teacher": "test_efficientnet", "teacher_weights": "scratch", "teacher_size": 32}
    models |= {"student": "test_resnet", "student_size": 32}
    return tutelage.curate(
        target=str(target),
        gallery=[str(PHOTOS / "test" / "river")],
        out=str(target.parent / "run"),
        strategy="all",
        **models,
        **more,
    )


def listed(target: Path) -> list[list[str]]:
    with (target.parent / "run" / "curate" / "split_copies.csv").open(newline="") as file:
        return list(csv.reader(file))[1:]


@pytest.mark.parametrize("kind", ["quality", "resized", "cropped", "mirrored"])
@pytest.mark.parametrize(
    ("first", "later"),
    [("train", "test"), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in (("train", "val"), ("val", "test")))],
)
def test_copies_in_two_splits(target, capsys, kind, first, later):
    """A copy of an image in a later split is named with its original, whatever was done to it; without it there is none."""
    assert curate(target).split_copies == 0
    original = next((target / first / "beach").iterdir())
    write(target / later / "beach" / "again.jpg", changed(Image.open(original), kind), 50 if kind == "quality" else 92)
    assert curate(target).split_copies == 1
    assert listed(target) == [[f"{later}/beach/again.jpg", later, f"{first}/beach/{original.name}", first]]
    assert "1 labelled images look like copies of one in another split" in capsys.readouterr().err


@pytest.mark.slow
def test_a_burst_that_a_fraction_tears_apart(target, capsys):
    """Photos of one burst that a fraction puts into several splits are found; with --group-by they stay together."""
    burst = target.parent / "bursts"
    for label in CLASSES:
        for number, path in enumerate(sorted((target / "train" / label).iterdir())):
            for frame in range(4):
                photo = Image.open(path)
                width, height = photo.size
                write(
                    burst / label / f"b{number}-{frame}.jpg", photo.crop((frame, 2 * frame, width - 6 + frame, height))
                )
    found = curate(burst, test="0.3", seed=1)
    assert found.split_copies >= 6
    assert "use --group-by where products, patients or bursts repeat" in capsys.readouterr().err
    assert curate(burst, test="0.3", seed=1, group_by="/(b[0-9])", overwrite=True).split_copies == 0
