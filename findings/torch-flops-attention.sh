#!/usr/bin/env bash
# FlopCounterMode counts scaled_dot_product_attention on the CPU as 0 FLOPs, forward and backward, because the fused kernel that
# runs by default has no formula; with the plain implementation, or on the meta device, it counts the real number.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.4.6
OMP_NUM_THREADS=1 "$folder/venv/bin/python" - <<'PY'
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry


def flops(device="cpu"):
    """FLOPs of the forward and of the forward and backward pass."""
    counts = []
    for gradient in (False, True):
        query, key, value = torch.randn(3, 1, 4, 128, 32, device=device, requires_grad=gradient)
        with FlopCounterMode(display=False) as counter:
            mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value)
            if gradient:
                mixed.sum().backward()
        counts.append(counter.get_total_flops())
    return counts


print("torch", torch.__version__)
by_hand = 2 * 2 * 4 * 128 * 128 * 32
default = flops()
with sdpa_kernel(SDPBackend.MATH):
    plain = flops()
meta = flops("meta")
print(f"4 heads, 128 places, width 32; forward by hand {by_hand:,}; forward, then forward and backward:")
print("CPU, as it comes:              ", default)
print("CPU, sdpa_kernel(MATH):        ", plain)
print("meta device:                   ", meta)


class Seen(TorchDispatchMode):
    ran = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.ran.append(function.overloadpacket)
        return function(*args, **kwargs or {})


with Seen():
    torch.nn.functional.scaled_dot_product_attention(*torch.randn(3, 1, 4, 128, 32))
fused = [packet for packet in Seen.ran if "scaled_dot_product" in str(packet)]
print("runs on the CPU:", *fused, "- has a formula:", *[packet in flop_registry for packet in fused])
if default != [0, 0] or plain != [by_hand, 3 * by_hand] or meta[0] != by_hand or any(p in flop_registry for p in fused):
    sys.exit("changed: other counts than described")
PY

# Output seen on 2026-11-30:
#   torch 2.14.1+cu130
#   4 heads, 128 places, width 32; forward by hand 8,388,608; forward, then forward and backward:
#   CPU, as it comes:               [0, 0]
#   CPU, sdpa_kernel(MATH):         [8388608, 25165824]
#   meta device:                    [8388608, 25165824]
#   runs on the CPU: aten._scaled_dot_product_flash_attention_for_cpu - has a formula: False
