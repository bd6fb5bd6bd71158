"""Stage 2: the adapted teacher's knowledge of the task goes to the student, on unlabelled images.

The teacher's outputs for M views of every image are computed once (or taken from the cache, or, above
`--cache-limit`, in the loop); the student sees the same views at its own size and matches the teacher's probabilities
(KL at temperature T) and, through a projection that is thrown away, its pooled features (cosine, on 256 principal
axes). Label propagation over the nearest-neighbour graph of the teacher's features sharpens the targets where held-out
labels say so. No label is read here but through the teacher and that graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tutelage import config as c
from tutelage.config import recipe
from tutelage.progress import progress, say
from tutelage.recipes.stage import MetricsLog, checkpoint_steps, default_epochs, file_hash, open_run, save_weights
from tutelage.runs import hash_of


@recipe
def transfer(
    *, out: c.Out = "", student: c.Student = "mobilenetv4-s", student_weights: c.StudentWeights = "pretrained",
    student_size: c.StudentSize = None, teacher_weights: c.TeacherWeights = "pretrained", views: c.ViewCount = 2,
    refine: c.Refine = "propagate", cache_limit: c.CacheLimit = 20.0, epochs: c.Epochs = None, steps: c.Steps = None,
    batch_size: c.BatchSize = 128, lr: c.LearningRate = 2e-3, temperature: c.Temperature = 1.0, feature_weight: c.FeatureWeight = 2.0,
    mixup: c.Mixup = 0.0,
    resize: c.Resize = "squash", flip: c.Flip = "horizontal", crop_area: c.CropArea = 0.6, view_seed: c.ViewSeed = 0,
    seed: c.Seed = 0, device: c.Device = "auto", precision: c.Precision = "auto", tracker: c.Tracker = "none",
    cache: c.Cache = None, overwrite: c.Overwrite = False, config: c.Config = None,
) -> dict[str, Any]:  # fmt: skip
    """Teach the student on the transfer set.

    Returns:
        result of the stage: steps, images seen, loss, how the targets were refined, seconds of targets and of training.
    """
    settings = dict(locals())
    import torch

    from tutelage import training
    from tutelage.compute import accelerator
    from tutelage.data.manifest import load_task
    from tutelage.models.adapted import load_adapted
    from tutelage.models.students import Taught, build_student
    from tutelage.recipes.teaching import make_targets
    from tutelage.targets import ViewSettings, gibibytes

    with open_run(out, cache, settings, overwrite) as (run, cache_dir):
        curated, adapted = run.result("transfer_set", "transfer"), run.result("teacher", "transfer")
        free = ("out", "cache", "device", "tracker", "overwrite", "config", "cache_limit")
        online = gibibytes(curated["images"]["transfer"], views, adapted["width"]) > cache_limit
        inputs = hash_of([
            "transfer", curated["outputs"], adapted["outputs"], online, {k: v for k, v in settings.items() if k not in free},
        ])  # fmt: skip
        if done := run.done("transfer", inputs):
            return {**done, "reused": True}
        hardware = accelerator(device, precision)
        main, processes = hardware.is_main_process, hardware.num_processes
        task = load_task(run.path, cache_dir)
        teacher = load_adapted(run.path / "teacher", adapted, teacher_weights, hardware)
        view_settings = ViewSettings(view_seed, flip, crop_area, resize=resize)
        targets, refined, target_seconds = make_targets(
            run,
            task,
            teacher,
            view_settings,
            views,
            refine,
            feature_weight > 0,
            cache_limit,
            cache_dir,
            hardware,
            inputs,
        )

        torch.manual_seed(training.seed_of(seed, "student"))
        built = build_student(student, len(task.classes), student_weights, student_size)
        module = built.module
        if targets.embedding is not None and not Taught.possible(module, built.size):
            say(f"{built.name} has no single head on pooled features: the teacher's features are not matched")
            targets = replace(targets, embedding=None)
        if targets.embedding is not None:
            module = Taught(module, targets.embedding[1].shape[1], built.size)
        module = module.to(hardware.device)
        if built.channels_last:
            module = module.to(memory_format=torch.channels_last)
        count = len(task.transfer)
        total = steps or max(1, round((epochs or default_epochs(count)) * count / batch_size))
        every = checkpoint_steps(total, batch_size)
        rate = training.scaled_rate(lr, batch_size)
        optimizer = training.optimizer_for(module, rate, hardware.device)
        average = training.Average(module)
        checkpoints, clock = run.path / "checkpoints", run.clock("transfer")
        start = training.load_checkpoint(checkpoints, "transfer", inputs, module, optimizer, average)
        if start:
            say(f"transfer goes on after step {start:,} of {total:,}")
        hardware.wait_for_everyone()
        module, optimizer = hardware.prepare(module, optimizer)
        plain = hardware.unwrap_model(module)
        metrics = MetricsLog(run.path / "transfer" / "metrics.jsonl", start, tracker, run.path, hardware)

        def save(step: int) -> None:
            if main:
                training.save_checkpoint(checkpoints, "transfer", step, inputs, plain, optimizer, average)

        plan = Plan(total, batch_size, rate, temperature, feature_weight, mixup, seed)
        with progress("transfer", total * batch_size, start * batch_size) as advance:
            teach(module, built, targets, plan, hardware, optimizer=optimizer, average=average, start=start,
                  log=metrics.write, save=save, every=every,
                  advance=clock.ticking(advance) if main else advance)  # fmt: skip
        metrics.close()
        hardware.wait_for_everyone()
        if main:
            own = {
                name.removeprefix("student."): value
                for name, value in average.state.items()
                if not name.startswith("projection.")
            }
            save_weights(run.path / "transfer" / "weights.safetensors", own)
            result = {
                "outputs": hash_of([inputs, file_hash(run.path / "transfer" / "weights.safetensors")]), "student": built.about(),
                "curated": curated["outputs"], "steps": total, "images_seen": total * batch_size, "processes": processes,
                "loss": metrics.last, "features": targets.embedding is not None,
                "refined": refined, "online": targets.table is None, "seconds": clock.stop(), "target_seconds": target_seconds,
            }  # fmt: skip
            run.finish("transfer", inputs, result)
            (run.path / "transfer" / "target_seconds.json").unlink(missing_ok=True)
        hardware.wait_for_everyone()
        return run.result("transfer", "transfer")


@dataclass(frozen=True)
class Plan:
    """steps: optimizer steps. batch_size: over all processes. rate: peak, already scaled. mixup: alpha, 0 = none.
    features: weight of the features' distance beside the KL divergence.
    """

    steps: int
    batch_size: int
    rate: float
    temperature: float
    features: float
    mixup: float
    seed: int


def teach(
    module: Any, student: Any, targets: Any, plan: Plan, hardware: Any, *, optimizer: Any, average: Any, start: int = 0,
    log: Callable[[dict[str, Any]], None] = lambda row: None, save: Callable[[int], None] = lambda step: None,
    every: int = 2**62,
    advance: Callable[[int], None] = lambda n: None,
) -> None:  # fmt: skip
    """The loop: views of a batch, the teacher's word on them, KL, one step, one update of the average.

    Args:
        module: the student, prepared by `hardware`; changed in place. student: its size, mean and std.
        targets: what the teacher says; with an embedding, `module` is a `Taught`. average: of the student's weights.
        start: steps that are done already.
        log: called about 200 times with step, loss, rate, images. save: called with the steps done, each `every` steps.
        advance: called with images seen.

    Raises:
        TutelageError: the loss is no number any more.
    """
    import torch

    from tutelage import losses, training
    from tutelage.compute import to_device
    from tutelage.targets import view_input

    rank, processes, plain = hardware.process_index, hardware.num_processes, hardware.unwrap_model(module)
    order, seen = training.seed_of(plan.seed, "order"), training.LossLog("transfer")

    def make(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        positions, passes = training.batch_of(step, plan.batch_size, len(targets.images), order)
        positions, passes = positions[rank::processes], passes[rank::processes]
        logits, features = (torch.from_numpy(array) for array in targets.of(positions, passes))
        return (
            view_input(targets.images, positions, passes % targets.views, targets.settings, student),
            logits,
            features,
        )

    matching = targets.embedding is not None
    module.train()
    workers = 1 if hardware.device.type == "cpu" else 8
    for step, (images, logits, features) in training.ahead(make, range(start, plan.steps), workers):
        now = training.learning_rate(step, plan.steps, plan.rate)
        for group in optimizer.param_groups:
            group["lr"] = now
        torch.manual_seed(training.seed_of(plan.seed, "step", step, rank))
        images, logits, features = (to_device(part, hardware.device) for part in (images, logits, features))
        told = torch.cat([torch.softmax(logits / plan.temperature, dim=1), features], dim=1)
        images, told = training.mixup(images, told, plan.mixup, training.seed_of(plan.seed, "mixup", step))
        soft, features = told.split([logits.shape[1], features.shape[1]], dim=1)
        with hardware.autocast():
            output = module(images)
        output, projected = output if matching else (output, None)
        loss = losses.distillation(output, plan.temperature * torch.log(soft.clamp(min=1e-8)), plan.temperature)
        if projected is not None:
            loss = loss + plan.features * losses.feature_distance(projected, features)
        optimizer.zero_grad(set_to_none=True)
        hardware.backward(loss)
        hardware.clip_grad_norm_(module.parameters(), training.CLIP)
        optimizer.step()
        average.update(plain)
        seen.add(step + 1, loss)
        done, due = step + 1, (step + 1) % every == 0 and step + 1 < plan.steps
        if due or done % max(1, plan.steps // 200) == 0 or done == plan.steps:
            log({"step": done, "loss": seen.mean(), "rate": now, "images": done * plan.batch_size})
        if due:  # after the losses were looked at: a checkpoint never holds what is no number
            save(done)
        advance(plan.batch_size)
