"""What is promised of costs and of the device."""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tutelage import device
from tutelage.commands import benchmark
from tutelage.errors import TutelageError


def test_flops_of_a_convolution_by_hand():
    """One multiplication with addition counts as two operations: 2 x output x kernel x input channels."""
    module = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8))
    first, depthwise = 2 * 8 * 16 * 16 * 3 * 9, 2 * 8 * 16 * 16 * 9
    assert device.flops(module, 32) == first + depthwise


@pytest.mark.parametrize("fused", [True, False])
def test_flops_of_a_transformer_by_hand(fused: bool):
    """A ViT's FLOPs count its attention, also where it is fused: patches, projections, q k, attention v, MLP, head."""
    from timm.models.vision_transformer import VisionTransformer

    depth, width, heads, patch, classes = 2, 32, 4, 8, 5
    module = VisionTransformer(
        img_size=32, patch_size=patch, embed_dim=width, depth=depth, num_heads=heads, num_classes=classes
    )
    for block in module.blocks:
        block.attn.fused_attn = fused
    n = (32 // patch) ** 2 + 1
    embed = (n - 1) * 3 * patch**2 * width
    block = n * width * 3 * width + 2 * n * n * width + n * width * width + 2 * n * width * 4 * width
    assert device.flops(module, 32) == 2 * (embed + depth * block + width * classes)


def test_flops_leaves_the_mode_alone():
    """Counting runs the module in evaluation mode and puts it back: statistics and mode are as before."""
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    device.flops(module, 16)
    assert module.training
    assert module[1].training
    assert module[1].num_batches_tracked == 0
    device.flops(module.eval(), 16)
    assert not module.training


def test_training_flops_by_hand():
    """Backward costs each layer twice its forward pass, but the first one, which passes nothing on to the image, once."""
    module = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1))
    first, second = 2 * 8 * 256 * 3 * 9, 2 * 16 * 256 * 8 * 9
    assert device.training_flops(module, 16) == pytest.approx(2 * first + 3 * second, rel=0.02)
    assert module[1].num_batches_tracked == 0, "a copy is used"


def test_training_flops_of_depthwise_layers():
    """A grouped convolution's backward pass costs twice its forward pass, not C times that."""
    module = nn.Sequential(nn.Conv2d(3, 64, 1), nn.Conv2d(64, 64, 3, padding=1, groups=64), nn.Conv2d(64, 8, 1))
    first, depthwise, last = 2 * 256 * 3 * 64, 2 * 256 * 64 * 9, 2 * 256 * 64 * 8
    assert device.training_flops(module, 16) == 2 * first + 3 * (depthwise + last)
    from tutelage.models.students import build_student

    student = build_student("mobilenetv3_small_050", 10, size=64).module
    assert 2.5 < device.training_flops(student, 64) / device.flops(student, 64) < 3.01


def test_training_flops_of_a_transformer_by_hand():
    """So it is for a ViT, its attention's two products counted three times."""
    from timm.models.vision_transformer import VisionTransformer

    depth, width, patch, classes = 2, 32, 8, 5
    module = VisionTransformer(
        img_size=32, patch_size=patch, embed_dim=width, depth=depth, num_heads=4, num_classes=classes
    )
    n = (32 // patch) ** 2 + 1
    embed = (n - 1) * 3 * patch**2 * width
    block = n * width * 3 * width + 2 * n * n * width + n * width * width + 2 * n * width * 4 * width
    expected = 2 * (2 * embed + 3 * (depth * block + width * classes))
    assert device.training_flops(module, 32) == pytest.approx(expected, rel=0.02)


def test_peak_memory_starts_anew():
    """The peak of a stage is its own: a block that was freed before it does not count, one that it took does."""
    with held(2**28):  # not from malloc: it may keep what is freed
        before = device.PeakMemory().mib()
    fresh = device.PeakMemory()
    assert fresh.mib() < before - 200
    with held(2**28):
        pass
    assert fresh.mib() > before - 50


@contextlib.contextmanager
def held(size: int) -> Iterator[None]:
    """So many bytes of memory, touched, and given back to the system at the end."""
    block = mmap.mmap(-1, size)
    for start in range(0, size, 4096):
        block[start] = 1
    yield
    block.close()


@pytest.mark.parametrize(
    ("limit", "used", "cache", "expected"),
    [
        ("5000", "4000", "700", 1700),
        ("5000", "4000", "0", 1000),
        ("max", "4000", "700", None),
        (str(2**60), "0", "0", None),
    ],
)
def test_free_memory_of_a_container(tmp_path, monkeypatch, limit, used, cache, expected):
    """A container's limit counts, its page cache does not count as used, and without a limit it is the machine's memory."""
    machine = 2**40
    monkeypatch.setattr(device.psutil, "virtual_memory", lambda: SimpleNamespace(available=machine))
    assert device.free_memory(tmp_path) == machine, "no files of a container"
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{used}\n")
    (tmp_path / "memory.stat").write_text(f"anon 12\nactive_file 90\ninactive_file {cache}\ninactive_anon 3\n")
    assert device.free_memory(tmp_path) == (expected or machine)


class Waits(nn.Module):
    """Takes its time, notes the threads, and now and then takes much longer."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = SEEN
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls.append((torch.get_num_threads(), tuple(images.shape), self.training, images.dtype))
        time.sleep(0.2 if len(self.calls) % 5 == 0 else 0.004)
        return images


SEEN: list[tuple] = []


def test_latency_is_the_median_of_one_image_on_one_thread(monkeypatch):
    """Latency is the median, batch 1, one thread, in evaluation mode; the threads and the module stay as they were."""
    monkeypatch.setattr(Waits, "__deepcopy__", lambda self, memo: Waits(), raising=False)
    SEEN.clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        module = Waits().train()
        latency = device.latency_ms(module, 24, repeats=15)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert len(SEEN) == 20
    assert set(SEEN) == {(1, (1, 3, 24, 24), False, torch.float32)}
    assert module.training
    assert 4 <= latency < 40


@pytest.mark.parametrize(("seconds", "passes"), [(0.0, 1), (0.01, 3)])
def test_latency_of_a_slow_network_ends_soon(monkeypatch, seconds, passes):
    """Once the seconds have gone no further pass begins, and one pass is enough."""
    monkeypatch.setattr(Waits, "__deepcopy__", lambda self, memo: Waits(), raising=False)
    SEEN.clear()
    assert device.latency_ms(Waits(), 24, seconds=seconds) >= 4
    assert 1 <= len(SEEN) <= passes


def test_latency_puts_the_threads_back_after_an_error():
    """A module that fails leaves the number of threads as it was."""
    threads = torch.get_num_threads()
    with pytest.raises(RuntimeError):
        device.latency_ms(nn.Conv2d(4, 4, 1), 8)
    assert torch.get_num_threads() == threads


def test_devices_that_are_not_there():
    """A device that the machine lacks is refused with those that it has."""
    missing = "mps" if not torch.backends.mps.is_available() else "cuda"
    with pytest.raises(TutelageError, match=f"--device {missing}") as error:
        device.accelerator(missing, "auto")
    assert "cpu" in str(error.value)
    assert missing not in error.value.hint
    with pytest.raises(TutelageError, match="--precision fp16"):
        device.accelerator("cpu", "fp16")


def test_cpu_is_full_precision_by_itself():
    """On the CPU "auto" means float32, and the device is the CPU."""
    hardware = device.accelerator("cpu", "auto")
    assert hardware.device.type == "cpu"
    assert hardware.mixed_precision == "no"


def test_to_device_moves_and_keeps():
    """A batch arrives with the same values."""
    batch = torch.randn(2, 3)
    assert torch.equal(device.to_device(batch, torch.device("cpu")), batch)


@pytest.mark.parametrize(("given", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_wait_passively_unless_the_user_says_otherwise(given: str | None, expected: str):
    """Preparing a process sets OMP_WAIT_POLICY where the user has not, and loads no torch."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    if given:
        environment["OMP_WAIT_POLICY"] = given
    code = (
        "import os, sys; from tutelage.device import prepare_process; prepare_process(); "
        "print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [expected, "False"]


def test_peak_memory_without_what_unix_has(monkeypatch):
    """Without /proc and the module `resource`, as on Windows, psutil gives the memory; a process of `benchmark` needs neither."""
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(device, "Path", lambda path: SimpleNamespace(read_text=lambda: "no such line"))
    assert device.peak_bytes() > 2**20
    code = benchmark.MEMORY.format(load="run = lambda images: images", shape=(1,), dtype="uint8")
    hidden = 'import sys\nsys.modules["resource"] = sys.modules["fcntl"] = None\n'
    done = subprocess.run([sys.executable, "-c", hidden + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 1


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (1000, "1,000 bytes"), (2048, "2.0 KiB"), (10 << 20, "10.0 MiB"), (5 << 40, "5,120.0 GiB")],
)
def test_memory_in_units_that_suit_it(count, text):
    """An amount of memory is told in the largest unit of which it has at least one."""
    assert device.memory_text(count) == text
