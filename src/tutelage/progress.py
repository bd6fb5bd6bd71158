"""Messages for the user and the progress of work, through the logger `tutelage`: on stderr, bars on a terminal, plain lines elsewhere.

The logger has level INFO. The command line takes another from TUTELAGE_LOG or --quiet; in Python, set that of the logger.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from tutelage.errors import harmless, number_of

PLAIN_EVERY = 15.0  # seconds between plain lines
SHOWN_AFTER = 1.0  # seconds; work that finishes sooner prints no line

Advance = Callable[[int], None]  # called with the number of units, mostly images, that were just done


class _Stderr(logging.StreamHandler):
    """A handler that writes to the stderr of the moment, in the main process only."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, stream: TextIO) -> None: ...

    def format(self, record: logging.LogRecord) -> str:
        return harmless(super().format(record))

    def filter(self, record: logging.LogRecord) -> bool:
        return main_process() and bool(super().filter(record))


logger = logging.getLogger("tutelage")
logger.addHandler(_Stderr())
logger.setLevel(logging.INFO)
logger.propagate = False


def main_process() -> bool:
    """Whether this process prints: the only one, or the first of several under torch.distributed.run."""
    return processes() == 1 or os.environ.get("RANK", "0") == "0"


def processes() -> int:
    """Return the number of processes that share this work, including this one."""
    given = os.environ.get("WORLD_SIZE", "")
    return max(1, int(given)) if given.isdecimal() else 1


def duration(seconds: float) -> str:
    """Return a duration as text: 8.1 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


@contextlib.contextmanager
def progress(what: str, total: int, done: int = 0) -> Iterator[Advance]:
    """Show the progress of work: how much is done, how fast, and how much time is left.

    Args:
        what: name of the work, such as "decode".
        total: number of units.
        done: units that an earlier process has already done.

    Yields:
        advance(n): call it after n more units.
    """
    if not main_process() or not logger.isEnabledFor(logging.INFO):
        yield lambda n: None
    elif sys.stderr.isatty():
        with _bar(what, total, done) as advance:
            yield advance
    else:
        with _lines(what, total, done) as advance:
            yield advance


@contextlib.contextmanager
def _bar(what: str, total: int, done: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:>22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task, start, count = bar.add_task(what, total=total, completed=done, rate=""), time.monotonic(), 0

        def advance(n: int) -> None:
            nonlocal count
            count += n
            bar.update(task, advance=n, rate=f"{count / max(time.monotonic() - start, 1e-9):,.0f} images/s")

        yield advance


@contextlib.contextmanager
def _lines(what: str, total: int, done: int) -> Iterator[Advance]:
    start = last = time.monotonic()
    count = 0

    def advance(n: int) -> None:
        nonlocal count, last
        count += n
        now = time.monotonic()
        if count and now - last >= PLAIN_EVERY and done + count < total:
            last = now
            rate = count / (now - start)
            left = duration((total - done - count) / rate)
            logger.info(f"{what}: {done + count:,} of {total:,} images, {rate:,.0f} images/s, {left} left")

    yield advance
    seconds = time.monotonic() - start
    if count and seconds >= SHOWN_AFTER:
        logger.info(f"{what}: {number_of(count, 'image')} in {duration(seconds)}, {count / seconds:,.0f} images/s")
