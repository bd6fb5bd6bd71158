"""Vectors of the tiny task's images, as somebody's encoder would make them: they say the class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from conftest import Task

WIDTH = 12


def vector(label: int, number: int) -> np.ndarray:
    """A vector that says the class: (12,) float32."""
    noise = np.random.default_rng([label, number]).normal(0, 0.2, WIDTH)
    return (np.eye(WIDTH)[label] + 1 + noise).astype(np.float32)


def gallery_vectors() -> dict[str, np.ndarray]:
    """Of the 24 gallery images: number i shows class i % 3."""
    return {f"{i}.png": vector(i % 3, 100 + i) for i in range(24)}


def target_vectors(task: Task, splits: tuple[str, ...] = ("train", "test")) -> dict[str, np.ndarray]:
    names = [f"{split}/c{c}/{i}.png" for split in splits for c in range(3) for i in range(6 if split == "train" else 4)]
    return {name: vector(int(name.split("/c")[1][0]), i) for i, name in enumerate(names)}


def write(path: Path, vectors: dict[str, np.ndarray], name: str = "id", column: str = "vector") -> Path:
    table = {name: list(vectors), column: [list(map(float, v)) for v in vectors.values()]}
    pq.write_table(pa.table({**table, "caption": ["a picture"] * len(vectors)}), path)
    return path
