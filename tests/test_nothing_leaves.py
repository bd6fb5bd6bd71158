"""Nothing leaves the machine: the commands are run under a recorder of connections and of files that are opened for writing."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import environment, make_task

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("strace"), reason="no strace, which records what a process does"),
]

# All commands in one process, so that torch is imported once. What they do comes after a connection and a file of its own, which
# show that the recorder sees them.
SCRIPT = """
import socket, subprocess, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from conftest import MODELS, Task
from tutelage.cli import call

task = Task(Path(sys.argv[2]))
Path.home().joinpath("seen").touch()
socket.socket().connect_ex(("127.0.0.1", 7))
run, export, image = str(task.out), str(task.out / "export"), str(task.gallery)
study = ["--target", str(task.target), "--gallery", image, "--out", str(task.root / "study"), *MODELS, "--steps", "2"]
for words in (
    task.words("run", "--val", "0.34", "--committee", "auto", "--student", "mobilenetv3_small_050"),
    ["compare", *study, "--methods", "scratch", "--budgets", "2", "--seeds", "0"],
    ["export", "--run", run],
    ["benchmark", "--run", run],
    ["predict", "--export", export, "--images", image, "--out", str(task.root / "predictions.csv")],
    ["demo-page", "--export", export, "--out", str(task.root / "page.html")],
    ["report", "--run", run],
    ["cache", "--cache", str(task.out.parent / "cache")],
):
    assert call(words) == 0, words
subprocess.run([sys.executable, f"{export}/predict.py", image, "--out", str(task.root / "alone.csv")], check=True)
"""


def test_nothing_leaves_the_machine(tmp_path: Path):
    """No command, nor predict.py of an export, looks up a host, connects to one, or writes anywhere but to its outputs and the cache."""
    task, home, temp, seen = make_task(tmp_path / "task"), tmp_path / "home", tmp_path / "temp", tmp_path / "seen.txt"
    home.mkdir()
    temp.mkdir()
    calls = "connect,sendto,sendmsg,sendmmsg,open,openat,creat,mkdir,mkdirat,rename,renameat,renameat2"
    record = ["strace", "-f", "--seccomp-bpf", "-o", str(seen), "-e", f"trace={calls}"]
    words = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(task.root)]
    quiet = {
        "HOME": str(home),
        "TMPDIR": str(temp),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(temp),
    }
    done = subprocess.run([*record, *words], env=environment(**quiet), capture_output=True, text=True, timeout=600)
    if "ptrace" in done.stderr and not seen.stat().st_size:
        pytest.skip(f"strace may not trace here: {done.stderr.splitlines()[0]}")
    assert done.returncode == 0, done.stderr
    lines = [line for line in seen.read_text(errors="replace").splitlines() if " = -1 ENOENT" not in line]
    hosts = [line for line in lines if "AF_INET" in line]
    assert len(hosts) == 1, hosts
    assert "htons(7)" in hosts[0]
    assert [path.name for path in home.iterdir()] == ["seen"]
    writing = (line for line in lines if re.search(r"O_(WRONLY|RDWR|CREAT)|(mkdir|rename|creat)\w*\(", line))
    paths = {path for line in writing for path in re.findall(r'"([^"]*)"', line)}
    elsewhere = {path for path in paths if not path.startswith((str(tmp_path), "/dev/", "/proc/self/"))}
    assert not elsewhere
    assert not [path for path in temp.rglob("*") if path.is_file()]  # what was written for a moment is gone
