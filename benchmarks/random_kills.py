"""Kill a small run with SIGKILL at ten random moments, continue it, and compare: python benchmarks/random_kills.py

A moment is a random share of a random stage's time, as a run that is never stopped takes it; each stage gets one at least.
Prints where each kill landed and whether the student's weights are those of the run that was never stopped, bit for bit.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from test_resume import STAGES, command, digests, finish, under_way
from textures import write_textures


def timeline(words: list[str], out: Path) -> tuple[float, dict[str, float]]:
    """Run the command to its end; seconds until the first stage begins, and of each stage."""
    begun, end, start = {}, 0.0, time.monotonic()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        for name in STAGES:
            if name not in begun and under_way(out, name)():
                begun[name] = time.monotonic()
        end = end if (out / STAGES[-1] / "result.json").exists() else time.monotonic()
        time.sleep(0.01)
    assert process.returncode == 0, f"exit {process.returncode}"
    assert len(begun) == len(STAGES), f"only {list(begun)} were seen"
    ends = [*list(begun.values())[1:], end]
    return begun[STAGES[0]] - start, {name: last - at for (name, at), last in zip(begun.items(), ends, strict=True)}


def kill_in(words: list[str], out: Path, stage: str, wait: float) -> str:
    """Start the command, and kill it `wait` seconds after it came to a stage; where the kill landed."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not under_way(out, stage)():
        time.sleep(0.01)
    try:
        process.wait(wait)
        return "the run had ended"
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return next((name for name in STAGES if not (out / name / "result.json").exists()), "after the end")


def main(kills: int = 10, seed: int = 0) -> int:
    """Returns 0 when the weights agree."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        write_textures(data)
        startup, seconds = timeline(command(data, data / "whole" / "run"), data / "whole" / "run")
        print(f"never stopped: {startup + sum(seconds.values()):.1f} s; {seconds}")
        out = data / "killed" / "run"
        more = draw.choices(
            STAGES[:-1], k=kills - len(STAGES)
        )  # a second one in the last stage would come after the end
        stages = sorted([*STAGES, *more], key=STAGES.index)
        for number, stage in enumerate(stages):
            wait = draw.uniform(0, 0.8 * seconds[stage])
            if under_way(out, stage)():  # killed here before: the way to the stage is to be waited for, too
                wait += startup
            place = kill_in(command(data, out), out, stage, wait)
            print(f"kill {number + 1}: {wait:.2f} s into {stage}, landed in {place}", flush=True)
        finish(command(data, out))
        same = digests(out) == digests(data / "whole" / "run")
        print("the same weights, bit for bit" if same else "OTHER WEIGHTS")
        return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
