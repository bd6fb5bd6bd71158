"""The target set: the labelled images of the task, the split of each (train, val or test), and which may be used.

Nothing is decoded here. The supported formats are those of `labelled.read_labelled`.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tutelage.data.class_folders import folders_inside
from tutelage.data.class_names import differ_in_case, faults_of_names
from tutelage.data.gallery import place_names, unique_ids
from tutelage.data.labelled_images import FORMS, read_labelled
from tutelage.data.labelled_place import LabelledPlace, LabelledRef
from tutelage.data.sources import SOURCE, ImageRef, Rejected, missing
from tutelage.errors import TutelageError, did_you_mean, number_of, raise_all, shown
from tutelage.json_object import JSON

TEST_SHARE = 0.2  # share held out if no test split is given


@dataclass(frozen=True, eq=False)
class TargetSet:
    """n labelled images.

    task: "classification" or "segmentation".
    classes: C names; a label is an index into them. Sorted, or in the order of the file's own metadata.
    refs: n references. labels: (n,) int64 in [0, C), of a mask its rarest class. splits: (n,) str, train, val or test.
    groups: (n,) str, images that must stay in one split (one patient, product, video); "" = none.
    notes: lines for the log, such as how the test images were chosen. rejected: files of the target set that cannot be used, and why.
    With masks only: masks, n references; truths, n hashes of the classes of their pixels; pixels, (n, C) int64 counts; colours, C
    triples in [0, 255]; coloured, whether colours, not numbers, say the class; ignored, colours that are not a class.
    """

    task: str
    classes: tuple[str, ...]
    refs: list[ImageRef]
    labels: np.ndarray
    splits: np.ndarray
    groups: np.ndarray
    notes: tuple[str, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    masks: tuple[ImageRef, ...] = ()
    truths: tuple[bytes, ...] = ()
    pixels: np.ndarray | None = None
    colours: tuple[tuple[int, int, int], ...] = ()
    coloured: bool = False
    ignored: tuple[tuple[int, int, int], ...] = ()

    def shows(self, rows: np.ndarray) -> np.ndarray:
        """Return (m, C) bool: which classes each of these images shows."""
        if self.pixels is None:
            return self.labels[rows][:, None] == np.arange(len(self.classes))
        return self.pixels[rows] > 0

    def truth(self, row: int) -> object:
        """Return the ground truth of one image, for comparison with another's: its class, or the hash of its mask."""
        return self.truths[row] if self.truths else int(self.labels[row])

    def about(self, rows: np.ndarray) -> JSON:
        """Return what result.json says about these rows: for masks the colours and how many images show each class, else nothing."""
        if self.pixels is None:
            return {}
        shown_by = dict(zip(self.classes, self.shows(rows).sum(axis=0).tolist(), strict=True))
        colours, ignored = ([list(one) for one in several] for several in (self.colours, self.ignored))
        return {"colours": colours, "coloured": self.coloured, "ignored_colours": ignored, "shown_by": shown_by}

    def columns(self, rows: np.ndarray) -> dict[str, list[object]]:
        """Return the manifest's columns for these rows: split, label, group; for masks also their locations and hashes."""
        columns = {"split": self.splits, "label": self.labels, "group": self.groups}
        found = {name: column[rows].tolist() for name, column in columns.items()}
        if self.masks:
            found |= {f"mask_{name}": [getattr(self.masks[i], name) for i in rows] for name in SOURCE}
            found["mask_truth"] = [self.truths[i] for i in rows]
        return found


def read_target_set(
    target: str | Path,
    *,
    val: str | Path | float | None = None,
    test: str | Path | float | None = None,
    classes: Sequence[str] | None = None,
    group_by: str | None = None,
) -> TargetSet:
    """Read the labelled images and assign each to a split.

    Args:
        target: a path in any format that `labelled.read_labelled` reads.
        val, test: a path in any of those formats, all of whose images go to that split (instead of the target's own);
            or a fraction in (0, 1) of the train images, per class, with groups kept whole, chosen by a fixed hash of the
            ids. If there is no test split at all, TEST_SHARE is held out and a note says so.
        classes: keep these classes only.
        group_by: regular expression searched in every id; its first group (or the whole match) is the image's group.

    Raises:
        TutelageError: everything that is wrong, reported at once.
    """
    shares, places, pattern = check_places(target, {"val": val, "test": test}, group_by)
    listings, errors = {}, []
    for split, place in places.items():
        try:
            listings[split] = read_labelled(place)
        except TutelageError as error:
            errors.append(error)
    raise_all(errors)
    images, rejected, notes, ids = _merge(listings, places)
    labels = {image.label for image in images} & {image.label for image in listings[""].images}
    names = tuple(name for name in listings[""].names if name in labels) or tuple(sorted(labels))
    if classes is not None:
        names = _kept(names, classes)
        images = [image for image in images if image.label in names]
    raise_all(_unclear_folders(listings, names, classes, pattern))
    if pattern:
        images = _grouped(images, pattern)
    images = _held_out(images, shares, notes)
    raise_all(_faults(images, names, target, notes))
    notes += differ_in_case(names)
    images = [replace(i, ref=replace(i.ref, id=ids[i.ref.fingerprint])) for i in images]
    return _numbered(images, names, notes, rejected)


def read_any(target: str | Path, classes: Sequence[str]) -> TargetSet:
    """Read all labelled images of one path, whatever their split, to score a model whose classes are known.

    Args:
        target: a path in any format that `labelled.read_labelled` reads; of a folder all splits are used.
        classes: the run's C classes; a label is an index into them. Not all of them need to have images.

    Raises:
        TutelageError: no such path, no labelled images, or classes that are not among those of the run.
    """
    if not Path(target).exists():
        raise missing(target)
    listing = read_labelled(Path(target))
    unknown = sorted({image.label for image in listing.images} - set(classes))
    if unknown:
        near = [(name, did_you_mean(name, classes, "", 1)) for name in unknown]
        fixes = "; ".join(f"{name!r}: {hint}" for name, hint in near if hint) or "rename or remove the others"
        message = f"{target} has {number_of(len(unknown), 'class', 'classes')} that the run does not have: {shown(map(repr, unknown), 20)}"
        raise TutelageError(message, f"the run's classes are {shown(map(repr, classes), 20)}; {fixes}")
    return _numbered(listing.images, tuple(classes), listing.notes, listing.rejected)


def _numbered(
    images: Sequence[LabelledRef], names: tuple[str, ...], notes: Sequence[str], rejected: Sequence[Rejected]
) -> TargetSet:
    """Build the target set: class names become numbers, rows become columns."""
    place = {name: i for i, name in enumerate(names)}
    return TargetSet(
        "classification",
        names,
        [image.ref for image in images],
        np.array([place[image.label] for image in images], np.int64),
        np.array([image.split for image in images], np.str_),
        np.array([image.group for image in images], np.str_),
        tuple(notes),
        tuple(rejected),
    )


# Settings and checks


def check_places(
    target: str | Path, given: Mapping[str, str | Path | float | None], group_by: str | None
) -> tuple[dict[str, float], dict[str, Path], re.Pattern[str] | None]:
    """Check the settings before anything is read; return fractions by split, paths by split ("" = target), the pattern."""
    shares: dict[str, float] = {}
    places: dict[str, Path] = {"": Path(target)}
    errors: list[TutelageError] = []
    for split, value in given.items():
        share = _number(value)
        if share is not None and not 0 < share < 1:
            message = f"--{split} {value} must be a path, or a fraction above 0 and below 1"
            beside = f"./{value}" if isinstance(value, str) and Path(value).exists() else "0.2"
            errors.append(TutelageError(message, f"use, for example, --{split} {beside}"))
        elif share is not None:
            shares[split] = share
        elif value is not None:
            places[split] = Path(str(value))
    errors += [missing(place, f"--{split or 'target'} ") for split, place in places.items() if not place.exists()]
    pattern = None
    try:
        pattern = re.compile(group_by) if group_by else None
    except re.error as error:
        hint = "use a valid regular expression, such as '^([^_]+)_'"
        errors.append(TutelageError(f"--group-by {group_by!r}: {error}", hint))
    raise_all(errors)
    return shares, places, pattern


def _number(value: str | Path | float | None) -> float | None:
    try:
        return None if value is None or isinstance(value, Path) else float(value)
    except ValueError:
        return None


def _kept(names: tuple[str, ...], classes: Sequence[str]) -> tuple[str, ...]:
    unknown, otherwise = [c for c in classes if c not in names], f"the classes are {shown(map(repr, names), 20)}"
    wrong = "is not a class of the target set"
    raise_all([TutelageError(f"--classes: {c!r} {wrong}", did_you_mean(c, names, otherwise)) for c in unknown])
    return tuple(name for name in names if name in set(classes))


def _grouped(images: list[LabelledRef], pattern: re.Pattern[str]) -> list[LabelledRef]:
    found = [pattern.search(image.ref.id) for image in images]
    lost = [image.ref.id for image, match in zip(images, found, strict=True) if match is None]
    if lost:
        message = f"--group-by {pattern.pattern!r} finds nothing in {number_of(len(lost), 'id')}: {shown(lost)}"
        hint = "use a pattern that matches every image's id, or add '|$' at its end if some images have no group"
        raise TutelageError(message, hint)
    groups = [(m.group(1) if pattern.groups else m.group()) or "" for m in found if m]
    return [replace(image, group=group) for image, group in zip(images, groups, strict=True)]


def _unclear_folders(
    listings: Mapping[str, LabelledPlace],
    names: tuple[str, ...],
    classes: Sequence[str] | None,
    pattern: re.Pattern[str] | None,
) -> list[TutelageError]:
    """Return errors for classes without images, and for class folders that may hold several. classes, pattern: as given by the user."""
    errors: list[TutelageError] = []
    known = frozenset(names)
    empty = {name for one in listings.values() for name in one.empty if name.rpartition("/")[2] not in known}
    unused = [name for name in listings[""].names if name not in known]
    way = "add images or remove these {}, or name the classes to use with --classes"
    if classes is None and empty:
        count = number_of(len(empty), "class folder holds", "class folders hold")
        message = f"{count} no images: {shown(sorted(empty), 10)}"
        errors.append(TutelageError(message, way.format("folders")))
    if classes is None and unused:
        count = number_of(len(unused), "class name of the target set has", "class names of the target set have")
        message = f"{count} no images: {shown(map(repr, unused), 10)}"
        errors.append(TutelageError(message, way.format("names")))
    places = [place for one in listings.values() for place in one.inside.items()]
    if pattern is None and (question := folders_inside(places, names)):
        errors.append(question)
    return errors


def _faults(
    images: list[LabelledRef], names: tuple[str, ...], target: str | Path, notes: Sequence[str]
) -> list[TutelageError]:
    """Return everything that makes a target set unusable. notes: what was seen while it was read."""
    train = Counter(image.label for image in images if image.split == "train")
    if not train:
        folders = [one.name for one in sorted(Path(target).iterdir()) if one.is_dir()] if Path(target).is_dir() else []
        near = difflib.get_close_matches("train", folders, n=1)
        hint = f"check the path and the names of its folders; tutelage reads {FORMS}"
        hint = f"if {near[0]} holds the train images, rename it to train; else {hint}" if near else hint
        seen = f" ({'; '.join(notes)})" if notes else ""
        return [TutelageError(f"{target} has no train images{seen}", hint)]
    errors = faults_of_names(names, target)
    if len(names) < 2:
        message = f"{target} has one class only ({shown(names)}), but at least 2 are needed"
        errors.append(TutelageError(message, "give its parent folder, if this is the folder of one class"))
    single = [name for name in names if train[name] == 1]
    if single:
        message = (
            f"{target}: {number_of(len(single), 'class has', 'classes have')} one train image: {shown(single, 10)}"
        )
        hint = "add images until every class has at least 2, or name only the other classes with --classes"
        errors.append(TutelageError(message, hint))
    for split in ("val", "test"):
        lost = sorted({i.label for i in images if i.split == split} - train.keys())
        if lost:
            known = f"train has {shown(sorted(train), 10)}"
            message = f"{split} has classes that train lacks: {shown(lost, 10)} ({known})"
            otherwise = "call the classes the same in every split, or name the classes to use with --classes"
            errors.append(TutelageError(message, did_you_mean(lost[0], train, otherwise)))
    where: dict[str, set[str]] = defaultdict(set)
    for image in images:
        where[image.group].add(image.split)
    torn = sorted(group for group, splits in where.items() if group and len(splits) > 1)
    if torn:
        which = shown(f"{g} ({', '.join(sorted(where[g]))})" for g in torn)
        hint = "keep every group in one split, or give --val and --test as fractions, which keep groups whole"
        errors.append(
            TutelageError(f"{number_of(len(torn), 'group is', 'groups are')} in several splits: {which}", hint)
        )
    return errors


# Splits


def _merge(
    listings: dict[str, LabelledPlace], places: dict[str, Path]
) -> tuple[list[LabelledRef], list[Rejected], list[str], dict[bytes, str]]:
    """Merge the images of the target ("") and of the paths given for val and test into one list.

    The last result maps fingerprints to unique ids, to be applied at the end: groups and fractions depend on the original
    ids, so that another path that happens to use the same names changes neither.
    """
    notes = [note for listing in listings.values() for note in listing.notes]
    own = Counter(image.split for image in listings[""].images)
    images, listed = [], []
    for split, listing in listings.items():
        part = [replace(image, split=split or image.split) for image in listing.images]
        if not split:
            part = [image for image in part if image.split not in listings]
        elif own[split]:
            count = number_of(own[split], f"{split} image is", f"{split} images are")
            notes.append(f"the target set's own {count} left out: {places[split]} is given")
        images += part
        listed.append(([image.ref for image in part], listing.rejected))
    first: dict[bytes, LabelledRef] = {}
    if twice := [i for i in images if first.setdefault(i.ref.fingerprint, i).split != i.split]:
        message = f"{number_of(len(twice), 'image is', 'images are')} in two splits: {shown(i.ref.id for i in twice)}"
        raise TutelageError(message, "keep every image in one split only")
    renamed = unique_ids(listed, place_names(list(places.values())))
    new = [ref.id for refs, _ in renamed for ref in refs]
    ids = {image.ref.fingerprint: id for image, id in zip(images, new, strict=True)}
    return images, [bad for _, rejected in renamed for bad in rejected], notes, ids


def _held_out(images: list[LabelledRef], shares: dict[str, float], notes: list[str]) -> list[LabelledRef]:
    """Return the images with the splits requested as shares of train, and with a test split in any case; adds to `notes`.

    Raises TutelageError: a split both exists and is requested.
    """
    counts = Counter(image.split for image in images)
    raise_all(
        [
            TutelageError(
                f"--{split} {share} conflicts with the {number_of(counts[split], f'{split} image')} of the target set",
                f"use one of the two: leave out --{split}, or give it a path",
            )
            for split, share in shares.items()
            if counts[split]
        ]
    )
    if "test" not in shares and not any(image.split == "test" for image in images):
        shares = {**shares, "test": TEST_SHARE}
        notes.append(f"no test split is given, so {TEST_SHARE:.0%} of the labelled images are held out as one")
    for split in ("test", "val"):  # test first: a val split never changes the test images
        if split in shares:
            images, note = _hold_out(images, split, shares[split])
            notes.append(note)
    return images


def _hold_out(images: list[LabelledRef], split: str, share: float) -> tuple[list[LabelledRef], str]:
    """Move a share of the train images of every class to another split, whole groups only; at least 2 per class stay."""
    units: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, image in enumerate(images):
        if image.split == "train":
            units[("group", image.group) if image.group else ("image", image.ref.id)].append(i)
    left = Counter(image.label for image in images if image.split == "train")
    aim = {name: min(max(int(share * n + 0.5), 1), max(n - 2, 0)) for name, n in left.items()}
    need, taken = dict(aim), []
    order = sorted(units, key=lambda unit: hashlib.blake2b("\0".join((split, *unit)).encode(), digest_size=16).digest())
    counts = {unit: Counter(images[i].label for i in units[unit]) for unit in order}

    def take(unit: tuple[str, str]) -> None:
        taken.append(unit)
        for name, m in counts[unit].items():
            need[name] -= m
            left[name] -= m

    for unit in order:
        mine = counts[unit]
        nearer = sum(abs(need[name]) - abs(need[name] - m) for name, m in mine.items())
        if nearer > 0 and all(left[name] - m >= 2 for name, m in mine.items()):
            take(unit)
    for name in sorted(aim):  # a class of few large groups gives its smallest group
        if aim[name] and need[name] == aim[name]:
            free = [u for u in order if name in counts[u] and all(left[n] - m >= 2 for n, m in counts[u].items())]
            if free:
                take(min(free, key=lambda u: len(units[u])))
    held = {i for unit in taken for i in units[unit]}
    note = f"{split}: {len(held)} of the train images ({share:.0%} of each class), by a fixed hash of their ids"
    return [replace(image, split=split) if i in held else image for i, image in enumerate(images)], note
