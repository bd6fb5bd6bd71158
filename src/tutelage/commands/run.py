"""The main job: all stages in order, each skipped when its result is already there."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from tutelage.commands.adapt import adapt
from tutelage.commands.baseline import baseline
from tutelage.commands.committee import committee
from tutelage.commands.curate import curate
from tutelage.commands.distill import distill
from tutelage.commands.evaluate import evaluate
from tutelage.commands.finetune import finetune
from tutelage.device import accelerator
from tutelage.json_object import JSON
from tutelage.pipeline.finished_exports import warn_of_old_export
from tutelage.pipeline.pilot import pilot as judge
from tutelage.pipeline.stage import needed, open_run, settings_of
from tutelage.progress import duration, logger, main_process, processes
from tutelage.results import Result, RunResult
from tutelage.run_folder import Run
from tutelage.settings import command
from tutelage.settings.command_flags import RunSettings
from tutelage.settings.stored import DEFAULT

SMOKE_STEPS, SMOKE_BATCH = 24, 32  # upper limits
SMOKE_TOTAL, SMOKE_BUDGET = 512, 10  # upper limits; `curate` also looks at only a part of the gallery

STAGES = {stage.__name__: stage for stage in (curate, adapt, committee, distill, baseline, finetune)}
MODELS = ("distilled", "baseline", "delivered", "teacher", "committee")  # in the result of an evaluation


@command(RunSettings)
def run(settings: RunSettings) -> RunResult:
    """Turn a few labelled images and a gallery of unlabelled ones into a small trained model.

    Curates the transfer set, adapts the teacher, forms the committee, distils it into the student, trains the same student on the
    labels only for comparison, and scores all models on the test images. A killed or stopped run resumes with the same command.
    """
    if settings.smoke:
        settings = replace(settings, **cut_down(settings))
    started = time.monotonic()
    names = [name for name in STAGES if name != "baseline" or not settings.no_baseline]
    with open_run(settings, together=True) as (folder, _):
        if settings.pilot:
            _one(folder, curate, settings_of(curate, settings))
            judge(folder, settings, walk)
        summary = walk(folder, names, settings)
        warn_of_old_export(folder.path)
    logger.info(f"report: {folder.path / 'report' / 'index.html'}")
    logger.info(f"done in {duration(time.monotonic() - started)}; {folder.path}")
    return summary


def cut_down(settings: RunSettings) -> JSON:
    """Return the settings that --smoke reduces, and print them. A strategy that was set stays; by default the images are
    chosen at random."""
    cut: JSON = {"per_query": None, "epochs": None, "steps": min(settings.steps or SMOKE_STEPS, SMOKE_STEPS)}
    cut |= {
        "batch_size": min(settings.batch_size, SMOKE_BATCH),
        "budget": min(settings.budget or SMOKE_BUDGET, SMOKE_BUDGET),
    }
    number = settings.total or (settings.per_query and SMOKE_TOTAL)
    if settings.strategy == "auto" and number is None and not settings.embeddings:
        cut["strategy"], number = "random", SMOKE_TOTAL
    cut["total"] = None if number is None else min(number, SMOKE_TOTAL)
    before = {name: getattr(settings, name) for name in sorted(cut)}
    words = {name: DEFAULT if one is None else one for name, one in before.items()}
    changes = [f"{name} {words[name]} -> {cut[name] or DEFAULT}" for name in words if before[name] != cut[name]]
    logger.info(f"--smoke cuts down: {', '.join(changes) or 'no setting'}")
    return cut


def walk(folder: Run, names: Sequence[str], settings: RunSettings) -> RunResult:
    """Run these stages of STAGES in order, then the evaluation, in a run folder whose lock is held."""
    stages = [STAGES[name] for name in needed(names, settings)]
    results = {stage.__name__: _one(folder, stage, settings_of(stage, settings)) for stage in stages}
    own = {**settings_of(evaluate, settings), "run": settings.out, "target": None}
    results["evaluate"] = scores = _one(folder, evaluate, own)
    seconds = {name: round(result["seconds"], 3) for name, result in results.items()}
    if "distill" in results:
        seconds["targets"] = round(results["distill"]["target_seconds"], 3)
    seconds["total"] = round(sum(seconds.values()), 3)
    reused = [name for name, result in results.items() if result.get("reused")]
    models = {name: scores[name] for name in MODELS if name in scores}
    return RunResult(run=str(folder.path), seconds=seconds, reused=reused, **models)


def _one(run: Run, stage: Callable[..., Result], own: JSON) -> JSON:
    """Run one stage with its settings. Only `distill` uses several processes; in other stages they wait for the first."""
    if stage is distill or processes() == 1:
        return stage(**own).to_json()
    hardware = accelerator(own["device"], own["precision"])
    result = stage(**own).to_json() if main_process() else None
    hardware.wait_for_everyone()
    return result or run.kept(stage.__name__) or {}
