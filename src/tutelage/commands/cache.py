"""List what the cache holds, and remove old entries."""

from __future__ import annotations

import time
from pathlib import Path

from tutelage.data.block_cache import is_entry, remove_entry
from tutelage.errors import TutelageError
from tutelage.files import read_json
from tutelage.progress import logger
from tutelage.results import CacheResult
from tutelage.settings import command
from tutelage.settings.command_flags import CacheSettings


@command(CacheSettings)
def cache(settings: CacheSettings) -> CacheResult:
    """List what the cache holds: decoded images, teacher outputs, embeddings; `--prune DAYS` removes those unused for so many days.

    Nothing is lost for good: a run recomputes what is missing.
    """
    folder = Path(settings.cache or "cache")
    if not folder.is_dir():
        raise TutelageError(f"--cache {folder} is not a folder", "use the cache folder (cache/ beside the run folders)")
    entries, removed = [], []
    for path in sorted(p for p in folder.iterdir() if is_entry(p)):
        files = [p.stat() for p in path.rglob("*") if p.is_file()]
        used = (p.stat() for p in path.rglob("*") if p.is_file() and p.name != "about.json")  # that one is read here
        days = (time.time() - max((max(s.st_mtime, s.st_atime) for s in used), default=0)) / 86400
        entries.append(
            {
                "name": path.name,
                "what": read_json(path / "about.json")["what"],
                "gib": sum(s.st_size for s in files) / 2**30,
                "days": days,
            }
        )
        if settings.prune is not None and days >= settings.prune:
            remove_entry(path)
            removed.append(path.name)
            if path.exists():
                logger.warning(f"{path} is kept: it holds files that tutelage did not write")
    return CacheResult(cache=str(folder), entries=entries, gib=sum(e["gib"] for e in entries), removed=removed)
