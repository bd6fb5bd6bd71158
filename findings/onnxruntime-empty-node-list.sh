#!/usr/bin/env bash
# onnxruntime.quantization takes an empty nodes_to_quantize for none given: with [] all nodes are quantised, where ["one"] quantises one. The
# docstring says: "List of nodes names to quantize. When this list is not None only the nodes in this list are quantized."
# Who keeps the sensitive layers in float, one more at a time, gets the fully quantised model at the end, larger error and all.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
FOLDER="$folder" OMP_NUM_THREADS=1 "$folder/venv/bin/python" - <<'PY'
import logging
import os
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnxruntime import quantization as q

logging.disable(logging.WARNING)
print("onnx", onnx.__version__, "onnxruntime", onnxruntime.__version__)
folder = Path(os.environ["FOLDER"])
text = """<ir_version: 9, opset_import: ["": 17]> g (float[n,8] x) => (float[n,8] y) {
    [first] h = MatMul (x, a)
    [second] y = MatMul (h, b)
}"""
model = onnx.parser.parse_model(text)
draw = np.random.default_rng(0)
for name in "ab":
    model.graph.initializer.append(onnx.numpy_helper.from_array(draw.normal(size=(8, 8)).astype(np.float32), name))
onnx.checker.check_model(model)
onnx.save(model, folder / "model.onnx")


class Data(q.CalibrationDataReader):
    def __init__(self):
        self.batches = iter([{"x": draw.normal(size=(4, 8)).astype(np.float32)} for _ in range(4)])

    def get_next(self):
        return next(self.batches, None)


def left_in_float(names, static):
    """Nodes that are still multiplied in float by a float weight."""
    out = folder / "out.onnx"
    if static:
        q.quantize_static(folder / "model.onnx", out, Data(), quant_format=q.QuantFormat.QOperator, nodes_to_quantize=names)
    else:
        q.quantize_dynamic(folder / "model.onnx", out, nodes_to_quantize=names)
    return [node.name for node in onnx.load(out).graph.node if node.op_type == "MatMul"]


expected = {None: [], ("first",): ["second"], ("first", "second"): [], (): []}  # by the docstring the last is ["first", "second"]
changed = False
for names, seen in expected.items():
    given = None if names is None else list(names)
    found = [left_in_float(given, static) for static in (True, False)]
    print(f"nodes_to_quantize={given}: left in float by quantize_static {found[0]}, by quantize_dynamic {found[1]}")
    changed |= found != [seen, seen]
if changed:
    sys.exit("changed: other nodes than described")
PY

# Output seen on 2026-11-30:
#   onnx 1.23.2 onnxruntime 1.32.0
#   nodes_to_quantize=None: left in float by quantize_static [], by quantize_dynamic []
#   nodes_to_quantize=['first']: left in float by quantize_static ['second'], by quantize_dynamic ['second']
#   nodes_to_quantize=['first', 'second']: left in float by quantize_static [], by quantize_dynamic []
#   nodes_to_quantize=[]: left in float by quantize_static [], by quantize_dynamic []
