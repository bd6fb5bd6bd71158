"""The targets of a run: cached or online, and refined by the images' neighbourhoods where that validates better."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tutelage.data.manifest import TaskData
from tutelage.metrics import softmax
from tutelage.models import heads
from tutelage.models.adapted import AdaptedTeacher, half_precision
from tutelage.progress import duration, progress, say
from tutelage.recipes.ledger import Meter
from tutelage.recipes.supervised import paired_gain
from tutelage.retrieval.graph import mixed_logits, neighbour_graph, principal_axes, propagate, unit_embeddings
from tutelage.runs import Clock, Run, whole
from tutelage.targets import (
    CLEAN,
    OutputCache,
    Targets,
    ViewSettings,
    as_rows,
    as_void,
    compute_outputs,
    gibibytes,
    run_network,
)

REDUCED = 32  # images on which the error of a coarser grid is measured
SAMPLE = 2048  # images whose features give the axes on which the student matches them


def make_targets(
    run: Run, task: TaskData, teacher: AdaptedTeacher, settings: ViewSettings, views: int, refine: str, match_features: bool,
    cache_limit: float, cache_dir: Path, hardware: Any, inputs: str, meter: Meter,
) -> tuple[Targets, dict[str, Any], float]:  # fmt: skip
    """Compute what the student is to match, or find it in the cache.

    Args:
        views: M. refine: "none" or "propagate". match_features: whether the student is to match features too.
        cache_limit: GiB of outputs, above which the teacher runs online.
        inputs: hash of all that the targets depend on. meter: takes the teacher's outputs that are needed.

    Returns:
        the targets; how they were refined (kind, log losses on held-out labels); seconds that took, summed over restarts.
    """
    network, images = teacher.network, task.transfer
    needed = gibibytes(len(images), views, network.width)
    clock = Clock(run.path / "transfer" / "target_seconds.json")
    share = (hardware.process_index, hardware.num_processes)
    table = None
    if needed <= cache_limit:
        say(f"teacher outputs: {len(images):,} images x {views} views, {needed:.2f} GiB in {cache_dir}")
        cache = OutputCache(cache_dir, network, settings, task.side)
        with progress("targets", len(images) * views) as advance:
            tick = clock.ticking(advance) if hardware.is_main_process else advance
            computed = compute_outputs(cache, network, images, range(views), settings, tick, share)
        meter.output_bytes = 2 * network.width  # float16
        hardware.wait_for_everyone()
        table = [cache.table(images, number) for number in range(views)]
        for number in range(views):
            meter.asked(number, b"transfer", len(images), computed if number == 0 else 0)
    else:
        say(
            f"teacher outputs would take {needed:.2f} GiB, more than --cache-limit {cache_limit:g}: the teacher runs online"
        )
    targets = Targets(images, network, teacher.head, settings, views, table)
    if match_features and network.output == "features":
        few = SAMPLE // 8 if network.shape else SAMPLE  # a grid has many rows an image
        sample = np.sort(np.random.default_rng(0).permutation(len(images))[:few])
        outputs = targets.outputs(sample, np.zeros_like(sample))
        targets = replace(targets, embedding=principal_axes(as_rows(outputs, network.shape)))
    elif match_features:
        say("a fine-tuned teacher keeps logits only: its features are not matched")
    refined: dict[str, Any] = {"kind": "none"}
    kept = run.path / "transfer" / "propagated.npz"
    if refine == "propagate" and table is not None and network.output == "features":
        if hardware.is_main_process and not _is_of(kept, inputs):
            cache = OutputCache(cache_dir, network, settings, task.side)
            chosen = _refine(run, task, targets, cache, clock, meter)
            with whole(kept) as path, path.open("wb") as file:
                np.savez(file, inputs=inputs, **chosen)
        hardware.wait_for_everyone()
        with np.load(kept) as saved:
            refined = {
                "kind": str(saved["kind"]),
                "log_loss": float(saved["log_loss"]),
                "log_loss_alone": float(saved["alone"]),
            }
            if refined["kind"] != "none":
                probabilities = saved["probabilities"].astype(np.float32)
                targets = replace(targets, propagated=probabilities, temperature=float(saved["temperature"]))
    elif refine == "propagate":
        say(
            "targets are not refined: that needs cached features of a frozen teacher (--adapt probe, a larger --cache-limit)"
        )
    seconds = clock.tick(force=True) if hardware.is_main_process else 0.0
    return targets, refined, seconds


def tell_reduction(whole: AdaptedTeacher, reduced: AdaptedTeacher, images: Any, settings: ViewSettings) -> float:
    """Say by how much the loss is off when logits are kept on a coarser grid than the student's; the same is returned.

    The mean of | KL(p | q) - KL(p' | q) | over the pixels of some images, p the teacher's word, p' what is left of it on the coarser
    grid, and q the teacher's word on the next image, which is as far from p as an untrained student's.
    """
    few = np.arange(min(REDUCED, len(images)))
    p, r = (
        softmax(np.moveaxis(one.head(half_precision(run_network(one.network, images, few, 0, settings), "")), 1, -1))
        for one in (whole, reduced)
    )
    log_q = np.log(np.roll(p, 1, axis=0).clip(1e-6))
    losses = [(one * (np.log(one.clip(1e-12)) - log_q)).sum(axis=-1) for one in (p, r)]
    error = float(np.abs(losses[0] - losses[1]).mean())
    shape, kept = whole.network.shape, reduced.network.shape
    say(
        f"teacher outputs are kept on a grid of {kept[1]} x {kept[2]} instead of {shape[1]} x {shape[2]} to stay within --cache-limit: "
        f"the loss of a pixel is off by {error:.3f} on the mean, of {losses[0].mean():.3f}"
    )
    return error


def _is_of(kept: Path, inputs: str) -> bool:
    """Whether the propagated labels of an earlier start were made from the same inputs."""
    if not kept.exists():
        return False
    with np.load(kept) as saved:
        return "inputs" in saved and str(saved["inputs"]) == inputs


def _refine(
    run: Run, task: TaskData, targets: Targets, cache: OutputCache, clock: Clock, meter: Meter
) -> dict[str, Any]:
    """Label propagation, judged on labels that it has not seen.

    Kept when their log loss falls by more than two standard errors, and the neighbourhoods by themselves are not behind the head
    by more than a standard error of accuracy. On drawings the log loss fell by 1 to 2 errors, but the neighbourhoods by
    themselves were right for 39 % of the images where the head was for 51 %, and students taught with the mean of both
    were 4 points worse.
    """
    from tutelage.data.budget import folds

    start = time.monotonic()
    network, settings = targets.network, targets.settings
    with progress("features of whole images", len(task.transfer)) as advance:
        computed = compute_outputs(cache, network, task.transfer, [CLEAN], settings, clock.ticking(advance))
    meter.asked(CLEAN, b"transfer", len(task.transfer), computed)
    features = cache.table(task.transfer, CLEAN).rows()
    with np.load(run.path / "teacher" / "validation.npz") as file:
        held_logits, held_labels, fair = file["logits"], file["labels"], file["fair"]
    count, classes = len(task.transfer), len(task.classes)
    if task.val:  # the validation images join the graph, without their labels, for this judgement only
        compute_outputs(cache, network, task.val.images, [CLEAN], settings)
        both = np.concatenate([features, cache.table(task.val.images, CLEAN).rows()])
        graph = neighbour_graph(unit_embeddings(both))
        split = [(np.arange(len(task.train)), np.arange(count, len(both)))]
    else:
        graph = neighbour_graph(unit_embeddings(features))
        fold = folds(task.train.labels, task.train.groups, run.settings()["settings"]["seed"])
        split = [(np.flatnonzero(fold != f), np.flatnonzero(fold == f)) for f in np.unique(fold)]
    clock.tick(force=True)
    shares = {
        "balanced": np.full(classes, 1 / classes),
        "estimated": softmax(targets.head(features)).mean(axis=0),
    }
    if not fair.any():
        say("targets are not refined: no label can be held out to judge it")
        return {"kind": "none", "log_loss": 0.0, "alone": 0.0}
    without = heads.log_loss(held_logits[fair], held_labels[fair])
    alone = float(without.mean())
    right_alone = held_logits[fair].argmax(axis=1) == held_labels[fair]
    best: dict[str, Any] = {"kind": "none", "log_loss": alone, "alone": alone}
    tried = []
    for kind, share in shares.items():
        logits, heard = np.zeros_like(held_logits), np.zeros(len(held_logits), np.int64)
        for seen, held in split:
            rows = np.arange(len(held_labels)) if task.val else held
            spread = propagate(graph, seen, task.train.labels[seen], share)[held]
            logits[rows] = mixed_logits(held_logits[rows], spread)
            heard[rows] = spread.argmax(axis=1)
        temperature = heads.best_temperature(logits[fair], held_labels[fair])
        losses = heads.log_loss(logits[fair] / temperature, held_labels[fair])
        gain, error = paired_gain(-losses, -without)
        right = heard[fair] == held_labels[fair]
        behind, spread = paired_gain(right_alone, right)
        tried.append(f"{losses.mean():.3f} {kind}, better by {gain:.3f} +- {error:.3f}, {right.sum()} right by itself")
        if gain > 2 * error and behind <= spread and losses.mean() < best["log_loss"]:
            best |= {"kind": kind, "log_loss": float(losses.mean()), "temperature": temperature}
    if best["kind"] != "none":
        if task.val:
            graph = neighbour_graph(unit_embeddings(features))
        labelled = np.arange(len(task.train))
        probabilities = propagate(graph, labelled, task.train.labels, shares[best["kind"]])
        best["probabilities"] = probabilities.astype(np.float16)
    say(
        f"label propagation: log loss on {len(without)} held-out labels {alone:.3f} without, {right_alone.sum()} right; "
        f"with it {'; '.join(tried)}: "
        f"{'not used' if best['kind'] == 'none' else best['kind']} ({duration(time.monotonic() - start)})"
    )
    clock.tick(force=True)
    return best


def without_labels(task: TaskData) -> TaskData:
    """The task with its transfer set in the order of the images' content: it does not tell which of them are labelled."""
    order = np.argsort(as_void(task.transfer.keys), kind="stable")
    return replace(task, transfer=task.transfer.take(order), transfer_ids=[task.transfer_ids[i] for i in order])
