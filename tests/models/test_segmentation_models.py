"""Dense networks: places line up from the image to every grid, for each kind of encoder and decoder."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import timm
import torch
from torch import nn

from tutelage.errors import TutelageError
from tutelage.models.linear_probe import cross_validate
from tutelage.models.segmentation_grids import DenseNetwork, Pyramid, levels_of, padded, regrid, window_starts
from tutelage.models.segmentation_heads import DenseHead, LinearMask, fit_probe, new_head
from tutelage.models.segmentation_students import build_student
from tutelage.models.segmentation_teachers import multiple_of, pyramid_of, whole_teacher
from tutelage.models.teachers import build_teacher

PLACES = ((20, 40), (70, 24), (100, 120), (44, 136))  # middle of the square, row and column


def square(place: tuple[int, int], size: tuple[int, int] = (128, 160), side: int = 24) -> torch.Tensor:
    """(1, 3, H, W): a bright square on grey."""
    image = torch.zeros(1, 3, *size)
    top, left = place[0] - side // 2, place[1] - side // 2
    image[:, :, max(top, 0) : top + side, max(left, 0) : left + side] = 2.0
    return image


def middle(change: torch.Tensor) -> tuple[float, float]:
    """Middle of the strongest part of a map (h, w), as shares of height and width."""
    weight = (change * (change > 0.5 * change.max())).double()
    rows, columns = (torch.arange(n, dtype=torch.float64) + 0.5 for n in change.shape)
    total = weight.sum()
    return float((weight.sum(1) @ rows) / total / change.shape[0]), float(
        (weight.sum(0) @ columns) / total / change.shape[1]
    )


@pytest.fixture(scope="module")
def small_vits():
    """timm makes its small ViTs with two blocks while these tests run."""
    import timm.models.vision_transformer as vit

    before = vit.VisionTransformer.__init__

    def shallow(self, *args, **options):
        before(self, *args, **{**options, "depth": 2})

    vit.VisionTransformer.__init__ = shallow
    yield
    vit.VisionTransformer.__init__ = before


@pytest.mark.parametrize(
    ("name", "size", "window"),
    [
        ("vit_small_patch14_dinov2", "126x154", None),
        ("vit_small_patch14_dinov2", "126x154", "70x98"),
        ("vit_small_patch14_reg4_dinov2", "126x154", None),
        ("vit_tiny_patch16_224", "128x160", None),
        ("tf_efficientnet_lite0", "128x160", None),
        ("tf_efficientnet_lite0", "128x160", "64x96"),
    ],
)
def test_a_square_is_where_it_was_in_the_teachers_grid(name, size, window, small_vits):
    """Patch tokens without class and register tokens, or levels of a CNN, by windows too: what a square changes lies at its place."""
    encoder = build_teacher(name, "scratch", size, window)
    height, width = (int(side) for side in size.split("x"))
    pyramid = pyramid_of(encoder)
    with torch.no_grad():
        empty = pyramid(torch.zeros(1, 3, height, width))
        for place in PLACES:
            seen = pyramid(square(place, (height, width)))
            for level, before, after in zip(pyramid.levels, empty, seen, strict=True):
                if level.stride > 8 and len(seen) > 1:
                    continue  # a random CNN's deep features answer to half of the image
                assert after.shape[-2:] == (-(-height // level.stride), -(-width // level.stride))
                change = (after - before).abs().mean(dim=1)[0]
                found = middle(change)
                tolerance = max(
                    1.2 * level.stride, 12 if window else 8
                )  # one edge may answer more than the other, and those of windows too
                assert abs(found[0] * height - place[0]) <= tolerance, (level, place)
                assert abs(found[1] * width - place[1]) <= tolerance, (level, place)


@pytest.mark.parametrize(
    ("name", "decoder"),
    [("mobilenetv3_small_050", "lraspp"), ("mobilenetv3_small_050", "fpn"), ("tf_efficientnet_lite0", "deeplabv3plus")],
)
@pytest.mark.parametrize("size", [(128, 160), (120, 150)])
def test_a_square_is_where_it_was_in_the_students_map(name, decoder, size):
    """Output at full size, also when inputs are padded inside: the change that a square makes lies at its place."""
    if decoder != "lraspp":
        pytest.importorskip("segmentation_models_pytorch", reason="segmentation-models-pytorch is not installed")
    torch.manual_seed(0)
    module = build_student(name, 5, "scratch", f"{size[0]}x{size[1]}", decoder).module.eval()
    with torch.no_grad():
        empty = module(torch.zeros(1, 3, *size))
        assert empty.shape == (1, 5, *size)
        for place in PLACES[:3]:
            seen = square(place, size)
            found = middle((module(seen) - empty).abs().mean(dim=1)[0])
            assert abs(found[0] * size[0] - place[0]) <= 12, (place, found)
            assert abs(found[1] * size[1] - place[1]) <= 12, (place, found)
            grid = module.on_grid(seen, (size[0] // 8, size[1] // 8))
            whole = torch.nn.functional.adaptive_avg_pool2d(module(seen), grid.shape[-2:])
            assert torch.corrcoef(torch.stack([grid.flatten(), whole.flatten()]))[0, 1] > 0.97


def test_windows():
    """Windows cover every side and begin at multiples of the stride; what one window alone sees has its features."""
    assert window_starts(512, 256, 32) == [0, 128, 256]
    assert window_starts(256, 256, 32) == window_starts(224, 256, 32) == [0]
    for side, window, unit in ((320, 96, 32), (1036, 518, 14), (154, 98, 14), (96, 64, 32), (64, 32, 32)):
        starts = window_starts(side, window, unit)
        assert starts[0] == 0
        assert starts[-1] == side - window
        assert all(start % unit == 0 for start in starts)
        assert max(np.diff(starts)) <= max(window // 2, unit), "half a window apart at most"
    encoder = build_teacher("tf_efficientnet_lite0", "scratch", "64x128", "64x64")
    image = torch.randn(2, 3, 64, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, left = pyramid_of(encoder)(image), pyramid_of(encoder)(image[..., :64])
        middle_part = pyramid_of(encoder)(image[..., 32:96])
    for level, one, first, second in zip(pyramid_of(encoder).levels, whole, left, middle_part, strict=True):
        cells = 32 // level.stride
        torch.testing.assert_close(one[..., :cells], first[..., :cells])
        torch.testing.assert_close(one[..., cells : 2 * cells], (first[..., cells:] + second[..., :cells]) / 2)


def test_windows_that_the_deepest_level_does_not_fill():
    """Sizes that are no multiples of the deepest stride are refused, and those that are named instead give finite features."""
    encoder = build_teacher("efficientvit_m0", "scratch", "160x224", "96x160")
    with pytest.raises(TutelageError, match="multiples of 64 px") as error:
        pyramid_of(encoder)
    assert "--teacher-window 128x192 --teacher-size 192x256" in error.value.hint
    encoder = build_teacher("efficientvit_m0", "scratch", "192x256", "128x192")
    with torch.no_grad():
        found = pyramid_of(encoder).eval()(torch.randn(1, 3, 192, 256))
    assert found[-1].shape[-2:] == (3, 4)
    assert all(one.isfinite().all() for one in found)


def test_padding_never_reaches_the_loss():
    """What stands in the padded edges changes no logit's place, and full size is the image's own."""
    images = torch.randn(2, 3, 50, 70)
    assert padded(images, 32).shape == (2, 3, 64, 96)
    assert padded(images, 10) is images
    module = build_student("mobilenetv3_small_050", 3, "scratch", "50x70").module.eval()
    with torch.no_grad():
        assert module(images).shape == (2, 3, 50, 70)
        assert module.on_grid(images, (7, 9)).shape == (2, 3, 7, 9)
        assert module.features(images, (2, 3)).shape[-2:] == (2, 3)


def test_grids():
    """A coarser grid has means, a finer one goes between; the same grid is the same tensor."""
    values = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert regrid(values, (4, 4)) is values
    assert regrid(values, (2, 2)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert regrid(values, (8, 8)).shape == (1, 1, 8, 8)


@pytest.mark.parametrize(
    ("name", "decoder", "told"),
    [
        ("mobilenetv3_small_100", "deeplabv3plus", "cannot give an output stride of 16"),
        ("efficientvit_m0", "fpn", "no features at stride 4"),
        ("vit_tiny_patch16_224", "lraspp", "no features at stride 8"),
    ],
)
def test_encoders_that_a_decoder_cannot_use(name, decoder, told):
    """One clear error for an encoder without the strides that a decoder needs."""
    if decoder != "lraspp":
        pytest.importorskip("segmentation_models_pytorch", reason="segmentation-models-pytorch is not installed")
    with pytest.raises(TutelageError, match=told):
        build_student(name, 3, "scratch", 64 if "vit_tiny" not in name else 224, decoder)


def test_the_student_carries_no_dead_weight():
    """Layers that no level needs, and the classifier of the encoder, are not shipped."""
    student = build_student("mobilenetv3_small_100", 11, "scratch", 64)
    whole = sum(p.numel() for p in timm.create_model("mobilenetv3_small_100").parameters())
    assert student.parameters < whole / 2
    images = torch.randn(2, 3, 64, 64)
    student.module(images).sum().backward()
    assert all(p.grad is not None for p in student.module.parameters())


def test_a_model_without_layers_is_refused():
    """An encoder that gives no features of single layers is refused by name."""
    with pytest.raises(TutelageError, match="no features of intermediate layers"):
        levels_of(nn.Conv2d(3, 4, 1), "a_model", 32)


# Heads


@pytest.mark.slow
def test_a_probe_learns_and_is_the_same_again():
    """A linear head separates two planes of features, leaves pixels of no class out, and comes out the same twice."""
    random = np.random.default_rng(0)
    truth = random.integers(0, 2, (6, 5, 7))
    features = random.normal(size=(6, 4, 5, 7)).astype(np.float32)
    features[:, 0] += 4 * truth
    truth[0, :3] = 255
    layout = ((4, 5, 7),)
    heads = [fit_probe(features.reshape(6, -1), truth, 2, 400, layout) for _ in range(2)]
    assert isinstance(heads[0].module, LinearMask)
    logits = heads[0](features.reshape(6, -1))
    known = truth < 2
    assert logits.shape == (6, 2, 5, 7)
    assert (logits.argmax(1) == truth)[known].mean() > 0.95
    assert np.array_equal(logits, heads[1](features.reshape(6, -1)))
    fit = partial(fit_probe, classes=2, strength=400, scale=layout)
    held = cross_validate(fit, features.reshape(1, 6, -1), truth, np.arange(6) % 3, 2)
    assert (held.argmax(1) == truth)[known].mean() > 0.9


def test_a_fine_tuned_teacher_starts_from_the_probe():
    """The whole network from a fitted head gives the head's logits, divided by its temperature."""
    encoder = build_teacher("tf_efficientnet_lite0", "scratch", 64)
    pyramid = pyramid_of(encoder)
    with torch.no_grad():
        levels = pyramid(torch.randn(1, 3, 64, 64))
    layout = tuple((one.shape[1], one.shape[2], one.shape[3]) for one in levels)
    head = DenseHead(new_head(layout, 3).eval(), layout, 0.5)
    whole = whole_teacher(encoder, encoder.module, 3, head).eval()
    rows = torch.cat([one.flatten(1) for one in levels], dim=1).numpy()
    with torch.no_grad():
        ours = whole.head(levels) / whole.temperature
    assert isinstance(whole, DenseNetwork)
    assert isinstance(whole.pyramid, Pyramid)
    assert multiple_of(encoder) == 32
    np.testing.assert_allclose(ours.numpy(), head(rows), atol=1e-5)
