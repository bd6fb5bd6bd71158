"""The main job for real on small images: what is shared, what is never read, and every way through the stages."""

from __future__ import annotations

import csv
import json
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import tutelage
from textures import CLASSES, texture, write_textures
from tutelage.cli import function_of
from tutelage.commands.curate import SMOKE_PART, SPARE, gallery_sample
from tutelage.data.decode import content_key, decode
from tutelage.data.label_budget import draw_budget
from tutelage.data.manifest import read_manifest
from tutelage.errors import TutelageError
from tutelage.finetuning import supervised
from tutelage.metrics import log_softmax
from tutelage.pipeline.stage import HELD_OUT_LOGITS
from tutelage.run_folder import TRAINED
from tutelage.settings import declared, resolve
from tutelage.settings.command_flags import CurateSettings

SMALL = {
    "teacher": "test_efficientnet", "teacher_weights": "scratch", "teacher_size": 32, "student": "test_resnet",
    "student_weights": "scratch", "student_size": 32,
    "steps": 8, "batch_size": 16, "committee": "none", "finetune": "keep", "no_baseline": True,
    "dedup": "none",  # textures of one kind count as copies of each other
}  # fmt: skip

LEARNS = {"teacher": "tf_efficientnet_lite0", "teacher_weights": "pretrained"}  # where the teacher knows something


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    write_textures(folder)
    return folder


def go(data: Path, name: str, **more) -> dict:
    settings = {"target": str(data / "target"), "gallery": [str(data / "gallery")], **SMALL, **more}
    return tutelage.run(out=str(data / "runs" / name), **settings).to_json()


def student_of(result: dict) -> dict[str, np.ndarray]:
    return load_file(Path(result["run"]) / "finetune" / "weights.safetensors")


def about(result: dict, stage: str) -> dict:
    return json.loads((Path(result["run"]) / stage / "result.json").read_text())


def steps_of(path: Path) -> list[int]:
    """The steps of metrics.jsonl; none where there is no file."""
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def same(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_more_labels_tomorrow(data):
    """A rerun with more labels decodes nothing and asks the teacher nothing that it has said already."""
    gallery = [str(data / "gallery"), str(data / "target" / "train")]
    cache = data / "tomorrow"
    go(data, "today", budget=4, gallery=gallery, cache=str(cache))
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    result = go(data, "tomorrow", budget=8, gallery=gallery, cache=str(cache))
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()} == before
    assert "teacher" in result


@pytest.mark.slow
def test_budgets_are_nested(data):
    """The labelled images of a small budget are among those of a larger one with the same seed."""
    drawn = []
    for budget in (2, 5):
        result = go(data, f"nested-{budget}", budget=budget, steps=1)
        refs, table = read_manifest(Path(result["run"]) / "target_set" / "manifest.parquet")
        splits = table.column("split").to_pylist()
        drawn.append({ref.id for ref, split in zip(refs, splits, strict=True) if split == "train"})
    assert [len(d) for d in drawn] == [6, 15]
    assert drawn[0] < drawn[1]


@pytest.mark.slow
def test_labels_beyond_the_budget_are_never_read(data, tmp_path):
    """Other labels on the images that the draw left over change no weight, nor a student of the committee."""
    paths = sorted((data / "target").glob("*/*/*.png"))
    splits = [path.parent.parent.name for path in paths]
    labels = np.array([CLASSES.index(path.parent.name) for path in paths])
    keys = [content_key(*decode(path.read_bytes())) for path in paths]
    train = np.flatnonzero(np.array(splits) == "train")
    drawn = draw_budget(labels[train], [keys[i] for i in train], 3, 0)
    others = labels.copy()
    for position in np.setdiff1d(np.arange(len(train)), drawn):  # a new label that leaves the draw as it is
        trial = others.copy()
        trial[train[position]] = (trial[train[position]] + 1) % 3
        if np.array_equal(draw_budget(trial[train], [keys[i] for i in train], 3, 0), drawn):
            others = trial
    assert (others != labels).sum() >= 5
    results = []
    for number, given in enumerate((labels, others)):
        place = tmp_path / f"list-{number}.csv"
        with place.open("w", newline="") as file:
            rows = [[str(p), CLASSES[label], s] for p, label, s in zip(paths, given, splits, strict=True)]
            csv.writer(file).writerows([["path", "label", "split"], *rows])
        results.append(go(data, f"unread-{number}", budget=3, target=str(place), committee="auto", steps=8))
    manifests = [read_manifest(Path(r["run"]) / "target_set" / "manifest.parquet")[1] for r in results]
    assert manifests[0].select(["id", "label"]).equals(manifests[1].select(["id", "label"]))
    assert same(student_of(results[0]), student_of(results[1]))
    folds = [sorted((Path(r["run"]) / "committee").glob("fold-*.safetensors")) for r in results]
    assert len(folds[0]) == len(folds[1]) > 1
    assert all(one.read_bytes() == two.read_bytes() for one, two in zip(*folds, strict=True))


def test_gallery_labels_are_never_read(data, tmp_path):
    """A gallery in folders of classes teaches what the same images teach in one folder."""
    sorted_by_class = tmp_path / "sorted"
    for number, path in enumerate(sorted((data / "gallery").iterdir())):
        place = sorted_by_class / ("wrong" if number % 2 else "names")
        place.mkdir(parents=True, exist_ok=True)
        (place / path.name).symlink_to(path)
    result = go(data, "gallery-names", gallery=[str(sorted_by_class)])
    assert "teacher" in result
    assert read_manifest(Path(result["run"]) / "curate" / "manifest.parquet")[1].num_rows == 90 + 24


def kept_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(-log_softmax(logits)[np.arange(len(labels)), labels].mean())


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["probe-then-full", "transductive", "auto"])  # auto tries them all, full too
def test_adapt_modes(data, mode, monkeypatch):
    """Every way to adapt the teacher runs through to a student; `auto` keeps what validates best, far above chance."""
    monkeypatch.setattr("tutelage.commands.adapt.FULL_PASSES", 4)  # three schedules of folds take their time
    monkeypatch.setattr(
        "tutelage.commands.adapt.FULL_RATE", 1e-4
    )  # of so few images larger steps gave logits beyond 65,504
    if mode == "transductive":
        monkeypatch.setattr("tutelage.commands.adapt.CLEARLY", -1e9)  # the probe is perfect here
    result = go(data, f"adapt-{mode}", adapt=mode, steps=2, **LEARNS)
    found = about(result, "adapt")
    assert found["mode"] == mode or mode == "auto"
    if mode == "auto":
        losses = {name: one["log_loss"] for name, one in found["validation"].items()}
        assert {*losses, "transductive"} == {"probe", "transductive", "full", "probe-then-full"}
        assert losses[found["mode"]] == min(losses.values())
    else:
        kept = "head.safetensors" if mode == "transductive" else "weights.safetensors"
        assert (Path(result["run"]) / "adapt" / kept).exists()
    steps = steps_of(Path(result["run"]) / "adapt" / "metrics.jsonl")
    assert (steps == []) == (found["mode"] in ("probe", "transductive"))
    assert steps == sorted(set(steps))  # of the last fit alone
    assert result["teacher"]["test"]["accuracy"] > 0.8
    assert result["teacher"]["test"]["images"] == result["distilled"]["test"]["images"] == 30
    with np.load(Path(result["run"]) / "adapt" / HELD_OUT_LOGITS) as kept:  # of the mode that is kept, calibrated
        logits, labels = kept["logits"].astype(np.float32), kept["labels"]
        assert (logits.shape, kept["logits"].dtype, labels.shape) == ((24, 3), np.float16, (24,))
    assert kept_loss(logits, labels) == pytest.approx(found["validation"][found["mode"]]["log_loss"], abs=2e-3)


@pytest.mark.slow
def test_validation_split(data, tmp_path, monkeypatch):
    """With validation images every choice is made on them, the baseline among the students that are judged; what was trained for
    the choice is not trained again, and where the baseline is delivered, it is as it was."""
    trained, before = [], supervised.train_on_labels
    monkeypatch.setattr(supervised, "train_on_labels", lambda *a, **o: trained.append(a[5].what) or before(*a, **o))
    for split, number in (("train", 0), ("val", 5000), ("test", 1000)):
        for name in CLASSES:
            place = tmp_path / "target" / split / name
            place.mkdir(parents=True)
            for seed in range(number, number + 10):
                Image.fromarray(texture(name, seed)).save(place / f"{seed}.png")
    more = {"target": str(tmp_path / "target"), "finetune": "auto", "no_baseline": False, "steps": 30, **LEARNS}
    more["student"] = "mobilenetv3_small_050"
    result = go(data, "validation", **more)
    folder, finished = Path(result["run"]), about(result, "finetune")
    assert about(result, "adapt")["validated_on"] == finished["judged_on"] == "30 validation images"
    assert set(finished["validation"]) == {"distilled", "head", "full", "long", "baseline"}
    assert trained.count("fine-tuning the student") == 3
    steps = steps_of(folder / "finetune" / "metrics.jsonl")
    assert (steps == []) == (finished["delivered"] in ("distilled", "baseline"))
    assert steps == sorted(set(steps))  # of what was kept alone
    assert result["delivered"]["what"] == finished["delivered"]
    found = {"baseline": {"accuracy": 0.9, "gain": 0.2, "standard_error": 0.1}}
    monkeypatch.setattr("tutelage.commands.finetune._choice", lambda *given: ("baseline", found))
    (folder / "finetune" / "result.json").unlink()
    result = go(data, "validation", **more)
    assert result["reused"] == ["curate", "adapt", "distill", "baseline"]
    assert result["delivered"] == {**result["baseline"], "what": "baseline"}
    weights = [(folder / stage / "weights.safetensors").read_bytes() for stage in ("finetune", "baseline")]
    assert weights[0] == weights[1]


def test_without_validation_images_nothing_is_judged(data, capsys, monkeypatch):
    """The distilled student is delivered as it is, which is said: nothing is trained or scored for a choice."""
    monkeypatch.setattr("tutelage.commands.finetune._LastStage.held_out", lambda *given: pytest.fail("scored"))
    result = go(data, "unjudged", finetune="auto", no_baseline=False, steps=4)
    assert "without a validation split (--val) nothing can judge it" in capsys.readouterr().err
    finished, folder = about(result, "finetune"), Path(result["run"])
    assert (finished["delivered"], finished["validation"], finished["judged_on"]) == ("distilled", {}, "")
    weights = [(folder / stage / "weights.safetensors").read_bytes() for stage in ("finetune", "distill")]
    assert weights[0] == weights[1]
    assert result["delivered"] == {**result["distilled"], "what": "distilled"}
    assert sorted(path.name for path in (folder / "finetune").iterdir()) == ["result.json", "weights.safetensors"]


PAPER = {
    "committee": "none", "label_share": 0.0, "temperature": 1.0, "feature_weight": 0.0, "objective": "task-oriented",
}  # fmt: skip


@pytest.mark.slow
def test_preset_paper(data, tmp_path):
    """The preset stands where nothing is said; a file beats it, and an argument both. settings.toml says what came of it."""
    (tmp_path / "own.toml").write_text('preset = "paper"\nfinetune = "head"\nlabel-share = 0.25\nsteps = 2\n')
    own = {name: value for name, value in SMALL.items() if name not in ("committee", "finetune", "steps")}
    given = {"target": str(data / "target"), "gallery": [str(data / "gallery")], "config": str(tmp_path / "own.toml")}
    result = tutelage.run(out=str(tmp_path / "run"), **given, **own, label_share=0.0).to_json()
    kept = tomllib.loads((tmp_path / "run" / "settings.toml").read_text())["settings"]
    assert {name: kept[name] for name in PAPER} == PAPER
    assert (kept["preset"], kept["finetune"], kept["steps"]) == ("paper", "head", 2)
    assert about(result, "distill")["labelled_in_batch"] == 0
    assert result["delivered"]["what"] == "head"
    assert not (tmp_path / "run" / "committee").exists()
    plain = go(tmp_path, "plain", **PAPER, **{**given, "config": None}, finetune="head", steps=2)
    assert same(student_of(result), student_of(plain)), "the preset is these settings and nothing else"


@pytest.mark.parametrize("command", ["run", "distill", "finetune"])
def test_a_preset_reaches_every_command_that_has_its_settings(command, tmp_path):
    """What a preset sets is checked like any value, known to the stages that take it, and no preset changes nothing."""
    settings = function_of(command).settings
    known = declared(settings)
    needed = {"target": "t", "gallery": ["g"], "out": str(tmp_path)}
    needed = {name: value for name, value in needed.items() if name in known}
    defaults = vars(resolve(settings, needed))
    if "preset" not in known:
        assert not known.keys() & {"committee", "label_share"}, "nothing that the preset is about but the last stage"
        return
    assert vars(resolve(settings, {**needed, "preset": "none"})) == defaults
    found = vars(resolve(settings, {**needed, "preset": "paper"}))
    whole = {**PAPER, "finetune": "full"}
    assert {name: found[name] for name in whole if name in known} == {n: v for n, v in whole.items() if n in known}
    assert {n for n in known if found[n] != defaults[n]} <= {*whole, "preset"}
    assert resolve(settings, {**needed, "preset": "paper", "temperature": 3.0}).temperature == 3.0
    with pytest.raises(TutelageError, match="--preset papr"):
        resolve(settings, {**needed, "preset": "papr"})


@pytest.mark.slow
def test_online_teacher_gives_the_same_student(data):
    """Without room for the teacher's outputs it runs in the loop, and the losses of its targets agree to 1e-3.

    Features are left out: the signs of their principal axes are arbitrary, and float16 is enough to turn some of them.
    """
    rows = {}
    for name, limit in (("cached", 20.0), ("online", 0.0)):
        more = {"cache_limit": limit, "cache": str(data / f"cache-{name}"), "feature_weight": 0.0}
        result = go(data, f"limit-{name}", **more)
        assert about(result, "distill")["online"] == (name == "online")
        assert about(result, "distill")["labelled_in_batch"] == 6, "3/8 of 16: 24 of 114 images are labelled"
        lines = (Path(result["run"]) / "distill" / "metrics.jsonl").read_text().splitlines()
        rows[name] = [json.loads(line)["loss"] for line in lines]
    # the first losses see the same weights; later ones have gone their own way by float16's rounding
    assert rows["online"][0] == pytest.approx(rows["cached"][0], abs=1e-3)
    assert rows["online"][:5] == pytest.approx(rows["cached"][:5], abs=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["task-oriented", "task-agnostic"])
def test_a_finished_run_opens_no_image(data, tmp_path, objective):
    """Given again after its cache was removed, a finished run decodes nothing."""
    settings = {
        "objective": objective,
        "steps": 2,
        "finetune": "head",
        "cache": str(tmp_path / "cache"),
        "committee": "auto",
    }
    go(data, f"opens-{objective}", **settings)
    shutil.rmtree(tmp_path / "cache")
    again = go(data, f"opens-{objective}", **settings)
    members = ["committee"] if objective == "task-oriented" else []  # features need none
    assert again["reused"] == ["curate", "adapt", *members, "distill", "finetune", "evaluate"]
    assert not list((tmp_path / "cache").glob("images-*/*.arrow")), sorted((tmp_path / "cache").rglob("*"))


@pytest.mark.slow
def test_evaluate_on_new_images(data):
    """`evaluate --target` scores a finished run on other labelled images, and leaves the run as it was."""
    result = go(data, "evaluated")
    before = (Path(result["run"]) / "evaluate" / "result.json").read_bytes()
    again = tutelage.evaluate(run=result["run"], target=str(data / "target" / "test")).to_json()
    new = tutelage.evaluate(run=result["run"], target=str(data / "target" / "train")).to_json()
    assert again["distilled"]["test"] == result["distilled"]["test"]
    assert new["test_images"] == 24
    assert (Path(result["run"]) / "evaluate" / "result.json").read_bytes() == before
    for stage in (one for one in TRAINED if any((Path(result["run"]) / one).glob("*.safetensors"))):
        kept = (Path(result["run"]) / stage / "result.json").rename(Path(result["run"]) / "kept.json")
        with pytest.raises(TutelageError, match=f"{stage} holds weights, but no result.json") as error:
            tutelage.evaluate(run=result["run"])  # not the scores of the other models, as if this one had never been
        assert f"tutelage {stage} --out" in error.value.hint
        kept.rename(Path(result["run"]) / stage / "result.json")
    assert tutelage.evaluate(run=result["run"]).reused


@pytest.mark.slow
def test_student_learns(tmp_path):
    """The whole job teaches: the student ends far above chance on images that it has never seen."""
    write_textures(tmp_path, gallery=300, size=48)
    result = go(tmp_path, "learns", steps=60, batch_size=64, teacher_size=48, student_size=48, **LEARNS)
    assert result["distilled"]["test"]["accuracy"] > 0.8
    assert result["distilled"]["agreement"] > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["balanced", "auto"])
def test_smoke_keeps_the_strategy(data, capsys, monkeypatch, strategy):
    """--smoke chooses by the strategy that is asked for, from a part of the gallery; by chance where none is. It says what it changes."""
    monkeypatch.setattr("tutelage.commands.curate.SMOKE_PART", 20)
    more = {"total": 600} if strategy == "balanced" else {}
    result = go(data, f"smoke-{strategy}", smoke=True, strategy=strategy, steps=None, **more)
    said = capsys.readouterr().err
    chosen = json.loads((Path(result["run"]) / "curate" / "result.json").read_text())
    assert chosen["strategy"] == ("random" if strategy == "auto" else strategy)
    assert chosen["images"] == {"train": 24, "val": 0, "test": 30, "transfer": 24 + 90}, "the gallery has 90"
    (line,) = [line for line in said.splitlines() if line.startswith("--smoke cuts down: ")]
    assert "budget default -> 10" in line
    assert "batch_size" not in line, "it is smaller than that of a smoke run"
    assert ("strategy auto -> random, total default -> 512" in line) == (strategy == "auto")
    assert ("total 600 -> 512" in line) == (strategy == "balanced")
    assert ("--smoke looks at 40 of 90 gallery images" in said) == (strategy == "balanced")


@pytest.mark.slow
def test_smoke_keeps_vectors_made_elsewhere(data, tmp_path):
    """--smoke searches with --embeddings where they are given, and refuses them as the run itself would where nothing searches."""
    names = sorted(path.name for path in (data / "gallery").iterdir())
    labelled = sorted(str(path.relative_to(data / "target")) for path in (data / "target").glob("*/*/*.png"))
    vectors = np.random.default_rng(0).normal(size=(len(names) + len(labelled), 8)).astype(np.float32)
    np.save(tmp_path / "vectors.npy", vectors)
    (tmp_path / "vectors.txt").write_text("\n".join([*names, *labelled]))
    given = {"smoke": True, "steps": None, "embeddings": [str(tmp_path / "vectors.npy")]}
    result = go(data, "smoke-vectors", strategy="best", total=60, **given)
    table = read_manifest(Path(result["run"]) / "curate" / "manifest.parquet")[1]
    assert table.num_rows == 60
    assert set(table.column("strategy").to_pylist()) >= {"best"}
    with pytest.raises(TutelageError, match="--embeddings with --strategy all"):
        go(data, "smoke-refused", **given)


def test_looked_at():
    """--smoke looks at a seeded part of a large gallery, the same in every process, larger where it did not suffice."""
    refs = list(range(5000))
    settings = CurateSettings(strategy="balanced", smoke=True, seed=3)
    part = gallery_sample(refs, settings, 100, SPARE)
    assert len(part) == len(set(part)) == 2 * SMOKE_PART
    assert part == sorted(part) == gallery_sample(refs, settings, 100, SPARE)
    assert set(part) < set(gallery_sample(refs, settings, 100, 2 * SPARE))
    assert part != gallery_sample(refs, replace(settings, seed=4), 100, SPARE)
    assert gallery_sample(refs, replace(settings, smoke=False), 100, SPARE) == refs


@pytest.mark.slow
def test_tracker(data, monkeypatch):
    """`--tracker tensorboard` leaves event files beside metrics.jsonl of every stage that trains."""
    pytest.importorskip("tensorboard")
    more = {"adapt": "full", "finetune": "full", "no_baseline": False}
    monkeypatch.setattr("tutelage.commands.adapt.FULL_PASSES", 4)
    folder = Path(go(data, "tracked", tracker="tensorboard", steps=10, **more)["run"])
    for stage in ("adapt", "distill", "finetune", "baseline"):
        assert list((folder / "trackers" / f"tracked-{stage}").rglob("events.out.tfevents*"))
        steps = steps_of(folder / stage / "metrics.jsonl")
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) == 10 or stage in ("adapt", "finetune")


def test_one_label_per_class(data):
    """With one label per class nothing can be held out: the run keeps sharp targets and the student as it was distilled."""
    result = go(data, "one", budget=1, finetune="auto")
    assert about(result, "adapt")["validation"]["probe"]["temperature"] == 0.25
    assert about(result, "finetune")["delivered"] == "distilled"


@pytest.mark.slow
def test_all_labels_in_one_group(data):
    """Where all labelled images are of one group, no label can be held out: the run ends all the same."""
    result = go(data, "one-group", group_by="^(train)|$", committee="auto", finetune="auto", no_baseline=True)
    assert result["distilled"]["test"]["images"] == result["teacher"]["test"]["images"]
