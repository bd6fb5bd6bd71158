"""Where the export of a run is, and whether the run is ready for one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tutelage.errors import TutelageError
from tutelage.runs import Run


def export_folder(place: str) -> Path:
    """The export folder that is meant: the folder itself, or export/ in a run."""
    folder = Path(place)
    return folder / "export" if (folder / "export").is_dir() and not (folder / "export.json").exists() else folder


def finished(run: Path) -> dict[str, Any]:
    """Result of each stage of a run that has been evaluated.

    Raises:
        TutelageError: the folder holds no run, or one that is not finished.
    """
    if not (run / "settings.toml").exists():
        raise TutelageError(
            f"{run} holds no run", "a folder that `tutelage run --out` has written", f"tutelage run --out {run} ..."
        )
    for stage in ("transfer_set", "student"):
        Run(run).result(stage, "export")
    stages = Run(run).results()
    if "delivered" not in stages["report"]:
        raise TutelageError(f"{run} is not evaluated", "a finished run", f"tutelage evaluate {run}")
    return stages
