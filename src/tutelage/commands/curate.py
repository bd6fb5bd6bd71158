"""Stage 0: choose the transfer set from a gallery, by the labelled images of a target set.

The labelled images within the label budget are the queries. The frozen teacher embeds every gallery image once (its pixels
are not kept); copies of validation and test images, including mirrored and cropped ones, are excluded; and a strategy
chooses the images that the student is trained on. Only these are decoded into the cache.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tutelage.curation.labelled_set import LabelledSplit
from tutelage.curation.vectors import Vectors
from tutelage.data.gallery import list_gallery
from tutelage.data.image_cache import Store
from tutelage.data.label_budget import folds
from tutelage.data.sources import ImageRef, Rejected
from tutelage.device import as_single_process
from tutelage.errors import TutelageError
from tutelage.files import hash_of
from tutelage.json_object import JSON
from tutelage.metrics import softmax
from tutelage.models import linear_probe
from tutelage.pipeline.preflight import preflight, share_of, strategy_of
from tutelage.pipeline.stage import open_run
from tutelage.progress import logger, progress
from tutelage.results import CurationResult, ShardResult
from tutelage.run_folder import Clock, Run
from tutelage.settings import command, identity
from tutelage.settings.command_flags import CurateSettings

if TYPE_CHECKING:
    from tutelage.curation.candidates import LeakCheck
    from tutelage.curation.embedders import GalleryEmbedder, Queries
    from tutelage.curation.selection import Pool
    from tutelage.curation.strategies import Choice

SPARE = 1.25  # `random` first looks at this many times the wanted number of images, since some will be duplicates
SMOKE_PART = 512  # gallery images that --smoke looks at
RULES = 2  # version of the selection rules: a new number where the same inputs now give another choice
KNOWN_BY_CONTENT = {  # settings that hashes of the images, the labels and the embedder stand for
    "task", "target", "gallery", "val", "test", "classes", "group_by", "embeddings", "text_embeddings", "clip", "clip_weights", "templates",
    "teacher", "teacher_weights", "teacher_size", "teacher_window", "student", "student_size", "precision"
}  # fmt: skip


@command(CurateSettings)
def curate(settings: CurateSettings) -> CurationResult | ShardResult:
    """Choose the transfer set that the student is trained on: the labelled images, and gallery images near them."""
    from tutelage.curation import labelled_set
    from tutelage.curation.candidates import memory_of
    from tutelage.curation.curation_outputs import log_transfer_set
    from tutelage.curation.embedders import GalleryEmbedder
    from tutelage.curation.split_copies import copies_across_splits, report_copies

    if settings.shard is not None:
        return embed_share(settings.shard, settings)
    with open_run(settings) as (run, cache_dir):
        settings = replace(settings, strategy=strategy_of(settings))
        target_set = labelled_set.read_labels(run, settings)
        gallery, unlisted = list_gallery(settings.gallery)
        encoder = GalleryEmbedder.of(settings, cache_dir)
        inputs = hash_of([
            "curate", RULES, encoder.side, encoder.identity, identity(settings, KNOWN_BY_CONTENT), target_set.classes,
            hash_of([[ref.id, ref.fingerprint.hex()] for ref in [*target_set.refs, *target_set.masks, *gallery]]),
            target_set.splits.tolist(), target_set.labels.tolist(), target_set.groups.tolist()
        ])  # fmt: skip
        if done := run.done("curate", inputs):
            return CurationResult(**done, reused=True)
        given = labelled_set.data_of(target_set, gallery)
        labelled_set.log_changed_data(run, given)
        clock = run.clock("curate")
        for note in target_set.notes:
            logger.info(note)
        store = Store(cache_dir, encoder.side)
        with progress("decode", len(store.missing(target_set.refs))) as advance:
            store.add(target_set.refs, clock.ticking(advance))
        images, rows, bad = store.find(target_set.refs)
        bad = [("target", one) for one in [*target_set.rejected, *bad]]
        # now, for errors about labels point there; --max-rejected counts all images
        labelled_set.list_rejected(run, bad)
        labelled = labelled_set.split_labels(target_set, images, rows, settings.budget, settings.seed)
        copies = copies_across_splits(labelled, encoder, memory_of(settings))
        report_copies(run, labelled, copies)
        chosen = _choose(settings, encoder, labelled, gallery, clock)
        bad += [("gallery", one) for one in [*unlisted, *chosen.unreadable]]
        looked_at = len(target_set.refs) + len(chosen.refs) + len(target_set.rejected) + len(unlisted)
        labelled_set.reject(run, bad, looked_at, settings.max_rejected)
        if len(chosen.choice):
            log_transfer_set(len(chosen.choice), chosen.wanted, chosen.leaks.looked_at, chosen.leaks.near)
        summary = _write(run, settings, encoder, labelled, chosen, store, clock)
        counts = {split: int((target_set.splits[labelled.kept] == split).sum()) for split in ("train", "val", "test")}
        counts["transfer"] = len(labelled.drawn) + len(chosen.choice)
        logger.info(
            f"validation {counts['val']:,} · test {counts['test']:,} · transfer set {counts['transfer']:,}: "
            f"{len(labelled.drawn):,} labelled + {len(chosen.choice):,} of {len(gallery):,} gallery images ("
            f"{len(chosen.leaks.leaks):,} held out as validation/test, {chosen.duplicates:,} duplicates, "
            f"{chosen.near_duplicates:,} near duplicates)"
        )
        result = {
            "given": given, "task": target_set.task, "classes": list(target_set.classes), "store_side": encoder.side,
            "strategy": settings.strategy, "images": counts, "gallery": len(gallery), "leaks": len(chosen.leaks.leaks),
            "duplicates": chosen.duplicates, "near_duplicates": chosen.near_duplicates, "rejected": len(bad), **summary,
            "split_copies": len(copies), **target_set.about(labelled.drawn), "seconds": clock.stop()
        }  # fmt: skip
        return CurationResult(**run.finish("curate", inputs, result))


@dataclass(frozen=True)
class _Chosen:
    """The images that were chosen. pool: the gallery images that were looked at, whose references are `refs`. choice: rows of the pool,
    none if the gallery holds nothing but the labelled images. wanted: number of images asked for, 0 for all. near_duplicates, duplicates:
    numbers of images left out. unreadable: gallery images that cannot be decoded."""

    pool: Pool
    refs: list[ImageRef]
    choice: Choice
    queries: Queries
    wanted: int
    near_duplicates: int
    duplicates: int
    leaks: LeakCheck
    unreadable: list[Rejected]


def _choose(
    settings: CurateSettings, encoder: GalleryEmbedder, labelled: LabelledSplit, listed: list[ImageRef], clock: Clock
) -> _Chosen:
    """Embed the gallery and choose from it; more images than can be used are an error, and so are none. A sample with too few images of
    its own is doubled. listed: the gallery."""
    from tutelage.curation.candidates import fill_pool, nothing_left
    from tutelage.curation.selection import SelectionRequest, choose, wanted_of

    labels, related = labelled.target.labels[labelled.drawn], labelled.target.groups[labelled.drawn]
    wanted, spare = wanted_of(settings, len(labelled.drawn), len(labelled.target.classes)), SPARE
    while True:
        refs = gallery_sample(listed, settings, wanted, spare)
        spare *= 2
        pool, leaks, known, duplicates, unreadable = fill_pool(encoder, refs, labelled, settings, clock.ticking)
        every, free = len(refs) == len(listed), int(pool.usable.sum())
        if not every and free < (wanted or 0):
            continue
        queries = encoder.queries(labelled, pool.vectors.mean)
        if wanted is not None and wanted > free > 0 and not settings.smoke:
            usable = f"{free + len(labels):,} images that can be used: {len(labels):,} labelled and {free:,} of the gallery's own"
            asked, flag = f"--total {settings.total} is more than the {usable}", "--total"
            if settings.per_query:
                asked, flag = (
                    f"--per-query {settings.per_query} asks for {wanted:,} images, more than the {usable}",
                    "--per-query",
                )
            raise TutelageError(asked, f"lower {flag}, or add another --gallery")
        request = SelectionRequest(
            settings.strategy,
            free if wanted is None or wanted > free > 0 else wanted,
            np.unique(queries.labels, return_inverse=True)[1]
            if settings.balance == "class"
            else np.arange(len(queries.labels)),
            settings.seed,
            settings.dedup,
            lambda embeddings, own=queries.vectors: unsure(own, labels, related, embeddings, settings.seed),
        )
        choice, near_duplicates = choose(pool, queries.vectors, request, leaks)
        if every or len(choice) >= (wanted or 0):
            break
    if not len(choice):
        if known < len(pool.embedded):
            raise nothing_left(pool, leaks.leaks, known)
        logger.info("the gallery holds nothing but the labelled images: the student is trained on these only")
    choice, asked = choice.take(np.argsort(choice.rows, kind="stable")), 0 if wanted is None else request.wanted
    return _Chosen(pool, refs, choice, queries, asked, near_duplicates, duplicates, leaks, unreadable)


def _write(
    run: Run,
    settings: CurateSettings,
    encoder: GalleryEmbedder,
    labelled: LabelledSplit,
    chosen: _Chosen,
    store: Store,
    clock: Clock,
) -> JSON:
    """Decode the chosen images; write manifests, leaks and montage; return what the result says about the choice."""
    from tutelage.curation import curation_outputs as written

    choice, embedded, queries = chosen.choice, chosen.pool.embedded, chosen.queries
    refs = [chosen.refs[i] for i in embedded.positions[choice.rows]]
    with progress("decode the chosen", len(store.missing(refs))) as advance:
        store.add(refs, clock.ticking(advance))
    images, found, bad = store.find(refs)
    if len(bad) or not np.array_equal(images.keys, embedded.keys[choice.rows]):
        raise TutelageError(
            f"the gallery changed while it was read: {len(refs) - len(found):,} chosen images can no longer be read, "
            "or others have changed",
            "run the same command again, and leave the gallery unchanged meanwhile",
        )
    if encoder.is_teacher:
        encoder.hand_on(images, Vectors(embedded.parts, None).rows(choice.rows))
    written.write_manifests(run, labelled, refs, choice, embedded, settings.strategy, queries.names)
    leaks = chosen.leaks.leaks
    leak_refs = [chosen.refs[embedded.positions[leak.row]] for leak in leaks]
    written.write_leaks(run, labelled, leak_refs, leaks)
    kept_out = written.pairs(store, labelled, leak_refs, leaks)
    written.write_montage(run, labelled, images, choice, kept_out, len(leaks), queries)
    outputs = written.identity(labelled, refs, embedded, choice)
    return {"outputs": outputs, **written.summary(chosen.pool, choice, queries, labelled)}


def gallery_sample(refs: list[ImageRef], settings: CurateSettings, wanted: int | None, spare: float) -> list[ImageRef]:
    """Return the part of the gallery to embed: all of it, except for `random` a seeded part of `spare` times the wanted number, and
    with --smoke a seeded part for every strategy, twice as large where it searches."""
    if settings.strategy == "random" and wanted is not None:
        most = int(spare * wanted) + 64
    elif settings.smoke:
        most = int(SMOKE_PART * spare / SPARE) * (1 if wanted is None else 2)
    else:
        return refs
    if settings.smoke and most < len(refs):
        logger.info(f"--smoke looks at {most:,} of {len(refs):,} gallery images")
    order = np.random.default_rng(settings.seed).permutation(len(refs))
    return [refs[i] for i in np.sort(order[:most])]


def unsure(queries: np.ndarray, labels: np.ndarray, groups: np.ndarray, others: np.ndarray, seed: int) -> np.ndarray:
    """Return how uncertain a probe fitted on the labelled images is about other images: its entropy in nats.

    Args:
        queries: (Q, D) float32 with labels (Q,) int64 and groups (Q,) text, "" for no group. others: (m, D) float32.

    Returns:
        (m,) float64.
    """
    fold = folds(labels, groups, seed)
    probe = linear_probe.best_probe(queries, labels, fold, int(labels.max()) + 1, linear_probe.scale_of(others))
    probabilities = softmax(probe(others))
    return -(probabilities * np.log(np.maximum(probabilities, 1e-12))).sum(axis=1)


def embed_share(shard: str, settings: CurateSettings) -> ShardResult:
    """Embed one share of the gallery into the cache; the run folder is left unchanged.

    The processes of a job array need not know each other: no process group is started, and each prints what it does.
    """
    from tutelage.curation.embedders import GalleryEmbedder

    share, start = share_of(shard), time.monotonic()
    out = Path(os.path.abspath(settings.out))
    cache = Path(settings.cache) if settings.cache else out.parent / "cache"

    with as_single_process():
        preflight(replace(settings, out=str(out), shard=f"{share[0]}/{share[1]}"), cache)
        refs = list_gallery(settings.gallery)[0]
        _, pieces, embedded = GalleryEmbedder.of(settings, cache).embedded(refs, settings, share)
        mine = sum(len(piece.refs) for piece in pieces[share[0] :: share[1]])
        counts = f"{mine:,} of {len(refs):,} images, {embedded:,} of them embedded now"
        logger.info(f"share {share[0]} of {share[1]}: {counts}")
    taken = time.monotonic() - start
    return ShardResult(shard=f"{share[0]}/{share[1]}", images=mine, embedded=embedded, seconds=taken)
