"""What the teacher computes for an image: once, kept in the cache, the same for every run that asks.

The teacher looks at the whole image, and at its mirror image where flips are on; the student sees a new random view in every
pass. A cache folder belongs to one (encoder's weights, size, preprocessing): `about.json` in it says which. Inside, an output
is found by the image's content hash, in blocks of up to 4,096 images. A frozen teacher stores pooled features, so that every
head, budget and seed shares them and logits are a matrix product; a fine-tuned teacher has another weights' hash and stores
logits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tutelage.compute import to_device
from tutelage.data import views
from tutelage.data.decode import fit
from tutelage.data.grids import crop_grid
from tutelage.data.masks import Masks
from tutelage.data.store import BLOCK, Images
from tutelage.metrics import log_softmax
from tutelage.models.adapted import Network, half_precision
from tutelage.runs import hash_of, whole, write_json

if TYPE_CHECKING:
    import torch

CLEAN = -1  # the number of the view that shows the whole image as evaluation does
MIRRORED = -2  # and of the one that shows it mirrored
CHUNK = 64  # images in one forward pass of the teacher


@dataclass(frozen=True)
class ViewSettings:
    """What all views of a run have in common."""

    seed: int = 0
    flip: str = "horizontal"
    area: float = views.CROP_AREA[0]
    colour: float = views.COLOUR
    resize: str = "squash"
    follow: bool = False  # regions are as wide for their height as their image is

    @property
    def looks(self) -> tuple[int, ...]:
        """The views of an image whose outputs make its target: the whole image, and its mirror image where flips are on."""
        return (CLEAN,) if self.flip == "none" else (CLEAN, MIRRORED)


def shaped(image: np.ndarray, resize: str) -> np.ndarray:
    """The part of a stored image that views are drawn from: all of it, the centre square, or a square with grey edges.

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
    images: Images, positions: np.ndarray, number: int | np.ndarray, settings: ViewSettings, network: Any
) -> torch.Tensor:
    """One view of each image as the input of one network.

    Args:
        images: where the pixels are.
        positions: (B,) which of them.
        number: the view, one for all or (B,) integers; or CLEAN, or MIRRORED.
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
    pixels = [shaped(images[int(i)], settings.resize) for i in positions]
    drawn = drawn_views(images.seeds[positions], np.array([p.shape[:2] for p in pixels]), number, settings)
    return views.to_input(views.render(pixels, drawn, network.size), network.mean, network.std, drawn.colours)


def drawn_views(seeds: np.ndarray, sizes: np.ndarray, number: int | np.ndarray, settings: ViewSettings) -> views.Views:
    """What view `number` shows of images with these seeds (B,) and sizes (B, 2), as `view_input` and `view_truth` draw it."""
    area = (settings.area, 1.0)
    return views.draw(
        seeds, sizes, number, settings.seed, flip=settings.flip, area=area, colour=settings.colour, follow=settings.follow
    )  # fmt: skip


def view_truth(
    images: Images, labels: np.ndarray | Masks, positions: np.ndarray, number: int | np.ndarray, settings: ViewSettings,
    size: tuple[int, int],
) -> torch.Tensor:  # fmt: skip
    """The labels of one view of each image: its class, or the part of its mask that the view shows.

    Args:
        labels: (n,) int64, or n masks. size: height and width of the masks' result. Others as of `view_input`.

    Returns:
        (B,) int64, or (B, H, W) int64 with masks.IGNORE where no class is said.
    """
    import torch

    if isinstance(labels, np.ndarray):
        return torch.from_numpy(labels[positions])
    clean = isinstance(number, int) and number == CLEAN
    drawn = None if clean else drawn_views(images.seeds[positions], images.sizes[positions], number, settings)
    return torch.from_numpy(labels[positions].seen(drawn, size).astype(np.int64))


def plain_labels(labels: np.ndarray | Masks) -> np.ndarray:
    """(N,) int64: labels, or class numbers of some pixels of masks; to count classes by."""
    return labels if isinstance(labels, np.ndarray) else labels.numbers()


def as_rows(outputs: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(B, D) outputs as they are, or, of a grid (D, h, w), a row for each of its places: (B h w, D)."""
    if not shape:
        return outputs
    return np.moveaxis(outputs.reshape(len(outputs), *shape), 1, -1).reshape(-1, shape[0])


def forward_batches(
    forward: Callable[[torch.Tensor], torch.Tensor], module: torch.nn.Module, network: Any, images: Images, number: int,
    settings: ViewSettings, accelerator: Any, advance: Callable[[int], None] = lambda n: None, batch_size: int = 256,
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:  # fmt: skip
    """What `forward` makes of one view of each image, batch by batch.

    Args:
        forward: (B, 3, H, W) float32 -> (B, ...). module: that it calls; put into evaluation mode.
        network: size, mean and std of its input. number: of the view, or CLEAN.

    Yields:
        (B,) positions of the images, and (B, ...) float32.
    """
    import torch

    module.eval()
    for start in range(0, len(images), batch_size):
        positions = np.arange(start, min(start + batch_size, len(images)))
        batch = to_device(view_input(images, positions, number, settings, network), accelerator.device)
        with torch.inference_mode(), accelerator.autocast():
            output = forward(batch).float()
        yield positions, output
        advance(len(positions))


def view_outputs(*given: Any, **more: Any) -> np.ndarray:
    """(n, D) float32: what `forward_batches`, which takes the same arguments, gives, in one."""
    return np.concatenate([output.cpu().numpy() for _, output in forward_batches(*given, **more)])


class OutputCache:
    """Outputs of one network for whole images, float16, in blocks on disk. resize: how an image becomes a square."""

    def __init__(self, cache: str | Path, network: Network, resize: str, side: int):
        about = {
            "encoder": network.name, "weights": network.hash, "output": network.output, "width": network.width,
            "size": network.size, "mean": network.mean, "std": network.std, "store_side": side,
            "precision": network.precision, "views": {"resize": resize},
        }  # fmt: skip
        self.width, self.name = network.width, network.name
        self.folder = self._made(Path(cache), about)

    @staticmethod
    def _made(cache: Path, about: dict[str, Any]) -> Path:
        folder = cache / f"outputs-{hash_of(about)[:24]}"
        if not (folder / "about.json").exists():
            write_json(folder / "about.json", about)
        return folder

    def table(self, images: Images, number: int) -> Outputs:
        """Where each image's output of view `number` is; `Outputs.missing` names those that have none yet."""
        folder = self._view(number)
        paths = sorted(folder.glob("*.keys.npy"))
        keys = [np.load(path) for path in paths]
        blocks = tuple(np.load(str(path).replace(".keys.npy", ".npy"), mmap_mode="r") for path in paths)
        every = np.concatenate([np.zeros((0, 32), np.uint8), *keys])
        block = np.repeat(np.arange(len(keys)), [len(k) for k in keys])
        row = np.concatenate([np.zeros(0, np.int64), *[np.arange(len(k)) for k in keys]])
        order = np.argsort(as_void(every), kind="stable")
        known, asked = as_void(every)[order], as_void(images.keys)
        at = np.searchsorted(known, asked)
        at = np.minimum(at, max(len(known) - 1, 0))
        hit = known[at] == asked if len(known) else np.zeros(len(asked), bool)
        chosen = order[at] if len(known) else np.zeros(len(asked), np.int64)
        return Outputs(
            np.where(hit, block[chosen] if len(known) else 0, -1),
            row[chosen] if len(known) else chosen,
            blocks,
            self.width,
        )

    def add(self, keys: np.ndarray, outputs: np.ndarray, number: int) -> None:
        """Write one block: keys (n, 32) uint8, outputs (n, D).

        Raises:
            TutelageError: an output is no number, or too large for float16.
        """
        halves = half_precision(outputs, self.name)
        name = hashlib.sha256(keys.tobytes()).hexdigest()[:24]
        for suffix, array in ((".npy", halves), (".keys.npy", keys)):
            with whole(self._view(number) / f"{name}{suffix}") as path, path.open("wb") as file:
                np.save(file, array)

    def _view(self, number: int) -> Path:
        return self.folder / {CLEAN: "clean", MIRRORED: "mirrored"}[number]


def as_void(keys: np.ndarray) -> np.ndarray:
    """(n, 32) uint8 -> (n,) of 32-byte strings that compare, sort and search."""
    return np.ascontiguousarray(keys).view("S32")[:, 0] if len(keys) else np.zeros(0, "S32")


@dataclass(frozen=True)
class Outputs:
    """Cached outputs of one view for a selection of images."""

    block: np.ndarray
    row: np.ndarray
    blocks: tuple[np.ndarray, ...]
    width: int

    @property
    def missing(self) -> np.ndarray:
        """(m,) positions of the images that have no output yet."""
        return np.flatnonzero(self.block < 0)

    def rows(self, positions: np.ndarray | None = None) -> np.ndarray:
        """(B, D) float32 outputs of the images at these positions (default: all)."""
        block = self.block if positions is None else self.block[positions]
        row = self.row if positions is None else self.row[positions]
        assert (block >= 0).all(), "compute_outputs() comes before rows()"
        out = np.empty((len(block), self.width), dtype=np.float32)
        for number in np.unique(block):
            here = np.flatnonzero(block == number)
            out[here] = self.blocks[number][row[here]]
        return out


def run_network(
    network: Network, images: Images, positions: np.ndarray, number: int, settings: ViewSettings
) -> np.ndarray:
    """(B, D) float32 outputs of one view, straight from the network."""
    import torch

    parts = []
    for start in range(0, len(positions), CHUNK):
        batch = view_input(images, positions[start : start + CHUNK], number, settings, network)
        with torch.inference_mode():
            parts.append(network.forward(batch.to(network.device)).float().cpu().numpy())
    return np.concatenate([np.zeros((0, network.width), np.float32), *parts])


def compute_outputs(
    cache: OutputCache,
    network: Network,
    images: Images,
    numbers: Sequence[int],
    settings: ViewSettings,
    advance: Callable[[int], None] = lambda n: None,
    share: tuple[int, int] = (0, 1),
) -> int:
    """Make sure that the cache holds the network's outputs for these views of these images.

    Args:
        cache: of this network and these view settings.
        images: each computed once, however often its content appears.
        numbers: views: CLEAN, MIRRORED.
        advance: called with the number of outputs just computed or found.
        share: (rank, processes): each process does the images whose content hash falls to it.

    Returns:
        how many outputs this call computed.
    """
    rank, processes = share
    computed = 0
    for number in numbers:
        missing = cache.table(images, number).missing
        _, first = np.unique(as_void(images.keys[missing]), return_index=True)
        unique = missing[np.sort(first)]
        advance(len(images) - len(unique))
        unique = unique[
            images.keys[unique, -1] % processes == rank
        ]  # by content: what others have done changes no share
        for start in range(0, len(unique), BLOCK):
            positions, parts = unique[start : start + BLOCK], []
            for at in range(0, len(positions), CHUNK):
                parts.append(run_network(network, images, positions[at : at + CHUNK], number, settings))
                advance(len(parts[-1]))
            cache.add(images.keys[positions], np.concatenate(parts), number)
            computed += len(positions)
    return computed


def gibibytes(images: int, views_each: int, width: int) -> float:
    """GiB that cached outputs take: float16."""
    return images * views_each * width * 2 / 2**30


@dataclass(frozen=True)
class TeacherOutputs:
    """The adapted teacher's outputs for n images, from the cache, or, where `tables` is None, computed when they are asked for.

    head: outputs (B, D) of the network -> (B, C) float32 logits, or (B, C, h, w). settings: of the views. tables: of each look.
    """

    images: Images
    network: Network
    head: Callable[[np.ndarray], np.ndarray]
    settings: ViewSettings
    looks: tuple[int, ...]
    tables: dict[int, Outputs] | None

    def rows(self, positions: np.ndarray, look: int = CLEAN) -> np.ndarray:
        """(B, D) float32 outputs of the network for these images."""
        if self.tables is None:
            return run_network(self.network, self.images, positions, look, self.settings)
        return self.tables[look].rows(positions)

    def log_probabilities(self, positions: np.ndarray) -> np.ndarray:
        """(B, C) float32, or (B, C, h, w) on a grid over the whole image: the mean over the looks, normalised."""
        found = [log_softmax(self.head(self.rows(positions, look))) for look in self.looks]
        found = [
            one[..., ::-1] if look == MIRRORED and one.ndim == 4 else one
            for one, look in zip(found, self.looks, strict=True)
        ]
        return log_softmax(np.mean(found, axis=0))


@dataclass(frozen=True)
class Targets:
    """What the student is to match for each image: one target an image, whatever the view; a grid is cropped as the view is.

    log_probabilities: positions (B,) -> (B, C) float32, or (B, C, h, w) over the whole image. features: positions -> (B, d) float32, or
    (B, d, h, w); None where none are matched. settings: of the views that the student sees.
    """

    images: Images
    settings: ViewSettings
    log_probabilities: Callable[[np.ndarray], np.ndarray]
    features: Callable[[np.ndarray], np.ndarray] | None = None

    def probabilities(
        self, positions: np.ndarray, passes: np.ndarray, temperature: float = 1.0, hard: bool = False
    ) -> np.ndarray:
        """The targets of the views that these passes show.

        Args:
            positions: (B,) int64 images. passes: (B,) int64; pass e shows view e. temperature: divides the log probabilities.
            hard: whether each row (or place of a grid) is 1 for its most likely class and 0 for the others.

        Returns:
            (B, C) float32, or (B, C, h, w), sums over the classes 1; (B, 0) where no class is asked for.
        """
        found = self.log_probabilities(positions)
        if not found.shape[1]:
            return found
        if hard:
            found = np.moveaxis(np.eye(found.shape[1], dtype=np.float32)[found.argmax(axis=1)], -1, 1)
        else:
            found = np.exp(log_softmax(found / np.float32(temperature)))
        return self._seen(found, positions, passes)

    def matched(self, positions: np.ndarray, passes: np.ndarray) -> np.ndarray:
        """(B, d) float32 features, or (B, d, h, w) as these passes show them; d = 0 where none are matched."""
        if self.features is None:
            return np.zeros((len(positions), 0), np.float32)
        return self._seen(self.features(positions), positions, passes)

    def _seen(self, values: np.ndarray, positions: np.ndarray, passes: np.ndarray) -> np.ndarray:
        if values.ndim == 2:
            return values
        sizes = self.images.sizes[positions]
        return crop_grid(values, drawn_views(self.images.seeds[positions], sizes, passes, self.settings), sizes)
