"""Damage to a file, of the kinds that disks, copies and people do."""

from __future__ import annotations

from pathlib import Path

DAMAGE = ("flip", "cut", "empty", "gone", "longer", "text", "folder")


def spoil(path: Path, kind: str, at: int, value: int) -> None:
    """Damage one file. at: which byte, of as many as it has. value: what is flipped in it, 1 to 255. kind: of DAMAGE."""
    data = path.read_bytes()
    at %= max(1, len(data))
    spoilt = {
        "flip": data[:at] + bytes(one ^ value for one in data[at : at + 1]) + data[at + 1 :],
        "cut": data[:at],
        "longer": data + bytes([value]) * 100,
        "text": b'{"a": [1, 2, {"b": null}]}\n',
    }
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind != "gone":
        path.write_bytes(spoilt.get(kind, b""))
