"""What the losses promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

from tutelage.distillation.losses import (
    contrastive,
    distillation,
    divergence,
    feature_distance,
    queue_similarity,
    self_distillation,
)
from tutelage.training.cross_entropy import class_weights, one_hot, soft_cross_entropy


def logits_of(seed: int, batch: int = 6, classes: int = 5, size: float = 3.0) -> torch.Tensor:
    return size * torch.randn(batch, classes, generator=torch.Generator().manual_seed(seed))


def softmax_loop(row: list[float]) -> list[float]:
    top = max(row)
    exp = [math.exp(x - top) for x in row]
    return [e / sum(exp) for e in exp]


def test_feature_distance_worked_example():
    """The numbers of the docstring: 1 - cos, whatever the lengths, on the mean of rows."""
    student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    assert feature_distance(student, teacher).item() == pytest.approx(0.2929, abs=5e-5)
    assert feature_distance(3 * student, teacher).item() == pytest.approx(1 - 1 / math.sqrt(2), abs=1e-6)
    both = torch.cat([student, teacher]), torch.cat([teacher, -teacher])
    assert feature_distance(*both).item() == pytest.approx((1 - 1 / math.sqrt(2) + 2) / 2, abs=1e-6)


def test_distillation_worked_example():
    """The number in the docstring of distillation is right, and so is its formula beside it."""
    loss = distillation(torch.zeros(1, 2), torch.tensor([[0.0, math.log(3)]]), 1.0)
    assert loss.item() == pytest.approx(0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2), abs=1e-6)
    assert loss.item() == pytest.approx(0.1308, abs=5e-5)


def test_distillation_with_weights():
    """Each row counts by the mean weight of what the teacher takes it for; equal weights change nothing."""
    student, teacher, weights = logits_of(0), logits_of(1), [0.5, 3.0, 1.0, 2.0, 7.0][: logits_of(0).shape[1]]
    rows, counts = [], []
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        q, p = softmax_loop([x / 2 for x in s]), softmax_loop([x / 2 for x in t])
        rows.append(4 * sum(pc * (math.log(pc) - math.log(qc)) for pc, qc in zip(p, q, strict=True)))
        counts.append(sum(pc * w for pc, w in zip(p, weights, strict=True)))
    expected = sum(a * row for a, row in zip(counts, rows, strict=True)) / sum(counts)
    assert distillation(student, teacher, 2.0, torch.tensor(weights)).item() == pytest.approx(expected, rel=1e-5)
    even = distillation(student, teacher, 2.0, torch.full((student.shape[1],), 3.0)).item()
    assert even == pytest.approx(distillation(student, teacher, 2.0).item(), rel=1e-5)
    assert abs(even - expected) > 1e-3


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_distillation_is_its_formula(temperature: float):
    """distillation is the sum of p (log p - log q) over classes, averaged over images, times T squared."""
    student, teacher = logits_of(0), logits_of(1)
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        q, p = softmax_loop([x / temperature for x in s]), softmax_loop([x / temperature for x in t])
        total += sum(pc * (math.log(pc) - math.log(qc)) for pc, qc in zip(p, q, strict=True))
    expected = temperature**2 * total / len(student)
    assert distillation(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_distillation_is_that_of_timm(temperature: float):
    """Loss and gradient are those of timm's LogitDistillationTask, so that results can be compared with timm's."""
    task_module = pytest.importorskip("timm.task")
    if not hasattr(task_module, "LogitDistillationTask"):
        pytest.skip("this timm has no LogitDistillationTask")

    class PrecomputedEmbeddings(nn.Module):
        """Says what it was given to say, whatever it sees."""

        num_classes, in_chans = 5, 3

        def __init__(self, logits: torch.Tensor):
            super().__init__()
            self.logits = nn.Parameter(logits.clone())
            self.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.logits

    student, teacher = PrecomputedEmbeddings(logits_of(2)), PrecomputedEmbeddings(logits_of(3))
    task = task_module.LogitDistillationTask(
        student, teacher, criterion=nn.CrossEntropyLoss(), distill_loss_weight=1.0, task_loss_weight=0.0,
        temperature=temperature, device=torch.device("cpu"), verbose=False,
    )  # fmt: skip
    theirs = task(torch.zeros(6, 3, 8, 8), torch.zeros(6, dtype=torch.long))["loss"]
    theirs.backward()
    mine = student.logits.detach().clone().requires_grad_()
    loss = distillation(mine, teacher.logits.detach(), temperature)
    loss.backward()
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-6)
    assert student.logits.grad is not None
    torch.testing.assert_close(mine.grad, student.logits.grad)


def test_distillation_takes_log_probabilities():
    """The teacher may come as logits or as log probabilities: the loss is the same, also at a temperature."""
    student, teacher = logits_of(4), logits_of(5)
    from_logits = distillation(student, teacher, 2.0)
    assert distillation(student, teacher.log_softmax(1), 2.0).item() == pytest.approx(from_logits.item(), rel=1e-5)


def test_distillation_is_zero_for_agreement_only():
    """The loss is 0 where the student says what the teacher says, and above 0 where it does not."""
    teacher = logits_of(6)
    assert distillation(teacher + 7.0, teacher, 2.0).item() == pytest.approx(0, abs=1e-5)
    assert distillation(teacher.flip(0), teacher, 2.0).item() > 0.1


def test_distillation_keeps_the_gradient_when_the_temperature_changes():
    """T squared keeps the gradient's size: at high T it tends to (student - teacher) / (B C) of centred logits."""
    student = logits_of(7).requires_grad_()
    teacher = logits_of(8)
    distillation(student, teacher, 1000.0).backward()
    gap = student.detach() - teacher
    expected = (gap - gap.mean(1, keepdim=True)) / gap.numel()
    torch.testing.assert_close(student.grad, expected, rtol=2e-2, atol=1e-3)


def test_divergence_worked_examples():
    """The numbers in the docstring of divergence are right."""
    student = torch.zeros(1, 2)
    assert divergence(student, torch.tensor([[0.25, 0.75]])).item() == pytest.approx(0.1308, abs=5e-5)
    assert divergence(student, torch.tensor([[0.0, 1.0]])).item() == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_divergence_is_distillation_from_probabilities(temperature: float, weighted: bool):
    """Of the teacher's softened probabilities the divergence is the distillation from its logits, the gradient too; of grids as well."""
    student, teacher = (logits_of(seed, 12).reshape(2, 2, 3, 5).movedim(-1, 1) for seed in (14, 15))
    student.requires_grad_()
    weights = torch.tensor([0.5, 1.0, 2.0, 4.0, 0.1]) if weighted else None
    ours = divergence(student, (teacher / temperature).softmax(1), temperature, weights)
    theirs = distillation(student, teacher, temperature, weights)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def test_divergence_from_one_hot_rows_is_cross_entropy():
    """True classes as targets ask for what torch's cross-entropy asks for, with and without weights, to the gradient."""
    student, labels = logits_of(16).requires_grad_(), torch.tensor([0, 1, 1, 4, 2, 2])
    for weights in (None, torch.tensor([0.5, 1.0, 2.0, 4.0, 0.1])):
        ours = divergence(student, one_hot(labels, 5), weights=weights)
        theirs = nn.functional.cross_entropy(student, labels, weight=weights)
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
        torch.testing.assert_close(torch.autograd.grad(ours, student)[0], torch.autograd.grad(theirs, student)[0])


def test_rows_without_a_target_count_for_nothing():
    """Rows and pixels that are 0 throughout change neither the loss nor a gradient; where nothing counts both are 0."""
    student, target = logits_of(17), logits_of(18).softmax(1)
    target[[1, 4]] = 0
    student.requires_grad_()
    kept = [0, 2, 3, 5]
    for weights in (None, torch.tensor([0.5, 1.0, 2.0, 4.0, 0.1])):
        loss = divergence(student, target, 2.0, weights)
        assert loss.item() == pytest.approx(divergence(student[kept], target[kept], 2.0, weights).item(), rel=1e-6)
        (gradient,) = torch.autograd.grad(loss, student)
        assert gradient[[1, 4]].abs().max() == 0
        assert gradient[kept].abs().min() > 0
    pixels = divergence(student.T.reshape(1, 5, 2, 3), target.T.reshape(1, 5, 2, 3), 2.0)
    assert pixels.item() == pytest.approx(divergence(student, target, 2.0).item(), rel=1e-6)
    nothing = divergence(student, torch.zeros_like(target))
    assert nothing.item() == 0
    assert torch.autograd.grad(nothing, student)[0].abs().max() == 0


@pytest.mark.parametrize("size", [0.0, 1.0, 1e4])
def test_gradients_are_finite(size: float):
    """Losses and gradients are finite numbers for flat, for usual and for very sure logits, also in half precision."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        student = logits_of(9, size=size).to(dtype).requires_grad_()
        teacher = logits_of(10, size=size).to(dtype)
        loss = distillation(student, teacher, 1.0) + soft_cross_entropy(student, teacher.float().softmax(1))
        loss = loss + divergence(student, one_hot(teacher.argmax(1), 5))
        assert loss.dtype == torch.float32
        loss.backward()
        assert student.grad is not None
        assert torch.isfinite(loss)
        assert torch.isfinite(student.grad).all()


def test_soft_cross_entropy_worked_example():
    """The number in the docstring of soft_cross_entropy is right, whatever the weights."""
    logits, target = torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])
    for weights in (None, torch.tensor([0.2, 7.0])):
        assert soft_cross_entropy(logits, target, weights).item() == pytest.approx(0.6931, abs=5e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_soft_cross_entropy_is_its_formula(weighted: bool):
    """soft_cross_entropy is the weighted sum of -t log q over the sum of w t."""
    logits, targets = logits_of(11), logits_of(12).softmax(1)
    weights = torch.tensor([0.5, 1.0, 2.0, 4.0, 0.1]) if weighted else None
    above = below = 0.0
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        for c, q in enumerate(softmax_loop(row)):
            w = weights[c].item() if weights is not None else 1.0
            above -= w * target[c] * math.log(q)
            below += w * target[c]
    assert soft_cross_entropy(logits, targets, weights).item() == pytest.approx(above / below, rel=1e-5)


def test_soft_cross_entropy_of_one_label_is_that_of_torch():
    """On one-hot targets the loss is torch's cross-entropy, with and without weights."""
    logits, labels = logits_of(13), torch.tensor([0, 1, 1, 4, 2, 2])
    one_hot = nn.functional.one_hot(labels, 5).float()
    for weights in (None, torch.tensor([0.5, 1.0, 2.0, 4.0, 0.1])):
        theirs = nn.functional.cross_entropy(logits, labels, weight=weights)
        assert soft_cross_entropy(logits, one_hot, weights).item() == pytest.approx(theirs.item(), rel=1e-5)


def test_class_weights_are_those_of_scikit_learn():
    """ "balanced" weighs the classes as scikit-learn does; "none" weighs nothing."""
    labels = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2])
    theirs = compute_class_weight("balanced", classes=np.arange(3), y=labels.numpy())
    weights = class_weights(labels, 3, "balanced")
    assert weights is not None
    np.testing.assert_allclose(weights.numpy(), theirs, rtol=1e-6)
    assert class_weights(labels, 3, "none") is None


def test_class_weights_without_an_image_are_finite():
    """A class without an image has a finite weight, so that it cannot turn the loss into no number."""
    weights = class_weights(torch.tensor([0, 0, 2]), 3, "balanced")
    assert weights is not None
    assert torch.isfinite(weights).all()
    loss = soft_cross_entropy(torch.zeros(1, 3), torch.tensor([[0.0, 0.5, 0.5]]), weights)
    assert loss.item() == pytest.approx(math.log(3), rel=1e-5)


def unit(rows: list[list[float]]) -> list[list[float]]:
    return [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in rows]


def test_contrastive_is_its_formula():
    """contrastive is the worked example, and a loop over images and rivals, with the temperature."""
    assert contrastive(torch.eye(2), torch.eye(2), 1.0).item() == pytest.approx(math.log(1 + math.exp(-1)), abs=1e-6)
    z, t = logits_of(4, 5, 3), logits_of(5, 5, 3)
    zs, ts = unit(z.tolist()), unit(t.tolist())
    total = 0.0
    for i, zi in enumerate(zs):
        scores = [math.exp(sum(a * b for a, b in zip(zi, tj, strict=True)) / 0.07) for tj in ts]
        total -= math.log(scores[i] / sum(scores)) / len(zs)
    assert contrastive(z, t).item() == pytest.approx(total, rel=1e-4)


def test_queue_similarity_is_its_formula():
    """queue_similarity is the worked example, and the divergence of two softmaxes over the queue."""
    example = queue_similarity(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]]), torch.eye(2), 1.0)
    assert example.item() == pytest.approx(0.4621, abs=5e-5)
    z, t, queue = logits_of(6, 4, 3), logits_of(7, 4, 3), logits_of(8, 9, 3)
    total, us = 0.0, unit(queue.tolist())
    for zi, ti in zip(unit(z.tolist()), unit(t.tolist()), strict=True):
        q, p = (softmax_loop([sum(a * b for a, b in zip(x, u, strict=True)) / 0.07 for u in us]) for x in (zi, ti))
        total += sum(pk * (math.log(pk) - math.log(qk)) for pk, qk in zip(p, q, strict=True)) / len(z)
    assert queue_similarity(z, t, queue).item() == pytest.approx(total, rel=1e-3)


def test_self_distillation_is_its_formula():
    """self_distillation is the worked example, and leaves out pairs of a crop with itself."""
    zero = [torch.zeros(1, 2)] * 2
    assert self_distillation(zero, zero, torch.zeros(1, 2)).item() == pytest.approx(math.log(2))
    student, teacher = [logits_of(i, 2, 3, 0.3) for i in range(3)], [logits_of(i + 3, 2, 3, 0.1) for i in range(2)]
    centre, total, pairs = torch.tensor([[0.1, 0.0, -0.1]]), 0.0, 0
    for g, t in enumerate(teacher):
        for v, s in enumerate(student):
            if g == v:
                continue
            pairs += 1
            for trow, srow in zip((t - centre).tolist(), s.tolist(), strict=True):
                p, q = softmax_loop([x / 0.04 for x in trow]), softmax_loop([x / 0.1 for x in srow])
                total -= sum(a * math.log(b) for a, b in zip(p, q, strict=True)) / 2
    assert self_distillation(student, teacher, centre).item() == pytest.approx(total / pairs, rel=1e-4)


def test_self_distillation_is_that_of_lightly():
    """Loss and gradient are those of lightly's DINOLoss for two global and two local crops."""
    module = pytest.importorskip("lightly.loss.dino_loss", reason="pip install --no-deps lightly")
    theirs = module.DINOLoss(output_dim=7, warmup_teacher_temp_epochs=1)
    student = [logits_of(i, 4, 7, 0.5).requires_grad_() for i in range(4)]
    teacher = [logits_of(i + 4, 4, 7, 0.2) for i in range(2)]
    ours = self_distillation(student, teacher, torch.zeros(1, 7))
    expected = theirs(teacher, student)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
    for mine, other in zip(torch.autograd.grad(ours, student), torch.autograd.grad(expected, student), strict=True):
        torch.testing.assert_close(mine, other)
