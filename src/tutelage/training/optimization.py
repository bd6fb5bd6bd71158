"""Learning rate, optimizer, and the moving average of the weights."""

from __future__ import annotations

import math

import torch
from torch import nn

WARM_UP = 0.06  # share of the steps
WEIGHT_DECAY = 0.05
EMA_DECAY = 0.998
REFERENCE_BATCH = 128


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the learning rate of a step: linear warm-up over the first 6 % of the steps, then a cosine to 0.

    Worked example: step 0 of 100 at peak 1: 1/6; step 5: 1; step 53: 0.5.
    """
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def scaled_rate(rate: float, batch_size: int) -> float:
    """Scale a learning rate for batch 128 to this batch size, by the square root of batch / 128."""
    return rate * math.sqrt(batch_size / REFERENCE_BATCH)


def optimizer_for(module: nn.Module, rate: float, device: torch.device | str) -> torch.optim.AdamW:
    """AdamW with decoupled weight decay on matrices and kernels, none on biases and norms."""
    decayed = [p for p in module.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in module.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
    fused = torch.device(device).type in ("cpu", "cuda")
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=rate, fused=fused)


class EMA:
    """Exponential moving average of a module's weights and buffers.

    a <- d a + (1 - d) w with d = min(decay, (1 + t) / (10 + t)) after step t, so that early weights are soon forgotten;
    steady: d = decay from the first step on.
    """

    def __init__(self, module: nn.Module, decay: float = EMA_DECAY, steady: bool = False):
        self.decay, self.steady, self.step = decay, steady, 0
        self.state = {name: value.detach().clone() for name, value in module.state_dict().items()}

    def update(self, module: nn.Module) -> None:
        """Update the average with the weights after one more step."""
        decay = self.decay if self.steady else min(self.decay, (1 + self.step) / (10 + self.step))
        self.step += 1
        now = module.state_dict()
        floats = [name for name, value in self.state.items() if value.is_floating_point()]
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            [self.state[n] for n in floats], [now[n].detach() for n in floats], 1 - decay
        )
        for name in self.state.keys() - set(floats):
            self.state[name].copy_(now[name])
