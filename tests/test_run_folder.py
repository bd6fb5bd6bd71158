"""What the run folder promises by itself: its lock, and settings that read back as they were written."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tutelage.errors import TutelageError
from tutelage.files import toml
from tutelage.run_folder import Run

HOLD = """
import os, sys, time
from tutelage.run_folder import Run
with Run(sys.argv[1]):
    if os.fork() == 0:  # as the workers that load images
        os.close(1)
    else:
        print("held", flush=True)
    time.sleep(10)
"""


def test_a_killed_process_gives_the_lock_back(tmp_path: Path):
    """However often others ask, the message names the process that holds the folder; killed, it holds nothing, and no file was replaced."""
    words = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        file = (tmp_path / ".lock").stat().st_ino
        for _ in range(2):
            with (
                pytest.raises(TutelageError, match=f"--out {tmp_path} is in use by process {holder.pid}"),
                Run(tmp_path),
            ):
                pass
        holder.kill()
    run = Run(tmp_path)
    for _ in range(2):
        with run:
            assert (tmp_path / ".lock").read_text() == str(os.getpid())
        assert (tmp_path / ".lock").stat().st_ino == file


def test_settings_read_back():
    """Text of any kind, numbers, lists and tables in tables are read as they were written; None is left out."""
    tables = {
        "study": {"methods": ["a:b", 'ä "quoted" \\ \n\x7f'], "shares": [0.1, 1e-9, 2], "none": [], "failed": True},
        "settings": {
            "teacher.size": 224,
            "größe": -1,
            "way": {"ema": 0.999, "deep": {"on": False}},
            "wide": float("inf"),
        },
    }
    written = toml({**tables, "settings": {**tables["settings"], "gone": None}, "absent": None})
    assert tomllib.loads(written) == tables
    assert '\n\n[settings]\n"teacher.size" = 224\n' in written


def test_files_of_other_systems():
    """Every command, and what they load later, can be imported where Unix's own modules are missing, as on Windows."""
    code = (
        "import sys, psutil; sys.modules['fcntl'] = sys.modules['resource'] = None; "
        "from tutelage.cli import COMMANDS, function_of; [function_of(name) for name in COMMANDS]; "
        "import tutelage.curation.candidates, tutelage.models.teachers, tutelage.distillation.distill_loop, tutelage.deploy.formats"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_files_of_the_users_in_the_run_folder_stay(tmp_path: Path):
    """Leftovers are known by the names that we give: other .partial files and folders stay, and a .lock of another program is refused."""
    for name in ("download.partial", "backup.partial/file", "runs/3.partial"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    for name in (
        f"result.json.{2**20}.partial",
        f"adapt/head.npz.{2**20}-12345.partial",
        f"export.{2**20}.partial/model.onnx",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("half")
    with Run(tmp_path):
        pass
    left = sorted(
        str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"
    )
    assert left == ["backup.partial/file", "download.partial", "runs/3.partial"]
    (tmp_path / ".lock").write_text("held by something else")
    with pytest.raises(TutelageError, match="another program"), Run(tmp_path):
        pass
    assert (tmp_path / ".lock").read_text() == "held by something else"
