#!/usr/bin/env bash
# onnx's own ReferenceEvaluator pools wrongly, without an error: MaxPool of stride 1 reads "pads" as top, bottom, left, right, where the
# operator says all begins, then all ends; with ceil_mode=1 it counts the padding twice and appends zeros (a pooling of GoogLeNet);
# AveragePool and LpPool with ceil_mode=1 shift all windows by half of the cells that the last one lacks.
# Compared with the operators' documentation, by hand; onnxruntime and onnx.shape_inference agree with it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
OMP_NUM_THREADS=1 "$folder/venv/bin/python" - <<'PY'
import sys

import numpy as np
import onnx
import onnxruntime
from onnx.reference import ReferenceEvaluator

print("onnx", onnx.__version__, "onnxruntime", onnxruntime.__version__)


def pooled(node, *shape):
    """Shape as inferred, then output by onnxruntime and by the reference, of pooling 1, 2, 3..."""
    x = np.arange(1, 1 + np.prod(shape), dtype=np.float32).reshape(1, 1, *shape)
    sizes, names = ",".join(map(str, shape)), ",".join("chw"[: 1 + len(shape)])
    graph = f"g (float[1,1,{sizes}] x) => (float[n,{names}] y) {{ y = {node} (x) }}"
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["": 22]> {graph}')
    onnx.checker.check_model(model, full_check=True)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph.output[0].type.tensor_type.shape.dim
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs = session.run(None, {"x": x})[0], ReferenceEvaluator(model).run(None, {"x": x})[0]
    return [d.dim_value for d in inferred][2:], *(y[0, 0].tolist() for y in outputs)


cases = [  # operator, input's size, output by hand, output of the reference
    ("MaxPool <kernel_shape=[3,3], pads=[1,0,1,0]>", (3, 4), [[7, 8], [11, 12], [11, 12]], [[6, 7, 8], [10, 11, 12]]),
    (
        "MaxPool <kernel_shape=[3,3], pads=[1,1,1,1], ceil_mode=1>",
        (3, 4),
        [[6, 7, 8, 8], [10, 11, 12, 12], [10, 11, 12, 12]],
        [[6, 7, 8, 8, 0, 0], [10, 11, 12, 12, 0, 0], [10, 11, 12, 12, 0, 0], [0] * 6, [0] * 6],
    ),
    ("AveragePool <kernel_shape=[3], strides=[4], ceil_mode=1>", (9,), [2, 6, 9], [1.5, 5, 8]),
    ("LpPool <kernel_shape=[3], strides=[4], ceil_mode=1, p=1>", (9,), [6, 18, 9], [3, 15, 24]),
]
changed = False
for node, shape, by_hand, of_reference in cases:
    inferred, runtime, reference = pooled(node, *shape)
    print(f"{node} of 1 to {np.prod(shape)} in {'x'.join(map(str, shape))}; inferred size {inferred}")
    print("  by hand:           ", by_hand)
    print("  onnxruntime:       ", runtime)
    print("  ReferenceEvaluator:", reference)
    changed |= runtime != by_hand or inferred != list(np.shape(by_hand)) or reference != of_reference
if changed:
    sys.exit("changed: other outputs than described")
PY

# Output seen on 2026-11-30:
#   onnx 1.23.2 onnxruntime 1.32.0
#   MaxPool <kernel_shape=[3,3], pads=[1,0,1,0]> of 1 to 12 in 3x4; inferred size [3, 2]
#     by hand:            [[7, 8], [11, 12], [11, 12]]
#     onnxruntime:        [[7.0, 8.0], [11.0, 12.0], [11.0, 12.0]]
#     ReferenceEvaluator: [[6.0, 7.0, 8.0], [10.0, 11.0, 12.0]]
#   MaxPool <kernel_shape=[3,3], pads=[1,1,1,1], ceil_mode=1> of 1 to 12 in 3x4; inferred size [3, 4]
#     by hand:            [[6, 7, 8, 8], [10, 11, 12, 12], [10, 11, 12, 12]]
#     onnxruntime:        [[6.0, 7.0, 8.0, 8.0], [10.0, 11.0, 12.0, 12.0], [10.0, 11.0, 12.0, 12.0]]
#     ReferenceEvaluator: [[6.0, 7.0, 8.0, 8.0, 0.0, 0.0], [10.0, 11.0, 12.0, 12.0, 0.0, 0.0], [10.0, 11.0, 12.0, 12.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]]
#   AveragePool <kernel_shape=[3], strides=[4], ceil_mode=1> of 1 to 9 in 9; inferred size [3]
#     by hand:            [2, 6, 9]
#     onnxruntime:        [2.0, 6.0, 9.0]
#     ReferenceEvaluator: [1.5, 5.0, 8.0]
#   LpPool <kernel_shape=[3], strides=[4], ceil_mode=1, p=1> of 1 to 9 in 9; inferred size [3]
#     by hand:            [6, 18, 9]
#     onnxruntime:        [6.0, 18.0, 9.0]
#     ReferenceEvaluator: [3.0, 15.0, 24.0]
