"""What is wrong with the ingredients of a run, and what holds a student back: each finding with its number and the next step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tutelage.errors import shown
from tutelage.reporting.scores import CLASSES, main_score, variance, words_of_results

WEAK = 0.7  # accuracy of a teacher on held-out labels, below which it is what limits
FAR = 0.5  # distance of the transfer set over that of the gallery, above which the search brought little
FEW = 10  # labels a class
FAITHFUL = 0.85  # agreement with the targets on the transfer set, below which the student has not learnt them
KNOWN = (
    0.95  # accuracy of a teacher on held-out labels, from which a tie with its rivals says nothing: the task is easy
)
ONE_CLASS = 0.8  # share of the targets' probability, above which they are almost all of one class
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
        _targets(results, stages),
        _labels(results, stages),
        _set(stages),
        _student(results),
        _last_stage(results, stages),
        _sure(results),
        _gain(results, stages),
    ]
    return [one for one in found if one]


def _teacher(stages: dict[str, Any]) -> Finding | None:
    """The teacher does not know the task, or knows it badly.

    It has seen all labels but a fold, on the features of a foundation model; a student of the committee has seen as many, and was
    trained from the beginning in a part of the steps. A teacher that is no better than those has nothing to distil.
    """
    members = stages.get("committee") or {}
    scores = members.get("held_out") or {}
    if scores.get("teacher") and scores.get("students"):
        own, theirs = scores["teacher"]["accuracy"], scores["students"]["accuracy"]
        if own <= theirs and own < KNOWN:
            what = "pixels" if (stages.get("transfer_set") or {}).get("task") == "segmentation" else "labels"
            return Finding(
                f"This teacher does not know the task: it is right for {100 * own:.0f} % of held-out {what}, students that were trained on "
                f"the labels only for {100 * theirs:.0f} %, though in {members['steps']:,} steps, 1 / {members['folds']} of a run's.",
                "Another --teacher, or a larger --teacher-size; see that --teacher-weights are the right ones.",
            )
    teacher = stages.get("teacher") or {}
    chosen = (teacher.get("validation") or {}).get(teacher.get("mode")) or {}
    accuracy = chosen.get("accuracy")
    if accuracy is None or accuracy >= WEAK:
        return None
    return Finding(
        f"The teacher is right for only {100 * accuracy:.0f} % of held-out labels, and a student learns what its teacher knows.",
        "More labels, a larger teacher or --teacher-size, --adapt auto.",
    )


def _targets(results: dict[str, Any], stages: dict[str, Any]) -> Finding | None:
    """The targets are almost all of one class: nearly nothing of the others is left to learn.

    One class has more than ONE_CLASS of their probability, and the others have less than half of what they have among the test
    images (or, without, among classes of one size). The latter keeps apart a set that is like that by nature, such as masks
    that are mostly background. Halving what is left, and not doubling what the class has, works for two classes too.
    """
    shares = (stages.get("transfer") or {}).get("target_shares")
    if not shares:
        return None
    largest = max(range(len(shares)), key=lambda i: shares[i])
    usual = _usual_share(results, largest)
    if usual is None or shares[largest] <= ONE_CLASS or 1 - shares[largest] >= (1 - usual) / 2:
        return None
    return Finding(
        f"The targets are almost all of one class: {results['classes'][largest]} has {100 * shares[largest]:.0f} % of their probability, "
        f"where {100 * usual:.0f} % would be usual.",
        "See in montage.jpg what the transfer set shows: a --gallery that shows the other classes, or --strategy balanced --balance class. "
        "Where it shows them, the teacher takes them for this one: another --teacher, or --adapt auto.",
    )


def _usual_share(results: dict[str, Any], number: int) -> float | None:
    """The share that a class has of the test images or their pixels, and at least that of one of C equal classes; of masks None without
    test images, since their classes are of any size."""
    table = next((one["test"]["confusion"] for one in results.values() if _has_confusion(one)), None)
    if table is None:
        return None if words_of_results(results) is not CLASSES else 1 / len(results["classes"])
    return max(1 / len(table), sum(table[number]) / max(1, sum(map(sum, table))))


def _has_confusion(model: Any) -> bool:
    return isinstance(model, dict) and "confusion" in (model.get("test") or {})


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
    """The distilled student does not reproduce its targets, or where that was not measured, its teacher, on the images it learnt on."""
    student = results.get("distilled") or {}
    agreement = student.get("agreement_with_targets", student.get("agreement_on_transfer"))
    if agreement is None or agreement >= FAITHFUL:
        return None
    whom = "as its targets say" if "agreement_with_targets" in student else "as its teacher"
    what = "images" if words_of_results(results) is CLASSES else "pixels"
    return Finding(
        f"The distilled student decides {whom} for only {100 * agreement:.0f} % of the {what} that it learnt on: it is too small, or has "
        "not been trained enough.",
        "More --epochs or --steps, a higher --lr, a larger --student or --student-size, --student-weights pretrained.",
    )


def _last_stage(results: dict[str, Any], stages: dict[str, Any]) -> Finding | None:
    """Fine-tuning on the labels has made the student worse."""
    what = (results.get("delivered") or {}).get("what")
    lost = difference(results, "distilled", "delivered")
    if what in (None, "distilled", "baseline") or lost is None or lost[0] <= NOISE * lost[1]:
        return None
    judged_on = (stages.get("student") or {}).get("judged_on")
    step = "--finetune keep, or --finetune auto with validation images (--val)."
    return Finding(
        f"The last stage has overfitted: fine-tuned on the labels ({what}), the student is worse than before by {100 * lost[0]:.1f} ± "
        f"{100 * NOISE * lost[1]:.1f} points on test images" + (f", though not on {judged_on}." if judged_on else "."),
        "--finetune keep, or more validation images (--val)." if judged_on else step,
    )


def _sure(results: dict[str, Any]) -> Finding | None:
    ece = (_delivered(results).get("test") or {}).get("ece", 0)
    if ece < UNSURE:
        return None
    return Finding(
        f"The student's probabilities are off by {100 * ece:.0f} points on the mean (ECE).",
        "Do not use them as chances before they are calibrated; its decisions are not touched by that.",
    )


def _delivered(results: dict[str, Any]) -> dict[str, Any]:
    """The student that is delivered, or the distilled one where none is yet."""
    return results.get("delivered") or results.get("distilled") or {}


def difference(results: dict[str, Any], first: str, second: str) -> tuple[float, float] | None:
    """How much better one model is than another by the main score, and the standard error that the test images leave.

    Both are taken as independent, which overstates the error of models that see the same images.
    """
    one, other = ((results.get(name) or {}).get("test") for name in (first, second))
    if not one or not other:
        return None
    return main_score(one) - main_score(other), (variance(one) + variance(other)) ** 0.5


def _gain(results: dict[str, Any], stages: dict[str, Any]) -> Finding | None:
    """Distillation has not surely made the student better than the baseline."""
    student = (
        "distilled" if "distilled" in results else "delivered"
    )  # a student without a head has no scores before the last stage
    gained = difference(results, student, "baseline")
    if gained is None or gained[0] > NOISE * gained[1]:
        return None
    if gained[0] < -NOISE * gained[1]:
        judged = (stages.get("student") or {}).get("judged_on")
        step = "Give more validation images (--val), by which" if judged else "Give validation images (--val), by which"
        baseline = (results.get("delivered") or {}).get("what") == "baseline"
        step = "The baseline is delivered" if baseline else f"{step} the better of both is delivered"
        return Finding(
            f"The distilled student is worse than the baseline, the same student on the labels only, by {-100 * gained[0]:.1f} points.",
            f"{step}; the targets mislead the student: a better --teacher, or a nearer --gallery.",
        )
    points = f"{100 * gained[0]:+.1f} ± {100 * NOISE * gained[1]:.1f} points"
    return Finding(
        f"The distilled student is not surely better than the baseline, the same student on the labels only ({points}).",
        "More test images, and more than one --seed, before you believe a difference.",
    )
