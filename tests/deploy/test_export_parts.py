"""The parts of an export by themselves: the fused graph, eight-bit choices, licences, and the layer that cannot be exported."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from tutelage.commands.export import recommended
from tutelage.deploy import onnx_graph, predict_bundle, quantise, runtime
from tutelage.deploy.model_card import as_code, licence_note
from tutelage.errors import TutelageError


@pytest.mark.parametrize("name", ["fastvit_t8", "repvit_m0_9", "repvgg_a0"])
def test_fused_form(name):
    """Parallel branches become one convolution with the same outputs, and the student itself stays as it was."""
    torch.manual_seed(0)
    module = timm.create_model(name, num_classes=3).train()
    with torch.no_grad():
        module(torch.randn(4, 3, 64, 64))  # statistics of BatchNorm other than 0 and 1
    module.eval()
    before = sum(p.numel() for p in module.parameters())
    fused, images = onnx_graph.fused(module), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(fused(images), module(images), atol=2e-4, rtol=1e-3)
    assert sum(1 for part in fused.modules() if isinstance(part, nn.BatchNorm2d)) < sum(
        1 for part in module.modules() if isinstance(part, nn.BatchNorm2d)
    )
    assert sum(p.numel() for p in module.parameters()) == before


class Odd(nn.Module):
    """A layer with an operation that ONNX has not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x)


@pytest.mark.slow
def test_layer_that_cannot_be_exported(tmp_path):
    """The message names the layer."""
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU(), Odd()), nn.Flatten(), nn.LazyLinear(2))
    module(torch.zeros(1, 3, 8, 8))
    with pytest.raises(TutelageError, match=r"layer 1\.1 \(Odd\) cannot be exported: .*bessel"):
        onnx_graph.write_onnx(module.eval(), 8, False, tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()


def small_network(path, outlier: float) -> None:
    """Two convolutions and a linear layer as ONNX; the second convolution's input has an outlier channel."""
    chance = np.random.default_rng(0)
    first = chance.normal(size=(8, 3, 3, 3)).astype(np.float32)
    first[0] *= outlier
    second = chance.normal(size=(8, 8, 3, 3)).astype(np.float32) / 5
    second[:, 0] /= outlier
    weights = {
        "first.weight": first, "first.bias": np.zeros(8, np.float32), "second.weight": second, "second.bias": np.zeros(8, np.float32),
        "head.weight": chance.normal(size=(3, 8)).astype(np.float32), "head.bias": np.zeros(3, np.float32),
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["images", "first.weight", "first.bias"], ["a"], "conv_first"),
        helper.make_node("Relu", ["a"], ["b"], "relu"),
        helper.make_node("Conv", ["b", "second.weight", "second.bias"], ["c"], "conv_second"),
        helper.make_node("GlobalAveragePool", ["c"], ["d"], "pool"),
        helper.make_node("Flatten", ["d"], ["e"], "flat"),
        helper.make_node("Gemm", ["e", "head.weight", "head.bias"], ["logits"], "head", transB=1),
    ]
    made = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


def test_layers_stay_float_until_it_holds(tmp_path):
    """Where all layers in int8 lose too much, the costly ones stay float, they are named, and then the limit holds."""
    small_network(tmp_path / "m.onnx", 300)
    images = np.random.default_rng(1).normal(size=(400, 3, 8, 8)).astype(np.float32)
    told: list[str] = []
    found = quantise.quantise(
        tmp_path / "m.onnx", tmp_path / "q.onnx", images[:200], images[200:], 0.006, lambda logits: logits, told.append
    )
    assert found.layers == 3
    assert max(one["lost"] for one in found.tried) > 0.002
    assert 0 < len(found.kept_float) < 3
    assert set(found.kept_float) <= {"first", "second", "head"}
    assert found.lost <= 0.002
    reference = runtime.session_of(tmp_path / "m.onnx").run(None, {"images": images[200:]})[0]
    again = runtime.session_of(tmp_path / "q.onnx").run(None, {"images": images[200:]})[0]
    assert quantise.expected_loss(reference, again) == pytest.approx((found.lost, found.agreement))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "q.onnx"]
    assert "loses least" in told[0]


def test_decisions_count_where_all_probabilities_are_alike(tmp_path):
    """A model whose probabilities are nearly equal seems to lose nothing, but its changed decisions count, and held-out labels most."""
    small_network(tmp_path / "m.onnx", 300)
    images = np.random.default_rng(1).normal(size=(400, 3, 8, 8)).astype(np.float32)
    whole = (tmp_path / "m.onnx", tmp_path / "q.onnx", images[:200], images[200:])
    flat = quantise.quantise(*whole, 0.006, lambda logits: logits / 1e4)
    assert max(one["lost"] for one in flat.tried) > 0.002
    assert flat.kept_float
    assert flat.lost <= 0.002
    labels = runtime.session_of(whole[0]).run(None, {"images": images[200:]})[0].argmax(1)
    held_out = quantise.HeldOut(images[200:], lambda outputs: float((outputs.argmax(1) == labels).mean()))
    strict = quantise.quantise(*whole, 0.004, lambda logits: np.zeros_like(logits), held_out=held_out)
    assert {one["lost"] for one in strict.tried} == {0.0}, "the expected loss knows of nothing here"
    assert max(one["measured"] for one in strict.tried) > 0.004
    assert strict.kept_float
    found = runtime.session_of(whole[1]).run(None, {"images": images[200:]})[0].argmax(1)
    assert float((found == labels).mean()) >= 1 - 0.004


@pytest.mark.parametrize(
    ("of_float", "of_int8", "agreement", "best"),
    [
        (0.9, 0.895, 0.95, "model.int8.onnx"),
        (0.9, 0.75, 0.84, "model.onnx"),
        (None, None, 0.84, "model.onnx"),
        (None, None, 0.95, "model.int8.onnx"),
        (0.9, math.nan, 1.0, "model.onnx"),
        (0.5, 0.5, 0.5, "model.onnx"),
    ],
)
def test_what_loses_too_much_is_not_recommended(of_float, of_int8, agreement, best):
    """The faster file is recommended only if it loses no more than --int8-loss, as measured; without labels, if few decisions change."""
    latency = {"model.onnx": {"median_ms": 2.0}, "model.int8.onnx": {"median_ms": 1.0}}
    files = {
        "model.onnx": {"score": of_float, "agreement": 1.0},
        "model.int8.onnx": {"score": of_int8, "agreement": agreement},
    }
    assert recommended(latency, files, 0.01) == best


def test_no_choice_of_layers_holds(tmp_path):
    """Where even one int8 layer loses too much, the message says what all together would lose."""
    small_network(tmp_path / "m.onnx", 300)
    images = np.random.default_rng(1).normal(size=(400, 3, 8, 8)).astype(np.float32)
    with pytest.raises(TutelageError, match="--no-int8"):
        quantise.quantise(
            tmp_path / "m.onnx", tmp_path / "q.onnx", images[:200], images[200:], -1.0, lambda logits: logits
        )
    assert not (tmp_path / "q.onnx").exists()


def test_expected_loss():
    """The worked example: 0.6 - 0.4 is lost on the one image whose decision differs, and half of the decisions agree."""
    reference = np.log(np.array([[0.6, 0.4], [0.9, 0.1]]))
    assert quantise.expected_loss(reference, np.array([[0.0, 1.0], [1.0, 0.0]])) == pytest.approx((0.1, 0.5))


@pytest.mark.parametrize(
    ("licence", "says"),
    [
        ("Apache-2.0", "any use"),
        ("unknown", "Look it up"),
        ("CC-BY-NC-4.0", "may limit"),
        ("DINOv3 License", "may limit"),
    ],
)
def test_licence_notes(licence, says):
    """What the teacher's licence means is said for free ones, for others, and for those that are not known."""
    assert says in licence_note(licence)


def test_single_file_is_the_same_code():
    """predict.py holds the decode, the resize and the runner word for word, and imports nothing of tutelage."""
    import inspect

    from tutelage.data import decode

    text = predict_bundle.predict_file("1.2.3")
    compile(text, "predict.py", "exec")
    for part in (decode.decode, decode.fit, runtime.predict_images, runtime.model_input):
        assert inspect.getsource(part) in text
    assert "import tutelage" not in text
    assert "from tutelage" not in text


@pytest.mark.parametrize("shape", [(5, 7), (3, 4), (64, 33), (200, 90)])
def test_masks_are_enlarged_as_torch_does(shape):
    """Logits of a small grid give the mask that torch's interpolation gives, at any size."""
    from tutelage.data.upsample import decided

    logits = np.random.default_rng(0).normal(size=(4, 5, 7)).astype(np.float32)
    expected = (
        torch.nn.functional.interpolate(torch.from_numpy(logits)[None], shape, mode="bilinear")[0].argmax(0).numpy()
    )
    assert (decided(logits, *shape) == expected).mean() > 0.999


def test_rounding_error_by_hand():
    """The worked example of the docstring, and a range whose ends are exact."""
    from tutelage.deploy.activation_ranges import rounding_error

    assert rounding_error(np.array([0.0, 1.0, 10.0]), 0.0, 5.0) == pytest.approx(25 / 3, abs=1e-3)
    assert rounding_error(np.array([-1.0, 0.0, 1.0]), -1.0, 1.0) < (2 / 255) ** 2


@pytest.mark.parametrize(
    "name",
    [
        " one",
        "two  blanks",
        "&lt;i>",
        "*b*",
        "_c_",
        "<b>",
        "a|b",
        "`",
        "``x`",
        " `y` ",
        "[z](u)",
        "\\",
        "\\|",
        "$1$",
        "~~s~~",
        "1. x",
    ],
)
def test_class_names_in_the_card_read_as_they_are(name: str):
    """In text, in a list and in a table of Markdown a class name comes out letter by letter."""
    from markdown_it import MarkdownIt  # rich needs it

    def codes(tokens: list) -> list[str]:
        return [one.content for token in tokens for one in token.children or () if one.type == "code_inline"]

    reader = MarkdownIt("commonmark").enable("table")
    span = as_code(name)
    assert (
        codes(reader.parse(f"It distinguishes: {span}, {span}.\n\n- {span} mistaken for {span}: 3 %\n")) == [name] * 4
    )
    cell = span.replace("|", "\\|")
    assert codes(reader.parse(f"| class | images |\n|---|---|\n| {cell} | 3 |\n| {cell} | 4 |\n")) == [name] * 2
