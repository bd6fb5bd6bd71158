"""Estimate the time and disk space of a study from a few timed passes of its models, and find steps of equal compute."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias

from tutelage.data.gallery import list_gallery
from tutelage.data.image_cache import short_side
from tutelage.device import accelerator, flops, training_flops
from tutelage.errors import number_of
from tutelage.image_size import Size, sides
from tutelage.pipeline.stage import needed, training_steps
from tutelage.progress import duration, logger
from tutelage.results import StudyEstimate
from tutelage.settings.command_flags import WITHOUT_TARGETS, RunSettings
from tutelage.settings.shared_flags import Student
from tutelage.study.methods import Variant
from tutelage.tasks import task_of

if TYPE_CHECKING:
    import torch

    from tutelage.models.teachers import FrozenEncoder

Model: TypeAlias = tuple[str, str, Size | None, Size | None]  # name, weights, size and window of a teacher
Planned: TypeAlias = tuple[Variant, int, int, RunSettings]  # method, budget, seed and settings of a run
REPEATS = 3
PROPORTION = 4 / 3  # assumed long side over short side of gallery images
THUMB = 1200  # bytes stored beside an image's vector: thumbnail, layout, name
DINO_EXTRA = 1.25  # FLOPs of a DINO step over those of a plain step: the averaged network's pass


def images_to_see(settings: RunSettings, count: int) -> int:
    """Number of images, repeats included, that the student is trained on with a transfer set of `count` images."""
    return training_steps(settings, count, task_of(settings.task).IMAGES) * settings.batch_size


def steps_of(variant: Variant, settings: RunSettings, count: int, match: str) -> int:
    """Training steps of a method on a transfer set of `count` images: the requested number, or that of `matched_steps`."""
    if match == "flops":
        return matched_steps(variant, settings, count)
    return variant.method.times * images_to_see(settings, count) // settings.batch_size


def matched_steps(variant: Variant, settings: RunSettings, count: int) -> int:
    """Return the steps that cost as many FLOPs as `task-oriented` with the requested steps; teacher outputs and committee count in both.

    The teacher's adaptation and the last stage process some thousand images and are left out here; the compute cost counts them.

    Args:
        settings: of the method's run. count: images in the transfer set.
    """
    seen = images_to_see(settings, count)
    kind = task_of(settings.task)
    known = {"student": settings.student, "student_size": settings.student_size, "decoder": settings.decoder}
    each = _student_flops(settings.task, Student(**known, student_weights="scratch"))
    teacher = _teacher_flops(settings.task, _model(settings))
    looks = len(kind.views(settings).looks)
    # then `task-oriented` has none either
    teacher_only = "committee" not in variant.method.settings and settings.committee == "none"
    # the committee's students together see as many images as the student
    budget = count * looks * teacher + (1 if teacher_only else 2) * seen * each
    objective, committee = settings.objective, has_committee(variant, settings)
    asked = 1 if objective == "task-agnostic" else looks if "adapt" in variant.method.charged else 0
    own = count * asked * teacher
    share = DINO_EXTRA if objective == "dino" and "distill" in variant.method.stages else 2.0 if committee else 1.0
    return max(1, round((budget - own) / (each * share) / settings.batch_size))


def has_committee(variant: Variant, settings: RunSettings) -> bool:
    """Whether a run of this method trains the committee's labels-only students, which together see as many images as the student."""
    return "committee" in variant.method.stages and "committee" in needed(variant.method.stages, settings)


@lru_cache
def _teacher_flops(task: str, model: Model) -> int:
    """FLOPs of the teacher for one image."""
    from tutelage.models.teachers import build_teacher

    return task_of(task).flops_of(build_teacher(*model))


@lru_cache
def _student_flops(task: str, settings: Student) -> int:
    """FLOPs of one training step of the student for one image."""
    built = task_of(task).student(settings, 2)
    return training_flops(built.module, built.size)


@dataclass(frozen=True)
class Sizes:
    """Sizes of a run's data. images: in the transfer set. gallery: images in the gallery. classes: of the task."""

    images: int
    gallery: int
    classes: int


class Data:
    """Sizes of the data of runs, as far as they are known before a gallery image is decoded; each source is read once."""

    def __init__(self):
        self._galleries: dict[tuple[str, ...], int] = {}
        self._targets: dict[tuple[str | None, ...], tuple[int, int]] = {}

    def of(self, settings: RunSettings) -> Sizes:
        """Sizes of one run's data. settings: all settings of the run, including its budget."""
        from tutelage.curation.selection import wanted_of

        if (places := tuple(settings.gallery)) not in self._galleries:
            self._galleries[places] = len(list_gallery(settings.gallery)[0])
        key = tuple(getattr(settings, name) for name in ("task", "target", "val", "test", "classes", "group_by"))
        if key not in self._targets:
            target = task_of(settings.task).read(settings)
            self._targets[key] = int((target.splits == "train").sum()), len(target.classes)
        gallery, (train, classes) = self._galleries[places], self._targets[key]
        each = classes if task_of(settings.task).BUDGET_PER_CLASS else 1
        labelled = train if settings.budget is None else min(train, settings.budget * each)
        wanted = wanted_of(settings, labelled, classes)
        return Sizes(labelled + (gallery if wanted is None else min(wanted, gallery)), gallery, classes)


def estimate(planned: list[Planned], match: str) -> StudyEstimate:
    """Log and return the time and disk space of the runs that are left; what the cache already holds is not subtracted.

    Args:
        match: what is equal for all methods, images or flops.
    """
    if not planned:
        return StudyEstimate(runs=0, hours=0.0, gibibytes=0.0, outputs_gibibytes=0.0, plan=[])
    data = Data()
    runs = [(*one, data.of(one[-1])) for one in planned]
    per_image: dict[tuple[str, Size | None], float] = {}
    seen_stages: set[tuple[str, int | None, int]] = set()
    embedded, images = _embeddings([(mine, sizes) for *_, mine, sizes in runs])
    outputs, room, teachers = _teachers(runs)
    plan = [
        f"embeddings of the gallery and decoded images: {duration(embedded)}, {images:.2f} GiB",
        f"teacher outputs: {duration(outputs)}, {room:.2f} GiB" + (f", {teachers} teachers" * (teachers > 1)),
    ]
    seconds = embedded + outputs
    for variant, budget, seed, mine, sizes in runs:
        key = (mine.student, mine.student_size)
        if key not in per_image:
            per_image[key] = _step_seconds(mine)
        free = mine.objective in WITHOUT_TARGETS and mine.label_share == 0 and "distill" in variant.method.stages
        stage = (variant.name, None if free else budget, seed)
        twice = 2 if has_committee(variant, mine) else 1
        seen = steps_of(variant, mine, sizes.images, match) * mine.batch_size * twice
        took = 0.0 if stage in seen_stages else seen * per_image[key]
        seen_stages.add(stage)
        seconds += took
        plan.append(f"{variant.name}, budget {budget}, seed {seed}: {'shared' if not took else duration(took)}")
    for line in plan:
        logger.info(line)
    logger.info(
        f"{number_of(len(runs), 'run')}, about {duration(1.2 * seconds)} in all, last stages and evaluation included"
    )
    disk = {"gibibytes": room + images, "outputs_gibibytes": room}
    return StudyEstimate(runs=len(runs), hours=1.2 * seconds / 3600, **disk, plan=plan)


def _embeddings(runs: list[tuple[RunSettings, Sizes]]) -> tuple[float, float]:
    """Seconds and GiB of `_embedding`, summed over galleries and teachers, each with the largest set chosen from it."""
    largest: dict[tuple[str | int | None, ...], tuple[RunSettings, Sizes]] = {}
    for settings, sizes in runs:
        key = (*settings.gallery, settings.strategy, *_model(settings))
        if key not in largest or largest[key][1].images < sizes.images:
            largest[key] = settings, sizes
    found = [_embedding(settings, sizes.images, sizes.gallery) for settings, sizes in largest.values()]
    return sum(one for one, _ in found), sum(one for _, one in found)


def _embedding(settings: RunSettings, count: int, gallery: int) -> tuple[float, float]:
    """Seconds to embed the gallery with the teacher, and GiB of the vectors and of `count` decoded images."""
    from tutelage.models.teachers import build_teacher, size_of

    sizes = [size_of(settings, kind) for kind in ("teacher", "student")]
    pixels = count * 3 * short_side(*sizes) ** 2 * PROPORTION
    if settings.embeddings:
        return 0.0, pixels / 2**30
    name, weights, size, window = _model(settings)
    encoder = build_teacher(name, weights, window or size)
    looked_at = count if settings.strategy == "random" else gallery
    vectors = looked_at * (2 * encoder.features + THUMB)
    return looked_at * _seconds_of(encoder, settings), (pixels + vectors) / 2**30


def _teachers(runs: list[tuple[Variant, int, int, RunSettings, Sizes]]) -> tuple[float, float, int]:
    """Seconds and GiB of the teacher outputs that are cached, and the number of distinct teachers. All heads share the frozen features; a
    teacher that was fine-tuned, or whose logits only are kept, differs for each draw of labels."""
    from tutelage.features.output_cache import gibibytes
    from tutelage.models.teachers import build_teacher

    kept: dict[tuple[object, ...], tuple[float, float]] = {}
    encoders: dict[Model, tuple[FrozenEncoder, float]] = {}
    for variant, budget, seed, mine, sizes in runs:
        if mine.objective == "dino" or "distill" not in variant.method.stages:
            continue
        kind, model = task_of(mine.task), _model(mine)
        if model not in encoders:
            encoder = build_teacher(*model)
            whole = _seconds_of(encoder, mine) * kind.flops_of(encoder) / flops(encoder.module, encoder.at_once)
            encoders[model] = encoder, whole
        width, each, frozen = kind.largest_outputs(encoders[model][0], mine, sizes.classes)
        views = (mine.flip, mine.resize)
        draw = None if frozen else (mine.adapt, mine.class_weight, budget, seed)
        key = (*model, *views, width, draw, *mine.gallery, mine.strategy)
        count, before = sizes.images, kept.get(key, (0.0, 0.0))  # the transfer sets of one draw are nested
        kept[key] = max(before[0], count * each * encoders[model][1]), max(before[1], gibibytes(count, each, width))
    return sum(one for one, _ in kept.values()), sum(one for _, one in kept.values()), len(kept)


def _model(settings: RunSettings) -> Model:
    return settings.teacher, settings.teacher_weights, settings.teacher_size, settings.teacher_window


def _seconds_of(encoder: FrozenEncoder, settings: RunSettings) -> float:
    """Seconds per image (or per window of it) of a forward pass in batches of 16."""
    import torch

    device = accelerator(settings.device, settings.precision).device
    images, module = torch.zeros(16, 3, *sides(encoder.at_once), device=device), encoder.module.to(device)
    with torch.inference_mode():
        return _median(lambda: module(images), device) / len(images)


def _step_seconds(settings: RunSettings) -> float:
    """Seconds per image of a training step at the study's batch size."""
    import torch

    device = accelerator(settings.device, settings.precision).device
    student = task_of(settings.task).student(replace(settings, student_weights="scratch"), 2)
    module = student.module.to(memory_format=torch.channels_last) if student.channels_last else student.module
    images = torch.randn(settings.batch_size, 3, *sides(student.size), device=device)
    module = module.to(device)
    return _median(lambda: module(images).sum().backward(), device) / len(images)


def _median(work: Callable[[], object], device: torch.device) -> float:
    """Median seconds of REPEATS calls of `work`, after a first call that is not counted."""
    import torch

    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
