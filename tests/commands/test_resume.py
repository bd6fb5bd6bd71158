"""A run that is killed and continued ends as if it had never been stopped."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from forked import Forked, forked
from textures import write_textures

pytestmark = pytest.mark.slow

STAGES = ("curate", "adapt", "committee", "distill", "baseline", "finetune", "evaluate")
FOLDS = 5
MEMBERS = ("committee/students.npy", *(f"committee/fold-{number}.safetensors" for number in range(FOLDS)))
WEIGHTS = (*MEMBERS, "distill/weights.safetensors", "baseline/weights.safetensors", "finetune/weights.safetensors")


def command(data: Path, out: Path) -> list[str]:
    """A small run with real ImageNet weights in the teacher."""
    return [
        "run", "--target", str(data / "target"), "--gallery", str(data / "gallery"),
        "--out", str(out), "--cache", str(out.parent / "cache"), "--teacher", "tf_efficientnet_lite0", "--teacher-size", "32",
        "--student", "test_resnet", "--student-weights", "scratch", "--student-size", "32",
        "--steps", "48", "--batch-size", "16",
        "--finetune", "full", "--dedup", "none", "--json",
    ]  # fmt: skip


def digests(out: Path) -> dict[str, str]:
    return {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in WEIGHTS}


def kill_when(words: list[str], moment: Callable[[], bool], near: Callable[[], bool]) -> None:
    """Start the command and SIGKILL it while `moment` holds: it is stopped first, so that the moment cannot pass.

    While `near` holds, the moment may be short, and is looked for without a pause.
    """
    deadline = time.monotonic() + 240
    with Forked(words) as process:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise AssertionError(f"the run ended before the moment came: {process.read('stderr')}")
            if moment():
                os.kill(process.pid, signal.SIGSTOP)
                if moment():
                    process.kill()
                    return
                os.kill(process.pid, signal.SIGCONT)
            if not near():
                time.sleep(0.005)
    raise AssertionError("the moment never came")


def under_way(out: Path, stage: str) -> Callable[[], bool]:
    """Whether a stage has its inputs and no result yet."""
    before = STAGES[: STAGES.index(stage)]

    def holds() -> bool:
        ready = all((out / name / "result.json").exists() for name in before)
        return out.exists() and ready and not (out / stage / "result.json").exists()

    return holds


def writing_checkpoint(out: Path) -> Callable[[], bool]:
    """Whether the student's loop has written a checkpoint, and a later one by half."""
    return lambda: after_checkpoint(out, "distill")() and any((out / "checkpoints").glob(".tutelage-partial-*"))


def after_checkpoint(out: Path, loop: str) -> Callable[[], bool]:
    """Whether a loop has written a checkpoint and goes on. loop: its stage, or a student of the committee."""
    stage = loop.partition("-")[0]
    return lambda: under_way(out, stage)() and any((out / "checkpoints").glob(f"{loop}-*.safetensors"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """A run that is never stopped, with a cache of its own, by the command as a user gives it."""
    folder = tmp_path_factory.mktemp("reference")
    write_textures(folder)
    words = command(folder, folder / "runs" / "whole")
    variables = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [sys.executable, "-m", "tutelage", *words], capture_output=True, text=True, timeout=300, env=variables
    )
    assert done.returncode == 0, done.stderr
    return folder, digests(folder / "runs" / "whole")


def test_killed_in_every_stage(reference, tmp_path):
    """A run killed in every stage, inside a checkpoint's write too, ends with the same weights, bit for bit; the committee's students
    that were finished before are not trained again."""
    data, expected = reference
    out = tmp_path / "runs" / "killed"
    words = command(data, out)
    moments = [
        ("curate", under_way(out, "curate")),
        ("adapt", under_way(out, "adapt")),
        ("committee", after_checkpoint(out, "committee-2")),
        ("distill", writing_checkpoint(out)),
        ("baseline", after_checkpoint(out, "baseline")),
        ("finetune", under_way(out, "finetune")),
        ("evaluate", under_way(out, "evaluate")),
    ]
    for stage, moment in moments:
        kill_when(words, moment, after_checkpoint(out, "distill") if stage == "distill" else lambda: False)
        assert under_way(out, stage)(), f"the kill was to land in {stage}"
        if stage == "committee":
            assert [number for number in range(FOLDS) if (out / "committee" / f"fold-{number}.npz").exists()] == [0, 1]
            finished = [(out / MEMBERS[1 + number]).stat().st_mtime_ns for number in (0, 1)]
        if stage == "distill":
            assert writing_checkpoint(out)(), "the kill was to land inside a checkpoint's write"
            assert finished == [(out / MEMBERS[1 + number]).stat().st_mtime_ns for number in (0, 1)]
    done = forked(words)
    assert done.returncode == 0, done.stderr
    assert digests(out) == expected
    assert not list(out.rglob(".tutelage-partial-*")), "half-written files are cleared away"


def test_files_of_a_run(reference):
    """A finished run leaves exactly these files."""
    data, _ = reference
    out = data / "runs" / "whole"
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert files == sorted([
        ".lock", "settings.toml", "target_set/manifest.parquet", "curate/manifest.parquet", "curate/montage.jpg",
        "curate/result.json", "curate/split_copies.csv",  # drawn textures look alike
        "adapt/head.safetensors", "adapt/validation.npz", "adapt/result.json", "committee/result.json", *MEMBERS,
        "distill/metrics.jsonl", "distill/weights.safetensors", "distill/result.json", "finetune/metrics.jsonl",
        "finetune/weights.safetensors",
        "finetune/result.json", "baseline/metrics.jsonl", "baseline/weights.safetensors", "baseline/result.json",
        "evaluate/result.json", "report/results.json", "report/results.csv", "report/index.html", "evaluate/predictions.npz",
        "evaluate/disagreements.json",
    ])  # fmt: skip


def test_finished_run_is_reused(reference):
    """A finished run given again computes nothing and names what it reused."""
    data, expected = reference
    out = data / "runs" / "whole"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("weights.safetensors")}
    done = forked(command(data, out))
    assert json.loads(done.stdout)["reused"] == list(STAGES)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("weights.safetensors")} == before
    assert digests(out) == expected
