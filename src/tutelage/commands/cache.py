"""List what the cache holds, and remove old entries."""

from __future__ import annotations

import time
from pathlib import Path

from tutelage.data.block_cache import is_entry, remove_entry
from tutelage.errors import TutelageError
from tutelage.files import files_below, read_json
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
        about = read_json(path / "about.json")
        if about is None:  # another process has just removed it
            continue
        files = list(files_below(path))
        used = (max(s.st_mtime, s.st_atime) for p, s in files if p.name != "about.json")  # that one is read here
        days = (time.time() - max(used, default=0)) / 86400
        entries.append(
            {
                "name": path.name,
                "what": about["what"],
                "gib": sum(s.st_size for _, s in files) / 2**30,
                "days": days,
            }
        )
        if settings.prune is not None and days >= settings.prune:
            remove_entry(path)
            removed.append(path.name)
            if path.exists():
                logger.warning(f"{path} is kept: it holds files that tutelage did not write")
    return CacheResult(cache=str(folder), entries=entries, gib=sum(e["gib"] for e in entries), removed=removed)
