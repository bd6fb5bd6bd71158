"""What the choice of the transfer set is worth to a student: python benchmarks/it_pays.py FOLDER

Six animal classes of CIFAR-10, 10 labels each, and the gallery of `animals.py`, made in FOLDER. For every strategy, size of the transfer
set and seed a student from scratch sees 80,000 views (625 steps of 128) of a set that the strategy chose, and is not fine-tuned, so
that nothing but the set differs. "generic" are random crops of photos. The student alone is trained once for each seed. `results.json`
of each run goes to --results as STRATEGY-TOTAL-SEED.json; what is there already is not computed again. Prints a table, means over seeds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from pathlib import Path

from tutelage.compute import prepare_process

prepare_process()

from animals import settings_of  # noqa: E402

import tutelage  # noqa: E402

STEPS, BATCH = 625, 128
TRAINING = {
    "student_weights": "scratch", "views": 2, "crop_area": 0.8, "lr": 6e-3, "steps": STEPS, "batch_size": BATCH, "finetune": "keep",
}  # fmt: skip
WITH_ALONE = ("balanced", 10_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--strategies", default="balanced,random,generic,best,diverse")
    parser.add_argument("--totals", default="10000")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--copies", type=int, default=1, help="seed of the planted copies")
    parser.add_argument("--results", type=Path, required=True)
    given = parser.parse_args()
    given.results.mkdir(parents=True, exist_ok=True)
    seeds = [int(seed) for seed in given.seeds.split(",")]
    arms = [(strategy, int(total)) for total in given.totals.split(",") for strategy in given.strategies.split(",")]
    for seed in seeds:
        for strategy, total in arms:
            kept = given.results / f"{strategy}-{total}-{seed}.json"
            if not kept.exists():
                settings = settings_of(given.folder, strategy, total, seed, given.copies)
                tutelage.run(**settings, **TRAINING, no_baseline=(strategy, total) != WITH_ALONE)
                shutil.copyfile(Path(settings["out"]) / "report" / "results.json", kept)
    print("| strategy | images | student | each seed | teacher |\n| --- | --- | --- | --- | --- |")
    for strategy, total in arms:
        runs = [json.loads((given.results / f"{strategy}-{total}-{seed}.json").read_text()) for seed in seeds]
        student, teacher = ([run[who]["test"]["accuracy"] for run in runs] for who in ("student", "teacher"))
        spread = statistics.stdev(student) if len(seeds) > 1 else float("nan")
        each = ", ".join(f"{value:.3f}" for value in student)
        mean = f"{statistics.mean(student):.3f} ± {spread:.3f}"
        print(f"| {strategy} | {total:,} | {mean} | {each} | {statistics.mean(teacher):.3f} |")


if __name__ == "__main__":
    main()
