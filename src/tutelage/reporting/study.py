"""The page of a study, from the records of its runs: which arm, on how many labels, for what compute. No torch."""

from __future__ import annotations

import base64
import csv
import io
import shlex
import tomllib
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader

from tutelage.errors import TutelageError
from tutelage.reporting import charts, study_charts
from tutelage.reporting.diagnosis import diagnose
from tutelage.reporting.evidence import read_evidence, read_pictures
from tutelage.reporting.ledger import bill, shares
from tutelage.reporting.page import disagreement, montage, transfer_set
from tutelage.reporting.scores import CLASSES, Words, main_score, words_of
from tutelage.reporting.statistics import Difference, difference, spread
from tutelage.reporting.table import TITLES
from tutelage.runs import STUDY, Run, folder_name, read_json, write_json, write_text
from tutelage.version import __version__

Record = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """All seeds of one arm at one budget. records: by seed. counts: (S, n, ...) of `counts_in`, in the order of the seeds."""

    arm: str
    budget: int
    records: dict[int, Record]
    counts: np.ndarray = field(repr=False)

    @property
    def accuracy(self) -> tuple[float, float | None]:
        """Mean and standard deviation over seeds."""
        return spread([main_score(record["student"]["test"]) for record in self.records.values()])

    @property
    def flops(self) -> float:
        """Mean FLOPs of a run, the teacher's counted."""
        return float(np.mean([bill(record)["flops"] for record in self.records.values()]))


def write_study(folder: Path) -> dict[str, Any]:
    """Write report/index.html, results.json and results.csv of a study.

    Returns:
        {"study", "page", "runs", "failed", "table", "shared"}.

    Raises:
        TutelageError: no study, or none of its runs is finished.
    """
    try:
        about = tomllib.loads((folder / STUDY).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise TutelageError(
            f"{folder}: no {STUDY} in it", "the folder of a study", "tutelage compare makes one"
        ) from error
    study, report = about["study"], folder / "report"
    failed = dict(reason.split(": ", 1) for reason in study["failed"])
    records = read_records(Path(study["results"] or folder / "results"), study["plan"])
    if not records:
        raise TutelageError(
            f"{folder}: no run of the study is finished", "one at least", "give the command of the study again"
        )
    cells = cells_of(records, study["arms"])
    budget = main_budget(cells)
    table, best = rows(cells, budget)
    summary = {
        "study": str(folder), "page": str(report / "index.html"), "failed": failed, "table": table, "shared": shares(records),
        "runs": [{"arm": one["arm"], "budget": one["budget"], "seed": one["seed"], **_main(one["student"]["test"])}
                 for one in records],
    }  # fmt: skip
    environment = Environment(loader=PackageLoader("tutelage", "reporting"), autoescape=True)
    page = environment.get_template("study.html.j2").render(
        title=folder.resolve().name, answer=answer(cells, budget, best), budget=budget, table=table, failed=failed,
        charts=_charts(cells, budget, best), bills=[_bill_row(cell) for cell in cells if cell.budget == budget],
        shared=summary["shared"], command=_command(about), facts=_facts(about, records), version=__version__,
        tests=records[0]["test_images"], words=_words(cells), more=beside(records[0]["student"]["test"]),
        **_of_a_run(folder, best),
    )  # fmt: skip
    write_json(report / "results.json", {**summary, "records": records})
    write_text(report / "results.csv", _csv(records))
    write_text(report / "index.html", page)
    return summary


def read_records(folder: Path, plan: list[str]) -> list[Record]:
    """The records of the planned runs that are finished.

    Raises:
        TutelageError: they were not scored on the same test images.
    """
    found = [record for name in plan if (record := read_json(folder / f"{name}.json"))]
    if len({record["test"] for record in found}) > 1:
        odd = next(one for one in found if one["test"] != found[0]["test"])
        given = f"{folder}: {odd['arm']}, budget {odd['budget']}, seed {odd['seed']} was scored on other test images than the first run"
        raise TutelageError(given, "results of one set of test images", "another --results (and --out)")
    return found


def cells_of(records: Iterable[Record], arms: list[str]) -> list[Cell]:
    """Records by arm and budget."""
    sorted_in: dict[tuple[str, int], dict[int, Record]] = {}
    for record in records:
        sorted_in.setdefault((record["arm"], record["budget"]), {})[record["seed"]] = record
    cells = [
        Cell(arm, budget, of, np.array([counts_in(record) for _, record in sorted(of.items())]))
        for (arm, budget), of in sorted_in.items()
    ]
    return sorted(cells, key=lambda cell: (cell.budget, arms.index(cell.arm)))


def counts_in(record: Record) -> np.ndarray:
    """What the run's student does on each of n test images.

    Returns:
        (n,) bool, whether it is right; or (n, C, 3) int32, pixels labelled as a class, decided for it, and both.
    """
    if "pixels" in record:
        numbers = np.frombuffer(zlib.decompress(base64.b64decode(record["pixels"])), np.int32)
        return numbers.reshape(record["test_images"], -1, 3)
    bits = np.frombuffer(base64.b64decode(record["right"]), np.uint8)
    return np.unpackbits(bits)[: record["test_images"]].astype(bool)


def main_budget(cells: list[Cell]) -> int:
    """The budget with most arms; of several the smallest."""
    budgets = [cell.budget for cell in cells]
    return max(sorted(set(budgets)), key=budgets.count)


def compared(first: Cell, second: Cell) -> Difference | None:
    """The difference of two arms over the seeds that both have; None where there is none."""
    seeds = [seed for seed in sorted(first.records) if seed in second.records]
    if not seeds:
        return None
    pick = [[sorted(cell.records).index(seed) for seed in seeds] for cell in (first, second)]
    return difference(first.counts[pick[0]], second.counts[pick[1]], _words([first]).score)


def rows(cells: list[Cell], budget: int) -> tuple[list[dict[str, Any]], Cell]:
    """The table, a row for each arm and budget, and the best arm of the main budget."""
    found, winner = [], None
    for amount in sorted({cell.budget for cell in cells}):
        mine = [cell for cell in cells if cell.budget == amount]
        best = max(mine, key=lambda cell: cell.accuracy[0])
        winner = best if amount == budget else winner
        for cell in mine:
            mean, deviation = cell.accuracy
            behind = None if cell is best else compared(best, cell)
            one = next(iter(cell.records.values()))
            words, more = words_of(one["student"]["test"]), beside(one["student"]["test"])
            found.append({
                "arm": cell.arm, "budget": amount, "seeds": len(cell.records), words.main: mean, "score": mean, "spread": deviation,
                **{name: spread([r["student"]["test"][name] for r in cell.records.values()])[0] for _, name in more},
                "best": cell is best, "level": cell is best or (behind is not None and not behind.sure),
                "behind": None if behind is None else behind.mean, "low": behind and behind.low, "high": behind and behind.high,
                "p": behind and behind.p, "flops": cell.flops, "images_seen": one["images_seen"], "says": one["says"],
                "initialisation": one["student"]["initialisation"],
            })  # fmt: skip
    assert winner is not None
    return found, winner


def answer(cells: list[Cell], budget: int, best: Cell) -> str:
    """What came out, in a sentence or two."""
    mean, deviation = best.accuracy
    words = _words(cells)
    said = f"With {budget} {words.labels}, {best.arm} {words.says.format(100 * mean)}"
    said = f"{said.removesuffix(' %')} ± {100 * deviation:.1f} %" if deviation is not None else said
    said += f" of {best.counts.shape[1]:,} test images (mean of {len(best.records)} seeds)" if len(best.records) > 1 else (
        f" of {best.counts.shape[1]:,} test images (one seed: no spread)"
    )  # fmt: skip
    others, alone = (
        [cell for cell in cells if cell.budget == budget and cell is not best],
        _scratch(cells, budget, best),
    )
    if alone is not None and (gain := compared(best, alone)):
        said += f", {100 * gain.mean:.1f} points more than scratch, the same student trained on the labels alone ({_sureness(gain)})"
    second = max(others, key=lambda cell: cell.accuracy[0], default=None)
    if second is not None and second is not alone and (gain := compared(best, second)):
        said += f"; next is {second.arm}, {100 * gain.mean:.1f} points behind ({_sureness(gain)})"
    teachers = [main_score(record["teacher"]["test"]) for record in best.records.values() if record["teacher"]]
    if teachers:
        said += f"; its teacher {words.says.format(100 * spread(teachers)[0])}"
    return said + "."


def _scratch(cells: list[Cell], budget: int, best: Cell) -> Cell | None:
    """The student alone at this budget, to be compared with the best; not a variant, which may be another student."""
    return next((cell for cell in cells if cell.budget == budget and cell.arm == "scratch" and cell is not best), None)


def _words(cells: list[Cell]) -> Words:
    """How this study's scores are said."""
    return words_of(next(iter(cells[0].records.values()))["student"]["test"])


def _main(test: dict[str, Any]) -> dict[str, float]:
    """Accuracy, or the score that counts beside it."""
    words = words_of(test)
    return {name: test[name] for name in dict.fromkeys((words.main, "accuracy"))}


def beside(test: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """(title, score) of two columns beside the main score."""
    every = words_of(test).table
    return (every[1], every[3]) if words_of(test) is CLASSES else every[2:4]


def _sureness(gain: Difference) -> str:
    """The interval and the test in words."""
    said = f"95 % interval over test images {100 * gain.low:.1f} to {100 * gain.high:.1f}"
    return said + (f", p = {gain.p:.2g} over {gain.seeds} seeds" if gain.p is not None else "")


def _charts(cells: list[Cell], budget: int, best: Cell) -> list[dict[str, Any]]:
    found = []
    arms = list(dict.fromkeys(cell.arm for cell in cells))
    lines = {arm: {cell.budget: cell.accuracy for cell in cells if cell.arm == arm} for arm in arms}
    teachers: dict[int, dict[tuple[int, str], float]] = {}  # one for each seed, however many arms it teaches
    for cell in cells:
        for seed, record in cell.records.items():
            if record["teacher"]:
                key = (seed, record["teacher_weights"]["hash"])
                teachers.setdefault(cell.budget, {})[key] = main_score(record["teacher"]["test"])
    teacher = {budget: list(of.values()) for budget, of in teachers.items()}
    if len({cell.budget for cell in cells}) > 1:
        picture = study_charts.against_labels(
            lines, {amount: spread(values) for amount, values in teacher.items()}, _words(cells).labels
        )
        note = "Mean over seeds; bands are one standard deviation."
        found.append({"title": "Accuracy against labels", "svg": picture, "note": note})
    costs = {cell.arm: (cell.flops, cell.accuracy[0]) for cell in cells if cell.budget == budget and cell.flops > 0}
    if len(costs) > 1:
        note = f"{budget} {_words(cells).labels}. Training alone: forward and backward, the teacher's adaptation and outputs counted."
        found.append(
            {"title": "Accuracy against compute", "svg": study_charts.against_compute(costs, arms), "note": note}
        )
    classes, one = next(iter(best.records.values()))["classes"], next(iter(best.records.values()))
    title, score = _words(cells).each
    recall: dict[str, Any] = {"student": _mean_recall(best, score)}
    alone = _scratch(cells, budget, best)
    if alone is not None:
        recall["alone"] = _mean_recall(alone, score)
    if one["teacher"]:
        recall["teacher"] = one["teacher"]["test"][score]
    names = {**TITLES, "student": best.arm, "alone": "scratch"}
    found.append(
        {
            "title": title,
            "svg": charts.per_class(classes, recall, title, names),
            "note": "Mean over seeds. The weakest classes first.",
        }
    )
    if len(classes) <= charts.CELLS_SHOWN:
        counts = sum(np.array(record["student"]["test"]["confusion"]) for record in best.records.values())
        picture = charts.matrix(classes, np.asarray(counts).tolist(), "student", score == "iou", names)
        note = f"{best.arm}, all seeds. Rows: what the images show. Columns: what the student says."
        found.append({"title": "What the best student takes for what", "svg": picture, "note": note})
    return found


def _mean_recall(cell: Cell, score: str) -> list[float | None]:
    """A score of each class, mean over seeds; None where a class has no test image."""
    every = [record["student"]["test"][score] for record in cell.records.values()]
    return [None if of[0] is None else float(np.mean(of)) for of in zip(*every, strict=True)]


def _bill_row(cell: Cell) -> dict[str, Any]:
    """What one arm cost, mean over seeds."""
    bills = [bill(record) for record in cell.records.values()]
    return {"arm": cell.arm, **{name: float(np.mean([one[name] for one in bills])) for name in bills[0]}}


def _of_a_run(folder: Path, best: Cell) -> dict[str, Any]:
    """What the page shows of the best arm's first run, where its folder is still there."""
    seed = min(best.records)
    run = folder / folder_name(best.arm) / f"budget-{best.budget}" / f"seed-{seed}"
    stages = Run(run).results()
    if not stages["report"]:
        return {
            "findings": [],
            "montage": "",
            "transfer_set": "",
            "disagreements": [],
            "calibration": "",
            "pictures": {},
        }
    labels, probabilities, apart = read_evidence(run / "report")
    classes = stages["report"]["classes"]
    return {
        "findings": diagnose(stages["report"], stages), "montage": montage(run / "transfer_set" / "montage.jpg"),
        "transfer_set": transfer_set(stages["transfer_set"]), "disagreements": [disagreement(one, classes) for one in apart],
        "pictures": read_pictures(run / "report", classes),
        "calibration": charts.calibration(labels, probabilities, names=dict.fromkeys(TITLES, best.arm)) if probabilities else "",
        "shown": f"{best.arm}, budget {best.budget}, seed {seed}",
    }  # fmt: skip


def _command(about: dict[str, Any]) -> str:
    """The command that makes the study again."""
    words = ["tutelage", "compare"]
    study = {name: about["study"][name] for name in ("arms", "budgets", "seeds", "set", "match")}
    for name, value in [*study.items(), *about["settings"].items()]:
        if value is not False and value not in ("default", []) and name not in ("json", "config"):
            words += [
                "--" + name.replace("_", "-"),
                *([str(v) for v in value] if isinstance(value, list) else [str(value)]),
            ]
    return shlex.join(words)


def _facts(about: dict[str, Any], records: list[Record]) -> list[tuple[str, Any]]:
    """Models, data, versions."""
    found: list[tuple[str, Any]] = []
    teacher = next((record["teacher_weights"] for record in records if record.get("teacher_weights")), None)
    if teacher:
        found.append(
            ("teacher", f"{teacher['name']} at {teacher['size']} px, {teacher['weights']} ({teacher['licence']})")
        )
        found.append(("its weights", f"SHA-256 {teacher['hash'][:16]}…"))
    student = records[0]["student"]
    found.append(("student", f"{student['name']}, {student['parameters']:,} parameters"))
    data = sorted({record["data"][:12] for record in records})
    found.append(("data", f"SHA-256 of {len(data)} transfer sets, {', '.join(data[:4])}{'…' if len(data) > 4 else ''}"))
    versions = sorted(
        {", ".join(f"{name} {value}" for name, value in record["versions"].items()) for record in records}
    )
    found += [("versions", one) for one in versions]
    found.append(("seeds", ", ".join(str(seed) for seed in about["study"]["seeds"])))
    return found


def _csv(records: list[Record]) -> str:
    """Every number of every run, a line each."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(("arm", "budget", "seed", "model", "score", "class", "value"))
    for record in records:
        for model in ("student", "teacher"):
            one = record[model] or {}
            flat = {**{k: v for k, v in one.items() if not isinstance(v, dict)}, **one.get("test", {})}
            if model == "student":
                flat |= bill(record)
            for name, value in flat.items():
                head = (record["arm"], record["budget"], record["seed"], model, name)
                if name == "recall":
                    writer.writerows(
                        (*head, klass, share) for klass, share in zip(record["classes"], value, strict=True)
                    )
                elif not isinstance(value, list):
                    writer.writerow((*head, "", value))
    return out.getvalue()
