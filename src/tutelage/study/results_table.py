"""A study's records as a table: methods by budget, means over seeds, differences and their certainty. Loads no torch."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tutelage.errors import TutelageError
from tutelage.files import hash_of, read_json
from tutelage.json_object import JSON
from tutelage.reporting.cost import cost_of
from tutelage.reporting.scores import CLASSES, MetricSpec, main_score, words_of
from tutelage.run_folder import folder_name
from tutelage.study.statistics import Difference, difference, redrawn, spread

Record = JSON  # of a finished run, as `records.write_record` makes it; records of earlier versions lack some entries


@dataclass(frozen=True, eq=False)
class Cell:
    """All seeds of one method at one budget. records: by seed. counts: (S, n, ...) of `counts_in`, seeds ascending.
    drawn: (R, S, ...), mean counts over R resamplings of the test images."""

    method: str
    budget: int
    records: dict[int, Record]
    counts: np.ndarray = field(repr=False)
    drawn: np.ndarray = field(repr=False)

    @property
    def accuracy(self) -> tuple[float, float | None]:
        """Mean and standard deviation of the main score over seeds."""
        return spread([main_score(record["student"]["test"]) for record in self.records.values()])

    @property
    def cost(self) -> dict[str, float]:
        """Cost of a run as in `cost_of`, mean over seeds."""
        costs = [cost_of(record) for record in self.records.values()]
        return {name: float(np.mean([one[name] for one in costs])) for name in costs[0]}

    @property
    def words(self) -> MetricSpec:
        """The metric of its scores and how reports word it."""
        return words_of(next(iter(self.records.values()))["student"]["test"])


@dataclass(frozen=True)
class Reference:
    """The adapted teachers of one budget, shown for reference. tests: test scores, one for each seed and set of weights."""

    budget: int
    tests: list[JSON]

    @property
    def accuracy(self) -> tuple[float, float | None]:
        """Mean and standard deviation of the main score."""
        return spread([main_score(test) for test in self.tests])


def record_name(method: str, budget: int, seed: int) -> str:
    """Name of a run's record: METHOD-budget-N-seed-N."""
    return f"{folder_name(method)}-budget-{budget}-seed-{seed}"


def read_records(folder: Path, plan: list[str]) -> list[Record]:
    """Read the records of the planned runs that are finished.

    Raises:
        TutelageError: a record cannot be read, or runs were scored on different test images.
    """
    found = [record for name in plan if (record := read_record(folder / f"{name}.json"))]
    if len({record["test"] for record in found}) > 1:
        odd = next(one for one in found if one["test"] != found[0]["test"])
        message = f"{folder}: {odd['method']}, budget {odd['budget']}, seed {odd['seed']} was scored on other test images than the others"
        raise TutelageError(message, "use another --results (and --out) for each set of test images")
    return found


def read_record(path: Path) -> Record | None:
    """Read the record of a finished run; None if there is none.

    Raises:
        TutelageError: it is not valid JSON, or of a version that did not keep the results by test image.
    """
    try:
        record = read_json(path)
    except TutelageError as error:
        message = f"{path}, the record of a finished run, is not valid JSON ({error.__cause__})"
        raise TutelageError(message, "remove it, and it is computed again") from error
    if record is not None and (why := _fault(record, path.stem)):
        raise TutelageError(f"{path} is not the record of that run: {why}", "remove it, and it is computed again")
    return record


def _fault(record: Record, name: str) -> str:
    """Return what is wrong with a record that was changed, copied or made by another version; an empty text for a whole one."""
    if not {"right", "pixels"} & record.keys():
        return "it is of another version, without the student's result on each test image"
    try:
        if record_name(record["method"], record["budget"], record["seed"]) != name:
            return f"it is of {record['method']}, budget {record['budget']}, seed {record['seed']}"
        main_score(record["student"]["test"])
        counts = counts_in(record)
        if len(counts) != record["test_images"]:
            return f"it has results of {len(counts)} test images, not of {record['test_images']}"
    except (KeyError, TypeError, ValueError, AttributeError, zlib.error) as error:
        return f"it is damaged ({type(error).__name__}: {error})"
    without = {key: value for key, value in record.items() if key != "hash"}
    return "" if record.get("hash", hash_of(without)) == hash_of(without) else "it was changed after it was written"


def cells_of(records: Iterable[Record], methods: list[str]) -> list[Cell]:
    """Group records by method and budget; sorted by budget, then in the order of `methods`."""
    sorted_in: dict[tuple[str, int], dict[int, Record]] = {}
    for record in records:
        sorted_in.setdefault((record["method"], record["budget"]), {})[record["seed"]] = record
    counts = [np.array([counts_in(record) for _, record in sorted(of.items())]) for of in sorted_in.values()]
    every = zip(sorted_in.items(), counts, redrawn(counts), strict=True)
    cells = [Cell(method, budget, of, each, drawn) for ((method, budget), of), each, drawn in every]
    return sorted(cells, key=lambda cell: (cell.budget, methods.index(cell.method)))


def counts_in(record: Record) -> np.ndarray:
    """Decode the result of the run's student on each of n test images.

    Returns:
        (n,) bool, whether it is right; or (n, C, 3) int32, pixels labelled as a class, predicted as it, and both.
    """
    if "pixels" in record:
        numbers = np.frombuffer(zlib.decompress(base64.b64decode(record["pixels"])), np.int32)
        return numbers.reshape(record["test_images"], -1, 3)
    bits = np.frombuffer(base64.b64decode(record["right"]), np.uint8)
    return np.unpackbits(bits)[: record["test_images"]].astype(bool)


def references_of(cells: Iterable[Cell]) -> dict[int, Reference]:
    """The adapted teachers of all methods by budget: one for each seed and set of weights."""
    found: dict[int, dict[tuple[int, str], JSON]] = {}
    for cell in cells:
        for seed, record in cell.records.items():
            if record["teacher"]:
                found.setdefault(cell.budget, {})[seed, record["teacher_weights"]["hash"]] = record["teacher"]["test"]
    return {budget: Reference(budget, list(of.values())) for budget, of in sorted(found.items())}


def main_budget(cells: list[Cell]) -> int:
    """The budget with the most methods; of several such budgets the smallest."""
    budgets = [cell.budget for cell in cells]
    return max(sorted(set(budgets)), key=budgets.count)


def compared(first: Cell, second: Cell) -> Difference | None:
    """The difference of two methods over the seeds that both have; None if they share no seed."""
    seeds = [seed for seed in sorted(first.records) if seed in second.records]
    if not seeds:
        return None
    one, other = ([sorted(cell.records).index(seed) for seed in seeds] for cell in (first, second))
    drawn = first.drawn[:, one], second.drawn[:, other]
    return difference(first.counts[one], second.counts[other], first.words.score, drawn)


def rows(cells: list[Cell], budget: int) -> tuple[list[JSON], Cell]:
    """Return the table, a row for each method and budget, and the best method of the main budget `budget`."""
    found, winner = [], None
    for amount in sorted({cell.budget for cell in cells}):
        mine = [cell for cell in cells if cell.budget == amount]
        best = max(mine, key=lambda cell: cell.accuracy[0])
        winner = best if amount == budget else winner
        for cell in mine:
            mean, deviation = cell.accuracy
            behind = None if cell is best else compared(best, cell)
            one = next(iter(cell.records.values()))
            found.append({
                "method": cell.method, "budget": amount, "seeds": len(cell.records), cell.words.main: mean, "score": mean,
                "spread": deviation,
                **means_beside([record["student"]["test"] for record in cell.records.values()]),
                "best": cell is best, "level": cell is best or (behind is not None and not behind.sure),
                "behind": None if behind is None else behind.mean, "low": behind and behind.low, "high": behind and behind.high,
                "p": behind and behind.p, "flops": cell.cost["flops"], "images_seen": one["images_seen"], "description": one["description"],
                "initialisation": one["student"]["initialisation"],
            })  # fmt: skip
    assert winner is not None
    return found, winner


def reference_rows(references: dict[int, Reference]) -> list[JSON]:
    """Rows of the table for the adapted teachers."""
    return [
        {
            "budget": budget,
            "seeds": len(one.tests),
            "score": one.accuracy[0],
            "spread": one.accuracy[1],
            **means_beside(one.tests),
        }
        for budget, one in references.items()
    ]


def beside(test: JSON) -> tuple[tuple[str, str], ...]:
    """(title, score) of the two columns shown beside the main score."""
    every = words_of(test).table
    return (every[1], every[3]) if words_of(test) is CLASSES else every[2:4]


def means_beside(tests: list[JSON]) -> dict[str, float]:
    """Mean of each score of `beside`."""
    return {name: spread([test[name] for test in tests])[0] for _, name in beside(tests[0])}


def mean_of_each(tests: list[JSON], score: str) -> list[float | None]:
    """Mean of a per-class score over several evaluations; None for a class without test images."""
    return [None if of[0] is None else float(np.mean(of)) for of in zip(*(test[score] for test in tests), strict=True)]
