#!/usr/bin/env bash
# pyarrow filters of Parquet files may skip a row group when no number between its least and greatest value matches, although NaN, which
# is in neither, would: with the same filter, read_table misses rows that Table.filter finds, and which depends on the row groups.
# Compared with the documentation of read_table ("filters": rows that do not match are removed) and of the format, which has
# least and greatest leave out NaN and asks readers to disregard both when they look for NaN. apache/arrow#34162 reports a related case.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pyarrow==26.0.1
cd "$folder"
OMP_NUM_THREADS=1 venv/bin/python - <<'PY'
import sys

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

print("pyarrow", pa.__version__)
nan = float("nan")
table = pa.table({"step": [0, 1, 2, 3, 4, 5], "loss": [1.0, 1.0, nan, 0.5, nan, 0.2]})
pq.write_table(table, "one.parquet")
pq.write_table(table, "two.parquet", row_group_size=3)
pq.write_table(table, "without.parquet", row_group_size=3, write_statistics=False)
groups = pq.ParquetFile("two.parquet").metadata
extremes = [groups.row_group(i).column(1).statistics for i in range(groups.num_row_groups)]
print("steps 0 to 5 have losses:", *table["loss"].to_pylist())
print("two row groups, least and greatest loss:", *((s.min, s.max) for s in extremes))
print("steps found by filter:")
loss = pc.field("loss")
filters = {
    "not loss < 10": ~(loss < 10),
    "loss is NaN": pc.is_nan(loss),
    "loss is not finite": ~pc.is_finite(loss),
    "loss != 1": loss != 1,
    "loss not among [1]": ~loss.isin([1.0]),
}
found = {}
for name, condition in filters.items():
    steps = [table.filter(condition)["step"].to_pylist()]
    for file in ("one.parquet", "two.parquet", "without.parquet"):
        steps.append(pq.read_table(file, filters=condition)["step"].to_pylist())
        if ds.dataset(file).count_rows(filter=condition) != len(steps[-1]):
            sys.exit("changed: count_rows differs from read_table")
    found[name] = steps
    print(
        f"{name}: by Table.filter {steps[0]}; by read_table {steps[1]}, of two row groups {steps[2]}, no statistics {steps[3]}"
    )
tuples = pq.read_table("two.parquet", filters=[("loss", "!=", 1.0)])["step"].to_pylist()
print('[("loss", "!=", 1.0)]: by read_table of two row groups', tuples)
expected = {
    "not loss < 10": [[2, 4], [], [], [2, 4]],
    "loss is NaN": [[2, 4], [2, 4], [4], [2, 4]],
    "loss is not finite": [[2, 4], [2, 4], [4], [2, 4]],
    "loss != 1": [[2, 3, 4, 5], [2, 3, 4, 5], [3, 4, 5], [2, 3, 4, 5]],
    "loss not among [1]": [[2, 3, 4, 5], [2, 3, 4, 5], [3, 4, 5], [2, 3, 4, 5]],
}
if found != expected or tuples != [3, 4, 5]:
    sys.exit("changed: other rows than described")
PY

# Output seen on 2026-11-30:
#   pyarrow 26.0.1
#   steps 0 to 5 have losses: 1.0 1.0 nan 0.5 nan 0.2
#   two row groups, least and greatest loss: (1.0, 1.0) (0.2, 0.5)
#   steps found by filter:
#   not loss < 10: by Table.filter [2, 4]; by read_table [], of two row groups [], no statistics [2, 4]
#   loss is NaN: by Table.filter [2, 4]; by read_table [2, 4], of two row groups [4], no statistics [2, 4]
#   loss is not finite: by Table.filter [2, 4]; by read_table [2, 4], of two row groups [4], no statistics [2, 4]
#   loss != 1: by Table.filter [2, 3, 4, 5]; by read_table [2, 3, 4, 5], of two row groups [3, 4, 5], no statistics [2, 3, 4, 5]
#   loss not among [1]: by Table.filter [2, 3, 4, 5]; by read_table [2, 3, 4, 5], of two row groups [3, 4, 5], no statistics [2, 3, 4, 5]
#   [("loss", "!=", 1.0)]: by read_table of two row groups [3, 4, 5]
