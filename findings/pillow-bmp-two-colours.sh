#!/usr/bin/env bash
# Pillow does not read back a BMP that it wrote: a palette image whose palette is just black and white is saved with 8 bits a pixel, and opened
# as if it had 1 bit a pixel (mode "1"), so that the pixels are those of other places, here all black. No error. With a third colour, or with
# the two colours in the other order, it comes back whole. Masks of background and one class are such images.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pillow==13.0.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import io
import sys

import numpy as np
import PIL
from PIL import Image

mask = np.zeros((8, 16), np.uint8)
mask[:, 4:12] = 1
black, white, grey = (0, 0, 0), (255, 255, 255), (9, 9, 9)
seen = {}
for name, colours in {"black, white": (black, white), "white, black": (white, black), "with a third": (black, white, grey)}.items():
    image, file = Image.fromarray(mask), io.BytesIO()
    image.putpalette([value for colour in colours for value in colour])
    image.save(file, "BMP")
    bits, again = int.from_bytes(file.getvalue()[28:30], "little"), Image.open(file)
    whole = bool((np.asarray(again.convert("RGB")) == np.asarray(image.convert("RGB"))).all())
    seen[name] = (bits, again.mode, whole)
    print(f"{name}: {bits} bits a pixel in the file, opened in mode {again.mode}, {'the same picture' if whole else 'another picture'}")
print("pillow", PIL.__version__)
expected = {"black, white": (8, "1", False), "white, black": (8, "P", True), "with a third": (8, "P", True)}
if seen != expected:
    sys.exit(f"changed: {seen}")
PY
# Seen:
# black, white: 8 bits a pixel in the file, opened in mode 1, another picture
# white, black: 8 bits a pixel in the file, opened in mode P, the same picture
# with a third: 8 bits a pixel in the file, opened in mode P, the same picture
# pillow 13.0.0
