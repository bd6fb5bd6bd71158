"""Kill a small run with SIGKILL at ten random moments, continue it, and compare: python benchmarks/random_kills.py

Prints where each kill landed and whether the student's weights are those of a run that was never stopped, bit for bit.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from test_resume import STAGES, command, digests, finish
from textures import write_textures


def main(kills: int = 10, seed: int = 0) -> int:
    """Returns 0 when the weights agree."""
    moments = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        write_textures(data)
        start = time.monotonic()
        finish(command(data, data / "whole" / "run"))
        seconds = time.monotonic() - start
        print(f"never stopped: {seconds:.1f} s")
        out = data / "killed" / "run"
        for number in range(kills):
            wait = moments.uniform(
                seconds / 4, seconds / 2
            )  # less than the way to the next stage leaves all kills in one
            process = subprocess.Popen(command(data, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                process.wait(wait)
                print(f"kill {number + 1}: the run had ended")
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            stage = next((name for name in STAGES if not (out / name / "result.json").exists()), "after the end")
            print(f"kill {number + 1}: after {wait:.1f} s, in {stage}", flush=True)
        finish(command(data, out))
        same = digests(out) == digests(data / "whole" / "run")
        print("the same weights, bit for bit" if same else "OTHER WEIGHTS")
        return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
