"""What was made from other data or other settings is never taken for what the folder holds now."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import tutelage
from conftest import Task, draw
from tutelage.commands.evaluate import _new_images, _results
from tutelage.data.manifest import load_task
from tutelage.distillation.prepare_targets import member_outputs
from tutelage.errors import TutelageError
from tutelage.files import write_json, write_text
from tutelage.pipeline.stage import MetricsLog, open_run
from tutelage.run_folder import TRAINED, Run
from tutelage.settings import declared
from tutelage.settings.command_flags import (
    AdaptSettings,
    BaselineSettings,
    CommitteeSettings,
    DistillSettings,
    FinetuneSettings,
)

STAGES = ("curate", "adapt", "committee", "distill", "baseline", "finetune", "evaluate")


def curate(task: Task, **more) -> dict:
    """The transfer set of the tiny task."""
    settings = {"target": str(task.target), "gallery": [str(task.gallery)], "out": str(task.out)}
    return tutelage.curate(
        **settings,
        teacher="test_efficientnet",
        teacher_weights="scratch",
        teacher_size=32,
        student="test_resnet",
        student_size=32,
        **more,
    ).to_json()


def run(task: Task, **more) -> dict:
    """All stages but committee and baseline on the tiny task, one step of each."""
    settings = {"target": str(task.target), "gallery": [str(task.gallery)], "out": str(task.out), "no_baseline": True}
    models = {"teacher": "test_efficientnet", "teacher_size": 32, "student": "test_resnet", "student_size": 32}
    models |= {"teacher_weights": "scratch", "student_weights": "scratch"}
    short = {"committee": "none", "steps": 1, "batch_size": 8, "finetune": "keep"}
    return tutelage.run(**settings, **models, **short, **more).to_json()


def finished(path: Path, curated: str = "now") -> Run:
    """A folder in which all stages have a result, those after the first of a transfer set `curated`."""
    run = Run(path)
    write_json(path / "curate" / "result.json", {"outputs": "now"})
    for stage in STAGES[1:]:
        write_json(path / stage / "result.json", {"outputs": stage, "curated": curated})
    write_text(path / "report" / "index.html", "the page of these scores")
    return run


def of_stage(stage, run: Run, **given):
    """Settings of a stage, with models that need no weights."""
    models = {"teacher": "test_efficientnet", "student": "test_resnet"}
    models |= {
        f"{kind}_{name}": value
        for kind in ("teacher", "student")
        for name, value in (("weights", "scratch"), ("size", 32))
    }
    return stage(
        out=str(run.path), **{name: value for name, value in models.items() if name in declared(stage)}, **given
    )


@pytest.mark.parametrize(
    ("stage", "before", "now", "moved"),
    [
        (
            AdaptSettings,
            {"adapt": "probe"},
            {"adapt": "full"},
            {"adapt", "committee", "distill", "finetune", "evaluate"},
        ),
        (AdaptSettings, {"flip": "none"}, {"flip": "both"}, set(STAGES[1:])),
        (CommitteeSettings, {"steps": 1}, {"steps": 2}, set(STAGES[2:])),
        (DistillSettings, {"temperature": 2.0}, {"temperature": 1.0}, {"distill", "finetune", "evaluate"}),
        (DistillSettings, {"lr": 0.1}, {"lr": 0.2}, set(STAGES[2:])),
        (FinetuneSettings, {"finetune": "keep"}, {"finetune": "head"}, {"finetune", "evaluate"}),
        (BaselineSettings, {"steps": 1}, {"steps": 2}, {"baseline", "finetune", "evaluate"}),
    ],
)
def test_overwrite_in_a_later_stage(tmp_path, capsys, stage, before, now, moved):
    """--overwrite of a later stage moves aside what that stage and the later ones made, and nothing earlier."""
    run = finished(tmp_path / "run")
    run.claim(vars(of_stage(stage, run, **before)), False)
    asked = of_stage(stage, run, **now)
    with pytest.raises(TutelageError, match=r"--overwrite to move .* aside and redo them"):
        open_run(asked).__enter__()
    with open_run(replace(asked, overwrite=True)) as (held, _):
        assert {stage for stage in STAGES if (run.path / stage).exists()} == set(STAGES) - moved
        assert now.items() <= held.settings()["settings"].items()
    (old,) = tmp_path.glob("run.old-*")
    assert {path.name for path in old.iterdir()} == moved | {"settings.toml", "report"}
    assert str(old) in capsys.readouterr().err


@pytest.mark.slow
def test_another_cache_limit(task, capsys):
    """Another --cache-limit never costs a finished student: it is refused, or the old run moved aside; before, it is free."""
    run(task, cache_limit=0)
    weights = task.out / "finetune" / "weights.safetensors"
    before = weights.read_bytes()
    with pytest.raises(TutelageError, match=r"other settings: cache_limit: 0.0 -> 20.0"):
        run(task)
    assert weights.read_bytes() == before
    assert run(task, cache_limit=0)["reused"] == ["curate", "adapt", "distill", "finetune", "evaluate"]
    assert run(task, overwrite=True)["reused"] == []
    (old,) = task.out.parent.glob("first.old-*")
    assert (old / "finetune" / "weights.safetensors").read_bytes() == before
    (task.out / "distill" / "result.json").unlink()
    assert run(task, cache_limit=0)["reused"] == ["curate", "adapt"]


@pytest.mark.slow
def test_data_that_changed_since_the_run_was_made(task, capsys):
    """One more image, or one more label, on a finished run is told before a stage begins, with the stages that are done anew."""
    run(task)
    assert "have changed" not in capsys.readouterr().err
    run(task)
    assert "have changed" not in capsys.readouterr().err
    draw(task.gallery / "new.png", 1, 400)
    assert "curate" not in run(task)["reused"]
    said = capsys.readouterr().err.splitlines()
    told = f"the data have changed since {task.out} was made (other images or labels in --gallery): curate runs again, then "
    assert said[0].startswith(f"{told}adapt, distill, finetune wherever the transfer set comes out different")
    draw(task.target / "train" / "c0" / "new.png", 0, 401)
    run(task)
    assert "(other images or labels in --target)" in capsys.readouterr().err.splitlines()[0]


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_settings_that_a_stage_does_not_use(tmp_path, task):
    """A stage is not refused for a setting that changes nothing for this task."""
    run = finished(tmp_path / "run")
    write_json(run.path / "curate" / "result.json", {"outputs": "now", "task": task})
    made = {"class_weight": "balanced", "task_agnostic_features": "patches"}
    asked = of_stage(DistillSettings, run, class_weight="balanced", task_agnostic_features="global")
    run.claim(made, False)
    if task == "segmentation":
        with pytest.raises(TutelageError, match="task_agnostic_features: patches -> global"):
            open_run(asked).__enter__()
        return
    with open_run(asked) as (held, _):
        kept = held.settings()["settings"]
        assert {**made, "objective": "task-oriented"}.items() <= kept.items(), (
            "and what another stage has written stays"
        )
    with pytest.raises(TutelageError, match="class_weight: balanced -> none"):
        open_run(replace(asked, class_weight="none")).__enter__()


def test_results_of_another_transfer_set(tmp_path, capsys):
    """A stage that was made from another transfer set is refused by the next stage, and evaluation leaves it out."""
    run = finished(tmp_path / "run", "before")
    for stage in TRAINED[1:]:
        with pytest.raises(TutelageError, match="made from another transfer set") as error:
            run.result(stage, "the test")
        assert f"tutelage {stage} --out" in error.value.hint
    assert [name for name, result in _results(run).items() if result] == ["curate"]
    assert capsys.readouterr().err.count("is left out: it was made from another transfer set") == 5
    assert all(_results(finished(tmp_path / "run")).values())


def test_files_that_changed_after_curation(task):
    """Without the cache, images that are gone or have changed are named; put back, the run goes on."""
    curate(task)
    cache = task.out.parent / "cache"
    whole = load_task(task.out, cache)
    shutil.rmtree(cache)
    changed, gone = task.gallery / "3.png", task.target / "train" / "c0" / "0.png"
    kept = [path.read_bytes() for path in (changed, gone)]
    draw(changed, 2, 999)
    gone.unlink()
    for _ in range(2):
        with pytest.raises(TutelageError, match="2 images of the run are gone or have changed") as error:
            load_task(task.out, cache)
        assert "3.png (another image now)" in error.value.message
        assert "train/c0/0.png (" in error.value.message
    for path, data in zip((changed, gone), kept, strict=True):
        path.write_bytes(data)
    again = load_task(task.out, cache)
    assert (again.transfer.keys == whole.transfer.keys).all()
    assert (again.train.images.keys == whole.train.images.keys).all()
    assert (again.transfer.keys[: len(again.train)] == again.train.images.keys).all()


def test_an_image_in_validation_and_test(task):
    """An image among the validation and the test images is refused."""
    shutil.copytree(task.target / "test", task.target / "val")
    with pytest.raises(TutelageError, match="the same image is in two splits"):
        curate(task)


def test_folder_of_an_earlier_version(tmp_path):
    """A run whose stages have their former folders is refused with a way out, and moved aside with --overwrite."""
    folder = tmp_path / "run"
    write_text(folder / "settings.toml", '[settings]\n[versions]\ntutelage = "0.0.1"\n')
    (folder / "transfer_set").mkdir()
    with pytest.raises(TutelageError, match="earlier version of tutelage") as error:
        open_run(of_stage(BaselineSettings, Run(folder))).__enter__()
    assert "--overwrite" in error.value.hint
    with Run(folder) as run:
        with pytest.raises(TutelageError, match="earlier version of tutelage"):
            run.claim({}, overwrite=False)
        assert run.claim({}, overwrite=True) in tmp_path.glob("run.old-*")
    assert not (folder / "transfer_set").exists()


def test_size_of_the_transfer_set(task, capsys):
    """--total draws as many from the gallery as the labelled images leave room for; less than that is refused."""
    with pytest.raises(TutelageError, match="--total 18 with 18 labelled images"):
        curate(task, strategy="random", total=18)
    assert curate(task, strategy="random", total=20)["images"]["transfer"] == 20
    told = "transfer set 20: 18 labelled + 2 of 24 gallery images (0 held out as validation/test, 0 duplicates, 0 near duplicates)"
    assert told in capsys.readouterr().err


def test_new_images_that_were_trained_on(task, capsys):
    """Scores on new images say how many of them the run was trained on, and what could not be used."""
    curate(task)
    cache = task.out.parent / "cache"
    other = task.root / "other"
    for label in range(3):
        draw(other / f"c{label}" / "new.png", label, 500 + label)
    shutil.copy(task.target / "train" / "c1" / "0.png", other / "c1" / "old.png")
    with Image.open(task.target / "train" / "c2" / "1.png") as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).resize((40, 40)).save(
            other / "c2" / "mirrored.jpg", quality=80
        )
    (other / "c1" / "link.png").symlink_to("nothing.png")
    assert len(_new_images(str(other), load_task(task.out, cache), cache)) == 5
    said = capsys.readouterr().err
    assert f"of 5 images of {other}, 2 were trained on, or look like copies of such images" in said
    assert "1 image is unusable and not scored: c1/link.png" in said


def test_half_a_line_of_metrics(tmp_path):
    """A line that a full disk cut off is left out when a run goes on."""
    path, main = tmp_path / "metrics.jsonl", SimpleNamespace(is_main_process=True)
    rows = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2, 3)]
    path.write_text("\n".join([*rows, rows[0][:9]]))
    MetricsLog(path, 2, "none", tmp_path, main).write({"step": 3, "loss": 0.5})
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [1.0, 1.0, 0.5]


@pytest.mark.slow
def test_a_damaged_result(task):
    """A result.json that is cut off, is no text, or lacks what it must hold is one error that names it; nothing is trained on it."""
    result = run(task)
    path = Path(result["run"]) / "finetune" / "result.json"
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"\xff\xfe" + whole[2:], b""):
        path.write_bytes(damaged)
        with pytest.raises(TutelageError, match=r"finetune/result\.json is not as tutelage wrote it") as error:
            run(task)
        assert "restore it" in error.value.hint
        assert path.read_bytes() == damaged
    kept = json.loads(whole)
    del kept["delivered"]
    path.write_text(json.dumps(kept))
    with pytest.raises(TutelageError, match="FinetuneResult, delivered: Field required"):
        run(task)
    path.write_bytes(whole)
    assert set(run(task)["reused"]) >= {"finetune", "evaluate"}


@pytest.mark.slow
def test_a_head_that_the_run_did_not_write(task):
    """A teacher's head with other values than the run's is neither scored nor distilled."""
    result = run(task)
    path = Path(result["run"]) / "adapt" / "head.safetensors"
    save_file({name: one + 1 for name, one in load_file(path).items()}, path)
    for stage in ("evaluate", "distill"):
        (Path(result["run"]) / stage / "result.json").unlink()
        with pytest.raises(TutelageError, match=r"adapt/head\.safetensors is not the file that the run wrote") as error:
            run(task)
        assert "/adapt and repeat" in error.value.hint


def test_targets_that_the_run_did_not_write(tmp_path):
    """The committee's targets are read back only as they were written."""
    with Run(tmp_path):
        finished(tmp_path)
    path = tmp_path / "committee" / "students.npy"
    np.save(path, np.zeros((4, 2), np.float16))
    with Run(tmp_path) as of:
        of.finish("committee", "", {})
    assert member_outputs(path.parent, None)(np.arange(2)).tolist() == [[0, 0], [0, 0]]
    np.save(path, np.ones((4, 2), np.float16))
    with pytest.raises(TutelageError, match=r"students\.npy is not the file that the run wrote"):
        member_outputs(path.parent, None)


@pytest.mark.slow
def test_the_same_files_under_other_paths(task, tmp_path, monkeypatch):
    """A relative and an absolute path to the same images and weights are the same settings: nothing is refused or made again."""
    from tutelage.models.students import build_student

    student = build_student("test_resnet", 3, "scratch", 32).module
    save_file({name: one.numpy() for name, one in student.state_dict().items()}, task.root / "w.safetensors")
    models = {"teacher": "test_efficientnet", "teacher_size": 32, "student": "test_resnet", "student_size": 32}
    models |= {"teacher_weights": "scratch", "committee": "none", "steps": 1, "batch_size": 8, "finetune": "keep"}

    def go(folder: Path) -> list[str]:
        data = {
            "target": str(folder / "target"),
            "gallery": [str(folder / "gallery")],
            "out": str(folder / "runs" / "one"),
        }
        return tutelage.run(**data, student_weights=str(folder / "w.safetensors"), **models).reused

    assert go(task.root) == []
    monkeypatch.chdir(task.root)
    assert len(go(Path())) >= 6
    save_file({name: (one + 1).numpy() for name, one in student.state_dict().items()}, task.root / "w.safetensors")
    assert "distill" not in go(Path()), "other weights under the same name"


@pytest.mark.slow
def test_flipped_bytes_in_the_cache(task):
    """One other byte in each block of the cache, pictures, embeddings and teacher outputs: they are computed again, and the student is the
    same."""
    run(task)
    before = {path: path.read_bytes() for path in task.out.rglob("*.safetensors")}
    assert before
    blocks = sorted((task.out.parent / "cache").rglob("*.arrow"))
    assert {path.relative_to(task.out.parent / "cache").parts[0].partition("-")[0] for path in blocks} >= {
        "images",
        "outputs",
    }
    for number, path in enumerate(blocks):
        data = bytearray(path.read_bytes())
        data[len(data) * (number + 1) // (len(blocks) + 1)] ^= 1 << number % 8
        path.write_bytes(data)
    for stage in ("adapt", "distill", "finetune", "evaluate"):
        shutil.rmtree(task.out / stage)
    run(task)
    assert {path: path.read_bytes() for path in task.out.rglob("*.safetensors")} == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["target_set", "curate"])
def test_a_manifest_that_the_run_did_not_write(task, name: str):
    """A list of images with other labels, or with fewer images, is neither scored nor trained on."""
    curate(task)
    path = task.out / name / "manifest.parquet"
    table = pq.read_table(path)
    pq.write_table(table.slice(0, len(table) - 3), path)
    with pytest.raises(TutelageError, match=rf"{name}/manifest\.parquet is not the file that the run wrote"):
        load_task(task.out, task.out.parent / "cache")
    with pytest.raises(TutelageError, match=rf"{name}/manifest\.parquet is not the file that the run wrote"):
        run(task)


@pytest.mark.slow
def test_results_of_before_are_kept(task):
    """A finished run, one more image in the gallery, the same command: what was there is kept whole beside the run, its export too."""
    run(task)
    write_json(task.out / "export" / "export.json", {"files": {}, "outputs": "an earlier student"})
    before = {
        path.relative_to(task.out): path.read_bytes()
        for path in task.out.rglob("*")
        if path.is_file() and path.name != ".lock"
    }
    draw(task.gallery / "new.png", 1, 999)
    run(task)
    (kept,) = task.out.parent.glob("first.old-*")
    assert {path.relative_to(kept): path.read_bytes() for path in kept.rglob("*") if path.is_file()} == before
    assert [path.name.partition("-")[0] for path in task.out.glob("export*")] == ["export.old"]
    run(task)
    assert len(list(task.out.parent.glob("first.old-*"))) == 1
