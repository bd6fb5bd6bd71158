"""The documentation says what the code does."""

from __future__ import annotations

import importlib.util
import re
import runpy
import shlex
import tomllib
from pathlib import Path

import pytest

from forked import forked

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_cli_page_is_generated():
    """docs/cli.md is what docs/make_cli.py writes, so every flag is documented."""
    spec = importlib.util.spec_from_file_location("make_cli", ROOT / "docs" / "make_cli.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == module.page(), "run: python docs/make_cli.py"


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.toml")), ids=lambda path: path.name)
def test_examples_resolve(path):
    """Every example TOML opens with its command and resolves to settings of that command."""
    from tutelage.settings import resolve
    from tutelage.settings.command_flags import CompareSettings, RunSettings

    text = path.read_text(encoding="utf-8")
    study = text.startswith(f"# tutelage compare examples/{path.name} ")
    assert study or text.startswith(f"# tutelage run --config examples/{path.name} "), "the first line is the command"
    known = CompareSettings if study else RunSettings
    settings = vars(resolve(known, {"config": str(path), "target": "t", "gallery": ["g"], "out": "o"}))
    for name, value in tomllib.loads(text).items():
        assert settings[name.replace("-", "_")] == ([str(one) for one in value] if isinstance(value, list) else value)


def commands() -> list[str]:
    """The `tutelage` commands of the README's sh blocks, continued lines joined."""
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("tutelage ")]


@pytest.mark.parametrize("line", commands())
def test_readme_commands_have_these_flags(line):
    """Every command of the README has flags that exist and values that are allowed."""
    from tutelage.cli import _parsed
    from tutelage.settings import resolve

    function, given = _parsed(shlex.split(line)[1:])
    assert function is not None
    assert resolve(function.settings, given)


@pytest.mark.slow
def test_readme_demo_runs(tmp_path):
    """The README's first command runs for real, cut down by --smoke, and prints its table."""
    done = forked(["demo", "--smoke", "--out", str(tmp_path / "demo")])
    assert done.returncode == 0, done.stderr
    for title in ("pixels + logistic regression", "baseline (labels only)", "distilled student", "teacher (adapted)"):
        assert title in done.stdout
        assert title in README
    for name in re.findall(r"\S+\.safetensors|\S+\.json", done.stdout):
        assert Path(name).exists()


@pytest.mark.slow
def test_readme_python(tmp_path, monkeypatch, capsys):
    """The README's lines of Python run as they stand, on small data and with --smoke."""
    from textures import write_textures

    write_textures(tmp_path)
    code = re.findall(r"```python\n(.*?)```", README, flags=re.S)[0]
    code = code.replace('"unlabelled/"', repr(str(tmp_path / "gallery"))).replace(
        '"labelled/"', repr(str(tmp_path / "target"))
    )
    code = code.replace('student_weights="scratch",', 'student_weights="scratch", smoke=True, finetune="keep",')
    assert "smoke=True" in code
    script = tmp_path / "readme.py"
    script.write_text(code)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script), run_name="__main__")
    assert re.search(r"0\.\d+", capsys.readouterr().out)


def test_where_to_change_what():
    """The places that CONTRIBUTING names for changes are there."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text[text.index("| what | where |") : text.index("Short rules")]
    places = re.findall(r"`([a-z_]+(?:/[a-z_]+)*(?:\.py|/))`", table)
    assert len(places) >= 7
    for place in places:
        assert (ROOT / "src" / "tutelage" / place).exists(), place


def test_tables_are_those_of_the_records():
    """The table of the method in docs/results.md is the one that its command prints, and the README's numbers are in it."""
    made = runpy.run_path(str(ROOT / "benchmarks" / "method_table.py"))["table"]
    head, _, *rows = made(ROOT / "docs" / "results" / "method", "task-oriented", ["scratch", "paper"])
    assert len(rows) >= 9
    assert "\n".join([head, f"|{' --- |' * 9}", *rows]) in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    numbers = {
        name: [one.strip() for one in row.split("|")[3:6]] for row in rows for name in [row.split("|")[1].strip()]
    }
    for line, name in (
        ("| digits |", "digits"),
        ("| photos of food |", "food"),
        ("| skin lesions (HAM10K) |", "ham10k"),
    ):
        (row,) = (one for one in README.splitlines() if one.startswith(line))
        assert [one.strip(" *") for one in row.split("|")[3:6]] == numbers[name]


def test_words_of_the_field():
    """Code and docs use the field's terms; the dated entries of the log stay as they were written."""
    private = re.compile(r"\b(told|taught|mend|pile|is no number|the teacher's word)\b", re.IGNORECASE)
    kinds = (".py", ".md", ".j2", ".toml", ".js", ".css")
    folders = [
        path for name in ("src", "docs", "examples") for path in (ROOT / name).rglob("*") if path.suffix in kinds
    ]
    texts = [
        path
        for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *folders)
        if path.name != "log.md" and "_build" not in path.parts
    ]
    assert len(texts) > 150
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in texts
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if private.search(line)
    ]
    assert found == []
