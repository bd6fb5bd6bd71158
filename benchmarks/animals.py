"""Six animal classes of CIFAR-10 in a gallery that is mostly of other things: the data of `what_it_finds.py` and `it_pays.py`.

Test images: the 6,000 of the six classes. The gallery (made in a folder once): all 50,000 CIFAR-10 train images, 20,000 crops of photos,
60,000 of Fashion-MNIST, 1,797 digits, 500 copies of test images (100 each: JPEG at quality 40, resized to 0.75, cropped to 90 %,
mirrored, two of these), 100 broken files.

Data: $TUTELAGE_TEST_DATA (cifar10/, photos1k/) and Debian's package dataset-fashion-mnist.
"""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

DATA = Path(os.environ.get("TUTELAGE_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
CLASSES = ("bird", "cat", "deer", "dog", "frog", "horse")
KINDS = ("quality", "resized", "cropped", "mirrored", "two")
TRAIN = ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet")
PHOTOS = "photos.tar"


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


def planted_tar(copies: int) -> str:
    """Name of the file of copies that were drawn by this seed."""
    return f"planted-{copies}.tar"


def gallery_of(folder: Path, copies: int) -> list[str]:
    """The gallery's places, made when they are not there."""
    made = folder / "gallery"
    if not (made / "done").exists():
        make(made)
    planted = made / planted_tar(copies)
    if not planted.exists():
        plant(planted, copies)
    tars = [made / PHOTOS, made / "fashion.tar", made / "digits.tar", planted, made / "broken"]
    return [str(place) for place in (*(DATA / "cifar10" / shard for shard in TRAIN), *tars)]


def settings_of(folder: Path, strategy: str, total: int, seed: int, copies: int) -> dict[str, Any]:
    """Settings of `tutelage.curate` for one choice; strategy "generic": random crops of photos."""
    gallery = gallery_of(folder, copies)
    return {
        "target": str(DATA / "cifar10"), "classes": ",".join(CLASSES), "budget": 10, "seed": seed, "total": total,
        "gallery": [str(folder / "gallery" / PHOTOS)] if strategy == "generic" else gallery,
        "strategy": "random" if strategy == "generic" else strategy, "cache": str(folder / "cache"),
        "out": str(folder / "runs" / f"{strategy}-{total}-{seed}-copies-{copies}"),
        "teacher": "tf_efficientnet_lite2", "teacher_size": 112, "student": "mobilenetv3_small_050", "student_size": 64,
    }  # fmt: skip
