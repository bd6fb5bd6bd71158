"""The manifests of a run folder: which images a run uses, where they come from, and their split or query.

`curate/manifest.parquet` lists the images that the student is trained on, labelled images first;
`target_set/manifest.parquet` the labelled, validation and test images with their labels. Labels beyond the budget are in neither.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tutelage.data.class_names import is_utf8
from tutelage.data.image_cache import Images, Store
from tutelage.data.masks import Labels, MaskEncoding, Masks, kind_of, truth_of
from tutelage.data.sources import SOURCE, ImageRef, fingerprints_of
from tutelage.errors import TutelageError, shown
from tutelage.files import atomic_write, damaged, intact, read_json
from tutelage.json_object import JSON

_RESTORE = "restore the files as they were when the transfer set was chosen, or curate again with --overwrite"


@dataclass(frozen=True)
class Labelled:
    """Images with their labels. labels: (n,) int64 in [0, C), or n masks; groups: (n,) text, "" for none."""

    ids: list[str]
    images: Images
    labels: Labels
    groups: np.ndarray

    @property
    def strata(self) -> np.ndarray:
        """(n,) int64: the classes by which folds are stratified; all 0 if the images have masks."""
        return self.labels if isinstance(self.labels, np.ndarray) else np.zeros(len(self), np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, positions: np.ndarray) -> Labelled:
        """Return the images at these positions."""
        ids = [self.ids[i] for i in positions.tolist()]
        return Labelled(ids, self.images.take(positions), self.labels[positions], self.groups[positions])


@dataclass(frozen=True)
class TaskData:
    """All images of one run, decoded.

    train: the labelled images within the budget. val, test: None if there are none. transfer: the transfer set; its first
    len(train) images are those of train, in the same order. side: short side of the stored images in pixels. about: the result of
    curation.
    """

    task: str
    classes: tuple[str, ...]
    train: Labelled
    val: Labelled | None
    test: Labelled | None
    transfer: Images
    side: int
    about: JSON


def write_manifest(path: Path, refs: Sequence[ImageRef], columns: Mapping[str, Sequence[object]]) -> None:
    """Write one manifest: the location of each image, and further columns."""
    rows = {**{name: [getattr(ref, name) for ref in refs] for name in SOURCE}, **columns}
    for name in [name for name in rows if name.endswith("container")]:
        paths = [os.fsencode(str(one)) for one in rows[name]]
        if not all(map(is_utf8, paths)):
            rows[name] = paths  # which Parquet holds as bytes only
    with atomic_write(path) as temporary:
        pq.write_table(pa.table(rows), temporary)


def read_manifest(path: Path) -> tuple[list[ImageRef], pa.Table]:
    """Return the images of a manifest, and all of its columns."""
    try:
        table = pq.read_table(path)
        return _refs(table), table
    except (OSError, pa.ArrowException, KeyError) as error:
        raise damaged(path, str(error).partition("\n")[0]) from error


def _refs(table: pa.Table, prefix: str = "") -> list[ImageRef]:
    """Return the references in the columns `prefix` + id, container, ...; "mask_" for a manifest's masks."""
    columns = {name: table.column(f"{prefix}{name}").to_pylist() for name in SOURCE}
    columns["container"] = [os.fsdecode(path) for path in columns["container"]]
    return [ImageRef(*row) for row in zip(*columns.values(), strict=True)]


def load_task(run: Path, cache: str | Path) -> TaskData:
    """Open the images of a run whose transfer set has been curated; decode only those that the cache lacks.

    Raises:
        TutelageError: images are gone or have changed since they were chosen.
    """
    about = read_json(run / "curate" / "result.json")
    store = Store(cache, about["store_side"])
    refs, table = read_manifest(intact(run / "target_set" / "manifest.parquet", run / "curate"))
    extra, transfer = read_manifest(intact(run / "curate" / "manifest.parquet"))
    images = _as_chosen(store, [*refs, *extra], [*table.column("key").to_pylist(), *transfer.column("key").to_pylist()])
    splits = np.array(table.column("split").to_pylist(), dtype=str)
    labels: Labels = np.array(table.column("label").to_pylist(), dtype=np.int64)
    if "mask_truth" in table.column_names:
        truths = table.column("mask_truth").to_pylist()
        labels = load_masks(cache, _refs(table, "mask_"), images.sizes[: len(refs)], about, truths)
    groups = np.array(table.column("group").to_pylist(), dtype=str)

    def part(split: str) -> Labelled | None:
        rows = np.flatnonzero(splits == split)
        if not len(rows):
            return None
        return Labelled([refs[i].id for i in rows], images.take(rows), labels[rows], groups[rows])

    train = part("train")
    assert train is not None
    chosen = images.take(np.arange(len(refs), len(images)))
    return TaskData(
        about["task"],
        tuple(about["classes"]),
        train,
        part("val"),
        part("test"),
        chosen,
        about["store_side"],
        about,
    )


def load_masks(
    cache: str | Path, refs: Sequence[ImageRef], shapes: np.ndarray, about: JSON, truths: Sequence[bytes]
) -> Masks:
    """Return masks from the cache, decoding those that it lacks.

    Args:
        refs: n masks. shapes: (n, 2), height and width of their stored images. about: the result of curation. truths: n hashes by
            `masks.truth_of`, as they were when the images were chosen.

    Raises:
        TutelageError: masks are gone, cannot be read, or have changed.
    """
    colours = tuple((r, g, b) for r, g, b in about["colours"])
    ignored = tuple((r, g, b) for r, g, b in about["ignored_colours"])
    store = Store(cache, 0, kind_of(MaskEncoding(tuple(about["classes"]), colours, about["coloured"], ignored)))
    masks, good, wrong, read = _found(store, refs)
    for place, i in enumerate(good):
        if i in read and truth_of(masks[place]) != truths[i]:
            wrong.append(f"{refs[i].id} (another mask now)")
    _refuse("masks", wrong)
    return Masks(masks, shapes)


def transfer_keys(run: Path) -> list[bytes]:
    """Return the content hash of each image of the transfer set, from the manifest only: no image is opened."""
    return pq.read_table(run / "curate" / "manifest.parquet", columns=["key"]).column("key").to_pylist()


def _as_chosen(store: Store, refs: Sequence[ImageRef], keys: Sequence[bytes]) -> Images:
    """Return all images; raise an error unless they have the content that they had when they were chosen."""
    images, good, wrong, _ = _found(store, refs)
    for i, key in zip(good, images.keys, strict=True):
        if keys[i] != key.tobytes():
            wrong.append(f"{refs[i].id} (another image now)")
    _refuse("images", list(dict.fromkeys(wrong)))
    return images


def _found(store: Store, refs: Sequence[ImageRef]) -> tuple[Images, list[int], list[str], set[int]]:
    """Return the usable images and their positions in `refs`, the others in words, and which positions the cache lacked."""
    lost = {ref.fingerprint for ref in store.missing(refs)}
    read = {i for i, ref in enumerate(refs) if ref.fingerprint in lost}
    refs = [_present(ref) if i in read else ref for i, ref in enumerate(refs)]
    store.add(refs)
    images, good, bad = store.find(refs)
    return images, good.tolist(), [f"{one.id} ({one.reason})" for one in bad], read


def _refuse(what: str, wrong: list[str]) -> None:
    """Raise an error if there is anything wrong."""
    if wrong:
        raise TutelageError(f"{len(wrong):,} {what} of the run are gone or have changed: {shown(wrong)}", _RESTORE)


def _present(ref: ImageRef) -> ImageRef:
    """Return the reference with its file's present fingerprint, so that a changed file is not cached under its former one."""
    try:
        return replace(ref, fingerprint=fingerprints_of(ref.kind, ref.container, os.stat(ref.container))(ref.position))
    except OSError:
        return ref
