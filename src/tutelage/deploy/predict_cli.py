"""The command line of an export folder's predict.py."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tutelage.deploy.predict_masks import predictions
from tutelage.deploy.runtime import NAMES, files_in, open_export
from tutelage.errors import TutelageError, harmless, number_of, rendered

MOST_THREADS = 1024  # onnxruntime starts all of them at once


@contextlib.contextmanager
def counted(total: int) -> Iterator[Callable[[int], None]]:
    """Show a count of images on stderr, if that is a terminal."""
    done = 0

    def advance(n: int) -> None:
        nonlocal done
        done += n
        if sys.stderr.isatty():
            print(f"\r{done:,} of {total:,} images", end="", file=sys.stderr, flush=True)

    try:
        yield advance
    finally:
        if sys.stderr.isatty():
            print(file=sys.stderr)


def _threads(text: str) -> int:
    """Return a number of threads from its text."""
    if not (text.isdecimal() and len(text) < 9 and 1 <= int(text) <= MOST_THREADS):
        raise argparse.ArgumentTypeError(f"{text} must be a whole number, 1 to {MOST_THREADS}")
    return int(text)


def main(folder: Path, words: Sequence[str] | None = None) -> int:
    """Run the command line of an export folder's predict.py; return exit code 0, or 2 after an error message."""
    parser = argparse.ArgumentParser(description="Classify images with the model in this folder.")
    parser.add_argument("images", nargs="+", help="images, or folders of images")
    parser.add_argument("--out", default="predictions.csv", help=".csv, or .parquet if pyarrow is installed")
    parser.add_argument("--top", type=int, default=1, help="number of classes listed for each image")
    parser.add_argument("--model", choices=["auto", *NAMES], default="auto", help="auto: what the export recommends")
    parser.add_argument("--threads", type=_threads, help="threads of onnxruntime; default: all cores")
    given = parser.parse_args(words)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        model, paths = open_export(folder, given.model, given.threads), files_in(given.images)
        with counted(len(paths)) as advance:
            result, _, rejected = predictions(model, paths, Path(given.out), given.top, advance)
    except TutelageError as error:
        print(rendered(error), file=sys.stderr)
        return 2
    except OSError as error:
        fault = TutelageError(
            f"{error.filename or given.out}: {error.strerror}", "choose another --out, or free space there"
        )
        print(rendered(fault), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    more = f"; {len(result.rejected):,} rejected, {rejected}" if rejected else ""
    print(harmless(f"{number_of(len(result.paths), 'image')}, {given.out}{more}"))
    return 0
