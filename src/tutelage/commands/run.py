"""The main job: all stages in order, each skipped when its result is already there."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from tutelage.commands.adapt import adapt as adapt_stage
from tutelage.commands.alone import alone
from tutelage.commands.committee import committee as committee_stage
from tutelage.commands.curate import curate
from tutelage.commands.evaluate import evaluate
from tutelage.commands.finetune import finetune as finetune_stage
from tutelage.commands.transfer import transfer
from tutelage.pipeline.pilot import pilot as judge
from tutelage.pipeline.stage import needed, open_run, settings_of
from tutelage.progress import duration, main_process, processes, say
from tutelage.run_folder import DEFAULT, Run, read_json
from tutelage.settings import command
from tutelage.settings.commands import RunSettings

SMOKE = {"per_query": None, "epochs": None, "steps": 24, "batch_size": 32}
SMOKE_TOTAL, SMOKE_BUDGET = 512, 10  # upper limits; `curate` also looks at only a part of the gallery

# stage -> its function and its folder in a run
STAGES: dict[str, tuple[Callable[..., Any], str]] = {
    "curate": (curate, "transfer_set"), "adapt": (adapt_stage, "teacher"), "committee": (committee_stage, "committee"),
    "transfer": (transfer, "transfer"), "alone": (alone, "alone"), "finetune": (finetune_stage, "student"),
}  # fmt: skip


MODELS = ("distilled", "baseline", "delivered", "teacher", "committee")  # in the result of an evaluation


@command(RunSettings)
def run(s: RunSettings) -> dict[str, Any]:
    """Turn a few labelled images and a gallery of unlabelled ones into a small trained model.

    Curates the transfer set, adapts the teacher, forms the committee, distils it into the student, trains the same student on the
    labels only for comparison, and scores all models on the test images. A killed or stopped run resumes with the same command.

    Returns:
        the object that `--json` prints: run, distilled, baseline, delivered, teacher, committee, seconds, reused.
    """
    settings = dict(vars(s))
    if s.smoke:
        settings |= cut_down(settings)
    started = time.monotonic()
    names = [name for name in STAGES if name != "alone" or not s.no_baseline]
    with open_run(s.out, s.cache, settings, s.overwrite, together=True) as (folder, _):
        if s.pilot:
            _one(folder, *STAGES["curate"], settings)
            judge(folder, settings, walk)
        summary = walk(folder, names, settings)
    say(f"report: {folder.path / 'report' / 'index.html'}")
    say(f"done in {duration(time.monotonic() - started)}; {folder.path}")
    return summary


def cut_down(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that --smoke reduces, and print them. A strategy that was set stays; by default the images are
    chosen at random."""
    cut: dict[str, Any] = {**SMOKE, "budget": min(settings["budget"] or SMOKE_BUDGET, SMOKE_BUDGET)}
    number = settings["total"] or (settings["per_query"] and SMOKE_TOTAL)
    if settings["strategy"] == "auto" and number is None and not settings["embeddings"]:
        cut["strategy"], number = "random", SMOKE_TOTAL
    cut["total"] = None if number is None else min(number, SMOKE_TOTAL)
    words = {name: DEFAULT if settings[name] is None else settings[name] for name in sorted(cut)}
    said = [f"{name} {words[name]} -> {cut[name] or DEFAULT}" for name in words if settings[name] != cut[name]]
    say(f"--smoke cuts down: {', '.join(said) or 'no setting'}")
    return cut


def walk(folder: Run, names: Sequence[str], settings: dict[str, Any]) -> dict[str, Any]:
    """Run these stages of STAGES in order, then the evaluation, in a run folder whose lock is held.

    Args:
        settings: all settings of `run`.

    Returns:
        what `run` returns.
    """
    results = {name: _one(folder, *STAGES[name], settings) for name in needed(names, settings)}
    results["evaluate"] = _one(folder, evaluate, "report", {**settings, "run": settings["out"], "target": None})
    return _summary(folder, results)


def _one(run: Run, stage: Callable[..., Any], place: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Run one stage with its part of the settings. Only `transfer` uses several processes; in other stages they wait for the first."""
    mine = settings_of(stage, settings)
    if stage is transfer:
        return transfer(**mine)
    if processes() == 1:
        return stage(**mine)
    from tutelage.device import accelerator

    hardware = accelerator(settings["device"], settings["precision"])
    result = stage(**mine) if main_process() else None
    hardware.wait_for_everyone()
    return result or read_json(run.path / place / "result.json")


def _summary(run: Run, results: dict[str, Any]) -> dict[str, Any]:
    seconds = {name: round(result["seconds"], 3) for name, result in results.items()}
    if "transfer" in results:
        seconds["targets"] = round(results["transfer"]["target_seconds"], 3)
    seconds["total"] = round(sum(seconds.values()), 3)
    scores = results["evaluate"]
    return {
        "run": str(run.path),
        **{name: scores[name] for name in MODELS if name in scores},
        "seconds": seconds,
        "reused": [name for name, result in results.items() if result.get("reused")],
    }
