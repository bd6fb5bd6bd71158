"""MODEL_CARD.md in the layout of Hugging Face: intended use, training data, teacher and licence, scores and known failures."""

from __future__ import annotations

import re
from pathlib import Path

from jinja2 import Environment, PackageLoader

from tutelage.errors import shown
from tutelage.json_object import JSON
from tutelage.metrics import wilson
from tutelage.reporting.charts import confused
from tutelage.reporting.decisions import delivery
from tutelage.reporting.diagnosis import diagnose
from tutelage.reporting.page import command
from tutelage.reporting.scores import main_score, variance, words_of
from tutelage.reporting.table import delivered_name, models_of

FREE_LICENCES = ("apache-2.0", "mit", "bsd-3-clause", "bsd-2-clause", "bsd")
NOT_USED = "Neither the teacher's weights nor its outputs were used to train the student."
CONFUSIONS = 5  # the most frequent ones that are listed


def model_card(run: Path, stages: JSON, settings: JSON, teacher: JSON, export: JSON) -> str:
    """Return the text of the card.

    Args:
        run: the run folder. stages: result of each stage, by its folder's name. settings: of the run. teacher: its entry in
            settings.toml, or {}. export: contents of export.json.
    """
    settings = {name: shareable(value) for name, value in settings.items()}
    report, student = stages["evaluate"], stages["evaluate"]["delivered"]
    name = shown([run.resolve().name])
    test, baseline = student.get("test"), student["what"] == "baseline"
    templates = PackageLoader("tutelage", "deploy")
    environment = Environment(loader=templates, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    classes, delivered = [as_code(name) for name in report["classes"]], delivered_name(report)
    environment.filters |= {"code": as_code, "cell": lambda text: text.replace("|", "\\|")}
    far = [as_code(name) for name in stages["curate"].get("far_classes") or ()]
    findings = diagnose({**report, "classes": classes}, {**stages, "curate": {**stages["curate"], "far_classes": far}})
    others = [
        one for name, one in models_of(report).items() if name != delivered and one[1].get("test")
    ]  # (title, scores)
    rows = _per_class(classes, test) if test else []
    return environment.get_template("model_card.md.j2").render(
        name=name, title=_as_text(name), classes=classes, kind=f"image-{stages['curate']['task']}",
        student=student, test=test, others=others, baseline=baseline, delivery=delivery(stages, settings),
        judged_on=stages["finetune"]["judged_on"], words=words_of(test), interval=_interval(test) if test else None,
        rows=rows, confusions=_confusions(classes, test) if test else [],
        teacher={**report.get("teacher", {}), **teacher},
        licence=_licence(baseline, settings, teacher),
        set=stages["curate"], settings=settings, command=command("run", settings), export=export,
        findings=findings, low=_lowest(rows),
        source=_source(settings, teacher or report.get("teacher", {})),
    )  # fmt: skip


def shareable(value: object) -> object:
    """Return a setting as a card that others read may show it: an absolute path by its last part, control characters as `?`."""
    if isinstance(value, list):
        return [shareable(one) for one in value]
    if not isinstance(value, str):
        return value
    text = Path(value).name if Path(value).is_absolute() else value
    return "".join(one if one.isprintable() else "?" for one in text)


def _source(settings: JSON, teacher: JSON) -> str:
    """Name what the student's targets came from."""
    if settings.get("committee") == "only":
        return " from students that were trained on the labels only"
    return f" from `{teacher['name']}`" if teacher.get("name") else ", without a teacher,"


def _licence(baseline: bool, settings: JSON, teacher: JSON) -> str:
    """State what the licence of the teacher's weights means for the student that is delivered."""
    if baseline or settings.get("committee") == "only":
        return NOT_USED
    return licence_note(teacher.get("licence", "unknown"))


def licence_note(licence: str) -> str:
    """State what the licence of the teacher's weights means for a student trained on their outputs."""
    name = licence.lower()
    if name.startswith(FREE_LICENCES):
        return (
            f"The teacher's weights are under {licence}, which allows any use, also commercial. The student contains none of them: "
            "it was trained on their outputs."
        )
    if name == "unknown":
        return (
            "The licence of the teacher's weights is unknown to the program that wrote this card. Look it up before you ship: some "
            "licences forbid commercial use, or the training of other models on the outputs."
        )
    return (
        f"The teacher's weights are under {licence}. It may limit commercial use, or the use of models that were trained on its outputs, "
        "as this student was: read it before you ship."
    )


def as_code(text: str) -> str:
    """Return a code span of Markdown that reads as the text does. as_code("a`b") == "``a`b``"

    In a table each | needs a backslash besides, in a code span too.
    """
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if "`" in (text[:1], text[-1:]) or (text[:1] == text[-1:] == " ") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _as_text(text: str) -> str:
    """Return Markdown that reads as the text does, in one line."""
    return re.sub(r"([\\`*_\[\]<>#&|~])", r"\\\1", text)


def _interval(test: JSON) -> tuple[float, float]:
    """95 % interval of the main score due to the choice of test images: Wilson's for accuracy, else ± 1.96 standard errors."""
    if "standard_error" not in test:
        return wilson(test["accuracy"], test["images"])
    half = 1.96 * variance(test) ** 0.5
    return main_score(test) - half, main_score(test) + half


def _per_class(classes: list[str], test: JSON) -> list[JSON]:
    table = test["confusion"]
    return [
        {
            "name": name,
            "images": sum(table[i]),
            "recall": test["recall"][i],
            "precision": table[i][i] / predicted if (predicted := sum(row[i] for row in table)) else None,
            "iou": test["iou"][i] if "iou" in test else None,
        }
        for i, name in enumerate(classes)
    ]


def _confusions(classes: list[str], test: JSON) -> list[tuple[float, str, str]]:
    found = [(count / total, true, predicted) for count, true, predicted, total in confused(classes, test["confusion"])]
    return sorted(found, key=lambda one: one[0], reverse=True)[:CONFUSIONS]


def _lowest(rows: list[JSON]) -> list[JSON]:
    return sorted((row for row in rows if row["recall"] is not None), key=lambda row: row["recall"])[:3]
