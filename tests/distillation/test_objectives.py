"""What each objective reads and what it leaves alone: labels, features, heads, and the images of a batch."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tutelage.data.image_cache import Images
from tutelage.distillation import losses
from tutelage.distillation.distill_loop import Plan, _batches, class_weights, labelled_images
from tutelage.distillation.objectives import QUEUE, TASK_AGNOSTIC, Batch, objective_loss
from tutelage.distillation.self_distillation import images_in_a_step, small_side
from tutelage.distillation.targets import Targets
from tutelage.features.view_batches import ViewSettings, view_input
from tutelage.models.students import DINOStudent, build_student
from tutelage.training import cross_entropy

LABELLED, IMAGES = 3, 9  # of the small transfer set below, the labelled ones first
LABELS = np.array([2, 0, 1], np.int64)
STUDENT = SimpleNamespace(size=16, mean=(0.5,) * 3, std=(0.25,) * 3)


def batch_of(labelled: int = 2, read: bool = True) -> Batch:
    """Six images; the first ones have a label in place of a soft target. read: whether the objective reads labels."""
    torch.manual_seed(0)
    soft, labels = (
        torch.softmax(torch.randn(6, 3), 1)[labelled:],
        torch.eye(3)[torch.arange(labelled if read else 0) % 3],
    )
    return Batch(soft, labels, torch.randn(6, 8), torch.randn(5, 8), 2.0)


def output() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(6, 3, requires_grad=True), torch.randn(6, 8, requires_grad=True)


@pytest.mark.parametrize("read", [True, False])
@pytest.mark.parametrize("objective", ["task-oriented", "task-agnostic", "pseudo-label"])
def test_what_an_objective_trains(objective, read):
    """Gradients reach the heads that the objective is about, and the class head of `task-agnostic` through labels alone."""
    logits, projected = output()
    objective_loss(objective, "queue")((logits, projected), batch_of(2 if read else 0, read)).backward()
    moved = [part.grad is not None and bool(part.grad.abs().sum() > 0) for part in (logits, projected)]
    assert (
        moved
        == {"task-oriented": [True, False], "task-agnostic": [read, True], "pseudo-label": [True, False]}[objective]
    )
    assert logits.grad is not None, "every process of a group has a gradient of every parameter"


def test_task_oriented_asks_for_the_targets_and_the_labels():
    """The divergence at the targets' temperature, of labelled images from their true class, classes weighted."""
    logits, projected = output()
    for weights in (None, torch.tensor([1.0, 2.0, 5.0])):
        batch = replace(batch_of(), weights=weights)
        targets = torch.cat([batch.labels, batch.soft])
        expected = losses.divergence(logits, targets, 2.0, weights)
        for objective in ("task-oriented", "pseudo-label"):
            found = objective_loss(objective, "cosine")((logits, projected), batch)
            assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    matched = objective_loss("task-oriented", "cosine")((logits, projected), replace(batch_of(), feature_weight=2.0))
    expected = losses.divergence(logits, targets, 2.0) + 2 * losses.feature_distance(projected, batch_of().features)
    assert matched.item() == pytest.approx(expected.item(), rel=1e-6), "the teacher's features, of labelled images too"
    without = batch_of(0, read=False)
    found = objective_loss("task-oriented", "cosine")((logits, projected), without)
    assert found.item() == pytest.approx(losses.divergence(logits, without.soft, 2.0).item(), rel=1e-6)


def test_task_agnostic_mixes_features_and_labels_by_their_share():
    """A third of the batch has labels: two thirds of the features' distance, a third of the cross-entropy."""
    logits, projected = output()
    batch = batch_of(2)
    distance = TASK_AGNOSTIC["cosine"](projected, batch)
    entropy = torch.nn.functional.cross_entropy(logits[:2], batch.labels.argmax(1))
    found = objective_loss("task-agnostic", "cosine")((logits, projected), batch)
    assert found.item() == pytest.approx((2 / 3 * distance + 1 / 3 * entropy).item(), rel=1e-5)
    bare = objective_loss("task-agnostic", "cosine")((logits, projected), batch_of(0, read=False))
    assert bare.item() == pytest.approx(TASK_AGNOSTIC["cosine"](projected, batch_of(0)).item(), rel=1e-6)


def test_how_many_labelled_images_are_in_a_batch():
    """Without a word 4 x labelled / all images, at most 3/8 of the batch; else as is asked for, one image of the pool at least."""
    rule = {(100, 1000): 48, (100, 10_100): 5, (50, 10_000): 3, (10, 100_000): 0, (100, 100): 48, (30, 1000): 15}
    assert {key: labelled_images(None, *key, 128) for key in rule} == rule
    assert [labelled_images(None, 100, 1000, size) for size in (2, 8, 16, 64)] == [1, 3, 6, 24]
    assert [labelled_images(share, 100, 1000, 128) for share in (0.0, 0.1, 0.5, 0.9999)] == [0, 13, 64, 127]
    assert labelled_images(0.5, 100, 10_000_000, 8) == 4


@pytest.mark.parametrize(("power", "expected"), [(1.0, [1 / 1.5, 1 / 0.5]), (0.5, [1.5**-0.5, 0.5**-0.5])])
def test_rare_classes_weigh_more(power, expected):
    """(C share)^-power: of two classes with 3/4 and 1/4 of the targets' probability. A class that has none weighs no more than 1/1000."""
    rows = np.log(np.array([[1.0, 1e-30], [0.5, 0.5]], np.float32))
    targets: Any = SimpleNamespace(images=range(2), log_probabilities=lambda positions: rows[positions])
    kind = SimpleNamespace(COUNTED=10, RARE_CLASSES=power)
    np.testing.assert_allclose(class_weights(targets, kind), expected, rtol=1e-6)
    rows[1] = rows[0]
    assert class_weights(targets, kind)[1] == pytest.approx(0.002**-power, rel=1e-5)


def small_set(features: bool = False) -> Targets:
    """Nine images of different content; the target of image i is all for class i % 3, but for a trace that says which image it is."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (IMAGES, 20, 20, 3), dtype=np.uint8)
    places = np.stack([np.zeros(IMAGES, np.int64), np.arange(IMAGES) * pixels[0].size], axis=1)
    keys, sizes = random.integers(0, 256, (IMAGES, 32), dtype=np.uint8), np.full((IMAGES, 2), 20, np.int32)
    images = Images(keys, sizes, places, (pixels.reshape(-1),))
    rows = np.full((IMAGES, 3), 0.01, np.float32)
    rows[np.arange(IMAGES), np.arange(IMAGES) % 3] = 0.5 + np.arange(IMAGES) / 100
    table = np.log(rows / rows.sum(axis=1, keepdims=True))
    of = np.arange(2 * IMAGES, dtype=np.float32).reshape(IMAGES, 2)
    return Targets(images, ViewSettings(5), table.__getitem__, of.__getitem__ if features else None)


def which(soft: torch.Tensor, targets: Targets) -> list[int]:
    """The images that these soft targets are of."""
    known = np.exp(targets.log_probabilities(np.arange(IMAGES)))
    return [int(np.abs(known - row).sum(axis=1).argmin()) for row in soft.numpy()]


def test_labelled_images_come_with_their_labels_and_the_others_with_their_targets():
    """Two of six images are drawn from the labelled ones and carry their true class and no target; no other image is labelled."""
    targets, plan = small_set(), Plan(9, 6, 1.0, labelled=2)
    make = _batches(targets, plan, STUDENT, LABELS, 0, 1)
    drawn, rest, seen = [], [], []
    for step in range(9):
        images, soft, labels, features, queue = make(step)
        assert (soft.shape, labels.shape, features.shape, queue.shape) == ((4, 3), (2,), (6, 0), (0, 0))
        torch.testing.assert_close(soft.sum(1), torch.ones(4))
        drawn += [LABELS.tolist().index(int(label)) for label in labels]
        rest += which(soft, targets)
        seen.append(images)
    assert sorted(drawn) == sorted(list(range(LABELLED)) * 6), "the labelled images take turns"
    assert sorted(rest) == sorted(list(range(LABELLED, IMAGES)) * 6), "and so do the others"
    # pass e of an image shows view e: of both kinds
    for step, order, per, first in ((0, drawn, 2, 0), (8, drawn, 2, 5), (0, rest, 4, 0), (8, rest, 4, 5)):
        image = order[step * per]
        expected = view_input(targets.images, np.array([image]), np.array([first]), targets.settings, STUDENT)[0]
        torch.testing.assert_close(seen[step][0 if order is drawn else 2], expected)


def test_without_a_share_every_image_has_its_target():
    """A plan that draws nothing from the labelled images distils them as the others, and reads no label."""
    targets = small_set()
    make = _batches(targets, Plan(3, 3, 1.0), STUDENT, LABELS, 0, 1)
    found = [make(step) for step in range(3)]
    assert all(labels.shape == (0,) for _, _, labels, _, _ in found)
    assert sorted(which(torch.cat([soft for _, soft, *_ in found]), targets)) == list(range(IMAGES))
    everyone = (
        np.arange(IMAGES) % 3
    )  # of a transfer set in which all images are labelled half of a batch has targets too
    _, soft, labels, *_ = _batches(targets, Plan(3, 4, 1.0, labelled=2), STUDENT, everyone, 0, 1)(0)
    assert soft.sum(1).round().tolist() == [1, 1]
    assert len(labels) == 2


def test_true_masks_count_at_their_own_resolution():
    """A labelled image counts as much as another, at each pixel of its mask, though soft targets are on a grid of half the resolution."""
    torch.manual_seed(0)
    logits, soft = torch.randn(3, 2, 2, 2), torch.rand(2, 2, 2, 2).softmax(1)
    truth = cross_entropy.one_hot(torch.randint(0, 2, (1, 4, 4)), 2)
    batch = Batch(soft, truth, torch.zeros(3, 0), torch.zeros(0, 0))
    large = torch.nn.functional.interpolate(logits[:1], (4, 4), mode="bilinear")
    expected = losses.divergence(large, truth) / 3 + losses.divergence(logits[1:], soft) * 2 / 3
    found = objective_loss("task-oriented", "cosine")((logits, None), batch)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_processes_share_a_batch():
    """What two processes see of a step is together what one would see, labelled and other images alike."""
    targets, plan = small_set(features=True), Plan(4, 8, 1.0, labelled=3, objective="pseudo-label")
    (whole, *parts) = (_batches(targets, plan, STUDENT, LABELS, *of)(2) for of in ((0, 1), (0, 2), (1, 2)))
    for kind in range(4):
        rows = [
            sorted(row.flatten().tolist() for row in part)
            for part in (whole[kind], torch.cat([p[kind] for p in parts]))
        ]
        assert rows[0] == rows[1]
    assert [len(part[0]) for part in parts] == [4, 4], "or the mean over the processes is not that over the batch"
    assert set(whole[1].unique().tolist()) == {0.0, 1.0}, "pseudo-label: the most likely class alone"


def test_features_are_those_of_the_images_and_a_queue_of_others():
    """Features stand beside every image, labelled ones too; only the loss "queue" is given other images' features."""
    targets = small_set(features=True)
    plan = Plan(4, 6, 1.0, objective="task-agnostic", task_agnostic_loss="queue", labelled=2)
    _, soft, _, features, queue = _batches(targets, plan, STUDENT, LABELS, 0, 1)(1)
    assert (features[2:, 0] / 2).int().tolist() == which(soft, targets)
    assert set((features[:2, 0] / 2).int().tolist()) <= set(range(LABELLED))
    assert queue.shape == (QUEUE, 2)
    assert len(queue.unique(dim=0)) == IMAGES
    other = _batches(targets, replace(plan, task_agnostic_loss="cosine"), STUDENT, LABELS, 0, 1)(1)
    assert other[4].numel() == 0


def test_self_taught_head():
    """Outputs are cosines with the prototypes; at the start images are told apart, or training ends where it begins."""
    torch.manual_seed(0)
    student = build_student("mobilenetv3_small_050", 3, size=64)
    module = DINOStudent(student.module, 64).train()
    outputs = module(torch.randn(16, 3, 64, 64))
    assert outputs.shape == (16, DINOStudent.PROTOTYPES)
    assert float(outputs.detach().abs().max()) <= 1.0001
    assert len(outputs.argmax(dim=1).unique()) > 8
    assert small_side(student.module, 64) == 32
    assert images_in_a_step(8, 64, 32) == 8 * 3
    assert small_side(build_student("vit_tiny_patch16_224", 3, size=64).module, 64) == 64
