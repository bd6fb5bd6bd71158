"""Tutelage: distil a vision foundation model into a small, fast student, with a few labelled and many unlabelled images.

Every command is also a function with the same name and arguments: `tutelage.run(target=..., gallery=[...], ...)`. For a training
loop of one's own there are `select`, `DistillationDataset`, `losses` and `load_student`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from tutelage.errors import TutelageError
from tutelage.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

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
    from tutelage.custom_loop.dataset import DistillationDataset
    from tutelage.custom_loop.select import select
    from tutelage.custom_loop.student import load_student
    from tutelage.distillation import losses

__all__ = [
    "DistillationDataset", "TutelageError", "__version__", "adapt", "baseline", "benchmark", "cache", "committee", "compare", "curate",
    "demo", "demo_page", "distill", "doctor", "evaluate", "export", "finetune", "load_student", "losses", "predict", "report", "run",
    "select",
]  # fmt: skip

_PIECES = {"DistillationDataset": "dataset", "load_student": "student", "select": "select"}  # name -> file


def __getattr__(name: str) -> ModuleType | Callable[..., object]:
    if name == "losses":
        return importlib.import_module("tutelage.distillation.losses")
    if name in _PIECES:
        return getattr(importlib.import_module(f"tutelage.custom_loop.{_PIECES[name]}"), name)
    from tutelage.cli import COMMANDS, function_of

    if (command := name.replace("_", "-")) in COMMANDS:
        return function_of(command)
    raise AttributeError(f"module 'tutelage' has no attribute {name!r}")
