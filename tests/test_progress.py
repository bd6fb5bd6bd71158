"""What the lines about work under way promise."""

from __future__ import annotations

import re

import pytest

from tutelage import progress as progress_module
from tutelage.cli import call
from tutelage.progress import duration, logger, main_process, progress
from tutelage.results import CacheResult
from tutelage.settings import command
from tutelage.settings.command_flags import CacheSettings


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """A clock that a test sets."""
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return now


def test_durations():
    """Durations are in seconds with one decimal, then minutes, then hours."""
    assert [duration(s) for s in (8.06, 59.94, 60, 200, 3599.4, 3600, 7500)] == [
        "8.1 s", "59.9 s", "1 min 00 s", "3 min 20 s", "59 min 59 s", "1 h 00 min", "2 h 05 min",
    ]  # fmt: skip


def test_lines_tell_how_far_how_fast_and_how_long(clock, capsys):
    """Without a terminal a line comes every 15 seconds at most, on stderr, and one at the end."""
    with progress("decode", 3000, done=1000) as advance:
        for _ in range(4):
            clock[0] += 10
            advance(250)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "decode: 1,500 of 3,000 images, 25 images/s, 1 min 00 s left",
        "decode: 2,000 of 3,000 images, 25 images/s, 40.0 s left",
        "decode: 1,000 images in 40.0 s, 25 images/s",
    ]


def test_nothing_done_yet_is_no_error(clock, capsys):
    """A long wait before the first unit is done is told of later, and stops nothing."""
    with progress("targets", 100) as advance:
        clock[0] += 60
        advance(0)
        clock[0] += 1
        advance(50)
    assert re.match(r"targets: 50 of 100 images", capsys.readouterr().err)


def test_quick_work_leaves_no_line(clock, capsys):
    """What takes less than a second, and what had nothing to do, is not worth a line."""
    with progress("decode", 10) as advance:
        clock[0] += 0.5
        advance(10)
    with progress("decode", 10):
        clock[0] += 60
    assert capsys.readouterr().err == ""


def test_only_the_first_process_speaks(clock, capsys, monkeypatch):
    """Of several processes the first one speaks."""
    monkeypatch.setenv("RANK", "1")
    assert main_process(), "alone, whatever else its environment says"
    monkeypatch.setenv("WORLD_SIZE", "2")
    logger.info("hello")
    with progress("decode", 10) as advance:
        clock[0] += 60
        advance(5)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    logger.info("hello")
    assert capsys.readouterr().err == "hello\n"


def test_a_library_can_be_silenced(clock, capsys):
    """Above the level INFO nothing is printed, neither messages nor progress; warnings are."""
    logger.setLevel("WARNING")
    try:
        logger.info("no")
        logger.warning("yes")
        with progress("decode", 2) as advance:
            clock[0] += 60
            advance(1)
    finally:
        logger.setLevel("INFO")
    assert capsys.readouterr().err == "yes\n"


@pytest.mark.parametrize(
    ("words", "level", "told"), [((), "WARNING", False), (("--quiet",), "INFO", False), ((), "INFO", True)]
)
def test_quiet_on_the_command_line(words, level, told, monkeypatch, capsys, tmp_path):
    """--quiet and TUTELAGE_LOG silence messages of one command, not its result; the next command is as loud as before."""
    monkeypatch.setenv("TUTELAGE_LOG", level)
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr("tutelage.cli.function_of", lambda name: cache)
    assert call(["cache", "--cache", str(tmp_path / "cache"), *words]) == 0
    out, err = capsys.readouterr()
    assert ("GiB in" in out, "a message" in err) == (True, told)
    assert logger.level == 20


@command(CacheSettings)
def cache(settings: CacheSettings) -> CacheResult:
    """A command that has something to say."""
    logger.info("a message")
    return CacheResult(cache=settings.cache or "", entries=[], gib=0.0, removed=[])


def test_a_level_that_is_none(monkeypatch, capsys):
    """A level that logging does not know is one error with what it may have meant."""
    monkeypatch.setenv("TUTELAGE_LOG", "WARNIN")
    assert call(["doctor", "--json"]) == 2
    assert "TUTELAGE_LOG=WARNIN" in (err := capsys.readouterr().err)
    assert "WARNING" in err
