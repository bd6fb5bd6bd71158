"""Which images each strategy finds in a gallery that is mostly of other things: python benchmarks/what_it_finds.py FOLDER

Six animal classes of CIFAR-10, 10 labels each, and the gallery of `animals.py`, made in FOLDER. For every strategy and seed: share of
the six classes among the chosen images, the smallest class as a share of its sixth, and the planted copies that were kept out: of
those that it would have chosen, or, with --dedup gallery, of all. One JSON line each.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import Counter
from pathlib import Path

from tutelage.device import prepare_process

prepare_process()

import pyarrow.parquet as pq  # noqa: E402
from animals import CLASSES, DATA, TRAIN, class_names, planted_tar, settings_of  # noqa: E402

import tutelage  # noqa: E402
from tutelage.data.manifest import read_manifest  # noqa: E402


def true_classes() -> dict[str, str]:
    """Class of each CIFAR-10 train image, by the end of its id."""
    names, truth = class_names(), {}
    for shard in TRAIN:
        labels = pq.read_table(DATA / "cifar10" / shard, columns=["label"]).column("label").to_pylist()
        truth |= {f"{shard}#{row}": names[label] for row, label in enumerate(labels)}
    return truth


def found_by(out: Path, truth: dict[str, str], copies: str) -> dict:
    """What a finished choice holds and kept out. copies: name of the file of planted copies."""
    table = read_manifest(out / "curate" / "manifest.parquet")[1].to_pylist()
    chosen = [row["id"] for row in table if row["source"] == "gallery"]
    found = Counter(truth.get(id.split("/")[-1]) for id in chosen)
    mine = [found[name] for name in CLASSES]
    leaks = list(csv.DictReader((out / "curate" / "leaks.csv").open()))
    caught = [row["gallery_image"] for row in leaks if f"{copies}/" in row["gallery_image"]]
    return {
        "chosen": len(chosen), "share": round(sum(mine) / len(chosen), 4),
        "smallest_of_its_sixth": round(min(mine) / (len(chosen) / len(CLASSES)), 3),
        "classes": dict(zip(CLASSES, mine, strict=True)),
        "other_cifar": sum(n for name, n in found.items() if name and name not in CLASSES),
        "planted_caught": Counter(id.split(f"{copies}/")[1].split("/")[0] for id in caught),
        "planted_chosen": sum(f"{copies}/" in id for id in chosen), "other_leaks": len(leaks) - len(caught),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--strategies", default="random,best,balanced,diverse,hard")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--total", type=int, default=10_000)
    parser.add_argument("--copies", type=int, default=1, help="seed of the planted copies")
    parser.add_argument("--dedup", default="candidates", help="candidates or gallery")
    given = parser.parse_args()
    truth = true_classes()
    for strategy in given.strategies.split(","):
        for seed in map(int, given.seeds.split(",")):
            settings = settings_of(given.folder, strategy, given.total, seed, given.copies)
            settings |= {"dedup": given.dedup, "out": f"{settings['out']}-{given.dedup}"}
            result = tutelage.curate(**settings).to_json()
            found = found_by(Path(settings["out"]), truth, planted_tar(given.copies))
            about = {"strategy": strategy, "seed": seed, "copies": given.copies, "dedup": given.dedup}
            more = {"near_duplicates": result["near_duplicates"], "distance": result.get("distance")}
            print(json.dumps({**about, **found, **more, "seconds": round(result["seconds"], 1)}), flush=True)


if __name__ == "__main__":
    main()
