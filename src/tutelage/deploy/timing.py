"""Time forward passes of several programs in turn, so that a busy machine slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

WARM_UP = 5
LEAST, MOST = 20, 300  # rounds
SECONDS = 2.0  # after which a comparison ends, once it has had LEAST rounds


def in_turn(programs: Mapping[str, Callable[[], object]]) -> dict[str, dict[str, float]]:
    """Time programs by calling each once per round.

    Returns:
        name -> median_ms and p95_ms of one call, and rounds.
    """
    for program in programs.values():
        for _ in range(WARM_UP):
            program()
    times: dict[str, list[float]] = {name: [] for name in programs}
    started, rounds = time.perf_counter(), 0
    while rounds < LEAST or (rounds < MOST and time.perf_counter() - started < SECONDS):
        for name, program in programs.items():
            start = time.perf_counter()
            program()
            times[name].append(1000 * (time.perf_counter() - start))
        rounds += 1
    return {
        name: {"median_ms": statistics.median(one), "p95_ms": statistics.quantiles(one, n=20)[-1], "rounds": rounds}
        for name, one in times.items()
    }
