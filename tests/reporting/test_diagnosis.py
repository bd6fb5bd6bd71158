"""What is wrong with the ingredients of a run is named by measurement: one fault put in at a time, into a run that has none."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tutelage.reporting.diagnosis import diagnose, difference


def on_test(accuracy: float, images: int = 1000, ece: float = 0.02) -> dict[str, Any]:
    """Scores of a model on test images of two classes, as many of each."""
    right, half = round(accuracy * images / 2), images // 2
    return {
        "accuracy": accuracy,
        "images": images,
        "ece": ece,
        "confusion": [[right, half - right], [half - right, right]],
    }


def healthy() -> tuple[dict[str, Any], dict[str, Any]]:
    """Results and stages of a run with nothing wrong."""
    student = {"test": on_test(0.9), "agreement_on_transfer": 0.95, "agreement_with_targets": 0.96}
    results = {
        "classes": ["cat", "dog"], "distilled": student, "baseline": {"test": on_test(0.8)},
        "delivered": {**copy.deepcopy(student), "what": "distilled"}, "teacher": {"test": on_test(0.93)},
    }  # fmt: skip
    stages = {
        "adapt": {"mode": "probe", "validation": {"probe": {"accuracy": 0.92}}, "labels": 50},
        "curate": {"task": "classification", "strategy": "balanced", "distance": {"transfer_set": 0.01, "gallery": 0.05}},
        "committee": {"folds": 5, "steps": 60, "weight": 0.2, "held_out": {
            "teacher": {"log_loss": 0.3, "accuracy": 0.92}, "students": {"log_loss": 0.7, "accuracy": 0.7},
            "committee": {"log_loss": 0.29, "accuracy": 0.92},
        }},
        "distill": {"target_shares": [0.55, 0.45]},
        "finetune": {"delivered": "distilled", "judged_on": "", "validation": {}},
    }  # fmt: skip
    return results, stages


def findings(results: dict[str, Any] | None = None, stages: dict[str, Any] | None = None) -> list[tuple[str, str]]:
    """Findings in a healthy run into which these values have been put, by dotted path; None removes one."""
    found = healthy()
    for whole, put in zip(found, (results, stages), strict=True):
        for path, value in (put or {}).items():
            *places, last = path.split(".")
            place = whole
            for name in places:
                place = place[name]
            place[last] = value
    return [(one.found, one.step) for one in diagnose(*found)]


def test_a_healthy_run_has_no_findings():
    """Where nothing is wrong nothing is found, with all stages, or without those that a run may leave out."""
    assert findings() == []
    assert findings(stages={"committee": None, "distill.target_shares": None}) == []
    assert diagnose({"classes": ["a", "b"]}, {}) == []


FAULTS = [
    # a teacher that knows no more than students of a few labels, though it is sure
    ({}, {"committee.held_out.teacher.accuracy": 0.65, "adapt.validation.probe.accuracy": 0.65},
     ("does not know the task", "65 %", "70 %", "60 steps, 1 / 5"), ("another --teacher", "--teacher-size")),
    ({}, {"committee.held_out.teacher.accuracy": 0.7}, ("does not know the task",), ("another --teacher",)),
    ({}, {"adapt.validation.probe.accuracy": 0.5}, ("The teacher is right for only 50 %",), ("a larger teacher",)),
    # targets that are nearly all of one class
    ({}, {"distill.target_shares": [0.04, 0.96]}, ("almost all of one class", "dog has 96 %", "50 % would be usual"),
     ("montage.jpg", "--strategy balanced --balance class", "another --teacher")),
    ({}, {"adapt.labels": 6}, ("3.0 labels for each class",), ("label some more",)),
    ({}, {"curate.split_copies": 7}, ("7 labelled images look like copies",), ("split_copies.csv", "--group-by")),
    # a pool far from the task
    ({}, {"curate.nothing_near": True}, ("nearer to the labelled images than chance",), ("give a --gallery",)),
    ({}, {"curate.far_classes": ["dog"]}, ("found for dog are no nearer",), ("give a --gallery",)),
    ({}, {"curate.distance": {"transfer_set": 0.04, "gallery": 0.05}}, ("0.8 times as far",), ("nearer --gallery",)),
    # a student that does not reproduce its targets
    ({"distilled.agreement_with_targets": 0.6}, {}, ("agrees with its targets on only 60 %",),
     ("more --epochs or --steps", "--lr", "larger --student")),
    # a last stage that overfits, asked for or chosen
    ({"delivered.what": "full", "delivered.test": on_test(0.8)}, {},
     ("last stage has overfitted", "(full)", "10.0 ± 3.1 points"), ("--finetune keep", "--finetune auto with validation images (--val)")),
    ({"delivered.what": "long", "delivered.test": on_test(0.8)}, {"finetune.judged_on": "20 validation images"},
     ("last stage has overfitted", "though not on 20 validation images"), ("more validation images",)),
    ({"delivered.test": on_test(0.9, ece=0.3)}, {}, ("30 points on average (ECE)",), ("calibrate them",)),
    ({"distilled.test": on_test(0.6)}, {}, ("worse than the baseline", "20.0 points"), ("give validation images (--val)", "--teacher")),
    ({"distilled.test": on_test(0.6), "delivered.what": "baseline"}, {}, ("worse than the baseline",), ("the baseline is delivered",)),
    ({"distilled.test": on_test(0.81)}, {}, ("not clearly better than the baseline", "+1.0 ± 3.5"), ("more test images",)),
]  # fmt: skip


@pytest.mark.parametrize(("results", "stages", "numbers", "steps"), FAULTS, ids=[fault[2][0] for fault in FAULTS])
def test_a_fault_is_named(results, stages, numbers, steps):
    """Each fault is found, alone, with its number and the next step."""
    ((found, step),) = findings(results, stages)
    assert all(number in found for number in numbers), found
    assert all(part.lower() in step.lower() for part in steps), step


def test_no_false_alarms():
    """An easy task, a set that is of one class by nature, and targets that differ from the teacher's outputs, are no faults."""
    easy = {"committee.held_out.teacher.accuracy": 1.0, "committee.held_out.students.accuracy": 1.0}
    assert findings(stages=easy) == []
    natural = [[900, 10], [30, 60]]  # 91 % of the test images
    tests = {f"{name}.test": {**on_test(score), "confusion": natural} for name, score in (
        ("distilled", 0.9), ("baseline", 0.8), ("delivered", 0.9), ("teacher", 0.93),
    )}  # fmt: skip
    assert findings(tests, {"distill.target_shares": [0.92, 0.08]}) == []
    assert "almost all of one class" in findings(tests, {"distill.target_shares": [0.97, 0.03]})[0][0]
    assert findings({"distilled.agreement_on_transfer": 0.5}) == []
    assert findings(stages={"committee.held_out": None}) == []
    assert findings({"delivered.what": "full", "delivered.test": on_test(0.89)}) == []


def test_only_the_teacher_was_asked():
    """Where the agreement with the targets was not measured, that with the teacher takes its place."""
    results, stages = healthy()
    del results["distilled"]["agreement_with_targets"]
    assert diagnose(results, stages) == []
    results["distilled"]["agreement_on_transfer"] = 0.5
    assert "agrees with its teacher on only 50 % of the images" in diagnose(results, stages)[0].found


def test_a_student_without_a_head():
    """One that was distilled without labels has no scores before its last stage: what is delivered is compared with the baseline."""
    results, stages = healthy()
    del results["distilled"]
    results["delivered"] |= {"what": "head", "test": on_test(0.7)}
    assert "worse than the baseline" in diagnose(results, stages)[0].found


def test_difference_by_hand():
    """sqrt(0.6 * 0.4 / 100 + 0.55 * 0.45 / 100) is 0.0698."""
    results = {"distilled": {"test": on_test(0.6, 100)}, "baseline": {"test": on_test(0.55, 100)}}
    assert difference(results, "distilled", "baseline") == pytest.approx((0.05, 0.0698), abs=1e-4)
    assert difference(results, "distilled", "teacher") is None
