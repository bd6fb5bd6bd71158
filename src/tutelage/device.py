"""The device and what computation costs on it: memory allocation, FLOPs, latency, peak memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from tutelage.errors import TutelageError
from tutelage.image_size import Size, sides
from tutelage.json_object import JSON
from tutelage.progress import processes

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import nn

# Environment variables that describe the process group, as torch.distributed.run, accelerate and MPI read them.
GROUP = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "PMI_SIZE",
    "MPI_LOCALRANKID",
    "MPI_LOCALNRANKS",
    *(f"{mpi}_COMM_WORLD_{name}" for mpi in ("OMPI", "MV2") for name in ("SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
)


def prepare_process() -> None:
    """Apply process settings that must precede the import of torch; environment variables set by the user are kept.

    OpenMP's busy-waiting makes small networks 10 to 50 times slower on few cores. By default glibc returns large blocks to
    the system after every layer, and the kernel zeroes them again: keeping them made a teacher's forward pass 1.3 to 2
    times faster on 2 cores.
    """
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # corrupt EXIF and the like do not matter
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if sys.platform == "linux" and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        with contextlib.suppress(OSError, AttributeError):  # a C library other than glibc
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def accelerator(device: str, precision: str) -> Accelerator:
    """Return accelerate's Accelerator for a device and a precision.

    Args:
        device: "auto", "cpu", "cuda" or "mps".
        precision: "auto" (bf16 if the GPU supports it, else fp32), "fp32", "bf16" or "fp16".

    Raises:
        TutelageError: the device is not available, or does not support that precision.
    """
    from datetime import timedelta

    import torch
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState

    mixed = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}[check_hardware(device, precision)]
    if processes() == 1:  # accelerate's state is global, but a second run in this process may need another device
        AcceleratorState._reset_state(reset_partial_state=True)
    patient = InitProcessGroupKwargs(timeout=timedelta(days=7))  # the other processes wait while one decodes
    on_cpu = device == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    hardware = Accelerator(cpu=on_cpu, mixed_precision=mixed, kwargs_handlers=[patient])
    assert hardware.num_processes == processes(), "accelerate sees other processes than torch.distributed.run started"
    return hardware


@contextlib.contextmanager
def as_single_process() -> Iterator[None]:
    """Within the block, treat this process as the only one: it prints and starts no process group, whatever its environment says. With
    several GPUs, it also selects the GPU number LOCAL_RANK."""
    import torch

    place = int(os.environ.get("LOCAL_RANK") or 0)
    if torch.cuda.is_available():
        torch.cuda.set_device(place % torch.cuda.device_count())
    kept = {name: os.environ.pop(name) for name in GROUP if name in os.environ}
    try:
        yield
    finally:
        os.environ |= kept


def check_group() -> None:
    """Check that an environment for several processes also defines how they find each other.

    Raises:
        TutelageError: WORLD_SIZE > 1 without RANK, MASTER_ADDR or MASTER_PORT.
    """
    lacking = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if processes() > 1 and lacking:
        raise TutelageError(
            f"WORLD_SIZE={processes()} in the environment, without {' and '.join(lacking)}, which torch.distributed.run sets too",
            "run `unset WORLD_SIZE RANK` for one process, or start several with `python -m torch.distributed.run -m tutelage ...`",
        )


def check_hardware(device: str, precision: str) -> str:
    """Check device and precision; return the precision, with "auto" resolved. Arguments and exceptions as for `accelerator`."""
    import torch

    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device != "auto" and not there[device]:
        found = ", ".join(name for name, is_there in there.items() if is_there)
        hint = f"use --device auto or one that this machine has ({found}); `tutelage doctor` shows more"
        raise TutelageError(f"--device {device} is not available on this machine", hint)
    on_gpu = device in ("auto", "cuda") and there["cuda"]
    if precision == "auto":
        precision = "bf16" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if precision == "fp16" and not on_gpu:
        raise TutelageError("--precision fp16 needs a CUDA device", "use fp32 or bf16, or leave out --precision")
    return precision


def flops(module: nn.Module, size: Size) -> int:
    """Return the FLOPs of one forward pass of one image; 1 MAC = 2 FLOPs, attention included.

    Args:
        module: takes (1, 3, *sides(size)) float32.
        size: of the input.
    """
    import torch

    was_training = module.training
    with torch.no_grad():
        counted = _counted(module.eval(), size, 1)
    module.train(was_training)
    return counted


def training_flops(module: nn.Module, size: Size) -> int:
    """Return the FLOPs of the forward and the backward pass of one image, in train mode; attention included.

    The image needs no gradient from the first layer, so this is a little less than three times the forward pass.

    Args:
        module: takes (B, 3, *sides(size)) float32, returns a tensor or a tuple of tensors; a copy of it is used.
    """
    import copy

    return _counted(copy.deepcopy(module).cpu().float().train(), size, 2) // 2


def _convolution_backward(*given: Any, **_: object) -> int:
    """Return the FLOPs of a convolution's backward pass: each requested gradient costs as much as the forward pass.

    torch's own formula ignores groups in the gradient of the weights: it counts a depthwise layer of C channels C-fold.
    given: the arguments of `torch.ops.aten.convolution_backward`, with shapes instead of tensors.
    """
    from torch.utils.flop_counter import conv_flop_count

    (grad_shape, x_shape, w_shape), transposed, wanted = given[:3], given[7], given[10]
    return sum(map(bool, wanted[:2])) * conv_flop_count(x_shape, w_shape, grad_shape, transposed)


def _counted(module: nn.Module, size: Size, batch: int) -> int:
    """Return the FLOPs of a forward pass of `batch` images, plus the backward pass if gradients are enabled."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    parameter = next(module.parameters())
    images = torch.zeros(batch, 3, *sides(size), device=parameter.device, dtype=parameter.dtype)
    # fused attention on the CPU would count as 0 FLOPs, so the plain implementation is used
    formulas = {torch.ops.aten.convolution_backward: _convolution_backward}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        output = module(images)
        if torch.is_grad_enabled():
            parts = output if isinstance(output, tuple) else (output,)
            torch.stack([part.sum() for part in parts if part is not None]).sum().backward()
    return counter.get_total_flops()


def latency_ms(module: nn.Module, size: Size, repeats: int = 50, seconds: float = 20.0) -> float:
    """Return the median milliseconds of one forward pass on the CPU: batch 1, 1 thread, float32.

    Args:
        module: takes (1, 3, *sides(size)) float32; not changed.
        size: of the input.
        repeats: timed passes, after 5 warm-up passes. seconds: no pass starts after this time, so slow networks get fewer
            timed passes, and those that do not even finish the warm-up are timed by its last pass.
    """
    import copy

    import torch

    module = copy.deepcopy(module).cpu().eval()
    image = torch.zeros(1, 3, *sides(size))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = []
        with torch.inference_mode():
            while not times or (len(times) < repeats + 5 and sum(times) < seconds):
                start = time.perf_counter()
                module(image)
                times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return 1000 * statistics.median(times[5:] or times[-1:])


class PeakMemory:
    """Peak resident memory of this process since this object was created, in MiB; with CUDA, the device's peak if larger.

    If the kernel does not allow resetting the peak (other than Linux), it is the peak since the process began.
    """

    def __init__(self):
        import torch

        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def mib(self) -> float:
        """Return the peak so far, in MiB."""
        import torch

        device = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
        return max(peak_bytes() / 2**20, device)


def peak_bytes() -> int:
    """Return the peak resident memory of this process in bytes."""
    with contextlib.suppress(OSError, IndexError):  # other than Linux
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 2**10
    try:
        import resource  # psutil knows no peak on macOS
    except ImportError:  # Windows
        memory = psutil.Process().memory_info()
        return getattr(memory, "peak_wset", memory.rss)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 2**10)


INSTRUCTION_SETS = (
    "avx2",
    "avx512f",
    "avx_vnni",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "asimd",
    "asimddp",
    "i8mm",
    "sve",
)


def cpu() -> JSON:
    """Return cpu: name of the processor; instruction_sets: the available ones of INSTRUCTION_SETS; cores: usable by this process."""
    import platform

    about: dict[str, str] = {}
    with contextlib.suppress(OSError):
        lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        about = {key.strip(): value.strip() for key, _, value in lines}
    flags = (about.get("flags") or about.get("Features") or "").split()
    return {
        "cpu": about.get("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
        "instruction_sets": [one for one in INSTRUCTION_SETS if one in flags],
    }


def to_device(batch: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Move a batch to a device; to a GPU from pinned memory, without waiting."""
    if str(device).startswith("cuda"):
        return batch.pin_memory().to(device, non_blocking=True)
    return batch.to(device)


def memory_text(count: float) -> str:
    """Return a number of bytes as text: in GiB, MiB, KiB or bytes, so that it is at least 1."""
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:,.0f} bytes"


def free_memory(container: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the available memory in bytes, within the limit of a container (cgroup v2) if there is one.

    A container's memory.current counts its page cache too; the inactive part of that is given back as soon as memory is needed.
    """
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2, or no limit ("max")
        limit, used = (int((container / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (container / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(stat.get("inactive_file", 0)))
    return free
