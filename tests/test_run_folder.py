"""What the run folder promises by itself: its lock, and settings that read back as they were written."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tutelage.errors import TutelageError
from tutelage.files import read_json, temporary_beside, toml, write_json
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
            assert (tmp_path / ".lock").read_text() == f"tutelage, process {os.getpid()}"
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
    """Leftovers are known by names that nobody else gives: other .partial files and folders stay."""
    users = [
        "adapt.partial/file",
        "backup.partial/file",
        "clip.1080.partial",
        "notes/scan.12-3.partial",
        "runs/3.partial",
        "talk.2026.partial/file",
    ]
    with Run(tmp_path):
        pass
    for name in users:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    for path in (tmp_path / "result.json", tmp_path / "adapt" / "head.npz", tmp_path / "export" / "model.onnx"):
        name = temporary_beside(path).relative_to(tmp_path)
        name = name / "model.onnx" if path.name == "model.onnx" else name
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("half")
    with Run(tmp_path):
        pass
    left = sorted(
        str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"
    )
    assert left == users


@pytest.mark.parametrize("content", ["held by something else", "", "4711", "4711\n", "tutelage"])
def test_folders_of_others_are_refused(tmp_path: Path, content: str):
    """A lock of another program, whatever it says, beside files of the user's; a folder that is called like a stage: nothing changes."""
    (tmp_path / ".lock").write_text(content)
    (tmp_path / "curate").mkdir()
    (tmp_path / "curate" / "split_copies.csv").write_text("mine")
    (tmp_path / "rejected.csv").write_text("mine")
    with pytest.raises(TutelageError, match=r"another program|contains other files"), Run(tmp_path):
        pass
    assert (tmp_path / ".lock").read_text() == content
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "curate", "rejected.csv"}
    (tmp_path / ".lock").unlink()
    with pytest.raises(TutelageError, match="contains other files"), Run(tmp_path):
        pass
    assert not (tmp_path / ".lock").exists()


def test_what_is_moved_aside_has_a_name_that_fits(tmp_path: Path):
    """A run folder with a name of 250 bytes is moved to one whose name a file system can hold."""
    with Run(tmp_path / ("n" * 250)) as run:
        run.claim({"steps": 1}, overwrite=False)
        (run.path / "adapt").mkdir()
        (run.path / "adapt" / "result.json").write_text("{}")
        old = run.claim({"steps": 2}, overwrite=True)
        assert old is not None
        assert (old / "adapt" / "result.json").exists()


def test_files_are_flushed_while_open_for_writing(tmp_path: Path, monkeypatch):
    """Windows flushes a file to disk only if it is open for writing: so it is, and its contents stay."""
    fcntl = pytest.importorskip("fcntl")
    modes = []
    monkeypatch.setattr(os, "fsync", lambda number: modes.append(fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE))
    write_json(tmp_path / "a.json", {"a": 1})
    assert modes == [os.O_RDWR]
    assert read_json(tmp_path / "a.json") == {"a": 1}


def test_the_same_settings_from_another_folder(tmp_path: Path, monkeypatch):
    """Relative and absolute paths of the same files, and the same share in other digits, are the same settings, wherever one stands."""
    for name in ("data/target", "data/gallery", "other"):
        (tmp_path / name).mkdir(parents=True)
    with Run(tmp_path / "run") as run:
        monkeypatch.chdir(tmp_path / "data")
        run.claim({"target": "target", "gallery": ["gallery"], "val": "0.2", "student": "target"}, overwrite=False)
        (run.path / "adapt").mkdir()
        write_json(run.path / "adapt" / "result.json", {"outputs": "now"})
        monkeypatch.chdir(tmp_path / "other")
        same = {
            "target": str(tmp_path / "data" / "target"),
            "gallery": ["../data/gallery"],
            "val": ".20",
            "student": "target",
        }
        assert run.claim(same, overwrite=False) is None
        kept = run.settings()["settings"]
        assert kept == {**same, "gallery": [str(tmp_path / "data" / "gallery")], "val": 0.2}
        with pytest.raises(TutelageError, match=r"holds a run with other settings: val: 0\.2 -> 0\.3"):
            run.claim({**same, "val": "0.3"}, overwrite=False)


def test_a_setting_that_was_changed_by_hand(tmp_path: Path):
    """A way to resize that does not exist is told with the file that holds it."""
    with Run(tmp_path) as run:
        run.claim({"resize": "zoom"}, overwrite=False)
        with pytest.raises(
            TutelageError, match=r"settings\.toml is not as tutelage wrote it: --resize zoom must be 'squash'"
        ):
            run.chosen()


@pytest.mark.parametrize("text", ["", "[versions]\ntutelage = '1'\n", "[settings]\nseed = 0\n"])
def test_settings_that_were_cut_off(tmp_path, text):
    """A settings.toml that lost its end, though it still is TOML, is damaged: no default stands in for what it said."""
    (tmp_path / "settings.toml").write_text(text)
    with pytest.raises(TutelageError, match="is not as tutelage wrote it: it lacks machine"):
        Run(tmp_path).settings()
