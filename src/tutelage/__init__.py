"""Tutelage: distil a vision foundation model into a small, fast student, with a few labelled and many unlabelled images.

Every command is also a function with the same name and arguments: `tutelage.run(target=..., gallery=[...], ...)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tutelage.errors import TutelageError
from tutelage.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable

    from tutelage.commands.adapt import adapt
    from tutelage.commands.baseline import baseline
    from tutelage.commands.benchmark import benchmark
    from tutelage.commands.cache import cache
    from tutelage.commands.committee import committee
    from tutelage.commands.compare import compare
    from tutelage.commands.curate import curate
    from tutelage.commands.demo import demo
    from tutelage.commands.demo_page import demo_page
    from tutelage.commands.distill import distill
    from tutelage.commands.doctor import doctor
    from tutelage.commands.evaluate import evaluate
    from tutelage.commands.export import export
    from tutelage.commands.finetune import finetune
    from tutelage.commands.predict import predict
    from tutelage.commands.report import report
    from tutelage.commands.run import run
    from tutelage.results import Result

__all__ = [
    "TutelageError", "__version__", "adapt", "baseline", "benchmark", "cache", "committee", "compare", "curate", "demo", "demo_page",
    "distill", "doctor", "evaluate", "export", "finetune", "predict", "report", "run",
]  # fmt: skip


def __getattr__(name: str) -> Callable[..., Result]:
    from tutelage.cli import COMMANDS, function_of

    if (command := name.replace("_", "-")) in COMMANDS:
        return function_of(command)
    raise AttributeError(f"module 'tutelage' has no attribute {name!r}")
