"""Outputs of curation for people and for the later stages: manifests, leaks.csv, montage.jpg and a summary."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tutelage.curation.embed import EmbeddingTable
from tutelage.curation.embedders import Queries
from tutelage.curation.labelled_set import LabelledSplit, write_csv
from tutelage.curation.mmd import mmd, subsample_rows
from tutelage.curation.montage import KeptOut, Row, choose_rows, montage
from tutelage.curation.selection import Leak, Pool, nothing_near
from tutelage.curation.strategies import Choice
from tutelage.data.image_cache import Images, Store
from tutelage.data.manifest import write_manifest
from tutelage.data.sources import SOURCE, ImageRef
from tutelage.files import atomic_write, hash_of
from tutelage.json_object import JSON
from tutelage.progress import logger
from tutelage.run_folder import Run

MANY_LEAKS = 0.05  # share of the compared images above which the log comments on leaks
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
LEAKS_SHOWN = 15  # pairs of leaks in the montage: as many as fit on its three lines
SHOWN = 9  # images that the montage shows for each query


def log_transfer_set(chosen: int, wanted: int, compared: int, near: int) -> None:
    """Log what would surprise a user: fewer images than wanted, or many copies of held-out images among those compared.

    wanted: 0 = all usable images.
    """
    if chosen < wanted:
        logger.info(
            f"{chosen:,} gallery images instead of {wanted:,}: the others are near duplicates of these, or of validation or test images"
        )
    if near > MANY_LEAKS * compared:
        logger.info(
            f"{near:,} of {compared:,} gallery images that were compared count as copies of validation or test images: where all "
            "images show the same scene, that is to be expected; look at montage.jpg. --dedup none excludes only identical images"
        )


def write_manifests(
    run: Run,
    labelled: LabelledSplit,
    refs: list[ImageRef],
    choice: Choice,
    embedded: EmbeddingTable,
    strategy: str,
    queries: list[str],
) -> None:
    """Write both manifests. refs: the chosen gallery images, in the order of `choice`. queries: names of the queries."""
    target, kept, drawn = labelled.target, labelled.kept, labelled.drawn
    write_manifest(
        run.path / "target_set" / "manifest.parquet",
        [target.refs[i] for i in kept],
        {**labelled.target.columns(kept), "key": labelled.keys_of(kept)},
    )
    searched = zip(choice.query.tolist(), choice.similarity.tolist(), choice.rank.tolist(), strict=True)
    found = [(queries[q], similarity, rank) if q >= 0 else (None, None, None) for q, similarity, rank in searched]
    keys = [key.tobytes() for key in embedded.keys[choice.rows]]
    rows = [("target", "labelled", None, None, None, key) for key in labelled.keys_of(drawn)]
    rows += [("gallery", strategy, *own, key) for own, key in zip(found, keys, strict=True)]
    names = ("source", "strategy", "query", "similarity", "rank", "key")
    columns = {name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
    write_manifest(run.path / "curate" / "manifest.parquet", [*[target.refs[i] for i in drawn], *refs], columns)


def identity(labelled: LabelledSplit, refs: list[ImageRef], embedded: EmbeddingTable, choice: Choice) -> str:
    """Return a hash of all that later stages use of the choice: contents and names, but not the files' paths or times."""
    kept = labelled.kept
    places = {f"mask_{name}" for name in SOURCE}
    known = [column for name, column in labelled.target.columns(kept).items() if name not in places]
    return hash_of(
        [
            [key.hex() for key in labelled.keys_of(kept)],
            labelled.target.classes,
            *known,
            [ref.id for ref in refs],
            [key.tobytes().hex() for key in embedded.keys[choice.rows]],
        ]
    )


def write_leaks(run: Run, labelled: LabelledSplit, refs: list[ImageRef], leaks: Sequence[Leak]) -> None:
    """Write leaks.csv, or remove the one of an earlier start. refs: the gallery image of each leak."""
    path, target = run.path / "curate" / "leaks.csv", labelled.target
    both = zip(refs, leaks, strict=True)
    rows = [(ref.id, target.refs[leak.held].id, target.splits[leak.held], leak.how) for ref, leak in both]
    write_csv(path, ("gallery_image", "is", "split", "how"), rows)
    if leaks:
        logger.info(f"{len(leaks):,} gallery images are validation or test images and stay out (curate/leaks.csv)")


def pairs(store: Store, labelled: LabelledSplit, refs: list[ImageRef], leaks: Sequence[Leak]) -> list[KeptOut]:
    """Return some of the leaks, evenly spaced, each with the held-out image that it shows. refs: the gallery image of each leak."""
    places = np.unique(np.linspace(0, len(leaks) - 1, LEAKS_SHOWN).astype(np.int64)) if leaks else np.zeros(0, np.int64)
    wanted = [refs[i] for i in places.tolist()]
    store.add(wanted)
    images, found, _ = store.find(wanted)
    shown = [leaks[i] for i in places[found].tolist()]
    twins = labelled.of(np.array([leak.held for leak in shown], np.int64))
    return [KeptOut(images[i], twins[i], leak.how) for i, leak in enumerate(shown)]


def write_montage(
    run: Run,
    labelled: LabelledSplit,
    images: Images,
    choice: Choice,
    kept_out: Sequence[KeptOut],
    leaks: int,
    queries: Queries,
) -> None:
    """Write montage.jpg: queries and the images that each of them found; without queries, labelled and random chosen images.

    Args:
        images: the chosen gallery images, in the order of `choice`. kept_out: some of the `leaks` images that were excluded.
    """
    target, drawn = labelled.target, labelled.drawn
    labels, own = queries.labels, labelled.of(drawn[queries.drawn])
    by_query = bool((choice.query >= 0).any())
    rows = []
    for number, query in enumerate(choose_rows(labels).tolist()):
        if by_query:
            mine = np.flatnonzero(choice.query == query)
            mine = mine[np.argsort(choice.rank[mine])][:SHOWN]
            captions = [f"{choice.similarity[i]:.2f}" for i in mine]
        else:
            mine = np.random.default_rng(number).permutation(len(choice))[:SHOWN]
            captions = [""] * len(mine)
        brought = [(images[int(i)], caption) for i, caption in zip(mine, captions, strict=True)]
        rows.append(Row(target.classes[labels[query]], own[query], brought))
    asked = "classes, each with a labelled image," if queries.text else "labelled images"
    what = f"{asked} and the images that each of them found"
    what = what if by_query else "labelled images, each beside randomly drawn images of the set"
    picture = montage(rows, f"{len(choice):,} gallery images: {what}", kept_out, leaks)
    with atomic_write(run.path / "curate" / "montage.jpg") as temporary:
        picture.save(temporary, "JPEG", quality=85, subsampling=0, optimize=True)


def summary(pool: Pool, choice: Choice, queries: Queries, labelled: LabelledSplit) -> JSON:
    """Return and log similarities, images found per class, and the distances of transfer set and gallery to the target set."""
    found: JSON = {"index": "ivf", "recall": min(pool.recalls)} if pool.recalls else {}
    near = far = float("nan")
    images = not queries.text
    if images and len(queries.vectors) > 1 and len(choice) > 1:
        near = mmd(pool.vectors.rows(choice.rows[subsample_rows(len(choice))]), queries.vectors)
        far = mmd(pool.vectors.rows(subsample_rows(pool.vectors.count)), queries.vectors)
        found["distance"] = {"name": "MMD^2", "transfer_set": near, "gallery": far}
    if not (choice.query >= 0).any():
        return found
    quantiles = np.quantile(choice.similarity, QUANTILES)
    found["similarity"] = {f"{100 * q:g} %": round(float(v), 4) for q, v in zip(QUANTILES, quantiles, strict=True)}
    brought = np.bincount(queries.labels[choice.query], minlength=len(labelled.target.classes))
    asked = np.unique(queries.labels).tolist()  # with masks, a class that is the rarest in no image has no queries
    found["brought"] = {labelled.target.classes[number]: int(brought[number]) for number in asked}
    if without := [name for name, count in found["brought"].items() if not count]:
        logger.info(
            f"the queries of {', '.join(without)} find nothing new: their nearest images went to other queries or are duplicates"
        )
    warning, named = nothing_near(pool, choice, queries.labels, labelled.target.classes) if images else ("", [])
    if warning:
        logger.info(warning)
        found |= {"far_classes": named} if named else {"nothing_near": True}
    apart = f"; distance (MMD^2) to the labelled images: {near:.3f}, and {far:.3f} for the whole gallery"
    logger.info(
        f"similarity of an image to the query that found it: median {quantiles[3]:.2f}, 5 % below {quantiles[1]:.2f}"
        + (apart if "distance" in found else "")
    )
    return found
