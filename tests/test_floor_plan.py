"""The order of the code: who may import whom, what loads no torch, and how long files and functions may be."""

from __future__ import annotations

import ast
import graphlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"

# From top to bottom: a room imports only rooms below it. A room is a file or a folder of src/tutelage.
ROOMS = (
    "cli",
    "custom_loop",
    "commands",
    "study",
    "pipeline",
    "curation",
    "distillation",
    "finetuning",
    "deploy",
    "tasks",
    "reporting",
    "features",
    "models",
    "data",
    "training",
    "compute_cost",
    "metrics",
    "device",
    "progress",
    "run_folder",
    "settings",
    "results",
    "files",
    "errors",
    "image_size",
    "json_object",
    "regular_file",
    "environment",
    "version",
)
ENTRANCES = ("__init__", "__main__")  # above all rooms; no room imports them
CLOSED = {"data": {"training", "metrics", "device"}}  # below, and still not to be imported
# Inside commands/, from top to bottom: those that make runs, all stages in order, and the others, of one stage each, which
# import none of each other. The files of every other room may import each other, but not in a circle.
MANY_RUNS, ONE_RUN = {"compare", "demo"}, {"run"}

FORBIDDEN_NAMES = {"utils.py", "helpers.py", "misc.py"}
FILE_LINES, FUNCTION_LINES, COMMAND_LINES = 400, 60, 150

LOADS_NO_TORCH = (
    "tutelage",
    "tutelage.cli",
    "tutelage.reporting",
    "tutelage.custom_loop.select",
    "tutelage.deploy.runtime",
    "tutelage.commands.predict",
    "tutelage.deploy.browser",
    "tutelage.tasks",
    "tutelage.tasks.base",
    "tutelage.tasks.classification",
    "tutelage.tasks.segmentation",
    "tutelage.tasks.segmentation_settings",
    "tutelage.data.decode",
    "tutelage.data.emoji",
    "tutelage.data.views",
    "tutelage.run_folder",
    "tutelage.files",
    "tutelage.settings",
    "tutelage.progress",
    "tutelage.errors",
)


def files_of(src: Path) -> dict[str, Path]:
    """module -> file; a folder's __init__.py is the module of the folder."""
    modules = {}
    for path in sorted((src / "tutelage").rglob("*.py")):
        parts = path.relative_to(src).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def imports_of(module: str, modules: dict[str, Path]) -> set[str]:
    """The modules of tutelage that a file names in an import, at the top, in a function or for types only."""
    path = modules[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (above, node.module) if part)
            names |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names |= {argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)}
    found = set()
    for name in names:
        if str(name).split(".")[0] == "tutelage":
            while name not in modules and "." in name:
                name = name.rpartition(".")[0]
            found.add(name)
    return found - {module}


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def level_of(command: str) -> int:
    """Which group of commands a module of commands/ is in, 0 the uppermost."""
    name = command.rpartition(".")[2]
    return 0 if name in MANY_RUNS else 1 if name in ONE_RUN else 2


def faults_of_plan(src: Path) -> list[str]:
    """Every import against the order and every file that is on no plan, as sentences."""
    faults = []
    modules = files_of(src)
    for module in modules:
        room = room_of(module)
        if room not in ROOMS + ENTRANCES:
            faults.append(f"{module}: not on the floor plan; put '{room}' into ROOMS, above all that it imports")
            continue
        for other in sorted(imports_of(module, modules)):
            if room_of(other) in ROOMS + ENTRANCES and not may_import(module, other):
                faults.append(f"{module} imports {other}, which is not below it")
    return faults


def may_import(module: str, other: str) -> bool:
    room, target = room_of(module), room_of(other)
    if room in ENTRANCES:
        return target in ROOMS
    if target in ENTRANCES or target in CLOSED.get(room, ()):
        return False
    if room == target == "commands":
        return level_of(module) < level_of(other)
    return ROOMS.index(target) >= ROOMS.index(room)


def circle_of(src: Path) -> list[str]:
    """The modules of one circle of imports, or nothing."""
    modules = files_of(src)
    try:
        graphlib.TopologicalSorter({module: imports_of(module, modules) for module in modules}).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def too_long(src: Path) -> list[str]:
    """Files and functions over their number of lines, as sentences."""
    faults = []
    for module, path in files_of(src).items():
        text = path.read_text(encoding="utf-8")
        if (lines := len(text.splitlines())) > FILE_LINES:
            faults.append(f"{module}: {lines} lines, at most {FILE_LINES}")
        most = COMMAND_LINES if room_of(module) == "commands" else FUNCTION_LINES
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                lines = node.end_lineno - node.lineno + 1
                if lines > most:
                    faults.append(f"{module}.{node.name}: {lines} lines, at most {most}")
    return faults


def test_a_room_imports_only_rooms_below_it():
    """The order of the rooms holds for every import, also for those inside functions."""
    assert "tutelage.errors" in files_of(SRC)
    faults = faults_of_plan(SRC)
    assert not faults, "\n" + "\n".join(faults)


def test_no_two_files_import_each_other():
    """There is no circle of imports, however long."""
    assert not circle_of(SRC), " -> ".join(circle_of(SRC))


def test_files_and_functions_stay_short():
    """A file can be read in one go: 400 lines, functions 60 lines, commands 150."""
    assert not too_long(SRC), "\n" + "\n".join(too_long(SRC))


def test_tests_lie_in_the_rooms_that_they_test():
    """The tests of src/tutelage/<room>/ are in tests/<room>/; above them are those of single files and of the whole."""
    folders = {
        place.parent.relative_to(SRC.parent / "tests").as_posix() for place in SRC.parent.glob("tests/**/test_*.py")
    }
    rooms = {place.parent.name for place in (SRC / "tutelage").glob("*/__init__.py")}
    assert folders - {"."} <= rooms
    assert rooms - folders <= {"finetuning", "pipeline", "settings"}  # seen by the commands' tests only


def test_no_room_without_a_word():
    """No file is named for being useful, and none waits to be written."""
    assert not [path for path in files_of(SRC).values() if path.name in FORBIDDEN_NAMES]
    assert not [path for path in files_of(SRC).values() if "TODO stub" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        (
            {"training/loop.py": "from tutelage.models import linear_probe", "models/linear_probe.py": ""},
            "loop imports tutelage.models",
        ),
        ({"run_folder.py": "def f():\n    import tutelage.cli", "cli.py": ""}, "run_folder imports tutelage.cli"),
        ({"data/masks.py": "from .. import metrics", "metrics.py": ""}, "data.masks imports tutelage.metrics"),
        (
            {"commands/adapt.py": "from .benchmark import x", "commands/benchmark.py": ""},
            "adapt imports tutelage.commands.benchmark",
        ),
        ({"cli.py": "from tutelage import __version__"}, "cli imports tutelage,"),
        ({"errors.py": "import_module('tutelage.settings')", "settings.py": ""}, "errors imports tutelage.settings"),
        ({"magic.py": ""}, "put 'magic' into ROOMS"),
        ({"recipes/magic.py": ""}, "put 'recipes' into ROOMS"),
        (
            {"pipeline/stage.py": "from ..commands import curate", "commands/curate.py": ""},
            "imports tutelage.commands.curate",
        ),
        (
            {"commands/demo.py": "from .compare import x", "commands/compare.py": ""},
            "demo imports tutelage.commands.comp",
        ),
        ({"commands/run.py": "from .demo import x", "commands/demo.py": ""}, "run imports tutelage.commands.demo"),
        ({"progress.py": "from tutelage import metrics", "metrics.py": ""}, "progress imports tutelage.metrics"),
    ],
)
def test_the_plan_notices(tmp_path: Path, files: dict[str, str], fault: str):
    """Each way of breaking the order is noticed, and reported with the names of both files or what to do."""
    for name, text in ({"__init__.py": ""} | files).items():
        path = tmp_path / "tutelage" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    faults = faults_of_plan(tmp_path)
    assert len(faults) == 1
    assert fault in faults[0]


def test_a_circle_is_noticed(tmp_path: Path):
    """Two files of one room that import each other are a circle, even inside functions."""
    room = tmp_path / "tutelage" / "data"
    room.mkdir(parents=True)
    (room / "image_cache.py").write_text("from tutelage.data import views")
    (room / "views.py").write_text("def f():\n    from .image_cache import g")
    assert faults_of_plan(tmp_path) == []
    assert {"tutelage.data.image_cache", "tutelage.data.views"} <= set(circle_of(tmp_path))


def test_allowed_imports_are_no_fault(tmp_path: Path):
    """Upper commands may call lower ones, a room its own files, all rooms those far below."""
    texts = {
        "__init__.py": "from tutelage import commands",
        "commands/__init__.py": "",
        "commands/demo.py": "from tutelage.commands.run import run",
        "commands/run.py": "from tutelage.commands.adapt import adapt",
        "commands/adapt.py": "import torch\nfrom tutelage.models import linear_probe\nfrom tutelage.pipeline import stage",
        "pipeline/stage.py": "from tutelage.finetuning.supervised import train\nfrom tutelage import errors",
        "finetuning/supervised.py": "",
        "models/linear_probe.py": "from tutelage.data.views import draw",
        "data/views.py": "from tutelage.errors import did_you_mean",
        "errors.py": "",
    }
    for name, text in texts.items():
        path = tmp_path / "tutelage" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert faults_of_plan(tmp_path) == []
    assert circle_of(tmp_path) == []


@pytest.mark.parametrize("module", [name for name in LOADS_NO_TORCH if name in files_of(SRC) or name == "tutelage"])
def test_importing_loads_no_torch(module: str):
    """Importing what the command needs to answer takes no torch (2.5 s) and no timm (5 s)."""
    code = f"import sys, {module}; print(sorted({{'torch', 'timm'}} & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SRC), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_importing_the_commands_loads_no_torch():
    """A command's file can be imported, for its help and its settings, without torch and timm."""
    commands = [*(m for m in files_of(SRC) if room_of(m) == "commands"), "tutelage.pipeline.stage"]
    assert len(commands) > 10
    code = (
        "import importlib, sys\n"
        f"for name in {commands}:\n"
        "    importlib.import_module(name)\n"
        "    if {'torch', 'timm'} & set(sys.modules): sys.exit(name)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SRC), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stderr.strip()} (or what it imports) loads torch"


def test_exceptions_are_few():
    """At most 20 places are formatted by hand, and `Any` stands on at most 40 lines, at borders to untyped libraries and files."""
    lines = [line for path in SRC.rglob("*.py") for line in path.read_text(encoding="utf-8").splitlines()]
    assert sum("# fmt: skip" in line for line in lines) <= 20
    assert sum(bool(re.search(r"\bAny\b", line)) and "import" not in line for line in lines) <= 40
