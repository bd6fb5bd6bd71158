"""What the choice of the transfer set is worth to a student: python benchmarks/it_pays.py FOLDER

Six animal classes of CIFAR-10, 10 labels each, and the gallery of `animals.py`, made in FOLDER. For every strategy, size of the transfer
set and seed a student from scratch sees 80,000 views (625 steps of 128) of a set that the strategy chose, and is not fine-tuned, so
that nothing but the set differs. "generic" are random crops of photos. The baseline is trained once for each seed. `results.json`
of each run goes to --results as STRATEGY-TOTAL-SEED.json; what is there already is not computed again. Prints a table, means over seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
from pathlib import Path

from tutelage.device import prepare_process

prepare_process()

from animals import settings_of  # noqa: E402

import tutelage  # noqa: E402

STEPS, BATCH = 625, 128
TRAINING = {
    "student_weights": "scratch", "crop_area": 0.8, "lr": 6e-3, "steps": STEPS, "batch_size": BATCH, "finetune": "keep",
}  # fmt: skip
WITH_BASELINE = ("balanced", 10_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--strategies", default="balanced,random,generic,best,diverse")
    parser.add_argument("--totals", default="10000")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--copies", type=int, default=1, help="seed of the planted copies")
    parser.add_argument("--plot", type=Path, help="SVG file: accuracy of the first strategy against the size")
    parser.add_argument("--results", type=Path, required=True)
    given = parser.parse_args()
    given.results.mkdir(parents=True, exist_ok=True)
    seeds = [int(seed) for seed in given.seeds.split(",")]
    methods = [(strategy, int(total)) for total in given.totals.split(",") for strategy in given.strategies.split(",")]
    for seed in seeds:
        for strategy, total in methods:
            kept = given.results / f"{strategy}-{total}-{seed}.json"
            if not kept.exists():
                settings = settings_of(given.folder, strategy, total, seed, given.copies)
                tutelage.run(**settings, **TRAINING, no_baseline=(strategy, total) != WITH_BASELINE)
                shutil.copyfile(Path(settings["out"]) / "report" / "results.json", kept)
    print("| strategy | images | student | each seed | teacher |\n| --- | --- | --- | --- | --- |")
    for strategy, total in methods:
        runs = [json.loads((given.results / f"{strategy}-{total}-{seed}.json").read_text()) for seed in seeds]
        student, teacher = ([run[who]["test"]["accuracy"] for run in runs] for who in ("distilled", "teacher"))
        spread = statistics.stdev(student) if len(seeds) > 1 else float("nan")
        each = ", ".join(f"{value:.3f}" for value in student)
        mean = f"{statistics.mean(student):.3f} ± {spread:.3f}"
        print(f"| {strategy} | {total:,} | {mean} | {each} | {statistics.mean(teacher):.3f} |")
    if given.plot:
        given.plot.write_text(
            plot(given.results, [method for method in methods if method[0] == methods[0][0]], seeds), encoding="utf-8"
        )


def plot(results: Path, methods: list[tuple[str, int]], seeds: list[int]) -> str:
    """SVG: accuracy of each seed's student, and their mean, against the size of the transfer set."""
    runs = {
        total: [json.loads((results / f"{name}-{total}-{seed}.json").read_text()) for seed in seeds]
        for name, total in methods
    }
    scores = {total: [run["distilled"]["test"]["accuracy"] for run in of] for total, of in sorted(runs.items())}
    every = [score for of in scores.values() for score in of]
    low, high = min(every) - 0.01, max(every) + 0.01
    first, last = math.log(min(scores)), math.log(max(scores))

    def place(total: int, score: float) -> tuple[float, float]:
        return 70 + 360 * (math.log(total) - first) / ((last - first) or 1), 20 + 180 * (high - score) / (high - low)

    parts = []
    for total, of in scores.items():
        x = place(total, low)[0]
        parts.append(f'<text x="{x:.0f}" y="222" text-anchor="middle">{total:,}</text>')
        parts += [
            f'<circle cx="{x:.1f}" cy="{place(total, score)[1]:.1f}" r="3" fill="none" stroke="#6b7280"/>'
            for score in of
        ]
    for score in (low, high):
        parts.append(
            f'<text x="60" y="{place(min(scores), score)[1] + 4:.0f}" text-anchor="end">{100 * score:.1f} %</text>'
        )
    means = " ".join("{:.1f},{:.1f}".format(*place(total, statistics.mean(of))) for total, of in scores.items())
    words = "; ".join(f"{total:,}: {100 * statistics.mean(of):.1f} %" for total, of in scores.items())
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 460 250" role="img" font-family="sans-serif" font-size="12">'
        f"<title>Accuracy of the student against the size of the transfer set</title><desc>{words}</desc>"
        f'<rect width="460" height="250" fill="#fff"/>{"".join(parts)}<polyline points="{means}" fill="none" stroke="#0b62b8" '
        f'stroke-width="2"/><text x="250" y="242" text-anchor="middle">images in the transfer set, 80,000 views seen</text></svg>\n'
    )


if __name__ == "__main__":
    main()
