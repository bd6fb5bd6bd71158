"""What a study says before it computes: data that are others now, steps of equal compute, time and disk."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tutelage
from conftest import MODELS, Task, make_task
from tutelage.device import flops, training_flops
from tutelage.errors import TutelageError
from tutelage.models.students import build_student
from tutelage.models.teachers import build_teacher
from tutelage.run_folder import read_json
from tutelage.settings.commands import RunSettings
from tutelage.settings.presets import PRESETS
from tutelage.study.arms import ARMS, arms_of, clip_weights
from tutelage.study.cost_estimate import Data, has_committee, matched_steps, steps_of

PAIRS = {name.strip("-").replace("-", "_"): value for name, value in zip(MODELS[::2], MODELS[1::2], strict=True)}
GIVEN: dict[str, Any] = {name: int(value) if value.isdecimal() else value for name, value in PAIRS.items()}
SHORT = {"dedup": "none", "committee": "none", "steps": 4, "batch_size": 8, "finetune": "head"}

ALL = ("teacher", "committee", "transfer", "student")


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Task:
    return make_task(tmp_path_factory.mktemp("plans"))


def study(task: Task, out: Path, **more) -> dict:
    data = {"target": str(task.target), "gallery": [str(task.gallery)]}
    return tutelage.compare(
        **data, **GIVEN, **SHORT, out=str(out), budgets=["2"], seeds=["0"], arms=["scratch"], **more
    )


def test_results_of_other_data_are_refused(task, tmp_path):
    """A finished study is not printed again for other labels, other images, or a path that is none."""
    results = str(tmp_path / "results")
    study(task, tmp_path / "study", results=results)
    assert study(task, tmp_path / "again", results=results)["runs"]
    folder = Task(Path(shutil.copytree(task.root, tmp_path / "moved")))
    assert study(folder, tmp_path / "there", results=results)["runs"], "the same data in another place"
    classes = sorted((folder.target / "train").iterdir())
    image = next(classes[0].iterdir())
    image.rename(classes[1] / f"other-{image.name}")
    with pytest.raises(TutelageError, match="made from other images or labels than --target"):
        study(folder, tmp_path / "other", results=results)
    assert not (tmp_path / "other").exists()
    shutil.rmtree(folder.gallery)
    with pytest.raises(TutelageError, match="gallery"):
        study(folder, tmp_path / "other", results=results)


@pytest.fixture(scope="module")
def settings() -> RunSettings:
    """All settings of a run of 50 steps of 16 images."""
    return RunSettings(**GIVEN, steps=50, batch_size=16)


def test_steps_of_equal_compute(settings):
    """With --match flops each arm's training, teacher outputs and committee cost what oriented's do."""
    student = build_student(GIVEN["student"], 2, "scratch", GIVEN["student_size"])
    encoder = build_teacher(GIVEN["teacher"], GIVEN["teacher_weights"], GIVEN["teacher_size"])
    told, each = flops(encoder.module, encoder.size), training_flops(student.module, student.size)
    whole = (
        200 * told + 2 * 50 * 16 * each
    )  # 100 images and their mirror images; the committee's students train as long as the student
    costs = {
        "scratch": (0, 1.0), "baseline-plus": (0, 1.0), "agnostic": (100, 1.0), "oriented": (200, 2.0), "pseudo-label": (200, 2.0),
        "teacher-only": (200, 1.0), "paper": (200, 1.0), "self-training": (0, 2.0), "dino": (0, 1.25),
    }  # fmt: skip
    for arm in arms_of(list(costs), [], []):
        own = replace(settings, **arm.way.settings)
        steps = matched_steps(arm, own, 100)
        outputs, share = costs[arm.name]
        assert outputs * told + steps * 16 * each * share == pytest.approx(whole, abs=16 * each * share), arm.name
        assert steps == steps_of(arm, own, 100, "flops")
        assert (steps == 50) == (costs[arm.name] == (200, 2.0))


def test_steps_of_equal_images(settings):
    """With --match images every arm takes the steps that are asked for, but the stronger baseline: what a committee sees is added."""
    for arm in arms_of(list(ARMS), [], []):
        own = replace(settings, **arm.way.settings)
        times = 2 if arm.name == "baseline-plus" else 1
        assert steps_of(arm, own, 100, "images") == 50 * times, arm.name
        passes = replace(own, steps=None, epochs=8, batch_size=20)
        assert steps_of(arm, passes, 100, "images") == 40 * times


def test_what_the_arms_are():
    """Each arm's student, what its compute is the sum of, and whether it has a committee, in one table."""
    distilled = {
        "agnostic": (("transfer", "student"), False), "oriented": (ALL, True),
        "pseudo-label": (ALL, True), "teacher-only": (("teacher", "transfer", "student"), False),
        "self-training": (("committee", "transfer", "student"), True), "paper": (("teacher", "transfer", "student"), False),
        "dino": (("transfer", "student"), False),
    }  # fmt: skip
    baselines = {"scratch", "imagenet", "clip", "baseline-plus"}
    assert set(ARMS) == baselines | set(distilled)
    for arm in arms_of(list(ARMS), [], []):
        if arm.name in baselines:
            assert (arm.way.model, arm.way.charged) == ("baseline", ("alone",))
            continue
        charged, committee = distilled[arm.name]
        assert (arm.way.model, arm.way.charged) == ("delivered", charged), arm.name
        assert has_committee(arm, RunSettings(**arm.way.settings)) == committee, arm.name
        assert ("committee" in charged) == committee
    assert not has_committee(arms_of(["oriented"], [], [])[0], RunSettings(committee="none"))
    assert {**PRESETS["paper"], "preset": "paper"} == ARMS["paper"].settings


def test_sizes_before_anything_is_decoded(task, tmp_path):
    """--per-query and --total bound the set that a plan counts; a gallery of less gives what it has; an arm's own gallery is its own."""
    settings = RunSettings(target=str(task.target), gallery=[str(task.gallery)], budget=2, strategy="balanced")
    one = tmp_path / "one"
    one.mkdir()
    shutil.copy(next(task.gallery.iterdir()), one)
    data = Data()
    for more, images in (
        ({}, 6 + 24), ({"budget": 4}, 12 + 24), ({"budget": None}, 18 + 24), ({"per_query": 3}, 6 + 18), ({"total": 10}, 10),
        ({"total": 100}, 6 + 24), ({"gallery": [str(one)]}, 6 + 1),
    ):  # fmt: skip
        assert data.of(replace(settings, **more)).images == images, more


def test_an_arm_with_a_gallery_of_its_own(task, tmp_path):
    """Transfer sets are compared as variants of an arm, each with its own gallery or strategy: planned, finished, and given again."""
    near = tmp_path / "near"
    shutil.copytree(task.gallery, near)
    for image in sorted(near.iterdir())[:12]:
        image.unlink()
    own = {
        "arms": ["oriented", "oriented:near"], "set": [f'oriented:near.gallery=["{near}"]'], "budgets": ["2"], "seeds": ["0"],
        "target": str(task.target), "gallery": [str(task.gallery)], "out": str(tmp_path / "study"),
    }  # fmt: skip
    first = tutelage.compare(**own, **GIVEN, **SHORT)
    again = tutelage.compare(**own, **GIVEN, **SHORT)
    assert first["runs"] == again["runs"]
    assert not again["failed"]
    kept = {
        one["arm"]: one["images"]["transfer"]
        for one in read_json(tmp_path / "study" / "report" / "results.json")["records"]
    }
    assert kept == {"oriented": 6 + 24, "oriented:near": 6 + 12}


def test_clip_weights_are_not_those_fine_tuned_on_labels():
    """The CLIP arm starts from weights of captions alone; where timm has only fine-tuned ones, it has none."""
    assert clip_weights("vit_base_patch32_clip_224").startswith("vit_base_patch32_clip_224.")
    for name in ("vit_base_patch16_clip_224", "convnext_large_mlp", "fastvit_mci0"):
        assert "_ft_in" not in clip_weights(name)
    with pytest.raises(TutelageError, match="no CLIP weights for vit_base_patch16_clip_384"):
        clip_weights("vit_base_patch16_clip_384")
