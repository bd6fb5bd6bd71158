#!/usr/bin/env bash
# FlopCounterMode counts the weight gradient of a depthwise convolution of C channels C-fold (of a grouped one, groups-fold):
# for 256 channels the backward pass counts as 257 times the forward pass, not as 2 times.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.4.6
OMP_NUM_THREADS=1 "$folder/venv/bin/python" - <<'PY'
import sys

import torch
from torch.utils.flop_counter import FlopCounterMode

print("torch", torch.__version__)
ratios = []
for kind in (torch.nn.Conv2d, torch.nn.ConvTranspose2d):
    for channels, groups in ((64, 1), (64, 8), (64, 64), (256, 256)):
        layer = kind(channels, channels, 3, padding=1, groups=groups, bias=False)
        images = torch.randn(1, channels, 8, 8, requires_grad=True)
        with FlopCounterMode(display=False) as forward:
            maps = layer(images)
        with FlopCounterMode(display=False) as backward:
            maps.sum().backward()
        counts = forward.get_total_flops(), backward.get_total_flops()
        by_hand = 2 * channels * 8 * 8 * 9 * channels // groups
        ratios.append((groups, counts[1] / counts[0]))
        print(
            f"{kind.__name__}, channels {channels}, groups {groups}: forward {counts[0]:,} (by hand {by_hand:,}), "
            f"backward {counts[1]:,}, {counts[1] / counts[0]:g} times the forward pass"
        )
if any(ratio != 1 + groups for groups, ratio in ratios):
    sys.exit("changed: the weight gradient is not counted groups-fold")
PY

# Output seen on 2026-11-30:
#   torch 2.14.1+cu130
#   Conv2d, channels 64, groups 1: forward 4,718,592 (by hand 4,718,592), backward 9,437,184, 2 times the forward pass
#   Conv2d, channels 64, groups 8: forward 589,824 (by hand 589,824), backward 5,308,416, 9 times the forward pass
#   Conv2d, channels 64, groups 64: forward 73,728 (by hand 73,728), backward 4,792,320, 65 times the forward pass
#   Conv2d, channels 256, groups 256: forward 294,912 (by hand 294,912), backward 75,792,384, 257 times the forward pass
#   ConvTranspose2d, channels 64, groups 1: forward 4,718,592 (by hand 4,718,592), backward 9,437,184, 2 times the forward pass
#   ConvTranspose2d, channels 64, groups 8: forward 589,824 (by hand 589,824), backward 5,308,416, 9 times the forward pass
#   ConvTranspose2d, channels 64, groups 64: forward 73,728 (by hand 73,728), backward 4,792,320, 65 times the forward pass
#   ConvTranspose2d, channels 256, groups 256: forward 294,912 (by hand 294,912), backward 75,792,384, 257 times the forward pass
