"""The command in a process of its own that need not import torch, timm and scikit-learn anew, which takes ten seconds.

A server that has imported them forks a process for each command: with its own memory, files, process id and death, like one
that `python -m tutelage` begins. Tests of what happens before and while these are imported begin one of those.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([
    "torch", "timm", "accelerate", "faiss", "sklearn.linear_model", "scipy.optimize", "tutelage.cli",
    *(f"tutelage.commands.{name}" for name in ("adapt", "committee", "compare", "curate", "distill", "run", "evaluate", "finetune")),
])  # fmt: skip


class Forked:
    """A command under way. What it says goes to files in a folder, which a process that is killed leaves as they are."""

    def __init__(self, words: Sequence[str], variables: Mapping[str, str] | None = None, piece_bits: int = 0) -> None:
        self.said = tempfile.TemporaryDirectory()
        given = (list(words), self.said.name, dict(variables or {}), piece_bits)
        self.process: BaseProcess = CONTEXT.Process(target=_command, args=given)
        self.process.start()
        self.pid = self.process.pid or 0

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return self.process.exitcode

    def read(self, name: str) -> str:
        """What it has said until now. name: stdout or stderr."""
        path = Path(self.said.name, name)
        return path.read_text() if path.exists() else ""

    def kill(self) -> None:
        """SIGKILL, and wait until it is dead."""
        self.process.kill()
        self.process.join()

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.said.cleanup()


def forked(
    words: Sequence[str], variables: Mapping[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """The command from its begin to its end."""
    with Forked(words, variables) as process:
        process.process.join(timeout)
        if process.poll() is None:
            raise subprocess.TimeoutExpired(list(words), timeout, process.read("stdout"), process.read("stderr"))
        return subprocess.CompletedProcess(
            list(words), process.poll() or 0, process.read("stdout"), process.read("stderr")
        )


def _command(words: list[str], said: str, variables: dict[str, str], piece_bits: int) -> None:
    """What the new process does. It leads a session of its own."""
    os.setsid()
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{said}/{name}", os.O_WRONLY | os.O_CREAT, 0o600), number)
    os.environ.update(variables)
    sys.argv = ["tutelage", *words]
    if piece_bits:
        from tutelage.curation import embed

        embed.PIECE_BITS = piece_bits
    from tutelage.cli import main

    main()
