"""Batches as a function of the step: seeds, the order of images, and batches made ahead in threads.

Randomness is a function of (seed, purpose, step), never of what ran before, so a run that was killed goes on as if
nothing had happened: the checkpoint holds weights and optimizer state, and no generator.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from threadpoolctl import threadpool_limits

T = TypeVar("T")


def seed_of(*parts: object) -> int:
    """A seed in [0, 2**63) for a purpose: seed_of(run_seed, "transfer", step)."""
    text = "/".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def batch_of(step: int, batch_size: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which images a step sees: the stream of reshuffled passes over the data, cut into batches.

    No image is dropped: a batch may hold the end of one pass and the beginning of the next.

    Args:
        step: from 0.
        batch_size: B, over all processes.
        count: number of images n.
        seed: of the order.

    Returns:
        positions (B,) int64 in [0, n) and the pass (epoch) of each, (B,) int64.
    """
    stream = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = stream // count
    positions = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        order = np.random.default_rng([seed, int(epoch)]).permutation(count)
        positions[here] = order[stream[here] % count]
    return positions, epochs


def prefetch(make: Callable[[int], T], steps: range, workers: int = 1, depth: int = 2) -> Iterator[tuple[int, T]]:
    """Make the batches of the coming steps in threads while the present one is used; in order.

    Args:
        make: step -> batch; called from threads, must depend on the step alone.
        steps: which.
        workers: threads.
        depth: batches made ahead per worker.
    """
    waiting: deque = deque()
    # NumPy's BLAS threads wait actively: beside a training step on 2 cores they halved the images per second
    with ThreadPoolExecutor(workers) as pool, threadpool_limits(1, user_api="blas"):
        upcoming = iter(steps)
        try:
            for step in upcoming:
                waiting.append((step, pool.submit(make, step)))
                if len(waiting) > depth * workers:
                    number, future = waiting.popleft()
                    yield number, future.result()
            while waiting:
                number, future = waiting.popleft()
                yield number, future.result()
        finally:
            for _, future in waiting:
                future.cancel()
