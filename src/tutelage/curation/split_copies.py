"""Copies across splits: labelled images that show the same picture as a labelled image of another split.

They make scores too high, and a fraction of a burst or of a video's frames (`--test 0.2`) is full of them. The same pixels in two splits
are an error (labelled_set.py); copies that are re-encoded, resized, cropped or mirrored are found here, listed and said: on drawings and
digits, two images may be alike without being copies, so nothing is left out.
"""

from __future__ import annotations

import numpy as np

from tutelage.curation.duplicates import SEARCHES, near_duplicates
from tutelage.curation.embedders import GalleryEmbedder
from tutelage.curation.image_match import layout, thumbnail
from tutelage.curation.labelled_set import LabelledSplit, write_csv
from tutelage.errors import shown
from tutelage.metrics import unit
from tutelage.progress import logger, progress
from tutelage.run_folder import Run


def copies_across_splits(labelled: LabelledSplit, encoder: GalleryEmbedder) -> list[tuple[int, int]]:
    """Return pairs of rows of the target set in two splits that show the same picture, the row used first (train, val, test) first."""
    target, rows = labelled.target, labelled.kept
    order = np.array([("train", "val", "test").index(split) for split in target.splits[rows].tolist()])
    by_use = np.argsort(order, kind="stable")
    rows, order = rows[by_use], order[by_use]
    asked = np.flatnonzero(
        order < order.max(initial=0)
    )  # those of the last split are found as neighbours of the others
    if not len(asked):
        return []
    images = labelled.of(rows)
    thumbs = np.stack([thumbnail(images[i]) for i in range(len(images))])
    embeddings = layout(thumbs)
    drawn = encoder.target(labelled, labelled.drawn, "labelled images")
    held = encoder.target(labelled, labelled.held, "validation and test images")
    if drawn is not None and held is not None:
        features = np.concatenate([drawn, held])[by_use]
        embeddings = unit(features - features.mean(axis=0))
    with progress("copies across splits", SEARCHES * len(asked)) as advance:
        first = near_duplicates(embeddings, thumbs, asked, advance)
    found = np.flatnonzero(order[first] != order)
    return list(zip(rows[first[found]].tolist(), rows[found].tolist(), strict=True))


def report_copies(run: Run, labelled: LabelledSplit, copies: list[tuple[int, int]]) -> None:
    """Log copies across splits and write curate/split_copies.csv, or remove the one of an earlier start."""
    path, target = run.path / "curate" / "split_copies.csv", labelled.target
    if not copies:
        path.unlink(missing_ok=True)
        return
    rows = [(target.refs[b].id, target.splits[b], target.refs[a].id, target.splits[a]) for a, b in copies]
    write_csv(path, [("image", "split", "is", "its_split"), *rows])
    some = shown((f"{one} ({split}) = {other} ({its})" for one, split, other, its in rows), 3)
    logger.warning(
        f"{len(rows):,} labelled images look like copies of one in another split, which makes scores too high: {some}. All are in {path}; "
        "remove them, or use --group-by where products, patients or bursts repeat"
    )
