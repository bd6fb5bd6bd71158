"""Programs of others that write much to the terminal, run without what they write."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet(level: int) -> Iterator[None]:
    """Within the block, show no warnings, nothing that Python prints, and no log messages up to `level`, as of `logging`."""
    before = logging.root.manager.disable
    logging.disable(level)
    output = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
