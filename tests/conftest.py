"""What tests of the command share: a tiny task, models that train in seconds, and the command in a process of its own."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported, as the command does
os.environ |= {"HF_ENDPOINT": "http://127.0.0.1:9", "COLUMNS": "120"}  # no hub
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores

# The same examples in every run of the suite; `--hypothesis-profile random` draws others, ten times as many.
settings.register_profile("suite", max_examples=40, derandomize=True, deadline=None, database=None)
settings.register_profile("random", max_examples=400, deadline=None)
settings.load_profile("suite")

# Real images. Tests that want them are skipped where they are not.
DATA = Path(os.environ.get("TUTELAGE_TEST_DATA") or "no-test-data")

# The smallest networks that timm has: a run of them takes a third of the time of a real encoder.
MODELS = (
    *("--teacher", "test_efficientnet", "--teacher-weights", "scratch", "--teacher-size", "32"),
    *("--student", "test_resnet", "--student-weights", "scratch", "--student-size", "32"),
)
# Models that the command knows by name, without timm.
KNOWN = ("--teacher", "efficientnet-lite0", "--student", "mobilenetv3-s-050")
SHORT = (
    *("--committee", "none", "--steps", "2", "--batch-size", "8"),
    "--no-baseline",
    "--finetune",
    "keep",
)


def draw(path: Path, label: int, number: int, size: int = 48) -> None:
    """One image of a class: waves as close as the label says, with noise and blobs of its own."""
    random = np.random.default_rng([label, number])
    waves = 128 + 60 * np.sin(np.arange(size) * (0.2 + 0.25 * label))
    pixels = waves[None, :, None] + random.normal(0, 25, (size, size, 3)) + random.integers(-20, 20, 3)
    y, x = np.mgrid[0:size, 0:size] / size
    for _ in range(4):  # or images of one class would count as copies of each other
        cx, cy, radius = *random.uniform(0.1, 0.9, 2), random.uniform(0.1, 0.2)
        pixels = np.where(((x - cx) ** 2 + (y - cy) ** 2 < radius**2)[..., None], random.uniform(0, 255, 3), pixels)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path)


# The command with pieces of 16 images on the mean instead of 2,048, for galleries of a few hundred.
SMALL_PIECES = (
    "import sys; from tutelage.curation import embed; embed.PIECE_BITS = 4; from tutelage.cli import main; main()"
)

# Files that take long, the longest first: what is begun last should be short, or one worker waits for the other.
LONG = (
    "test_run", "test_curate", "test_export", "test_processes", "test_bad_input", "test_resume", "test_docs", "test_run_segmentation",
    "test_ray_backend", "test_models", "test_compare", "test_cli", "test_committee", "test_page",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; the order within a file stays."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@dataclass(frozen=True)
class Task:
    """A target set of 3 classes (6 train and 4 test images each) and a gallery of 24 images, all in `root`."""

    root: Path

    @property
    def target(self) -> Path:
        return self.root / "target"

    @property
    def gallery(self) -> Path:
        return self.root / "gallery"

    @property
    def out(self) -> Path:
        return self.root / "runs" / "first"

    def words(self, command: str = "run", *more: str) -> list[str]:
        """The words of `run` or `curate` on this task with tiny models."""
        data = ["--target", str(self.target), "--gallery", str(self.gallery), "--out", str(self.out)]
        models = [*MODELS[:8], *MODELS[10:]] if command == "curate" else [*MODELS, *SHORT]
        given = set(more)
        kept = []
        for word in [*data, *models]:  # what `more` says anew is left out
            if word.startswith("--"):
                flag = word
            if flag not in given:
                kept.append(word)
        return [command, *kept, *more]

    def files(self) -> list[str]:
        """What lies in the run folder, the clocks of stages under way and the lock left out."""
        paths = (p.relative_to(self.out).as_posix() for p in self.out.rglob("*") if p.is_file())
        return sorted(p for p in paths if not p.endswith("seconds.json") and p != ".lock")


def make_task(root: Path) -> Task:
    """Draw the tiny task."""
    task, number = Task(root), 0
    for split, count in (("train", 6), ("test", 4)):
        for label in range(3):
            for i in range(count):
                draw(task.target / split / f"c{label}" / f"{i}.png", label, number := number + 1)
    for i in range(24):
        draw(task.gallery / f"{i}.png", i % 3, number := number + 1)
    return task


@pytest.fixture(scope="session")
def drawn(tmp_path_factory) -> Task:
    """The tiny task, drawn once; to be read only."""
    return make_task(tmp_path_factory.mktemp("drawn"))


@pytest.fixture
def task(drawn, tmp_path) -> Task:
    """A copy of the tiny task that a test may spoil."""
    return Task(Path(shutil.copytree(drawn.root, tmp_path / "task")))


def environment(**more: str) -> dict[str, str]:
    """Variables for the command: no hub."""
    return {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "COLUMNS": "120", **more}


def seconds_without_torch(*words: str) -> float:
    """Seconds that a command takes from nothing, in a process of its own that must load neither torch nor timm."""
    code = (
        "import sys, time; start = time.monotonic(); from tutelage.cli import call; "
        f"assert call({list(words)!r}) == 0; "
        "assert not {'torch', 'timm'} & set(sys.modules); print(time.monotonic() - start)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1])


@pytest.fixture(scope="session")
def tutelage() -> Callable[..., subprocess.CompletedProcess[str]]:
    """tutelage(*words): the command; the hub refuses connections.

    In this process, which has imported what takes 5 seconds; with Python's options or variables of its own in one of its own.
    """

    def call(
        *words: str, options: tuple[str, ...] = (), own: bool = False, **more: str
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *options, "-m", "tutelage", *words]
        if options or own or more:
            return subprocess.run(
                command, env=environment(**more), capture_output=True, text=True, timeout=300, check=False
            )
        from tutelage.cli import call as here

        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = here(list(words))
            except Exception:  # as Python does at the top of a process
                traceback.print_exc()
                code = 1
        return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())

    return call


BEGUN = ["settings.toml"]  # a run folder in which no stage has finished


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The message of a command that must have refused."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") or "\nerror: " in done.stderr
    return done.stderr


def rejected(task: Task) -> dict[str, str]:
    """What rejected.csv says: the reason of each image."""
    with (task.out / "rejected.csv").open(newline="", encoding="utf-8") as file:
        return {row["image"]: row["reason"] for row in csv.DictReader(file)}


TINY_CLIP = "tutelage-tiny"


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """open_clip knows a tiny model while these tests run: 16 features, images of 32 pixels."""
    open_clip = pytest.importorskip("open_clip", reason="the optional package open_clip_torch is not installed")
    from open_clip import factory

    path = tmp_path_factory.mktemp("clip") / f"{TINY_CLIP}.json"
    path.write_text(json.dumps({
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }))  # fmt: skip
    open_clip.add_model_config(path)
    yield
    factory._MODEL_CONFIG_PATHS.remove(path)
    del factory._MODEL_CONFIGS[TINY_CLIP]
