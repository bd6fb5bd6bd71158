"""What a study says of differences: intervals and tests are those of the textbooks, and no spread is invented."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import jaccard_score

from tutelage.metrics import confusion, mean_iou, pixel_counts
from tutelage.reporting.cost import cost_of, shares
from tutelage.study.statistics import Difference, difference, paired_p, spread


def test_spread():
    """Mean and sample standard deviation; with one value there is no deviation."""
    assert spread([0.5]) == (0.5, None)
    mean, deviation = spread([0.2, 0.4, 0.9])
    assert (mean, deviation) == (pytest.approx(0.5), pytest.approx(np.std([0.2, 0.4, 0.9], ddof=1)))


def test_paired_p_is_that_of_scipy():
    """The p of a paired t-test is scipy's; one difference, or several that are all equal, give none."""
    random = np.random.default_rng(0)
    for count in (2, 3, 8):
        one, other = random.normal(size=count), random.normal(0.5, 1, count)
        assert paired_p((one - other).tolist()) == pytest.approx(stats.ttest_rel(one, other).pvalue)
    assert paired_p([0.1]) is None
    assert paired_p([0.25, 0.25]) is None
    assert paired_p([0.0, 0.0]) is None


def test_difference():
    """The interval is the normal one of the images' mean differences, and it is sure only of what both tests are sure of."""
    random = np.random.default_rng(1)
    first, second = random.random((3, 4000)) < 0.6, random.random((3, 4000)) < 0.5
    found = difference(first, second)
    each = (first.astype(float) - second).mean(axis=0)
    error = 1.96 * each.std() / np.sqrt(len(each))
    assert found.mean == pytest.approx(each.mean())
    assert (found.low, found.high) == pytest.approx((each.mean() - error, each.mean() + error), abs=2e-3)
    assert found.sure
    assert not difference(first, first).sure
    assert not Difference(0.1, 0.05, 0.15, 0.3, 3).sure, "seeds that part ways leave it open"
    assert Difference(0.1, 0.05, 0.15, None, 1).sure


@pytest.mark.slow
def test_difference_of_masks():
    """The gain is of mean IoU over the pixels of all images, not the mean of single images' gains; so are interval and p."""
    random = np.random.default_rng(2)
    labels = random.integers(0, 3, (40, 8, 8))
    said = [
        [np.where(random.random(labels.shape) < share, labels, (labels + 1) % 3) for _ in range(2)]
        for share in (0.9, 0.6)
    ]
    first, second = (
        np.stack(
            [
                pixel_counts(np.stack([confusion(a.ravel(), b.ravel(), 3) for a, b in zip(labels, one, strict=True)]))
                for one in method
            ]
        )
        for method in said
    )
    each = np.array([
        [jaccard_score(labels.ravel(), one.ravel(), average="macro") for one in method] for method in said
    ])  # fmt: skip
    found = difference(first, second, mean_iou)
    assert found.mean == pytest.approx((each[0] - each[1]).mean())
    assert found.p == pytest.approx(stats.ttest_rel(*each).pvalue)
    assert found.low < found.mean < found.high
    drawn = [random.integers(0, 40, 40) for _ in range(400)]
    gains = [np.mean([
        jaccard_score(labels[i].ravel(), said[0][s][i].ravel(), average="macro")
        - jaccard_score(labels[i].ravel(), said[1][s][i].ravel(), average="macro") for s in range(2)
    ]) for i in drawn]  # fmt: skip
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(gains, [0.025, 0.975])), abs=0.008)


def entry(flops: float, outputs: int, computed: int, seconds: float, taken: str | None = None) -> dict:
    teacher = {"flops": 10.0 * outputs, "outputs": outputs, "computed": computed, "seconds": 0.01 * computed}
    return {
        "flops": flops, "images": 5, "seconds": seconds, "memory_mib": 1.0, "bytes": 2, "teacher": teacher, "taken_from": taken,
    }  # fmt: skip


def test_the_bill_and_what_sharing_saves():
    """A run pays for all it needs; the study for what was computed: no stage twice, no output twice."""
    first = {"compute_cost": {"teacher": entry(0, 1000, 1000, 0), "distill": entry(500, 2000, 2000, 4)}}
    second = {"compute_cost": {"teacher": entry(0, 1000, 1000, 0, "first"), "distill": entry(500, 2000, 0, 4)}}
    assert cost_of(first)["flops"] == cost_of(second)["flops"] == 30_500
    assert cost_of(first)["teacher_flops"] == 30_000
    saved = shares([first, second])
    assert (saved["flops"], saved["flops_unshared"]) == (31_000, 61_000)
    assert saved["seconds"] == pytest.approx(4 + 30 + 4)
    assert saved["seconds_unshared"] == pytest.approx(2 * (4 + 30))
    assert saved["flops_share"] == pytest.approx(31 / 61)
