"""Predict masks of image files with an exported segmentation student. Needs onnxruntime, numpy and Pillow; loads no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from tutelage.data.decode import decode, fit
from tutelage.data.upsample import decided
from tutelage.deploy.prediction_files import check_outputs, whole
from tutelage.deploy.runtime import Model, Predictions, file_bytes, predict_images
from tutelage.errors import Unreadable


@dataclass
class MaskPredictions:
    """paths: the n images that could be read. masks: n paths of PNGs. shares: for each image C shares of its pixels. rejected: path
    and reason of the other images."""

    labels: list[str]
    paths: list[str] = field(default_factory=list)
    masks: list[str] = field(default_factory=list)
    shares: list[np.ndarray] = field(default_factory=list)
    rejected: list[tuple[str, str]] = field(default_factory=list)

    def columns(self, top: int) -> dict[str, list[object]]:
        """The table: path, mask, and the share of the pixels that each class has."""
        table = np.array(self.shares).reshape(len(self.paths), len(self.labels))
        columns = zip(self.labels, table.T, strict=True)
        shares: dict[str, list[object]] = {
            f"share_{label}": [round(float(one), 6) for one in column] for label, column in columns
        }
        return {"path": [*self.paths], "mask": [*self.masks], **shares}


def predictions(
    model: Model, paths: Iterable[str], out: Path, advance: Callable[[int], None] = lambda n: None
) -> Predictions | MaskPredictions:
    """Predict image files: classes, or masks, which are written to a folder named like `out` without its suffix.

    Raises:
        TutelageError: `out` or that folder holds something other than earlier predictions.
    """
    masks = model.about.get("task") == "segmentation"
    check_outputs(out, masks)
    if masks:
        return paint_images(model, paths, out.with_suffix(""), advance)
    return predict_images(model, paths, advance=advance)


def paint_images(model: Model, paths: Iterable[str], folder: Path, advance: Callable[[int], None]) -> MaskPredictions:
    """Write the mask of each image at the image's own size, as a PNG of class numbers in the data set's colours."""
    result = MaskPredictions(model.labels)
    colours = [value for colour in model.about["colours"] for value in colour]
    taken: set[str] = set()
    for path in paths:
        try:
            rgb, (height, width) = decode(file_bytes(path), model.about["decode_short_side"])
            pixels = fit(rgb, model.about["size"], model.about["resize"])
            mask = decided(model.outputs(pixels[None])[0], height, width)
            file = folder / f"{_free(Path(path).stem, taken)}.png"
            image = Image.fromarray(mask)
            image.putpalette(colours)
            with whole(file) as partial:
                image.save(partial, "PNG")
            result.paths.append(path)
            result.masks.append(str(file))
            result.shares.append(np.bincount(mask.reshape(-1), minlength=len(model.labels)) / mask.size)
        except Unreadable as error:
            result.rejected.append((path, str(error)))
        advance(1)
    return result


def _free(stem: str, taken: set[str]) -> str:
    """A file name that no other image of this call has."""
    name, number = stem, 1
    while name in taken:
        number += 1
        name = f"{stem}-{number}"
    taken.add(name)
    return name
