"""Find the export of a run, and check whether the run is ready to be exported."""

from __future__ import annotations

import contextlib
from pathlib import Path

from tutelage.errors import TutelageError
from tutelage.files import read_json, unused_beside
from tutelage.json_object import JSON
from tutelage.progress import logger
from tutelage.results import CurationResult, FinetuneResult
from tutelage.run_folder import Run


def export_folder(place: str) -> Path:
    """Return the export folder at a place: the folder itself, or its export/ if it is a run folder; warn if the run has another student."""
    folder = Path(place)
    folder = folder / "export" if (folder / "export").is_dir() and not (folder / "export.json").exists() else folder
    warn_of_old_export(folder.absolute().parent)
    return folder


def warn_of_old_export(run: Path) -> None:
    """Warn if a run's export/ is not of the student that the run has now; say nothing where either is missing."""
    with contextlib.suppress(TutelageError):  # damaged: reported where they are used
        place = run / "export"
        exported, delivered = read_json(place / "export.json"), Run(run).kept("finetune")
        if exported and delivered and exported.get("outputs") != delivered.get("outputs"):
            logger.warning(f"{place} is of an earlier student of this run: `tutelage export {run}` re-creates it")


def move_old_export(run: Run) -> None:
    """Move a run's export/ aside if it is not of the student that the run has now; one that is damaged or in use stays."""
    place = run.path / "export"
    with contextlib.suppress(TutelageError, OSError):
        exported, delivered = read_json(place / "export.json"), run.kept("finetune")
        if not (exported and delivered) or exported.get("outputs") == delivered.get("outputs"):
            return
        old = unused_beside(place, "old")
        place.rename(old)
        logger.warning(
            f"{place} was of an earlier student of this run: it is {old} now; `tutelage export {run.path}` makes a new one"
        )


def finished(run: Path) -> dict[str, JSON]:
    """Return the result of each stage of a run that has been evaluated.

    Raises:
        TutelageError: the folder is not a run folder, or the run has not been finished and evaluated.
    """
    if not (run / "settings.toml").exists():
        hint = f"use a folder that `tutelage run` has written, or run `tutelage run --out {run} ...` first"
        raise TutelageError(f"{run} is not a run folder", hint)
    for stage in ("curate", "finetune"):
        Run(run).result(stage, "export")
    stages = Run(run).results()
    for made, stage in ((CurationResult, "curate"), (FinetuneResult, "finetune")):
        made(**stages[stage])  # a file that holds something else is an error
    Run(run).evaluation()
    return stages
