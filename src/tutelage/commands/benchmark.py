"""Latency, file size and memory of the student, in PyTorch and as exported files, all measured in turn in one run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tutelage.deploy import runtime
from tutelage.deploy.export_folder import write_about
from tutelage.deploy.timing import in_turn
from tutelage.device import cpu
from tutelage.files import write_json
from tutelage.image_size import sides
from tutelage.json_object import JSON
from tutelage.pipeline.finished_exports import export_folder, finished
from tutelage.results import BenchmarkResult, StudentEntry
from tutelage.settings import command
from tutelage.settings.command_flags import BenchmarkSettings

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

    from tutelage.models.students import Student

    Sessions = dict[str, InferenceSession]  # of the exported files

BATCHES = (1, 32)
EAGER = "PyTorch eager"
MEMORY = """
from pathlib import Path
import numpy as np
{load}
for _ in range(3):
    run(np.zeros({shape}, np.{dtype}))
status = Path("/proc/self/status")  # on Linux ru_maxrss is at least that of the parent
marks = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")] if status.exists() else []
if marks:
    print(int(marks[0]) / 2**10)
else:
    from tutelage.device import peak_bytes
    print(peak_bytes() / 2**20)
"""
LOAD_ONNX = """
import onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession({path!r}, options, providers=["CPUExecutionProvider"])
run = lambda images: session.run(None, {{{name!r}: images}})
"""
LOAD_TORCH = """
import torch
from tutelage.pipeline.load_student import load_student
from tutelage.results import StudentEntry
torch.set_num_threads(1)
module = load_student(Path({folder!r}), StudentEntry(**{about!r}), {classes}).module
run = lambda images: module(torch.from_numpy(images))
torch.set_grad_enabled(False)
"""


@command(BenchmarkSettings)
def benchmark(settings: BenchmarkSettings) -> BenchmarkResult:
    """Time the student of an exported run: batch sizes 1 and 32, one thread and all, PyTorch against the exported files."""
    import torch

    from tutelage.pipeline.load_student import load_student

    place = Path(settings.run)
    place = place.absolute().parent if (place / runtime.EXPORT).exists() else place
    entry, folder = finished(place)["finetune"]["student"], export_folder(str(place))
    about = runtime.checked(folder)
    preprocess, labels = runtime.contents(folder, about)
    student = load_student(place / "finetune", StudentEntry(**entry), len(labels))
    files = [name for name in runtime.NAMES.values() if name in about["files"]]
    rows: list[JSON] = []
    usual, cores = torch.get_num_threads(), cpu()["cores"]
    for threads in sorted({1, cores}):
        torch.set_num_threads(threads)
        sessions = {name: runtime.session_of(folder / name, threads) for name in files}
        for batch in BATCHES:
            rows += _timed(student, sessions, preprocess, threads, batch, "cpu")
    torch.set_num_threads(usual)
    if torch.cuda.is_available():
        for batch in BATCHES:
            rows += _timed(student, {}, preprocess, 0, batch, "cuda")
    sizes, machine = _sizes(place, folder, files, entry, preprocess, len(labels)), cpu()
    result = {"machine": machine, "size": student.size, "rows": rows, "files": sizes, "versions": about.get("versions")}
    write_json(folder / "benchmark.json", result)
    write_about(folder, {**about, "added": ["benchmark.json"]})
    return BenchmarkResult(**result)


def _timed(student: Student, sessions: Sessions, preprocess: JSON, threads: int, batch: int, device: str) -> list[JSON]:
    """Time all models in turn, at one batch size and number of threads; return a row for each."""
    import torch

    height, width = sides(student.size)
    chance = np.random.default_rng(0)
    pixels = chance.integers(0, 256, (batch, height, width, 3), np.uint8)
    images = torch.from_numpy(chance.normal(size=(batch, 3, height, width)).astype(np.float32)).to(device)
    given, name = runtime.model_input(pixels, preprocess), preprocess["input"]["name"]
    module = student.module.to(device)

    def forward() -> None:
        module(images)
        if device == "cuda":
            torch.cuda.synchronize()

    programs: dict[str, Callable[[], object]] = {EAGER: forward}
    programs |= {one: lambda s=session: s.run(None, {name: given}) for one, session in sessions.items()}
    with torch.inference_mode():
        times = in_turn(programs)
    where = {"device": device, "threads": threads, "batch": batch}
    eager = times[EAGER]["median_ms"]
    return [{"model": one, **where, **time, "times_as_fast": eager / time["median_ms"]} for one, time in times.items()]


def _sizes(
    run: Path, folder: Path, files: list[str], entry: JSON, preprocess: JSON, classes: int
) -> dict[str, dict[str, float]]:
    """Return bytes on disk, and peak resident memory of a new process that runs one image, Python and its libraries included."""
    (height, width), given = sides(preprocess["size"]), preprocess["input"]
    student = {"folder": str(run / "finetune"), "about": entry, "classes": classes}
    peak = _peak(LOAD_TORCH.format(**student), (1, 3, height, width), "float32")
    sizes = {EAGER: {"bytes": (run / "finetune" / "weights.safetensors").stat().st_size, "peak_mib": peak}}
    shape = (1, height, width, 3) if given["dtype"] == "uint8" else (1, 3, height, width)
    for name in files:
        peak = _peak(LOAD_ONNX.format(path=str(folder / name), name=given["name"]), shape, given["dtype"])
        sizes[name] = {"bytes": (folder / name).stat().st_size, "peak_mib": peak}
    return sizes


def _peak(load: str, shape: tuple[int, ...], dtype: str) -> float:
    code, env = MEMORY.format(load=load, shape=shape, dtype=dtype), {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    return float(done.stdout.splitlines()[-1])
