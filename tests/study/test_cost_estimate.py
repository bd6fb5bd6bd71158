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
from tutelage.files import read_json
from tutelage.models.students import build_student
from tutelage.models.teachers import build_teacher
from tutelage.settings.command_flags import RunSettings
from tutelage.settings.presets import PRESETS
from tutelage.study.cost_estimate import Data, has_committee, matched_steps, steps_of
from tutelage.study.methods import METHODS, clip_weights, variants_of

PAIRS = {name.strip("-").replace("-", "_"): value for name, value in zip(MODELS[::2], MODELS[1::2], strict=True)}
GIVEN: dict[str, Any] = {name: int(value) if value.isdecimal() else value for name, value in PAIRS.items()}
SHORT = {"dedup": "none", "committee": "none", "steps": 4, "batch_size": 8, "finetune": "head"}

ALL = ("adapt", "committee", "distill", "finetune")


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Task:
    return make_task(tmp_path_factory.mktemp("plans"))


def study(task: Task, out: Path, **more) -> dict:
    data = {"target": str(task.target), "gallery": [str(task.gallery)]}
    return tutelage.compare(
        **data, **GIVEN, **SHORT, out=str(out), budgets=["2"], seeds=["0"], methods=["scratch"], **more
    ).to_json()


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
    """With --match flops each method's training, teacher outputs and committee cost what task-oriented's do."""
    student = build_student(GIVEN["student"], 2, "scratch", GIVEN["student_size"])
    encoder = build_teacher(GIVEN["teacher"], GIVEN["teacher_weights"], GIVEN["teacher_size"])
    told, each = flops(encoder.module, encoder.size), training_flops(student.module, student.size)
    whole = (
        200 * told + 2 * 50 * 16 * each
    )  # 100 images and their mirror images; the committee's students train as long as the student
    costs = {
        "scratch": (0, 1.0), "baseline-plus": (0, 1.0), "task-agnostic": (100, 1.0), "task-oriented": (200, 2.0),
        "pseudo-label": (200, 2.0),
        "teacher-only": (200, 1.0), "paper": (200, 1.0), "self-training": (0, 2.0), "dino": (0, 1.25),
    }  # fmt: skip
    for variant in variants_of(list(costs), [], []):
        own = replace(settings, **variant.method.settings)
        steps = matched_steps(variant, own, 100)
        outputs, share = costs[variant.name]
        assert outputs * told + steps * 16 * each * share == pytest.approx(whole, abs=16 * each * share), variant.name
        assert steps == steps_of(variant, own, 100, "flops")
        assert (steps == 50) == (costs[variant.name] == (200, 2.0))


def test_steps_of_equal_images(settings):
    """With --match images every method takes the steps that are asked for, but the stronger baseline: what a committee sees is added."""
    for variant in variants_of(list(METHODS), [], []):
        own = replace(settings, **variant.method.settings)
        times = 2 if variant.name == "baseline-plus" else 1
        assert steps_of(variant, own, 100, "images") == 50 * times, variant.name
        passes = replace(own, steps=None, epochs=8, batch_size=20)
        assert steps_of(variant, passes, 100, "images") == 40 * times


def test_what_the_methods_are():
    """Each method's student, what its compute is the sum of, and whether it has a committee, in one table."""
    distilled = {
        "task-agnostic": (("distill", "finetune"), False), "task-oriented": (ALL, True),
        "pseudo-label": (ALL, True), "teacher-only": (("adapt", "distill", "finetune"), False),
        "self-training": (("committee", "distill", "finetune"), True), "paper": (("adapt", "distill", "finetune"), False),
        "dino": (("distill", "finetune"), False),
    }  # fmt: skip
    baselines = {"scratch", "imagenet", "clip", "baseline-plus"}
    assert set(METHODS) == baselines | set(distilled)
    for variant in variants_of(list(METHODS), [], []):
        if variant.name in baselines:
            assert (variant.method.model, variant.method.charged) == ("baseline", ("baseline",))
            continue
        charged, committee = distilled[variant.name]
        assert (variant.method.model, variant.method.charged) == ("delivered", charged), variant.name
        assert has_committee(variant, RunSettings(**variant.method.settings)) == committee, variant.name
        assert ("committee" in charged) == committee
    assert not has_committee(variants_of(["task-oriented"], [], [])[0], RunSettings(committee="none"))
    assert {**PRESETS["paper"], "preset": "paper"} == METHODS["paper"].settings


def test_sizes_before_anything_is_decoded(task, tmp_path):
    """--per-query and --total bound the set that a plan counts; a gallery of less gives what it has; a method's own gallery is its own."""
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


@pytest.mark.slow
def test_an_arm_with_a_gallery_of_its_own(task, tmp_path):
    """Transfer sets are compared as variants of a method, each with its own gallery or strategy: planned, finished, and given again."""
    near = tmp_path / "near"
    shutil.copytree(task.gallery, near)
    for image in sorted(near.iterdir())[:12]:
        image.unlink()
    own = {
        "methods": ["task-oriented", "task-oriented:near"], "set": [f'task-oriented:near.gallery=["{near}"]'],
        "budgets": ["2"], "seeds": ["0"],
        "target": str(task.target), "gallery": [str(task.gallery)], "out": str(tmp_path / "study"),
    }  # fmt: skip
    first = tutelage.compare(**own, **GIVEN, **SHORT).to_json()
    again = tutelage.compare(**own, **GIVEN, **SHORT).to_json()
    assert first["runs"] == again["runs"]
    assert not again["failed"]
    kept = {
        one["method"]: one["images"]["transfer"]
        for one in read_json(tmp_path / "study" / "report" / "results.json")["records"]
    }
    assert kept == {"task-oriented": 6 + 24, "task-oriented:near": 6 + 12}


def test_clip_weights_are_not_those_fine_tuned_on_labels():
    """The CLIP method starts from weights of captions alone; where timm has only fine-tuned ones, it has none."""
    assert clip_weights("vit_base_patch32_clip_224").startswith("vit_base_patch32_clip_224.")
    for name in ("vit_base_patch16_clip_224", "convnext_large_mlp", "fastvit_mci0"):
        assert "_ft_in" not in clip_weights(name)
    with pytest.raises(TutelageError, match="no CLIP weights for vit_base_patch16_clip_384"):
        clip_weights("vit_base_patch16_clip_384")
