"""Data of the comparisons in docs: python benchmarks/study_data.py OUT [--data ../shared/data]

Writes Parquet shards as Hugging Face does: OUT/cifar10 (10,000 train images, of which a study labels a few and uses all without
labels; 10,000 test), OUT/cifar10-development (10,000 other train images, and 2,000 more as test: for choosing learning rates and
losses) and OUT/fashion (Debian's dataset-fashion-mnist; 10,000 train images and all test images, as PNG).
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

IMAGES, TRIALS = 10_000, 2_000
FASHION = Path("/usr/share/datasets/fashion-mnist")
CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def cifar10(data: Path, out: Path) -> None:
    """CIFAR-10 from the Parquet shards in `data`, which are shuffled already."""
    train = pq.read_table(data / "cifar10" / "train-00000-of-00002.parquet")
    test = pa.concat_tables([pq.read_table(path) for path in sorted((data / "cifar10").glob("test*.parquet"))])
    write(out / "cifar10", train.slice(0, IMAGES), test)
    write(out / "cifar10-development", train.slice(IMAGES + TRIALS, IMAGES), train.slice(IMAGES, TRIALS))


def fashion(out: Path) -> None:
    """Fashion-MNIST from the idx files of the Debian package."""
    parts = {}
    for split, stem, most in (("train", "train", IMAGES), ("test", "t10k", None)):
        found = {kind: next(FASHION.glob(f"{stem}-{kind}*")) for kind in ("images", "labels")}
        pixels = np.frombuffer(gzip.decompress(found["images"].read_bytes()), np.uint8, offset=16).reshape(-1, 28, 28)
        labels = np.frombuffer(gzip.decompress(found["labels"].read_bytes()), np.uint8, offset=8)
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        images = [{"bytes": png(image), "path": f"{split}-{i}.png"} for i, image in enumerate(pixels[:most])]
        parts[split] = pa.table({"image": pa.array(images, kind), "label": pa.array(labels[:most].astype(np.int64))})
        names = {"info": {"features": {"label": {"names": list(CLOTHES), "_type": "ClassLabel"}}}}
        parts[split] = parts[split].replace_schema_metadata({"huggingface": json.dumps(names)})
    write(out / "fashion", parts["train"], parts["test"])


def png(pixels: np.ndarray) -> bytes:
    """(28, 28) uint8 as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write(folder: Path, train: pa.Table, test: pa.Table) -> None:
    """One data set of two splits."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, table in (("train", train), ("test", test)):
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("TUTELAGE_TEST_DATA", "../shared/data")))
    given = parser.parse_args()
    cifar10(given.data, given.out)
    if FASHION.is_dir():
        fashion(given.out)
    else:
        print(f"no {FASHION}: apt-get install dataset-fashion-mnist")


if __name__ == "__main__":
    main()
