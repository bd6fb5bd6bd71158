"""What the transfer costs beside the bare student: python benchmarks/transfer_overhead.py

Compares one epoch of the distillation with cached targets (views made, targets looked up, KL, step, average) with a bare loop of the
student's forward, backward and step on tensors in memory, for a store of 32 px and one of 224 px images, and, with a ViT-S/14
teacher at 98 px, the online loop. All are interleaved, the median of 5 is told, ratios are what counts.

Images: CIFAR-10 and photos under $TUTELAGE_TEST_DATA. Teacher for the online loop: --teacher-weights FILE (else random).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from tutelage.device import accelerator, prepare_process

prepare_process()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from tutelage.data.image_cache import Images, Store  # noqa: E402
from tutelage.data.sources import list_images  # noqa: E402
from tutelage.distillation.distill_loop import Plan, distill_student  # noqa: E402
from tutelage.distillation.targets import Targets, TeacherOutputs  # noqa: E402
from tutelage.features.output_cache import OutputCache  # noqa: E402
from tutelage.features.view_batches import ViewSettings  # noqa: E402
from tutelage.models.adapted_teacher import network_of  # noqa: E402
from tutelage.models.students import build_student  # noqa: E402
from tutelage.models.teachers import build_teacher  # noqa: E402
from tutelage.training import loop, optimization  # noqa: E402

IMAGES, BATCH, SIZE, CLASSES, WIDTH = 2560, 128, 64, 10, 384
DATA = Path(os.environ.get("TUTELAGE_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


def images_of(path: Path, side: int, cache: Path) -> Images:
    """2,560 decoded images, repeated when there are fewer."""
    refs = list_images(path)[0][:IMAGES]
    store = Store(cache, side)
    store.add(refs)
    images = store.find(refs)[0]
    return images.take(np.arange(IMAGES) % len(images))


def bare(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Seconds of forward, backward and step on tensors in memory."""
    module, optimizer = fresh()[1:3]
    module.train()
    start = time.perf_counter()
    for images, soft in batches:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(module(images), soft).backward()
        optimizer.step()
    return time.perf_counter() - start


def fresh():
    torch.manual_seed(0)
    student = build_student("mobilenetv3_small_050", CLASSES, "scratch", SIZE)
    module = student.module.to(memory_format=torch.channels_last)
    return student, module, optimization.optimizer_for(module, 1e-3, "cpu"), optimization.EMA(module)


def transfer(targets: Targets, hardware, images: int = IMAGES) -> float:
    """Seconds of an epoch of the real loop."""
    student, module, optimizer, average = fresh()
    plan, labels = Plan(images // BATCH, BATCH, 1e-3), np.zeros(0, np.int64)
    start = time.perf_counter()
    state = loop.TrainState(module, optimizer, average)
    distill_student(state, student, targets, plan, hardware, loop.Watch("distill"), labels, CLASSES)
    return time.perf_counter() - start


def of_teacher(images: Images, network, weight: np.ndarray, settings: ViewSettings, tables) -> Targets:
    """Targets by a linear head on the teacher's outputs. tables: where they are kept, by look; None: the teacher runs in the loop."""
    outputs = TeacherOutputs(images, network, lambda x: x @ weight, settings, settings.looks, tables)
    return Targets(images, settings, outputs.log_probabilities)


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher-weights", default="scratch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--online-images", type=int, default=256, help="images of the online loop; its time is scaled to 2,560"
    )
    given = parser.parse_args()
    hardware = accelerator("cpu", "fp32")
    encoder = build_teacher("vit_small_patch14_dinov2", given.teacher_weights, 98)
    network, settings = network_of(encoder, hardware), ViewSettings()
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(WIDTH, CLASSES)).astype(np.float32)
    times: dict[str, list[float]] = {"bare": [], "cached_32": [], "cached_224": [], "online": []}
    with tempfile.TemporaryDirectory() as folder:
        targets = {}
        for name, path, side in (("cached_32", DATA / "cifar10", 32), ("cached_224", DATA / "photos1k", 224)):
            images = images_of(path, side, Path(folder))
            cache = OutputCache(folder, network, settings.resize, side)
            for look in settings.looks:  # speed alone is measured
                cache.add(images.keys, generator.normal(size=(IMAGES, WIDTH)).astype(np.float32), look)
            tables = {look: cache.table(images, look) for look in settings.looks}
            targets[name] = of_teacher(images, network, weight, settings, tables)
        online = of_teacher(targets["cached_32"].images, network, weight, settings, None)
        batches = [
            (
                torch.randn(BATCH, 3, SIZE, SIZE).to(memory_format=torch.channels_last),
                torch.softmax(torch.randn(BATCH, CLASSES), 1),
            )
            for _ in range(IMAGES // BATCH)
        ]
        bare(batches[:5])
        for _ in range(given.repeats):
            times["bare"].append(bare(batches))
            times["cached_32"].append(transfer(targets["cached_32"], hardware))
            times["cached_224"].append(transfer(targets["cached_224"], hardware))
            times["online"].append(transfer(online, hardware, given.online_images) * IMAGES / given.online_images)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    ratios = {name: round(value / seconds["bare"], 3) for name, value in seconds.items()}
    ratios["online / cached_32"] = round(seconds["online"] / seconds["cached_32"], 1)
    print(
        json.dumps(
            {
                "seconds": {k: round(v, 3) for k, v in seconds.items()},
                "ratios_to_bare": ratios,
                "threads": torch.get_num_threads(),
            }
        )
    )


if __name__ == "__main__":
    main()
