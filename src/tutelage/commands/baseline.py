"""The baseline: the same student trained on the labels only, with the same views, steps, batch size and learning rate."""

from __future__ import annotations

import numpy as np

from tutelage.compute_cost import CostMeter
from tutelage.data.manifest import load_task
from tutelage.device import accelerator, training_flops
from tutelage.files import file_hash, hash_of
from tutelage.pipeline.stage import MetricsLog, checkpoint_steps, open_run, save_weights, training_steps
from tutelage.results import CurationResult, StudentResult
from tutelage.settings import command, identity
from tutelage.settings.command_flags import BaselineSettings
from tutelage.tasks import task_of


@command(BaselineSettings)
def baseline(settings: BaselineSettings) -> StudentResult:
    """Train the baseline: the same student on the labels only, for as many steps as the distilled student."""
    from tutelage.finetuning.labels_only import LabelsOnly, train_student
    from tutelage.training import checkpoints

    with open_run(settings) as (run, cache_dir):
        curated = CurationResult(**run.result("curate", "baseline"))
        kind, folder = task_of(curated.task), run.path / "baseline"
        inputs = hash_of(["baseline", curated.outputs, identity(settings, kind.UNUSED)])
        if done := run.done("baseline", inputs):
            return StudentResult(**done, reused=True)
        clock, task = run.clock("baseline"), load_task(run.path, cache_dir)
        hardware = accelerator(settings.device, settings.precision)
        total, meter = training_steps(settings, len(task.transfer), kind.IMAGES), CostMeter()
        every = checkpoint_steps(total, settings.batch_size)
        resumable = checkpoints.Resumable(run.path / "checkpoints", "baseline", inputs, every)
        metrics = MetricsLog(folder / "metrics.jsonl", resumable.start, settings.tracker, run.path, hardware)
        job = LabelsOnly(kind, task, settings, total, settings.seed, np.arange(len(task.train)), "baseline")
        built, module = train_student(job, hardware, resumable, lambda count: clock.tick(), metrics.write)
        metrics.close()
        meter.trained, meter.train_flops = total * settings.batch_size, training_flops(module, built.size)
        save_weights(folder / "weights.safetensors", module)
        seconds = clock.stop()
        result = {
            "outputs": file_hash(folder / "weights.safetensors"),
            "curated": curated.outputs,
            "student": built.about(),
            "steps": total,
            "images_seen": total * settings.batch_size,
            "loss": metrics.last,
            "seconds": seconds,
            "compute_cost": meter.entry(folder, seconds),
        }
        return StudentResult(**run.finish("baseline", inputs, result))
