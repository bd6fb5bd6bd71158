"""Package versions and thread count, recorded because they can change the bits of a result. Imports no torch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

from tutelage.version import __version__

PACKAGES = ("torch", "timm", "numpy", "pillow")


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Return name -> installed version, of tutelage and of these packages, by default those that compute for it."""
    found = {"tutelage": __version__}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):  # installed under another name, such as pillow-simd
            found[name] = version(name)
    return found


def threads() -> int:
    """Return the number of threads used within a layer: OMP_NUM_THREADS, or the cores available to this process."""
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if given.isdigit() and int(given):
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
