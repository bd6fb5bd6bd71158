"""A page to try an exported model: one HTML file that opens by a double click and works offline."""

from __future__ import annotations

from pathlib import Path

from tutelage.pipeline.finished_exports import export_folder
from tutelage.progress import logger
from tutelage.results import PageResult
from tutelage.settings import command
from tutelage.settings.command_flags import DemoPageSettings


@command(DemoPageSettings)
def demo_page(settings: DemoPageSettings) -> PageResult:
    """Write OUT/index.html, which classifies images dropped on it: model, labels and runtime are inside, nothing is downloaded."""
    from tutelage.deploy import browser

    # a port in use is reported before the work starts
    server = browser.server_of(settings.port) if settings.serve else None
    try:
        page = browser.write_page(export_folder(settings.export), Path(settings.out))
    except BaseException:
        if server is not None:
            server.server_close()
        raise
    result = PageResult(page=str(page), megabytes=round(page.stat().st_size / 1e6, 1))
    if server is None:
        logger.info(f"open {page}")
        return result
    logger.info(f"open http://{browser.LOOPBACK}:{server.server_address[1]}/ (Ctrl-C stops it)")
    browser.serve(server, page.read_bytes())
    return result
