"""Segmentation through all stages for real, on small scenes and networks that train in seconds."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import tutelage
from browser import CHROMIUM, NO_CHROMIUM, check_in_browser
from scenes import CLASSES, write_scenes
from tutelage.data.manifest import load_task
from tutelage.distillation import distill_loop
from tutelage.errors import TutelageError
from tutelage.files import read_json
from tutelage.models import segmentation_heads
from tutelage.tasks import Segmentation
from tutelage.training.checkpoints import Resumable

pytestmark = pytest.mark.slow

MODELS = {
    "teacher": "test_efficientnet", "teacher_weights": "scratch", "teacher_size": "64x96",
    "student": "test_resnet", "student_weights": "scratch", "student_size": "64x96",
}  # fmt: skip
SHORT = {
    "steps": 6,
    "batch_size": 4,
    "committee": "none",
    "dedup": "none",
    "finetune": "keep",
    "no_baseline": True,
    "crop_area": 0.4,
}


@pytest.fixture(scope="module", autouse=True)
def short():
    """Teachers' heads, and students in the last stage, see few steps while these tests run."""
    before = segmentation_heads.STRENGTHS, dict(Segmentation.PASSES)
    segmentation_heads.STRENGTHS = (8, 16)
    Segmentation.PASSES.update(dict.fromkeys(Segmentation.PASSES, 4))
    yield
    segmentation_heads.STRENGTHS = before[0]
    Segmentation.PASSES.update(before[1])


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("dense"))


def go(data: Path, name: str, **more) -> dict:
    settings = {
        "target": str(data / "target"),
        "gallery": [str(data / "gallery")],
        **MODELS,
        **SHORT,
        "budget": 4,
        **more,
    }
    return tutelage.run(task="segmentation", out=str(data / "runs" / name), **settings).to_json()


def losses_of(result: dict) -> list[float]:
    lines = (Path(result["run"]) / "distill" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.fixture(scope="module")
def whole(data) -> dict:
    """A run with all of its stages."""
    return go(data, "whole", finetune="full", no_baseline=False, committee="auto")


def test_all_stages(whole):
    """A run gives mIoU beside the other scores for distilled student, baseline and teacher, a page with masks, and a report by class."""
    for name in ("distilled", "baseline", "delivered", "teacher", "committee"):
        test = whole[name]["test"]
        assert test["images"] == 4
        assert 0 <= test["miou"] <= 1
        assert len(test["iou"]) == 3
        assert {"accuracy", "boundary_f1", "recall"} <= test.keys()
    folder = Path(whole["run"])
    page = (folder / "report" / "index.html").read_text()
    assert page.count('alt="mask of ') == 4
    for name in ("delivered", "distilled", "baseline", "teacher", "committee"):
        assert page.count(f'alt="{name} of ') == 4
    about = read_json(folder / "committee" / "result.json")
    assert len(about["bias"]) == 3
    assert "IoU of each class" in page
    assert "mean IoU of" in page
    curated = read_json(folder / "curate" / "result.json")
    assert (curated["task"], curated["images"]["train"]) == ("segmentation", 4)
    assert curated["shown_by"] == dict.fromkeys(CLASSES, 4)
    lines = (folder / "report" / "results.csv").read_text().splitlines()
    assert any(line.startswith("delivered,iou,disc,") for line in lines)


def test_a_finished_run_is_taken_as_it_is(data, whole):
    """The same command again does nothing and says the same."""
    again = go(data, "whole", finetune="full", no_baseline=False, committee="auto")
    assert set(again["reused"]) == {"curate", "adapt", "committee", "distill", "finetune", "baseline", "evaluate"}
    assert again["delivered"]["test"] == whole["delivered"]["test"]


def test_a_killed_run_goes_on(data, monkeypatch):
    """Killed in the middle of the transfer, the same command ends with the weights of a run that was never stopped."""
    monkeypatch.setattr("tutelage.commands.distill.checkpoint_steps", lambda steps, batch: 2)
    expected = load_file(Path(go(data, "unstopped")["run"]) / "finetune" / "weights.safetensors")
    saved = Resumable.save

    def killed(resumable, step, *rest):
        saved(resumable, step, *rest)
        if step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Resumable, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            go(data, "stopped")
    assert list((data / "runs" / "stopped" / "checkpoints").glob("distill-*"))
    found = load_file(Path(go(data, "stopped")["run"]) / "finetune" / "weights.safetensors")
    assert all(np.array_equal(found[name], value) for name, value in expected.items())


def test_cached_and_online_targets_agree(data, capsys):
    """Cached targets give the losses of a teacher in the loop; on a coarser grid they are off by no more than is told."""
    grid = 16 * 24 * 3 * 14 * 2 * 2 / 2**30  # GiB of logits at stride 4 of 14 images and their mirror images
    rows = {
        name: losses_of(go(data, f"limit-{name}", cache_limit=limit, cache=str(data / f"cache-{name}")))
        for name, limit in (("cached", 1.0), ("online", 0.0))
    }
    assert rows["cached"][:3] == pytest.approx(rows["online"][:3], abs=2e-3)
    capsys.readouterr()
    reduced = losses_of(go(data, "limit-reduced", cache_limit=0.5 * grid, cache=str(data / "cache-reduced")))
    said = capsys.readouterr().err
    assert "on a grid of 8 x 12 instead of 16 x 24" in said
    told = float(said.partition("changes the loss of a pixel by ")[2].split()[0])
    assert 0 < told < 1
    assert abs(reduced[0] - rows["online"][0]) <= told + 2e-3


@pytest.mark.parametrize("adapt", ["probe", "probe-then-full"])
def test_a_teacher_that_looks_through_windows(data, adapt, monkeypatch):
    """--teacher-window: the teacher sees the image window by window, in every stage; the run says so and its teacher is another."""
    monkeypatch.setattr("tutelage.commands.adapt.FULL_PASSES", 1)
    more = {"teacher_size": "96x160", "teacher_window": "64x96", "adapt": adapt, "cache": str(data / "cache-windows")}
    result = go(data, f"windows-{adapt}", **more)
    about = read_json(Path(result["run"]) / "adapt" / "result.json")
    assert about["teacher"]["window"] == "64x96"
    embedded = [read_json(one)["size"] for one in (data / "cache-windows").glob("embeddings-*/about.json")]
    assert "64x96" in embedded, "the search looks at whole images, as large as a window"
    assert result["teacher"]["test"]["miou"] > 0
    if adapt == "probe":
        whole = go(data, "windows-none", **{**more, "teacher_window": None})
        assert whole["teacher"]["test"] != result["teacher"]["test"]
        bills = [
            read_json(Path(one["run"]) / "adapt" / "result.json")["compute_cost"]["teacher"]["flops"]
            for one in (whole, result)
        ]
        assert bills[1] == pytest.approx(bills[0] * 6 * 64 * 96 / (96 * 160), rel=0.02), "2 x 3 windows that overlap"


def test_a_window_is_another_teacher_for_features_too(data):
    """What the frozen teacher says through windows is not taken for what it says of whole images: the student learns something else."""
    more = {
        "objective": "task-agnostic",
        "teacher_size": "96x160",
        "cache": str(data / "cache-windows"),
        "steps": 2,
        "finetune": "head",
    }
    whole, windows = (
        losses_of(go(data, f"task-agnostic-window-{window}", teacher_window=window, **more))
        for window in (None, "64x96")
    )
    assert abs(whole[0] - windows[0]) > 1e-4


def test_rare_classes_may_count_more(data, monkeypatch):
    """--class-weight balanced weighs pixels by what the targets take them for: the same teacher's losses differ, and stay finite."""
    weighted = distill_loop.class_weights

    def losses_with(weights) -> np.ndarray:
        monkeypatch.setattr(distill_loop, "class_weights", weights)
        name = f"weight-{weights is weighted}"
        return losses_of(go(data, name, class_weight="balanced", cache=str(data / "cache-weights")))

    balanced, plain = losses_with(weighted), losses_with(lambda targets, kind: None)
    assert np.isfinite(balanced).all()
    assert abs(balanced[0] - plain[0]) > 1e-3


@pytest.mark.parametrize("features", ["patches", "global"])
def test_task_agnostic(data, features):
    """Features of places, or of whole images, are matched without a label; the decoder comes with the masks."""
    kind = "contrastive" if features == "patches" else "cosine"
    result = go(
        data,
        f"task-agnostic-{features}",
        objective="task-agnostic",
        task_agnostic_features=features,
        task_agnostic_loss=kind,
        label_share=0.0,
        finetune="full" if features == "patches" else "auto",
        teacher="tf_efficientnet_lite0",
        student="mobilenetv3_small_050",
    )
    tried = read_json(Path(result["run"]) / "finetune" / "result.json")["validation"]
    assert set(tried) == (set() if features == "patches" else {"long", "steep"}), "a new decoder, at two rates"
    about = read_json(Path(result["run"]) / "distill" / "result.json")
    assert (about["labelled_in_batch"], about["head"]) == (0, False)
    assert losses_of(result)[-1] < losses_of(result)[0]
    assert result["delivered"]["test"]["miou"] >= 0


@pytest.mark.parametrize(
    ("teacher", "size", "decoder"),
    [
        ("vit_tiny_patch16_224", "64x96", "fpn"),
        ("vit_small_patch14_reg4_dinov2", "70x98", "lraspp"),
    ],
)
def test_vit_teachers(data, teacher, size, decoder, monkeypatch):
    """Random ViTs with patches of 14 and 16, with and without registers, teach a student of another input size."""
    if decoder == "fpn":
        pytest.importorskip("segmentation_models_pytorch", reason="segmentation-models-pytorch is not installed")
    import timm.models.vision_transformer as vit

    before = vit.VisionTransformer.__init__
    monkeypatch.setattr(vit.VisionTransformer, "__init__", lambda self, *a, **o: before(self, *a, **{**o, "depth": 1}))
    result = go(data, teacher, teacher=teacher, teacher_size=size, decoder=decoder, objective="pseudo-label", steps=2)
    assert result["delivered"]["test"]["images"] == 4
    assert result["teacher"]["name"] == teacher


def test_the_whole_teacher_may_learn(data, monkeypatch):
    """probe-then-full fine-tunes the encoder from the fitted head, without a validation split too."""
    monkeypatch.setattr("tutelage.commands.adapt.FULL_PASSES", 2)
    rows = ["image,mask,split"]
    for split in ("train", "test"):
        for image in sorted((data / "target" / "images" / split).iterdir()):
            rows.append(f"images/{split}/{image.name},masks/{split}/{image.name},{split}")
    (data / "target" / "list.csv").write_text("\n".join(rows))
    place = str(data / "target" / "list.csv")
    result = go(data, "full", target=place, adapt="probe-then-full", finetune="auto", steps=2)
    about = read_json(Path(result["run"]) / "adapt" / "result.json")
    assert about["mode"] == "probe-then-full"
    assert (Path(result["run"]) / "adapt" / "weights.safetensors").exists()
    delivered = read_json(Path(result["run"]) / "finetune" / "result.json")
    assert (delivered["delivered"], delivered["validation"]) == ("distilled", {}), "nothing can judge"


def test_other_images_can_be_scored(data, whole):
    """`evaluate --target` scores the models of a run on other images and masks of its classes, and on no others."""
    run = whole["run"]
    scores = tutelage.evaluate(run=run, target=str(data / "target")).to_json()
    assert scores["delivered"]["test"]["images"] == 13
    (data / "target" / "classes.txt").write_text("a\nb\n")
    try:
        with pytest.raises(TutelageError, match="the run's classes"):
            tutelage.evaluate(run=run, target=str(data / "target"))
    finally:
        (data / "target" / "classes.txt").write_text("\n".join(CLASSES) + "\n")


@pytest.mark.parametrize(("order", "kept"), [((0, 1, 2), True), ((0, 2, 1), False), ((2, 1, 0), False)])
def test_masks_that_number_the_classes_anew(data, whole, tmp_path, order, kept):
    """`evaluate --target` refuses masks whose palette gives a class the colour that another class of the run has."""
    folder = shutil.copytree(data / "target", tmp_path / "other")
    colours = read_json(Path(whole["run"]) / "curate" / "result.json")["colours"]
    for path in (folder / "masks").rglob("*.png"):
        mask = Image.open(path).copy()
        mask.putpalette([part for number in order for part in colours[number]] + [0] * 3 * 253)
        mask.save(path)
    if kept:
        assert tutelage.evaluate(run=whole["run"], target=str(folder)).to_json()["delivered"]["test"]["images"] == 13
        return
    with pytest.raises(
        TutelageError, match=r"the palettes differ: .* in these masks, but . \(.*\) in those of the run"
    ):
        tutelage.evaluate(run=whole["run"], target=str(folder))


def test_compare(data):
    """A study takes masks without a word of its own: methods, seeds, one page with mIoU."""
    study = data / "study"
    settings = {
        "task": "segmentation", "target": str(data / "target"), "gallery": [str(data / "gallery")], "out": str(study),
        "methods": ["scratch", "task-oriented"], "budgets": ["4"], "seeds": ["0", "1"],
        **{k: v for k, v in {**MODELS, **SHORT, "steps": 2}.items() if k != "no_baseline"},
    }  # fmt: skip
    planned = tutelage.compare(**settings, dry_run=True).to_json()
    result = tutelage.compare(**settings).to_json()
    kept = 2 * sum(path.stat().st_size for path in (study / "cache").glob("outputs-*/mirrored/*.arrow"))
    assert planned["outputs_gibibytes"] * 2**30 == pytest.approx(kept, rel=0.1), (
        "logits of every image and its mirror image, of each seed's teacher"
    )
    assert planned["gibibytes"] > planned["outputs_gibibytes"], "and decoded images and embeddings"
    assert not result["failed"]
    assert [row["method"] for row in result["table"]] == ["scratch", "task-oriented"]
    assert all("miou" in row for row in [*result["table"], *result["runs"]])
    best, other = sorted(result["table"], key=lambda row: -row["miou"])
    assert other["behind"] == pytest.approx(best["miou"] - other["miou"]), "compared by the score of the table"
    page = (study / "report" / "index.html").read_text()
    assert "mIoU on 4 test images" in page
    assert "With 4 labelled images" in page
    assert "mIoU against compute" in page
    assert page.count("<td>the adapted teacher</td>") == 1
    assert page.count('alt="mask of ') == 4, "images, masks, teacher and student side by side"
    if CHROMIUM is not None:
        check_in_browser(page, data, 400, "dark")


@pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)
def test_the_page_of_masks_in_a_real_browser(whole, tmp_path):
    """Chromium shows a run of masks, its pictures too, without errors or sideways scrolling, on a telephone and on a desk."""
    page = (Path(whole["run"]) / "report" / "index.html").read_text()
    for width, scheme in ((400, "light"), (1600, "dark")):
        check_in_browser(page, tmp_path, width, scheme)


def test_masks_touched_since(data, tmp_path):
    """Files that were only written again change nothing; a mask that was painted over since is told by name, the cache lost or not."""
    for folder in ("target", "gallery"):
        shutil.copytree(data / folder, tmp_path / folder)
    result = go(tmp_path, "touched", cache=str(tmp_path / "cache"))
    masks = sorted((tmp_path / "target" / "masks").rglob("*.png"))
    for mask in masks:
        os.utime(mask, (1, 1))
    again = go(tmp_path, "touched", cache=str(tmp_path / "cache"))
    assert {"adapt", "distill", "finetune"} <= set(again["reused"])
    shutil.rmtree(tmp_path / "cache")
    values = np.array(Image.open(masks[0]))
    Image.fromarray(np.where(values == 1, 0, values).astype(np.uint8)).save(masks[0])
    with pytest.raises(TutelageError, match=rf"1 masks of the run .*{masks[0].stem}.*another mask now"):
        load_task(Path(result["run"]), tmp_path / "cache")


def test_all_images_labelled(data, capsys):
    """A gallery of the labelled images alone is no fault: the student learns on them, and the run says so."""
    result = go(data, "all-labelled", gallery=[str(data / "target" / "images" / "train")], budget=None, steps=2)
    assert "nothing but the labelled images" in capsys.readouterr().err
    about = read_json(Path(result["run"]) / "curate" / "result.json")
    assert about["images"]["transfer"] == about["images"]["train"] == about["duplicates"]
    assert (Path(result["run"]) / "curate" / "montage.jpg").exists()
    with pytest.raises(TutelageError, match="already labelled or held out"):
        go(data, "all-tests", gallery=[str(data / "target" / "images" / "test")])


def test_classes_that_are_the_rarest_in_no_mask(data, capsys):
    """Queries go by the rarest class of a mask: a class that is it in none takes no turn, and nothing is said of its queries."""
    settings = {"target": str(data / "target"), "gallery": [str(data / "gallery")], "out": str(data / "by-class")}
    models = {name: value for name, value in MODELS.items() if name != "student_weights"}
    how = {"task": "segmentation", "dedup": "none", "strategy": "balanced", "balance": "class", "total": 12}
    found = tutelage.curate(**settings, **models, **how)
    brought = found.brought
    assert brought
    assert set(brought) < set(CLASSES), "every class is the rarest somewhere: the scenes have changed"
    assert sum(brought.values()) == found.images.transfer - found.images.train
    assert "find nothing new" not in capsys.readouterr().err


def test_one_mask(data, tmp_path):
    """One labelled mask and no validation split leave nothing to hold out: the run ends, with the teacher as it is fitted."""
    target = Path(shutil.copytree(data / "target", tmp_path / "target", ignore=shutil.ignore_patterns("val")))
    models = {"target": str(target), "gallery": [str(data / "gallery")], **MODELS, **SHORT, "budget": 1}
    result = tutelage.run(task="segmentation", out=str(tmp_path / "run"), **models)
    assert result.student.test.miou is not None
    adapted = read_json(tmp_path / "run" / "adapt" / "result.json")
    assert adapted["validation"]["probe"]["temperature"] == 1.0
