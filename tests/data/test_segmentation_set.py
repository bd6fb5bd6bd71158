"""Target sets of masks: every form gives the same, and every fault is told through the command with names and numbers."""

from __future__ import annotations

import csv
import itertools
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from conftest import DATA
from scenes import CLASSES, scene, write_pair, write_scenes
from tutelage.data.decode import _TURNS as TURNS
from tutelage.data.image_cache import Store
from tutelage.data.label_budget import draw_images
from tutelage.data.masks import IGNORE, MaskEncoding, Masks, kind_of, made_colours, numbered, painted, read_values
from tutelage.data.segmentation_set import read_dense_set
from tutelage.errors import TutelageError


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture
def place(drawn, tmp_path) -> Path:
    """A copy of the scenes that a test may spoil."""
    return Path(shutil.copytree(drawn, tmp_path / "data"))


def curate(tutelage, place: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return tutelage(
        *("curate", "--task", "segmentation", "--target", str(place / "target"), "--gallery", str(place / "gallery")),
        *("--teacher", "test_efficientnet", "--teacher-weights", "scratch", "--teacher-size", "32x64"),
        *(
            "--student",
            "test_resnet",
            "--student-size",
            "32x64",
            "--dedup",
            "none",
            "--out",
            str(place / "run"),
            *more,
        ),
    )


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The message of a command that must have refused."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") or "\nerror: " in done.stderr
    return done.stderr


# Forms


def same(one, other) -> bool:
    """Whether two target sets hold the same images, masks and splits."""
    return (
        one.classes == other.classes
        and sorted(zip(one.truths, one.splits.tolist(), strict=True))
        == sorted(zip(other.truths, other.splits.tolist(), strict=True))
        and sorted(map(tuple, one.pixels.tolist())) == sorted(map(tuple, other.pixels.tolist()))
    )


def test_a_folder_of_images_and_masks(drawn):
    """images/<split> and masks/<split> are matched by name; pixels without a class are not counted."""
    found = read_dense_set(drawn / "target")
    assert found.task == "segmentation"
    assert found.classes == CLASSES
    assert {split: int((found.splits == split).sum()) for split in ("train", "val", "test")} == {
        "train": 6,
        "val": 3,
        "test": 4,
    }
    first = next(i for i, ref in enumerate(found.refs) if ref.id.endswith("train0.png"))
    mask = scene(1)[1]
    assert found.pixels[first].tolist() == [int((mask == c).sum()) for c in range(3)]
    assert found.shows(np.arange(13)).all()


def test_lists_and_parquet_give_the_same(drawn, tmp_path):
    """A CSV, a Parquet list and Parquet with the bytes of both hold what the folder holds."""
    whole, target = read_dense_set(drawn / "target"), drawn / "target"
    rows = []
    for split in ("train", "val", "test"):
        for image in sorted((target / "images" / split).iterdir()):
            rows.append({"image": str(image), "mask": str(target / "masks" / split / image.name), "split": split})
    shutil.copy(target / "classes.txt", tmp_path)
    with (tmp_path / "list.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["image", "mask", "split"])
        writer.writeheader()
        writer.writerows(rows)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    pq.write_table(pa.table(columns), tmp_path / "list.parquet")
    inside = {k: [{"bytes": Path(p).read_bytes(), "path": None} for p in columns[k]] for k in ("image", "mask")}
    pq.write_table(pa.table({**inside, "split": columns["split"]}), tmp_path / "bytes.parquet")
    for name in ("list.csv", "list.parquet", "bytes.parquet"):
        assert same(read_dense_set(tmp_path / name), whole), name


def test_palette_files_keep_their_colours(place):
    """A palette PNG counts by its numbers, and its palette becomes the data set's colours."""
    colours = [(128, 64, 128), (220, 20, 60), (0, 0, 142)]
    for path in (place / "target" / "masks").rglob("*.png"):
        image = Image.open(path).convert("L")
        image.putpalette([part for colour in colours for part in colour] + [0] * (768 - 9))
        image.save(path)
        assert Image.open(path).mode == "P"
    found = read_dense_set(place / "target")
    assert found.colours == tuple(colours)
    assert same(found, read_dense_set(place / "target"))


def test_colour_masks_with_named_colours(place):
    """Masks of colours are read where classes.txt says which class each colour is."""
    plain, colours = read_dense_set(place / "target"), [(128, 64, 128), (220, 20, 60), (0, 0, 142)]
    table = np.zeros((256, 3), np.uint8)
    table[:3] = colours
    table[255] = (1, 2, 3)
    for path in (place / "target" / "masks").rglob("*.png"):
        Image.fromarray(table[np.array(Image.open(path))]).save(path)
    lines = [f"{name} {r} {g} {b}" for name, (r, g, b) in zip(CLASSES, colours, strict=True)]
    (place / "target" / "classes.txt").write_text("\n".join([*lines, "ignore 1 2 3"]))
    found = read_dense_set(place / "target")
    assert same(found, plain)
    assert found.colours == tuple(colours)
    assert found.coloured


@pytest.mark.parametrize("packing", ["palette", "shuffled palette", "grey", "one bit", "mixed"])
def test_colours_count_however_a_mask_is_packed(place, packing):
    """Where classes.txt has colours, RGB, palette, grey and one-bit files of the same picture are the same masks; so is a mixed set."""
    two = packing in ("grey", "one bit", "mixed")
    colours = [(0, 0, 0), (255, 255, 255), (255, 255, 255)] if two else [(128, 64, 128), (220, 20, 60), (0, 0, 142)]
    files, table = sorted((place / "target" / "masks").rglob("*.png")), np.array([*colours], np.uint8)
    for path in files:
        numbers = np.array(Image.open(path))
        Image.fromarray(table[np.where(numbers == 255, 0, numbers)]).save(path)
    names = ("white", "black") if two else CLASSES  # not in the order of their numbers
    listed = [(255, 255, 255), (0, 0, 0)] if two else colours
    lines = [f"{name} {r} {g} {b}" for name, (r, g, b) in zip(names, listed, strict=True)]
    (place / "target" / "classes.txt").write_text("\n".join(lines))
    plain = read_dense_set(place / "target")
    for number, path in enumerate(files):
        image = Image.open(path).convert("RGB")
        if "palette" in packing:
            image = image.quantize(8, dither=Image.Dither.NONE)
            if packing == "shuffled palette":
                image = image.remap_palette([2, 0, 1])
        elif packing == "grey" or (packing == "mixed" and number % 2):
            image = image.convert("L")
        elif packing == "one bit" or number % 3 == 0:
            image = image.convert("1", dither=Image.Dither.NONE)
        image.save(path)
    assert same(read_dense_set(place / "target"), plain)


def test_classes_with_numbers(place):
    """Lines that begin with the numbers 0 to C - 1, in any order, name the classes of these numbers; other numbers are part of a name."""
    plain, file = read_dense_set(place / "target"), place / "target" / "classes.txt"
    lines = [f"{number}: {name}" for number, name in enumerate(CLASSES)]
    file.write_text("\n".join(lines[::-1]))
    assert same(read_dense_set(place / "target"), plain)
    file.write_text("\n".join(f"{number + 5} {name}" for number, name in enumerate(CLASSES)))
    assert read_dense_set(place / "target").classes == tuple(
        f"{number + 5} {name}" for number, name in enumerate(CLASSES)
    )
    file.write_text("\n".join(f"{number + 1} {name}" for number, name in enumerate(CLASSES)))
    with pytest.raises(TutelageError, match="numbers its classes from 1"):
        read_dense_set(place / "target")


@pytest.mark.parametrize("fmt", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", [3, 5, 6, 8])
def test_images_and_masks_are_turned_alike(place, fmt, orientation):
    """An image and a mask that say how they are turned, both, one or neither, are the same as if they were stored as they are seen."""
    plain = read_dense_set(place / "target")
    back = {3: 3, 5: 5, 6: 8, 8: 6}[orientation]  # the turn that stores it
    for path in sorted((place / "target").rglob("*.png")):
        if "images" in path.parts and orientation == 3:
            continue
        image = Image.open(path)
        image.load()
        stored, exif = image.transpose(TURNS[back]), Image.Exif()
        exif[0x112] = orientation
        path.unlink()
        if fmt == "PNG":
            stored.save(path, exif=exif)
        else:
            stored.save(path.with_suffix(".tiff"), tiffinfo={0x112: orientation})
    found = read_dense_set(place / "target")
    assert [one.tolist() for one in found.pixels] == [one.tolist() for one in plain.pixels]
    assert list(found.truths) == list(plain.truths)


def test_real_street_scenes():
    """CamVid is read as it lies: 367, 101 and 233 images of 11 classes, none rejected."""
    if not (DATA / "camvid").is_dir():
        pytest.skip(f"no camvid in {DATA}")
    found = read_dense_set(DATA / "camvid")
    counts = {split: int((found.splits == split).sum()) for split in ("train", "val", "test")}
    assert counts == {"train": 367, "val": 101, "test": 233}
    assert (len(found.classes), found.rejected) == (11, ())


def test_what_lies_beside_images_and_masks(tutelage, place):
    """Parquet files, tars, archives and images beside images/ and masks/ are not read, and the log names them."""
    target = place / "target"
    plain = read_dense_set(target)
    assert not any("beside" in note for note in plain.notes)
    for name in ("train-0.parquet", "more.tar.gz", "old.zip", "cover.png", "readme.md", ".hidden.tar", "splits.csv"):
        (target / name).write_bytes(b"anything")
    found = read_dense_set(target)
    assert same(found, plain)
    note = "files beside images/ and masks/ that are not read: cover.png, more.tar.gz, old.zip, splits.csv, train-0.parquet"
    assert [one for one in found.notes if "beside" in one] == [f"{target}: {note}"]
    assert note in curate(tutelage, place).stderr


def test_containers_that_cannot_be_read(tmp_path):
    """Where images and masks lie in damaged tars, the error says that these cannot be read."""
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "train.tar").write_bytes(b"junk")
    (tmp_path / "classes.txt").write_text("a\nb\n")
    with pytest.raises(TutelageError, match=r"has no images with masks: images/train.tar \(.*masks/train.tar \("):
        read_dense_set(tmp_path)


@pytest.mark.parametrize("below", ["", "data"])
def test_what_lies_beside_shards(drawn, tmp_path, below):
    """What lies beside Parquet files with images and masks is named too."""
    (tmp_path / below).mkdir(exist_ok=True)
    for split in ("train", "test"):
        images = sorted((drawn / "target" / "images" / split).iterdir())
        columns = {"image": images, "mask": [drawn / "target" / "masks" / split / one.name for one in images]}
        rows = {name: [{"bytes": one.read_bytes()} for one in column] for name, column in columns.items()}
        pq.write_table(pa.table(rows), tmp_path / below / f"{split}-0.parquet")
    shutil.copy(drawn / "target" / "classes.txt", tmp_path)
    for name in {"more.tar", f"{below}/old.zip"}:
        (tmp_path / name.lstrip("/")).write_bytes(b"anything")
    found = read_dense_set(tmp_path)
    assert (len(found.refs), {*found.splits.tolist()}) == (10, {"train", "test"})
    notes = "; ".join(found.notes)
    assert "beside test-0.parquet that are not read: " in notes
    assert "more.tar" in notes
    assert "old.zip" in notes


# Budget


def test_budgets_are_nested_and_lose_no_class():
    """A smaller budget is among a larger one; each class is in ENOUGH images, or in all that show it; seeds differ."""
    random = np.random.default_rng(0)
    shows = random.random((60, 6)) < np.array([1, 0.8, 0.5, 0.3, 0.1, 0.02])
    shows[7, 5] = True
    keys = [bytes([i]) * 32 for i in range(60)]
    drawn = [set(draw_images(shows, keys, budget, 3).tolist()) for budget in (1, 4, 12, 20, 60)]
    assert [len(one) for one in drawn] == [1, 4, 12, 20, 60]
    assert all(small < large for small, large in itertools.pairwise(drawn))
    assert (shows[sorted(drawn[2])].sum(axis=0) >= np.minimum(3, shows.sum(axis=0))).all()
    assert drawn[2] != set(draw_images(shows, keys, 12, 4).tolist())
    order = random.permutation(60)
    again = draw_images(shows[order], [keys[i] for i in order], 12, 3)
    assert set(order[again].tolist()) == drawn[2]


def test_groups_take_turns():
    """With groups a second image of one comes after one of every other."""
    shows, keys = np.ones((12, 2), bool), [bytes([i]) * 32 for i in range(12)]
    groups = np.array([str(i // 4) for i in range(12)])
    assert sorted(groups[draw_images(shows, keys, 3, 0, groups)].tolist()) == ["0", "1", "2"]


# Values


def test_values_that_are_no_class():
    """What is no class is counted by value and becomes IGNORE; 255 is none from the start."""
    coding = MaskEncoding(("a", "b"), made_colours(2))
    pixels = np.array([[0, 1, 2], [255, 7, 7]], np.int32)
    kept, strange = numbered(type(read_values(_png(pixels.astype(np.uint8))))(pixels), coding)
    assert kept.tolist() == [[0, 1, IGNORE], [IGNORE, IGNORE, IGNORE]]
    assert strange == {"2": 1, "7": 2}
    assert painted(kept, coding.colours)[1, 0].tolist() == [0, 0, 0]


def _png(pixels: np.ndarray) -> bytes:
    import io

    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def test_stored_masks_are_as_they_were(drawn, tmp_path):
    """Masks come back from the cache pixel for pixel, at their own size."""
    found = read_dense_set(drawn / "target")
    store = Store(tmp_path, 0, kind_of(MaskEncoding(found.classes, found.colours)))
    store.add(list(found.masks))
    masks = Masks(store.find(list(found.masks))[0], np.array([[48, 64]] * 13))
    for i, ref in enumerate(found.masks):
        assert np.array_equal(masks.one(i), np.array(Image.open(ref.container)))


# Faults, through the command


def test_images_and_masks_without_each_other(tutelage, place):
    """Every image without a mask and every mask without an image is named, all at once."""
    (place / "target" / "masks" / "train" / "train1.png").unlink()
    (place / "target" / "masks" / "val" / "val0.png").unlink()
    (place / "target" / "images" / "test" / "test2.png").unlink()
    text = refused(curate(tutelage, place))
    assert "2 images without a mask: train/train1.png, val/val0.png" in text
    assert "1 mask without an image: test/test2.png" in text


def test_faults_inside_masks_are_told_together(tutelage, place):
    """Sizes that differ, and values that are no class: which, in how many masks and pixels, and where; in one message."""
    image, mask = scene(50)
    write_pair(place / "target", "train", "apart", image, mask[:40])
    mask = mask.copy()
    mask[10:12, 10:15] = 77
    mask[20, 20] = 9
    write_pair(place / "target", "train", "strange", image, mask)
    text = refused(curate(tutelage, place))
    assert "train/apart.png (48 x 64, mask 40 x 64)" in text
    assert "77 in 1 mask (10 pixels, most in train/strange.png)" in text
    assert "9 in 1 mask (1 pixel" in text
    assert "0 to 2, and 255" in text


def test_colour_masks_without_colours(tutelage, place):
    """Masks of colours are refused with how to give the palette."""
    for path in (place / "target" / "masks" / "train").iterdir():
        Image.open(path).convert("RGB").save(path)
    text = refused(curate(tutelage, place))
    assert "6 masks hold colours" in text
    assert "name red green blue" in text


def test_unnamed_colours(place):
    """A colour that classes.txt does not name is told with its pixels."""
    image, _ = scene(51)
    mask = np.zeros((48, 64, 3), np.uint8)
    mask[:2, :3] = (9, 8, 7)
    write_pair(place / "target", "train", "colours", image, mask)
    (place / "target" / "classes.txt").write_text("ground 0 0 0\ndisc 1 1 1\nsquare 2 2 2\n")
    with pytest.raises(TutelageError, match=r"\(9, 8, 7\) in 1 mask \(6 pixels, most in train/colours.png\)"):
        read_dense_set(place / "target")


def test_classes_that_train_or_test_lack(tutelage, place):
    """A class without a pixel in train or in test is named with the split."""
    for split, lost in (("train", 2), ("test", 1)):
        for path in (place / "target" / "masks" / split).iterdir():
            mask = np.array(Image.open(path))
            Image.fromarray(np.where(mask == lost, 0, mask).astype(np.uint8)).save(path)
    text = refused(curate(tutelage, place))
    assert "no pixel of 1 class in the 6 train images: square" in text
    assert "no pixel of 1 class in the 4 test images: disc" in text


def test_masks_of_black_and_white(tutelage, place):
    """Masks of 0 and 255 are refused with what to write into classes.txt, and are read when that is done."""
    for path in (place / "target" / "masks").rglob("*.png"):
        Image.fromarray(np.where(np.array(Image.open(path)) == 1, 255, 0).astype(np.uint8)).save(path)
    file = place / "target" / "classes.txt"
    file.write_text("background\ncrack\n")
    text = refused(curate(tutelage, place))
    assert "no pixel of 1 class in the 6 train images: crack" in text
    assert "write `name 0 0 0` and `name 255 255 255` into classes.txt" in text
    file.write_text("background 0 0 0\ncrack 255 255 255\n")
    assert curate(tutelage, place).returncode == 0


@pytest.mark.parametrize(
    ("text", "told"),
    [(None, "No such file"), ("one\n", "1 names"), ("a\na\nb\n", "a twice"), ("a 1 2 3\nb\n", "no colour for b")],
)
def test_bad_class_names(place, text, told):
    """classes.txt must be there, with two names or more, each once, and colours for all or none."""
    file = place / "target" / "classes.txt"
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(TutelageError, match=told):
        read_dense_set(place / "target")


def test_settings_that_segmentation_cannot_have(tutelage, place):
    """Objectives, resizes, classes and sizes that do not go with the task are refused before anything is read."""
    words = ("--target", str(place / "target"), "--gallery", str(place / "gallery"), "--out", str(place / "run"))
    models = ("--teacher", "test_efficientnet", "--teacher-weights", "scratch", "--teacher-size", "64")
    student = ("--student", "test_resnet", "--student-weights", "scratch", "--student-size", "32x64")
    more = ("--objective", "dino", "--resize", "pad")
    text = refused(tutelage("run", "--task", "segmentation", *words, *models, *student, *more))
    assert "--objective dino with --task segmentation" in text
    assert "--resize pad with --task segmentation" in text
    for window, told in (("96", "at most 64"), ("40", "multiples of 32 px")):
        text = refused(tutelage("run", "--task", "segmentation", *words, *models, *student, "--teacher-window", window))
        assert f"--teacher-window {window} with --teacher-size 64" in text
        assert told in text
    text = refused(tutelage("run", *words, *models, *student, "--objective", "task-agnostic", "--teacher-window", "32"))
    assert "--teacher-window 32 with --task classification" in text
    assert "--student-size 32x64 with --task classification" in text
    assert not (place / "run").exists()
    with pytest.raises(TutelageError, match="--classes with --task segmentation"):
        read_dense_set(place / "target", classes=["disc"])


def test_a_size_that_is_none():
    """What is no size is told with an example of one."""
    from tutelage.settings import resolve
    from tutelage.settings.command_flags import CurateSettings

    settings = {"target": "t", "gallery": ["g"], "out": "o"}
    for wrong in ("32by64", "8x64", "0", "x", "4000"):
        with pytest.raises(TutelageError, match="HEIGHTxWIDTH, such as 256x320"):
            resolve(CurateSettings, {**settings, "student_size": wrong})
    for given, kept in (("64x64", 64), (64, 64), ("64", 64), ("64x96", "64x96"), (None, None)):
        assert resolve(CurateSettings, {**settings, "student_size": given}).student_size == kept


def test_what_only_deserves_a_word(tutelage, place):
    """Images smaller than the crop, one-class masks and broken masks are told, and the rest is used."""
    image, mask = scene(52)
    write_pair(place / "target", "train", "small", image[:24, :40], np.zeros((24, 40), np.uint8))
    write_pair(place / "target", "train", "broken", image, mask)
    path = place / "target" / "masks" / "train" / "broken.png"
    path.write_bytes(path.read_bytes()[:60])
    done = curate(tutelage, place, "--budget", "5", "--max-rejected", "0.2")
    assert done.returncode == 0, done.stderr
    assert "1 mask shows one class or none: train/small.png" in done.stderr
    assert "1 image is smaller than the student's 32 x 64 pixels and enlarged: train/small.png" in done.stderr
    assert "5 labelled images; number of images that show each class: ground 5" in done.stderr
    rejected = (place / "run" / "rejected.csv").read_text()
    assert "train/broken.png,its mask: " in rejected


def test_a_copy_within_the_test_images(tutelage, place):
    """An exact copy of a test image within the test split is told by name, and is used; one within the train split is not told."""
    for split, number in (("train", 1), ("test", 10)):
        write_pair(place / "target", split, "again", *scene(number))
    done = curate(tutelage, place)
    assert done.returncode == 0, done.stderr
    assert (
        "1 validation or test images are exact copies of another one in their split, which so counts twice"
        in done.stderr
    )
    assert done.stderr.count("again.png") == 1
    assert read_dense_set(place / "target").splits.tolist().count("test") == 5


@pytest.mark.parametrize("form", ["csv", "parquet", "bytes"])
@pytest.mark.parametrize(("first", "other"), [("mask", "annotation"), ("mask", "Mask"), ("image", "file_name")])
def test_two_columns_of_masks_or_images(place, form, first, other):
    """Two columns that may be the masks, or the images, are refused by name: none is taken in silence."""
    target = place / "target"
    images = sorted(target.glob("images/train/*"))
    columns = {"image": list(map(str, images)), "mask": [str(target / "masks" / "train" / one.name) for one in images]}
    columns[other] = columns[first][::-1]
    if form == "csv":
        lines = [columns, *zip(*columns.values(), strict=True)]
        (target / "list.csv").write_text("\n".join(map(",".join, lines)))
    else:
        inside = {name: [{"bytes": Path(one).read_bytes()} for one in column] for name, column in columns.items()}
        pq.write_table(pa.table(inside if form == "bytes" else columns), target / "list.parquet")
    with pytest.raises(TutelageError) as error:
        read_dense_set(target / f"list.{'csv' if form == 'csv' else 'parquet'}")
    told = error.value.message
    assert f"{first}, {other}" in told or f"{first} and {other}" in told or f"2 columns called {first}" in told


def test_one_name_for_two_files(tutelage, place):
    """Two images, or two masks, that differ by their ending only are an error that names them: none is dropped in silence."""
    for kind in ("images", "masks"):
        first = sorted((place / "target" / kind / "train").iterdir())[0]
        Image.open(first).convert("RGB").save(first.with_suffix(".bmp"))
    told = refused(curate(tutelage, place))
    for kind in ("images", "masks"):
        assert f"{kind} has 1 name twice, with two endings: train/" in told


@pytest.mark.parametrize(
    "names", [("training", "validation", "testing"), ("train2017", "val2017", "test2017"), ("Train_set", "Val", "Test")]
)
def test_usual_names_of_splits(place, names):
    """Folders of splits are known by their usual names, and never become train images without a word."""
    found = read_dense_set(place / "target")
    for kind in ("images", "masks"):
        for split, name in zip(("train", "val", "test"), names, strict=True):
            (place / "target" / kind / split).rename(place / "target" / kind / name)
    assert same(read_dense_set(place / "target"), found)


def test_a_folder_called_training_alone(place):
    """Without another split beside it, a folder called training is a group of images like any other."""
    for kind in ("images", "masks"):
        for split, name in (("train", "training"), ("val", "indoors"), ("test", "outdoors")):
            (place / "target" / kind / split).rename(place / "target" / kind / name)
    splits = read_dense_set(place / "target").splits
    assert {*splits.tolist()} == {"train", "test"}  # a part is held out, as of images without folders


@pytest.mark.parametrize("other", ["mask", "split"])
def test_an_image_listed_twice(drawn, tmp_path, other: str):
    """The same row twice counts once; the same image with another mask or split is an error that names it."""
    images = sorted((drawn / "target" / "images" / "train").iterdir())[:3]
    rows = [[str(path), str(path).replace("/images/", "/masks/"), "train"] for path in images]
    rows += [
        [str(path), str(path).replace("/images/", "/masks/"), "test"]
        for path in sorted((drawn / "target" / "images" / "test").iterdir())
    ]
    shutil.copy(drawn / "target" / "classes.txt", tmp_path)

    def write(*more: list[str]) -> Path:
        with (tmp_path / "list.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["image", "mask", "split"], *rows, *more])
        return tmp_path / "list.csv"

    shutil.copytree(drawn / "target", tmp_path / "here")
    rows = [[name.replace(str(drawn / "target"), "here") for name in row] for row in rows]
    dotted = ["./" + rows[0][0], "here/../" + rows[0][1], "training"]
    found = read_dense_set(write(rows[0], dotted, [name.replace("/", "\\") for name in rows[1]]))
    assert len(found.refs) == len(rows)
    assert "3 rows repeat another row and are counted once" in " ".join(found.notes)
    again = [rows[0][0], rows[1][1], "train"] if other == "mask" else [*rows[0][:2], "test"]
    with pytest.raises(TutelageError, match="1 image is listed twice with two masks, splits or groups"):
        read_dense_set(write(again))


def test_a_list_from_windows(drawn, tmp_path):
    """Backslashes in a list are read as slashes."""
    place = Path(shutil.copytree(drawn / "target", tmp_path / "place"))
    names = [path.relative_to(place / "images") for path in sorted((place / "images").rglob("*")) if path.is_file()]
    rows = [f"images/{name},masks/{name.with_suffix('.png')},{name.parts[0]}".replace("/", "\\") for name in names]
    (place / "list.csv").write_text("\n".join(["image,mask,split", *rows]))
    assert same(read_dense_set(place / "list.csv"), read_dense_set(place))
