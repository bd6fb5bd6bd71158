"""Tutelage: a few labelled images and a pile of unlabelled ones in, a small fast vision model out.

Every command is a function here, with the same name and arguments: `tutelage.run(target=..., gallery=[...], ...)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tutelage.errors import TutelageError
from tutelage.version import __version__

if TYPE_CHECKING:
    from tutelage.recipes.adapt import adapt
    from tutelage.recipes.alone import alone
    from tutelage.recipes.bench import bench
    from tutelage.recipes.cache import cache
    from tutelage.recipes.committee import committee
    from tutelage.recipes.compare import compare
    from tutelage.recipes.curate import curate
    from tutelage.recipes.demo import demo
    from tutelage.recipes.demo_page import demo_page
    from tutelage.recipes.doctor import doctor
    from tutelage.recipes.evaluate import evaluate
    from tutelage.recipes.export import export
    from tutelage.recipes.finetune import finetune
    from tutelage.recipes.pipeline import run
    from tutelage.recipes.predict import predict
    from tutelage.recipes.report import report
    from tutelage.recipes.transfer import transfer

__all__ = [
    "TutelageError", "__version__", "adapt", "alone", "bench", "cache", "committee", "compare", "curate", "demo", "demo_page", "doctor",
    "evaluate", "export", "finetune", "predict", "report", "run", "transfer",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    from tutelage.cli import RECIPES, recipe

    if (command := name.replace("_", "-")) in RECIPES:
        return recipe(command)
    raise AttributeError(f"module 'tutelage' has no attribute {name!r}")
