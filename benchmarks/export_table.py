"""Size, agreement and speed of exports: python benchmarks/export_table.py RUN [RUN ...] --out docs/results/export

Exports each run (about a minute), then times them all, writes OUT/STUDENT.json and prints one line of Markdown a run. Times of one run are
taken in turn, so their ratios hold on a busy machine; give it rest all the same while it says so.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import tutelage
from tutelage.deploy.runtime import FLOAT, INT8, checked

EAGER = "PyTorch eager"
HEAD = (
    "| student | score | float: difference, decisions | int8: score, decisions | float layers in int8 | MB float, int8 | ratio "
    "| ms eager, float, int8 | float is faster than eager | than int8 |"
)  # fmt: skip


def measured(run: Path, exported: dict[str, Any]) -> dict[str, Any]:
    """What is kept of one export, with its times."""
    return {
        "student": exported["student"]["name"], "size": exported["size"],
        **{name: exported[name] for name in ("proof", "int8", "recommended", "machine", "versions")},
        "benchmark": tutelage.benchmark(run=run).to_json(),
    }  # fmt: skip


def line(one: dict[str, Any]) -> str:
    """One row of the table; times of batch 1 and one thread."""
    files, float_, int8 = one["proof"]["files"], one["proof"]["files"][FLOAT], one["proof"]["files"][INT8]
    ms = {
        r["model"]: r["median_ms"]
        for r in one["benchmark"]["rows"]
        if r["batch"] == 1 and r["threads"] == 1 and r["device"] == "cpu"
    }
    kept = one["int8"]["kept_float"]
    return (
        f"| {one['student']}, {one['size']} px | {float_['score']:.4f} | {float_['difference']:.0e}, {100 * float_['agreement']:.1f} % "
        f"| {int8['score']:.4f}, {100 * int8['agreement']:.1f} % | {len(kept)} of {one['int8']['layers']} "
        f"| {files[FLOAT]['bytes'] / 1e6:.2f}, {files[INT8]['bytes'] / 1e6:.2f} | {files[INT8]['bytes'] / files[FLOAT]['bytes']:.3f} "
        f"| {ms[EAGER]:.2f}, {ms[FLOAT]:.2f}, {ms[INT8]:.2f} | {ms[EAGER] / ms[FLOAT]:.1f} | {ms[INT8] / ms[FLOAT]:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--kept", action="store_true", help="time the exports that are there")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    exported = {
        run: checked(run / "export") if given.kept else tutelage.export(run=run, cache=given.cache).to_json()
        for run in given.runs
    }
    print("timing", file=sys.stderr, flush=True)
    print(HEAD + "\n" + "|" + " --- |" * (HEAD.count("|") - 1))
    for run, about in exported.items():
        one = measured(run, about)
        (given.out / f"{one['student']}.json").write_text(json.dumps(one, indent=1) + "\n")
        print(line(one), flush=True)


if __name__ == "__main__":
    main()
