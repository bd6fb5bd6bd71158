"""What holds a student back, each finding with its number and the next step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tutelage.errors import shown
from tutelage.reporting.scores import CLASSES, main_score, variance, words_of_results

WEAK = 0.7  # accuracy of a teacher on held-out labels, below which it is what limits
FAR = 0.5  # distance of the transfer set over that of the gallery, above which the search brought little
FEW = 10  # labels a class
FAITHFUL = 0.85  # agreement with the teacher on the transfer set, below which the student has not learnt it
UNSURE = 0.1  # expected calibration error
NOISE = 1.96  # standard errors of a difference that test images alone may make


@dataclass(frozen=True)
class Finding:
    """found: a sentence with its number. step: what to do next."""

    found: str
    step: str


def diagnose(results: dict[str, Any], stages: dict[str, Any]) -> list[Finding]:
    """All findings, the gravest first.

    Args:
        results: of the evaluation. stages: result of each stage by its folder's name; missing ones may be left out.
    """
    found = [
        _teacher(stages),
        _labels(results, stages),
        _set(stages),
        _student(results),
        _sure(results),
        _gain(results),
    ]
    return [one for one in found if one]


def _teacher(stages: dict[str, Any]) -> Finding | None:
    teacher = stages.get("teacher") or {}
    chosen = (teacher.get("validation") or {}).get(teacher.get("mode")) or {}
    accuracy = chosen.get("accuracy")
    if accuracy is None or accuracy >= WEAK:
        return None
    return Finding(
        f"The teacher is right for only {100 * accuracy:.0f} % of held-out labels, and a student learns what its teacher knows.",
        "More labels, a larger teacher or --teacher-size, --adapt auto.",
    )


def _labels(results: dict[str, Any], stages: dict[str, Any]) -> Finding | None:
    count, classes = (stages.get("teacher") or {}).get("labels"), len(results["classes"])
    words = words_of_results(results)
    if not count or (count / classes if words is CLASSES else count) >= FEW:
        return None
    if words is not CLASSES:
        return Finding(f"There are {count} {words.labels}; choices made on so few are uncertain.", "Label some more.")
    return Finding(
        f"There are {count / classes:.1f} labels for each class; choices made on so few are uncertain.",
        "Label some more, best those that montage.jpg shows: the rerun reuses all that is computed.",
    )


def _set(stages: dict[str, Any]) -> Finding | None:
    curated = stages.get("transfer_set") or {}
    step = "Give a --gallery that shows such things."
    if curated.get("nothing_near"):
        return Finding("Nothing in the gallery is nearer to the labelled images than chance.", step)
    if far := curated.get("far_classes"):
        return Finding(f"What the labelled images of {shown(far)} brought is no nearer to them than chance.", step)
    distance = curated.get("distance") or {}
    near, far = distance.get("transfer_set"), distance.get("gallery")
    chosen = curated.get("strategy") not in ("all", "random")  # else it is the gallery
    if not chosen or near is None or far is None or far <= 0 or near <= FAR * far:
        return None
    return Finding(
        f"The transfer set is {near / far:.1f} times as far from the labelled images as the gallery is (MMD² {near:.3f} and {far:.3f}).",
        "Choose by --strategy balanced with a smaller --total, or give a nearer --gallery.",
    )


def _student(results: dict[str, Any]) -> Finding | None:
    agreement = (results.get("student") or {}).get("agreement_on_transfer")
    if agreement is None or agreement >= FAITHFUL:
        return None
    what = "images" if words_of_results(results) is CLASSES else "pixels"
    return Finding(
        f"The student decides as its teacher for {100 * agreement:.0f} % of the {what} that it learnt on: it is too small, or has not "
        "seen enough.",
        "More --epochs, a larger --student or --student-size, --student-weights pretrained.",
    )


def _sure(results: dict[str, Any]) -> Finding | None:
    ece = ((results.get("student") or {}).get("test") or {}).get("ece", 0)
    if ece < UNSURE:
        return None
    return Finding(
        f"The student's probabilities are off by {100 * ece:.0f} points on the mean (ECE).",
        "Do not use them as chances before they are calibrated; its decisions are not touched by that.",
    )


def difference(results: dict[str, Any], first: str, second: str) -> tuple[float, float] | None:
    """How much better one model is than another by the main score, and the standard error that the test images leave.

    Both are taken as independent, which overstates the error of models that see the same images.
    """
    one, other = ((results.get(name) or {}).get("test") for name in (first, second))
    if not one or not other:
        return None
    return main_score(one) - main_score(other), (variance(one) + variance(other)) ** 0.5


def _gain(results: dict[str, Any]) -> Finding | None:
    gained = difference(results, "student", "alone")
    if gained is None or gained[0] > NOISE * gained[1]:
        return None
    if gained[0] < -NOISE * gained[1]:
        return Finding(
            f"The taught student is worse than the same student alone, by {-100 * gained[0]:.1f} points.",
            "The teacher misleads it: see its own scores; use the student alone, a better teacher, or a nearer gallery.",
        )
    points = f"{100 * gained[0]:+.1f} ± {100 * NOISE * gained[1]:.1f} points"
    return Finding(
        f"The taught student is not surely better than the same student alone ({points}).",
        "More test images, and more than one --seed, before you believe a difference.",
    )
