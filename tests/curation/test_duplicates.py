"""What counts as a copy: the same picture re-encoded, resized, cropped or mirrored, and no other picture."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from conftest import DATA
from tutelage.curation.duplicates import find_leaks, near_duplicates, search_layouts
from tutelage.curation.image_match import HOW, confirm, layout, thumbnail
from tutelage.curation.vectors import Vectors
from tutelage.data.decode import decode

CIFAR = DATA / "cifar10" / "test-00000-of-00001.parquet"


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    """200 real pictures of 32 pixels."""
    if not CIFAR.exists():
        pytest.skip(f"no images of CIFAR-10 under {DATA} (TUTELAGE_TEST_DATA)")
    import pyarrow.parquet as pq

    table = pq.read_table(CIFAR, columns=["image"]).slice(0, 200)
    return [decode(row["bytes"], 64)[0] for row in table.column("image").to_pylist()]


def again(image: np.ndarray, kind: str) -> np.ndarray:
    """A copy of one kind."""
    picture = Image.fromarray(image)
    if kind == "mirrored":
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    elif kind == "resized":
        picture = picture.resize((24, 24), Image.Resampling.BICUBIC)
    elif kind == "cropped":
        picture = picture.crop((2, 1, 31, 30))
    else:
        data = io.BytesIO()
        picture.save(data, "JPEG", quality=40)
        return decode(data.getvalue(), 64)[0]
    return np.asarray(picture)


@pytest.mark.parametrize("kind", ["quality", "resized", "cropped", "mirrored"])
def test_copies_are_found_and_named(images, kind):
    """Of 50 copies at least 48 are found among 200 pictures, by layout and pixels alone, and mirrored ones are called so."""
    held = images[:50]
    gallery = [*images[50:], *(again(image, kind) for image in held)]
    thumbs = np.stack([thumbnail(image) for image in gallery])
    layouts = layout(thumbs).astype(np.float16)
    similarity, rows = search_layouts(held, Vectors((layouts[:77], layouts[:0], layouts[77:]), None), 20)
    found = find_leaks(similarity, rows, held, lambda wanted: thumbs[wanted])
    right = [(row, at) for row, at, *_ in found if row == 150 + at]
    assert len(right) >= 48
    assert len(found) - len(right) <= 1, "150 other pictures"
    if kind == "mirrored":
        assert all("mirrored" in how for row, at, how, _ in found if row == 150 + at)


def test_flat_images_are_told_apart_by_colour():
    """Pictures without structure are the same only where their colour is."""

    def flat(*colour: int) -> np.ndarray:
        return np.broadcast_to(np.array(colour, np.uint8), (32, 32, 3))

    others = np.stack([thumbnail(flat(*c)) for c in [(80, 80, 80), (90, 90, 90), (80, 80, 120), (255, 255, 255)]])
    assert [HOW[kind] != "" for kind in confirm(flat(80, 80, 80), others)] == [True, False, False, False]


def test_each_picture_is_kept_once(images):
    """Of copies the first is kept, whatever the embeddings' order of likeness; other pictures are left alone."""
    pictures = [
        *images[:40],
        *(again(image, "quality") for image in images[:20]),
        *(again(image, "mirrored") for image in images[:20]),
    ]
    thumbs = np.stack([thumbnail(picture) for picture in pictures])
    flat = thumbs.reshape(len(thumbs), -1).astype(np.float32)
    flat -= flat.mean(axis=1, keepdims=True)
    embeddings = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    first = near_duplicates(embeddings, thumbs)
    assert first[:40].tolist() == list(range(40))
    assert (first[40:60] == np.arange(20)).sum() >= 19
    assert (first[60:] == np.arange(20)).sum() >= 19
    assert first.tolist() == near_duplicates(embeddings, thumbs).tolist()


def test_of_many_copies_one_is_kept(images):
    """Of 60 noisy copies of one picture one is kept, though the 10 nearest of most are copies that are dropped themselves."""
    random = np.random.default_rng(0)
    noisy = [np.clip(images[0] + random.normal(0, 3, images[0].shape), 0, 255).astype(np.uint8) for _ in range(60)]
    thumbs = np.stack([thumbnail(picture) for picture in [*noisy, *images[1:30]]])
    flat = thumbs.reshape(len(thumbs), -1).astype(np.float32)
    flat -= flat.mean(axis=1, keepdims=True)
    first = near_duplicates(flat / np.linalg.norm(flat, axis=1, keepdims=True), thumbs)
    assert not first[:60].any()
    assert first[60:].tolist() == list(range(60, 89))
