"""Predict masks of image files with an exported segmentation student. Needs onnxruntime, numpy and Pillow; loads no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from tutelage.data.decode import decode, fit
from tutelage.data.upsample import decided
from tutelage.deploy.prediction_files import outputs, write_predictions
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
    model: Model, paths: Sequence[str], out: Path, top: int, advance: Callable[[int], None] = lambda n: None
) -> tuple[Predictions | MaskPredictions, dict[str, list[object]], Path | None]:
    """Predict image files and write the table: of classes, or of masks, which are painted in a folder named like `out` without its suffix.

    Args:
        paths: of the images. out: the table. top: number of classes listed for each image. advance: called with numbers of images.

    Returns:
        the predictions, the columns of their table, and the path of the list of images that cannot be read, None if all could be read.

    Raises:
        TutelageError: `out` cannot be written, or would replace what earlier predictions did not write; no image can be read.
    """
    with outputs(out, model.about.get("task") == "segmentation", paths) as place:
        if place.masks is not None:
            result = paint_images(model, paths, place.staged / place.masks.name, place.masks, advance)
        else:
            result = predict_images(model, paths, advance=advance)
        columns = result.columns(top)
        return result, columns, write_predictions(place, columns, result.rejected)


def paint_images(
    model: Model, paths: Iterable[str], staged: Path, folder: Path, advance: Callable[[int], None]
) -> MaskPredictions:
    """Write the mask of each image at the image's own size, as a PNG of class numbers in the data set's colours, to `staged`, which becomes
    `folder`."""
    staged.mkdir()
    result = MaskPredictions(model.labels)
    colours = [value for colour in model.about["colours"] for value in colour]
    taken: set[str] = set()
    for path in paths:
        try:
            rgb, (height, width) = decode(file_bytes(path), model.about["decode_short_side"])
            pixels = fit(rgb, model.about["size"], model.about["resize"])
            mask = decided(model.outputs(pixels[None])[0], height, width)
            name = f"{_free(Path(path).stem, taken)}.png"
            image = Image.fromarray(mask)
            image.putpalette(colours)
            image.save(staged / name, "PNG")
            result.paths.append(path)
            result.masks.append(str(folder / name))
            result.shares.append(np.bincount(mask.reshape(-1), minlength=len(model.labels)) / mask.size)
        except Unreadable as error:
            result.rejected.append((path, str(error)))
        advance(1)
    return result


def _free(stem: str, taken: set[str]) -> str:
    """A file name, without its ending, that no other image of this call has."""
    while len(os.fsencode(stem)) > 240:
        stem = stem[:-1]
    name, number = stem, 1
    while name.casefold() in taken:  # some file systems do not tell A from a
        number += 1
        name = f"{stem}-{number}"
    taken.add(name.casefold())
    return name
