"""Activation ranges with the least squared error in eight bits, tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tutelage.deploy.runtime import session_of
from tutelage.json_object import JSON

SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)  # tried; of the range from smallest to largest value
IMAGES, VALUES = 256, 8192  # images that are measured; values sampled of each tensor in each batch
LEVELS = 255


def least_error(source: Path, inputs: np.ndarray, batch_size: int, ranges: JSON) -> JSON:
    """Narrow the ranges where finer rounding of the many values outweighs clipping the few far ones.

    Args:
        source: the float model. inputs: (n, ...) its inputs. ranges: onnxruntime's calibration file with the smallest and largest values.

    Returns:
        a copy of `ranges` with new bounds.
    """
    samples = _samples(
        source, inputs[:IMAGES], batch_size, sorted(ranges["data"])
    )  # onnxruntime's order is that of a set
    chosen = json.loads(json.dumps(ranges))
    for name, one in chosen["data"].items():
        low, high = (float(one[end]["data"][0]) for end in ("lowest", "highest"))
        share = min(SHARES, key=lambda share: rounding_error(samples[name], low * share, high * share))
        one["lowest"]["data"], one["highest"]["data"] = [low * share], [high * share]
    return chosen


def rounding_error(values: np.ndarray, low: float, high: float) -> float:
    """Mean squared error of rounding values to 256 levels from `low` to `high`, zero among them.

    Worked example: 0, 1 and 10 with levels up to 5: 10 becomes 5, so (0 + 0 + 25) / 3.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    step = (high - low) / LEVELS or 1.0
    first = np.round(low / step)
    rounded = np.clip(np.round(values / step), first, first + LEVELS) * step
    return float(((rounded - values) ** 2).mean())


def _samples(source: Path, inputs: np.ndarray, batch_size: int, names: list[str]) -> dict[str, np.ndarray]:
    """A random sample of the values of each tensor."""
    import onnx

    model = onnx.load(source)
    given = model.graph.input[0].name
    outputs = {one.name for one in model.graph.output}
    for name in names:
        if name not in outputs and name != given:
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = session_of(model.SerializeToString())
    wanted, chance = [name for name in names if name != given], np.random.default_rng(0)
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for at in range(0, len(inputs), batch_size):
        batch = inputs[at : at + batch_size]
        for name, one in zip([*wanted, given], [*session.run(wanted, {given: batch}), batch], strict=True):
            if name in found:
                flat = np.asarray(one, np.float32).reshape(-1)
                found[name].append(flat[chance.integers(0, flat.size, VALUES)] if flat.size > VALUES else flat)
    return {name: np.concatenate(parts) for name, parts in found.items()}
