"""A run's decisions in words: which student is delivered and why, how good it is, how the committee is weighted. Loads no torch."""

from __future__ import annotations

from tutelage.json_object import JSON
from tutelage.reporting.diagnosis import NOISE, difference
from tutelage.reporting.scores import CLASSES, main_score, words_of
from tutelage.reporting.table import delivered_name, title_of

ONE_SEED = "One run: another seed would give other numbers."


def answer(results: JSON, stages: JSON, settings: JSON | None = None) -> str:
    """Summarise a run in a few sentences: which student is delivered and why, then its scores on the test images.

    Args:
        results: of the evaluation. stages: result of each stage by its folder's name; some may be missing. settings: of the run.
    """
    if "delivered" in results:
        return f"{delivery(stages, settings)} {_on_test(results, stages)}"
    if "distilled" in results:
        text = _scored("The distilled student", results["distilled"])
        return f"No student is delivered yet: tutelage finetune makes the choice. {text}"
    if "baseline" in results:
        return f"{_scored('The baseline, the student trained on the labels only,', results['baseline'])} {ONE_SEED}"
    return "This run has no student yet: tutelage distill and tutelage finetune make one."


def delivery(stages: JSON, settings: JSON | None = None) -> str:
    """State in a sentence which student is delivered, and what decided it.

    Args:
        stages, settings: as in `answer`.
    """
    student = stages.get("finetune") or {}
    what, validation = student.get("delivered", "distilled"), student.get("validation") or {}
    title = title_of(what).removesuffix(" (labels only)")
    unchanged = " without fine-tuning" if what == "distilled" else ""
    if not validation:
        return f"The {title} is delivered{unchanged}{_unjudged(what, (settings or {}).get('finetune', 'auto'))}"
    where = f"{'in' if student['judged_on'] == 'cross-validation' else 'on'} {student['judged_on']}"
    reference, one = _reference(validation, what), validation[what]
    if reference == what:
        rivals = ", ".join(name for name in validation if name != what)
        return f"The {title} is delivered{unchanged}: {where} nothing else ({rivals}) was better by more than a standard error."
    return (
        f"The {title} is delivered: {where} it was better than the "
        f"{title_of(reference)} by {100 * one['gain']:.1f} ± {100 * one['standard_error']:.1f} points (± one standard error)."
    )


def _reference(validation: JSON, what: str) -> str:
    """The student that a gain was measured against: the first that was judged; for the baseline the best of the others."""
    best = next(iter(validation))
    if what != "baseline":
        return best
    for name, one in validation.items():
        if name != what and one["gain"] > max(one["standard_error"], validation[best]["gain"]):
            best = name
    return best


def _unjudged(what: str, finetune: str) -> str:
    """Why a student is delivered that was not judged on any images. finetune: the setting."""
    if what == "distilled" and finetune == "auto":
        return ", not compared with any other: there are no validation images (--val)."
    chosen = finetune if finetune != "auto" else {"distilled": "keep"}.get(what, what)
    return f", as --finetune {chosen} asks."


def _scored(subject: str, model: JSON) -> str:
    """State the main score of a model in a sentence."""
    test = model.get("test")
    if not test:
        return "How good it is cannot be measured: there are no test images (--test)."
    words = words_of(test)
    return f"{subject} {words.phrase.format(100 * main_score(test))} {words.over} {test['images']:,} test images."


def _on_test(results: JSON, stages: JSON) -> str:
    """State the score of the delivered student, compared with its rival and the teacher."""
    delivered, test = results["delivered"], results["delivered"].get("test")
    text = _scored("It", delivered)
    if not test:
        return text
    text, words = text.removesuffix("."), words_of(test)
    rival = "distilled" if delivered_name(results) == "baseline" else "baseline"
    if gained := difference(results, "delivered", rival):
        sure = abs(gained[0]) > NOISE * gained[1] or not gained[1]
        labels = (stages.get("adapt") or {}).get("labels")
        trained = f"{labels:,} {'labels' if words is CLASSES else words.labels}" if labels else "labels"
        other = "the distilled student"
        if rival == "baseline":
            other = f"the baseline, the same student trained on the {trained} only"
        text += f", {abs(100 * gained[0]):.1f} points {'more' if gained[0] >= 0 else 'fewer'} than {other}"
        text += "" if sure else f" (± {100 * NOISE * gained[1]:.1f}: with so few test images, that may be chance)"
    if teacher := (results.get("teacher") or {}).get("test"):
        times = results["teacher"]["parameters"] / max(1, delivered["parameters"])
        phrase = words.phrase.format(100 * main_score(teacher))
        text += f"; the teacher, {times:.{0 if times >= 10 else 1}f} times as large, {phrase}"
    return f"{text}. {ONE_SEED}"


def committee(stages: JSON, settings: JSON) -> JSON:
    """Describe where the student's targets come from.

    Args:
        stages, settings: as in `answer`.

    Returns:
        {"text": sentences, "head": titles, "rows": the members' scores on held-out labels}; empty for a run without a committee.
    """
    found = stages.get("committee") or {}
    if not found:
        return {}
    if not (found.get("held_out") or {}).get("teacher"):
        text = "No class has labels to hold out, so no weights could be chosen: the targets are the adapted teacher's probabilities only."
        return {"text": text, "head": [], "rows": []}
    text = (
        f"The student's targets are class probabilities: a mixture of those of the adapted teacher and of {found['folds']} students that "
        f"were trained on the labels only, each without one fold of them, for {found['steps']:,} steps. "
    )
    if settings.get("committee") == "only":
        text += "As --committee only asks, the targets come from the students only."
    elif found["weight"]:
        text += (
            f"The students have weight {found['weight']:.1f}: with it, the log loss on held-out labels is lower by {found['gain']:.3f} ± "
            f"{found['standard_error']:.3f} (± one standard error) than the teacher's."
        )
    else:
        text += (
            "The students have weight 0, and the targets are the teacher's only: no mixture had a log loss on held-out labels that "
            "is lower by more than a standard error."
        )
    if found["bias"]:
        text += " The scores below are those after each class's share of the held-out pixels has been met by a bias."
    titles = {"teacher": "teacher (adapted)", "students": "students (labels only)", "committee": "committee"}
    weights = {"teacher": 1 - found["weight"], "students": found["weight"]}
    rows = [
        [title, f"{weights[name]:.1f}" if name in weights else "", f"{one['log_loss']:.3f}", f"{one['accuracy']:.3f}"]
        for name, title in titles.items()
        if (one := found["held_out"].get(name))
    ]
    head = ["on held-out labels", "weight", "log loss", "pixels" if found["bias"] else "accuracy"]
    return {"text": text, "head": head, "rows": rows}
