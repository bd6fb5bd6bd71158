"""The page of a run: everything in it is true, nothing of a user's names is markup, and a real browser shows it whole."""

from __future__ import annotations

import csv
import json
import re
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

import tutelage as package
from browser import CHROMIUM, NO_CHROMIUM, check_in_browser
from conftest import MODELS, Task, make_task, seconds_without_torch
from tutelage.errors import TutelageError
from tutelage.reporting.charts import confusions, per_class
from tutelage.reporting.decisions import answer, committee
from tutelage.reporting.example_predictions import disagreements, read_counts, read_evidence, write_evidence
from tutelage.reporting.page import _made_with, table, write_page
from tutelage.reporting.table import models_of, text_of
from tutelage.run_folder import Run
from tutelage.study.study_charts import against_compute, against_labels

NASTY = '<img src=x onerror=alert(1)> & "quoted"'


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tutelage) -> Task:
    """A run of the tiny task with all stages, one class of which has a name made of markup."""
    task = make_task(tmp_path_factory.mktemp("report"))
    for split in ("train", "test"):
        (task.target / split / "c0").rename(task.target / split / NASTY)
    more = ("--steps", "3", "--batch-size", "8", "--finetune", "keep")
    words = ["--target", str(task.target), "--gallery", str(task.gallery), "--out", str(task.out), *MODELS, *more]
    done = tutelage("run", *words)
    assert done.returncode == 0, done.stderr
    assert f"report: {task.out / 'report' / 'index.html'}" in done.stderr
    return task


def page_of(run: Path) -> str:
    return (run / "report" / "index.html").read_text(encoding="utf-8")


def test_the_page_says_what_the_results_say(finished):
    """The scores of all models, the labels, the command and the disagreements are on the page and in results.csv."""
    results = json.loads((finished.out / "report" / "results.json").read_text())
    page = page_of(finished.out)
    for name in ("distilled", "baseline", "teacher"):
        assert f"{results[name]['test']['accuracy']:.3f}" in page
    assert "The distilled student is delivered without fine-tuning, as --finetune keep asks." in page
    assert "the 18 labels only" in page
    assert page.count("<td>distilled student, delivered</td>") == page.count("<td>baseline (labels only)</td>") == 1
    members = json.loads((finished.out / "committee" / "result.json").read_text())
    assert f"<td>{members['held_out']['students']['log_loss']:.3f}</td>" in page
    assert re.search(rf"The students have weight {members['weight']:.1f}|The students have weight 0,", page)
    assert f"Scores on {results['test_images']} test images" in page
    assert f"--target {finished.target}" in page
    with (finished.out / "report" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    kept_in_csv = {(row["model"], row["score"]): row["value"] for row in rows if not row["class"]}
    for name in ("distilled", "delivered", "committee"):
        assert float(kept_in_csv[name, "accuracy"]) == results[name]["test"]["accuracy"]
    assert kept_in_csv["delivered", "what"] == "distilled"
    assert {row["class"] for row in rows} == {"", *results["classes"]}
    labels, models, apart = read_evidence(finished.out / "evaluate")
    assert set(models) == {"distilled", "delivered", "baseline", "teacher", "committee"}
    right = (labels == models["distilled"].argmax(axis=1)).mean()
    assert read_counts(finished.out / "evaluate" / "predictions.npz", "delivered").mean() == pytest.approx(right)
    for name, probabilities in models.items():
        right = float((probabilities.argmax(axis=1) == labels).mean())
        assert right == pytest.approx(results[name]["test"]["accuracy"])
    assert page.count('alt="Test image ') == len(apart)
    assert 0 <= results["distilled"]["agreement_on_transfer"] <= 1


def test_what_a_run_was_made_with(finished):
    """settings.toml holds versions, threads and hashes of the data, each result what its stage was made with, and the page shows
    it; a run given again with other threads is still the same run."""
    kept = Run(finished.out).settings()
    assert kept["versions"] == {name: version(name) for name in ("tutelage", "torch", "timm", "numpy", "pillow")}
    assert set(kept["data"]) == {"target", "gallery", "transfer_set"}
    assert kept["teacher"]["hash"]
    assert kept["teacher"]["licence"]
    result = json.loads((finished.out / "distill" / "result.json").read_text())
    assert result["made_with"] == {**kept["versions"], "threads": kept["machine"]["threads"]}
    assert f"torch {kept['versions']['torch']}" in page_of(finished.out)
    stages = {**Run(finished.out).results(), "baseline": {"made_with": {"torch": "0.4", "threads": 99}}}
    assert [row for row in _made_with(stages) if row[0] == "made with (baseline)"] == [
        ("made with (baseline)", "torch 0.4, threads 99")
    ]
    given = {name: None if value == "default" else value for name, value in kept["settings"].items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "7")
        assert len(package.run(**given).to_json()["reused"]) == 7
    assert Run(finished.out).settings() == kept


def test_names_are_no_markup(finished):
    """A class that is called like a tag stands on the page as text, in tables, charts and captions."""
    page = page_of(finished.out)
    assert "<img src=x" not in page
    assert "&lt;img src=x" in page
    assert not re.search(r"<script|javascript:|https?://(?!www\.w3\.org)", page)  # nothing is run, nothing fetched


def test_made_again_without_torch(finished):
    """`tutelage report` writes the same page again in less than 5 seconds, and loads no torch."""
    before = page_of(finished.out)
    (finished.out / "report" / "index.html").unlink()
    assert seconds_without_torch("report", "--run", str(finished.out)) < 5
    assert page_of(finished.out) == before


def test_a_run_of_an_earlier_version(finished, tmp_path):
    """Without kept predictions, montage and metrics the page has fewer charts and no gaps."""
    old = Path(shutil.copytree(finished.out, tmp_path / "old"))
    for name in (
        "evaluate/predictions.npz",
        "evaluate/disagreements.json",
        "curate/montage.jpg",
        "distill/metrics.jsonl",
    ):
        (old / name).unlink()
    page = write_page(old).read_text(encoding="utf-8")
    assert "Calibration" not in page
    assert "disagree" not in page
    assert "Recall of each class" in page


def test_scores_alone_make_the_page(finished, tmp_path):
    """Killed between the stage's result and the page, or results.json lost: the page is made from the stage's result."""
    cut = Path(shutil.copytree(finished.out, tmp_path / "cut"))
    for name in ("results.json", "results.csv", "index.html"):
        (cut / "report" / name).unlink()
    package.evaluate(run=str(cut), cache=str(finished.out.parent / "cache"))
    assert {p.name for p in (cut / "report").iterdir()} == {p.name for p in (finished.out / "report").iterdir()}
    assert json.loads((cut / "report" / "results.json").read_text())["delivered"]


@pytest.mark.parametrize("what", ["nothing", "no scores"])
def test_folders_without_scores(finished, tmp_path, what, tutelage):
    """A folder that is no run, or one that was not evaluated, is refused with the command that helps."""
    folder = tmp_path / "run"
    if what == "no scores":
        shutil.copytree(finished.out, folder, ignore=shutil.ignore_patterns("evaluate"))
    done = tutelage("report", "--run", str(folder))
    assert done.returncode == 2
    assert ("has not been evaluated" if what == "no scores" else "is not a run folder") in done.stderr
    assert ("tutelage evaluate" if what == "no scores" else "tutelage run") in done.stderr
    with pytest.raises(TutelageError):
        package.report(run=str(folder))


def test_disagreements_are_the_surest():
    """Only images on which both decide differently, ordered by how sure both are."""
    student = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.99, 0.01]])
    teacher = np.array([[0.8, 0.2], [0.1, 0.9], [0.9, 0.1], [0.4, 0.6]])
    assert disagreements(student, teacher).tolist() == [2, 3, 1]
    assert disagreements(student, teacher, most=1).tolist() == [2]


def test_evidence_survives(tmp_path):
    """What is written is read: labels, probabilities to half precision, thumbnails of at most 96 pixels."""
    random = np.random.default_rng(0)
    models = {name: random.dirichlet(np.ones(3), 20) for name in ("distilled", "teacher")}
    labels = random.integers(0, 3, 20)
    write_evidence(
        tmp_path, labels, [f"{i}.png" for i in range(20)], lambda i: np.full((300, 200, 3), i, np.uint8), models
    )
    found, kept, apart = read_evidence(tmp_path)
    assert found.tolist() == labels.tolist()
    assert kept["distilled"] == pytest.approx(models["distilled"], abs=1e-3)
    assert all(one["label"] == labels[int(one["id"][:-4])] for one in apart)


def scored(distilled: float, baseline: float, images: int = 1000, **more: object) -> dict[str, object]:
    """Results of two students, the first of which is delivered, and of others."""

    def model(accuracy: float) -> dict[str, object]:
        test = {"accuracy": accuracy, "balanced_accuracy": accuracy, "macro_f1": accuracy, "ece": 0.0, "log_loss": 1.0}
        return {"test": {**test, "images": images}, "parameters": 1}

    both = {"distilled": model(distilled), "baseline": model(baseline)}
    return {"classes": ["a"], **both, "delivered": {**both["distilled"], "what": "distilled"}, **more}


JUDGED = {
    "distilled": {"accuracy": 0.8, "gain": 0.0, "standard_error": 0.0},
    "full": {"accuracy": 0.85, "gain": 0.05, "standard_error": 0.02},
    "baseline": {"accuracy": 0.9, "gain": 0.1, "standard_error": 0.031},
}


def student_stage(
    what: str, validation: dict[str, object], judged_on: str = "40 validation images"
) -> dict[str, object]:
    """Stages of a run that delivers this."""
    return {"finetune": {"delivered": what, "validation": validation, "judged_on": judged_on if validation else ""}}


def test_sentences_are_true():
    """Better, worse, equal, without test images, without a student: each is called what it is."""
    assert "40.0 points fewer than the baseline" in answer(scored(0.5, 0.9), {})
    assert "that may be chance" in answer(scored(0.52, 0.5, 100), {})
    assert "that may be chance" not in answer(scored(1.0, 1.0), {})
    assert "no test images" in answer({"classes": ["a"], "delivered": {"parameters": 1, "what": "distilled"}}, {})
    assert "no student yet" in answer({"classes": ["a"], "teacher": {"parameters": 1}}, {})
    undecided = {name: one for name, one in scored(0.5, 0.4).items() if name != "delivered"}
    assert answer(undecided, {}).startswith("No student is delivered yet: tutelage finetune")
    assert answer({"classes": ["a"], "baseline": undecided["baseline"]}, {}).startswith(
        "The baseline, the student trained"
    )


NO_GAIN = JUDGED["distilled"]
WORSE = {**JUDGED["full"], "gain": -0.05}


@pytest.mark.parametrize(
    ("what", "validation", "finetune", "says"),
    [
        ("baseline", JUDGED, "auto", "baseline is delivered: BETTER fine-tuned student (full) by 10.0 ± 3.1 POINTS"),
        ("baseline", {**JUDGED, "full": WORSE}, "auto", "baseline is delivered: BETTER distilled student by 10.0 ± 3.1 POINTS"),
        ("full", {**JUDGED, "baseline": NO_GAIN}, "auto",
         "fine-tuned student (full) is delivered: BETTER distilled student by 5.0 ± 2.0 POINTS"),
        ("distilled", {"distilled": NO_GAIN, "head": WORSE}, "auto",
         "distilled student is delivered without fine-tuning: on 40 validation images nothing else (head) was better by more "
         "than a standard error."),
        ("distilled", {}, "auto",
         "distilled student is delivered without fine-tuning, not compared with any other: there are no validation images (--val)."),
        ("distilled", {}, "keep", "distilled student is delivered without fine-tuning, as --finetune keep asks."),
        ("full", {}, "full", "fine-tuned student (full) is delivered, as --finetune full asks."),
        ("head", {}, "keep", "fine-tuned student (head) is delivered, as --finetune keep asks."),
    ],
)  # fmt: skip
def test_the_first_sentence_says_what_is_delivered(what, validation, finetune, says):
    """Which student is delivered and what decided it stands first, the baseline before all; one that nothing judged is said to be so."""
    says = says.replace("BETTER", "on 40 validation images it was better than the")
    says = says.replace("POINTS", "points (± one standard error).")
    said = answer(scored(0.5, 0.4), student_stage(what, validation), {"finetune": finetune})
    assert said.startswith(f"The {says} It is right for")


def test_cross_validation_is_named():
    """A head that was cross-validated is not said to have been judged on validation images."""
    stages = student_stage("head", {"head": JUDGED["distilled"], "full": JUDGED["distilled"]}, "cross-validation")
    assert "in cross-validation nothing else (full)" in answer(scored(0.5, 0.4), stages)


def test_a_delivered_baseline_is_compared_with_the_distilled_student():
    """Where the baseline is delivered, its rival on the test images is the distilled student, and its row is marked."""
    results = scored(0.5, 0.6)
    results["delivered"] = {**results["baseline"], "what": "baseline"}
    assert "10.0 points more than the distilled student" in answer(results, student_stage("baseline", JUDGED))
    assert [title for title, _ in models_of(results).values()] == [
        "distilled student",
        "baseline (labels only), delivered",
    ]


def test_one_row_for_each_model():
    """A fine-tuned student has a row of its own; a committee whose students have weight 0 has the teacher's scores, and none."""
    model = scored(0.7, 0.6)["distilled"]
    results = scored(0.5, 0.4, delivered={**model, "what": "long"}, teacher=scored(0.9, 0.4)["distilled"])
    titles = [title for title, _ in models_of(results).values()]
    assert titles == [
        "fine-tuned student (long), delivered",
        "distilled student",
        "baseline (labels only)",
        "teacher (adapted)",
    ]
    assert "committee" not in models_of({**results, "committee": {**model, "weight": 0.0}})
    assert models_of({**results, "committee": {**model, "weight": 0.3}})["committee"][0] == "committee"
    lines = text_of("run", {"run": "x", **results}).splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == titles
    assert [row[0]["text"] for row in table(results)["rows"]] == titles


def test_the_committee_in_words():
    """Weight, gain and every member's held-out scores; a weight of 0, --committee only, and labels that cannot be held out."""
    scores = {
        name: {"log_loss": loss, "accuracy": 0.5}
        for name, loss in (("teacher", 0.9), ("students", 1.2), ("committee", 0.8))
    }
    found = {
        "folds": 5, "steps": 60, "weight": 0.3, "gain": 0.1, "standard_error": 0.04, "held_out": scores, "bias": [],
    }  # fmt: skip
    mixed = committee({"committee": found}, {})
    assert "5 students" in mixed["text"]
    assert "weight 0.3: with it, the log loss on held-out labels is lower by 0.100 ± 0.040" in mixed["text"]
    assert mixed["rows"][0] == ["teacher (adapted)", "0.7", "0.900", "0.500"]
    assert mixed["rows"][2] == ["committee", "", "0.800", "0.500"]
    assert "the teacher's only" in committee({"committee": {**found, "weight": 0.0}}, {})["text"]
    assert "the students only" in committee({"committee": found}, {"committee": "only"})["text"]
    masks = committee({"committee": {**found, "bias": [0.1, -0.2]}}, {})
    assert "held-out pixels has been met by a bias" in masks["text"]
    assert masks["head"][-1] == "pixels"
    for nothing in (None, {"teacher": None, "students": None, "committee": None}):
        assert "no weights could be chosen" in committee({"committee": {**found, "held_out": nothing}}, {})["text"]
    assert committee({}, {}) == {}


def test_many_classes_and_classes_without_images():
    """A chart of 300 classes shows the weakest 40; a class without test images is left out."""
    names = [f"class {i}" for i in range(300)]
    recall = [None if i == 7 else i / 300 for i in range(300)]
    chart = per_class(names, {"distilled": recall, "teacher": recall})
    assert chart.count('text-anchor="end"') == 40
    assert ">class 7<" not in chart
    assert ">class 8<" in chart


def test_confusions_of_many_classes():
    """Above 25 classes the pairs that are confused most stand in the place of the matrix; names from users are escaped."""
    counts = np.eye(30, dtype=int) * 5
    counts[3, 4] = 9
    chart = confusions([f"<{i}>" for i in range(30)], counts.tolist(), "distilled")
    assert "&lt;3&gt; taken for &lt;4&gt;: 9 of 14" in str(chart["svg"])
    assert "<svg" in str(confusions([f"c{i}" for i in range(25)], counts[:25, :25].tolist(), "distilled")["svg"])


@pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)
@pytest.mark.parametrize("width", [400, 1600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_real_browser(finished, tmp_path, width, scheme):
    """Chromium shows the page without errors, missing images, sideways scrolling or text outside of its chart."""
    check_in_browser(page_of(finished.out), tmp_path, width, scheme)


def test_every_colour_of_a_chart_is_defined():
    """The lines and marks of a study's charts have a colour in the style sheet, whatever the number of methods."""
    scores = {f"m{i}": {10: (0.5 + i / 100, 0.01), 50: (0.6 + i / 100, 0.01)} for i in range(11)}
    costs = {name: (10.0**i, of[10][0], 0.01) for i, (name, of) in enumerate(scores.items())}
    charts = [against_labels(scores, {10: (0.8, None)}), against_compute(costs, list(costs), 0.8)]
    used = {name for chart in charts for found in re.findall('class="([^"]*)"', str(chart)) for name in found.split()}
    style = (Path(package.__file__).parent / "reporting" / "style.css").read_text(encoding="utf-8")
    assert sum(name.startswith("method") for name in used) == 9
    assert {name for name in used if f".{name}" not in style} == set()
