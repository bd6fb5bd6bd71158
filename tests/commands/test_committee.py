"""The committee: who has met which label, what its students weigh, and what becomes of it where nothing can judge."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import tutelage
from textures import write_textures
from tutelage.data.manifest import load_task
from tutelage.distillation.committee_mixture import BIAS, Mixture, bias_for_iou, bias_of, mixture_of
from tutelage.errors import TutelageError
from tutelage.features.view_batches import Inference
from tutelage.finetuning import supervised
from tutelage.metrics import confusion, intersection_over_union, log_softmax, softmax
from tutelage.results import CommitteeResult
from tutelage.settings.shared_flags import Views
from tutelage.tasks import Classification, Segmentation

TINY = {
    "teacher": "test_efficientnet", "teacher_weights": "scratch", "teacher_size": 32, "student": "test_resnet",
    "student_weights": "scratch", "student_size": 32, "steps": 10, "batch_size": 8, "no_baseline": True,
    "dedup": "none",  # textures of one kind count as copies of each other
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("committee")
    write_textures(folder)
    return folder


def go(data: Path, name: str, **more) -> dict:
    settings = {"target": str(data / "target"), "gallery": [str(data / "gallery")], **TINY, **more}
    return tutelage.run(out=str(data / "runs" / name), **settings).to_json()


def about(result: dict, stage: str) -> dict:
    return json.loads((Path(result["run"]) / stage / "result.json").read_text())


def noisy(labels: np.ndarray, sure: float, seed: int) -> np.ndarray:
    """Log probabilities of 3 classes that are right by `sure` and wrong by noise of their own."""
    return log_softmax(sure * np.eye(3)[labels] + np.random.default_rng(seed).normal(size=(len(labels), 3)))


def test_members_that_err_elsewhere_are_mixed():
    """Two members that are wrong on other images are better together, and the loss of the mixture says by how much."""
    labels = np.random.default_rng(0).integers(0, 3, 200)
    teacher, students = noisy(labels, 2, 1), noisy(labels, 2, 2)
    found = mixture_of(teacher, students, labels, np.arange(200))
    assert 0.3 <= found["weight"] <= 0.7
    assert found["gain"] > found["standard_error"] > 0
    mixed = softmax(((1 - found["weight"]) * teacher + found["weight"] * students) / found["temperature"])
    expected = -np.log(mixed[np.arange(200), labels]).mean()
    assert found["held_out"]["committee"]["log_loss"] == pytest.approx(expected, rel=1e-5)
    assert expected < found["held_out"]["teacher"]["log_loss"]


def test_students_that_know_nothing_count_for_nothing():
    """Beside a teacher that knows the task, students at chance have no weight, and the calibrated teacher stays as it is."""
    labels = np.random.default_rng(0).integers(0, 3, 200)
    found = mixture_of(noisy(labels, 4, 1), noisy(labels, 0, 2), labels, np.arange(200))
    assert (found["weight"], found["temperature"], found["gain"]) == (0.0, 1.0, 0.0)


def test_the_students_alone_have_biases_of_their_own():
    """For masks, --committee only mixes as if the students' weight were 1: with their temperature and their biases."""
    labels = np.random.default_rng(0).choice(3, 400, p=[0.8, 0.15, 0.05])
    teacher, students, images = noisy(labels, 4, 1), noisy(labels, 1, 2), np.arange(400)
    mixed = mixture_of(teacher, students, labels, images, biased=True)
    found = CommitteeResult.model_construct(folds=5, **mixed)
    alone = mixture_of(students, students, labels, images, biased=True)
    only = Mixture.of(found, "only")
    assert (only.weight, only.temperature, list(only.bias)) == (1.0, alone["temperature"], alone["bias"])
    assert np.ptp(only.bias) > 0.5
    assert list(Mixture.of(found, "auto").bias) == mixed["bias"] != alone["bias"]
    assert mixture_of(teacher, students, labels, images)["students_bias"] == []


def test_a_gain_within_its_error_is_none():
    """Rows of two images are two observations, not hundreds: what gains on one of them alone is no gain."""
    labels = np.zeros(400, np.int64)
    teacher, students = (np.tile(log_softmax(np.array([[1.0, 0.0, 0.0]])), (400, 1)) for _ in range(2))
    students[:200] = log_softmax(np.array([[1.2, 0.0, 0.0]]))
    images = np.repeat([0, 1], 200)
    assert mixture_of(teacher, students, labels, images)["weight"] == 0


def test_rare_pixels_keep_their_share():
    """The bias makes mean probabilities the labels' shares; with one row for all pixels that is its worked example."""
    rows = np.log(np.tile(np.float32([[0.9, 0.1]]), (4, 1)))
    expected = np.log([0.75 / 0.9, 0.25 / 0.1])
    found = bias_of(rows, np.array([0, 0, 0, 1]))
    np.testing.assert_allclose(found - found[0], expected - expected[0], rtol=1e-5)
    labels = np.random.default_rng(0).choice(3, 5000, p=[0.9, 0.08, 0.02])
    flat = log_softmax(0.5 * noisy(labels, 3, 1))
    biased = softmax(flat + bias_of(flat, labels)).mean(axis=0)
    np.testing.assert_allclose(biased, np.bincount(labels) / 5000, atol=1e-3)
    assert bias_of(flat, np.zeros(5000, np.int64))[1:].tolist() == [-BIAS, -BIAS], "a class without labels, bounded"


def test_rare_pixels_are_named_where_that_pays():
    """Beyond the calibrated bias rare classes gain as much as makes the held-out mean IoU largest; nothing where decisions are right."""
    labels = np.random.default_rng(0).choice(3, 5000, p=[0.9, 0.08, 0.02])
    rows = log_softmax(2 * np.eye(3)[labels] + np.random.default_rng(1).normal(size=(5000, 3)))
    bias = bias_of(rows, labels)

    def score(of: np.ndarray) -> float:
        return float(np.mean(intersection_over_union(confusion(labels, (rows + of).argmax(axis=1), 3))))

    found = bias_for_iou(rows, labels, bias)
    rarity = -np.log(np.bincount(labels) / 5000)
    tried = [score(bias + t * rarity) for t in np.linspace(0, 1, 11)]
    assert score(found) == pytest.approx(max(tried))
    assert max(tried) > tried[0] + 0.01
    right = np.log(np.eye(3)[labels] * 0.97 + 0.01)
    assert bias_for_iou(right, labels, bias).tolist() == bias.tolist()


def test_the_mixture_is_its_formula():
    """p ~ (teacher^(1-w) students^w)^(1 / T), and, without students, the teacher's alone."""
    teacher, students = np.log([[0.5, 0.25, 0.25]]), np.log([[0.2, 0.6, 0.2]])
    mixed = np.exp(Mixture(0.5, 0.5)(teacher, students))
    np.testing.assert_allclose(mixed, [np.array([0.1, 0.15, 0.05]) / 0.3], rtol=1e-6)
    np.testing.assert_allclose(np.exp(Mixture()(teacher, None)), [[0.5, 0.25, 0.25]], rtol=1e-6)
    np.testing.assert_allclose(np.exp(Mixture(1.0)(None, students)), [[0.2, 0.6, 0.2]], rtol=1e-6)
    biased = np.exp(Mixture(0.5, 2.0, tuple(np.log([1.0, 2.0, 1.0])))(teacher, students))
    root = np.array([0.1, 0.15, 0.05]) ** 0.25 * [1, 2, 1]
    np.testing.assert_allclose(biased, [root / root.sum()], rtol=1e-6)


@pytest.mark.slow
def test_no_student_has_met_the_labels_that_it_is_judged_on(data, monkeypatch):
    """Each labelled image is left out by just one student, and the teacher's head of that fold has not met it either."""
    trained: list[set[bytes]] = []
    train = supervised.train_on_labels

    def watched(module, network, labelled, *rest, **more):
        if rest[-1].what.startswith("committee, student "):
            trained.append({key.tobytes() for key in labelled.images.keys})
        return train(module, network, labelled, *rest, **more)

    monkeypatch.setattr(supervised, "train_on_labels", watched)
    result = go(data, "folds")
    found, run = about(result, "committee"), Path(result["run"])
    labelled = {key.tobytes() for key in load_task(run, data / "runs" / "cache").train.images.keys}
    members = [keys for keys in trained if keys < labelled]
    assert len(members) == found["folds"] == 5
    assert all(sum(key not in keys for keys in members) == 1 for key in labelled)
    assert found["steps"] == 10 // 5
    assert found["images_seen"] == 5 * 2 * 8, "all students together see what the baseline sees"
    assert sorted(path.name for path in (run / "committee").iterdir()) == sorted(
        ["result.json", "students.npy", *(f"fold-{i}.safetensors" for i in range(5))]
    )
    students = np.load(run / "committee" / "students.npy")
    assert students.shape == (114, 3)
    np.testing.assert_allclose(np.exp(students.astype(np.float32)).sum(axis=1), 1, atol=5e-3)
    assert result["committee"]["test"]["images"] == 30


def test_where_nothing_can_be_held_out(data, capsys):
    """With one label of a class the targets are the teacher's alone, and that is said; students alone are refused."""
    result = go(data, "one-label", budget=1)
    assert "no class has labels to hold out" in capsys.readouterr().err
    found = about(result, "committee")
    assert (found["folds"], found["weight"], found["held_out"]) == (0, 0.0, None)
    assert "committee" not in result
    with pytest.raises(TutelageError, match="--committee only needs a class with two labels"):
        go(data, "one-label-only", budget=1, committee="only")


@pytest.mark.slow
def test_students_alone_ask_no_teacher(data):
    """--committee only distils what the labels-only students say: another teacher gives the same student."""
    weights = []
    for name, more in (("first", {}), ("other", {"teacher_weights": "scratch"})):
        result = go(data, f"only-{name}", committee="only", cache=str(data / f"cache-only-{name}"), **more)
        weights.append((Path(result["run"]) / "distill" / "weights.safetensors").read_bytes())
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_a_small_pool_and_a_class_that_it_lacks(data, tmp_path):
    """30 images of two of three classes are distilled like any others; the labels share is at its most."""
    pool = tmp_path / "pool"
    pool.mkdir()
    for path in sorted((data / "gallery").iterdir())[:30]:
        (pool / path.name).symlink_to(path)
    result = go(data, "small", gallery=[str(pool)])
    assert about(result, "distill")["labelled_in_batch"] == 3, "3/8 of 8"
    assert result["delivered"]["what"] == "distilled"


def test_a_mirrored_network_gives_mirrored_grids(monkeypatch):
    """What a student says of the mirror image is turned back before it is averaged: a network that sees places one by one says the
    same with and without."""

    class ByPlace(torch.nn.Module):
        def on_grid(self, batch, grid):
            return torch.nn.functional.interpolate(batch, grid)

    images = np.random.default_rng(0).normal(size=(2, 3, 4, 6)).astype(np.float32)

    def outputs(forward, module, network, inference, look):
        return forward(torch.from_numpy(images if look == -1 else images[..., ::-1].copy())).numpy()

    monkeypatch.setattr("tutelage.tasks.segmentation.view_outputs", outputs)
    both, whole = (
        Segmentation().log_probabilities(
            ByPlace(), None, Inference(None, Segmentation().views(Views(flip=flip, crop_area=1.0)), None), (4, 6)
        )
        for flip in ("horizontal", "none")
    )
    np.testing.assert_array_equal(both, whole)


def test_labels_that_can_be_judged():
    """A label is judged where another image of its class is outside the fold; a validation image always."""
    labels, fold = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 0, 0, 1])
    assert Classification().member_truth(labels, None, fold)[1].tolist() == [True, True, False, False, False]
    assert Classification().member_truth(labels, None, None)[1].all()


@pytest.mark.slow
def test_a_pilot_judges_without_a_validation_split(data, capsys):
    """--pilot scores both students on every label, each held out of a run of its own, says its cost first, and delivers the better."""
    result = go(data, "pilot", pilot=True, no_baseline=False, committee="none", steps=2, budget=4)
    run, found, said = Path(result["run"]), about(result, "pilot"), capsys.readouterr().err
    assert said.index("pilot: 2 runs on parts of the labels") < said.index("pilot: on 12 held-out labels")
    assert found["images"] == 12
    met: set[bytes] = set()
    for fold in sorted((run / "pilot").glob("fold-*")):
        task = load_task(fold, data / "runs" / "cache")
        held = {key.tobytes() for key in task.test.images.keys}
        assert not held & {key.tobytes() for key in task.transfer.keys}
        assert not held & met
        met |= held
    assert len(met) == 12
    delivered = about(result, "finetune")
    better = found["gain"] > found["standard_error"]
    assert delivered["delivered"] == result["delivered"]["what"] == ("baseline" if better else "distilled")
    assert delivered["judged_on"] == "12 labels, each held out of a run of its own"
    again = go(data, "pilot", pilot=True, no_baseline=False, committee="none", steps=2, budget=4)
    assert "finetune" in again["reused"]
    with pytest.raises(TutelageError, match="a class keeps fewer than 2 labels"):
        go(data, "pilot-few", pilot=True, no_baseline=False, committee="none", steps=2, budget=3)


@pytest.mark.parametrize("more", [{"val": "0.2"}, {"finetune": "keep"}, {"no_baseline": True}])
def test_a_pilot_that_cannot_judge_is_refused(data, more):
    """What would leave the pilot nothing to compare is told before anything is read."""
    flag = next(iter(more)).replace("_", "-")
    with pytest.raises(TutelageError, match=f"--pilot with --{flag}"):
        go(data, "refused", **{"pilot": True, "no_baseline": False, **more})
