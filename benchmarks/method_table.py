"""Records of benchmarks/method.py as a table in Markdown: python benchmarks/method_table.py docs/results/method [--against scratch paper]

Accuracy, of masks mean IoU, of ham10k balanced accuracy: mean and standard deviation over the seeds. The last columns are paired by
seed: --of minus another method, mean and standard error, in points.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

MAIN = {"ham10k": "balanced_accuracy"}


def read(folder: Path, metric: str) -> dict[str, dict[int, float]]:
    """method -> seed -> score on test images, with those of teacher and committee from the method's records that have them."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        seed = int(path.stem.rpartition("-")[2])
        if "method" not in record:  # of the demo, as it prints it
            models = {"task-oriented": record["distilled"], "scratch": record["baseline"]}
            models |= {name: record.get(name) for name in ("teacher", "committee")}
        else:
            models = {record["method"]: record.get("student")}
        if record.get("method") == "task-oriented":
            models |= {"teacher": record["teacher"], "committee": (record.get("committee") or {}).get("scores")}
        for name, model in models.items():
            if test := (model or {}).get("test"):
                found[name][seed] = test["miou"] if "miou" in test else test[metric]
    return found


def spread(values: list[float]) -> str:
    """Mean and standard deviation of shares."""
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


def paired(one: dict[int, float], other: dict[int, float]) -> str:
    """Mean difference in points over the seeds that both have, and its standard error."""
    points = [100 * (one[seed] - other[seed]) for seed in sorted(one.keys() & other.keys())]
    error = f" ± {np.std(points, ddof=1) / len(points) ** 0.5:.1f}" if len(points) > 1 else ""
    return f"{np.mean(points):+.1f}{error}" if points else ""


def table(results: Path, of: str, against: Sequence[str]) -> list[str]:
    """The lines of the table: scores of both, of teacher and committee, and what `of` gains over each of the others."""
    names = [*against, of, "teacher", "committee"]
    lines = [
        f"| set | seeds | {' | '.join([*names, *(f'{of} - {one}' for one in against)])} |",
        f"|{' --- |' * (2 + len(names) + len(against))}",
    ]
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        found = read(folder, MAIN.get(folder.name, "accuracy"))
        if of in found and all(one in found for one in against):
            scores = [spread(list(found[one].values())) if one in found else "" for one in names]
            gains = [paired(found[of], found[one]) for one in against]
            lines.append(f"| {folder.name} | {len(found[of])} | {' | '.join([*scores, *gains])} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--of", default="task-oriented")
    parser.add_argument("--against", nargs="*", default=["scratch", "paper"])
    given = parser.parse_args()
    print("\n".join(table(given.results, given.of, given.against)))


if __name__ == "__main__":
    main()
