"""Predict the classes of image files with an export folder. Needs onnxruntime, numpy and Pillow; loads no torch."""

from __future__ import annotations

from pathlib import Path

from tutelage.errors import shown
from tutelage.pipeline.finished_exports import export_folder
from tutelage.progress import logger, progress
from tutelage.results import PredictionsResult
from tutelage.settings import command
from tutelage.settings.command_flags import PredictSettings


@command(PredictSettings)
def predict(settings: PredictSettings) -> PredictionsResult:
    """Classify images with an exported student, or paint their masks.

    Writes path, class, probability, unsure (below the threshold of the export) and, with --top, the next classes; for a segmentation
    student path, mask (a PNG in a folder beside OUT) and the share of each class. Images that cannot be read are listed in
    OUT.rejected.csv.
    """
    from tutelage.deploy import runtime
    from tutelage.deploy.predict_masks import predictions

    opened = runtime.open_export(export_folder(settings.export), settings.model, settings.threads)
    paths = runtime.files_in(settings.images)
    with progress("predict", len(paths)) as advance:
        result, columns, listed = predictions(opened, paths, Path(settings.out), settings.top, advance)
    if listed:
        first = shown((f"{name} ({reason})" for name, reason in result.rejected), 3)
        logger.info(f"{len(result.rejected):,} of {len(paths):,} images cannot be read, see {listed}: {first}")
    size, unusable = len(result.paths), len(result.rejected)
    found = PredictionsResult(predictions=settings.out, images=size, rejected=unusable, model=opened.file)
    if "unsure" in columns:
        return found.model_copy(update={"unsure": sum(map(bool, columns["unsure"]))})
    return found.model_copy(update={"masks": str(Path(settings.out).with_suffix(""))})
