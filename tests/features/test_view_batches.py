"""Batches of views for a network: what an image's outputs do not depend on."""

from __future__ import annotations

import pytest
import torch

from tutelage.features.view_batches import SAME_BITS, at_least
from tutelage.models.teachers import build_teacher


@pytest.fixture(scope="module")
def network():
    """A network with depthwise convolutions, on one thread, where small batches take other paths through torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield build_teacher("tf_efficientnet_lite0", "scratch", 64).module
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 7, 15, 16, 17])
def test_outputs_are_the_same_bits_in_whatever_batch(network, count: int):
    """The features of an image do not depend on how many others are computed with it, bit for bit."""
    images = torch.randn(40, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        together, alone = network(images), at_least(network, images[:count])
    assert torch.equal(alone, together[:count])
    assert len(alone) == count


def test_only_small_batches_are_filled():
    """A batch that is large enough is computed as it is; a small one with copies of its last image, in the network's layout."""
    seen = []

    def forward(batch: torch.Tensor) -> torch.Tensor:
        seen.append(batch)
        return batch.mean((2, 3))

    for count in (SAME_BITS, 3):
        images = torch.rand(count, 3, 4, 4).contiguous(memory_format=torch.channels_last)
        assert torch.equal(at_least(forward, images), images.mean((2, 3)))
        assert len(seen[-1]) == SAME_BITS
        assert seen[-1].is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(seen[-1][count - 1 :], images[-1:].expand(SAME_BITS - count + 1, -1, -1, -1))
