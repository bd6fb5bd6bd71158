#!/usr/bin/env bash
# onnxscript.optimizer.optimize takes an added constant of 1e-8 or less for 0, and a factor within 1e-5 of 1 for 1, and removes the
# operation: x / (norm + 1e-12) gives NaN for a row of zeros, log(p + 1e-9) gives -inf, and lengths of nanometres lose their offset.
# ONNX's Add and Mul know no tolerance; torch.onnx.export runs this optimizer unless told optimize=False.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q onnxscript==0.7.2 onnx-ir==1.1.0 onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
OMP_NUM_THREADS=1 "$folder/venv/bin/python" - <<'PY'
import sys

import numpy as np
import onnx
import onnxruntime
import onnxscript
from onnx import numpy_helper
from onnxscript import optimizer

print("onnxscript", onnxscript.__version__, "onnx", onnx.__version__, "onnxruntime", onnxruntime.__version__)


def run(model, x):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def both(nodes, x, **constants):
    """Outputs as written and after optimize(), and whether the operation with the constant is still there."""
    kind = "double" if x.dtype == np.float64 else "float"
    text = f'<ir_version: 9, opset_import: ["": 18]> g ({kind}[n,3] x) => ({kind}[n,3] y) {{ {nodes} }}'
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(c), name) for name, c in constants.items())
    onnx.checker.check_model(model)
    optimized = optimizer.optimize(onnx.load_from_string(model.SerializeToString()))
    return run(model, x), run(optimized, x), len(optimized.graph.node) == len(model.graph.node)


rows = np.array([[3, 0, 4], [0, 0, 0]], np.float32)
normalize = "n = ReduceL2 (x, axis)  d = Add (n, e)  y = Div (x, d)"
axis = np.array([1])
unit = both(normalize, rows, axis=axis, e=np.float32(1e-12))
log = both("d = Add (x, e)  y = Log (d)", np.array([[1, 0.5, 0]], np.float32), e=np.float32(1e-9))
metres = both("y = Add (x, e)", np.array([[1e-9, 2e-9, 3e-9]]), e=np.float64(5e-9))
named = {"x / (norm + 1e-12)": unit, "log(p + 1e-9)": log, "float64 x + 5e-9": metres}
for name, (written, optimized, _) in named.items():
    print(f"{name}, as written:", *written.tolist())
    print(f"{name}, optimized: ", *optimized.tolist())
kept = {e: both(normalize, rows, axis=axis, e=np.float32(e))[2] for e in (1e-6, 1e-7, 2e-8, 1e-8, 1e-9, 1e-12)}
print("the constant is still added:", *(f"{e:g} {'yes' if is_kept else 'no'}," for e, is_kept in kept.items()))
factors = {f: both("y = Mul (x, e)", np.ones((1, 3)), e=np.float64(f)) for f in (1.0001, 1.000009)}
for factor, (written, optimized, _) in factors.items():
    print(f"float64 1 x {factor}: as written {written[0, 0]}, optimized {optimized[0, 0]}")
as_described = (
    np.isfinite(np.concatenate([unit[0], log[0]])).all()
    and np.isnan(unit[1][1]).all()
    and log[1][0, 2] == -np.inf
    and (metres[1] == [[1e-9, 2e-9, 3e-9]]).all()
    and list(kept.values()) == [True, True, True, False, False, False]
    and [factors[f][1][0, 0] for f in factors] == [1.0001, 1]
)
if not as_described:
    sys.exit("changed: other outputs than described")
PY

# Output seen on 2026-11-30:
#   onnxscript 0.7.2 onnx 1.23.2 onnxruntime 1.32.0
#   x / (norm + 1e-12), as written: [0.6000000238418579, 0.0, 0.800000011920929] [0.0, 0.0, 0.0]
#   x / (norm + 1e-12), optimized:  [0.6000000238418579, 0.0, 0.800000011920929] [nan, nan, nan]
#   log(p + 1e-9), as written: [0.0, -0.6931471824645996, -20.7232666015625]
#   log(p + 1e-9), optimized:  [0.0, -0.6931471824645996, -inf]
#   float64 x + 5e-9, as written: [6e-09, 7e-09, 8e-09]
#   float64 x + 5e-9, optimized:  [1e-09, 2e-09, 3e-09]
#   the constant is still added: 1e-06 yes, 1e-07 yes, 2e-08 yes, 1e-08 no, 1e-09 no, 1e-12 no,
#   float64 1 x 1.0001: as written 1.0001, optimized 1.0001
#   float64 1 x 1.000009: as written 1.000009, optimized 1.0
