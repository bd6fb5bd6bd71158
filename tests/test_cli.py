"""What the command promises: quick help, one JSON object, and the same result as its Python twins and its stages."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tutelage as package
from conftest import MODELS, SHORT, Task, environment
from tutelage.cli import COMMANDS, call, function_of
from tutelage.run_folder import Run
from tutelage.settings import declared
from tutelage.settings.checking import default_of
from tutelage.version import __version__

STAGES = ("curate", "adapt", "committee", "distill", "baseline", "finetune", "evaluate")
DISTILLED = [word if word != "none" else "auto" for word in SHORT if word != "--no-baseline"]


def in_python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_is_quick(tutelage):
    """`tutelage --help`, a process of its own, names every command within 0.7 seconds and loads neither torch nor timm."""
    took = []
    for _ in range(3):  # the processor's seconds and the best of three: other tests run beside this one
        began = os.times()
        done = tutelage("--help", options=("-X", "importtime"))
        ended = os.times()
        took.append(ended.children_user + ended.children_system - began.children_user - began.children_system)
        assert done.returncode == 0
        assert all(name in done.stdout for name in COMMANDS)
    assert 0 < min(took) < 0.7
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "tutelage.cli" in loaded
    assert not {"torch", "timm"} & loaded


def test_help_of_every_command_loads_no_torch():
    """Each command explains itself, every flag with a text, without loading torch, timm or scikit-learn."""
    code = (
        "import contextlib, io, sys\nfrom tutelage.cli import COMMANDS, call\n"
        "texts = {}\n"
        "for words in ([], ['--help'], ['--version'], *([name, '--help'] for name in COMMANDS)):\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as text:\n"
        "        assert call(list(words)) == 0, words\n"
        "    texts[' '.join(words)] = text.getvalue()\n"
        "print(repr((texts, sorted({'torch', 'timm', 'sklearn'} & set(sys.modules)))))"
    )
    texts, loaded = eval(in_python(code))  # repr of plain text and lists
    assert loaded == []
    assert texts["--version"].strip() == __version__
    assert texts[""] == texts["--help"]
    for name in COMMANDS:
        for parameter in inspect.signature(function_of(name)).parameters:
            assert f"--{parameter.replace('_', '-')} " in texts[f"{name} --help"].replace("\n", " "), parameter
        for line in function_of(name).__doc__.splitlines()[:1]:  # type: ignore[union-attr]
            assert line.split(",")[0].split(":")[0] in " ".join(texts[f"{name} --help"].split())


# Settings that mean something else, or have another default, in these commands than in `run`
OF_THEIR_OWN = {
    ("evaluate", "target"), ("evaluate", "teacher_weights"),  # new images; None: the weights of the run
    ("compare", "out"), ("predict", "out"), ("demo", "out"), ("demo-page", "out"),  # of a study, of predictions, of a page
    ("compare", "student_weights"),  # random, so that all methods start from the same weights
    ("cache", "cache"), ("doctor", "cache"),  # they have no run folder beside which it could be
}  # fmt: skip


def test_a_setting_is_the_same_in_every_command():
    """A setting has the same type, range, help and default wherever it occurs, but for the ones listed, which do differ."""
    whole = declared(function_of("run").settings)
    stages = {name: declared(function_of(name).settings) for name in COMMANDS}
    differing = {
        (command, name)
        for command, own in stages.items()
        for name in own.keys() & whole.keys()
        if (own[name].type, own[name].metadata, default_of(own[name]))
        != (whole[name].type, whole[name].metadata, default_of(whole[name]))
    }
    assert differing == OF_THEIR_OWN


@pytest.mark.parametrize("stage", STAGES)
def test_run_has_every_setting_of_its_stages(stage):
    """All that a stage can be told, `run` can be told."""
    own = declared(function_of(stage).settings).keys()
    assert own - declared(function_of("run").settings).keys() == {"evaluate": {"run"}, "curate": {"shard"}}.get(
        stage, set()
    )


def test_every_setting_of_run_reaches_a_stage():
    """No flag of `run` is idle: each is a setting of a stage, or of `run` itself."""
    stages = {name for stage in STAGES for name in inspect.signature(function_of(stage)).parameters}
    assert set(inspect.signature(function_of("run")).parameters) - stages == {"no_baseline", "pilot"}


def test_twins():
    """Every command is a function of the package with the same name; beside them are the pieces for a loop of one's own."""
    twins = {name.replace("-", "_"): function_of(name) for name in COMMANDS}
    assert all(getattr(package, name) is twin for name, twin in twins.items())
    pieces = {"DistillationDataset", "load_student", "losses", "select"}
    assert set(twins) | pieces | {"TutelageError", "__version__"} == set(package.__all__)
    with pytest.raises(AttributeError, match="rum"):
        package.rum  # noqa: B018


# Results

MODELS_OF_A_RUN = ("distilled", "baseline", "delivered", "teacher", "committee")


def whole_run(drawn: Task, out: Path) -> list[str]:
    """The words of a run with committee and baseline in another folder than the task's."""
    return [word for word in drawn.words("run", "--committee", "auto", "--out", str(out)) if word != "--no-baseline"]


@pytest.fixture(scope="module")
def finished(drawn, tutelage, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """`tutelage run --json`, with committee and baseline, in a folder of its own."""
    out = tmp_path_factory.mktemp("command") / "run"
    return out, tutelage(*whole_run(drawn, out), "--json", own=True)


@pytest.mark.slow
def test_json(finished):
    """--json prints exactly one object with the scores of all models and the seconds of all stages."""
    out, done = finished
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    result = json.loads(done.stdout)
    assert set(result) == {"run", *MODELS_OF_A_RUN, "seconds", "reused"}
    assert result["run"] == str(out)
    for model in MODELS_OF_A_RUN:
        assert {"accuracy", "balanced_accuracy", "macro_f1", "ece"} <= set(result[model]["test"])
        assert all(
            0 <= result[model]["test"][name] <= 1 for name in ("accuracy", "balanced_accuracy", "macro_f1", "ece")
        )
        assert model == "committee" or result[model]["parameters"] == (99_967 if model == "teacher" else 372_979)
    assert (result["committee"]["parameters"] - 99_967) % 372_979 == 0, "the teacher and the students that count"
    assert set(result["seconds"]) == {*STAGES, "targets", "total"}
    assert result["seconds"]["total"] == pytest.approx(
        sum(seconds for name, seconds in result["seconds"].items() if name != "total"), abs=0.01
    )
    assert result["reused"] == []
    assert result["baseline"]["latency_ms"] == result["distilled"]["latency_ms"] > 0  # one architecture
    assert result["delivered"] == {**result["distilled"], "what": "distilled"}, "nothing has judged it"
    assert "latency_ms" not in result["committee"], "which nobody ships"
    assert result["teacher"]["latency_ms"] > 0


def timeless(result: dict) -> dict:
    """A result without what differs from run to run: times and the folder."""
    return {name: {k: v for k, v in result[name].items() if k != "latency_ms"} for name in MODELS_OF_A_RUN}


@pytest.mark.slow
def test_python_twin_gives_the_same(finished, drawn, tmp_path):
    """`tutelage.run(...)` returns what the command prints."""
    again = package.run(
        target=drawn.target, gallery=[drawn.gallery], out=tmp_path / "run", teacher="test_efficientnet",
        teacher_weights="scratch", teacher_size=32, student="test_resnet", student_weights="scratch",
        student_size=32, steps=2, batch_size=8, finetune="keep",
    )  # fmt: skip
    assert timeless(again.to_json()) == timeless(json.loads(finished[1].stdout))
    assert again.student.test.accuracy == again.to_json()["delivered"]["test"]["accuracy"]
    weights = [path / "finetune" / "weights.safetensors" for path in (finished[0], tmp_path / "run")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.slow
def test_stages_one_after_another_give_the_same(finished, drawn, capsys, tmp_path):
    """The stages as commands of their own, in one folder, end with the weights and scores of `run`."""
    out = tmp_path / "run"
    given = dict(zip(MODELS[::2], MODELS[1::2], strict=True)) | dict(zip(DISTILLED[::2], DISTILLED[1::2], strict=True))
    given |= {"--target": str(drawn.target), "--gallery": str(drawn.gallery), "--out": str(out), "--run": str(out)}
    for stage in STAGES:
        flags = ["--" + name.replace("_", "-") for name in inspect.signature(function_of(stage)).parameters]
        words = [word for flag in flags if flag in given for word in (flag, given[flag])]
        if stage == "evaluate":
            words = ["--run", str(out), "--json"]
        capsys.readouterr()
        assert call([stage, *words]) == 0, capsys.readouterr().err
    scores = json.loads(capsys.readouterr().out)
    assert timeless(scores) == timeless(json.loads(finished[1].stdout))
    for name in ("finetune/weights", "baseline/weights", "committee/fold-0"):
        mine, theirs = (path / f"{name}.safetensors" for path in (out, finished[0]))
        assert mine.read_bytes() == theirs.read_bytes()


@pytest.mark.slow
def test_a_second_time_nothing_is_done_again(finished, drawn, capsys):
    """The same command on a finished run gives the same numbers and says that all stages were reused."""
    out, done = finished
    settings = Run(out).settings()["settings"]
    assert call([*whole_run(drawn, out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["reused"] == list(STAGES)
    assert {k: v for k, v in result.items() if k != "reused"} == {
        k: v for k, v in json.loads(done.stdout).items() if k != "reused"
    }
    assert Run(out).settings()["settings"] == settings


@pytest.mark.slow
def test_table(finished, capsys):
    """Without --json the scores come as a table on stdout, and all other words on stderr."""
    assert call(["evaluate", "--run", str(finished[0])]) == 0
    lines = capsys.readouterr().out.splitlines()
    weight = json.loads((finished[0] / "committee" / "result.json").read_text())["weight"]
    titles = ["distilled student, delivered", "baseline (labels only)", "teacher (adapted)"]
    assert [line.split("  ")[0] for line in lines[2:]] == titles + ["committee"] * (weight > 0)
    assert all(float(line.split()[-1]) > 0 for line in lines[2:5])  # milliseconds


@pytest.mark.slow
def test_a_very_large_teacher_is_not_timed(finished, drawn, monkeypatch):
    """A teacher beyond TIMED_FLOPS is scored, and not timed; the students are."""
    monkeypatch.setattr("tutelage.commands.evaluate.TIMED_FLOPS", 0)
    scores = package.evaluate(run=finished[0], target=drawn.target / "test").to_json()
    assert "latency_ms" not in scores["teacher"]
    assert scores["baseline"]["latency_ms"] == scores["distilled"]["latency_ms"] > 0


def test_words_of_a_task():
    """The tests' own tool: what is said anew stands in place of what it said before."""
    words = Task(Path("/t")).words("run", "--gallery", "a", "b", "--steps", "9")
    assert words.count("--gallery") == words.count("--steps") == 1
    assert "/t/gallery" not in words
    assert "2" not in words


def test_the_process_ends_as_the_call_does(tutelage):
    """A process of its own says on stderr what a call in this one says, ends with 2, and prints nothing on stdout."""
    words = ("run", "--temprature", "2")
    own, here = tutelage(*words, own=True), tutelage(*words)
    assert (own.returncode, own.stdout, own.stderr) == (here.returncode, here.stdout, here.stderr)
    assert own.returncode == 2
    assert "--temperature" in own.stderr
