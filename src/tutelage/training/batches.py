"""Batches as a function of the step: seeds, the order of images, and batches prefetched in threads.

Randomness depends only on (seed, purpose, step), never on what ran before, so a run that was killed resumes with
identical results: checkpoints hold weights and optimizer state, and need no state of a random generator.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import numpy as np
from threadpoolctl import threadpool_limits

T = TypeVar("T")


def seed_of(*parts: object) -> int:
    """Return a seed in [0, 2**63) derived from the parts: seed_of(run_seed, "order", step)."""
    text = "/".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def batch_of(step: int, batch_size: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the images of a step's batch: the data is reshuffled for each pass, and the passes in a row are cut into batches.

    No image is dropped: a batch may hold the end of one pass and the beginning of the next.

    Args:
        step: counted from 0.
        batch_size: B, over all processes.
        count: number of images n.
        seed: of the order.

    Returns:
        positions (B,) int64 in [0, n) and the pass (epoch) that each belongs to, (B,) int64.
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
    """Yield (step, batch) in order; threads prepare the batches of the next steps while the current one is used.

    Args:
        make: step -> batch; called from threads, must depend on nothing but the step.
        steps: the steps to make batches for.
        workers: number of threads.
        depth: batches prepared ahead per worker.
    """
    # NumPy's BLAS threads busy-wait: running next to a training step on 2 cores, they halved the images per second
    with ThreadPoolExecutor(workers) as pool, threadpool_limits(1, user_api="blas"):
        submitted = ((step, pool.submit(make, step)) for step in steps)
        waiting = deque(islice(submitted, depth * workers + 1))
        try:
            while waiting:
                step, future = waiting.popleft()
                yield step, future.result()
                waiting.extend(islice(submitted, 1))
        finally:
            pool.shutdown(cancel_futures=True)
