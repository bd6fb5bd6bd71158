"""What the command says and leaves behind when something is wrong with what it was given.

Every fault goes through the command: exit code 2, a message of three parts, no traceback, and nothing of the user's is lost.
Most are given to it in this process, which has imported what takes seconds; one of the command line, of settings, of data and
of a run folder, and what concerns the process itself, in one of its own (`own=True`, variables or options).
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import tutelage as package
from conftest import BEGUN, KNOWN, MODELS, Task, draw, environment, make_task, refused, rejected
from tutelage.data.manifest import load_task
from tutelage.errors import TutelageError
from tutelage.files import write_json
from tutelage.run_folder import Run

# The command line and the TOML file


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["rum"], "did you mean 'run'"),
        (["run", "--teachr", "dinov2-s"], "did you mean '--teacher'"),
        (["run", "--galery", "g"], "did you mean '--gallery'?"),
        (["run", "--epochs", "many"], "--epochs"),
        (["run", "--epochs", "1", "--epochs", "2"], "--epochs specified multiple times"),
        (["run", "--target", "d", "--gallery", "g", "--out", "o", "--flip", "horizontl"], "did you mean 'horizontal'?"),
        (["run", "--target", "d", "--gallery", "g", "--out", "o", "--lr", "2"], "--lr 2"),
        (["run", "--target", "d", "--gallery", "g", "--out", "o", "--feature-weight", "inf"], "--feature-weight inf"),
        (["cache", "--prune", "inf"], "--prune inf"),
        (
            ["curate", "--target", "d", "--gallery", "g", "--out", "o", "--memory", "inf"],
            "--memory inf must be a finite number",
        ),
        (
            ["run", "--target", "d", "--gallery", "g", "--out", "o", "--cache-limit", "nan"],
            "--cache-limit nan must be a finite number",
        ),
        *(
            (words, "has a name of 300 bytes, but file systems take at most 255")
            for words in (
                ["run", "--target", "d", "--gallery", "g", "--out", "n" * 300],
                ["evaluate", "a/" + "n" * 300 + "/b"],
                ["export", "n" * 300],
                ["cache", "--cache", "n" * 300],
                ["report", "a" * 200 + "/" + "é" * 150],
                ["predict", "e", "n" * 300],
                ["run", "--target", "d", "--gallery", "g", "n" * 300, "--out", "o"],
                ["demo", "--out", "n" * 300],
                ["benchmark", "n" * 300],
                ["doctor", "--cache", "n" * 300],
            )
        ),
        (["run", "--config", "n" * 300], "File name too long"),
        (["compare", "n" * 300], "File name too long"),
        (["run", "--target"], "--target"),
        (["run", "d"], "d"),
        (["evaluate", "--run", "nowhere"], "nowhere is not a run folder"),
        (["adapt", "--out", "nowhere"], "tutelage curate"),
    ],
)
def test_words_that_make_no_command(tutelage, words, told, tmp_path, monkeypatch):
    """Unknown commands, flags and values are told with what is allowed, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    assert told in refused(tutelage(*words, own=words == ["rum"]))
    assert list(tmp_path.iterdir()) == []


def test_missing_settings_are_told_together(tutelage):
    """A bare `run` names all three settings that it needs."""
    text = refused(tutelage("run"))
    assert all(f"no --{name}" in text for name in ("target", "gallery", "out"))


def test_settings_of_the_targets_have_their_ranges(tutelage, tmp_path, monkeypatch):
    """A share of labels that leaves no other image, and names that are none, are refused with what is allowed, all at once."""
    monkeypatch.chdir(tmp_path)
    words = ("run", "--target", "d", "--gallery", "g", "--out", "o")
    text = refused(
        tutelage(*words, "--label-share", "1", "--temperature", "0", "--committee", "alll", "--preset", "papr")
    )
    for given, allowed in (
        ("--label-share 1", "less than 1"), ("--temperature 0", "greater than 0"), ("--committee alll", "'auto', 'none' or 'only'"),
        ("--preset papr", "'none' or 'paper'"),
    ):  # fmt: skip
        assert allowed in text[text.index(f"error: {given}") :].split("error: ")[1]
    assert "did you mean 'paper'?" in text
    assert "--label-share -0.1" in refused(tutelage("distill", "--out", "o", "--label-share", "-0.1"))
    assert list(tmp_path.iterdir()) == []


def test_bad_toml(tutelage, tmp_path):
    """A TOML file that is missing, broken, or has unknown keys or impossible values is told with its place."""
    file = tmp_path / "settings.toml"
    file.write_text("epochs == 2")
    assert "line 1" in refused(tutelage("run", "--config", str(file)))
    assert "did you mean 'settings.toml'?" in refused(tutelage("run", "--config", str(tmp_path / "setings.toml")))
    file.write_text('teechr = "dinov2-s"\nbudget = 0\nsmoke = "perhaps"\n[run]\nseed = 1\n')
    text = refused(tutelage("run", "--config", str(file)))
    assert "did you mean 'teacher'?" in text
    assert f"{file}: setting 'run'" in text
    assert "--budget 0" in text
    assert "--smoke perhaps" in text


def test_flag_beats_file(tutelage, task):
    """A flag stands over the TOML file, and the file over the default."""
    file = task.root / "settings.toml"
    file.write_text(f'target = "{task.root / "absent"}"\nseed = 7\nbudget = 3\n')
    done = tutelage(*task.words("curate", "--config", str(file), "--budget", "2"))
    assert done.returncode == 0, done.stderr
    settings = Run(task.out).settings()["settings"]
    assert (settings["seed"], settings["budget"], settings["target"]) == (7, 2, str(task.target))


def test_one_string_for_a_list(tutelage, task):
    """A setting that takes several values takes one as it is, in a TOML file too."""
    file = task.root / "settings.toml"
    file.write_text(f'gallery = "{task.gallery}"\n')
    words = task.words("curate", "--config", str(file))
    at = words.index("--gallery")
    done = tutelage(*words[:at], *words[at + 2 :])
    assert done.returncode == 0, done.stderr
    assert Run(task.out).settings()["settings"]["gallery"] == [str(task.gallery)]
    file.write_text('gallery = ""\n')
    assert "--gallery is empty" in refused(tutelage(*words[:at], *words[at + 2 :]))


# Settings that cannot work


@pytest.mark.slow
def test_all_faults_of_settings_are_told_at_once(tutelage, task):
    """Names, sizes, devices, weights, paths and folders that cannot work are told in one message; nothing is written."""
    (task.root / "runs").write_text("a file")
    (task.root / "mine.safetensors").write_text("")
    words = [
        *("--target", f"{task.target}s", "--gallery", str(task.gallery), str(task.root / "galery"), "--test", "1.5"),
        *("--group-by", "(", "--teacher", "dinov2-z", "--student", "fastvit-t9", "--student-size", "32"),
        *("--student-weights", str(task.root / "min.safetensors"), "--device", "mps", "--precision", "fp16"),
        *("--tracker", "wandb" if not _installed("wandb") else "mlflow"),
    ]
    text = refused(tutelage(*task.words("run", *words), own=True))
    for told in (
        f"--target {task.target}s: no such", "did you mean 'target'?", f"--gallery {task.root / 'galery'}: no such",
        "did you mean 'gallery'?", "--test 1.5", "--group-by '('", "--teacher dinov2-z: no such model", "'dinov2-s'",
        "--student fastvit-t9: no such model", "'fastvit-t8'", "min.safetensors: no such file", "'mine.safetensors'",
        "--device mps", "--precision fp16", "--tracker", f"--out {task.out}: {task.root / 'runs'} is a file", "--cache",
    ):  # fmt: skip
        assert told in text, f"{told} in {text}"
    assert sorted(p.name for p in task.root.iterdir()) == ["gallery", "mine.safetensors", "runs", "target"]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--strategy", "all", "--total", "20"], ["--total 20 with --strategy all", "--strategy balanced"]),
        (["--strategy", "random"], ["--strategy random without --total"]),
        (["--epochs", "2", "--steps", "3"], ["--epochs 2 and --steps 3"]),
    ],
)
def test_settings_that_contradict_each_other(tutelage, task, more, told):
    """Settings of which only one can be meant are refused together, and nothing is written."""
    text = refused(tutelage(*task.words("run", *more)))
    assert all(part in text for part in told)
    assert not task.out.parent.exists()


def test_a_batch_that_the_processes_cannot_share(tutelage, task):
    """A batch is a multiple of the number of processes, and the message gives one."""
    text = refused(
        tutelage(*task.words("run", *KNOWN), WORLD_SIZE="3", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29551")
    )
    assert "--batch-size 8 on 3 processes" in text
    assert "use --batch-size 6" in text


@pytest.mark.slow
def test_stages_that_one_process_does(tutelage, task):
    """`curate` in several processes of one group would write one folder together: refused, and the way for several machines named."""
    text = refused(tutelage(*task.words("curate", *KNOWN), WORLD_SIZE="2", RANK="1"))
    assert "this stage in 2 processes" in text
    assert "--shard env" in text
    assert not task.out.exists()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_group_that_nothing_holds_together(tutelage, task, rank):
    """WORLD_SIZE and RANK that a job left in the environment, without an address, are told at once by every process; nothing is written."""
    text = refused(tutelage(*task.words("run", *KNOWN), WORLD_SIZE="2", RANK=rank))
    assert text.count("error: ") == 1
    assert "WORLD_SIZE=2 in the environment, without MASTER_ADDR and MASTER_PORT" in text
    assert "unset WORLD_SIZE RANK" in text
    assert not task.out.parent.exists()


def _installed(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


def test_a_mistyped_path_is_told_before_torch_loads(tutelage, task):
    """With names that we know, a fault of paths costs no import of torch or timm."""
    done = tutelage(*task.words("run", *KNOWN, "--target", "absent"), options=("-X", "importtime"))
    message = "\n".join(line for line in done.stderr.splitlines() if not line.startswith("import time"))
    assert done.returncode == 2
    assert "--target absent: no such file or folder" in message
    assert "| torch" not in done.stderr.replace("|   ", "| ")
    assert " timm\n" not in done.stderr
    assert not task.out.parent.exists()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--teacher", "dinov2-s", "--teacher-size", "100"], "use 98 or 112"),
        (
            [
                "--teacher",
                "efficientformer_l1",
                "--teacher-size",
                "96",
                "--student",
                "mobilenetv9",
                "--student-size",
                "64",
            ],
            "use 224 px; --student mobilenetv9: no such model",
        ),
    ],
)
def test_curate_checks_models_too(tutelage, task, more, told):
    """Sizes and names are checked by `curate` as well, whether or not a size is given."""
    text = refused(tutelage(*task.words("curate", *more)))
    assert all(part in text for part in told.split("; "))
    assert not task.out.parent.exists()


@contextlib.contextmanager
def silent_server() -> Iterator[str]:
    """An address that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=8) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.slow
def test_hub_out_of_reach(tutelage, task):
    """A hub that does not answer is told within five seconds with two other ways, before an image is decoded."""
    words = task.words("run", "--teacher", "dinov2-s", "--teacher-weights", "pretrained", "--teacher-size", "98")
    with silent_server() as address:
        began = time.monotonic()
        text = refused(tutelage(*words, HF_ENDPOINT=address, HF_HOME=str(task.root / "hub")))
        assert time.monotonic() - began < 20  # five, and the import of timm on a busy machine
    assert "--teacher dinov2-s" in text or "vit_small_patch14_dinov2" in text
    assert "--teacher-weights FILE" in text
    assert "package" in text
    assert not task.out.parent.exists()


def test_weights_that_do_not_fit(tutelage, task):
    """Weights of another architecture, and weights with NaN, are refused before an image is decoded."""
    import timm
    import torch
    from safetensors.torch import save_file

    other, spoilt = task.root / "other.safetensors", task.root / "spoilt.safetensors"
    save_file(timm.create_model("mobilenetv3_small_075").state_dict(), other)
    state = timm.create_model("tf_efficientnet_lite0").state_dict()
    state["conv_head.weight"][0] = torch.nan
    save_file(state, spoilt)
    text = refused(
        tutelage(*task.words("run", *KNOWN, "--student-weights", str(other), "--teacher-weights", str(spoilt)))
    )
    assert "blocks.0.0.conv_pw.weight: (16, 16, 1, 1) in the file, (8, 16, 1, 1) in the model" in text
    assert "NaN or infinity in conv_head.weight" in text
    assert not task.out.parent.exists()


def test_read_only_output(tutelage, task):
    """A run folder on a disk mounted read-only is refused; nothing changes there."""
    there = task.root / "read-only"
    there.mkdir()
    with mounted("--bind", str(there), str(there)):
        subprocess.run(["mount", "-o", "remount,ro,bind", str(there)], check=True)
        assert "mounted read-only" in refused(tutelage(*task.words("run", "--out", str(there / "run"))))
        assert list(there.iterdir()) == []


@contextlib.contextmanager
def mounted(*words: str) -> Iterator[None]:
    """A mount for the length of a test, which is skipped where mounting is not permitted."""
    done = (
        subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
        if shutil.which("mount")
        else None
    )
    if done is None or done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip() if done else 'no mount'}")
    try:
        yield
    finally:
        subprocess.run(["umount", words[-1]], check=True)


def test_a_folder_with_other_things_in_it(tutelage, task):
    """A run is not written among the user's own files."""
    text = refused(tutelage(*task.words("run", "--out", str(task.target))))
    assert "contains other files" in text
    assert sorted(p.name for p in task.target.iterdir()) == ["test", "train"]


# Data that cannot be used


def test_empty_folders(tutelage, task):
    """A target set and a gallery without images are told, with the forms that can be read."""
    (task.root / "empty").mkdir()
    text = refused(tutelage(*task.words("run", "--target", str(task.root / "empty"))))
    assert "no labelled images" in text
    assert "train|val|test/<class>/*" in text
    assert "no images in it" in refused(tutelage(*task.words("run", "--gallery", str(task.root / "empty"))))
    assert task.files() == BEGUN


def test_a_mended_setting_goes_on_in_the_same_folder(tutelage, task):
    """While no stage has finished, another setting is no other run: who mends a path need not choose a new folder."""
    (task.root / "empty").mkdir()
    refused(tutelage(*task.words("curate", "--gallery", str(task.root / "empty"))))
    assert tutelage(*task.words("curate")).returncode == 0


def test_one_class(tutelage, task):
    """One class is no task."""
    text = refused(tutelage(*task.words("run", "--target", str(task.target / "train" / "c0"))))
    assert "no labelled images" in text or "no class folder" in text
    for name in ("c1", "c2"):
        shutil.rmtree(task.target / "train" / name)
        shutil.rmtree(task.target / "test" / name)
    assert "one class only (c0)" in refused(tutelage(*task.words()))
    assert task.files() == BEGUN


def test_class_with_one_image_and_test_classes_without_train(tutelage, task):
    """A class with one image and test classes that train lacks are told together, by name."""
    for i in range(1, 6):
        (task.target / "train" / "c0" / f"{i}.png").unlink()
    draw(task.target / "test" / "c3" / "0.png", 3, 99)
    text = refused(tutelage(*task.words()))
    assert "1 class has one train image: c0" in text
    assert "test has classes that train lacks: c3" in text
    assert task.files() == BEGUN


def spoil(folder: Path) -> dict[str, str]:
    """Put images that cannot be used into a folder; their names and a word of the reason."""
    whole = folder / "0.png"
    (folder / "cut.png").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (folder / "zero.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("this is no image")
    (folder / "noise.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(200)))
    _huge(folder / "huge.png", 20_000)
    os.symlink(folder / "nothing.png", folder / "link.png")
    reasons = {
        "cut": "cut off",
        "zero": "empty",
        "text": "not an image",
        "noise": "cannot be decoded",
        "huge": "pixels",
    }
    reasons = {f"{name}.{'jpg' if name in ('zero', 'text') else 'png'}": why for name, why in reasons.items()}
    return {**reasons, "link.png": "a link to nothing"}


def _huge(path: Path, side: int) -> None:
    """A whole black-and-white PNG of side x side pixels, 50 kB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes((1 + (side + 7) // 8) * side), 1)
    head = struct.pack(">2I5B", side, side, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


@pytest.mark.slow
def test_unusable_images(tutelage, task):
    """Images that cannot be used are listed with the reason; above --max-rejected the run stops before any training."""
    reasons = spoil(task.gallery)
    (task.target / "train" / "c0" / "bad.png").write_bytes(b"no")
    text = refused(tutelage(*task.words(), own=True))
    assert "7 of 61 images cannot be used (11.5 %)" in text
    assert "at most 5 % (--max-rejected 0.05)" in text
    assert task.files() == ["rejected.csv", "settings.toml"]
    told = rejected(task)
    assert set(told) == {*reasons, "train/c0/bad.png"}
    assert all(why in told[name] for name, why in reasons.items())
    done = tutelage(*task.words("curate", "--max-rejected", "0.2"))
    assert done.returncode == 0, done.stderr
    assert set(rejected(task)) == set(told)
    assert "7 of 61 images cannot be used; they are listed in" in done.stderr


def test_a_class_that_loses_all_its_images(tutelage, task):
    """When no image of a class can be used the run stops and names the class."""
    for path in (task.target / "train" / "c1").iterdir():
        path.write_bytes(b"")
    text = refused(tutelage(*task.words("run", "--max-rejected", "1")))
    assert "no usable train image in 1 of 3 classes: 'c1'" in text
    assert len(rejected(task)) == 6


@pytest.mark.parametrize(("split", "more"), [("test", ()), ("val", ()), ("test", ("--val", "0.2"))])
def test_a_split_that_loses_all_its_images(tutelage, task, split, more):
    """When no test or validation image can be used the run stops and says so: nothing would be judged on them."""
    if split == "val":
        shutil.copytree(task.target / "test", task.target / "val")
        for path in (task.target / "val").rglob("*.png"):
            path.write_bytes(b"")
    else:
        for path in (task.target / "test").rglob("*.png"):
            path.write_bytes(path.read_bytes()[:60])
    text = refused(tutelage(*task.words("run", "--max-rejected", "1", *more)))
    assert f"no {split} image can be used, of " in text


def test_one_image_with_two_labels_or_in_two_splits(tutelage, task):
    """The same pixels under two labels, or among labelled and test images, are refused with the pairs."""
    shutil.copy(task.target / "train" / "c0" / "0.png", task.target / "train" / "c1" / "copy.png")
    shutil.copy(task.target / "train" / "c2" / "0.png", task.target / "test" / "c2" / "copy.png")
    text = refused(tutelage(*task.words()))
    assert "train/c0/0.png (train, c0) = train/c1/copy.png (train, c1)" in text
    assert "train/c2/0.png (train, c2) = test/c2/copy.png (test, c2)" in text or (
        "test/c2/copy.png (test, c2) = train/c2/0.png (train, c2)" in text
    )
    assert task.files() == BEGUN


@pytest.mark.parametrize(
    ("folders", "told"),
    [
        ({"train": "apprentissage", "test": "essai"}, "if apprentissage is a split, call it train, val or test"),
        ({"train": "Trainingsbilder/images", "test": "Pruefbilder/images"}, "or several?"),
        ({"train": "2024/train/a", "test": "2024/test/b"}, "--target .../2024"),
    ],
)
def test_folders_of_unknown_meaning(tutelage, task, folders, told):
    """Folders that may be splits or classes are asked about, with what to do; their classes are not merged."""
    for name, other in folders.items():
        (task.target / other).parent.mkdir(parents=True, exist_ok=True)
        (task.target / name).rename(task.target / other)
        (task.target / other / "stray.png").write_bytes((task.gallery / "0.png").read_bytes())
    text = refused(tutelage(*task.words("curate")))
    assert "images of its own, but folders of images (" in text
    assert told in text
    assert task.files() == BEGUN


def test_shards_whose_labels_are_not_their_folders(tutelage, task):
    """Shards with labels below folders of years are refused; given as they should lie, they are read by their labels."""
    images = sorted(task.target.glob("train/*/*.png"))
    for year in ("year=2023", "year=2024"):
        (task.root / "new" / year).mkdir(parents=True)
        with tarfile.open(task.root / "new" / year / f"{year}.tar", "w") as tar:
            for number, path in enumerate(images[year == "year=2024" :: 2]):
                tar.add(path, f"{number}.png")
                (task.root / "label").write_text(json.dumps({"class_name": path.parent.name}))
                tar.add(task.root / "label", f"{number}.json")
    words = task.words("curate", "--target", str(task.root / "new"))
    text = refused(tutelage(*words))
    assert "lies in the class folder year=2023, but holds labels of its own: 'c0', 'c1', 'c2'" in text
    assert task.files() == BEGUN
    for path in (task.root / "new").glob("*/*.tar"):
        path.rename(task.root / "new" / path.name)
        path.parent.rmdir()
    assert tutelage(*words).returncode == 0
    assert json.loads((task.out / "curate" / "result.json").read_text())["classes"] == ["c0", "c1", "c2"]


def test_folders_that_systems_leave_and_a_copy_in_the_test_split(tutelage, task):
    """Recycle bins and snapshots are neither classes nor gallery; a test image that is there twice is used, and told once."""
    for folder in (task.target, task.target / "train", task.target / "test" / "c1", task.gallery):
        for number, name in enumerate(("@Recycle", "#snapshot", "Temporary Items", "LOST.DIR", "node_modules/thing")):
            draw(folder / name / "0.png", 1, 900 + number)
    shutil.copy(task.target / "test" / "c1" / "0.png", task.target / "test" / "c1" / "copy.png")
    done = tutelage(*task.words("curate"))
    assert done.returncode == 0, done.stderr
    said = "which so counts twice in the scores: test/c1/0.png (test, c1) = test/c1/copy.png (test, c1); remove one"
    assert done.stderr.count(said) == 1
    result = json.loads((task.out / "curate" / "result.json").read_text())
    assert (result["classes"], result["gallery"], result["rejected"]) == (["c0", "c1", "c2"], 24, 0)
    assert result["images"]["test"] == 13


def test_two_columns_called_label(tutelage, task):
    """A list with two columns that may be the label, and differ, is refused with both names."""
    rows = [f"{one},{one.parent.name},{number}" for number, one in enumerate(sorted(task.target.glob("train/*/*.png")))]
    (task.root / "list.csv").write_text("\n".join(["file,class,label", *rows]))
    text = refused(tutelage(*task.words("curate", "--target", str(task.root / "list.csv"))))
    assert "two columns that may be the label, label and class, and they differ" in text
    assert task.files() == BEGUN


def test_a_list_that_names_missing_files(tutelage, task):
    """All files that a list names in vain are told at once."""
    rows = [f"train/c{label}/{i}.png,c{label}" for label in range(3) for i in range(8)]
    (task.target / "labels.csv").write_text("\n".join(["path,label", *rows]))
    text = refused(tutelage(*task.words("run", "--target", str(task.target / "labels.csv"))))
    assert "names 6 files that do not exist" in text
    assert all(f"train/c{label}/{i}.png" in text for label in range(3) for i in (6, 7))
    assert task.files() == BEGUN


def test_a_list_that_names_many_missing_files(tutelage, task):
    """Of 150 files that lists name in vain the message names some, and rejected.csv all; once they are there it is gone."""
    names = [f"train/c{i % 3}/absent-{i}.png" for i in range(150)]
    rows = [f"train/c{label}/{i}.png,c{label}" for label in range(3) for i in range(6)]
    (task.target / "labels.csv").write_text(
        "\n".join(["path,label", *rows, *(f"{name},{name[6:8]}" for name in names)])
    )
    words = task.words("curate", "--target", str(task.target / "labels.csv"))
    text = refused(tutelage(*words))
    assert "names 150 files that do not exist" in text
    assert f"{names[19]} and 130 more" in text
    assert f"{task.out / 'rejected.csv'} lists them all" in text
    assert rejected(task) == dict.fromkeys(names, "is not there")
    for number, name in enumerate(names):
        draw(task.target / name, number % 3, 2000 + number)
    assert tutelage(*words).returncode == 0
    assert "rejected.csv" not in task.files()


def test_a_corrected_label_is_seen(tutelage, task):
    """A label that is corrected in the list counts in the next run, also when a budget is given."""
    rows = [f"train/c{label}/{i}.png,c{label},train" for label in range(3) for i in range(6)]
    rows += [f"test/c{label}/{i}.png,c{label},test" for label in range(3) for i in range(4)]
    words = task.words("curate", "--target", str(task.target / "labels.csv"), "--budget", "6")
    outputs = []
    for row in (rows[0], rows[0].replace("c0,train", "c1,train")):
        (task.target / "labels.csv").write_text("\n".join(["path,label,split", row, *rows[1:]]))
        done = tutelage(*words)
        assert done.returncode == 0, done.stderr
        outputs.append(json.loads((task.out / "curate" / "result.json").read_text())["outputs"])
    assert outputs[0] != outputs[1]


def test_a_gallery_of_test_images_only(tutelage, task):
    """A gallery that has no image that may be learnt from is refused, with the counts."""
    text = refused(tutelage(*task.words("run", "--gallery", str(task.target / "test"))))
    assert "of 12 images 12 are validation or test images" in text
    assert task.files() == BEGUN


# What is odd, and works


@pytest.fixture(scope="module")
def odd(tmp_path_factory, tutelage) -> tuple[Task, subprocess.CompletedProcess[str]]:
    """A run on a task with odd names, a few bad images, test images in the gallery, and a class below the budget."""
    task = make_task(tmp_path_factory.mktemp("odd") / "tâche d'été")
    for split in ("train", "test"):
        (task.target / split / "c0").rename(task.target / split / 'naïve 猫  class, "quoted"')
    names = ["tab\there.png", "új sor\n.png", "猫.png", "--flag.png", "a,b'c\"d.png"]
    for i, name in enumerate(names):
        (task.gallery / f"{i}.png").rename(task.gallery / name)
    (task.gallery / os.fsdecode(b"latin-\xe9.png")).write_bytes((task.gallery / "9.png").read_bytes())
    (task.gallery / "10.png").write_bytes(b"broken")
    for i in range(2):
        shutil.copy(task.target / "test" / "c1" / f"{i}.png", task.gallery / f"seen-{i}.png")
    (task.target / "train" / "c2" / "5.png").unlink()
    return task, tutelage(*task.words("run", "--budget", "6", "--json"))


def test_odd_names_and_a_few_bad_images(odd):
    """Unicode, line breaks and bytes that are no text in names work, and bad images below the limit do not stop a run."""
    task, done = odd
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["distilled"]["test"]["images"] == 12
    assert set(rejected(task)) == {"10.png"}
    classes = json.loads((task.out / "curate" / "result.json").read_text())["classes"]
    assert 'naïve 猫  class, "quoted"' in classes


def test_test_images_in_the_gallery(odd):
    """Gallery images that are test images stay out of the transfer set, and are counted and listed."""
    task, done = odd
    with (task.out / "curate" / "leaks.csv").open(newline="") as file:
        leaks = {row["gallery_image"]: row["is"] for row in csv.DictReader(file)}
    assert leaks == {f"seen-{i}.png": f"test/c1/{i}.png" for i in range(2)}
    assert "2 gallery images are validation or test images and stay out" in done.stderr
    assert json.loads((task.out / "curate" / "result.json").read_text())["leaks"] == 2


def test_a_budget_above_a_class(odd):
    """The log names every class that has fewer images than the budget."""
    assert "class 'c2' has 5 train images, fewer than the budget of 6" in odd[1].stderr


def test_new_images_that_are_cut_off(odd, tutelage, tmp_path):
    """New images that cannot be read are named in one error, up to twenty of them and then their number; the run stays."""
    task, _ = odd
    before = (task.out / "evaluate" / "result.json").read_bytes()
    new = Path(shutil.copytree(task.target / "test", tmp_path / "new"))
    whole = (new / "c1" / "0.png").read_bytes()
    for number in range(22):
        (new / "c1" / f"cut-{number:02d}.png").write_bytes(whole[: len(whole) // 2])
    text = refused(tutelage("evaluate", str(task.out), "--target", str(new)))
    assert "22 images cannot be used" in text
    assert [f"c1/cut-{number:02d}.png (" in text for number in range(22)] == [True] * 20 + [False] * 2
    assert "and 2 more" in text
    for number in range(2, 22):
        (new / "c1" / f"cut-{number:02d}.png").unlink()
    text = refused(tutelage("evaluate", str(task.out), "--target", str(new)))
    assert "c1/cut-00.png (" in text
    assert "c1/cut-01.png (" in text
    assert (task.out / "evaluate" / "result.json").read_bytes() == before


def test_photos_whose_names_are_not_utf8(tutelage, task):
    """Photos of the target set and of the gallery whose names are in another encoding are used, and found again by later stages."""
    for path in (
        task.target / "train" / "c1" / "0.png",
        task.target / "test" / "c0" / "1.png",
        *task.gallery.glob("1*.png"),
    ):
        path.rename(path.with_name(os.fsdecode(path.stem.encode() + b"-\xfc.png")))
    done = tutelage(*task.words("curate", "--dedup", "none"))
    assert done.returncode == 0, done.stderr
    data = load_task(task.out, task.root / "cache")
    assert len(data.transfer) == 18 + 24
    assert "train/c1/0-\\xfc.png" in data.train.ids
    (task.target / "train" / os.fsdecode(b"\xfc")).mkdir()
    assert r"class folders whose names are not UTF-8: b'\xfc'" in refused(
        tutelage(*task.words("curate", "--dedup", "none"))
    )


@pytest.mark.parametrize(
    "name", ["my\x1b[31m*run*\nX", "bell\x07", "tab\there", os.fsdecode(b"r\xe9sultats"), "next\x85line"]
)
def test_paths_with_control_characters(tutelage, task, name):
    """A path that could not be shown or written down is refused with its flag, harmlessly for the terminal; nothing is made."""
    for flag in ("--out", "--target"):
        text = refused(tutelage(*task.words("curate", flag, str(task.root / name))))
        assert f"error: {flag} " in text
        assert "holds control characters" in text or "is not valid UTF-8" in text
        assert text.replace("\n", "").isprintable()
    assert not (task.root / name).exists()


# A folder that holds something already


@pytest.mark.slow
def test_a_finished_folder_with_other_settings(odd, tutelage):
    """Other settings in a finished folder are refused by name; --overwrite moves the old run aside and loses nothing."""
    task, _ = odd
    before = {name: (task.out / name).read_bytes() for name in task.files()}
    text = refused(tutelage(*task.words("run", "--budget", "5", "--seed", "3"), own=True))
    assert "budget: 6 -> 5" in text
    assert "seed: 0 -> 3" in text
    assert "--overwrite" in text
    assert {name: (task.out / name).read_bytes() for name in task.files()} == before
    done = tutelage(*task.words("curate", "--budget", "5", "--overwrite"))
    assert done.returncode == 0, done.stderr
    old = [p for p in task.out.parent.iterdir() if p.name.startswith(f"{task.out.name}.old-")]
    assert len(old) == 1
    assert str(old[0]) in done.stderr
    assert {name: (old[0] / name).read_bytes() for name in before} == before
    assert json.loads((task.out / "curate" / "result.json").read_text())["images"]["train"] == 15


def test_a_folder_at_work(tutelage, task):
    """A second run in a folder at work is refused and names the process; the folder stays as it was."""
    with Run(task.out):
        text = refused(tutelage(*task.words()))
        assert f"is in use by process {os.getpid()}" in text
        assert task.files() == []
    assert tutelage(*task.words("curate")).returncode == 0


def test_a_broken_settings_file(tutelage, task):
    """A settings.toml that cannot be read is refused; --overwrite moves it aside."""
    assert tutelage(*task.words("curate")).returncode == 0
    (task.out / "settings.toml").write_text("x = [")
    assert "`tutelage run ... --overwrite`" in refused(tutelage(*task.words("curate", "--dedup", "none")))
    assert tutelage(*task.words("curate", "--overwrite")).returncode == 0
    (old,) = task.out.parent.glob("first.old-*")
    assert (old / "settings.toml").read_text() == "x = ["


# What goes wrong on the way


def test_full_disk(tutelage, task):
    """A full disk is told with what to free and leaves no half files; with room the same command finishes."""
    disk = task.root / "disk"
    disk.mkdir()
    words = task.words("run", "--out", str(disk / "run"), "--steps", "4")
    with mounted("-t", "tmpfs", "-o", "size=40m", "tmpfs", str(disk)):
        for room, where in ((120_000, "decoded images"), (4_000_000, "checkpoints/")):
            (disk / "filler").unlink(missing_ok=True)
            (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - room))
            text = refused(tutelage(*words))
            assert where in text
            assert "free some space" in text
            assert list(disk.rglob(".tutelage-partial-*")) == []
        assert f"No space left on device ({shutil.disk_usage(disk).free / 2**20:,.1f} MiB are free" in text
        assert f"tutelage cache --cache {disk / 'cache'}" in text
        (disk / "filler").unlink()
        done = tutelage(*words, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["reused"] == ["curate", "adapt"]


@pytest.mark.slow
def test_loss_that_is_no_number(tutelage, task):
    """A loss that is no number stops the run and names the step; what was finished before is kept."""
    import timm
    from safetensors.torch import save_file

    state = timm.create_model("mobilenetv3_small_050").state_dict()
    state["conv_head.weight"].fill_(3e38)  # finite, and too large to be multiplied
    save_file(state, task.root / "large.safetensors")
    text = refused(tutelage(*task.words("run", *KNOWN, "--student-weights", str(task.root / "large.safetensors"))))
    assert "distill: the loss of step " in text
    assert " is nan" in text
    assert "lower --lr" in text
    assert "adapt/result.json" in task.files()
    assert not [name for name in task.files() if name.startswith(("distill/result", "distill/weights", "checkpoints"))]


@pytest.mark.slow
def test_ctrl_c(task, tutelage):
    """Ctrl-C in the middle of training ends with 130 and says how to go on; the same command goes on from there."""
    words = task.words("run", "--steps", "40")
    command = [sys.executable, "-m", "tutelage", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  what runs in the background of a shell hears no Ctrl-C
    with subprocess.Popen(command, env=environment(), text=True, preexec_fn=heard, **pipes) as process:
        began = time.monotonic()
        while process.poll() is None and time.monotonic() - began < 120:
            if any(path.suffix == ".safetensors" for path in task.out.glob("checkpoints/*")):
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    assert "run the same command again:\n  tutelage run --target" in err
    assert list(task.root.rglob(".tutelage-partial-*")) == []
    done = tutelage(*words, "--json")
    assert done.returncode == 0, done.stderr
    assert "distill goes on after step" in done.stderr
    assert json.loads(done.stdout)["reused"] == ["curate", "adapt"]
    assert not (task.out / "checkpoints").exists()


@pytest.mark.parametrize(
    ("student", "size", "objective"),
    [("levit_128s", 64, "task-agnostic"), ("dla46x_c", 64, "dino"), ("haloregnetz_b", 64, "task-oriented")],
)
def test_students_that_cannot_be_trained_so(task, student, size, objective):
    """A student that its size or the objective does not suit is refused before anything is read or written."""
    models = {
        "teacher": "test_efficientnet",
        "teacher_weights": "scratch",
        "teacher_size": 32,
        "student_weights": "scratch",
    }
    with pytest.raises(TutelageError, match=f"--student {student}") as error:
        package.run(
            target=str(task.target), gallery=[str(task.gallery)], out=str(task.out), student=student, student_size=size,
            objective=objective, steps=1, batch_size=8, **models,
        )  # fmt: skip
    assert "another student" in error.value.hint or "another --student" in error.value.hint
    assert not task.out.exists()


@pytest.mark.parametrize("task_name", ["classification", "segmentation"])
def test_teachers_that_cannot_take_their_size(task, task_name):
    """A teacher that its size does not suit is refused before anything is read or written, and so is a student for masks."""
    models = {"teacher": "haloregnetz_b", "teacher_weights": "scratch", "teacher_size": 64}
    where = {"target": str(task.target), "gallery": [str(task.gallery)], "out": str(task.out), "task": task_name}
    with pytest.raises(TutelageError, match="--teacher haloregnetz_b cannot be used at 64 pixels") as error:
        package.curate(**where, **models, student="test_resnet", student_size=32)
    assert "another --teacher" in error.value.hint
    if task_name == "segmentation":
        models |= {"teacher": "test_efficientnet", "student": "haloregnetz_b", "student_size": 64}
        with pytest.raises(TutelageError, match="--student haloregnetz_b cannot be used at 64 pixels"):
            package.run(**where, **models, student_weights="scratch")
    assert not task.out.exists()


@pytest.mark.parametrize("stage", ["baseline", "committee"])
def test_students_that_cannot_be_trained_on_labels(tmp_path, stage):
    """The stages that train on labels only try the student too."""
    write_json(tmp_path / "run" / "curate" / "result.json", {"outputs": "now", "task": "classification"})
    (tmp_path / "run" / "settings.toml").write_text('[versions]\ntutelage = "0"\n')
    student = {"student": "haloregnetz_b", "student_size": 64, "student_weights": "scratch"}
    with pytest.raises(TutelageError, match="--student haloregnetz_b at 64 pixels cannot be trained on labels"):
        getattr(package, stage)(out=str(tmp_path / "run"), **student, steps=1)
    assert not (tmp_path / "run" / stage).exists()


def test_the_average_of_layers_that_share_weights():
    """`dino` takes its targets from the average of a student whose layers share weights, too."""
    import torch

    from tutelage.distillation.self_distillation import averaged
    from tutelage.models.students import DINOStudent, build_student
    from tutelage.training.optimization import EMA

    module = DINOStudent(build_student("coat_lite_tiny", 2, size=32).module, 32).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(averaged(module, EMA(module).state, images), module(images), atol=1e-5)


@pytest.mark.slow
def test_a_student_whose_layers_share_weights(task):
    """Weights that several layers share are saved, and read back the same."""
    models = {
        "teacher": "test_efficientnet",
        "teacher_weights": "scratch",
        "teacher_size": 32,
        "student_weights": "scratch",
    }
    result = package.run(
        target=str(task.target), gallery=[str(task.gallery)], out=str(task.out), student="coat_tiny", student_size=32,
        steps=1, batch_size=8, committee="none", no_baseline=True, finetune="keep", **models,
    )  # fmt: skip
    assert result.student.test.images == 12


@pytest.mark.parametrize(
    "flag", ["--val", "--test", "--gallery", "--cache", "--config", "--embeddings", "--classes", "--target"]
)
def test_an_empty_path_is_not_this_folder(task, tutelage, flag: str):
    """An empty text for a path, as an unset variable of a shell leaves it, is an error, and no reading of the current folder."""
    message = refused(tutelage(*task.words("curate", flag, "")))
    assert f"{flag} is empty" in message or f"no {flag} was given" in message
    assert not task.out.exists()


def test_an_empty_path_beside_another(task, tutelage):
    """One empty path of several is an error too."""
    message = refused(tutelage(*task.words("curate", "--gallery", str(task.gallery), "")))
    assert "--gallery is empty" in message


@pytest.mark.parametrize("out", ["run1", "runs/first"])
def test_a_run_inside_the_target(tutelage, tmp_path, out: str):
    """--out in the folder of the photos, with its cache beside it: neither becomes a class, at the first call nor at the next."""
    for label in range(2):
        for number in range(4):
            draw(tmp_path / "photos" / f"c{label}" / f"{number}.png", label, number)
        draw(tmp_path / "pool" / f"{label}.png", label, 9)
    place = tmp_path / "photos" / out
    data = ("--target", str(tmp_path / "photos"), "--gallery", str(tmp_path / "photos"), str(tmp_path / "pool"))
    for _ in range(2):
        done = tutelage("curate", *data, "--out", str(place), *MODELS[:8], *MODELS[10:])
        assert done.returncode == 0, done.stderr
        assert (
            Run(place).kept("curate")["images"]["transfer"] == 8
        )  # 6 labelled, 2 of the pool; a montage would be one more


@pytest.mark.parametrize(
    "users",
    [
        {".lock": "", "rejected.csv": "mine"},
        {".lock": "4711", "movie.1080.partial": "mine"},
        {"curate/split_copies.csv": "mine", "rejected.csv": "mine"},
        {"settings.toml": "[settings]\ntheme = 'dark'\n", "notes.txt": "mine"},
    ],
)
def test_a_folder_of_others_is_no_run(task, tutelage, users: dict[str, str]):
    """--out on a folder with a lock, settings or folders of another program is refused; nothing in it changes."""
    for name, text in users.items():
        (task.out / name).parent.mkdir(parents=True, exist_ok=True)
        (task.out / name).write_text(text)
    message = refused(tutelage(*task.words("curate")))
    assert "another program" in message or "contains other files" in message
    assert {name: (task.out / name).read_text() for name in task.files()} | (
        {".lock": users[".lock"]} if ".lock" in users else {}
    ) == users
