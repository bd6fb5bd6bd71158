"""The compute cost of each stage, so that the methods of a study can be compared by their compute.

1 MAC = 2 FLOPs. A stage is charged for everything it needs, including teacher outputs that the cache already held; `computed`
counts what was computed this time.
"""

from __future__ import annotations

from pathlib import Path

from tutelage.device import PeakMemory
from tutelage.files import files_below
from tutelage.json_object import JSON


class CostMeter:
    """Counter of a stage's compute while it runs."""

    def __init__(self):
        self._peak = PeakMemory()
        self._asked: dict[tuple[int, bytes], int] = {}
        self.computed = 0
        self.teacher_flops = 0  # of one forward pass
        self.output_bytes = 0  # of the teacher's outputs for one view, as the cache stores them
        self.trained = 0.0  # images trained on, repeats included
        self.train_flops = 0  # forward and backward pass of one image

    def asked(self, number: int, keys: bytes, images: int, computed: int) -> None:
        """Charge the teacher's outputs for one view of these images; asking for the same ones again is not charged twice."""
        self._asked[number, keys] = images
        self.computed += computed

    def entry(self, folder: Path, seconds: float, teacher_seconds: float = 0.0) -> JSON:
        """Return the stage's compute cost: FLOPs, images, seconds, peak memory in MiB, bytes on disk."""
        outputs = sum(self._asked.values())
        taken = sum(status.st_size for _, status in files_below(folder))
        return {
            "flops": int(self.train_flops * self.trained),
            "images": self.trained,
            "seconds": seconds,
            "memory_mib": self._peak.mib(),
            "bytes": taken,
            "teacher": {
                "flops": self.teacher_flops * outputs,
                "outputs": outputs,
                "computed": self.computed,
                "seconds": teacher_seconds,
                "bytes": self.output_bytes * outputs,
            },
        }
