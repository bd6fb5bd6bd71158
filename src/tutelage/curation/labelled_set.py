"""Selection of the labelled images of a run: decodable, with one label, in one split, within the label budget."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tutelage.data.image_cache import Images
from tutelage.data.label_budget import draw_budget, draw_images, shortfalls
from tutelage.data.sources import ImageRef, Rejected
from tutelage.data.target_set import TargetSet
from tutelage.errors import MOST_NAMED, FilesMissing, TutelageError, raise_all, shown, single
from tutelage.files import hash_of, read_json, write_text
from tutelage.progress import logger
from tutelage.run_folder import TRAINED, Run
from tutelage.settings.command_flags import Curation
from tutelage.tasks import task_of


@dataclass(frozen=True)
class LabelledSplit:
    """The usable images of a target set.

    rows: (n,) int64 rows of the target set, in the order of `images`. keys: their content hashes.
    drawn: (m,) int64 rows of the train images within the label budget. held: (h,) int64 rows of validation and test images.
    """

    target: TargetSet
    images: Images
    rows: np.ndarray
    keys: list[bytes]
    drawn: np.ndarray
    held: np.ndarray

    @property
    def kept(self) -> np.ndarray:
        """Rows of all images of the run: those drawn, then validation and test images."""
        return np.concatenate([self.drawn, self.held])

    def of(self, rows: np.ndarray) -> Images:
        """Return the images of these rows of the target set."""
        return self.images.take(self._places(rows))

    def keys_of(self, rows: np.ndarray) -> list[bytes]:
        """Return the content hashes of these rows of the target set."""
        return [self.keys[place] for place in self._places(rows)]

    def _places(self, rows: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.rows, rows)


def read_labels(run: Run, settings: Curation) -> TargetSet:
    """Read the target set of a run.

    Raises:
        TutelageError: everything that is wrong with it. Missing files too numerous for the message are all in rejected.csv.
    """
    try:
        return task_of(settings.task).read(settings)
    except TutelageError as error:
        many = [one for one in single(error) if isinstance(one, FilesMissing) and len(one.names) > MOST_NAMED]
        if many:
            list_rejected(run, [("target", Rejected(name, "is not there")) for one in many for name in one.names])
        for one in many:
            one.hint += f"; {run.path / 'rejected.csv'} lists them all"
        raise


def data_of(target: TargetSet, gallery: Sequence[ImageRef]) -> dict[str, str]:
    """Return hashes of the target set's names, splits and labels and of the gallery images' names; no image is read."""
    names = [ref.id for ref in target.refs]
    truths = [one.hex() if isinstance(one, bytes) else one for one in map(target.truth, range(len(names)))]
    listed = sorted(zip(names, target.splits.tolist(), truths, strict=True))
    return {
        "target": hash_of([list(target.classes), [list(one) for one in listed]]),
        "gallery": hash_of(sorted(ref.id for ref in gallery)),
    }


def log_changed_data(run: Run, given: dict[str, str]) -> None:
    """Log that the data of a finished run have changed and which stages run again, before any of them begins.

    Args:
        given: hashes of the present data, from `data_of`.
    """
    before = read_json(run.path / "curate" / "result.json")
    if before is None:
        return
    changed = [f"--{name}" for name, one in given.items() if before.get("given", {}).get(name, one) != one]
    what = f"other images or labels in {' and '.join(changed)}" if changed else "files or weights were rewritten"
    later = [name for name in TRAINED[1:] if (run.path / name / "result.json").exists()]
    then = f", then {', '.join(later)} wherever the transfer set comes out different" if later else ""
    kept = f". The results of before are kept in {run.copy_aside()}" if later else ""
    logger.info(f"the data have changed since {run.path} was made ({what}): curate runs again{then}{kept}")


def split_labels(target: TargetSet, images: Images, rows: np.ndarray, budget: int | None, seed: int) -> LabelledSplit:
    """Check the labelled images and draw those within the budget; the labels of the others are not read after this.

    Args:
        images: the usable images of the target set. rows: (n,) int64 ascending, their rows in the target set.
        budget: labels per class; None takes all. seed: of the draw.

    Raises:
        TutelageError: an image with two labels or in two splits, a class or a split without a usable image.
    """
    keys = [key.tobytes() for key in images.keys]
    _check_splits(target, rows)
    _check_labels(target, rows, keys)
    drawn = _draw(target, rows, keys, budget, seed)
    return LabelledSplit(target, images, rows, keys, drawn, rows[target.splits[rows] != "train"])


def _check_splits(target: TargetSet, rows: np.ndarray) -> None:
    """Raise an error if none of the validation or test images can be used: nothing would be judged on them, without a word."""
    emptied = [split for split in ("val", "test") if split in target.splits and split not in target.splits[rows]]
    hint = "see rejected.csv in the run folder, and repair these images, or give others with --val or --test"
    raise_all(
        [
            TutelageError(f"no {split} image can be used, of {(target.splits == split).sum():,}", hint)
            for split in emptied
        ]
    )


def _check_labels(target: TargetSet, rows: np.ndarray, keys: list[bytes]) -> None:
    """Raise an error that names the pairs if an image has two labels or is in two splits: every score would be wrong.

    Copies within the validation or the test images are logged only.
    """
    first: dict[bytes, int] = {}
    two_labels, leaks, copies = [], [], []
    for row, key in zip(rows.tolist(), keys, strict=True):
        other = first.setdefault(key, row)
        names = [f"{target.refs[i].id} ({target.splits[i]}, {target.classes[target.labels[i]]})" for i in (other, row)]
        if target.truth(other) != target.truth(row):
            two_labels.append(" = ".join(names))
        elif target.splits[other] != target.splits[row]:
            leaks.append(" = ".join(names))
        elif other != row and target.splits[row] != "train":
            copies.append(" = ".join(names))
    errors = []
    if two_labels:
        errors.append(TutelageError(f"the same image has two labels: {shown(two_labels)}", "remove one of each pair"))
    if leaks:
        hint = "remove one of each pair, and use --group-by where products or patients repeat"
        errors.append(TutelageError(f"the same image is in two splits: {shown(leaks)}", hint))
    raise_all(errors)
    if copies:
        logger.warning(
            f"{len(copies):,} validation or test images are exact copies of another one in their split, which so counts twice in the "
            f"scores: {shown(copies)}; remove one of each pair if it should count once"
        )


def _draw(target: TargetSet, usable: np.ndarray, keys: list[bytes], budget: int | None, seed: int) -> np.ndarray:
    train = [i for i, row in enumerate(usable) if target.splits[row] == "train"]
    seen: set[bytes] = set()
    train = [i for i in train if not (keys[i] in seen or seen.add(keys[i]))]
    rows = usable[np.array(train, dtype=np.int64)]
    shows = target.shows(rows)
    if lost := [name for number, name in enumerate(target.classes) if not shows[:, number].any()]:
        message = f"no usable train image in {len(lost)} of {len(target.classes)} classes: {shown(map(repr, lost), 10)}"
        hint = "see rejected.csv in the run folder, and repair the images or leave these classes out with --classes"
        raise TutelageError(message, hint)
    how = ([keys[i] for i in train], budget, seed, target.groups[rows])
    if target.masks:
        chosen = draw_images(shows, *how)
        if budget is not None and budget > len(rows):
            logger.info(f"there are {len(rows)} train images, fewer than the budget of {budget}")
        counts = zip(target.classes, shows[chosen].sum(axis=0).tolist(), strict=True)
        text = ", ".join(f"{name} {count}" for name, count in counts)
        logger.info(f"{len(chosen):,} labelled images; number of images that show each class: {text}")
    else:
        chosen = draw_budget(target.labels[rows], *how)
        for line in shortfalls(target.labels[rows], budget, target.classes):
            logger.info(line)
    if beyond := len(rows) - len(chosen):
        logger.info(
            f"{beyond:,} train images are beyond the budget: their labels are not used, and the images only if they are in the gallery"
        )
    return rows[chosen]


def list_rejected(run: Run, rejected: Sequence[tuple[str, Rejected]]) -> None:
    """Write rejected.csv, or remove the one of an earlier start. rejected: ("target" or "gallery", image) pairs."""
    rows = [(kind, item.id, item.reason) for kind, item in rejected]
    write_csv(run.path / "rejected.csv", ("set", "image", "reason"), rows)


def reject(run: Run, rejected: Sequence[tuple[str, Rejected]], total: int, most: float) -> None:
    """List the unusable images; raise an error if their share of all images exceeds `most`. total: images checked."""
    list_rejected(run, rejected)
    if not (count := len(rejected)):
        return
    logger.info(f"{count:,} of {total:,} images cannot be used; they are listed in {run.path / 'rejected.csv'}")
    if count > most * total:
        first = shown((f"{item.id} ({item.reason})" for _, item in rejected), 3)
        raise TutelageError(
            f"{count:,} of {total:,} images cannot be used ({100 * count / total:.1f} %), "
            f"but at most {100 * most:g} % (--max-rejected {most:g}) are allowed: {first}",
            f"fix or remove the images listed in {run.path / 'rejected.csv'}, or raise --max-rejected",
        )


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write a whole CSV file; without rows, remove the one of an earlier start."""
    if not rows:
        path.unlink(missing_ok=True)
        return
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    write_text(path, text.getvalue())
