"""Export a student as an ONNX graph: branches fused, batch size free, normalisation and softmax included on request."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tutelage.deploy.silence_output import quiet
from tutelage.errors import TutelageError
from tutelage.image_size import Size, sides

INPUT, OUTPUT = "images", "logits"
BAKED_INPUT, BAKED_OUTPUT = "pixels", "probabilities"
OPSET = 20


class WithPreprocessing(nn.Module):
    """A student with normalisation and softmax: (B, H, W, 3) uint8 pixels -> (B, C) or (B, C, H, W) float32 probabilities."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, module: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.module = module
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        images = pixels.permute(0, 3, 1, 2).to(torch.float32) / 255
        return self.module((images - self.mean) / self.std).softmax(1)


def fused(module: nn.Module) -> nn.Module:
    """A copy in evaluation mode with parallel branches merged into one convolution, where a model has them (FastViT, RepVGG, RepViT)."""
    from timm.utils.model import reparameterize_model

    with torch.no_grad():
        return reparameterize_model(copy.deepcopy(module).cpu().float().eval()).eval()


def example(size: Size, baked: bool, batch: int = 2) -> torch.Tensor:
    """Random input of a student: (B, 3, H, W) float32, or (B, H, W, 3) uint8 if preprocessing is baked in."""
    height, width = sides(size)
    chance = torch.Generator().manual_seed(0)
    if baked:
        return torch.randint(0, 256, (batch, height, width, 3), generator=chance, dtype=torch.uint8)
    return torch.randn(batch, 3, height, width, generator=chance)


def write_onnx(module: nn.Module, size: Size, baked: bool, path: Path) -> None:
    """Write a module as one ONNX file with a free batch size, without the exporter's metadata on every node.

    Args:
        module: in evaluation mode; takes what `example` gives.
        size: of the input.

    Raises:
        TutelageError: an operation cannot be exported; the message names the layer.
    """
    import onnx

    images = example(size, baked)
    try:
        program = _exported(module, images, names=(BAKED_INPUT, BAKED_OUTPUT) if baked else (INPUT, OUTPUT))
    except Exception as error:
        name, reason = _culprit(module, images, error)
        hint = "choose a student whose operations all have an ONNX form"
        raise TutelageError(f"{name} cannot be exported: {reason}", hint) from error
    model = program.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]
    for value in (*model.graph.value_info, *model.graph.initializer, *model.graph.input, *model.graph.output):
        del value.metadata_props[:]
    del model.metadata_props[:], model.graph.metadata_props[:]
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def _exported(module: nn.Module, images: torch.Tensor, names: tuple[str, str] | None = None) -> torch.onnx.ONNXProgram:
    """Run torch's ONNX exporter with its progress output suppressed."""
    inputs, outputs = ([names[0]], [names[1]]) if names else (None, None)
    with quiet(logging.ERROR), torch.no_grad():
        program = torch.onnx.export(
            module,
            (images,),
            input_names=inputs,
            output_names=outputs,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            optimize=True,
            verbose=False,
        )
    assert program is not None  # with dynamo
    return program


def _culprit(part: nn.Module, given: torch.Tensor, error: Exception, name: str = "") -> tuple[str, str]:
    """Find the smallest submodule that cannot be exported by itself, and the reason. name: of `part` in the student."""
    for child_name, one in _inputs_of_children(part, given).items():
        child = part.get_submodule(child_name)
        try:
            _exported(child, one)
        except Exception as fault:
            return _culprit(child, one, fault, f"{name}.{child_name}" if name else child_name)
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    where = f"layer {name} ({type(part).__name__})" if name else "the student"
    return where, " ".join(str(cause).split())[:200]


def _inputs_of_children(module: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The input that each child with a single tensor argument gets in a forward pass."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str, _: nn.Module, given: tuple[object, ...]) -> None:
        if len(given) == 1 and isinstance(given[0], torch.Tensor):
            found.setdefault(name, given[0].detach())

    with torch.no_grad(), contextlib.suppress(Exception), contextlib.ExitStack() as hooks:
        for name, child in module.named_children():
            hooks.enter_context(child.register_forward_pre_hook(functools.partial(keep, name)))
        module(images)
    return found


def torch_outputs(module: nn.Module, inputs: np.ndarray, batch_size: int = 256) -> np.ndarray:
    """Run a module on the CPU in batches: (n, ...) model inputs -> (n, C) float32."""
    with torch.inference_mode():
        batches = (torch.from_numpy(inputs[at : at + batch_size]) for at in range(0, len(inputs), batch_size))
        return np.concatenate([module(batch).numpy() for batch in batches])
