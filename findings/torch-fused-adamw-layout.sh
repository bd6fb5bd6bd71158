#!/usr/bin/env bash
# On the CPU, AdamW(fused=True) pairs moments with the wrong weights, without an error, when they lie in another memory format:
# after loading a state saved contiguous (safetensors takes no other) into a channels_last model, or after .to(channels_last) midway.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 safetensors==0.8.0 numpy==2.4.6
OMP_NUM_THREADS=1 "$folder/venv/bin/python" - <<'PY'
import sys

import safetensors
import torch
from safetensors.torch import load, save
from torch import nn

print("torch", torch.__version__, "safetensors", safetensors.__version__)
random = torch.Generator().manual_seed(1)
batches = [torch.randn(4, 3, 8, 8, generator=random) for _ in range(12)]


def begin(fused, memory_format):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.AdaptiveAvgPool2d(1))
    model = model.to(memory_format=memory_format)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)


def train(model, optimizer, batches):
    for images in batches:
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()


def apart(one, other):
    """The largest difference between two models' weights."""
    return max((a - b).abs().max().item() for a, b in zip(one.parameters(), other.parameters()))


def reload(fused, into_layout):
    """Difference to an uninterrupted run after 6 steps, a save, a load and 6 steps."""
    model, optimizer = begin(fused, torch.channels_last)
    train(model, optimizer, batches[:6])
    state = optimizer.state_dict()
    moments = {f"{i} {name}": value for i, fields in state["state"].items() for name, value in fields.items()}
    try:
        save(moments)
        sys.exit("changed: safetensors saves channels_last tensors")
    except ValueError:
        moments = load(save({name: value.contiguous() for name, value in moments.items()}))
    resumed, again = begin(fused, torch.channels_last)
    resumed.load_state_dict(model.state_dict())
    weights = list(resumed.parameters())
    loaded = {i: {} for i in range(len(weights))}
    for key, value in moments.items():
        i, name = key.split()
        if into_layout and value.shape == weights[int(i)].shape:
            value = torch.empty_like(weights[int(i)]).copy_(value)
        loaded[int(i)][name] = value
    again.load_state_dict({"state": loaded, "param_groups": state["param_groups"]})
    if fused and not into_layout:
        print("strides of a weight and its moment after loading:", weights[0].stride(), again.state[weights[0]]["exp_avg"].stride())
    train(model, optimizer, batches[6:])
    train(resumed, again, batches[6:])
    return apart(model, resumed)


def convert(fused):
    """Difference between 12 steps, and 12 steps with .to(channels_last) after the sixth."""
    model, optimizer = begin(fused, torch.contiguous_format)
    train(model, optimizer, batches)
    converted, its = begin(fused, torch.contiguous_format)
    train(converted, its, batches[:6])
    converted.to(memory_format=torch.channels_last)
    train(converted, its, batches[6:])
    return apart(model, converted)


found = {
    "reloaded, fused=True": reload(True, False),
    "reloaded, fused=False": reload(False, False),
    "reloaded and copied into the weights' layout, fused=True": reload(True, True),
    "converted midway, fused=True": convert(True),
    "converted midway, fused=False": convert(False),
}
for name, difference in found.items():
    print(f"largest difference of a weight, {name}: {difference:.1e}")
expected = [True, False, False, True, False]
if [difference > 1e-3 for difference in found.values()] != expected:
    sys.exit("changed: the differences are not as described")
PY

# Output seen on 2026-11-30:
#   torch 2.14.1+cu130 safetensors 0.8.0
#   strides of a weight and its moment after loading: (27, 1, 9, 3) (27, 9, 3, 1)
#   largest difference of a weight, reloaded, fused=True: 6.2e-02
#   largest difference of a weight, reloaded, fused=False: 0.0e+00
#   largest difference of a weight, reloaded and copied into the weights' layout, fused=True: 0.0e+00
#   largest difference of a weight, converted midway, fused=True: 6.2e-02
#   largest difference of a weight, converted midway, fused=False: 3.0e-08
