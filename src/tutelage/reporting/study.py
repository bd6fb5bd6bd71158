"""x"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_study(folder: Path, kept: Path, failed: dict[str, str]) -> dict[str, Any]:
    return {"page": "none", "failed": failed}
