"""Input sizes: one number for a square, or height and width."""

from __future__ import annotations

Size = int | str  # side of a square in pixels, or "HEIGHTxWIDTH"


def sides(size: Size) -> tuple[int, int]:
    """Return the height and width of a size, in pixels. sides(64) == (64, 64); sides("256x320") == (256, 320)"""
    height, _, width = str(size).partition("x")
    return int(height), int(width or height)
