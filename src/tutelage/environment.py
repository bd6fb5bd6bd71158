"""What a result was made with beside its settings: versions and threads, by which two equal runs may differ in bits. No torch."""

from __future__ import annotations

import contextlib
import os
from importlib.metadata import PackageNotFoundError, version

from tutelage.version import __version__

PACKAGES = ("torch", "timm", "numpy", "pillow")


def versions() -> dict[str, str]:
    """Name -> version of tutelage and of what computes for it, as they are installed."""
    found = {"tutelage": __version__}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):  # another build, such as pillow-simd
            found[name] = version(name)
    return found


def threads() -> int:
    """Threads of one layer: OMP_NUM_THREADS, or as many as there are cores for this process."""
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if given.isdigit() and int(given):
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
