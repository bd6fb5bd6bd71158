"""Damage that hypothesis makes up, to any file of a run or its export, between two commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from conftest import Task, make_task, refused
from spoil import DAMAGE, spoil

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Task:
    """A run of the tiny task, exported, and a table of its predictions."""
    from tutelage.cli import call

    task = make_task(tmp_path_factory.mktemp("damaged"))
    out, table = str(task.out), str(task.root / "predictions.csv")
    for words in (task.words("run"), ["export", out, "--no-int8"], ["predict", out, str(task.gallery), "--out", table]):
        assert call(words) == 0
    shutil.copytree(task.out, task.root / "whole")
    return task


def scores(out: Path) -> dict[str, object]:
    """The scores of each model of a run."""
    found = json.loads((out / "evaluate" / "result.json").read_text())
    return {name: one["test"] for name, one in found.items() if isinstance(one, dict) and "test" in one}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=12)
@given(
    which=some.integers(min_value=0),
    kind=some.sampled_from(DAMAGE),
    at=some.integers(min_value=0, max_value=1 << 24),
    value=some.integers(min_value=1, max_value=255),
    command=some.sampled_from(["evaluate", "predict", "report", "predict"]),
)
def test_any_damage_is_said_or_harmless(tutelage, finished, which, kind, at, value, command):
    """Whatever happens to one file, the next command ends with one error, or with the scores and predictions of an undamaged run."""
    shutil.rmtree(finished.out)
    shutil.copytree(finished.root / "whole", finished.out)
    table, again = finished.root / "predictions.csv", finished.root / "again.csv"
    files = sorted(path for path in finished.out.rglob("*") if path.is_file() and path.name != ".lock")
    spoil(files[which % len(files)], kind, at, value)
    more = [str(finished.gallery), "--out", str(again)] if command == "predict" else []
    cache = ["--cache", str(finished.out.parent / "cache")] if command == "evaluate" else []
    done = tutelage(command, str(finished.out), *more, *cache)
    if done.returncode:
        refused(done)
    elif command == "predict":
        assert again.read_text() == table.read_text()
    elif command == "evaluate":
        assert scores(finished.out) == scores(finished.root / "whole")
