"""Stage 0: a gallery and a target set in, the transfer set out.

Lists and decodes all images once, draws the labelled images within the budget, keeps validation and test images out of
the transfer set by content, and writes who takes part to two manifests. Retrieval strategies choose here; today the
gallery is taken whole or sampled at random.
"""

from __future__ import annotations

import csv
import io
from typing import Any

import numpy as np

from tutelage import config as c
from tutelage.config import recipe
from tutelage.errors import TutelageError, raise_all, shown
from tutelage.progress import progress, say
from tutelage.recipes.stage import open_run
from tutelage.runs import Run, hash_of, write_text


@recipe
def curate(
    *, target: c.Target = "", gallery: c.Paths = [], out: c.Out = "", val: c.Val = None, test: c.Test = None,  # noqa: B006
    classes: c.Classes = None, budget: c.Budget = None, group_by: c.GroupBy = None, strategy: c.Strategy = "all",
    total: c.Total = None, max_rejected: c.MaxRejected = 0.05, teacher: c.Teacher = "dinov2-s",
    teacher_size: c.TeacherSize = None, student: c.Student = "mobilenetv4-s", student_size: c.StudentSize = None,
    seed: c.Seed = 0, cache: c.Cache = None, overwrite: c.Overwrite = False, config: c.Config = None,
) -> dict[str, Any]:  # fmt: skip
    """Choose the images that the student learns on: the labelled ones and those of the gallery.

    Returns:
        result of the stage: classes, counts, hashes, seconds.
    """
    settings = dict(locals())
    from tutelage.data.gallery import list_gallery
    from tutelage.data.store import Store, short_side
    from tutelage.data.target_set import read_target_set

    chosen_classes = [name.strip() for name in classes.split(",")] if classes else None
    with open_run(out, cache, settings, overwrite) as (run, cache_dir):
        labelled = read_target_set(target, val=val, test=test, classes=chosen_classes, group_by=group_by)
        pool = list_gallery(gallery)
        side = short_side(_size(teacher, teacher_size, "teacher"), _size(student, student_size, "student"))
        listing = [[ref.id, ref.fingerprint.hex()] for ref in [*labelled.refs, *pool.refs]]
        inputs = hash_of([
            "curate", side, hash_of(listing), labelled.classes, *_columns(labelled, np.arange(len(labelled.refs))).values(),
            {k: settings[k] for k in ("budget", "strategy", "total", "seed")},
        ])  # fmt: skip
        if done := run.done("transfer_set", inputs):
            return {**done, "reused": True}
        clock = run.clock("transfer_set")
        for note in labelled.notes:
            say(note)
        store = Store(cache_dir, side)
        everything = [*labelled.refs, *pool.refs]
        with progress("decode", len(store.missing(everything))) as advance:
            store.add(everything, clock.ticking(advance))
        found = _Found.of(store, labelled, pool)
        _reject(run, found, len(everything) + len(labelled.rejected) + len(pool.rejected), max_rejected)
        return _write(run, inputs, clock, labelled, pool, found, settings, side)


def _size(name: str, size: int | None, kind: str) -> int:
    """Input side in pixels; timm (5 s) is asked only where none is given."""
    if size is not None:
        return size
    from tutelage.models.teachers import default_size, resolve

    return default_size(resolve(name, kind))


def _columns(labelled, rows: np.ndarray) -> dict[str, list]:
    """What is known of these rows of the target set: split, label, group."""
    columns = {"split": labelled.splits, "label": labelled.labels, "group": labelled.groups}
    return {name: column[rows].tolist() for name, column in columns.items()}


class _Found:
    """Usable images of the target set and the gallery, by content."""

    def __init__(self, target_rows, target_keys, gallery_rows, gallery_keys, rejected):
        self.target_rows, self.target_keys = target_rows, target_keys
        self.gallery_rows, self.gallery_keys = gallery_rows, gallery_keys
        self.rejected = rejected

    @classmethod
    def of(cls, store, labelled, pool) -> _Found:
        images, rows, bad = store.find(labelled.refs)
        others, other_rows, other_bad = store.find(pool.refs)
        keys, other_keys = ([k.tobytes() for k in part.keys] for part in (images, others))
        rejected = [("target", r) for r in [*labelled.rejected, *bad]]
        rejected += [("gallery", r) for r in [*pool.rejected, *other_bad]]
        return cls(rows, keys, other_rows, other_keys, rejected)


def _reject(run: Run, found: _Found, total: int, most: float) -> None:
    """Write rejected.csv; stop when a larger share than `most` cannot be used."""
    if not found.rejected:
        (run.path / "rejected.csv").unlink(missing_ok=True)
        return
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(["set", "image", "reason"])
    rows.writerows([kind, item.id, item.reason] for kind, item in found.rejected)
    write_text(run.path / "rejected.csv", text.getvalue())
    count = len(found.rejected)
    say(f"{count:,} of {total:,} images cannot be used; they are listed in {run.path / 'rejected.csv'}")
    if count > most * total:
        first = shown((f"{item.id} ({item.reason})" for _, item in found.rejected), 3)
        raise TutelageError(
            f"{count:,} of {total:,} images cannot be used ({100 * count / total:.1f} %): {first}",
            f"at most {100 * most:g} % (--max-rejected {most:g})",
            f"mend or remove the images listed in {run.path / 'rejected.csv'}, or raise --max-rejected",
        )


def _check_labels(labelled, found: _Found) -> None:
    """One image with two labels, or in train and in test, makes every score a lie: refuse, with the pairs."""
    first: dict[bytes, int] = {}
    two_labels, leaks = [], []
    for row, key in zip(found.target_rows, found.target_keys, strict=True):
        other = first.setdefault(key, row)
        names = [
            f"{labelled.refs[i].id} ({labelled.splits[i]}, {labelled.classes[labelled.labels[i]]})"
            for i in (other, row)
        ]
        if labelled.labels[other] != labelled.labels[row]:
            two_labels.append(" = ".join(names))
        elif labelled.splits[other] != labelled.splits[row]:
            leaks.append(" = ".join(names))
    errors = []
    if two_labels:
        errors.append(TutelageError(
            f"the same image with two labels: {shown(two_labels)}", "one label for one image", "remove one of each pair",
        ))  # fmt: skip
    if leaks:
        errors.append(TutelageError(
            f"the same image in two splits: {shown(leaks)}",
            "no image in two splits", "remove one of each pair; give --group-by when products or patients repeat",
        ))  # fmt: skip
    raise_all(errors)


def _draw(labelled, found: _Found, budget: int | None, seed: int) -> np.ndarray:
    """Rows of the labelled images within the budget; the labels of the others are not read after this."""
    from tutelage.data.target_set import draw_budget, shortfalls

    train = [i for i, row in enumerate(found.target_rows) if labelled.splits[row] == "train"]
    seen: set[bytes] = set()
    train = [i for i in train if not (found.target_keys[i] in seen or seen.add(found.target_keys[i]))]
    rows = np.array([found.target_rows[i] for i in train], dtype=np.int64)
    labels = labelled.labels[rows]
    if lost := [name for number, name in enumerate(labelled.classes) if not (labels == number).any()]:
        raise TutelageError(
            f"no train image that can be used in {len(lost)} classes: {shown(map(repr, lost), 10)}",
            "at least one per class", "rejected.csv in the run folder says why; mend the images, or leave out --classes",
        )  # fmt: skip
    for line in shortfalls(labels, budget, labelled.classes):
        say(line)
    chosen = draw_budget(labels, [found.target_keys[i] for i in train], budget, seed, labelled.groups[rows])
    beyond = len(rows) - len(chosen)
    if beyond:
        say(
            f"{beyond:,} train images are beyond the budget: their labels are not used, and the images only if the gallery has them"
        )
    return rows[chosen]


def _candidates(labelled, pool, found: _Found, held: dict, taken: set[bytes]) -> tuple[dict[int, bytes], list, int]:
    """Gallery images to choose from.

    Args:
        held: content of validation and test images -> row. taken: content of the labelled images.

    Returns:
        row -> content; (gallery image, held image, split) of those that are held out; the number of duplicates.
    """
    candidates: dict[int, bytes] = {}
    seen, leaks, twice = set(taken), [], 0
    for row, key in zip(found.gallery_rows.tolist(), found.gallery_keys, strict=True):
        if key in held:
            leaks.append((pool.refs[row].id, labelled.refs[held[key]].id, labelled.splits[held[key]]))
        elif key in seen:
            twice += 1
        else:
            seen.add(key)
            candidates[row] = key
    if not candidates:
        raise TutelageError(
            f"the gallery has no image of its own: {len(leaks):,} are validation or test images, {twice:,} duplicates",
            "unlabelled images other than those of the target set", "give another --gallery",
        )  # fmt: skip
    return candidates, leaks, twice


def _write_leaks(run: Run, leaks: list) -> None:
    (run.path / "transfer_set" / "leaks.csv").unlink(missing_ok=True)
    if not leaks:
        return
    text = io.StringIO()
    csv.writer(text).writerows([("gallery_image", "is", "split", "how"), *[(*leak, "same pixels") for leak in leaks]])
    write_text(run.path / "transfer_set" / "leaks.csv", text.getvalue())
    say(f"{len(leaks):,} gallery images are validation or test images and stay out (transfer_set/leaks.csv)")


def _write(run: Run, inputs: str, clock, labelled, pool, found: _Found, settings: dict, side: int) -> dict[str, Any]:
    from tutelage.data.manifest import write_manifest
    from tutelage.retrieval.strategies import STRATEGIES

    _check_labels(labelled, found)
    drawn = _draw(labelled, found, settings["budget"], settings["seed"])
    key_of = dict(zip(found.target_rows.tolist(), found.target_keys, strict=True))
    held = {key_of[row]: row for row in key_of if labelled.splits[row] != "train"}
    taken = {key_of[row] for row in drawn.tolist()}
    candidates, leaks, twice = _candidates(labelled, pool, found, held, taken)
    places = list(candidates)
    total = settings["total"]
    if total is not None and total <= len(drawn):
        raise TutelageError(
            f"--total {total} with {len(drawn):,} labelled images, which count towards it",
            f"more than {len(drawn):,}: the rest comes from the gallery",
            "raise --total, or give a smaller --budget (--smoke takes at most 256 images)",
        )
    picked = STRATEGIES[settings["strategy"]](len(candidates), len(drawn), total, settings["seed"])
    chosen = [places[i] for i in picked]
    _write_leaks(run, leaks)
    kept = np.concatenate([drawn, [row for row in key_of if labelled.splits[row] != "train"]]).astype(np.int64)
    write_manifest(
        run.path / "target_set" / "manifest.parquet", [labelled.refs[i] for i in kept],
        {**_columns(labelled, kept), "key": [key_of[i] for i in kept.tolist()]},
    )  # fmt: skip
    refs = [labelled.refs[i] for i in drawn] + [pool.refs[i] for i in chosen]
    none = [None] * len(refs)
    write_manifest(
        run.path / "transfer_set" / "manifest.parquet", refs,
        {
            "source": ["target"] * len(drawn) + ["gallery"] * len(chosen),
            "strategy": ["labelled"] * len(drawn) + [settings["strategy"]] * len(chosen),
            "query": none, "similarity": none, "rank": none,
            "key": [key_of[i] for i in drawn.tolist()] + [candidates[i] for i in chosen],
        },
    )  # fmt: skip
    keys = [key_of[i] for i in kept] + sorted(candidates.values())
    counts = {split: int((labelled.splits[kept] == split).sum()) for split in ("train", "val", "test")}
    say(
        f"validation {counts['val']:,} · test {counts['test']:,} · transfer set {len(refs):,}: {len(drawn):,} labelled + "
        f"{len(chosen):,} of {len(pool.refs):,} gallery images ({len(leaks):,} held out as validation/test, {twice:,} duplicates)"
    )
    result = {
        "outputs": hash_of([
            [k.hex() for k in keys], labelled.classes, *_columns(labelled, kept).values(), [ref.id for ref in refs]
        ]),
        "task": labelled.task, "classes": list(labelled.classes), "store_side": side, "images": {**counts, "transfer": len(refs)},
        "gallery": len(pool.refs), "leaks": len(leaks), "duplicates": twice, "rejected": len(found.rejected),
        "seconds": clock.stop(),
    }  # fmt: skip
    return run.finish("transfer_set", inputs, result)
