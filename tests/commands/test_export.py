"""The export of a run: files that are proven, predictions equal to evaluation's, and nothing lost when it does not hold."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import numpy as np
import onnxruntime
import PIL
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import tutelage
from conftest import MODELS, Task, environment, make_task, refused, seconds_without_torch
from tutelage.custom_loop.student import load_student
from tutelage.deploy import onnx_graph, runtime, timing
from tutelage.deploy.model_card import model_card
from tutelage.errors import TutelageError
from tutelage.files import write_json
from tutelage.run_folder import Run

pytestmark = pytest.mark.slow

FILES = ["MODEL_CARD.md", "export.json", "labels.txt", "model.int8.onnx", "model.onnx", "predict.py", "preprocess.json"]
NASTY = "a  <b> | `c`"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Task:
    """A run of the tiny task, exported; one class of it has a name made of markup, with two blanks beside each other."""
    task = make_task(tmp_path_factory.mktemp("export"))
    for split in ("train", "test"):
        (task.target / split / "c0").rename(task.target / split / NASTY)
    names = [flag.removeprefix("--").replace("-", "_") for flag in MODELS[::2]]
    tutelage.run(
        target=task.target, gallery=[task.gallery], out=task.out, steps=3, batch_size=8, val="0.34", no_baseline=True,
        **{**dict(zip(names, MODELS[1::2], strict=True)), "student": "mobilenetv3_small_050"},
    )  # fmt: skip
    tutelage.export(run=task.out)
    return task


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """A copy of the export, to be spoilt."""
    return Path(shutil.copytree(finished.out / "export", tmp_path / "export"))


def told(name: str, finished: Task) -> Any:
    return json.loads((finished.out / "export" / name).read_text())


def command(*words: object, **more: Any) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "tutelage", *map(str, words)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
        **more,
    )


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_files_and_proof(finished):
    """An export holds these files, their hashes, and how each model compares with the student; the float one agrees to 1e-4."""
    folder = finished.out / "export"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    about = told("export.json", finished)
    assert sorted(about["files"]) == [name for name in FILES if name != "export.json"]
    assert runtime.checked(folder) == about
    proof = about["proof"]["files"]["model.onnx"]
    assert proof["difference"] <= 1e-4
    assert proof["agreement"] == 1
    assert about["proof"]["images"] == 12
    assert about["proof"]["of"] == "test images"
    lost = proof["score"] - about["proof"]["files"]["model.int8.onnx"]["score"]
    fit = [name for name in about["latency"] if name == "model.onnx" or lost <= 0.01]
    assert about["recommended"] == min(fit, key=lambda name: about["latency"][name]["median_ms"])
    assert about["int8"]["layers"] == 54, "all convolutions and the classifier of mobilenetv3_small_050"
    assert {one["scheme"] for one in about["int8"]["tried"]} == {"S8S8", "U8S8", "U8S8, 7-bit weights"}
    assert (folder / "model.int8.onnx").stat().st_size < 0.4 * (folder / "model.onnx").stat().st_size
    assert not list(finished.out.glob(".tutelage-partial-*"))


def test_same_run_same_files(finished, tmp_path):
    """An export made again, by a process with another order of sets, has the same files, byte for byte, but for its measured times."""
    again = shutil.copytree(finished.out, tmp_path / "again")
    shutil.rmtree(again / "export")
    (tmp_path / "cache").symlink_to(finished.out.parent / "cache")
    done = subprocess.run(
        [sys.executable, "-m", "tutelage", "export", str(again)],
        capture_output=True, text=True, env=environment(PYTHONHASHSEED="7"), timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in set(FILES) - {"export.json", "MODEL_CARD.md"}:
        assert (again / "export" / name).read_bytes() == (finished.out / "export" / name).read_bytes(), name
    tried = json.loads((again / "export" / "export.json").read_text())["int8"]["tried"]
    assert tried == told("export.json", finished)["int8"]["tried"]


@pytest.mark.parametrize("fault", ["other values", "cut off", "no weights", "missing"])
def test_weights_that_the_run_did_not_write(finished, tutelage, tmp_path, fault):
    """Weights that are not those whose scores result.json holds are neither exported nor measured, even if the file is valid."""
    run = shutil.copytree(finished.out, tmp_path / "run", ignore=shutil.ignore_patterns("export"))
    path = run / "finetune" / "weights.safetensors"
    if fault == "other values":
        save_file({name: one + 1e-3 if one.is_floating_point() else one for name, one in load_file(path).items()}, path)
    elif fault == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:1000] if fault == "cut off" else b"weights")
    said = refused(tutelage("export", str(run), "--no-int8", "--cache", str(finished.out.parent / "cache")))
    assert ("is missing" if fault == "missing" else "is not the file that the run wrote") in said
    assert "hint: put it back, or delete" in said
    with pytest.raises(TutelageError, match="weights"):
        load_student(run)
    assert not (run / "export").exists()


def test_predict_is_evaluate(finished, tmp_path):
    """The command's predictions on the test images have evaluation's accuracy, exactly, and no torch is loaded."""
    report = json.loads((finished.out / "evaluate" / "result.json").read_text())
    out = tmp_path / "p.csv"
    done = command("predict", finished.out, finished.target / "test", "--out", out, "--top", "2", "--model", "float")
    assert done.returncode == 0, done.stderr
    rows = rows_of(out)
    assert list(rows[0]) == ["path", "class", "probability", "unsure", "class_2", "probability_2"]
    right = [Path(row["path"]).parent.name == row["class"] for row in rows]
    assert len(right) == 12
    assert float(np.mean(right)) == report["delivered"]["test"]["accuracy"]
    below = told("preprocess.json", finished)["unsure_below"]
    assert all((row["unsure"] == "true") == (below is not None and float(row["probability"]) < below) for row in rows)
    assert all(float(row["probability"]) >= float(row["probability_2"]) for row in rows)
    done = command("predict", finished.out, finished.target / "test", "--out", out, "--json")
    assert json.loads(done.stdout)["unsure"] == sum(row["unsure"] == "true" for row in rows_of(out))
    seconds_without_torch("predict", str(finished.out), str(finished.target), "--out", str(out))


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, and its content."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("out", "users"),
    [
        ("labels.csv", {"labels.csv": "path,class\na.png,cat\n"}),
        ("p.csv", {"p.rejected.csv": "path,reason\na.png,blurred\n"}),
        ("p.parquet", {"p.parquet": "a table of mine"}),
        ("p.csv/q.csv", {"p.csv": "a file in the place of a folder"}),
        ("photo.png", {"photo.png": "no table"}),
        ("/proc/p.csv", {}),
    ],
)
def test_predict_replaces_no_file_of_others(finished, tmp_path, out: str, users: dict[str, str]):
    """Lists and tables of the user's, also such as `predict` writes itself, and places that take no file: one error, nothing changes."""
    for name, text in users.items():
        (tmp_path / name).write_text(text)
    before = tree(tmp_path)
    code, said = quick("predict", finished.out, finished.target / "test", "--out", tmp_path / out)
    assert code == 2
    assert said.count("error: ") == 1
    assert "hint: " in said
    assert tree(tmp_path) == before


def test_predict_replaces_its_own_files(finished, tmp_path):
    """The same call again, and one for fewer images, replace what the first wrote, and the files beside it stay."""
    (tmp_path / "p.csv.partial").write_text("mine")
    (tmp_path / "broken.png").write_text("no image")
    for places in (
        (finished.target / "test", tmp_path / "broken.png"),
        (finished.target / "test",),
        (finished.target / "test" / "c1",),
    ):
        assert quick("predict", finished.out, *places, "--out", tmp_path / "p.csv")[0] == 0
        assert (tmp_path / "p.rejected.csv").exists() == (len(places) == 2)
    assert len(rows_of(tmp_path / "p.csv")) == 4
    assert (tmp_path / "p.csv.partial").read_text() == "mine"


def bare_site(folder: Path, *modules: Any) -> dict[str, str]:
    """An environment in which only these packages can be imported."""
    folder.mkdir()
    for module in modules:
        home = Path(module.__file__).parent
        (folder / home.name).symlink_to(home)
        for libraries in home.parent.glob(f"{home.name.lower()}*.libs"):
            (folder / libraries.name).symlink_to(libraries)
    (folder.parent / "home").mkdir()
    return {"PYTHONPATH": str(folder), "PATH": os.environ["PATH"], "HOME": str(folder.parent / "home")}


def test_predict_file_needs_three_packages(finished, tmp_path):
    """predict.py with only numpy, Pillow and onnxruntime gives the CSV of `tutelage predict`, odd images and broken ones included."""
    images = tmp_path / "images"
    shutil.copytree(finished.target / "test", images)
    some = next(images.rglob("*.png"))
    Image.open(some).convert("L").save(images / "grey.png")
    Image.open(some).convert("RGBA").rotate(30).save(images / "clear.webp")
    Image.open(some).convert("CMYK").save(images / "print.jpg")
    (images / "broken.png").write_bytes(some.read_bytes()[:200])
    (images / "notes.txt").write_text("no image")
    ours, theirs = tmp_path / "ours.csv", tmp_path / "theirs.csv"
    done = command("predict", finished.out / "export", images, "--out", ours, "--top", "3")
    assert done.returncode == 0, done.stderr
    assert "1 of 16 images cannot be read" in done.stderr
    site = bare_site(tmp_path / "site", np, PIL, onnxruntime)
    words = [sys.executable, "-S", finished.out / "export" / "predict.py", images, "--out", theirs, "--top", "3"]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, env=site, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"15 images, {theirs}; 1 rejected, {tmp_path / 'theirs.rejected.csv'}\n"
    assert ours.read_bytes() == theirs.read_bytes()
    assert rows_of(tmp_path / "ours.rejected.csv") == rows_of(tmp_path / "theirs.rejected.csv")
    assert not any((tmp_path / "home").iterdir()), "onnxruntime keeps nothing in the home folder"
    (tmp_path / "site" / "onnxruntime").unlink()
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, env=site, timeout=60)
    assert done.returncode == 2
    assert "pip install onnxruntime" in done.stderr


def test_an_export_of_an_earlier_student(finished, tmp_path):
    """Where a run has another student than its export, every command that uses the export says so; else nothing is said."""
    run, out = tmp_path / "run", tmp_path / "p.csv"
    shutil.copytree(finished.out / "export", run / "export")
    for outputs, warned in (
        (json.loads((run / "export" / "export.json").read_text())["outputs"], False),
        ("another", True),
    ):
        write_json(run / "finetune" / "result.json", {"outputs": outputs})
        for words in (
            ("predict", run, finished.target / "test"),
            ("predict", run / "export", finished.target / "test"),
        ):
            done = command(*words, "--out", out, "--quiet")
            assert done.returncode == 0, done.stderr
            assert ("is of an earlier student of this run" in done.stderr) == warned


def test_parquet(finished, tmp_path):
    """A name that ends in .parquet gives the same table in that format."""
    import pyarrow.parquet as pq

    tutelage.predict(export=finished.out, images=[finished.gallery], out=tmp_path / "p.parquet")
    tutelage.predict(export=finished.out, images=[finished.gallery], out=tmp_path / "p.csv")
    table = pq.read_table(tmp_path / "p.parquet").to_pylist()
    assert [row["class"] for row in table] == [row["class"] for row in rows_of(tmp_path / "p.csv")]
    assert len(table) == 24


def test_card(finished):
    """The card says where the model comes from and what it gets wrong; a class name in it is text."""
    card = (finished.out / "export" / "MODEL_CARD.md").read_text()
    report = json.loads((finished.out / "evaluate" / "result.json").read_text())
    assert card.startswith("---\nlibrary_name: onnx\n")
    assert f"| **this model** | {report['delivered']['test']['accuracy']:.3f} (" in card
    assert r"| `` a  <b> \| `c` `` |" in card, "a code span in a table"
    assert "`` a  <b> | `c` ``" in card
    assert "`test_efficientnet`" in card
    assert "licence" in card
    assert f"--target {finished.target.name} " in card, "without the folders of this machine"
    assert "| `model.onnx` |" in card
    assert "|---|---|---|---|\n| " in card, "a table whose rows follow its head"
    assert "It was distilled from `test_efficientnet` on" in card
    assert "is delivered" in card
    assert "| teacher (adapted) | " in card
    assert ("is marked unsure. Of the held-out images (6 validation images)" in card) == bool(
        told("export.json", finished)["unsure"]
    )


def test_card_of_a_baseline(finished):
    """Where the baseline is what is delivered, the card says so, and that nothing of the teacher is in it."""
    run = Run(finished.out)
    stages, kept = run.results(), run.settings()
    model = stages["evaluate"]["delivered"]
    gains = {"gain": 0.1, "standard_error": 0.04}
    stages["evaluate"] |= {"baseline": model, "delivered": {**model, "what": "baseline"}}
    stages["finetune"] |= {
        "delivered": "baseline", "judged_on": "6 validation images",
        "validation": {"distilled": {"gain": 0.0, "standard_error": 0.0}, "baseline": gains},
    }  # fmt: skip
    card = model_card(finished.out, stages, kept["settings"], kept["teacher"], told("export.json", finished))
    assert "It is the baseline: it was trained on 12 labelled images only." in card
    assert (
        "The baseline is delivered: on 6 validation images it was better than the distilled student by 10.0 ± 4.0 points"
        in card
    )
    assert "Neither the teacher's weights nor its outputs were used to train the student." in card
    assert "| distilled student | " in card
    assert "| baseline (labels only)" not in card


def test_card_of_a_student_of_the_committee_only(finished):
    """Where the targets came from labels-only students, the card names these, and that the teacher's outputs were not used."""
    run = Run(finished.out)
    kept = run.settings()
    settings = {**kept["settings"], "committee": "only"}
    card = model_card(finished.out, run.results(), settings, kept["teacher"], told("export.json", finished))
    assert "It was distilled from students that were trained on the labels only on" in card
    assert "Neither the teacher's weights nor its outputs were used to train the student." in card


def test_card_shows_no_folders_of_this_machine(finished):
    """The card names images by the last part of their paths, and holds no control characters."""
    run = Run(finished.out)
    kept = run.settings()
    settings = {**kept["settings"], "gallery": ["/home/jane/my\x1bpool"]}
    card = model_card(finished.out, run.results(), settings, kept["teacher"], told("export.json", finished))
    assert str(finished.root) not in card
    assert "`target`" in card
    assert "`my?pool`" in card
    odd = model_card(
        finished.root / "my\x1b[31m*run*\nX", run.results(), settings, kept["teacher"], told("export.json", finished)
    )
    assert "\n# my\\\\x1b\\[31m\\*run\\*\\\\nX\n" in odd
    assert odd.replace("\n", "").isprintable()
    assert "/home/jane" not in card


def test_baked_and_torchscript(finished, tmp_path):
    """With the preprocessing inside, pixels give the same probabilities; a TorchScript file is proven beside it; the old export
    goes, but one that was changed by hand is kept."""
    run = Path(shutil.copytree(finished.out, tmp_path / "run", symlinks=True))
    cache = finished.out.parent / "cache"
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    plain = runtime.open_export(run / "export", "float").probabilities(pixels)
    (run / "export" / "labels.txt").write_text("x\ny\nz\n")
    tutelage.export(run=run, bake_preprocess=True, format=["torchscript"], no_int8=True, cache=cache)
    baked = runtime.open_export(run / "export", "float")
    assert baked.about["input"] == {"name": "pixels", "dtype": "uint8", "layout": "NHWC"}
    np.testing.assert_allclose(baked.probabilities(pixels), plain, atol=1e-5)
    about = json.loads((run / "export" / "export.json").read_text())
    assert about["proof"]["files"]["model.pt"]["difference"] <= 1e-4
    assert about["int8"] is None
    assert [(old / "labels.txt").read_text() for old in run.glob("export.old-*")] == ["x\ny\nz\n"]


def test_what_does_not_hold_leaves_the_old_one(finished, monkeypatch):
    """An export that differs by more than the tolerance stops, and the export that was there is as it was."""
    before, written = told("export.json", finished), finished.out / "export" / "model.onnx"
    monkeypatch.setattr(onnx_graph, "write_onnx", lambda module, size, baked, path: shutil.copy(written, path))
    with pytest.raises(TutelageError, match=r"model\.onnx differs from the student by .*, more than --tolerance 1e-30"):
        tutelage.export(run=finished.out, tolerance=1e-30, no_int8=True)
    assert runtime.checked(finished.out / "export") == before
    assert not list(finished.out.glob(".tutelage-partial-*"))


def test_too_few_to_calibrate(finished):
    """int8 is not calibrated with a handful of images; the message says the two ways out."""
    with pytest.raises(
        TutelageError, match=r"8 images are too few to calibrate int8 with: at least 32 .*\nhint: .*--no-int8"
    ):
        tutelage.export(run=finished.out, calibration=8)


def test_bench(finished, monkeypatch):
    """Every model is timed at both batch sizes and numbers of threads, with its size on disk and in memory; predict still works."""
    monkeypatch.setattr(timing, "SECONDS", 0.05)
    monkeypatch.setattr(timing, "LEAST", 3)
    result = tutelage.benchmark(run=finished.out).to_json()
    models = {"PyTorch eager", "model.onnx", "model.int8.onnx"}
    threads = {1, result["machine"]["cores"]}
    assert {(row["model"], row["threads"], row["batch"]) for row in result["rows"]} == {
        (model, count, batch) for model in models for count in threads for batch in (1, 32)
    }
    assert all(0 < row["median_ms"] <= row["p95_ms"] for row in result["rows"])
    assert set(result["files"]) == models
    assert result["files"]["model.onnx"]["peak_mib"] < result["files"]["PyTorch eager"]["peak_mib"]
    assert json.loads((finished.out / "export" / "benchmark.json").read_text()) == result
    assert (
        tutelage.predict(export=finished.out, images=[finished.gallery], out=finished.root / "p.csv").to_json()[
            "images"
        ]
        == 24
    )


def test_bad_input(copy, finished, tmp_path):
    """A file changed by hand, no export, images that are not there, nothing readable: each is told, and nothing is written."""
    out, empty = tmp_path / "p.csv", tmp_path / "empty"
    empty.mkdir()
    cases = [
        (("predict", finished.gallery, finished.gallery), "is not an export folder", "tutelage export RUN"),
        (("predict", copy, tmp_path / "nowhere"), "no such file or folder", "folders of images"),
        (("predict", copy, finished.out / "export"), "an export of tutelage", "your own images"),
        (
            ("predict", copy, finished.out / "curate"),
            f"lies in {finished.out.resolve()}, a run of tutelage",
            "your own images",
        ),
        (("predict", copy, empty), "no image in", ".jpg"),
        (("predict", copy, finished.out / "settings.toml"), "the only file cannot be read", "not an image"),
        (("predict", copy, finished.gallery, "--model", "half"), "--model half", "'float'"),
        (("export", tmp_path), "is not a run folder", "tutelage run --out"),
        (("export", finished.out, "--format", "coreml", "tflite"), "--format tflite", "macOS"),
    ]
    (copy / "labels.txt").write_text("cat\ndog\nfish\n")
    cases.append((("predict", copy, finished.gallery), "hashes in export.json: labels.txt", "export again"))
    for number, (words, given, more) in enumerate(cases):
        if number < len(cases) - 1:
            shutil.copy(finished.out / "export" / "labels.txt", copy)
        else:
            (copy / "labels.txt").write_text("cat\ndog\nfish\n")
        done = quick(*words, *(("--out", str(out)) if words[0] == "predict" else ()))
        assert done[0] == 2
        assert given in done[1]
        assert more in done[1]
    assert not out.exists()


def quick(*words: object) -> tuple[int, str]:
    """The command in this process: exit code and stderr."""
    import contextlib
    import io

    from tutelage.cli import call

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = call([str(word) for word in words])
    return code, said.getvalue()


def test_unfinished_run(finished, tmp_path):
    """A run without a student, or without scores, says which command is missing."""
    run = Path(shutil.copytree(finished.out, tmp_path / "run", ignore=shutil.ignore_patterns("evaluate", "export")))
    with pytest.raises(TutelageError, match=f"has not been evaluated\nhint: run `tutelage evaluate {run}` first"):
        tutelage.export(run=run)
    shutil.rmtree(run / "finetune")
    with pytest.raises(TutelageError, match="tutelage finetune"):
        tutelage.export(run=run)


def test_masks(tmp_path):
    """A segmentation student is exported, proven and run in the same way; its masks are evaluation's, at the images' own size."""
    from scenes import CLASSES, write_scenes
    from tutelage.models import segmentation_heads

    data = write_scenes(tmp_path / "data", {"train": 4, "test": 3}, gallery=40)
    before, segmentation_heads.STRENGTHS = segmentation_heads.STRENGTHS, (8,)
    try:
        tutelage.run(
            task="segmentation", target=data / "target", gallery=[data / "gallery"], out=tmp_path / "run", teacher="test_efficientnet",
            teacher_weights="scratch", teacher_size="32x64", student="test_resnet", student_weights="scratch",
            student_size="32x64", steps=3, batch_size=4, dedup="none", finetune="keep", no_baseline=True,
        )  # fmt: skip
    finally:
        segmentation_heads.STRENGTHS = before
    about = tutelage.export(run=tmp_path / "run").to_json()
    report = json.loads((tmp_path / "run" / "evaluate" / "result.json").read_text())
    proof = about["proof"]["files"]["model.onnx"]
    assert proof["difference"] <= 1e-4
    assert proof["score"] == pytest.approx(report["delivered"]["test"]["miou"], abs=1e-3)
    result = tutelage.predict(
        export=tmp_path / "run", images=[data / "target" / "images" / "test"], out=tmp_path / "p.csv", model="float"
    ).to_json()
    rows = rows_of(tmp_path / "p.csv")
    assert list(rows[0]) == ["path", "mask", *(f"share_{name}" for name in CLASSES)]
    assert result["masks"] == str(tmp_path / "p")
    before = tree(data)  # the masks of the target set, and photos, lie where masks would be painted
    for out in (data / "target" / "masks.csv", data / "target" / "images" / "test.csv", data / "gallery.csv"):
        with pytest.raises(TutelageError, match="there already"):
            tutelage.predict(export=tmp_path / "run", images=[data / "target" / "images" / "test"], out=out)
    assert tree(data) == before
    right = []
    for row in rows:
        mask = np.asarray(Image.open(row["mask"]))
        truth = np.asarray(Image.open(row["path"].replace("images", "masks")))
        assert mask.shape == truth.shape == Image.open(row["path"]).size[::-1]
        assert float(row["share_disc"]) == pytest.approx((mask == 1).mean(), abs=1e-6)
        right.append((mask == truth)[truth < 255])
    assert np.concatenate(right).mean() == pytest.approx(report["delivered"]["test"]["accuracy"], abs=1e-3)
    words = [sys.executable, tmp_path / "run" / "export" / "predict.py", data / "target" / "images" / "test"]
    subprocess.run(
        [str(one) for one in (*words, "--model", "float", "--out", tmp_path / "q.csv")], check=True, timeout=60
    )
    assert [Path(row["mask"]).read_bytes() for row in rows_of(tmp_path / "q.csv")] == [
        Path(row["mask"]).read_bytes() for row in rows
    ]
    assert "pipeline_tag: image-segmentation" in (tmp_path / "run" / "export" / "MODEL_CARD.md").read_text()
    with pytest.raises(TutelageError, match="holds a segmentation model, but the page needs a classifier"):
        tutelage.demo_page(export=tmp_path / "run", out=tmp_path / "page")


def test_an_export_from_within_and_through_a_link(finished, tmp_path, monkeypatch):
    """`tutelage export ..` in the export's own folder makes it anew, and one behind a link is replaced where the link was."""
    run = Path(shutil.copytree(finished.out, tmp_path / "run"))
    monkeypatch.chdir(run / "export")
    assert quick("export", "..", "--no-int8", "--cache", finished.out.parent / "cache") == (0, ANY)
    assert {path.name for path in run.iterdir() if path.name.startswith((".tutelage", "export"))} == {"export"}
    (run / "export").rename(tmp_path / "elsewhere")
    (run / "export").symlink_to(tmp_path / "elsewhere")
    assert quick("export", run, "--no-int8", "--cache", finished.out.parent / "cache") == (0, ANY)
    assert not (run / "export").is_symlink()
    assert (tmp_path / "elsewhere" / "model.onnx").exists()


def test_scores_of_another_run(finished, tmp_path):
    """Scores of other models, as from a folder that was copied over, are neither exported nor reported; a stage that is gone is named."""
    run = Path(shutil.copytree(finished.out, tmp_path / "run"))
    result = json.loads((run / "evaluate" / "result.json").read_text())
    (run / "evaluate" / "result.json").write_text(json.dumps({**result, "inputs": "0" * 64}))
    for command_of in (tutelage.export, tutelage.report):
        with pytest.raises(TutelageError, match="holds the scores of other models"):
            command_of(run=run)
    shutil.rmtree(run / "adapt")
    with pytest.raises(TutelageError, match="adapt is gone, and with it the teacher, which was scored before"):
        tutelage.evaluate(run=run)
