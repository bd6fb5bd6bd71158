"""Embedding on a Ray cluster: two local workers, one of them killed, and what cannot work is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tutelage as package
from conftest import KNOWN, MODELS, SMALL_PIECES, Task, draw, environment
from tutelage.curation import embed

pytest.importorskip("ray", reason="the optional package ray is not installed")

IMAGES = 480


def words(task: Task) -> list[str]:
    out = task.root / "ray" / "run"
    more = ("--strategy", "balanced", "--total", "60", "--engine", "ray", *KNOWN[:2], "--teacher-size", "64")
    folders = ("--out", str(out), "--cache", str(out.parent / "cache"))
    return [sys.executable, "-c", SMALL_PIECES, *task.words("curate", *more, *folders)]


def manifest(task: Task, name: str) -> bytes:
    return (task.root / name / "run" / "curate" / "manifest.parquet").read_bytes()


def workers(mark: str) -> list[int]:
    """Processes of actors under a command whose environment has this mark."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                name, variables = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
            except OSError:
                continue
            if name.startswith(b"ray::Embedder") and mark.encode() in variables:
                found.append(int(folder.name))
    return found


@pytest.fixture
def many(task) -> Task:
    """A gallery that takes some seconds."""
    for number in range(IMAGES - 24):
        draw(task.gallery / f"more-{number}.png", number % 3, 5000 + number)
    return task


@pytest.mark.slow
def test_a_killed_worker_loses_nothing(many, monkeypatch):
    """Two workers, one killed while they embed: the same manifest as without Ray, every piece there once."""
    mark = f"TUTELAGE_TEST_MARK={os.getpid()}-{time.monotonic_ns()}"
    given = environment(**dict([mark.split("=")]), RAY_OVERRIDE_RESOURCES='{"CPU": 2}', RAY_worker_niceness="0")
    process = subprocess.Popen(words(many), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=given)
    cache, deadline, at_kill = many.root / "ray" / "cache", time.monotonic() + 240, 0
    while at_kill < 2 or len(workers(mark)) < 2:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
        at_kill = len(list(cache.glob("embeddings-*/*.arrow")))
    os.kill(workers(mark)[0], signal.SIGKILL)
    _, told = process.communicate(timeout=240)
    assert process.returncode == 0, told
    assert "over 2 Ray workers" in told
    monkeypatch.setattr(embed, "PIECE_BITS", 4)
    package.curate(
        target=str(many.target), gallery=[str(many.gallery)], out=str(many.root / "local" / "run"),
        cache=str(many.root / "local" / "cache"), strategy="balanced", total=60, teacher=KNOWN[1],
        teacher_weights="scratch", teacher_size=64, student=MODELS[7], student_size=32,
    )  # fmt: skip
    assert manifest(many, "ray") == manifest(many, "local")
    pieces = {p.name: p.read_bytes() for p in (many.root / "local" / "cache").glob("embeddings-*/*.arrow")}
    assert {p.name: p.read_bytes() for p in cache.glob("embeddings-*/*.arrow")} == pieces
    assert at_kill < len(pieces) - 2, "the worker was killed after the work"


@pytest.mark.slow
def test_a_cluster_that_is_away_is_told(task, tutelage):
    """An address where no cluster listens: one error with exit code 2 and nothing else spoilt."""
    more = ("--strategy", "balanced", "--total", "30", "--engine", "ray")
    done = tutelage(*task.words("curate", *more), RAY_ADDRESS="127.0.0.1:9")
    assert done.returncode == 2, done.stderr
    assert "--engine ray: no cluster at RAY_ADDRESS=127.0.0.1:9" in done.stderr
    assert "Traceback" not in done.stderr
