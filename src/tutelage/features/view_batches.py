"""Batches of views for a network (random augmentations, the whole image, its mirror image), their labels, and network outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tutelage.data import views
from tutelage.data.decode import fit
from tutelage.data.image_cache import Images
from tutelage.data.masks import Labels
from tutelage.device import to_device
from tutelage.progress import Advance

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

Number = int | np.ndarray  # of views: one for all images, or (B,) integers
CLEAN = -1  # number of the view that shows the whole image, as in evaluation
MIRRORED = -2  # number of the view that shows it mirrored
# Images in a batch from which on each one's outputs are the same bits. With fewer, and one thread, torch 2.14 takes other convolutions
# on CPUs: of tf_efficientnet_lite2's features at 112 px, one step of float16 differs in nearly every image.
SAME_BITS = 16


@dataclass(frozen=True)
class ViewSettings:
    """Settings shared by all views of a run."""

    seed: int = 0
    flip: str = "horizontal"
    crop_area: float = views.CROP_AREA[0]
    colour: float = views.COLOUR
    resize: str = "squash"
    follow: bool = False  # aspect ratios of crops vary around the image's instead of around 1

    @property
    def looks(self) -> tuple[int, ...]:
        """The views of an image whose outputs are averaged to its target: the whole image and, with flips on, its mirror image."""
        return (CLEAN,) if self.flip == "none" else (CLEAN, MIRRORED)


def crop_or_pad(image: np.ndarray, resize: str) -> np.ndarray:
    """Return the part of a stored image that views are drawn from: all of it, the centre square, or the image padded square with grey.

    Args:
        image: (H, W, 3) uint8.

    Returns:
        (H', W', 3) uint8.
    """
    height, width = image.shape[:2]
    if resize == "squash" or height == width:
        return image
    side = min(height, width) if resize == "crop" else max(height, width)
    top, left = abs(height - side) // 2, abs(width - side) // 2
    if resize == "crop":
        return image[top : top + side, left : left + side]
    square = np.full((side, side, 3), 128, dtype=np.uint8)
    square[top : top + height, left : left + width] = image
    return square


def view_input(
    images: Images, positions: np.ndarray, number: Number, settings: ViewSettings, network: views.NetworkInput
) -> torch.Tensor:
    """Return one view of each image as input for a network.

    Args:
        images: the stored images.
        positions: (B,) of the images to use.
        number: of the view, one for all or (B,) integers; or CLEAN, or MIRRORED.
        settings: of the views.
        network: anything with size (pixels), mean and std (3 floats each).

    Returns:
        (B, 3, size, size) float32, normalised, channels_last, on the CPU.
    """
    import torch

    if isinstance(number, int) and number < 0:
        pixels = np.stack([fit(images[int(i)], network.size, settings.resize) for i in positions])
        pixels = pixels[:, :, ::-1].copy() if number == MIRRORED else pixels
        return views.to_input(torch.from_numpy(pixels).permute(0, 3, 1, 2), network.mean, network.std)
    pixels = [crop_or_pad(images[int(i)], settings.resize) for i in positions]
    drawn = drawn_views(images.seeds[positions], np.array([p.shape[:2] for p in pixels]), number, settings)
    return views.to_input(views.render(pixels, drawn, network.size), network.mean, network.std, drawn.colours)


def drawn_views(seeds: np.ndarray, sizes: np.ndarray, number: Number, settings: ViewSettings) -> views.Views:
    """Return the random crops, flips and colours of view `number`, given the images' seeds (B,) and sizes (B, 2)."""
    area = (settings.crop_area, 1.0)
    return views.draw(
        seeds,
        sizes,
        number,
        settings.seed,
        flip=settings.flip,
        area=area,
        colour=settings.colour,
        follow=settings.follow,
    )


def view_truth(
    images: Images, labels: Labels, positions: np.ndarray, number: Number, settings: ViewSettings, size: tuple[int, int]
) -> torch.Tensor:
    """Return the labels of one view of each image: its class, or the part of its mask that the view shows.

    Args:
        labels: (n,) int64, or n masks. size: height and width of the returned masks. Other arguments as for `view_input`.

    Returns:
        (B,) int64, or (B, H, W) int64 with masks.IGNORE for pixels without a label.
    """
    import torch

    if isinstance(labels, np.ndarray):
        return torch.from_numpy(labels[positions])
    clean = isinstance(number, int) and number == CLEAN
    drawn = None if clean else drawn_views(images.seeds[positions], images.sizes[positions], number, settings)
    return torch.from_numpy(labels[positions].seen(drawn, size).astype(np.int64))


def plain_labels(labels: Labels) -> np.ndarray:
    """Return (N,) int64 class numbers for counting classes: the labels, or those of a sample of the masks' pixels."""
    return labels if isinstance(labels, np.ndarray) else labels.numbers()


def as_rows(outputs: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return (B, D) outputs unchanged; if `shape` is a grid (D, h, w), return one row per grid cell: (B h w, D)."""
    if not shape:
        return outputs
    return np.moveaxis(outputs.reshape(len(outputs), *shape), 1, -1).reshape(-1, shape[0])


@dataclass(frozen=True)
class Inference:
    """Stored images to apply a network to, and how.

    views: settings of the views of the images. accelerator: its device and precision. labels: of the images, where they are known.
    batch_size: images in one forward pass. advance: called with the number of images that were just computed.
    """

    images: Images
    views: ViewSettings
    accelerator: Accelerator
    labels: Labels | None = None
    batch_size: int = 256
    advance: Advance = lambda count: None


def at_least(forward: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
    """Return `forward` of a batch, computed with SAME_BITS images or more: its last image is repeated, and what comes of that left out.

    So an image's outputs are the same bits in whatever batch it is, and a gallery's wherever it lies and however it is cut.

    Args:
        batch: (B, 3, H, W) float32, channels_last.

    Returns:
        (B, ...)
    """
    import torch

    if len(batch) >= SAME_BITS:
        return forward(batch)
    rows = torch.arange(SAME_BITS, device=batch.device).clamp(max=len(batch) - 1)
    return forward(batch[rows].contiguous(memory_format=torch.channels_last))[: len(batch)]


def forward_batches(
    forward: Callable[[torch.Tensor], torch.Tensor],
    module: torch.nn.Module,
    network: views.NetworkInput,
    inference: Inference,
    number: int,
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Yield the outputs of `forward` for one view of each image, batch by batch.

    Args:
        forward: (B, 3, H, W) float32 -> (B, ...).
        module: the one that `forward` calls; put into evaluation mode.
        network: size, mean and std of its input.
        inference: the images and how to compute.
        number: of the view, or CLEAN.

    Yields:
        (B,) positions of the images, and their (B, ...) float32 outputs.
    """
    import torch

    module.eval()
    images, size, device = inference.images, inference.batch_size, inference.accelerator.device
    for start in range(0, len(images), size):
        positions = np.arange(start, min(start + size, len(images)))
        batch = to_device(view_input(images, positions, number, inference.views, network), device)
        with torch.inference_mode(), inference.accelerator.autocast():
            output = (at_least(forward, batch) if size >= SAME_BITS else forward(batch)).float()
        yield positions, output
        inference.advance(len(positions))


def view_outputs(
    forward: Callable[[torch.Tensor], torch.Tensor],
    module: torch.nn.Module,
    network: views.NetworkInput,
    inference: Inference,
    number: int,
) -> np.ndarray:
    """Return the outputs of `forward_batches`, which takes the same arguments, as one (n, ...) float32 array."""
    batches = forward_batches(forward, module, network, inference, number)
    return np.concatenate([output.cpu().numpy() for _, output in batches])
