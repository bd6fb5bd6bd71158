"""The baseline: the same student on the labels only, with the same views, steps, batch, learning rate and mixup."""

from __future__ import annotations

from typing import Any

from tutelage import config as c
from tutelage.config import recipe
from tutelage.progress import progress
from tutelage.recipes.stage import MetricsLog, checkpoint_steps, file_hash, open_run, save_weights, training_steps
from tutelage.runs import hash_of


@recipe
def alone(
    *, out: c.Out = "", student: c.Student = "mobilenetv4-s", student_weights: c.StudentWeights = "pretrained",
    student_size: c.StudentSize = None, decoder: c.Decoder = "lraspp",
    epochs: c.Epochs = None, steps: c.Steps = None, batch_size: c.BatchSize = 128,
    lr: c.LearningRate = 2e-3, mixup: c.Mixup = 0.0, class_weight: c.ClassWeight = "none", resize: c.Resize = "squash",
    flip: c.Flip = "horizontal", crop_area: c.CropArea = 0.6, view_seed: c.ViewSeed = 0, seed: c.Seed = 0,
    device: c.Device = "auto", precision: c.Precision = "auto", tracker: c.Tracker = "none", cache: c.Cache = None,
    overwrite: c.Overwrite = False, config: c.Config = None,
) -> dict[str, Any]:  # fmt: skip
    """Train the student on the labelled images alone, for as many steps as the taught one gets.

    Returns:
        result of the stage: steps, images seen, seconds.
    """
    settings = dict(locals())
    import torch

    from tutelage import losses, training
    from tutelage.compute import accelerator, training_flops
    from tutelage.data.manifest import load_task
    from tutelage.recipes import supervised
    from tutelage.recipes.ledger import Meter
    from tutelage.targets import plain_labels
    from tutelage.tasks import task_of

    with open_run(out, cache, settings, overwrite) as (run, cache_dir):
        curated = run.result("transfer_set", "alone")
        kind = task_of(curated["task"])
        free = ("out", "cache", "device", "tracker", "overwrite", "config", *kind.UNUSED)
        inputs = hash_of(["alone", curated["outputs"], {k: v for k, v in settings.items() if k not in free}])
        if done := run.done("alone", inputs):
            return {**done, "reused": True}
        clock, task, hardware = run.clock("alone"), load_task(run.path, cache_dir), accelerator(device, precision)
        classes, count = len(task.classes), len(task.transfer)
        total = training_steps(steps, epochs, count, batch_size)
        torch.manual_seed(training.seed_of(seed, "student"))
        built = kind.student(settings, classes)
        module = built.module.to(hardware.device)
        if built.channels_last:
            module = module.to(memory_format=torch.channels_last)
        meter = Meter()
        meter.trained, meter.train_flops = total * batch_size, training_flops(module, built.size)
        plan = supervised.Plan(total, batch_size, training.scaled_rate(lr, batch_size), seed, classes, mixup)
        resumable = supervised.Resumable(run.path / "checkpoints", "alone", inputs, checkpoint_steps(total, batch_size))
        weights = losses.class_weights(torch.from_numpy(plain_labels(task.train.labels)), classes, class_weight)
        start = training.newest_step(resumable.folder, "alone", inputs)
        metrics = MetricsLog(run.path / "alone" / "metrics.jsonl", start, tracker, run.path, hardware)
        with progress("student alone", total * batch_size) as advance:
            state = supervised.train_on_labels(
                module, built, task.train.images, task.train.labels, plan,
                kind.views(settings),
                class_weights=None if weights is None else weights.to(hardware.device), accelerator=hardware,
                resumable=resumable, advance=clock.ticking(advance), log=metrics.write, what="student alone",
            )  # fmt: skip
        metrics.close()
        save_weights(run.path / "alone" / "weights.safetensors", state)
        seconds = clock.stop()
        result = {
            "outputs": file_hash(run.path / "alone" / "weights.safetensors"), "curated": curated["outputs"],
            "student": built.about(), "steps": total,
            "images_seen": total * batch_size, "loss": metrics.last, "seconds": seconds,
            "ledger": meter.entry(run.path / "alone", seconds),
        }  # fmt: skip
        return run.finish("alone", inputs, result)
