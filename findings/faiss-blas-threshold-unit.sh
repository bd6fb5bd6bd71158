#!/usr/bin/env bash
# faiss.cvar.distance_compute_blas_threshold kept its name but changed its unit: in 1.13.2 it is a number of queries (default 20),
# in 1.15.1 it is queries x dimensions (default 128,000), so code that sets 20 now leaves faiss's own kernel in nearly every call.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
cat >"$folder/check.py" <<'PY'
import sys

import faiss
import numpy as np

print("faiss-cpu", faiss.__version__, "numpy", np.__version__)
default = faiss.cvar.distance_compute_blas_threshold
random = np.random.default_rng(0)
found = []
for width in (4, 100):
    rows = (300 + random.standard_normal((50, width))).astype(np.float32)  # far from 0: the two ways give other bits
    queries = (300 + random.standard_normal((100, width))).astype(np.float32)

    def first(count, threshold):
        faiss.cvar.distance_compute_blas_threshold = threshold
        return faiss.knn(queries[:count], rows, 50)[0][0]

    found.append(next(n for n in range(1, 101) if (first(n, 20) != first(n, 2**31 - 1)).any()))
print(f"default {default}; set to 20, distances change from {found[0]} queries on in 4 dimensions, from {found[1]} on in 100")
if (default, *found) != {"1.13.2": (20, 20, 20), "1.15.1": (128000, 5, 1)}[faiss.__version__]:
    sys.exit("changed: other numbers than described")
PY
unset OPENBLAS_CORETYPE
for version in 1.13.2 1.15.1; do
    "$folder/venv/bin/pip" install -q faiss-cpu==$version numpy==2.4.6
    OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/check.py"
done

# Output seen on 2026-11-30:
#   faiss-cpu 1.13.2 numpy 2.4.6
#   default 20; set to 20, distances change from 20 queries on in 4 dimensions, from 20 on in 100
#   faiss-cpu 1.15.1 numpy 2.4.6
#   default 128000; set to 20, distances change from 5 queries on in 4 dimensions, from 1 on in 100
