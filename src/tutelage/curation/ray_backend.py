"""Embedding spread over a Ray cluster: an actor for each GPU, or for each core where there is none.

Ray restarts an actor that dies and gives its piece to it again; a piece is whole in the cache or not there, so nothing
is lost and nothing counted twice. Gallery, cache and weights must be under the same paths on all machines.
"""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Callable
from pathlib import Path

from tutelage.curation.embed import EmbeddingCache, Piece
from tutelage.errors import TutelageError
from tutelage.progress import say

RETRIES = 5  # of an actor, and of a piece


class Embedder:
    """One worker. cache: makes where vectors are kept, encoder and all. folder: its name where the work is asked for. threads:
    torch's, as many as the one who asks has, so that all give the same bits.
    """

    def __init__(self, cache: Callable[[], EmbeddingCache], folder: str, threads: int):
        from tutelage.device import prepare_process

        prepare_process()
        import torch

        torch.set_num_threads(threads)
        self.cache, self.wanted = cache(), folder

    def embed(self, piece: Piece) -> int:
        """Embed one piece that is not there yet; its images.

        Raises:
            TutelageError: a machine with another precision or other weights, or without the gallery.
        """
        if self.cache.folder.name != self.wanted:
            raise TutelageError(
                f"--engine ray: weights, size or precision of a worker on {platform.node()} differ: {self.cache.source.about}",
                "use the same ones on all machines, and --precision fp32 or bf16, not auto",
            )
        if not any(Path(place).exists() for place in {ref.container for ref in piece.refs}):
            raise TutelageError(
                f"--engine ray: {piece.refs[0].container} does not exist on {platform.node()}",
                "mount the gallery under the same paths on all machines",
            )
        if not self.cache.has(piece):
            self.cache.embed(piece)
        return len(piece.refs)


def embed_on_ray(
    cache: Callable[[], EmbeddingCache], folder: str, pieces: list[Piece], on_gpus: bool, advance: Callable[[int], None]
) -> None:
    """Embed pieces on the cluster of RAY_ADDRESS, or on a local one.

    Args:
        cache: called in each worker. folder: name of its folder here. on_gpus: whether GPUs may be used.
        advance: called with the images of each piece that is done.

    Raises:
        TutelageError: workers that die again and again; what a worker raises.
    """
    import ray
    import torch
    from ray.exceptions import ActorDiedError, RayTaskError
    from ray.util import ActorPool

    started = not ray.is_initialized()
    if started:  # preflight has seen that RAY_ADDRESS answers
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
        say(f"{len(pieces):,} pieces of the gallery over {count} Ray workers, one for each {kind}")
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
