"""The page of a study, from the records of its runs: scores by method, label budget and compute. Loads no torch."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from tutelage.errors import TutelageError, shown
from tutelage.files import toml_of, write_json, write_text
from tutelage.json_object import JSON
from tutelage.regular_file import text_in
from tutelage.reporting import charts
from tutelage.reporting.cost import cost_of, shares
from tutelage.reporting.example_predictions import read_evidence, read_pictures
from tutelage.reporting.page import command, disagreement, montage, rendered, rows_of, transfer_set
from tutelage.reporting.table import TITLES
from tutelage.run_folder import STUDY, Run, folder_name
from tutelage.study import results_table, study_charts
from tutelage.study.results_table import Cell, Record, Reference, compared


class _Plan(BaseModel, strict=True):
    methods: list[str]
    budgets: list[int]
    seeds: list[int]
    set: list[str]
    match: str
    results: str
    plan: list[str]
    failed: list[Annotated[str, Field(pattern=": ")]]


class _StudyFile(BaseModel, strict=True):
    """What study.toml holds, apart from tables of facts."""

    study: _Plan
    settings: dict[str, object]


def write_study(folder: Path) -> JSON:
    """Write report/index.html, results.json and results.csv of a study, and return the summary.

    Returns:
        {"study", "page", "runs", "failed", "missing", "table", "teachers", "shared"}.

    Raises:
        TutelageError: the folder holds no study, or none of its runs is finished.
    """
    about = _read_study(folder)
    study, report = about["study"], folder / "report"
    failed = dict(reason.split(": ", 1) for reason in study["failed"])
    records = results_table.read_records(Path(study["results"] or folder / "results"), study["plan"])
    if not records:
        raise TutelageError(f"{folder}: no run of the study is finished", "run the study's command again")
    if strange := {record["method"] for record in records} - {*study["methods"]}:
        hint = "run the study's `tutelage compare` again: it rewrites the file"
        raise TutelageError(
            f"{folder / STUDY} plans runs of {shown(sorted(strange))}, but does not list it as a method", hint
        )
    cells = results_table.cells_of(records, study["methods"])
    budget, references = results_table.main_budget(cells), results_table.references_of(cells)
    table, best = results_table.rows(cells, budget)
    done = {results_table.record_name(one["method"], one["budget"], one["seed"]) for one in records}
    unstarted = tuple(f"{folder_name(method)}-budget-" for method in failed)  # methods that could not be started at all
    scores = dict.fromkeys((best.words.main, "accuracy"))  # the main score, and the accuracy where that is another
    summary = {
        "study": str(folder), "page": str(report / "index.html"), "failed": failed,
        "missing": [name for name in study["plan"] if name not in done and name not in failed and not name.startswith(unstarted)],
        "table": table, "teachers": results_table.reference_rows(references), "shared": shares(records),
        "runs": [{**{name: one[name] for name in ("method", "budget", "seed")}, **{name: one["student"]["test"][name] for name in scores}}
                 for one in records],
    }  # fmt: skip
    teachers = [{**row, "reference": True} for row in summary["teachers"]]
    given = {name: study[name] for name in ("methods", "budgets", "seeds", "set", "match")}
    given |= {"results": study["results"] or [], **{k: v for k, v in about["settings"].items() if v != "default"}}
    page = rendered(
        "study.html.j2", title=shown([folder.resolve().name]), budget=budget, table=table, words=best.words,
        answer=answer(cells, budget, best, references), sureness=sureness(cells, budget, best),
        lines=sorted([*table, *teachers], key=lambda row: row["budget"]), more=results_table.beside(records[0]["student"]["test"]),
        failed={name: re.split(" (?=hint: )", why) for name, why in failed.items()}, missing=summary["missing"],
        planned=len(study["plan"]), tests=records[0]["test_images"], charts=_charts(cells, budget, best, references),
        costs_of_methods=[{"method": cell.method, **cell.cost} for cell in cells if cell.budget == budget], shared=summary["shared"],
        command=command("compare", given), facts=_facts(about, records), **_of_a_run(folder, best),
    )  # fmt: skip
    rows = _csv(summary, records)
    write_json(report / "results.json", {**summary, "records": records})
    write_text(report / "results.csv", rows)
    write_text(report / "index.html", page)
    return summary


def _read_study(folder: Path) -> JSON:
    """Contents of study.toml."""
    path = folder / STUDY
    try:
        about = toml_of(text_in(path))
        _StudyFile.model_validate(about)
        return about
    except FileNotFoundError as error:
        message = f"{folder} holds no study ({STUDY} is missing)"
        raise TutelageError(message, "create one with `tutelage compare`") from error
    except (OSError, ValueError) as error:  # no file, no text, no TOML
        why = getattr(error, "strerror", None) or error
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        hint = "run the study's `tutelage compare` again: it rewrites the file, and finished runs count as done"
        raise TutelageError(f"{path} is not as `tutelage compare` wrote it ({why})", hint) from error


def answer(cells: list[Cell], budget: int, best: Cell, references: dict[int, Reference]) -> str:
    """Summarise the study in a sentence: the best method, its lead over scratch and over the next method, and the teacher."""
    mean, deviation = best.accuracy
    words, baseline = best.words, _scratch(cells, budget, best)
    text = f"With {budget} {words.labels}, {best.method} {words.phrase.format(100 * mean)}"
    text = f"{text.removesuffix(' %')} ± {100 * deviation:.1f} %" if deviation is not None else text
    text += f" {words.over} {best.counts.shape[1]:,} test images"
    if baseline is not None and (gain := compared(best, baseline)):
        text += f", {100 * gain.mean:.1f} points more than scratch, the same student trained on the labels only"
    second = _second(cells, budget, best)
    if second is not None and second is not baseline and (gain := compared(best, second)):
        text += f"; next is {second.method}, {100 * gain.mean:.1f} points behind"
    if budget in references:
        text += f"; the adapted teacher {words.phrase.format(100 * references[budget].accuracy[0])}"
    return text + "."


def sureness(cells: list[Cell], budget: int, best: Cell) -> str:
    """State how certain the answer is: number of seeds, and intervals and p-values of its differences."""
    count = len(best.records)
    text = [f"Mean of {count} seeds, ± one standard deviation" if count > 1 else "One seed: no spread"]
    baseline, second = _scratch(cells, budget, best), _second(cells, budget, best)
    for other in (baseline, None if second is baseline else second):
        if other is not None and (gain := compared(best, other)):
            sure = f"; p = {gain.p:.2g} over {gain.seeds} seeds" if gain.p is not None else ""
            points = f"{100 * gain.low:.1f} to {100 * gain.high:.1f} points"
            text.append(f"ahead of {other.method} by {points} (95 % interval over test images{sure})")
    return "; ".join(text) + "."


def _others(cells: list[Cell], budget: int, best: Cell) -> list[Cell]:
    return [cell for cell in cells if cell.budget == budget and cell is not best]


def _second(cells: list[Cell], budget: int, best: Cell) -> Cell | None:
    """The second-best method of this budget, where `best` is the best."""
    return max(_others(cells, budget, best), key=lambda cell: cell.accuracy[0], default=None)


def _scratch(cells: list[Cell], budget: int, best: Cell) -> Cell | None:
    """The labels-only student at this budget, to compare with the best method; no variant, as that may be a different student."""
    return next((cell for cell in _others(cells, budget, best) if cell.method == "scratch"), None)


def _charts(cells: list[Cell], budget: int, best: Cell, references: dict[int, Reference]) -> list[JSON]:
    """The charts for which the records hold the numbers."""
    words, methods = best.words, list(dict.fromkeys(cell.method for cell in cells))
    name, found = words.title.capitalize() if words.title.islower() else words.title, []
    if len({cell.budget for cell in cells}) > 1:
        lines = {method: {cell.budget: cell.accuracy for cell in cells if cell.method == method} for method in methods}
        teacher = {amount: one.accuracy for amount, one in references.items()}
        picture = study_charts.against_labels(lines, teacher, words.labels, words.title)
        note = "Mean over seeds; bands are one standard deviation."
        found.append({"title": f"{name} against {words.labels}", "svg": picture, "note": note})
    here = {cell.method: (cell.cost["flops"], *cell.accuracy) for cell in cells if cell.budget == budget}
    costs = {method: one for method, one in here.items() if one[0] > 0}
    if len(costs) > 1:
        reference = references[budget].accuracy[0] if budget in references else None
        picture = study_charts.against_compute(costs, methods, reference, words.title)
        note = f"{budget} {words.labels}; bars are one standard deviation over seeds. Training only: forward and backward, "
        note += "including the teacher's adaptation and outputs."
        found.append({"title": f"{name} against compute", "svg": picture, "note": note})
    return found + _class_charts(cells, budget, best, references)


def _class_charts(cells: list[Cell], budget: int, best: Cell, references: dict[int, Reference]) -> list[JSON]:
    """Charts of scores by class, confusions and calibration, for the best method, the labels-only student and the teacher."""
    classes, (title, score) = next(iter(best.records.values()))["classes"], best.words.each
    names = {"student": best.method, "baseline": "scratch", "teacher": TITLES["teacher"]}
    baseline = _scratch(cells, budget, best)
    tests = {
        "student": [record["student"]["test"] for record in best.records.values()],
        "baseline": [record["student"]["test"] for record in baseline.records.values()] if baseline else [],
        "teacher": references[budget].tests if budget in references else [],
    }
    each: JSON = {model: results_table.mean_of_each(of, score) for model, of in tests.items() if of}
    note = "Mean over seeds. The weakest classes first."
    if without := [name for name, value in zip(classes, each["student"], strict=True) if value is None]:
        note += f" Without test images: {', '.join(without)}."
    found = [{"title": title, "svg": charts.per_class(classes, each, title, names), "note": note}]
    titles = {"student": best.method, "teacher": "the adapted teacher"}
    for model in (model for model in titles if tests[model]):
        counts = np.sum([test["confusion"] for test in tests[model]], axis=0).tolist()
        found.append(charts.confusions(classes, counts, model, score == "iou", titles, " All seeds."))
    if bins := charts.pooled([record.get("calibration") or {} for record in best.records.values()]):
        found.append(charts.calibrations(bins, names, " All seeds."))
    return found


def _of_a_run(folder: Path, best: Cell) -> JSON:
    """What the page shows of the best method's first seed: its record's findings, and pictures if its run folder still exists."""
    seed = min(best.records)
    run = folder / folder_name(best.method) / f"budget-{best.budget}" / f"seed-{seed}"
    which = f"{best.method}, budget {best.budget}, seed {seed}"
    found = {"shown": which, "findings": best.records[seed].get("findings", [])}
    stages = Run(run).results()
    if not stages["evaluate"]:
        return {**found, "montage": "", "transfer_set": "", "disagreements": [], "pictures": {}, "elsewhere": True}
    classes, apart = stages["evaluate"]["classes"], read_evidence(run / "evaluate")[2]
    return {
        **found,
        "montage": montage(run / "curate" / "montage.jpg"),
        "transfer_set": transfer_set(stages["curate"]),
        "disagreements": [disagreement(one, classes) for one in apart],
        "pictures": read_pictures(run / "evaluate", classes),
        "elsewhere": False,
    }


def _facts(about: JSON, records: list[Record]) -> list[tuple[str, object]]:
    """Rows (name, value) of models, data, versions and settings."""
    found: list[tuple[str, object]] = []
    for one in {one["hash"]: one for record in records if (one := record.get("teacher_weights"))}.values():
        size = "x".join(map(str, one["size"])) if isinstance(one["size"], list) else one["size"]
        name = f"{one['name']} at {size} px, {one['weights']} ({one['licence']}), SHA-256 {one['hash'][:16]}…"
        found.append(("teacher", name))
    students = (record["student"] for record in records)
    found += dict.fromkeys(("student", f"{one['name']}, {one['parameters']:,} parameters") for one in students)
    data = sorted({record["data"][:12] for record in records})
    found.append(("transfer sets", f"{len(data)}, SHA-256 {', '.join(data)}"))
    found.append(("test images", f"{records[0]['test_images']:,}, SHA-256 {records[0]['test'][:12]}"))
    versions = {", ".join(f"{name} {value}" for name, value in record["versions"].items()) for record in records}
    found += [("versions", one) for one in sorted(versions)]
    found.append(("seeds", ", ".join(str(seed) for seed in about["study"]["seeds"])))
    return found + rows_of({k: v for k, v in about["settings"].items() if v not in ("default", False)})


def _csv(summary: JSON, records: list[Record]) -> str:
    """Every number of the study, one per line: the table (no seed), then the scores, cost of each run and of its stages."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(("method", "budget", "seed", "model", "score", "class", "value"))
    for row in summary["table"]:
        for name in ("score", "spread", "seeds", "behind", "low", "high", "p"):
            if row[name] is not None:
                writer.writerow((row["method"], row["budget"], "", "student", f"table: {name}", "", row[name]))
    for record in records:
        head = (record["method"], record["budget"], record["seed"])
        writer.writerows((*head, *line) for line in _numbers(record))
    return out.getvalue()


def _numbers(record: Record) -> Iterator[tuple[object, ...]]:
    """Yield (model or stage, score, class, value) of one run."""
    classes = record["classes"]
    for model in ("student", "teacher"):
        one = record[model] or {}
        flat = {**{k: v for k, v in one.items() if not isinstance(v, dict)}, **one.get("test", {})}
        for name, value in flat.items():
            if name == "confusion":
                for truth, row in zip(classes, value, strict=True):
                    yield from ((model, name, f"{truth} -> {klass}", n) for klass, n in zip(classes, row, strict=True))
            else:
                each = zip(classes, value, strict=True) if isinstance(value, list) else [("", value)]
                yield from ((model, name, klass, share) for klass, share in each)
    yield from (("run", name, "", value) for name, value in cost_of(record).items())
    for stage, entry in record["compute_cost"].items():
        flat = {**entry, **{f"teacher_{name}": value for name, value in entry["teacher"].items()}}
        kept = {name: value for name, value in flat.items() if isinstance(value, int | float)}
        yield from ((f"stage {stage}", name, "", value) for name, value in kept.items())
