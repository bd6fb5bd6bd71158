"""Stage 0: choose the transfer set from a gallery, by the labelled images of a target set.

The labelled images within the label budget are the queries. The frozen teacher embeds every gallery image once (its pixels
are not kept); copies of validation and test images, including mirrored and cropped ones, are excluded; and a strategy
chooses the images that the student is trained on. Only these are decoded into the cache.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tutelage.errors import TutelageError
from tutelage.pipeline.preflight import strategy_of
from tutelage.pipeline.stage import open_run
from tutelage.progress import progress, say
from tutelage.results import CurationResult, ShardResult
from tutelage.run_folder import Run, hash_of
from tutelage.settings import command, identity
from tutelage.settings.commands import CurateSettings

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
    from tutelage.curation.candidates import fill_pool, nothing_left
    from tutelage.curation.curation_outputs import log_transfer_set
    from tutelage.curation.embedders import GalleryEmbedder
    from tutelage.curation.labelled_set import (
        data_of,
        list_rejected,
        log_changed_data,
        read_labels,
        reject,
        split_labels,
    )
    from tutelage.curation.selection import wanted_of
    from tutelage.data.gallery import list_gallery
    from tutelage.data.image_cache import Store

    if settings.shard is not None:
        return embed_share(settings.shard, settings)
    with open_run(settings) as (run, cache_dir):
        settings = replace(settings, strategy=strategy_of(settings))
        target_set = read_labels(run, settings)
        listed = list_gallery(settings.gallery)
        encoder = GalleryEmbedder.of(settings, cache_dir)
        inputs = hash_of([
            "curate", RULES, encoder.side, encoder.identity, identity(settings, KNOWN_BY_CONTENT), target_set.classes,
            hash_of([[ref.id, ref.fingerprint.hex()] for ref in [*target_set.refs, *target_set.masks, *listed.refs]]),
            target_set.splits.tolist(), target_set.labels.tolist(), target_set.groups.tolist()
        ])  # fmt: skip
        if done := run.done("curate", inputs):
            return CurationResult(**done, reused=True)
        given = data_of(target_set, listed.refs)
        log_changed_data(run, given)
        clock = run.clock("curate")
        for note in target_set.notes:
            say(note)
        store = Store(cache_dir, encoder.side)
        with progress("decode", len(store.missing(target_set.refs))) as advance:
            store.add(target_set.refs, clock.ticking(advance))
        images, rows, bad = store.find(target_set.refs)
        bad = [("target", one) for one in [*target_set.rejected, *bad]]
        list_rejected(run, bad)  # now, for errors about labels point there; --max-rejected counts all images
        labelled = split_labels(target_set, images, rows, settings.budget, settings.seed)
        wanted = wanted_of(settings, len(labelled.drawn), len(target_set.classes))
        spare = SPARE
        while True:
            refs = gallery_sample(listed.refs, settings, wanted, spare)
            pool, leaks, known, twice, unreadable = fill_pool(encoder, refs, labelled, settings, clock.ticking)
            chosen = _Chosen(run, settings, encoder, labelled, pool, refs, clock, given)
            every = len(refs) == len(listed.refs)
            if every or pool.usable.sum() >= (wanted or 0):
                chosen.choose(wanted, leaks)
                if every or len(chosen.choice) >= (wanted or 0):
                    break
            spare *= 2  # the sample was too small: too many of its images were duplicates or copies
        if not len(chosen.choice):
            if known < len(pool.embedded):
                raise nothing_left(pool, leaks.leaks, known)
            say("the gallery holds nothing but the labelled images: the student is trained on these only")
        bad += [("gallery", one) for one in [*listed.rejected, *unreadable]]
        reject(
            run,
            bad,
            len(target_set.refs) + len(refs) + len(target_set.rejected) + len(listed.rejected),
            settings.max_rejected,
        )
        if len(chosen.choice):
            log_transfer_set(len(chosen.choice), chosen.wanted, leaks.looked_at, leaks.near)
        return chosen.finish(inputs, store, leaks.leaks, twice, len(bad), len(listed.refs))


def gallery_sample(refs: list, settings: CurateSettings, wanted: int | None, spare: float) -> list:
    """Return the part of the gallery to embed: all of it, except for `random` a seeded part of `spare` times the wanted number, and
    with --smoke a seeded part for every strategy, twice as large where it searches."""
    if settings.strategy == "random" and wanted is not None:
        most = int(spare * wanted) + 64
    elif settings.smoke:
        most = int(SMOKE_PART * spare / SPARE) * (1 if wanted is None else 2)
    else:
        return refs
    if settings.smoke and most < len(refs):
        say(f"--smoke looks at {most:,} of {len(refs):,} gallery images")
    order = np.random.default_rng(settings.seed).permutation(len(refs))
    return [refs[i] for i in np.sort(order[:most])]


class _Chosen:
    """The chosen images, and what is written about them."""

    def __init__(self, run: Run, settings, encoder, labelled, pool, refs, clock, given):
        self.run, self.settings, self.encoder, self.labelled, self.given = run, settings, encoder, labelled, given
        self.pool, self.refs, self.clock = pool, refs, clock

    def choose(self, wanted: int | None, leaks: Any) -> None:
        """Choose the gallery images. leaks: the LeakCheck of the pool."""
        from tutelage.curation.selection import SelectionRequest, choose

        labelled, settings = self.labelled, self.settings
        labels, related = labelled.target.labels[labelled.drawn], labelled.target.groups[labelled.drawn]
        queries = self.encoder.queries(labelled, self.pool.vectors.mean)
        free = int(self.pool.usable.sum())
        if wanted is not None and wanted > free > 0:
            if not settings.smoke:
                raise TutelageError(
                    f"--total {settings.total or wanted + len(labels)} is more than the {free + len(labels):,} images "
                    f"that can be used: {len(labels):,} labelled and {free:,} of the gallery's own",
                    "lower --total, or add another --gallery",
                )
            wanted = free
        groups = queries.labels if settings.balance == "class" else np.arange(len(queries.labels))
        wish = SelectionRequest(
            settings.strategy, free if wanted is None else wanted, groups, settings.seed, settings.dedup,
            lambda embeddings: unsure(queries.vectors, labels, related, embeddings, settings.seed)
        )  # fmt: skip
        self.choice, self.passed = choose(self.pool, queries.vectors, wish, leaks)
        self.queries, self.wanted = queries, wish.wanted if wanted is not None else 0

    def finish(self, inputs: str, store, leaks, twice: int, rejected: int, listed: int) -> CurationResult:
        """Decode the chosen images, and write manifests, leaks, montage and result."""
        from tutelage.curation import curation_outputs as written
        from tutelage.curation.vectors import Vectors

        queries = self.queries
        choice = self.choice.take(np.argsort(self.choice.rows, kind="stable"))
        embedded, labelled = self.pool.embedded, self.labelled
        refs = [self.refs[i] for i in embedded.positions[choice.rows]]
        with progress("decode the chosen", len(store.missing(refs))) as advance:
            store.add(refs, self.clock.ticking(advance))
        images, found, bad = store.find(refs)
        if len(bad) or not np.array_equal(images.keys, embedded.keys[choice.rows]):
            raise TutelageError(
                f"the gallery changed while it was read: {len(refs) - len(found):,} chosen images can no longer be read, "
                "or others have changed",
                "run the same command again, and leave the gallery unchanged meanwhile",
            )
        if self.encoder.is_teacher:
            self.encoder.hand_on(images, Vectors(embedded.parts, None).rows(choice.rows))
        written.write_manifests(self.run, labelled, refs, choice, embedded, self.settings.strategy, queries.names)
        leak_refs = [self.refs[embedded.positions[leak.row]] for leak in leaks]
        written.write_leaks(self.run, labelled, leak_refs, leaks)
        kept_out = written.pairs(store, labelled, leak_refs, leaks)
        written.write_montage(self.run, labelled, images, choice, kept_out, queries)
        summary = written.summary(self.pool, choice, queries, labelled)
        counts = {
            split: int((labelled.target.splits[labelled.kept] == split).sum()) for split in ("train", "val", "test")
        }
        chosen = len(refs)
        say(
            f"validation {counts['val']:,} · test {counts['test']:,} · transfer set {chosen + len(labelled.drawn):,}: "
            f"{len(labelled.drawn):,} labelled + {chosen:,} of {listed:,} gallery images ("
            f"{len(leaks):,} held out as validation/test, {twice:,} duplicates, {self.passed:,} near duplicates)"
        )
        result = {
            "outputs": written.identity(labelled, refs, embedded, choice), "given": self.given, "task": labelled.target.task,
            "classes": list(labelled.target.classes), "store_side": self.encoder.side, "strategy": self.settings.strategy,
            "images": {**counts, "transfer": chosen + len(labelled.drawn)}, "gallery": listed, "leaks": len(leaks),
            "duplicates": twice, "near_duplicates": self.passed, "rejected": rejected, **summary,
            **labelled.target.about(labelled.drawn), "seconds": self.clock.stop()
        }  # fmt: skip
        return CurationResult(**self.run.finish("curate", inputs, result))


def unsure(
    queries: np.ndarray, labels: np.ndarray, groups: np.ndarray, embeddings: np.ndarray, seed: int
) -> np.ndarray:
    """Return how uncertain a probe fitted on the labelled images is about other images: its entropy in nats.

    Args:
        queries: (Q, D) float32 with labels (Q,) int64 and groups (Q,) text, "" for no group. embeddings: (m, D) float32.

    Returns:
        (m,) float64.
    """
    from tutelage.data.label_budget import folds
    from tutelage.metrics import softmax
    from tutelage.models import heads

    fold = folds(labels, groups, seed)
    probe = heads.best_probe(queries, labels, fold, int(labels.max()) + 1, heads.scale_of(embeddings))
    probabilities = softmax(probe(embeddings))
    return -(probabilities * np.log(np.maximum(probabilities, 1e-12))).sum(axis=1)


def embed_share(shard: str, settings: CurateSettings) -> ShardResult:
    """Embed one share of the gallery into the cache; the run folder is left unchanged.

    The processes of a job array need not know each other: no process group is started, and each prints what it does.
    """
    from tutelage.curation.embedders import GalleryEmbedder
    from tutelage.data.gallery import list_gallery
    from tutelage.device import on_a_device_of_its_own
    from tutelage.pipeline.preflight import preflight, share_of

    share, start = share_of(shard), time.monotonic()
    out = Path(settings.out).absolute()
    cache = Path(settings.cache) if settings.cache else out.parent / "cache"

    with on_a_device_of_its_own():
        preflight(replace(settings, out=str(out), shard=f"{share[0]}/{share[1]}"), cache)
        refs = list_gallery(settings.gallery).refs
        _, pieces, embedded = GalleryEmbedder.of(settings, cache).embedded(refs, settings, share)
        mine = sum(len(piece.refs) for piece in pieces[share[0] :: share[1]])
        say(f"share {share[0]} of {share[1]}: {mine:,} of {len(refs):,} images, {embedded:,} of them embedded now")
    taken = time.monotonic() - start
    return ShardResult(shard=f"{share[0]}/{share[1]}", images=mine, embedded=embedded, seconds=taken)
