#!/usr/bin/env bash
# Exact L2 search (IndexFlatL2, faiss.knn) of map coordinates in metres finds every point itself in a call of 63,999 queries,
# and none in a call of 64,000 (queries x dimensions = 128,000, faiss.cvar.distance_compute_blas_threshold), all at distance 0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q faiss-cpu==1.15.1 numpy==2.4.6
unset OPENBLAS_CORETYPE
OMP_NUM_THREADS=1 "$folder/venv/bin/python" - <<'PY'
import sys

import faiss
import numpy as np

print("faiss-cpu", faiss.__version__, "numpy", np.__version__)
places = np.random.default_rng(0).choice(200 * 200, 1000, replace=False)  # of a grid of 2 km by 2 km, 10 m apart
points = np.stack([500_000 + 10 * (places // 200), 4_650_000 + 10 * (places % 200)], 1).astype(np.float32)
assert (points.astype(np.int64) % 10 == 0).all()  # all exact in float32
index = faiss.IndexFlatL2(2)
index.add(points)
right = {}
for count in (63_999, 64_000):
    queries = np.resize(points, (count, 2))
    truth = np.arange(count) % 1000
    for name, (distances, rows) in (("IndexFlatL2", index.search(queries, 1)), ("knn", faiss.knn(queries, points, 1))):
        found = points[rows[:, 0]] - queries
        right[name, count] = float((rows[:, 0] == truth).mean())
        print(
            f"{name}, {count:,} queries: {(rows[:, 0] == truth).sum():,} find themselves; the point found lies up to "
            f"{np.hypot(*found.T).max():.0f} m away, though the distance given is at most {distances.max():g}"
        )
faiss.cvar.distance_compute_blas_threshold = 2**31 - 1
raised = float((index.search(queries, 1)[1][:, 0] == truth).mean())
print(f"IndexFlatL2, 64,000 queries, threshold raised: {raised:.1%} find themselves")
if raised < 1 or not all((share == 1) == (count == 63_999) for (_, count), share in right.items()):
    sys.exit("changed: the shares differ from the description")
PY

# Output seen on 2026-11-30:
#   faiss-cpu 1.15.1 numpy 2.4.6
#   IndexFlatL2, 63,999 queries: 63,999 find themselves; the point found lies up to 0 m away, though the distance given is at most 0
#   knn, 63,999 queries: 63,999 find themselves; the point found lies up to 0 m away, though the distance given is at most 0
#   IndexFlatL2, 64,000 queries: 0 find themselves; the point found lies up to 1580 m away, though the distance given is at most 0
#   knn, 64,000 queries: 0 find themselves; the point found lies up to 1580 m away, though the distance given is at most 0
#   IndexFlatL2, 64,000 queries, threshold raised: 100.0% find themselves
