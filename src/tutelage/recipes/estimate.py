"""What a study will take, from a few measured passes of its models: hours, disk, and steps of equal compute."""

from __future__ import annotations

import statistics
import time
from typing import Any

from tutelage.progress import duration, say
from tutelage.recipes.arms import Arm
from tutelage.recipes.curate import curate
from tutelage.recipes.stage import settings_of, training_steps
from tutelage.runs import Run
from tutelage.tasks import task_of

REPEATS = 3
DINO_EXTRA = 1.25  # FLOPs of a step over those of training on as many pixels: the averaged network's pass


def images_to_see(settings: dict[str, Any], count: int) -> int:
    """Images that the student sees in training on a transfer set of `count` images."""
    batch_size = settings["batch_size"]
    return training_steps(settings["steps"], settings["epochs"], count, batch_size) * batch_size


def matched_steps(run: Run, arm: Arm, settings: dict[str, Any]) -> int:
    """Steps of an arm that cost as many FLOPs as `oriented` with the given steps, its teacher's outputs included.

    The teacher's adaptation and the last stage are some thousand images and left out here; the ledger counts them.
    """
    from tutelage.compute import training_flops
    from tutelage.models.teachers import build_teacher

    count = curate(**settings_of(curate, settings))["images"]["transfer"]
    encoder, kind = build_teacher(*_model(settings)), task_of(settings["task"])
    student = kind.student({**settings, "student_weights": "scratch"}, 2)
    each = training_flops(student.module, student.size)
    outputs, seen = count * settings["views"] * kind.flops_of(encoder), images_to_see(settings, count)
    if "adapt" in arm.way.stages:
        return seen // settings["batch_size"]
    share = DINO_EXTRA if arm.way.settings.get("objective") == "dino" else 1.0
    return max(1, round((outputs + seen * each) / (each * share) / settings["batch_size"]))


def estimate(study: Any, todo: list[tuple[Arm, int, int]], impossible: dict[str, str]) -> dict[str, Any]:
    """Time and disk of the runs that are left, told and returned.

    Returns:
        {"runs", "hours", "gibibytes", "plan": one line each}.
    """
    from tutelage.data.gallery import list_gallery

    todo = [one for one in todo if one[0].name not in impossible]
    if not todo:
        return {"runs": 0, "hours": 0.0, "gibibytes": 0.0, "plan": []}
    settings = study.of(*todo[0])
    count = settings["total"] or len(list_gallery(settings["gallery"]).refs)
    per_image: dict[Any, float] = {}
    seen_stages: set[tuple[str, Any, int]] = set()
    seconds, room, teachers = _teachers(study, todo, count)
    plan = [f"teacher outputs: {duration(seconds)}, {room:.2f} GiB" + (f", {teachers} teachers" * (teachers > 1))]
    for arm, budget, seed in todo:
        mine = study.of(arm, budget, seed)
        key = (mine["student"], mine["student_size"])
        if key not in per_image:
            per_image[key] = _step_seconds(mine)
        free = mine["objective"] in ("agnostic", "dino") and "transfer" in arm.way.stages
        stage = (arm.name, None if free else budget, seed)
        took = 0.0 if stage in seen_stages else images_to_see(mine, count) * per_image[key]
        seen_stages.add(stage)
        seconds += took
        plan.append(f"{arm.name}, budget {budget}, seed {seed}: {'shared' if not took else duration(took)}")
    for line in plan:
        say(line)
    say(f"{len(todo)} runs, about {duration(1.2 * seconds)} in all, last stages and evaluation included")
    return {"runs": len(todo), "hours": 1.2 * seconds / 3600, "gibibytes": room, "plan": plan}


def _teachers(study: Any, todo: list[tuple[Arm, int, int]], count: int) -> tuple[float, float, int]:
    """Seconds and GiB of the outputs that are kept for `count` images, and of how many teachers.

    Frozen features are shared by all heads; a teacher that was adapted as a whole, or keeps logits only, is another for each draw.
    """
    from tutelage.compute import flops
    from tutelage.models.teachers import build_teacher
    from tutelage.targets import gibibytes

    kept: dict[tuple[Any, ...], tuple[float, float]] = {}
    encoders: dict[tuple[Any, ...], tuple[Any, float]] = {}
    for arm, budget, seed in todo:
        mine = study.of(arm, budget, seed)
        if mine["objective"] == "dino" or "transfer" not in arm.way.stages:
            continue
        kind, model = task_of(mine["task"]), _model(mine)
        if model not in encoders:
            encoder = build_teacher(*model)
            encoders[model] = (
                encoder,
                _seconds_of(encoder) * kind.flops_of(encoder) / flops(encoder.module, encoder.at_once),
            )
        frozen = mine["objective"] == "agnostic" or (kind.POOLED and mine["adapt"] == "probe")
        width, each = kind.told_at_most(encoders[model][0], mine)
        views = tuple(mine[name] for name in ("views", "view_seed", "flip", "crop_area", "resize"))
        key = (*model, *views, width, None if frozen else (mine["adapt"], mine["class_weight"], budget, seed))
        kept[key] = count * each * encoders[model][1], gibibytes(count, each, width)
    return sum(one for one, _ in kept.values()), sum(one for _, one in kept.values()), len(kept)


def _model(settings: dict[str, Any]) -> tuple[Any, ...]:
    """What `build_teacher` takes."""
    return tuple(settings[f"teacher{more}"] for more in ("", "_weights", "_size", "_window"))


def _seconds_of(encoder: Any) -> float:
    """Seconds of one forward pass for one image, or one window of it, in batches of 16."""
    import torch

    from tutelage.sizes import sides

    images = torch.zeros(16, 3, *sides(encoder.at_once))
    with torch.inference_mode():
        encoder.module(images)
        start = time.perf_counter()
        for _ in range(REPEATS):
            encoder.module(images)
    return (time.perf_counter() - start) / REPEATS / len(images)


def _step_seconds(settings: dict[str, Any]) -> float:
    """Seconds of one training step for one image, at the study's batch size."""
    import torch

    from tutelage.sizes import sides

    student = task_of(settings["task"]).student({**settings, "student_weights": "scratch"}, 2)
    module = student.module.to(memory_format=torch.channels_last) if student.channels_last else student.module
    images = torch.randn(settings["batch_size"], 3, *sides(student.size))
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        module(images).sum().backward()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) / len(images)
