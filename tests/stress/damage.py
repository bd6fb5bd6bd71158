"""Random damage, kills and folder trees, for as long as one likes: python tests/stress/damage.py [--minutes 30] [--seed 0]

Each trial has a seed of its own, which is printed where it fails and with which it is repeated (`--seed N --trials 1`). A command must end
with code 0 and the result of an undamaged run, or with code 2 and one error without a traceback; the user's own files stay as they were.
Not part of the suite.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import io
import json
import os
import shutil
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import Task, draw, make_task
from forked import Forked, forked
from spoil import DAMAGE
from spoil import spoil as spoil_one

RUN = ("--val", "0.34", "--batch-size", "16", "--finetune", "auto")
STUDENT = ("--student", "mobilenetv3_small_050")  # one whose int8 file holds its decisions


def hashes(*folders: Path) -> dict[str, str]:
    """SHA-256 of each file below these folders."""
    paths = (path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def scores_of(out: Path) -> object:
    """The scores of the models of a run, which an undamaged run repeats to the digit."""
    found = json.loads((out / "evaluate" / "result.json").read_text())
    models = ("teacher", "committee", "distilled", "baseline", "delivered")
    return {name: found[name]["test"] for name in models if name in found}


def spoil(path: Path, chance: np.random.Generator, others: list[Path]) -> str:
    """Damage one file; return how."""
    kind = str(chance.choice([*DAMAGE, "other"]))
    if kind == "other":
        path.write_bytes(others[int(chance.integers(len(others)))].read_bytes())
        return kind
    for _ in range(int(chance.integers(1, 9)) if kind == "flip" else 1):
        spoil_one(path, kind, int(chance.integers(1 << 24)), int(chance.integers(1, 256)))
    return kind


class Stress:
    """A finished, exported run, of which every trial takes a copy."""

    def __init__(self, folder: Path):
        self.folder, self.counts = folder, collections.Counter[str]()
        self.task = make_task(folder / "whole")
        for words in (self.words(self.task), ["export", str(self.task.out), "--cache", str(self.cache(self.task))]):
            done = forked(words)
            assert done.returncode == 0, done.stderr
        self.scores, self.predicted = scores_of(self.task.out), self.predictions(self.task)
        self.weights = (self.task.out / "finetune" / "weights.safetensors").read_bytes()

    @staticmethod
    def cache(task: Task) -> Path:
        return task.out.parent / "cache"

    @staticmethod
    def words(task: Task) -> list[str]:
        return task.words("run", *RUN, *STUDENT, "--steps", "6")

    def predictions(self, task: Task) -> str:
        """What the export says of the gallery."""
        out = task.root / "predictions.csv"
        done = forked(["predict", str(task.out), str(task.gallery), "--out", str(out)])
        assert done.returncode == 0, done.stderr
        return self.named(out)

    @staticmethod
    def named(out: Path) -> str:
        return "\n".join(line.rpartition("/")[2] for line in out.read_text().splitlines()[1:])

    def copy(self, place: Path) -> Task:
        """A copy of the run under the very path that its cache knows, the whole one being set aside."""
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.task.root, place, symlinks=True)
        return Task(place)

    def judged(self, what: str, words: list[str], task: Task, before: dict[str, str]) -> int:
        """Run a command; raise AssertionError unless it ends as it should. Returns its exit code."""
        done = forked(words, timeout=300)
        told = f"{what}: {' '.join(words)}\n{done.stderr[-3000:]}"
        assert done.returncode in (0, 2), told
        assert "Traceback" not in done.stderr, told
        if done.returncode == 2:
            assert any(line.startswith("error: ") for line in done.stderr.splitlines()), told
        assert hashes(task.target, task.gallery) == before, f"the user's files have changed: {told}"
        self.counts[f"{words[0]}: exit {done.returncode}"] += 1
        return done.returncode

    def damage(self, chance: np.random.Generator) -> None:
        """One file of the run, the cache or the export is damaged, then a command runs."""
        task = self.copy(self.folder / "copy")
        before, files = hashes(task.target, task.gallery), [p for p in task.out.parent.rglob("*") if p.is_file()]
        path = files[int(chance.integers(len(files)))]
        what = f"{path.relative_to(task.root)} {spoil(path, chance, files)}"
        command = str(chance.choice(["run", "run", "evaluate", "export", "predict", "report", "distill", "cache"]))
        out = task.root / "predictions.csv"
        words = {
            "run": self.words(task), "evaluate": ["evaluate", str(task.out), "--cache", str(self.cache(task))],
            "export": ["export", str(task.out), "--cache", str(self.cache(task)), "--no-int8"], "report": ["report", str(task.out)],
            "predict": ["predict", str(task.out), str(task.gallery), "--out", str(out)],
            "cache": ["cache", "--cache", str(self.cache(task))],
            "distill": ["distill", "--out", str(task.out)],
        }[command]  # fmt: skip
        code = self.judged(what, words, task, before)
        if code == 0 and command in ("run", "evaluate"):
            assert scores_of(task.out) == self.scores, f"other scores after {what}: {' '.join(words)}"
        if code == 0 and command == "predict":
            assert self.named(out) == self.predicted, f"other predictions after {what}"

    def kill(self, chance: np.random.Generator) -> None:
        """A run is killed once or several times, and ends with the weights of one that never was."""
        shutil.rmtree(self.folder / "killed", ignore_errors=True)  # of a trial that failed
        task = make_task(self.folder / "killed")
        before = hashes(task.target, task.gallery)
        for _ in range(int(chance.integers(1, 4))):
            with Forked(self.words(task)) as process:
                process.process.join(float(chance.uniform(0.1, 8)))
        assert self.judged("killed", self.words(task), task, before) == 0, "a killed run does not go on"
        weights = (task.out / "finetune" / "weights.safetensors").read_bytes()
        assert weights == self.weights, "other weights after a kill"
        shutil.rmtree(task.root)

    def tree(self, chance: np.random.Generator) -> None:
        """A random tree as the target set."""
        shutil.rmtree(self.folder / "tree", ignore_errors=True)
        task = make_task(self.folder / "tree")
        shutil.rmtree(task.target)
        names = (
            "cat",
            "dog",
            "train",
            "test",
            "val",
            "images",
            "masks",
            "a b",
            "Train",
            "2",
            "10",
            ".hidden",
            "é",
            "x" * 100,
        )
        place = [task.target]
        task.target.mkdir()
        for number in range(int(chance.integers(4, 40))):
            folder = place[int(chance.integers(len(place)))]
            kind = str(
                chance.choice(
                    ["folder", "folder", "image", "image", "image", "image", "link", "tar", "csv", "odd", "empty"]
                )
            )
            name = str(chance.choice(names))
            path = (
                folder / name
                if kind in ("folder", "empty")
                else folder / f"{number}.{chance.choice(['png', 'jpg', 'PNG', 'tar', 'csv', 'txt'])}"
            )
            if path.exists() or path.is_symlink():
                continue
            if kind in ("folder", "empty"):
                path.mkdir()
                place += [path] if kind == "folder" else []
            elif kind == "image":
                draw(path.with_suffix(".png"), number % 3, number)
            elif kind == "link":
                path.symlink_to(str(chance.choice([str(task.target), "nothing", str(task.gallery)])))
            elif kind == "tar":
                data = next(task.gallery.iterdir()).read_bytes()
                with tarfile.open(path.with_suffix(".tar"), "w") as tar:
                    for i in range(int(chance.integers(0, 6))):
                        info = tarfile.TarInfo(f"{i}.png")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
            elif kind == "csv":
                rows = "\n".join(f"{chance.choice(names)}/{i}.png,{chance.choice(names)}" for i in range(5))
                path.with_suffix(".csv").write_text(f"path,label\n{rows}\n")
            else:
                path.write_bytes(chance.bytes(60))
        before = hashes(task.target, task.gallery)
        self.judged("a tree", task.words("curate", "--strategy", "random", "--total", "40"), task, before)
        shutil.rmtree(task.root)


def main() -> int:
    """Run trials until the time is over or one fails; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the first trial")
    parser.add_argument("--trials", type=int, default=10**9)
    given = parser.parse_args()
    os.environ |= {"HF_ENDPOINT": "http://127.0.0.1:9"}
    begin, failed = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        stress, seed = Stress(Path(folder)), given.seed
        while seed < given.seed + given.trials and time.monotonic() - begin < 60 * given.minutes:
            chance = np.random.default_rng(seed)
            trial = str(chance.choice(["damage"] * 6 + ["kill", "tree", "tree"]))
            try:
                getattr(stress, trial)(chance)
            except AssertionError as error:
                failed.append(seed)
                print(f"seed {seed}, {trial}: {error}", flush=True)
            seed += 1
        print(
            f"{seed - given.seed} trials in {(time.monotonic() - begin) / 60:.0f} min, seeds {given.seed} to {seed - 1}"
        )
        print(", ".join(f"{name}: {count}" for name, count in sorted(stress.counts.items())))
        print(f"failed: {failed or 'none'}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
