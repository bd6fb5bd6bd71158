"""What the teacher says of views: computed once, kept in the cache, the same for every run that asks.

A cache folder belongs to one (encoder's weights, size, preprocessing, view settings): `about.json` in it says which.
Inside, an output is found by the image's content hash and the view's number, in blocks of up to 4,096 images. A frozen
teacher stores pooled features, so that every head, budget and seed shares them and logits are a matrix product; a
fine-tuned teacher has another weights' hash and stores logits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tutelage.compute import to_device
from tutelage.data import views
from tutelage.data.decode import fit
from tutelage.data.masks import Masks
from tutelage.data.parts import Parts, draw_parts
from tutelage.data.store import BLOCK, Images
from tutelage.models.adapted import Network, half_precision
from tutelage.retrieval.graph import mixed_logits
from tutelage.runs import hash_of, whole, write_json
from tutelage.sizes import Size, sides

if TYPE_CHECKING:
    import torch

CLEAN = -1  # the number of the view that shows the whole image as evaluation does
CHUNK = 64  # images in one forward pass of the teacher


@dataclass(frozen=True)
class ViewSettings:
    """What all views of a run have in common; part of the cache's key."""

    seed: int = 0
    flip: str = "horizontal"
    area: float = views.CROP_AREA[0]
    colour: float = views.COLOUR
    resize: str = "squash"
    follow: bool = False  # regions are as wide for their height as their image is

    def key(self) -> dict[str, Any]:
        """What a cache of outputs is known by; what is not set stays out of it."""
        return {name: value for name, value in asdict(self).items() if name != "follow" or value}


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
        number: the view, one for all or (B,) integers; or CLEAN.
        settings: of the views.
        network: anything with size (pixels), mean and std (3 floats each).

    Returns:
        (B, 3, size, size) float32, normalised, channels_last, on the CPU.
    """
    import torch

    if isinstance(number, int) and number == CLEAN:
        pixels = np.stack([fit(images[int(i)], network.size, settings.resize) for i in positions])
        return views.to_input(torch.from_numpy(pixels).permute(0, 3, 1, 2), network.mean, network.std)
    pixels, drawn = _pixels_and_views(images, positions, number, settings)
    return views.to_input(views.render(pixels, drawn, network.size), network.mean, network.std, drawn.colours)


def part_input(
    images: Images, positions: np.ndarray, passes: np.ndarray, each: int, settings: ViewSettings, network: Any, area: float
) -> tuple[torch.Tensor, Parts]:  # fmt: skip
    """Another part of a view in each pass, as the input of one network, and which part it is.

    Args:
        passes: (B,) integers; pass e shows a part of view e mod `each`. area: smallest share of the view. Others as of `view_input`.
    """
    pixels, drawn = _pixels_and_views(images, positions, passes % each, settings)
    mirror = settings.flip != "none"
    parts = draw_parts(drawn, images.seeds[positions], passes, settings.seed, area=area, mirror=mirror)
    shown = views.render(pixels, parts.views, network.size)
    return views.to_input(shown, network.mean, network.std, drawn.colours), parts


def _pixels_and_views(
    images: Images, positions: np.ndarray, number: int | np.ndarray, settings: ViewSettings
) -> tuple[list[np.ndarray], views.Views]:
    """The images that views are drawn from, and what the views show of them; arguments as of `view_input`."""
    pixels = [shaped(images[int(i)], settings.resize) for i in positions]
    return pixels, drawn_views(images.seeds[positions], np.array([p.shape[:2] for p in pixels]), number, settings)


def drawn_views(seeds: np.ndarray, sizes: np.ndarray, number: int | np.ndarray, settings: ViewSettings) -> views.Views:
    """What view `number` shows of images with these seeds (B,) and sizes (B, 2), as `view_input` and `view_truth` draw it."""
    area = (settings.area, 1.0)
    return views.draw(
        seeds, sizes, number, settings.seed, flip=settings.flip, area=area, colour=settings.colour, follow=settings.follow
    )  # fmt: skip


def view_truth(
    images: Images, labels: np.ndarray | Masks, positions: np.ndarray, number: int | np.ndarray, settings: ViewSettings, size: Size
) -> torch.Tensor:  # fmt: skip
    """The labels of one view of each image: its class, or the part of its mask that the view shows.

    Args:
        labels: (n,) int64, or n masks. size: of the masks' result. Others as of `view_input`.

    Returns:
        (B,) int64, or (B, H, W) int64 with masks.IGNORE where no class is said.
    """
    import torch

    if isinstance(labels, np.ndarray):
        return torch.from_numpy(labels[positions])
    clean = isinstance(number, int) and number == CLEAN
    drawn = None if clean else drawn_views(images.seeds[positions], images.sizes[positions], number, settings)
    return torch.from_numpy(labels[positions].seen(drawn, sides(size)).astype(np.int64))


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
    """Outputs of one network for views of images, float16, in blocks on disk. clean_only: for whole images alone."""

    def __init__(
        self, cache: str | Path, network: Network, settings: ViewSettings, side: int, clean_only: bool = False
    ):
        about = {
            "encoder": network.name, "weights": network.hash, "output": network.output, "width": network.width,
            "size": network.size, "mean": network.mean, "std": network.std, "store_side": side,
            "precision": network.precision,
        }  # fmt: skip
        self.width, self.name = network.width, network.name
        # whole images look the same whatever the views are like: all runs with this encoder share their outputs
        self.clean = self._made(Path(cache), {**about, "views": {"resize": settings.resize}})
        self.folder = self.clean if clean_only else self._made(Path(cache), {**about, "views": settings.key()})

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
        return self.clean / "clean" if number == CLEAN else self.folder / f"view-{number:04d}"


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
        numbers: views.
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
class Targets:
    """What the student is to match: the adapted teacher's logits for a view, refined by the image's neighbourhood.

    table: one Outputs per view, or None when the teacher runs online. head: outputs (B, D) -> logits (B, C). propagated: (n, C)
    probabilities of each image, or None. temperature: divides the mixed logits; calibrated on held-out labels.
    embedding: mean (D,) and principal axes (D, d) of the outputs, when the student is to match them too.
    """

    images: Images
    network: Network
    head: Callable[[np.ndarray], np.ndarray]
    settings: ViewSettings
    views: int
    table: list[Outputs] | None
    propagated: np.ndarray | None = None
    temperature: float = 1.0
    embedding: tuple[np.ndarray, np.ndarray] | None = None

    def outputs(self, positions: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """(B, D) float32 outputs of the network, from the cache or from the network."""
        out = np.empty((len(positions), self.network.width), dtype=np.float32)
        for number in np.unique(numbers):
            here = numbers == number
            if self.table is None:
                out[here] = run_network(self.network, self.images, positions[here], int(number), self.settings)
            else:
                out[here] = self.table[number].rows(positions[here])
        return out

    def of(self, positions: np.ndarray, epochs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Logits and embedded features of the views that these passes show.

        Args:
            positions: (B,) int64 images. epochs: (B,) int64 passes; pass e shows view e mod M.

        Returns:
            (B, C) float32, and (B, d) float32 (d = 0 without an embedding); of a dense teacher (B, C, h, w) and (B, d, h, w).
        """
        outputs = self.outputs(positions, epochs % self.views)
        logits = self.head(outputs)
        if self.propagated is not None:
            logits = mixed_logits(logits, self.propagated[positions]) / np.float32(self.temperature)
        if self.embedding is None:
            return logits, np.zeros((len(logits), 0), dtype=np.float32)
        mean, basis = self.embedding
        shape = self.network.shape
        features = (as_rows(outputs, shape) - mean) @ basis
        if shape:
            features = np.moveaxis(features.reshape(len(outputs), *shape[1:], -1), -1, 1)
        return logits, features

    def logits(self, positions: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """(B, C) float32 logits, as `of`."""
        return self.of(positions, epochs)[0]
