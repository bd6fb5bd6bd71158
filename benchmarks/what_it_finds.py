"""Which images each strategy finds in a gallery that is mostly of other things: python benchmarks/what_it_finds.py FOLDER

Six animal classes of CIFAR-10, 10 labels each. The gallery (made in FOLDER once): all 50,000 CIFAR-10 train images, 20,000 crops
of photos, 60,000 of Fashion-MNIST, 1,797 digits, 500 copies of test images (100 each: JPEG at quality 40, resized to 0.75, cropped to
90 %, mirrored, two of these), 100 broken files. For every strategy and seed: share of the six classes among the chosen images, the
smallest class as a share of its sixth, and the planted copies that were kept out. One JSON line each.

Data: $TUTELAGE_TEST_DATA (cifar10/, photos1k/) and Debian's package dataset-fashion-mnist.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import os
import tarfile
from collections import Counter
from pathlib import Path

from tutelage.compute import prepare_process

prepare_process()

import numpy as np  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from PIL import Image  # noqa: E402

import tutelage  # noqa: E402
from tutelage.data.manifest import read_manifest  # noqa: E402

DATA = Path(os.environ.get("TUTELAGE_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
CLASSES = ("bird", "cat", "deer", "dog", "frog", "horse")
KINDS = ("quality", "resized", "cropped", "mirrored", "two")
TRAIN = ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet")
STRATEGIES = ("random", "best", "balanced", "diverse", "hard")


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def encoded(image: Image.Image, form: str = "PNG", **more) -> bytes:
    data = io.BytesIO()
    image.save(data, form, **more)
    return data.getvalue()


def changed(image: Image.Image, kind: str, random: np.random.Generator) -> bytes:
    """One planted copy."""
    if kind == "two":
        first, second = random.choice(KINDS[:4], 2, replace=False)
        return changed(Image.open(io.BytesIO(changed(image, str(first), random))), str(second), random)
    if kind == "quality":
        return encoded(image, "JPEG", quality=40)
    if kind == "resized":
        return encoded(image.resize((round(0.75 * image.width), round(0.75 * image.height)), Image.Resampling.BICUBIC))
    if kind == "mirrored":
        return encoded(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    side = round(0.9 * image.width)
    left, top = random.integers(0, image.width - side + 1, 2)
    return encoded(image.crop((left, top, left + side, top + side)))


def make(folder: Path) -> None:
    """Write the gallery's parts beside CIFAR-10 and the copies: photos.tar, fashion.tar, digits.tar, broken/."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "photos.tar", "w") as out:
        number, members = 0, []
        for path in sorted((DATA / "photos1k").glob("*.tar")):
            with tarfile.open(path) as tar:
                members += [tar.extractfile(m).read() for m in tar if m.isfile()]  # type: ignore[union-attr]
        while number < 20_000:
            image = Image.open(io.BytesIO(members[number % len(members)])).convert("RGB")
            side = int(random.integers(48, min(image.size)))
            left, top = (int(random.integers(0, size - side + 1)) for size in image.size)
            add(
                out,
                f"{number:05d}.jpg",
                encoded(image.crop((left, top, left + side, top + side)).resize((64, 64)), "JPEG", quality=90),
            )
            number += 1
    with tarfile.open(folder / "fashion.tar", "w") as out:
        package = next(Path("/usr/share").rglob("train-images-idx3-ubyte.gz"))
        pixels = np.frombuffer(gzip.decompress(package.read_bytes()), np.uint8, offset=16).reshape(-1, 28, 28)
        for number, image in enumerate(pixels):
            add(out, f"{number:05d}.png", encoded(Image.fromarray(image)))
    with tarfile.open(folder / "digits.tar", "w") as out:
        from sklearn.datasets import load_digits

        for number, image in enumerate(load_digits().images):
            add(out, f"{number:04d}.png", encoded(Image.fromarray((image * 15).astype(np.uint8)).resize((32, 32))))
    broken = folder / "broken"
    broken.mkdir(exist_ok=True)
    for number in range(100):
        (broken / f"{number}.jpg").write_bytes(random.bytes(200) if number % 2 else b"")
    (folder / "done").touch()


def plant(path: Path, seed: int) -> None:
    """Write copies of test images, drawn by a seed, into a tar file: 100 of each kind."""
    random = np.random.default_rng(seed)
    with tarfile.open(path, "w") as out:
        table = pq.read_table(DATA / "cifar10" / "test-00000-of-00001.parquet")
        names = class_names()
        wanted = [i for i, label in enumerate(table.column("label").to_pylist()) if names[label] in CLASSES]
        picked = random.permutation(wanted)[: 100 * len(KINDS)]
        for number, row in enumerate(picked.tolist()):
            image = Image.open(io.BytesIO(table.column("image")[row].as_py()["bytes"])).convert("RGB")
            kind = KINDS[number // 100]
            add(out, f"{kind}/{row}.png", changed(image, kind, random))


def class_names() -> list[str]:
    from tutelage.data.target_set import read_target_set

    return list(read_target_set(DATA / "cifar10").classes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--copies", type=int, default=1, help="seed of the planted copies")
    parser.add_argument("--total", type=int, default=10_000)
    parser.add_argument("--teacher", default="tf_efficientnet_lite2")
    parser.add_argument("--teacher-size", type=int, default=112)
    given = parser.parse_args()
    folder: Path = given.folder
    if not (folder / "gallery" / "done").exists():
        make(folder / "gallery")
    planted_tar = folder / "gallery" / f"planted-{given.copies}.tar"
    if not planted_tar.exists():
        plant(planted_tar, given.copies)
    names = class_names()
    truth = {}
    for shard in TRAIN:
        labels = pq.read_table(DATA / "cifar10" / shard, columns=["label"]).column("label").to_pylist()
        truth |= {f"{shard}#{row}": names[label] for row, label in enumerate(labels)}
    gallery = [*(str(DATA / "cifar10" / shard) for shard in TRAIN),
               *(str(folder / "gallery" / f"{part}.tar") for part in ("photos", "fashion", "digits")), str(planted_tar),
               str(folder / "gallery" / "broken")]  # fmt: skip
    for strategy in given.strategies.split(","):
        for seed in map(int, given.seeds.split(",")):
            out = folder / "runs" / f"{strategy}-{given.total}-{seed}-copies-{given.copies}"
            result = tutelage.curate(
                target=str(DATA / "cifar10"), classes=",".join(CLASSES), gallery=gallery, budget=10, seed=seed, out=str(out),
                strategy=strategy, total=given.total, cache=str(folder / "cache"), teacher=given.teacher, teacher_size=given.teacher_size,
                student="mobilenetv3_small_050", student_size=64,
            )  # fmt: skip
            table = read_manifest(out / "transfer_set" / "manifest.parquet")[1].to_pylist()
            chosen = [row["id"] for row in table if row["source"] == "gallery"]
            found = Counter(truth.get(id.split("/")[-1]) for id in chosen)
            mine = [found[name] for name in CLASSES]
            leaks = list(csv.DictReader((out / "transfer_set" / "leaks.csv").open()))
            caught = [row["gallery_image"] for row in leaks if f"{planted_tar.name}/" in row["gallery_image"]]
            planted = Counter(id.split(f"{planted_tar.name}/")[1].split("/")[0] for id in caught)
            print(json.dumps({
                "strategy": strategy, "seed": seed, "copies": given.copies, "chosen": len(chosen),
                "share": round(sum(mine) / len(chosen), 4),
                "smallest_of_its_sixth": round(min(mine) / (len(chosen) / len(CLASSES)), 3),
                "classes": dict(zip(CLASSES, mine, strict=True)),
                "other_cifar": sum(n for name, n in found.items() if name and name not in CLASSES),
                "planted_caught": planted, "planted_chosen": sum(f"{planted_tar.name}/" in id for id in chosen),
                "other_leaks": len(leaks) - sum(planted.values()), "near_duplicates": result["near_duplicates"],
                "distance": result.get("distance"), "seconds": round(result["seconds"], 1), "reused": result.get("reused", False),
            }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
