"""The delivered student of a run as a plain module, with the preprocessing of its training and evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from tutelage.data.decode import fit, shrunken
from tutelage.data.views import to_input
from tutelage.errors import TutelageError
from tutelage.image_size import Size
from tutelage.results import CurationResult, StudentEntry
from tutelage.run_folder import Run


@dataclass(frozen=True)
class Preprocess:
    """Turns an image into a network's input as `tutelage evaluate` does.

    size: of the input, pixels or "HEIGHTxWIDTH". mean, std: of each channel, for images in [0, 1]. resize: "squash", "crop" or "pad".
    side: short side in pixels to which larger images are shrunk first, as in the cache.
    """

    size: Size
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: str
    side: int

    def __call__(self, image: Image.Image | np.ndarray) -> torch.Tensor:
        """Return the network's input for one image, (3, H, W) float32, normalised.

        Args:
            image: of Pillow, or (H, W, 3) uint8 RGB. One that `Image.open` has opened, but not loaded yet, is decoded exactly as in
                the run: a large JPEG at a reduced size, in place.

        Raises:
            TutelageError: an array of another shape or type.
        """
        if isinstance(image, np.ndarray):
            if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
                message = f"an image of shape {image.shape}, {image.dtype}, must be (H, W, 3) uint8, RGB"
                raise TutelageError(message, "open it by PIL.Image, or convert it to RGB with values from 0 to 255")
            image = Image.fromarray(image)
        pixels = torch.from_numpy(fit(shrunken(image, self.side)[0], self.size, self.resize))
        return to_input(pixels.permute(2, 0, 1)[None], self.mean, self.std)[0]


class LoadedStudent(NamedTuple):
    """A student, ready for use.

    module: (B, 3, H, W) float32 -> (B, C) float32 logits, of masks (B, C, h, w); in evaluation mode, on the CPU. For classification
    it is timm's. preprocess: image -> (3, H, W) float32. classes: C names.
    """

    module: nn.Module
    preprocess: Preprocess
    classes: tuple[str, ...]


def load_student(run: str | Path) -> LoadedStudent:
    """Load the student that a run delivers; its predictions are those that `tutelage evaluate` scores.

    Args:
        run: run folder, after `finetune`.

    Raises:
        TutelageError: the run is not finished.
    """
    from tutelage.pipeline.load_student import load_student as load

    folder = Run(run)
    curated = CurationResult(**folder.result("curate", "load_student"))
    delivered = StudentEntry(**folder.result("finetune", "load_student")["student"])
    student = load(folder.path / "finetune", delivered, len(curated.classes))
    preprocess = Preprocess(student.size, student.mean, student.std, folder.chosen()["resize"], curated.store_side)
    return LoadedStudent(student.module, preprocess, tuple(curated.classes))
