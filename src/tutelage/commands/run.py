"""The main job: all stages in order, each skipped when its result is already there."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from tutelage import settings as c
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

SMOKE = {"per_query": None, "epochs": None, "steps": 24, "batch_size": 32}
SMOKE_TOTAL, SMOKE_BUDGET = 512, 10  # upper limits; `curate` also looks at only a part of the gallery

# stage -> its function and its folder in a run
STAGES: dict[str, tuple[Callable[..., Any], str]] = {
    "curate": (curate, "transfer_set"), "adapt": (adapt_stage, "teacher"), "committee": (committee_stage, "committee"),
    "transfer": (transfer, "transfer"), "alone": (alone, "alone"), "finetune": (finetune_stage, "student"),
}  # fmt: skip


MODELS = ("distilled", "baseline", "delivered", "teacher", "committee")  # in the result of an evaluation


@command
def run(
    *, task: c.Task = "classification",
    target: c.Target = "", gallery: c.Paths = [], out: c.Out = "", val: c.Val = None, test: c.Test = None,  # noqa: B006
    classes: c.Classes = None, budget: c.Budget = None, group_by: c.GroupBy = None, strategy: c.Strategy = "auto",
    total: c.Total = None, per_query: c.PerQuery = None, balance: c.Balance = "query", dedup: c.Dedup = "candidates",
    index: c.Index = "auto", memory: c.Memory = None, embeddings: c.Embeddings = [], text_embeddings: c.TextEmbeddings = None,  # noqa: B006
    clip: c.Clip = "openclip-b", clip_weights: c.ClipWeights = "pretrained", templates: c.Templates = [],  # noqa: B006
    engine: c.Engine = "local", max_rejected: c.MaxRejected = 0.05, resize: c.Resize = "squash", flip: c.Flip = "horizontal",
    crop_area: c.CropArea = 0.8,
    teacher: c.Teacher = "dinov2-s", teacher_weights: c.TeacherWeights = "pretrained",
    teacher_size: c.TeacherSize = None, teacher_window: c.TeacherWindow = None,
    adapt: c.Adapt = "probe", class_weight: c.ClassWeight = "none",
    student: c.Student = "mobilenetv4-s", student_weights: c.StudentWeights = "pretrained", student_size: c.StudentSize = None,
    decoder: c.Decoder = "lraspp", objective: c.Objective = "oriented", agnostic_loss: c.AgnosticLoss = "contrastive",
    agnostic_features: c.AgnosticFeatures = "patches",
    committee: c.Committee = "auto", sharpness: c.Sharpness = None, label_share: c.LabelShare = None,
    view_seed: c.ViewSeed = 0, cache_limit: c.CacheLimit = 20.0,
    epochs: c.Epochs = None, steps: c.Steps = None, batch_size: c.BatchSize = 128, lr: c.LearningRate = None,
    temperature: c.Temperature = 1.0, feature_weight: c.FeatureWeight = 2.0,
    finetune: c.Finetune = "auto", no_baseline: c.NoBaseline = False, pilot: c.Pilot = False,
    seed: c.Seed = 0, device: c.Device = "auto", precision: c.Precision = "auto", tracker: c.Tracker = "none",
    cache: c.Cache = None, overwrite: c.Overwrite = False,
    smoke: c.Smoke = False, preset: c.Preset = "none", json: c.Json = False, config: c.Config = None,
) -> dict[str, Any]:  # fmt: skip
    """Turn a few labelled images and a gallery of unlabelled ones into a small trained model.

    Curates the transfer set, adapts the teacher, forms the committee, distils it into the student, trains the same student on the
    labels only for comparison, and scores all models on the test images. A killed or stopped run resumes with the same command.

    Returns:
        the object that `--json` prints: run, distilled, baseline, delivered, teacher, committee, seconds, reused.
    """
    settings = dict(locals())
    if smoke:
        settings |= cut_down(settings)
    started = time.monotonic()
    names = [name for name in STAGES if name != "alone" or not no_baseline]
    with open_run(out, cache, settings, overwrite, together=True) as (folder, _):
        if pilot:
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
