"""What each objective reads and what it leaves alone: labels, features, heads, rates and the order of images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tutelage import losses
from tutelage.models.students import SelfTaught, Taught, build_student
from tutelage.recipes.objectives import AGNOSTIC, LABEL_FREE, Told, Weights, loss_of
from tutelage.recipes.self_taught import images_in_a_step, small_side
from tutelage.recipes.teach import Plan, _one_hot, best_share, mix_heads, rate_at
from tutelage.training import learning_rate

OBJECTIVES = ("oriented", "agnostic", "pseudo-label", "dual-head")


def told(labelled: int = 2) -> Told:
    torch.manual_seed(0)
    labels = torch.zeros(6, 3)
    labels[range(labelled), [i % 3 for i in range(labelled)]] = 1
    return Told(torch.softmax(torch.randn(6, 3), 1), torch.randn(6, 8), labels, torch.randn(5, 8), torch.ones(8))


def output() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    return tuple(torch.randn(6, width, requires_grad=True) for width in (3, 8, 3))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_an_objective_trains(objective):
    """Gradients reach the heads that the objective is about, and no others."""
    logits, projected, second = output()
    loss_of(objective, "queue")(0.0)((logits, projected, second), told(), Weights(2.0, 1.0)).backward()
    moved = [part.grad is not None and bool(part.grad.abs().sum() > 0) for part in (logits, projected, second)]
    expected = {"oriented": [1, 1, 0], "agnostic": [0, 1, 0], "pseudo-label": [1, 0, 0], "dual-head": [1, 1, 1]}
    assert moved == [bool(one) for one in expected[objective]]


def test_oriented_is_its_parts():
    """The divergence at temperature T, and the weighted distance of features beside it."""
    logits, projected, second = output()
    one = told()
    expected = losses.distillation(logits, 2 * torch.log(one.soft), 2.0) + 0.5 * losses.feature_distance(
        projected, one.features
    )
    assert loss_of("oriented", "cosine")(0.3)(
        (logits, projected, second), one, Weights(2.0, 0.5)
    ).item() == pytest.approx(expected.item(), rel=1e-5)


def test_two_halves():
    """agnostic-oriented changes its loss at half of the way, and its rate warms up and falls in each half."""
    at = loss_of("agnostic-oriented", "cosine")
    parts, one, weights = output(), told(), Weights(1.0, 0.0)
    assert at(0.49)(parts, one, weights).item() == pytest.approx(AGNOSTIC["cosine"](parts[1], one).item())
    assert at(0.5)(parts, one, weights).item() != pytest.approx(AGNOSTIC["cosine"](parts[1], one).item())
    plan = Plan(101, 8, 1.0, objective="agnostic-oriented")
    rates = [rate_at(step, plan) for step in range(101)]
    assert rates[:51] == [learning_rate(step, 51, 1.0) for step in range(51)]
    assert rates[51:] == [learning_rate(step, 50, 1.0) for step in range(50)]
    assert rate_at(60, Plan(101, 8, 1.0)) == learning_rate(60, 101, 1.0)


def test_labels_of_labelled_images_only():
    """One-hot rows for images that have a label, rows of 0 for the others; no column where no labels are read."""
    labels = np.array([2, 0], np.int64)
    assert _one_hot(np.array([0, 5, 1]), labels, 3).tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]
    assert _one_hot(np.array([0, 5]), None, 3).shape == (2, 0)
    assert set(LABEL_FREE) == {"agnostic", "dino"}


def test_two_heads_become_one():
    """Folded heads give the mean of both heads' logits, and the share is the one with the smallest log loss."""
    torch.manual_seed(0)
    student = build_student("mobilenetv3_small_050", 3, size=32)
    module = Taught(student.module, 4, 32, second_head=True).eval()
    torch.nn.init.normal_(module.labels_head.weight)  # type: ignore[union-attr, arg-type]
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        own, _, second = module(images)
        mix_heads(module, 0.25)
        assert torch.allclose(module.student(images), 0.75 * own + 0.25 * second, atol=1e-5)
    right, wrong = np.eye(3, dtype=np.float32) * 4, np.roll(np.eye(3, dtype=np.float32), 1, 1) * 4
    assert best_share(right, wrong, np.arange(3)) == 0
    assert best_share(wrong, right, np.arange(3)) == 1


def test_self_taught_head():
    """Outputs are cosines with the prototypes; at the start images are told apart, or training ends where it begins."""
    torch.manual_seed(0)
    student = build_student("mobilenetv3_small_050", 3, size=64)
    module = SelfTaught(student.module, 64).train()
    outputs = module(torch.randn(16, 3, 64, 64))
    assert outputs.shape == (16, SelfTaught.PROTOTYPES)
    assert float(outputs.detach().abs().max()) <= 1.0001
    assert len(outputs.argmax(dim=1).unique()) > 8
    assert small_side(student.module, 64) == 32
    assert images_in_a_step(8, 64, 32) == 8 * 3
    assert small_side(build_student("vit_tiny_patch16_224", 3, size=64).module, 64) == 64
