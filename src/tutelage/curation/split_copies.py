"""Copies across splits: labelled images that show the same picture as a labelled image of another split.

They make scores too high, and a fraction of a burst or of a video's frames (`--test 0.2`) is full of them. The same pixels in two splits
are an error (labelled_set.py); copies that are re-encoded, resized, cropped or mirrored are found here, listed and said: on drawings and
digits, two images may be alike without being copies, so nothing is left out.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from tutelage.curation.duplicates import SEARCHES, copies_among
from tutelage.curation.embedders import GalleryEmbedder
from tutelage.curation.image_match import layout, thumbnail
from tutelage.curation.labelled_set import LabelledSplit, write_csv
from tutelage.curation.selection import EACH
from tutelage.data.image_cache import Images
from tutelage.device import memory_text
from tutelage.errors import shown
from tutelage.metrics import unit
from tutelage.progress import logger, progress
from tutelage.run_folder import Run

MOST_COMPARED = 100_000  # images; their thumbnails and layouts take 0.6 GB


def copies_across_splits(labelled: LabelledSplit, encoder: GalleryEmbedder, memory: float) -> list[tuple[int, int]]:
    """Return pairs of rows of the target set in two splits that show the same picture, the row used first (train, val, test) first.

    Args:
        memory: bytes that the comparison may take; where it needs more, it is left out, and the log says so.
    """
    target, rows = labelled.target, labelled.kept
    order = np.array([("train", "val", "test").index(split) for split in target.splits[rows].tolist()])
    by_use = np.argsort(order, kind="stable")
    rows, order = rows[by_use], order[by_use]
    asked = np.flatnonzero(
        order < order.max(initial=0)
    )  # those of the last split are found as neighbours of the others
    if not len(asked):
        return []
    width = 0 if encoder.network is None else encoder.network.width
    if (needed := len(rows) * (12 * width + EACH)) > memory:
        what = f"{memory_text(needed)} to compare {len(rows):,} labelled, validation and test images"
        logger.warning(f"copies across splits are not looked for: it takes {what}; raise --memory")
        return []
    images = labelled.of(rows)
    thumbs = np.stack([thumbnail(images[i]) for i in range(len(images))])
    embeddings = layout(thumbs)
    if encoder.network is not None:
        features = encoder.outputs(images, "labelled, validation and test images")
        embeddings = unit(features - features.mean(axis=0))
    with progress("copies across splits", SEARCHES * len(asked)) as advance:
        pairs = copies_among(embeddings, thumbs, asked, advance)
    first: dict[int, int] = {}
    for later, earlier in pairs.tolist():
        if order[later] != order[earlier]:
            first.setdefault(later, earlier)
    return [(int(rows[earlier]), int(rows[later])) for later, earlier in sorted(first.items())]


def count_trained_on(images: Images, trained: Images) -> int:
    """Return how many images show a picture that is also in `trained`: the same pixels or, among up to MOST_COMPARED images in all, copies
    that are re-encoded, resized, cropped or mirrored."""
    keys = {key.tobytes() for key in trained.keys}
    found = {i for i, key in enumerate(images.keys) if key.tobytes() in keys}
    if len(trained) > 0 and len(images) + len(trained) <= MOST_COMPARED:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            both = [pool.map(lambda i, part=part: thumbnail(part[i]), range(len(part))) for part in (images, trained)]
            thumbs = np.stack([thumb for part in both for thumb in part])
        pairs = copies_among(layout(thumbs), thumbs, np.arange(len(images)), lambda count: None)
        found |= {int(new) for old, new in pairs if new < len(images) <= old}
    return len(found)


def report_copies(run: Run, labelled: LabelledSplit, copies: list[tuple[int, int]]) -> None:
    """Log copies across splits and write curate/split_copies.csv, or remove the one of an earlier start."""
    path, target = run.path / "curate" / "split_copies.csv", labelled.target
    rows = [(target.refs[b].id, target.splits[b], target.refs[a].id, target.splits[a]) for a, b in copies]
    write_csv(path, ("image", "split", "is", "its_split"), rows)
    if not rows:
        return
    some = shown((f"{one} ({split}) = {other} ({its})" for one, split, other, its in rows), 3)
    logger.warning(
        f"{len(rows):,} labelled images look like copies of one in another split, which makes scores too high: {some}. All are in {path}; "
        "remove them, or use --group-by where products, patients or bursts repeat"
    )
