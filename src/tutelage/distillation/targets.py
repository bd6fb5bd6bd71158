"""The targets that the student is trained to match: one per image, whatever view of it the student sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tutelage.data.image_cache import Images
from tutelage.data.view_grids import crop_grid
from tutelage.features.output_cache import Outputs, run_network
from tutelage.features.view_batches import CLEAN, MIRRORED, ViewSettings, drawn_views
from tutelage.metrics import log_softmax
from tutelage.models.adapted_teacher import FeatureExtractor


@dataclass(frozen=True)
class TeacherOutputs:
    """The adapted teacher's outputs for n images: from the cache, or, if `tables` is None, computed at each request.

    head: outputs (B, D) of the network -> (B, C) float32 logits, or (B, C, h, w). settings: of the views. looks: the views that the
    teacher runs on. tables: the cached outputs of each.
    """

    images: Images
    network: FeatureExtractor
    head: Callable[[np.ndarray], np.ndarray]
    settings: ViewSettings
    looks: tuple[int, ...]
    tables: dict[int, Outputs] | None

    def rows(self, positions: np.ndarray, look: int = CLEAN) -> np.ndarray:
        """(B, D) float32 outputs of the network for these images."""
        if self.tables is None:
            return run_network(self.network, self.images, positions, look, self.settings)
        return self.tables[look].rows(positions)

    def log_probabilities(self, positions: np.ndarray) -> np.ndarray:
        """(B, C) float32, or (B, C, h, w) on a grid over the whole image: the mean over `looks`, normalised."""
        found = []
        for look in self.looks:
            one = log_softmax(self.head(self.rows(positions, look)))
            found.append(one[..., ::-1] if look == MIRRORED and one.ndim == 4 else one)
        return log_softmax(np.mean(found, axis=0))


@dataclass(frozen=True)
class Targets:
    """The targets of all images: one per image, whatever the view; a target on a grid is cropped like the view.

    log_probabilities: positions (B,) -> (B, C) float32, or (B, C, h, w) over the whole image. features: positions -> (B, d) float32, or
    (B, d, h, w); None if no features are matched. settings: of the views that the student sees.
    """

    images: Images
    settings: ViewSettings
    log_probabilities: Callable[[np.ndarray], np.ndarray]
    features: Callable[[np.ndarray], np.ndarray] | None = None

    def probabilities(
        self, positions: np.ndarray, passes: np.ndarray, temperature: float = 1.0, hard: bool = False
    ) -> np.ndarray:
        """Return the targets of the views that the student sees in these passes.

        Args:
            positions: (B,) int64 images. passes: (B,) int64; pass e shows view e. temperature: divides the log probabilities.
            hard: whether each row (or place of a grid) is 1 for its most likely class and 0 for the others.

        Returns:
            (B, C) float32, or (B, C, h, w), summing to 1 over the classes; (B, 0) if there are no class targets.
        """
        found = self.log_probabilities(positions)
        if not found.shape[1]:
            return found
        found = self._seen(found / np.float32(temperature), positions, passes)
        if hard:
            return np.moveaxis(np.eye(found.shape[1], dtype=np.float32)[found.argmax(axis=1)], -1, 1)
        return np.exp(log_softmax(found))

    def matched(self, positions: np.ndarray, passes: np.ndarray) -> np.ndarray:
        """Return the (B, d) float32 features, or (B, d, h, w) cropped to the views of these passes; d = 0 if none are matched."""
        if self.features is None:
            return np.zeros((len(positions), 0), np.float32)
        return self._seen(self.features(positions), positions, passes)

    def _seen(self, values: np.ndarray, positions: np.ndarray, passes: np.ndarray) -> np.ndarray:
        if values.ndim == 2:
            return values
        sizes = self.images.sizes[positions]
        return crop_grid(values, drawn_views(self.images.seeds[positions], sizes, passes, self.settings), sizes)
