"""Rewrite the page of a finished run or study from its files."""

from __future__ import annotations

from pathlib import Path

from tutelage.progress import logger
from tutelage.results import PageResult
from tutelage.settings import command
from tutelage.settings.command_flags import ReportSettings


@command(ReportSettings)
def report(settings: ReportSettings) -> PageResult:
    """Write report/index.html of a run or a study: scores, what limits them, charts, and the command to reproduce it."""
    from tutelage.reporting.page import write_page
    from tutelage.run_folder import STUDY

    if (Path(settings.run) / STUDY).exists():
        from tutelage.study.study_page import write_study

        page = write_study(Path(settings.run))["page"]
    else:
        page = write_page(Path(settings.run))
    logger.info(f"open {page}")
    return PageResult(page=str(page))
