"""The page of a run: everything in it is true, nothing of a user's names is markup, and a real browser shows it whole."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

import tutelage as package
from browser import CHROMIUM, NO_CHROMIUM, check_in_browser
from conftest import MODELS, Task, environment, make_task, seconds_without_torch
from tutelage.errors import TutelageError
from tutelage.reporting.charts import confusions, per_class
from tutelage.reporting.diagnosis import diagnose, difference
from tutelage.reporting.evidence import disagreements, read_evidence, write_evidence
from tutelage.reporting.page import _made_with, answer, write_page
from tutelage.runs import Run

NASTY = '<img src=x onerror=alert(1)> & "quoted"'


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Task:
    """A run of the tiny task with all stages, one class of which has a name made of markup."""
    task = make_task(tmp_path_factory.mktemp("report"))
    for split in ("train", "test"):
        (task.target / split / "c0").rename(task.target / split / NASTY)
    more = ("--views", "1", "--steps", "3", "--batch-size", "8", "--refine", "none", "--finetune", "keep")
    words = ["--target", str(task.target), "--gallery", str(task.gallery), "--out", str(task.out), *MODELS, *more]
    done = subprocess.run(
        [sys.executable, "-m", "tutelage", "run", *words],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert f"report: {task.out / 'report' / 'index.html'}" in done.stderr
    return task


def page_of(run: Path) -> str:
    return (run / "report" / "index.html").read_text(encoding="utf-8")


def test_the_page_says_what_the_results_say(finished):
    """The scores of all models, the labels, the command and the disagreements are on the page and in results.csv."""
    results = json.loads((finished.out / "report" / "results.json").read_text())
    page = page_of(finished.out)
    for name in ("student", "alone", "teacher"):
        assert f"{results[name]['test']['accuracy']:.3f}" in page
    assert "18 labels alone" in page
    assert f"Scores on {results['test_images']} test images" in page
    assert f"--target {finished.target}" in page
    with (finished.out / "report" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    told = {(row["model"], row["score"]): row["value"] for row in rows if not row["class"]}
    assert float(told["student", "accuracy"]) == results["student"]["test"]["accuracy"]
    assert {row["class"] for row in rows} == {"", *results["classes"]}
    labels, models, apart = read_evidence(finished.out / "report")
    assert set(models) == {"student", "alone", "teacher"}
    for name, probabilities in models.items():
        right = float((probabilities.argmax(axis=1) == labels).mean())
        assert right == pytest.approx(results[name]["test"]["accuracy"])
    assert page.count('alt="Test image ') == len(apart)
    assert 0 <= results["student"]["agreement_on_transfer"] <= 1


def test_what_a_run_was_made_with(finished):
    """settings.toml holds versions, threads and hashes of the data, each result what its stage was made with, and the page shows
    it; a run given again with other threads is still the same run."""
    kept = Run(finished.out).settings()
    assert kept["versions"] == {name: version(name) for name in ("tutelage", "torch", "timm", "numpy", "pillow")}
    assert set(kept["data"]) == {"target", "gallery", "transfer_set"}
    assert kept["teacher"]["hash"]
    assert kept["teacher"]["licence"]
    result = json.loads((finished.out / "transfer" / "result.json").read_text())
    assert result["made_with"] == {**kept["versions"], "threads": kept["machine"]["threads"]}
    assert f"torch {kept['versions']['torch']}" in page_of(finished.out)
    stages = {**Run(finished.out).results(), "alone": {"made_with": {"torch": "0.4", "threads": 99}}}
    assert [row for row in _made_with(stages) if row[0] == "made with (student alone)"] == [
        ("made with (student alone)", "torch 0.4, threads 99")
    ]
    given = {name: None if value == "default" else value for name, value in kept["settings"].items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "7")
        assert len(package.run(**given)["reused"]) == 6
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
        "report/predictions.npz",
        "report/disagreements.json",
        "transfer_set/montage.jpg",
        "transfer/metrics.jsonl",
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
    assert json.loads((cut / "report" / "results.json").read_text())["student"]


@pytest.mark.parametrize("what", ["nothing", "no scores"])
def test_folders_without_scores(finished, tmp_path, what, tutelage):
    """A folder that is no run, or one that was not evaluated, is told with the command that mends it."""
    folder = tmp_path / "run"
    if what == "no scores":
        shutil.copytree(finished.out, folder, ignore=shutil.ignore_patterns("report"))
    done = tutelage("report", "--run", str(folder))
    assert done.returncode == 2
    assert "no scores of a run in it" in done.stderr
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
    models = {name: random.dirichlet(np.ones(3), 20) for name in ("student", "teacher")}
    labels = random.integers(0, 3, 20)
    write_evidence(
        tmp_path, labels, [f"{i}.png" for i in range(20)], lambda i: np.full((300, 200, 3), i, np.uint8), models
    )
    found, kept, apart = read_evidence(tmp_path)
    assert found.tolist() == labels.tolist()
    assert kept["student"] == pytest.approx(models["student"], abs=1e-3)
    assert all(one["label"] == labels[int(one["id"][:-4])] for one in apart)


RESULTS = {
    "classes": ["a", "b"],
    "student": {"test": {"accuracy": 0.6, "images": 100, "ece": 0.3}, "agreement_on_transfer": 0.5},
    "alone": {"test": {"accuracy": 0.55, "images": 100, "ece": 0.3}},
}
STAGES = {
    "teacher": {"mode": "probe", "validation": {"probe": {"accuracy": 0.5}}, "labels": 6},
    "transfer_set": {"distance": {"transfer_set": 0.03, "gallery": 0.04}},
}


def scored(student: float, alone: float, images: int = 1000) -> dict:
    """Results of two students."""
    both = {"student": student, "alone": alone}
    tests = {
        name: {"test": {"accuracy": one, "images": images, "ece": 0.0}, "parameters": 1} for name, one in both.items()
    }
    return {"classes": ["a"], **tests}


def test_sentences_are_true():
    """Better, worse, equal, without test images, without a student: each is called what it is."""
    assert "40.0 points fewer" in answer(scored(0.5, 0.9), {})
    assert "is worse than the same student alone, by 40.0 points" in diagnose(scored(0.5, 0.9), {})[0].found
    assert "tell from nothing" in answer(scored(0.52, 0.5, 100), {})
    assert "tell from nothing" not in answer(scored(1.0, 1.0), {})
    assert "no test images" in answer({"classes": ["a"], "student": {"parameters": 1}}, {})
    assert "no student yet" in answer({"classes": ["a"], "teacher": {"parameters": 1}}, {})


def test_findings_name_number_and_step():
    """A weak teacher, few labels, a far transfer set, a student that lags, unsure numbers: each is found with its number."""
    found = diagnose(RESULTS, STAGES)
    for one, number in zip(found, ("50 %", "3.0 labels", "0.8 times", "50 %", "30 points", "+5.0 ± 13.7"), strict=True):
        assert number in one.found
        assert one.step
    whole = {"transfer_set": {**STAGES["transfer_set"], "strategy": "all"}}
    assert not any("times as far" in one.found for one in diagnose(RESULTS, whole))
    far = {"transfer_set": {**STAGES["transfer_set"], "far_classes": ["b"]}}
    assert any("of b brought is no nearer" in one.found for one in diagnose(RESULTS, far))
    assert diagnose({"classes": ["a", "b"]}, {}) == []
    good = {"classes": ["a"], "student": {"test": {"accuracy": 0.9, "images": 1000, "ece": 0.02}, "agreement_on_transfer": 0.95},
            "alone": {"test": {"accuracy": 0.5, "images": 1000, "ece": 0.02}}}  # fmt: skip
    assert (
        diagnose(good, {"teacher": {"mode": "probe", "validation": {"probe": {"accuracy": 0.9}}, "labels": 50}}) == []
    )


def test_difference_by_hand():
    """sqrt(0.6 * 0.4 / 100 + 0.55 * 0.45 / 100) is 0.0698."""
    gained = difference(RESULTS, "student", "alone")
    assert gained == pytest.approx((0.05, 0.0698), abs=1e-4)
    assert difference(RESULTS, "student", "teacher") is None


def test_many_classes_and_classes_without_images():
    """A chart of 300 classes shows the weakest 40; a class without test images is left out."""
    names = [f"class {i}" for i in range(300)]
    recall = [None if i == 7 else i / 300 for i in range(300)]
    chart = per_class(names, {"student": recall, "teacher": recall})
    assert chart.count('text-anchor="end"') == 40
    assert ">class 7<" not in chart
    assert ">class 8<" in chart


def test_confusions_of_many_classes():
    """Above 25 classes the pairs that are confused most stand in the place of the matrix; names from users are escaped."""
    counts = np.eye(30, dtype=int) * 5
    counts[3, 4] = 9
    chart = confusions([f"<{i}>" for i in range(30)], counts.tolist(), "student")
    assert "&lt;3&gt; taken for &lt;4&gt;: 9 of 14" in str(chart["svg"])
    assert "<svg" in str(confusions([f"c{i}" for i in range(25)], counts[:25, :25].tolist(), "student")["svg"])


@pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)
@pytest.mark.parametrize("width", [400, 1600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_real_browser(finished, tmp_path, width, scheme):
    """Chromium shows the page without errors, missing images, sideways scrolling or text outside of its chart."""
    check_in_browser(page_of(finished.out), tmp_path, width, scheme)
