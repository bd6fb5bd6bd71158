"""List what the cache holds, and remove old entries."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from tutelage.errors import TutelageError
from tutelage.files import read_json
from tutelage.results import CacheResult
from tutelage.settings import command
from tutelage.settings.command_flags import CacheSettings

KINDS = ("images-", "masks-", "outputs-", "embeddings-")  # what folders are named for
BLOCKS = {".arrow", ".npy", ".parquet", ".pixels", ".json", ".partial"}  # endings of the files in them


@command(CacheSettings)
def cache(settings: CacheSettings) -> CacheResult:
    """List what the cache holds: decoded images, teacher outputs, embeddings; `--prune DAYS` removes those unused for so many days.

    Nothing is lost for good: a run recomputes what is missing.
    """
    folder = Path(settings.cache or "cache")
    if not folder.is_dir():
        raise TutelageError(f"--cache {folder} is not a folder", "use the cache folder (cache/ beside the run folders)")
    entries, removed = [], []
    for path in sorted(p for p in folder.iterdir() if _ours(p)):
        files = [p.stat() for p in path.rglob("*") if p.is_file()]
        used = (p.stat() for p in path.rglob("*") if p.is_file() and p.name != "about.json")  # that one is read here
        days = (time.time() - max((max(s.st_mtime, s.st_atime) for s in used), default=0)) / 86400
        what = (read_json(path / "about.json") or {}).get("what", "made by an earlier version, no longer used")
        entries.append({"name": path.name, "what": what, "gib": sum(s.st_size for s in files) / 2**30, "days": days})
        if settings.prune is not None and days >= settings.prune:
            shutil.rmtree(path)
            removed.append(path.name)
    return CacheResult(cache=str(folder), entries=entries, gib=sum(e["gib"] for e in entries), removed=removed)


def _ours(path: Path) -> bool:
    """Whether a folder was made by a cache: it has such a name, and holds nothing but blocks."""
    if not path.name.startswith(KINDS) or not path.is_dir() or path.is_symlink():
        return False
    files = [one for one in path.rglob("*") if not one.is_dir()]
    return bool(files) and all(one.suffix in BLOCKS for one in files)
