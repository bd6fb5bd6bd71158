"""Diagnose a run: what is wrong with its inputs and what limits the student. Each finding has its number and the next step."""

from __future__ import annotations

from dataclasses import dataclass

from tutelage.errors import shown
from tutelage.json_object import JSON
from tutelage.reporting.scores import CLASSES, OF_TASK, main_score, variance, words_of_results

WEAK = 0.7  # held-out accuracy of a teacher, below which the teacher is the limit
FAR = 0.5  # distance of the transfer set over that of the gallery, above which the search gained little
FEW = 10  # labels per class, below which choices are uncertain
FAITHFUL = 0.85  # agreement with the targets on the transfer set, below which the student has not learnt them
# held-out accuracy of a teacher from which the task is easy: being no better than the students is no fault
KNOWN = 0.95
ONE_CLASS = 0.8  # share of the targets' probability on one class, above which it is reported
UNSURE = 0.1  # expected calibration error that is reported
NOISE = 1.96  # standard errors within which the choice of test images may explain a difference


@dataclass(frozen=True)
class Finding:
    """One finding. found: a sentence with its number. step: what to do next."""

    found: str
    step: str


def diagnose(results: JSON, stages: JSON) -> list[Finding]:
    """Return all findings, the most serious first.

    Args:
        results: of the evaluation. stages: result of each stage by its folder's name; some may be missing.
    """
    found = [
        _copies(stages),
        _teacher(stages),
        _targets(results, stages),
        _labels(results, stages),
        _set(stages),
        _student(results),
    ]
    found += [_last_stage(results, stages), _sure(results), _gain(results, stages)]
    return [one for one in found if one]


def _copies(stages: JSON) -> Finding | None:
    """Labelled images look like copies of images in another split."""
    count = (stages.get("curate") or {}).get("split_copies", 0)
    if not count:
        return None
    return Finding(
        f"{count:,} labelled images look like copies of images in another split, which makes scores too high.",
        "Look at those in curate/split_copies.csv; remove copies, or use --group-by where products, patients or bursts repeat.",
    )


def _teacher(stages: JSON) -> Finding | None:
    """The teacher does not know the task, or knows it badly.

    It was trained on all labels but one fold, on the features of a foundation model; a committee student was trained on as many,
    but without those features and in a fraction of the steps. A teacher that is not better has nothing to distil.
    """
    members = stages.get("committee") or {}
    scores = members.get("held_out") or {}
    if scores.get("teacher") and scores.get("students"):
        own, theirs = scores["teacher"]["accuracy"], scores["students"]["accuracy"]
        if own <= theirs and own < KNOWN:
            task = (stages.get("curate") or {}).get("task", "")
            what = "pixels" if OF_TASK.get(task, CLASSES).unit == "pixels" else "labels"
            return Finding(
                f"This teacher does not know the task: it is right for {100 * own:.0f} % of held-out {what}; students trained on "
                f"the labels only reach {100 * theirs:.0f} %, although in {members['steps']:,} steps, 1 / {members['folds']} of a run's.",
                "Use another --teacher, or a larger --teacher-size; check that --teacher-weights are the right ones.",
            )
    teacher = stages.get("adapt") or {}
    chosen = (teacher.get("validation") or {}).get(teacher.get("mode")) or {}
    accuracy = chosen.get("accuracy")
    if accuracy is None or accuracy >= WEAK:
        return None
    return Finding(
        f"The teacher is right for only {100 * accuracy:.0f} % of held-out labels, and a student learns what its teacher knows.",
        "Add labels, or use a larger teacher, a larger --teacher-size or --adapt auto.",
    )


def _targets(results: JSON, stages: JSON) -> Finding | None:
    """The targets are almost all of one class: little is left to learn about the others.

    One class has more than ONE_CLASS of their probability, and the other classes have less than half of their share of the test
    images (or, without test images, of equal shares). The second condition spares data that are imbalanced by nature, such as
    masks that are mostly background. Comparing the others' share rather than the class's own works for two classes too.
    """
    shares = (stages.get("distill") or {}).get("target_shares")
    if not shares:
        return None
    largest = max(range(len(shares)), key=lambda i: shares[i])
    usual = _usual_share(results, largest)
    if usual is None or shares[largest] <= ONE_CLASS or 1 - shares[largest] >= (1 - usual) / 2:
        return None
    return Finding(
        f"The targets are almost all of one class: {results['classes'][largest]} has {100 * shares[largest]:.0f} % of their probability, "
        f"where {100 * usual:.0f} % would be usual.",
        "See in montage.jpg what the transfer set shows. Without the other classes: use a --gallery that has them, or --strategy balanced "
        "--balance class. With them, the teacher takes them for this class: use another --teacher, or --adapt auto.",
    )


def _usual_share(results: JSON, number: int) -> float | None:
    """A class's share of the test images (or their pixels), but at least 1 / C; None for masks without test images, whose classes
    may be of any size."""
    tests = (one.get("test") or {} for one in results.values() if isinstance(one, dict))
    table = next((test["confusion"] for test in tests if "confusion" in test), None)
    if table is None:
        return None if words_of_results(results) is not CLASSES else 1 / len(results["classes"])
    return max(1 / len(table), sum(table[number]) / max(1, sum(map(sum, table))))


def _labels(results: JSON, stages: JSON) -> Finding | None:
    count, classes = (stages.get("adapt") or {}).get("labels"), len(results["classes"])
    words = words_of_results(results)
    if not count or (count / classes if words is CLASSES else count) >= FEW:
        return None
    if words is not CLASSES:
        return Finding(f"There are {count} {words.labels}; choices made on so few are uncertain.", "Label some more.")
    return Finding(
        f"There are {count / classes:.1f} labels for each class; choices made on so few are uncertain.",
        "Label some more, best those that montage.jpg shows; a rerun reuses everything that is already computed.",
    )


def _set(stages: JSON) -> Finding | None:
    curated = stages.get("curate") or {}
    step = "Give a --gallery with images like the labelled ones."
    if curated.get("nothing_near"):
        return Finding("Nothing in the gallery is nearer to the labelled images than chance.", step)
    if far := curated.get("far_classes"):
        return Finding(f"Images found for {shown(far)} are no nearer to the labelled images than chance.", step)
    distance = curated.get("distance") or {}
    near, far = distance.get("transfer_set"), distance.get("gallery")
    chosen = curated.get("strategy") not in ("all", "random")  # these two do not search
    if not chosen or near is None or far is None or far <= 0 or near <= FAR * far:
        return None
    return Finding(
        f"The transfer set is {near / far:.1f} times as far from the labelled images as the gallery is (MMD² {near:.3f} and {far:.3f}).",
        "Use --strategy balanced with a smaller --total, or give a nearer --gallery.",
    )


def _student(results: JSON) -> Finding | None:
    """The distilled student does not reproduce its targets (or, where that was not measured, its teacher) on its training images."""
    student = results.get("distilled") or {}
    agreement = student.get("agreement_with_targets", student.get("agreement_on_transfer"))
    if agreement is None or agreement >= FAITHFUL:
        return None
    whom = "its targets" if "agreement_with_targets" in student else "its teacher"
    what = words_of_results(results).unit
    return Finding(
        f"The distilled student agrees with {whom} on only {100 * agreement:.0f} % of the {what} it was trained on: it is too small, or "
        "was not trained long enough.",
        "Use more --epochs or --steps, a higher --lr, a larger --student or --student-size, --student-weights pretrained.",
    )


def _last_stage(results: JSON, stages: JSON) -> Finding | None:
    """Fine-tuning on the labels has made the student worse."""
    what = (results.get("delivered") or {}).get("what")
    lost = difference(results, "distilled", "delivered")
    if what in (None, "distilled", "baseline") or lost is None or lost[0] <= NOISE * lost[1]:
        return None
    judged_on = (stages.get("finetune") or {}).get("judged_on")
    step = "more validation images (--val)" if judged_on else "--finetune auto with validation images (--val)"
    return Finding(
        f"The last stage has overfitted: fine-tuned on the labels ({what}), the student is worse than before by {100 * lost[0]:.1f} ± "
        f"{100 * NOISE * lost[1]:.1f} points on test images" + (f", though not on {judged_on}." if judged_on else "."),
        f"Use --finetune keep, or {step}.",
    )


def _sure(results: JSON) -> Finding | None:
    student = results.get("delivered") or results.get("distilled") or {}  # the latter while none is delivered
    ece = (student.get("test") or {}).get("ece", 0)
    if ece < UNSURE:
        return None
    return Finding(
        f"The student's probabilities are off by {100 * ece:.0f} points on average (ECE).",
        "Calibrate them before you use them as probabilities; its decisions are not affected.",
    )


def difference(results: JSON, first: str, second: str) -> tuple[float, float] | None:
    """Difference of the main scores of two models, and its standard error from the choice of test images; None without scores.

    Both are treated as independent, which overstates the error, since they are tested on the same images.
    """
    one, other = ((results.get(name) or {}).get("test") for name in (first, second))
    if not one or not other:
        return None
    return main_score(one) - main_score(other), (variance(one) + variance(other)) ** 0.5


def _gain(results: JSON, stages: JSON) -> Finding | None:
    """Distillation has not made the student better than the baseline by more than chance."""
    # A student without a head has no scores before the last stage.
    student = "distilled" if "distilled" in results else "delivered"
    gained = difference(results, student, "baseline")
    if gained is None or gained[0] > NOISE * gained[1]:
        return None
    if gained[0] < -NOISE * gained[1]:
        more = "more " if (stages.get("finetune") or {}).get("judged_on") else ""
        step = f"Give {more}validation images (--val), by which the better of both is delivered"
        if (results.get("delivered") or {}).get("what") == "baseline":
            step = "The baseline is delivered"
        return Finding(
            f"The distilled student is worse than the baseline, the student trained on the labels only, by {-100 * gained[0]:.1f} points.",
            f"{step}; the targets mislead the student: a better --teacher, or a nearer --gallery.",
        )
    points = f"{100 * gained[0]:+.1f} ± {100 * NOISE * gained[1]:.1f} points"
    return Finding(
        f"The distilled student is not clearly better than the baseline, the student trained on the labels only ({points}).",
        "Use more test images and more than one --seed before you believe a difference.",
    )
