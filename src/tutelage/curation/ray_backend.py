"""Embedding on a Ray cluster: one actor for each GPU, or for each core if there is no GPU.

Ray restarts an actor that dies and gives it its piece again; a piece is either complete in the cache or absent, so nothing
is lost or counted twice. Gallery, cache and weights must have the same paths on all machines.
"""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Callable
from pathlib import Path

from tutelage.curation.embed import EmbeddingCache, Piece
from tutelage.errors import TutelageError
from tutelage.progress import Advance, logger

RETRIES = 5  # restarts of an actor, and retries of a piece


class Embedder:
    """One worker. cache: builds the embedding cache with its encoder. folder: the cache folder's name on the calling machine.
    threads: number of torch's threads, the same as the caller's, so that all workers compute the same bits.
    """

    def __init__(self, cache: Callable[[], EmbeddingCache], folder: str, threads: int):
        from tutelage.device import prepare_process

        prepare_process()
        import torch

        torch.set_num_threads(threads)
        self.cache, self.wanted = cache(), folder

    def embed(self, piece: Piece) -> int:
        """Embed one piece unless the cache has it; return its number of images.

        Raises:
            TutelageError: this machine has another precision or other weights, or lacks the gallery.
        """
        if self.cache.folder.name != self.wanted:
            raise TutelageError(
                f"--engine ray: weights, size or precision of a worker on {platform.node()} differ: {self.cache.source.about}",
                "use the same ones on all machines, and --precision fp32 or bf16, not auto",
            )
        if not any(Path(place).exists() for place in {ref.container for ref in piece.refs}):
            message = f"--engine ray: {piece.refs[0].container} does not exist on {platform.node()}"
            raise TutelageError(message, "mount the gallery under the same paths on all machines")
        if not self.cache.has(piece):
            self.cache.embed(piece)
        return len(piece.refs)


def embed_on_ray(
    cache: Callable[[], EmbeddingCache], folder: str, pieces: list[Piece], on_gpus: bool, advance: Advance
) -> None:
    """Embed pieces on the cluster of RAY_ADDRESS, or on a local one.

    Args:
        cache: called in each worker. folder: name of the cache's folder here. on_gpus: whether GPUs may be used.
        advance: called with the number of images of each finished piece.

    Raises:
        TutelageError: a worker dies again and again, or raises an error.
    """
    import ray
    import torch
    from ray.exceptions import ActorDiedError, RayTaskError
    from ray.util import ActorPool

    started = not ray.is_initialized()
    if started:  # preflight has checked that RAY_ADDRESS answers
        ray.init(
            address=os.environ.get("RAY_ADDRESS"),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    try:
        has = ray.cluster_resources()
        kind = "GPU" if has.get("GPU") and on_gpus else "CPU"
        count = max(1, min(int(has.get(kind, 1)), len(pieces)))
        logger.info(
            f"embedding {len(pieces):,} pieces of the gallery, spread over {count} Ray workers, one for each {kind}"
        )
        gpus, cpus = (1, 0) if kind == "GPU" else (0, 1)
        worker = ray.remote(max_restarts=RETRIES, max_task_retries=RETRIES, num_gpus=gpus, num_cpus=cpus)(Embedder)
        pool = ActorPool([worker.remote(cache, folder, torch.get_num_threads()) for _ in range(count)])  # type: ignore[attr-defined]
        for done in pool.map_unordered(lambda actor, piece: actor.embed.remote(piece), pieces):
            advance(int(done))  # type: ignore[call-overload]
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, TutelageError) else error) from None
    except ActorDiedError as error:
        why = str(error).strip().splitlines()[-1]
        raise TutelageError(
            f"--engine ray: a worker died: {why}",
            "give workers enough memory for the encoder, and the same paths, then run the same command again to resume; "
            "--engine local shows what stops a worker",
        ) from error
    finally:
        if started:
            ray.shutdown()
