"""Files that hold what the page shows of test images with masks: coloured pictures and pixel counts. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tutelage.data.manifest import Labelled
from tutelage.data.masks import Colour, Masks, painted
from tutelage.files import atomic_write, write_json
from tutelage.metrics import mean_iou
from tutelage.reporting.example_predictions import COUNTS, encoded, shown_student, thumbnail
from tutelage.reporting.table import TITLES

SHOWN = 10  # test images, evenly spaced from the student's worst to its best
SIDE = 200  # largest side of a picture in pixels


def write_dense_evidence(
    folder: Path,
    test: Labelled,
    predictions: Mapping[str, np.ndarray | list[np.ndarray]],
    counts: dict[str, np.ndarray],
    colours: Sequence[Colour],
) -> None:
    """Write predictions.npz (pixel counts by model, image and class) and pictures.json into a report folder.

    Args:
        test: images with their names and masks. predictions: for each model the predicted (H, W) uint8 class numbers of every image.
        counts: (n, C, 3) of `metrics.pixel_counts` for each model. colours: C triples.
    """
    scores = {name: mean_iou(one) for name, one in counts.items()}
    with atomic_write(folder / "predictions.npz") as path, path.open("wb") as file:
        each = {f"{COUNTS}{name}": one.astype(np.int32) for name, one in counts.items()}
        np.savez_compressed(file, **each)  # type: ignore[arg-type]
    first = shown_student(scores) or ("teacher" if "teacher" in scores else None)
    order = np.argsort(scores[first], kind="stable") if first else np.zeros(0, np.int64)
    places = np.unique(np.linspace(0, len(order) - 1, min(SHOWN, len(order))).round().astype(int)) if len(order) else []
    masks, shown, in_order = test.labels, [], {name: predictions[name] for name in TITLES if name in predictions}
    assert isinstance(masks, Masks)
    for row in (int(order[place]) for place in places):
        mask = masks.one(row)
        pictures = {"image": f"data:image/jpeg;base64,{thumbnail(test.images[row], SIDE)}", "mask": png(mask, colours)}
        pictures |= {name: png(np.where(mask == 255, mask, one[row]), colours) for name, one in in_order.items()}
        each = {name: float(one[row]) for name, one in scores.items()}
        shown.append({"id": test.ids[row], "pictures": pictures, "scores": each})
    write_json(folder / "pictures.json", {"images": shown, "colours": [list(one) for one in colours]})


def png(mask: np.ndarray, colours: Sequence[Colour]) -> str:
    """A small PNG of a mask in its classes' colours, black for pixels without a class, as a data URL."""
    share = min(1.0, SIDE / max(mask.shape))
    size = (max(1, round(mask.shape[1] * share)), max(1, round(mask.shape[0] * share)))
    small = np.array(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
    return f"data:image/png;base64,{encoded(Image.fromarray(painted(small, colours)), 'PNG', optimize=True)}"
