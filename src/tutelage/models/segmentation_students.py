"""Segmentation students: a small timm encoder with a decoder from torchvision or segmentation-models-pytorch."""

from __future__ import annotations

import torch
from torch import nn

from tutelage.errors import TutelageError
from tutelage.image_size import Size
from tutelage.models.segmentation_grids import DenseNetwork, Level, Pyramid, levels_of, needed_level
from tutelage.models.students import Student, channels_last
from tutelage.models.teachers import build, default_size, input_statistics, resolve
from tutelage.models.weights import parameters_of

STRIDES = {"lraspp": 8, "fpn": 4, "deeplabv3plus": 4}  # of the decoders' outputs
DEEPEST = 32  # stride of the grid on which features are matched


class LRASPP(nn.Module):
    """torchvision's LR-ASPP head on the levels at stride 8 and at the largest stride (Howard et al., ICCV 2019)."""

    def __init__(self, levels: list[Level], classes: int, name: str):
        super().__init__()
        from torchvision.models.segmentation.lraspp import LRASPPHead

        low = needed_level(levels, 8, name, "lraspp")
        self.place = levels.index(low)
        self.head = LRASPPHead(low.channels, levels[-1].channels, classes, 128)

    def forward(self, levels: list[torch.Tensor]) -> torch.Tensor:
        return self.head({"low": levels[self.place], "high": levels[-1]})


class LibraryDecoder(nn.Module):
    """A decoder of segmentation-models-pytorch on the levels at `places`, and a 1x1 convolution from its channels to C classes."""

    def __init__(self, decoder: nn.Module, places: list[int], channels: int, classes: int):
        super().__init__()
        self.decoder, self.places = decoder, places
        self.classify = nn.Conv2d(channels, classes, 1)

    def forward(self, levels: list[torch.Tensor]) -> torch.Tensor:
        return self.classify(self.decoder([levels[place] for place in self.places]))


def fpn(levels: list[Level], classes: int, name: str) -> LibraryDecoder:
    """Return a feature pyramid on strides 4 to 32 (Kirillov et al., CVPR 2019)."""
    from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder

    used = [needed_level(levels, stride, name, "fpn") for stride in (4, 8, 16, 32)]
    channels = [3, used[0].channels, *(level.channels for level in used)]
    decoder = FPNDecoder(channels, pyramid_channels=96, segmentation_channels=64, dropout=0.1)
    return LibraryDecoder(decoder, [levels.index(level) for level in used], decoder.out_channels, classes)


def deeplabv3plus(levels: list[Level], classes: int, name: str) -> LibraryDecoder:
    """Return an atrous pyramid at stride 16 with details at stride 4 (Chen et al., ECCV 2018)."""
    from segmentation_models_pytorch.decoders.deeplabv3.decoder import DeepLabV3PlusDecoder

    fine = needed_level(levels, 4, name, "deeplabv3plus")
    decoder = DeepLabV3PlusDecoder([3, 0, fine.channels, levels[-1].channels], 5, 128, (6, 12, 18), 16, True, 0.1)
    return LibraryDecoder(decoder, [levels.index(fine)] * 3 + [-1], 128, classes)


DECODERS = {"lraspp": LRASPP, "fpn": fpn, "deeplabv3plus": deeplabv3plus}


def build_student(
    name: str, classes: int, weights: str = "scratch", size: Size | None = None, decoder: str = "lraspp"
) -> Student:
    """Build a segmentation student, its decoder always newly initialised; arguments and seeding as for `students.build_student`.

    Args:
        decoder: a name of DECODERS.

    Raises:
        TutelageError: as `students.build_student`; also if the encoder lacks features that the decoder needs.
    """
    name = resolve(name, "student")
    size = default_size(name) if size is None else size
    stride = 16 if decoder == "deeplabv3plus" else None
    try:
        encoder, source = build(name, weights, 0, size, "student", stride)
    except (TutelageError, TypeError) as error:
        if stride is None or "output_stride" not in str(error):
            raise
        raise TutelageError(
            f"--decoder {decoder} on --student {name}: the encoder cannot give an output stride of {stride}",
            "use --decoder lraspp or fpn, or an encoder with dilation, such as tf_efficientnet_lite0 or mobilevitv2_050",
        ) from error
    levels = levels_of(encoder, name, size, "student")
    head = DECODERS[decoder](levels, classes, name)
    module = DenseNetwork(Pyramid(encoder, levels, prune=True), head, 32)
    more = (parameters_of(module), classes, source.text, channels_last(encoder), decoder)
    return Student(module.train(), name, size, *input_statistics(name), *more)


class SegmentationStudentWithProjector(nn.Module):
    """A student with a projection of its features, which only the distillation needs.

    forward: (B, 3, H, W) -> (B, C, *grid) logits and (B, D, *matched) projected features of the deepest level, D = width; None
    instead of the features if width is 0.
    """

    def __init__(self, student: DenseNetwork, grid: tuple[int, int], width: int = 0, matched: tuple[int, int] = (1, 1)):
        super().__init__()
        self.student, self.grid, self.matched = student, grid, matched
        channels = student.pyramid.levels[-1].channels
        self.projection = nn.Conv2d(channels, width, 1) if width else None

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.projection is None:
            return self.student.on_grid(images, self.grid), None
        logits, features = self.student.with_features(images, self.grid, self.matched)
        return logits, self.projection(features)
