"""Studies for real on tiny models: every method runs, stages are shared, a killed study goes on, and the page tells the truth."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import time
import tomllib
from pathlib import Path

import pytest

from browser import CHROMIUM, NO_CHROMIUM, check_in_browser
from conftest import MODELS, Task, make_task, seconds_without_torch
from forked import Forked, forked
from tutelage.cli import call
from tutelage.errors import TutelageError
from tutelage.files import temporary_beside, toml
from tutelage.reporting.cost import cost_of
from tutelage.reporting.table import TITLES
from tutelage.run_folder import Run
from tutelage.study.methods import METHODS, listed, numbers, variants_of
from tutelage.study.results_table import cells_of, main_budget, read_records, references_of
from tutelage.study.study_page import answer, sureness, write_study

pytestmark = pytest.mark.slow

NASTY = "<b>bold & co<b>"
PINNED = (
    "scratch", "baseline-plus", "task-oriented", "pseudo-label", "self-training", "paper", "dino",
)  # fmt: skip
SEEN = {
    "scratch": "baseline",
    "baseline-plus": "baseline",
    "task-oriented": "distill",
    "self-training": "distill",
    "paper": "distill",
}
METHODS_HERE = ",".join([PINNED[0], "task-agnostic", *PINNED[1:], "clip"])


def words(
    task: Task, *more: str, methods: str = METHODS_HERE, budgets: str = "2,4", out: Path | None = None
) -> list[str]:
    data = ["--target", str(task.target), "--gallery", str(task.gallery), str(task.target / "train"), "--dedup", "none"]
    steps = ["--steps", "4", "--batch-size", "8", "--finetune", "head"]
    own = [part for method in PINNED if method in methods.split(",") for part in ("--set", f"{method}.budget=2")]
    own += (
        ["--set", "task-agnostic.label-share=0"] if "task-agnostic" in methods.split(",") else []
    )  # reads no label then
    study = ["--methods", methods, "--budgets", budgets, "--seeds", "0", *own, "--out", str(out or task.root / "study")]
    return ["compare", *data, *MODELS, *steps, *study, *more]


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Task:
    """A study of all methods, killed after its first run and continued; one class has a name made of markup."""
    task = make_task(tmp_path_factory.mktemp("study"))
    for split in ("train", "test"):
        (task.target / split / "c0").rename(task.target / split / NASTY)
    record = task.root / "study" / "results" / "scratch-budget-2-seed-0.json"
    with Forked(words(task)) as first:
        while not record.exists():
            assert first.poll() is None, first.read("stderr")
            time.sleep(0.05)
        time.sleep(0.5)
        os.killpg(first.pid, signal.SIGKILL)
    again = forked(words(task))
    assert again.returncode == 0, again.stderr
    assert "11 runs" in again.stderr
    assert "; 1 are done" in again.stderr or "; 2 are done" in again.stderr, again.stderr
    (task.root / "said.txt").write_text(again.stderr)
    (task.root / "printed.txt").write_text(again.stdout)
    return task


def records(task: Task) -> dict[tuple[str, int], dict]:
    found = (json.loads(path.read_text()) for path in (task.root / "study" / "results").glob("*.json"))
    return {(one["method"], one["budget"]): one for one in found}


def test_every_arm_leaves_a_record(task):
    """All methods but the impossible one are there, each with scores, a bill, and what it began with."""
    found = records(task)
    assert set(found) == {*((method, 2) for method in PINNED), ("task-agnostic", 2), ("task-agnostic", 4)}
    for (method, _), one in found.items():
        assert one["student"]["test"]["images"] == one["test_images"] == 12
        assert one["student"]["initialisation"] == "scratch"
        assert set(one["compute_cost"]) == set(METHODS[method].charged)
        for stage, entry in one["compute_cost"].items():
            trained = entry["images"] if stage in ("baseline", "distill", "committee") else 1
            assert trained > 0, (method, stage)
            assert entry["memory_mib"] > 100
            assert entry["bytes"] > 0
        distilled = one["compute_cost"].get("distill")
        if distilled:
            asked = (
                0 if method in ("dino", "self-training") else 1 if method == "task-agnostic" else 2
            )  # the mirror image too
            assert distilled["teacher"]["outputs"] == asked * one["images"]["transfer"], method
            assert (distilled["teacher"]["flops"] > 0) == (asked > 0)
        assert (one["teacher"] is None) == ("adapt" not in METHODS[method].charged)
    seen = {
        method: one["compute_cost"][stage]["images"] for method, stage in SEEN.items() for one in [found[method, 2]]
    }
    assert seen == {"scratch": 32, "baseline-plus": 64, "task-oriented": 32, "self-training": 32, "paper": 32}
    assert found["task-oriented", 2]["compute_cost"]["committee"]["images"] == 32, (
        "all students together what the baseline sees"
    )
    assert found["paper", 2]["chosen"] == {"finetune": "full", "adapt": "probe"}
    assert found["scratch", 2]["chosen"] == {}
    assert found["dino", 2]["images_seen"] == pytest.approx(found["task-oriented", 2]["images_seen"], rel=0.3)


def test_what_cannot_be_run_is_said_first(task):
    """A method without weights is told before the first run, the others go on, and the page names the reason."""
    said = (task.root / "said.txt").read_text()
    assert said.index("method clip cannot be run") < said.index("run 1 of")
    page = (task.root / "study" / "report" / "index.html").read_text()
    assert "timm has no CLIP weights for test_resnet" in page


def test_stages_are_shared(task):
    """Curation, adaptation and committee are done once for a budget, a transfer that reads no label once for all: the same weights."""
    study = task.root / "study"
    weights = [study / "task-agnostic" / f"budget-{n}" / "seed-0" / "distill" / "weights.safetensors" for n in (2, 4)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    taken = records(task)["task-agnostic", 4]["compute_cost"]["distill"]["taken_from"]
    assert taken == "task-agnostic/budget-2/seed-0"
    adapted = json.loads((study / "task-oriented" / "budget-2" / "seed-0" / "adapt" / "result.json").read_text())
    assert adapted["taken_from"] == "task-agnostic/budget-2/seed-0"
    own = json.loads((study / "task-oriented" / "budget-2" / "seed-0" / "distill" / "result.json").read_text())
    assert "taken_from" not in own
    for method in ("pseudo-label", "self-training"):
        assert records(task)[method, 2]["compute_cost"]["committee"]["taken_from"] == "task-oriented/budget-2/seed-0"
    assert not (study / "paper" / "budget-2" / "seed-0" / "committee").exists()
    summary = json.loads((study / "report" / "results.json").read_text())["shared"]
    assert 0 < summary["flops_share"] < 1


def test_finished_again_in_seconds(task, tutelage):
    """Given again, a finished study computes nothing; with other settings it is refused, the differences named."""
    before = (task.root / "study" / "report" / "results.csv").read_bytes()
    again = tutelage(*words(task), "--json")
    assert again.returncode == 0, again.stderr
    assert "9 are done" in again.stderr
    assert (task.root / "study" / "report" / "results.csv").read_bytes() == before
    assert {row["method"] for row in json.loads(again.stdout)["table"]} == {*PINNED, "task-agnostic"}
    other = tutelage(*words(task), "--temperature", "2")
    assert other.returncode == 2
    assert "temperature: 1.0 -> 2.0" in other.stderr


def test_results_of_elsewhere_count_as_done(task, tutelage, tmp_path):
    """Records in --results are not computed again, whatever folder the study is in, and make the page by themselves."""
    kept = shutil.copytree(task.root / "study" / "results", tmp_path / "kept")
    done = tutelage(*words(task, "--results", str(kept), out=tmp_path / "other"))
    assert done.returncode == 0, done.stderr
    assert "9 are done" in done.stderr
    assert not (tmp_path / "other" / "task-oriented").exists()
    page = (tmp_path / "other" / "report" / "index.html").read_text()
    assert "Recall of each class" in page
    assert "The transfer set" not in page, "its montage is in the run's folder, which is not here"


def test_the_table_is_printed(task):
    """Without --json the terminal shows a line for each method and budget, what failed, and where the page is."""
    lines = (task.root / "printed.txt").read_text().splitlines()
    assert lines[0].split()[:3] == ["method", "budget", "accuracy"]
    table = [line.split() for line in lines[2:] if line[:1].isalpha() and ":" not in line]
    best = {
        method: 100 * one["student"]["test"]["accuracy"]
        for (method, budget), one in records(task).items()
        if budget == 2
    }
    assert {row[0]: row[2] for row in table if row[1] == "2"} == {
        method: f"{score:.1f}" for method, score in best.items()
    }
    assert any(line.startswith("failed: clip") for line in lines)
    assert lines[-1] == f"page: {task.root / 'study' / 'report' / 'index.html'}"


def test_dry_run(task, tutelage, tmp_path):
    """--dry-run tells runs, time and disk, and writes nothing."""
    out = tmp_path / "planned"
    done = tutelage(*words(task, "--dry-run", out=out))
    assert done.returncode == 0, done.stderr
    assert "dino, budget 2, seed 0:" in done.stderr
    assert "task-agnostic, budget 4, seed 0: shared" in done.stderr
    assert "9 runs, about" in done.stderr
    assert not out.exists()


@pytest.mark.parametrize(("methods", "budgets", "more", "said"), [
    ("scratch,orientated", "2", (), "did you mean 'task-oriented'"),
    ("task-oriented", "2", ("--set", "task-oriented.tempreature=1"), "did you mean 'temperature'"),
    ("task-agnostic", "2", ("--set", "agnostik.lr=1e-3"), "did you mean 'task-agnostic'"),
    ("task-oriented", "2", ("--set", "task-oriented"), "METHOD.SETTING=VALUE"),
    ("scratch", "5,ten", (), "--budgets ten"),
    ("scratch,paper", "2", ("--set", "scratch.lr=fast"), "--set scratch.lr=fast: --lr fast"),
    ("scratch,paper", "2", ("--set", "paper.feature-weight=-1"), "--set paper.feature-weight=-1: --feature-weight -1"),
    ("scratch", "2", ("--set", "scratch.student=mobilenet9"), "no such model"),
    ("", "2", (), "--methods is empty"),
    ("scratch", ",", (), "--budgets without a number"),
])  # fmt: skip
def test_bad_words(task, tutelage, tmp_path, methods, budgets, more, said):
    """A mistyped method, setting, budget or model is told before anything is written."""
    done = tutelage(*words(task, *more, methods=methods, budgets=budgets, out=tmp_path / "new"))
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert not (tmp_path / "new").exists()


def test_a_failed_run_leaves_the_others(task, tmp_path, capsys):
    """A run that fails half-way is named with its reason on the page; the methods beside it are compared."""
    own = ("--set", "self-training:one.budget=1")
    assert call(words(task, *own, methods="self-training:one,scratch", budgets="2", out=tmp_path / "study")) == 0
    assert "self-training+one-budget-1-seed-0 has failed, the others go on" in capsys.readouterr().err
    place = tmp_path / "study" / "self-training+one" / "budget-1" / "seed-0"
    assert "Traceback" in (trace := (place / "traceback.txt").read_text())
    assert "mixture.py" in trace
    page = (tmp_path / "study" / "report" / "index.html").read_text()
    assert "no class has labels to hold out, so there is no committee" in page
    assert "scratch is right for" in page


def changed(record: dict) -> str:
    """A record that a test has made up, without the hash of the real one."""
    return json.dumps({name: value for name, value in record.items() if name != "hash"})


@pytest.fixture(scope="module")
def many(task, tmp_path_factory) -> Path:
    """The same study with three seeds, the later two made up from the first."""
    folder = Path(shutil.copytree(task.root / "study", tmp_path_factory.mktemp("many") / "study"))
    for seed in (1, 2):
        for path in (folder / "results").glob("*-seed-0.json"):
            one = json.loads(path.read_text())
            one["seed"] = seed
            one["student"]["test"]["accuracy"] += 0.01 * seed
            path.with_name(path.name.replace("seed-0", f"seed-{seed}")).write_text(changed(one))
    about = tomllib.loads((folder / "study.toml").read_text())
    about["study"]["plan"] = [path.stem for path in sorted((folder / "results").glob("*.json"))]
    (folder / "study.toml").write_text(toml(about))
    write_study(folder)
    return folder


def test_the_page_says_what_the_records_say(many):
    """Means, spreads and the answer are those of the records; every row of the csv is a number of a record."""
    page = (many / "report" / "index.html").read_text()
    results = json.loads((many / "report" / "results.json").read_text())
    for row in results["table"]:
        assert row["seeds"] == 3
        assert f"{100 * row['accuracy']:.1f} ± {100 * row['spread']:.1f} %" in page
    with (many / "report" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    told = {
        (r["method"], r["budget"], r["seed"]): r["value"]
        for r in rows
        if (r["model"], r["score"]) == ("student", "accuracy")
    }
    for one in results["records"]:
        assert float(told[one["method"], str(one["budget"]), str(one["seed"])]) == one["student"]["test"]["accuracy"]
    assert "<b>" not in page.replace("<body>", "")
    assert "&lt;b&gt;bold" in page
    assert (many / "report" / "index.html").stat().st_size < 3 * 2**20


def test_every_number_is_in_the_csv(many):
    """Scores by class, confusions, the costs of runs and stages, and spreads stand in results.csv, each once."""
    with (many / "report" / "results.csv").open() as file:
        rows = [tuple(row.values()) for row in csv.DictReader(file)]
    names = [row[:6] for row in rows]
    assert len(set(names)) == len(names)
    results = json.loads((many / "report" / "results.json").read_text())
    told = dict(zip(names, (row[6] for row in rows), strict=True))
    record = next(
        one for one in results["records"] if (one["method"], one["budget"], one["seed"]) == ("task-oriented", 2, 0)
    )
    head, test = ("task-oriented", "2", "0"), record["student"]["test"]
    assert int(told[*head, "student", "flops", ""]) == record["student"]["flops"], "of one image"
    assert (
        int(told[*head, "student", "confusion", f"c1 -> {NASTY}"])
        == test["confusion"][record["classes"].index("c1")][record["classes"].index(NASTY)]
    )
    assert float(told[*head, "stage distill", "seconds", ""]) == record["compute_cost"]["distill"]["seconds"]
    assert float(told[*head, "run", "flops", ""]) == cost_of(record)["flops"]
    row = next(row for row in results["table"] if (row["method"], row["budget"]) == ("task-oriented", 2))
    assert float(told["task-oriented", "2", "", "student", "table: spread", ""]) == row["spread"]


def test_the_teacher_is_a_reference(many):
    """The page has the adapted teacher in its table, its chart of compute and the recall by class, whichever method is best."""
    results = json.loads((many / "report" / "results.json").read_text())
    page = (many / "report" / "index.html").read_text()
    assert [row["budget"] for row in results["teachers"]] == [2]
    adapted = [one["teacher"]["test"]["accuracy"] for one in results["records"] if one["method"] == "task-oriented"]
    assert results["teachers"][0]["score"] == pytest.approx(sum(adapted) / len(adapted))
    assert page.count("<td>the adapted teacher</td>") == 1
    assert page.count("; the adapted teacher: ") == 1, "the words of the chart"
    recall = page[page.index("<h2>Recall of each class") :]
    assert TITLES["teacher"] in recall[: recall.index("</section>")]


def test_what_is_not_finished_is_said(many, tmp_path):
    """A page that is made before the end, or from records alone, names the runs and the pictures that it lacks."""
    folder = Path(shutil.copytree(many, tmp_path / "study"))
    (folder / "results" / "task-oriented-budget-2-seed-2.json").unlink()
    for run in folder.glob("*/budget-2"):
        shutil.rmtree(run)
    for path in (folder / "results").glob("task-oriented-*.json"):  # the best method, whose teacher can be told about
        record = json.loads(path.read_text())
        record["student"]["test"]["accuracy"] = 1.0
        path.write_text(changed(record))
    assert write_study(folder)["missing"] == ["task-oriented-budget-2-seed-2"]
    page = (folder / "report" / "index.html").read_text()
    assert "Not finished: 1 of" in page
    assert "is not here, so this page shows no picture" in page
    assert "<h2>Calibration" in page, "which the records hold"
    assert "<h2>What holds the best method back" in page


def test_a_class_without_test_images_is_said(many, tmp_path):
    """A class that no test image shows is named under the chart of the classes."""
    folder = Path(shutil.copytree(many, tmp_path / "study"))
    for path in (folder / "results").glob("*.json"):
        record = json.loads(path.read_text())
        for model in ("student", "teacher"):
            if record[model]:
                record[model]["test"]["recall"][1] = None
        path.write_text(changed(record))
    write_study(folder)
    assert "Without test images: c1." in (folder / "report" / "index.html").read_text()


RECORD = "results/task-oriented-budget-2-seed-0.json"


@pytest.mark.parametrize(("file", "text", "said"), [
    (RECORD, "{", "is not valid JSON"), (RECORD, '{"method": "task-oriented"}', "remove it"),
    ("study.toml", "methods = [", "is not as `tutelage compare` wrote it"),
])  # fmt: skip
def test_broken_files_of_a_study(many, tutelage, tmp_path, file, text, said):
    """A record or a study.toml that cannot be read is named with the mend; the page that is there stays."""
    folder = Path(shutil.copytree(many, tmp_path / "study"))
    before = (folder / "report" / "index.html").read_bytes()
    (folder / file).write_text(text)
    done = tutelage("report", str(folder))
    assert done.returncode == 2
    assert file.rpartition("/")[2] in done.stderr
    assert said in done.stderr
    assert (folder / "report" / "index.html").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "it is of task-oriented, budget 2, seed 1"),
        ({"budget": "2"}, "changed after it was written"),
        ({"test_images": 3}, "changed after it was written"),
        ({"right": "!!!"}, "it has results of 0 test images, not of 12"),
        ({"student": {}}, "damaged"),
        ({"classes": ["c0"]}, "changed after it was written"),
    ],
)
def test_records_that_were_changed_or_copied(many, tutelage, tmp_path, change, said):
    """A record under another run's name, or changed by hand, is named instead of being compared; the results that are there stay."""
    folder = Path(shutil.copytree(many, tmp_path / "study"))
    before = (folder / "report" / "results.json").read_bytes()
    (folder / RECORD).write_text(json.dumps({**json.loads((folder / RECORD).read_text()), **change}))
    done = tutelage("report", str(folder))
    assert done.returncode == 2
    assert "is not the record of that run" in done.stderr
    assert said in done.stderr
    assert (folder / "report" / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [{"failed": ["x"]}, {"failed": 3}, {"results": 5}, {"plan": [5]}, {"methods": ["scratch"]}, {"seeds": None}],
)
def test_a_study_file_that_was_changed(many, tutelage, tmp_path, change):
    """A study.toml with odd values is one error, with the way to have it written again."""
    folder = Path(shutil.copytree(many, tmp_path / "study"))
    about = tomllib.loads((folder / "study.toml").read_text())
    about["study"] = {name: one for name, one in {**about["study"], **change}.items() if one is not None}
    (folder / "study.toml").write_text(toml(about))
    done = tutelage("report", str(folder))
    assert done.returncode == 2, done.stderr
    assert "study.toml" in done.stderr
    assert "run the study's `tutelage compare` again" in done.stderr


def test_settings_of_ones_own_called_study(task, tutelage, tmp_path):
    """A study.toml of the user's in --out is not taken for that of a study, and stays; places that are no folders are named."""
    (tmp_path / "study.toml").write_text("budgets = [2]  # mine\n")
    done = tutelage("compare", "--config", str(tmp_path / "study.toml"), *words(task, out=tmp_path)[1:])
    assert done.returncode == 2
    assert "contains other files" in done.stderr
    assert (tmp_path / "study.toml").read_text() == "budgets = [2]  # mine\n"
    done = tutelage(*words(task, out=tmp_path / "new"), "--results", str(tmp_path / "study.toml"))
    assert done.returncode == 2
    assert "is not a folder" in done.stderr


def test_results_of_other_test_images_are_refused(many, tmp_path):
    """Records that were scored on other test images are not compared: the page is refused, the run named."""
    folder = Path(shutil.copytree(many, tmp_path / "study"))
    path = folder / "results" / "task-oriented-budget-2-seed-2.json"
    path.write_text(changed({**json.loads(path.read_text()), "test": "0" * 64}))
    with pytest.raises(TutelageError, match="task-oriented, budget 2, seed 2"):
        write_study(folder)


def test_killed_while_a_stage_is_taken_over(task, tmp_path):
    """Half a copied stage in a run's folder does not keep the study from going on."""
    run = Path(shutil.copytree(task.root / "study" / "task-oriented" / "budget-2" / "seed-0", tmp_path / "run"))
    half = temporary_beside(run / "distill")
    (half / "deep").mkdir(parents=True)
    (half / "deep" / "file").write_text("half")
    with Run(run):
        assert not half.exists()


def test_one_seed_has_no_spread(task):
    """With one seed no spread and no p are invented, and the answer says so."""
    results = json.loads((task.root / "study" / "report" / "results.json").read_text())
    assert all(row["spread"] is None and row["p"] is None for row in results["table"])
    page = (task.root / "study" / "report" / "index.html").read_text()
    assert "One seed: no spread" in page
    assert "±" not in page[page.index("<tbody>") : page.index("</tbody>")]


def test_the_page_again_without_torch(many):
    """`tutelage report STUDY` writes the page of a study in less than 5 seconds, and loads no torch."""
    assert seconds_without_torch("report", str(many)) < 5


@pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)
@pytest.mark.parametrize(("width", "scheme"), [(400, "dark"), (1600, "light")])
def test_in_a_real_browser(many, tmp_path, width, scheme):
    """Chromium shows the study's page without errors, sideways scrolling or text outside of its chart."""
    check_in_browser((many / "report" / "index.html").read_text(), tmp_path, width, scheme)


def test_lists_and_variants():
    """Lists take commas and spaces; a variant has its method's settings and its own over them."""
    assert listed(["a,b", "c", "a"]) == ["a", "b", "c"]
    assert numbers(["5,10", "25"], "--budgets", 1) == [5, 10, 25]
    with pytest.raises(TutelageError, match="--seeds -1"):
        numbers(["-1"], "--seeds", 0)
    own = variants_of(["dino"], ["dino.budget=5,10"], ["budget"])[0].own
    assert own == {"budget": [5, 10]}
    for name, override in (("dino", "dino.budget=ten"), ("task-oriented:t/2", ""), ("x", "")):
        with pytest.raises(TutelageError):
            variants_of([name], [override] if override else [], ["budget"])
    plain, queue = variants_of(
        ["task-agnostic", "task-agnostic:queue"],
        ["task-agnostic.lr=3e-3", "task-agnostic:queue.task_agnostic-loss=queue"],
        ["lr", "task_agnostic_loss"],
    )
    assert plain.own == {"lr": 3e-3}
    assert queue.own == {"lr": 3e-3, "task_agnostic_loss": "queue"}


def test_the_answer_of_a_study(many):
    """The answer names the main budget: the one with most methods."""
    kept = read_records(many / "results", [path.stem for path in sorted((many / "results").glob("*.json"))])
    cells = cells_of(kept, [*PINNED, "task-agnostic"])
    assert main_budget(cells) == 2
    best = max((cell for cell in cells if cell.budget == 2), key=lambda cell: cell.accuracy[0])
    said = answer(cells, 2, best, references_of(cells))
    assert said.startswith(f"With 2 labels per class, {best.method} is right for ")
    assert "the adapted teacher is right for " in said
    assert said.count(". ") == 0, "one sentence"
    assert sureness(cells, 2, best).startswith("Mean of 3 seeds")
