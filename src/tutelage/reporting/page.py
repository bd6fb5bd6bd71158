"""The page of a run: one self-contained HTML file with the results, the reasons and how to repeat it. Loads no torch."""

from __future__ import annotations

import base64
import csv
import io
import shlex
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader
from PIL import Image

from tutelage.errors import TutelageError, shown
from tutelage.files import write_json, write_text
from tutelage.json_object import JSON
from tutelage.metrics import reliability
from tutelage.progress import duration, logger
from tutelage.regular_file import json_of, regular
from tutelage.reporting import charts
from tutelage.reporting.decisions import answer, committee
from tutelage.reporting.diagnosis import diagnose
from tutelage.reporting.example_predictions import encoded, read_evidence, read_pictures, shown_student
from tutelage.reporting.scores import words_of, words_of_results
from tutelage.reporting.table import TITLES, models_of, title_of
from tutelage.run_folder import STAGES, Run
from tutelage.version import __version__

LOSS = "Distillation loss"
MONTAGE = 1_600_000  # bytes of the montage above which it is shrunk, so that the page stays below 3 MiB


def write_page(run: Path) -> Path:
    """Write report/index.html and report/results.csv of a run that has been evaluated.

    Returns:
        the path of the page.

    Raises:
        TutelageError: the folder holds no run, or a run without scores.
    """
    if not (run / "settings.toml").exists():
        raise TutelageError(f"{run} is not a run folder", "create one with `tutelage run --out DIR ...`")
    stages = Run(run).results()
    results = Run(run).evaluation()
    settings = Run(run).chosen()
    labels, probabilities, apart = read_evidence(run / "evaluate")
    classes = results["classes"]
    pictures = read_pictures(run / "evaluate", classes)
    page = rendered(
        "page.html.j2",
        title=shown([run.resolve().name]),
        answer=answer(results, stages, settings),
        test_images=results.get("test_images", 0),
        table=table(results),
        findings=diagnose(results, stages),
        committee=committee(stages, settings),
        charts=_charts(run, results, labels, probabilities),
        student=TITLES[shown_student(models_of(results)) or "distilled"],
        disagreements=[disagreement(one, classes) for one in apart],
        pictures=pictures,
        montage=montage(run / "curate" / "montage.jpg"),
        transfer_set=transfer_set(stages["curate"]),
        costs=_costs(stages),
        facts=_facts(settings, stages),
        command=command("run", settings),
    )
    write_json(run / "report" / "results.json", results)
    write_text(run / "report" / "results.csv", _csv(results))
    write_text(run / "report" / "index.html", page)
    return run / "report" / "index.html"


def rendered(template: str, **values: object) -> str:
    """The HTML of a template of this room. values: its variables."""
    environment = Environment(loader=PackageLoader("tutelage", "reporting"), autoescape=True)
    return environment.get_template(template).render(version=__version__, **values)


def table(results: JSON) -> JSON:
    """Head, rows and note of the table of scores."""
    models, words = list(models_of(results).values()), words_of_results(results)
    rows: list[list[JSON]] = [[{"text": title}] for title, _ in models]
    for _, name in words.table:
        values = [one["test"][name] if "test" in one else None for _, one in models]
        best = (min if name in words.best_low else max)((v for v in values if v is not None), default=None)
        for row, value in zip(rows, values, strict=True):
            row.append({"text": "–"} if value is None else {"text": f"{value:.3f}", "best": value == best})
    for row, (_, one) in zip(rows, models, strict=True):
        row.append({"text": f"{one['parameters']:,}"})
        row.append({"text": f"{one['flops'] / 1e6:,.1f}" if one.get("flops") else "–"})
        row.append({"text": f"{one['latency_ms']:.2f}" if one.get("latency_ms") else "–"})
    head = ["model", *(title for title, _ in words.table), "parameters", "MFLOPs", "ms/image"]
    note = "Bold: the best of a column. One run, so no spread. 1 MAC = 2 FLOPs; ms/image: batch 1, one CPU thread."
    return {"head": head, "rows": rows, "note": note}


def command(name: str, settings: JSON) -> str:
    """The command that repeats a run or a study. name: run or compare. settings: those that differ from the defaults."""
    words = ["tutelage", name]
    for setting, value in settings.items():
        if setting not in ("json", "overwrite", "config") and value is not False and value != []:
            words.append("--" + setting.replace("_", "-"))
            words += [] if value is True else map(str, value if isinstance(value, list) else [value])
    return shlex.join(words)


def rows_of(settings: JSON) -> list[tuple[str, object]]:
    """Rows (name, value) of settings, as the page shows them; empty lists are left out."""
    return [
        (name.replace("_", " "), ", ".join(map(str, value)) if isinstance(value, list) else value)
        for name, value in settings.items()
        if value != []
    ]


def _charts(run: Path, results: JSON, labels: np.ndarray, probabilities: dict[str, np.ndarray]) -> list[JSON]:
    """The charts for which this run has the numbers."""
    classes, found = results["classes"], []
    tests = {name: one["test"] for name, (_, one) in models_of(results).items() if one.get("test")}
    if tests:
        title, score = words_of_results(results).each
        recall = {name: test[score] for name, test in tests.items()}
        without = [name for name, r in zip(classes, recall[next(iter(recall))], strict=True) if r is None]
        note = f"The weakest classes of the {TITLES[next(iter(tests))]} first."
        note += f" Without test images: {', '.join(without)}." if without else ""
        if len(classes) > charts.CLASSES_SHOWN:
            note += f" {charts.CLASSES_SHOWN} of {len(classes)}."
        found.append({"title": title, "svg": charts.per_class(classes, recall, title), "note": note})
    titles = {name: f"the {title}" for name, title in TITLES.items()}
    titles |= {"baseline": "the baseline", "teacher": "the adapted teacher"}
    for name, test in tests.items():
        found.append(charts.confusions(classes, test["confusion"], name, words_of(test).unit == "pixels", titles))
    if bins := {name: reliability(one, labels) for name, one in probabilities.items() if name in tests}:
        found.append(charts.calibrations(bins))
    rows = _metrics(run / "distill" / "metrics.jsonl")
    if len(rows) > 1:
        picture = charts.curve([row["images"] for row in rows], [row["loss"] for row in rows], LOSS, "images")
        note = "If the loss still falls at the end, more --epochs may help."
        found.append({"title": LOSS, "svg": picture, "note": note})
    return found


def _metrics(path: Path) -> list[JSON]:
    rows = []
    for row in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            rows.append(json_of(row))
        except ValueError:  # a line cut short by a full disk
            continue
    return [
        row for row in rows if isinstance(row, dict) and isinstance(row.get("loss"), float) and np.isfinite(row["loss"])
    ]


def disagreement(one: JSON, classes: list[str]) -> dict[str, str]:
    """A test image on which student and teacher disagree, as the page shows it."""

    def prediction_of(model: str) -> str:
        label, sure = one[model]
        return f"{classes[label]} ({100 * sure:.0f} %){' ✓' if label == one['label'] else ''}"

    return {
        "id": one["id"],
        "jpeg": one["jpeg"],
        "truth": classes[one["label"]],
        "student": prediction_of(shown_student(one) or "distilled"),
        "teacher": prediction_of("teacher"),
    }


def montage(path: Path) -> str:
    """The montage as base-64 text, shrunk if it is large; empty if there is none, or something else in its place."""
    try:
        regular(path)
        with Image.open(path) as picture:
            if path.stat().st_size <= MONTAGE:
                return base64.b64encode(path.read_bytes()).decode("ascii")
            picture.thumbnail((1400, 3000))
            return encoded(picture, "JPEG", quality=75)
    except FileNotFoundError:
        return ""
    except Exception as error:  # Pillow's readers raise almost anything
        logger.warning(f"{path} is not the picture that curate wrote, and is left out: {error}")
        return ""


def transfer_set(curated: JSON) -> str:
    """Describe how the transfer set was chosen in a few sentences."""
    images = curated.get("images", {})
    text = f"{images.get('transfer', 0):,} images, {images.get('train', 0):,} of them labelled, by strategy {curated.get('strategy')} "
    text += f"from a gallery of {curated.get('gallery', 0):,}. Kept out: {curated.get('leaks', 0):,} copies of validation or test images, "
    text += f"{curated.get('duplicates', 0):,} identical and {curated.get('near_duplicates', 0):,} near duplicates; "
    text += f"{curated.get('rejected', 0):,} images cannot be used."
    if recall := curated.get("recall"):
        text += f" The approximate search (inverted file) finds {100 * recall:.1f} % of the true nearest images."
    if similarity := curated.get("similarity"):
        asked = "words" if curated.get("strategy") == "text" else "labelled image"
        text += f" Similarity to the {asked} each was chosen for: median {similarity['50 %']:.2f}, 5 % below {similarity['5 %']:.2f}."
    if distance := curated.get("distance"):
        text += f" Distance to the labelled images (MMD²): {distance['transfer_set']:.3f}, of the whole gallery {distance['gallery']:.3f}."
    return text


def _costs(stages: JSON) -> list[tuple[str, str]]:
    """Rows (name, value): the time of each stage, and images seen in the distillation."""
    took = []
    for name in STAGES:
        if "target_seconds" in stages[name]:
            took.append(("targets", stages[name]["target_seconds"]))
        if "seconds" in stages[name]:
            took.append((name, stages[name]["seconds"]))
    rows = [(name, duration(seconds)) for name, seconds in took]
    rows.append(("all", duration(sum(seconds for _, seconds in took))))
    if seen := stages["distill"].get("images_seen"):
        rows.append(("images seen in the distillation", f"{seen:,}"))
    return rows


def _facts(settings: JSON, stages: JSON) -> list[tuple[str, object]]:
    """Rows (name, value) of models, data and settings."""
    teacher, student = stages["adapt"].get("teacher", {}), stages["distill"].get("student", {})
    rows: list[tuple[str, object]] = []
    if teacher:
        name = f"{teacher['name']} at {teacher['size']} px, {teacher['weights']} ({teacher['licence']})"
        rows.append(("teacher", name))
        rows.append(("its weights", f"SHA-256 {teacher['hash'][:16]}…"))
    if student:
        rows.append(("student", f"{student['name']} at {student['size']} px, from {student['initialisation']}"))
    if outputs := stages["curate"].get("outputs"):
        rows.append(("data", f"SHA-256 {outputs[:16]}…"))
    if delivered := stages["finetune"].get("delivered"):
        judged_on = stages["finetune"].get("judged_on")
        rows.append(("delivered", title_of(delivered) + (f", judged on {judged_on}" if judged_on else "")))
    rows += _made_with(stages)
    hidden = {"out", "cache", "json", "smoke", "overwrite", "config"}
    return rows + rows_of({name: value for name, value in settings.items() if name not in hidden})


def _made_with(stages: JSON) -> list[tuple[str, str]]:
    """Versions and threads, which may change the last bits of results: one row, or one for each group of stages that share them."""
    found: dict[str, list[str]] = {}
    for name in STAGES:
        if made := stages[name].get("made_with"):
            found.setdefault(", ".join(f"{what} {one}" for what, one in made.items()), []).append(name)
    if len(found) == 1:
        return [("made with", next(iter(found)))]
    return [(f"made with ({', '.join(names)})", text) for text, names in found.items()]


def _csv(results: JSON) -> str:
    """Every score of every model, one per line."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(("model", "score", "class", "value"))
    for model in TITLES:
        one = results.get(model) or {}
        flat = {**{k: v for k, v in one.items() if not isinstance(v, dict)}, **one.get("test", {})}
        for name, value in flat.items():
            if name in ("recall", "iou"):
                writer.writerows((model, name, *pair) for pair in zip(results["classes"], value, strict=True))
            elif not isinstance(value, list):
                writer.writerow((model, name, "", value))
    return out.getvalue()
