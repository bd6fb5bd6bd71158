"""Checkpoints as plain safetensors files; the last two of the current stage are kept."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from tutelage.files import atomic_write
from tutelage.progress import logger
from tutelage.training.optimization import EMA


@dataclass(frozen=True)
class Resumable:
    """Where a training loop keeps its checkpoints. inputs: identifies what it was started from. every: steps between checkpoints."""

    folder: Path
    stage: str
    inputs: str
    every: int

    @property
    def start(self) -> int:
        """Number of steps done, according to the newest checkpoint; 0 without one."""
        return self._newest()[1]

    def save(self, step: int, module: nn.Module, optimizer: torch.optim.Optimizer, average: EMA) -> None:
        """Write weights, average and optimizer state after `step` steps; delete all but the last two checkpoints."""
        tensors = {f"model.{name}": value for name, value in module.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in average.state.items()}
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        with atomic_write(self.folder / f"{self.stage}-{step:08d}.safetensors") as path:
            save_file(tensors, path, metadata={"inputs": self.inputs, "step": str(step), "hash": _hash(tensors)})
        for old in sorted(self.folder.glob(f"{self.stage}-*.safetensors"))[:-2]:
            old.unlink()

    def load(self, module: nn.Module, optimizer: torch.optim.Optimizer, average: EMA) -> int:
        """Load the newest checkpoint of this stage that was made from the same inputs.

        Returns:
            the number of steps done; 0 if there is no checkpoint.
        """
        path, step = self._newest()
        if path is None:
            return 0
        tensors = load_file(path)
        module.load_state_dict(_under("model.", tensors))
        for name, value in _under("average.", tensors).items():
            average.state[name].copy_(value)
        average.step = step
        layout = optimizer.state_dict()
        layout["state"] = {}
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        for name, value in _under("optimizer.", tensors).items():
            index, field = name.split(".", 1)
            weight = weights[int(index)]
            # fused AdamW reads raw memory: it must be in the weight's format (channels_last)
            if value.shape == weight.shape:
                value = torch.empty_like(weight).copy_(value)
            layout["state"].setdefault(int(index), {})[field] = value
        optimizer.load_state_dict(layout)
        return step

    def _newest(self) -> tuple[Path | None, int]:
        for path in sorted(self.folder.glob(f"{self.stage}-*.safetensors"), reverse=True):
            try:
                with safe_open(path, "pt") as file:
                    about = file.metadata() or {}
                if about.get("inputs") != self.inputs:
                    continue
                status = path.stat()
                if about.get("hash") == _hash_in(path, (status.st_ino, status.st_size, status.st_mtime_ns)):
                    return path, int(about["step"])
            except (SafetensorError, OSError):
                pass
            logger.warning(f"{path} is damaged: training goes on from the checkpoint before it, or from the start")
        return None, 0


@functools.lru_cache(maxsize=16)
def _hash_in(path: Path, state: tuple[int, int, int]) -> str:
    """Return the hash of a checkpoint's tensors. state: of the file, so that it is read once as long as it stays as it is."""
    return _hash(load_file(path))


def _hash(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(
            tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data if tensors[name].numel() else b""
        )
    return digest.hexdigest()


def _under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
