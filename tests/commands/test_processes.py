"""Several processes train the student that one would, and share the embedding of a gallery."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from forked import Forked, forked
from textures import write_textures
from tutelage.cli import call

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    write_textures(folder)
    return folder


def port() -> str:
    """A free port of this machine."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def by_torchrun(words: list[str]) -> None:
    """The command in two processes, as a user begins them."""
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port()}"]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
    command = [*start, "-m", "tutelage", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)
    assert done.returncode == 0, done.stderr


def forked_twice(words: list[str]) -> None:
    """The command in two processes with the variables that torchrun gives them."""
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port()}
    with contextlib.ExitStack() as stack:
        ranks = [
            stack.enter_context(Forked(words, {**group, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"}))
            for rank in ("0", "1")
        ]
        for one in ranks:
            one.process.join(400)
            assert one.poll() == 0, "".join(each.read("stderr") for each in ranks)


def train(
    data: Path, name: str, student: str, steps: int, *more: str, begin: Callable[[list[str]], None] | None = None
) -> Path:
    """A run in this process, or in the two that `begin` begins; returns its folder."""
    out = data / "runs" / name
    words = [
        "run", "--target", str(data / "target"), "--gallery", str(data / "gallery"), "--out", str(out),
        "--student", student, "--student-weights", "scratch",
        "--steps", str(steps), "--finetune", "keep", "--no-baseline", "--device", "cpu", *more,
    ]  # fmt: skip
    if begin:
        begin(words)
    else:
        assert call(words) == 0
    result = json.loads((out / "distill" / "result.json").read_text())
    assert result["processes"] == (2 if begin else 1)
    assert result["images_seen"] == steps * int(more[more.index("--batch-size") + 1])
    return out


def test_two_processes_agree_without_batchnorm(data):
    """Two gloo processes give a ViT student the weights that one process gives it, within float error; one of them forms the committee.

    A tracker beside them ends with the stage it follows, and leaves the processes together for those that come.
    """
    sizes = ("--teacher-size", "32", "--student-size", "32", "--batch-size", "16")
    settings = (
        *sizes,
        "--teacher",
        "test_efficientnet",
        "--teacher-weights",
        "scratch",
        "--budget",
        "2",
    )
    tracked = ("--tracker", "tensorboard") if importlib.util.find_spec("tensorboard") else ()
    runs = [
        train(data, f"vit-{n}", "test_vit", 6, *settings, *tracked, begin=begin)
        for n, begin in ((1, None), (2, by_torchrun))
    ]
    one, two = (load_file(run / "finetune" / "weights.safetensors") for run in runs)
    for run in runs:
        assert (run / "report" / "index.html").exists()
        assert json.loads((run / "committee" / "result.json").read_text())["folds"] == 2
        assert json.loads((run / "distill" / "result.json").read_text())["labelled_in_batch"] == 4
        assert not tracked or list((run / "trackers" / f"{run.name}-distill").rglob("events.out.tfevents*"))
    worst = max(float(abs(one[name] - two[name]).max()) for name in one)
    moved = max(float(abs(one[name]).max()) for name in one)
    assert 0 <= worst < 2e-4 < moved, f"the weights differ by {worst}"


def test_two_processes_agree_with_batchnorm(tmp_path):
    """With BatchNorm, two processes see equally many images and score within 1 point of one on 300 test images."""
    write_textures(tmp_path, train=16, test=100, gallery=300, size=64)
    settings = (
        "--teacher", "tf_efficientnet_lite0", "--teacher-size", "64", "--student-size", "64", "--batch-size", "64",
        "--lr", "4e-3", "--committee", "none",
    )  # fmt: skip
    scores = []
    for processes, begin in ((1, None), (2, forked_twice)):
        out = train(tmp_path, f"cnn-{processes}", "test_resnet", 80, *settings, begin=begin)
        scores.append(json.loads((out / "report" / "results.json").read_text())["distilled"]["test"]["accuracy"])
    assert abs(scores[0] - scores[1]) <= 0.01 + 1e-9, scores
    assert min(scores) > 0.9, "far above the chance of 1 in 3, or the comparison means nothing"


def test_a_job_array(data, tmp_path, tutelage):
    """Tasks of a job array embed their shares by themselves, wait for no other, each tells what it did, and one search uses them all."""
    for number in range(2):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for path in sorted((data / "gallery").iterdir())[number * 20 : number * 20 + 20]:
                tar.add(path, path.name)
    words = (
        "curate", "--target", str(data / "target"), "--gallery", str(tmp_path / "0.tar"), str(tmp_path / "1.tar"),
        "--out", str(tmp_path / "run"), "--teacher", "tf_efficientnet_lite0", "--teacher-size", "32",
        "--student", "mobilenetv3_small_050", "--student-size", "32",
    )  # fmt: skip
    nobody = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9", "LOCAL_RANK": "0"}  # of a group that is not there
    for rank, more in (("1", {}), ("0", nobody)):
        done = forked([*words, "--shard", "env"], {"WORLD_SIZE": "2", "RANK": rank, **more})
        assert done.returncode == 0, done.stderr
        assert f"share {rank} of 2: 20 of 40 images, 20 of them embedded now" in done.stderr
        assert f"shard: {rank}/2\nimages: 20\nembedded: 20\n" in done.stdout
        assert not (tmp_path / "run").exists()
    assert len(list((tmp_path / "cache").glob("embeddings-*/*.arrow"))) == 2
    done = tutelage(*words)
    assert done.returncode == 0, done.stderr
    assert "of 40 gallery images" in done.stderr
    assert len(list((tmp_path / "cache").glob("embeddings-*/*.arrow"))) == 2
