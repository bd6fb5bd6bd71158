"""JSON objects: what the files of a run and of an export hold, whose keys depend on the file."""

from __future__ import annotations

from typing import Any

JSON = dict[str, Any]  # whoever reads a value knows its type from the key
