"""Formats other than ONNX: each file is run here and compared, or its format is refused with the reason."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tutelage.deploy.onnx_graph import example, torch_outputs
from tutelage.deploy.silence_output import quiet
from tutelage.errors import TutelageError, raise_all
from tutelage.image_size import Size

Program = Callable[[np.ndarray], np.ndarray]  # (n, ...) inputs -> (n, ...) float32 outputs
FILES = {"onnx": "model.onnx", "torchscript": "model.pt", "executorch": "model.pte", "coreml": "model.mlpackage"}


def check(names: Sequence[str]) -> None:
    """Refuse the formats that cannot be written or checked on this machine, all in one error.

    Raises:
        TutelageError: an unknown format, a missing extra, or a system that cannot run the file.
    """
    faults = []
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        faults.append(TutelageError(f"not installed: {', '.join(missing)}", "run `pip install 'tutelage[export]'`"))
    for name in names:
        if name not in FILES:
            faults.append(TutelageError(f"--format {name} is not supported", f"use one or more of {', '.join(FILES)}"))
        if name == "executorch" and importlib.util.find_spec("executorch") is None:
            faults.append(TutelageError("--format executorch: it is not installed", "run `pip install executorch`"))
        if name == "coreml" and sys.platform != "darwin":
            message = (
                "--format coreml needs macOS: every export is verified by running it, and Core ML files run only there"
            )
            faults.append(TutelageError(message, "export on a Mac, or convert model.onnx there"))
        elif name == "coreml" and importlib.util.find_spec("coremltools") is None:
            faults.append(TutelageError("--format coreml: coremltools is missing", "run `pip install coremltools`"))
    raise_all(faults)


def write(name: str, module: nn.Module, size: Size, baked: bool, folder: Path) -> tuple[Path, Program]:
    """Write the student in one format.

    Args:
        name: "torchscript", "executorch" or "coreml". module: in evaluation mode, fused.

    Returns:
        the path of the file, and a function that runs it.
    """
    path = folder / FILES[name]
    writers = {"torchscript": _torchscript, "executorch": _executorch, "coreml": _coreml}
    return path, writers[name](module, size, baked, path)


def _torchscript(module: nn.Module, size: Size, baked: bool, path: Path) -> Program:
    with quiet(logging.ERROR), torch.no_grad():
        traced = torch.jit.freeze(torch.jit.trace(module, (example(size, baked),), check_trace=False))
        torch.jit.save(traced, str(path))
    loaded = torch.jit.load(str(path))
    return lambda inputs: torch_outputs(loaded, inputs)


def _executorch(module: nn.Module, size: Size, baked: bool, path: Path) -> Program:
    """A program for XNNPACK with batch size 1, as on a phone."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner  # pyright: ignore[reportMissingImports]
    from executorch.exir import to_edge_transform_and_lower  # pyright: ignore[reportMissingImports]
    from executorch.runtime import Runtime  # pyright: ignore[reportMissingImports]

    program = torch.export.export(module, (example(size, baked, 1),))
    path.write_bytes(to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch().buffer)
    method = Runtime.get().load_program(path).load_method("forward")
    return lambda inputs: np.concatenate(
        [method.execute([torch.from_numpy(inputs[i : i + 1])])[0].numpy() for i in range(len(inputs))]
    )


def _coreml(module: nn.Module, size: Size, baked: bool, path: Path) -> Program:
    import coremltools  # pyright: ignore[reportMissingImports]

    images = example(size, baked, 1)
    traced = torch.jit.trace(module, (images,), check_trace=False)
    inputs = [coremltools.TensorType("images", images.shape, np.uint8 if baked else np.float32)]
    model = coremltools.convert(traced, inputs=inputs, compute_precision=coremltools.precision.FLOAT32)
    model.save(str(path))
    return lambda inputs: np.concatenate(
        [next(iter(model.predict({"images": inputs[i : i + 1]}).values())) for i in range(len(inputs))]
    )
