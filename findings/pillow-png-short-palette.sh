#!/usr/bin/env bash
# A mask with the usual 255 for "no class" and a palette of its classes' colours only: saved as PNG by Pillow, 255 becomes another class. The
# bits of a pixel follow the length of the palette (4 bits for 5 to 16 colours), and what does not fit is cut off without a word: with 2, 4
# or 16 classes every unlabelled pixel is of the last one. TIFF and BMP keep the numbers; a palette of 17 colours or more does too.
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

row = np.array([[0, 1, 255, 255]], np.uint8)
seen = {}
for classes in (2, 4, 11, 16, 17, 21):
    for form in ("PNG", "TIFF", "BMP"):
        image, file = Image.fromarray(row), io.BytesIO()
        image.putpalette([value for number in range(classes) for value in (10 * number, 0, 255 - 10 * number)])
        image.save(file, form)
        seen[classes, form] = np.asarray(Image.open(file)).tolist()[0]
    print(f"{classes} classes: {row.tolist()[0]} is read back from PNG as {seen[classes, 'PNG']}")
print("pillow", PIL.__version__)
lost = {2: 1, 4: 3, 11: 15, 16: 15, 17: 255, 21: 255}
if seen != {(n, form): [0, 1] + 2 * [lost[n] if form == "PNG" else 255] for n, form in seen}:
    sys.exit(f"changed: {seen}")
PY
# Seen:
# 2 classes: [0, 1, 255, 255] is read back from PNG as [0, 1, 1, 1]
# 4 classes: [0, 1, 255, 255] is read back from PNG as [0, 1, 3, 3]
# 11 classes: [0, 1, 255, 255] is read back from PNG as [0, 1, 15, 15]
# 16 classes: [0, 1, 255, 255] is read back from PNG as [0, 1, 15, 15]
# 17 classes: [0, 1, 255, 255] is read back from PNG as [0, 1, 255, 255]
# 21 classes: [0, 1, 255, 255] is read back from PNG as [0, 1, 255, 255]
# pillow 13.0.0
