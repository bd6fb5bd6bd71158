#!/usr/bin/env bash
# On the CPU with one thread, a 1 x 1 convolution of a contiguous batch gives an image other last bits in a batch of 15 than in one of 16:
# below 16 images torch takes another algorithm. With two threads nothing differs. So features that are computed once per image and kept
# depend on how many images happened to be left for the last batch, and on OMP_NUM_THREADS.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import sys

import torch

print("torch", torch.__version__, torch.backends.cpu.get_cpu_capability())
torch.manual_seed(0)
convolution, images = torch.nn.Conv2d(96, 24, 1), torch.randn(48, 96, 16, 16)
seen = {}
for threads in (1, 2):
    torch.set_num_threads(threads)
    with torch.inference_mode():
        together = convolution(images)
        for count in (1, 2, 8, 15, 16, 17, 47):
            differs = (convolution(images[:count]) != together[:count]).flatten(1).any(1)
            seen[threads, count] = int(differs.sum())
            print(f"{threads} threads, batch of {count}: {seen[threads, count]} images with other bits than in the batch of 48")
expected = {(1, n): n if n < 16 else 0 for n in (1, 2, 8, 15, 16, 17, 47)}
expected |= {(2, n): 0 for n in (1, 2, 8, 15, 16, 17, 47)}
if seen != expected:
    sys.exit(f"changed: {seen}")
PY
# Seen:
# torch 2.14.1+cu130 AVX512
# 1 threads, batch of 1: 1 images with other bits than in the batch of 48
# 1 threads, batch of 2: 2 images with other bits than in the batch of 48
# 1 threads, batch of 8: 8 images with other bits than in the batch of 48
# 1 threads, batch of 15: 15 images with other bits than in the batch of 48
# 1 threads, batch of 16, 17, 47 and 2 threads, all batches: 0 images
