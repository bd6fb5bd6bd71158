#!/usr/bin/env bash
# Among equal inner products, faiss.knn and IndexFlatIP give the last rows first, and may drop the first rows for later ones.
# Among equal L2 distances they keep the first rows, in order.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q faiss-cpu==1.15.1 numpy==2.4.6
OMP_NUM_THREADS=1 "$folder/venv/bin/python" - <<'PY'
import sys

import faiss
import numpy as np

print("faiss-cpu", faiss.__version__, "numpy", np.__version__)


def column(*values):
    return np.array(values, np.float32)[:, None]


def inner_product(values, k):
    """Rows by faiss.knn, IndexFlatIP and ResultHeap; the query is 1, so the similarities are the values themselves."""
    index = faiss.IndexFlatIP(1)
    index.add(values)
    heap = faiss.ResultHeap(1, k, keep_max=True)
    heap.add_result(values.T, np.arange(len(values))[None])
    heap.finalize()
    searched = faiss.knn(column(1), values, k, faiss.METRIC_INNER_PRODUCT)[1], index.search(column(1), k)[1], heap.I
    return [rows[0].tolist() for rows in searched]


def l2(values, k):
    """Rows by faiss.knn, IndexFlatL2 and ResultHeap; the query is 0, so the distances are the values squared."""
    index = faiss.IndexFlatL2(1)
    index.add(values)
    heap = faiss.ResultHeap(1, k)
    heap.add_result(values.T**2, np.arange(len(values))[None])
    heap.finalize()
    searched = faiss.knn(column(0), values, k)[1], index.search(column(0), k)[1], heap.I
    return [rows[0].tolist() for rows in searched]


similar = inner_product(column(1, 1, 2, 1, 3), 3)
near = l2(column(3, 3, 2, 3, 1), 3)
equal = inner_product(column(*[1] * 10), 3), l2(column(*[1] * 10), 3)
print("similarities 1, 1, 2, 1, 3, best 3 rows (knn, IndexFlatIP, ResultHeap):", *similar)
print("distances 9, 9, 4, 9, 1, best 3 rows (knn, IndexFlatL2, ResultHeap):   ", *near)
print("ten equal rows, best 3, inner product:", *equal[0])
print("ten equal rows, best 3, L2:           ", *equal[1])
expected = [[4, 2, 1]] * 3, [[4, 2, 0]] * 3, ([[2, 1, 0]] * 3, [[0, 1, 2]] * 3)
if (similar, near, equal) != expected:
    sys.exit("changed: other rows than described")
PY

# Output seen on 2026-11-30:
#   faiss-cpu 1.15.1 numpy 2.4.6
#   similarities 1, 1, 2, 1, 3, best 3 rows (knn, IndexFlatIP, ResultHeap): [4, 2, 1] [4, 2, 1] [4, 2, 1]
#   distances 9, 9, 4, 9, 1, best 3 rows (knn, IndexFlatL2, ResultHeap):    [4, 2, 0] [4, 2, 0] [4, 2, 0]
#   ten equal rows, best 3, inner product: [2, 1, 0] [2, 1, 0] [2, 1, 0]
#   ten equal rows, best 3, L2:            [0, 1, 2] [0, 1, 2] [0, 1, 2]
