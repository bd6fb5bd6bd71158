"""The last stage's choice: who is judged, on which images, and what it takes to be delivered."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tutelage.commands.finetune import _choice, _judged_on
from tutelage.tasks import Classification, Segmentation, Task

IMAGES = 100
LABELS = np.arange(IMAGES) % 3


def sure(right: int, wrong: int = 0) -> np.ndarray:
    """(100, 3) logits that are right for so many images, after the first `wrong`."""
    number = np.arange(IMAGES) - wrong
    decisions = np.where((number >= 0) & (number < right), LABELS, (LABELS + 1) % 3)
    return 5 * np.eye(3, dtype=np.float32)[decisions]


@dataclass
class Work:
    """As much of the stage as its choice asks for.

    right: how many images each student is right for. elsewhere: which of them are wrong for the first five. asked: who was looked at.
    """

    right: dict[str, int]
    validation: bool = True
    elsewhere: tuple[str, ...] = ()
    headless: bool = False
    kind: Task = field(default_factory=Classification)
    asked: list[str] = field(default_factory=list)

    @property
    def hardware(self) -> Any:
        return SimpleNamespace(device="cpu")

    @property
    def task(self) -> Any:
        labelled = LabelledImages("images", LABELS)
        return SimpleNamespace(train=labelled, val=labelled if self.validation else None)

    def held_out(self, how: str) -> list[np.ndarray]:
        self.asked.append(how)
        return list(sure(self.right[how], 5 * (how in self.elsewhere)))

    def predict(self, module: Any, images: Any, labels: Any) -> np.ndarray:
        assert module == "the baseline on cpu"
        self.asked.append("baseline")
        return sure(self.right["baseline"], 5 * ("baseline" in self.elsewhere))


class LabelledImages(SimpleNamespace):
    """Labelled images of which only the number and the labels are asked for."""

    def __init__(self, images: Any, labels: np.ndarray):
        super().__init__(images=images, labels=labels)

    def __len__(self) -> int:
        return len(self.labels)


BASELINE = SimpleNamespace(module=SimpleNamespace(to=lambda device: f"the baseline on {device}"))


@pytest.mark.parametrize(("right", "delivered"), [
    ({"distilled": 80, "head": 80, "full": 80, "long": 80, "baseline": 80}, "distilled"),
    ({"distilled": 80, "head": 81, "full": 79, "long": 80, "baseline": 81}, "distilled"),  # 6 right that were wrong, 5 the reverse
    ({"distilled": 80, "head": 83, "full": 90, "long": 85, "baseline": 60}, "full"),
    ({"distilled": 80, "head": 60, "full": 60, "long": 60, "baseline": 90}, "baseline"),
    ({"distilled": 80, "head": 60, "full": 90, "long": 60, "baseline": 91}, "full"),  # against what is best so far
    ({"distilled": 80, "head": 60, "full": 90, "long": 60, "baseline": 97}, "baseline"),
    ({"distilled": 99, "head": 90, "full": 90, "long": 90, "baseline": 50}, "distilled"),
])  # fmt: skip
def test_what_is_better_by_more_than_a_standard_error_is_delivered(tmp_path, right, delivered):
    """Ties keep the distilled student; a fine-tuning, and the baseline after them, must gain more than the paired error."""
    work = Work(right, elsewhere=tuple(name for name in right if right[name] in (81, 91)))
    found, validation = _choice(work, "auto", BASELINE, tmp_path / "held_out.npz")  # type: ignore[arg-type]
    assert found == delivered
    assert work.asked == ["distilled", "head", "full", "long", "baseline"], "each once"
    assert {name: one["accuracy"] for name, one in validation.items()} == {n: r / 100 for n, r in right.items()}
    fine_tuned = [name for name in ("head", "full", "long") if right[name] > right["distilled"] + 1]
    rival = max(fine_tuned, key=right.__getitem__) if fine_tuned else "distilled"
    assert validation["head"]["gain"] == pytest.approx((right["head"] - right["distilled"]) / 100)
    assert validation["baseline"]["gain"] == pytest.approx((right["baseline"] - right[rival]) / 100)
    assert _judged_on(work, validation) == "100 validation images"  # type: ignore[arg-type]
    with np.load(tmp_path / "held_out.npz") as kept:  # of the one that is delivered
        assert kept["right"].sum() == right[delivered]
        assert kept["confidence"].shape == (IMAGES,)


def test_without_a_baseline_the_distilled_student_is_judged_alone(tmp_path):
    """--no-baseline leaves the ways of fine-tuning to be judged."""
    work = Work({"distilled": 80, "head": 60, "full": 90, "long": 60})
    found, validation = _choice(work, "auto", None, tmp_path / "held_out.npz")  # type: ignore[arg-type]
    assert (found, set(validation)) == ("full", set(Classification.FROM_LOGITS))


@pytest.mark.parametrize("validation", [True, False])
@pytest.mark.parametrize(("asked", "delivered"), [("keep", "distilled"), ("head", "head"), ("full", "full")])
def test_what_is_asked_for_is_delivered(tmp_path, capsys, asked, delivered, validation):
    """A way that is named is taken, with nothing scored, whether or not there are images to judge by."""
    work = Work({}, validation)
    assert _choice(work, asked, None, tmp_path / "held_out.npz") == (delivered, {})  # type: ignore[arg-type]
    assert work.asked == list(tmp_path.iterdir()) == []
    assert _judged_on(work, {}) == ""  # type: ignore[arg-type]
    assert capsys.readouterr().err == ""


def test_without_validation_images_the_distilled_student_is_delivered(tmp_path, capsys):
    """Its targets have met every label that there is, so nothing is scored, and that is said."""
    work = Work({}, validation=False)
    assert _choice(work, "auto", None, tmp_path / "held_out.npz") == ("distilled", {})  # type: ignore[arg-type]
    assert work.asked == list(tmp_path.iterdir()) == []
    assert "without a validation split (--val) nothing can judge it" in capsys.readouterr().err


def test_a_student_without_a_head_gets_one(tmp_path, capsys):
    """Distilled without labels it has no head to keep; without validation images what makes one is cross-validated: it met no label."""
    head = Work({}, headless=True)
    assert _choice(head, "keep", None, tmp_path / "held_out.npz") == ("head", {})  # type: ignore[arg-type]
    assert "has no head to keep" in capsys.readouterr().err
    masks = Work({}, headless=True, kind=Segmentation())
    assert _choice(masks, "keep", None, tmp_path / "held_out.npz") == ("long", {})  # type: ignore[arg-type]
    work = Work({"head": 80, "full": 90, "long": 70}, validation=False, headless=True)
    found, validation = _choice(work, "auto", None, tmp_path / "held_out.npz")  # type: ignore[arg-type]
    assert (found, list(validation), work.asked) == ("full", ["head", "full", "long"], ["head", "full", "long"])
    assert _judged_on(work, validation) == "cross-validation"  # type: ignore[arg-type]
