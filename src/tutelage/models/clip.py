"""Text queries: class names embedded in the image space of a CLIP model. Needs the optional package open_clip_torch.

A model name is open_clip's, with or without a tag ("ViT-B-16:datacomp_xl_s13b_b90k"), or one of `CLIPS`. The tag selects
the pretrained weights, and also the image normalisation and the activation that they were trained with; so it
matters for weights from a file too.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from tutelage import device
from tutelage.errors import TutelageError, did_you_mean, raise_all, shown
from tutelage.json_object import JSON
from tutelage.metrics import unit
from tutelage.models.adapted_teacher import FeatureExtractor
from tutelage.models.aliases import weights_path
from tutelage.models.weights import (
    UNFIT,
    cached_file,
    first_line,
    hub_fault,
    no_download,
    read_file,
    shapes_of,
    weights_hash,
    without_prefix,
    wrong_architecture,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

# OpenAI's short list: on ImageNet these seven are at least as good as all eighty (Prompt_Engineering_for_ImageNet.ipynb).
TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)

CLIPS = {
    "openclip-b": "ViT-B-16:datacomp_xl_s13b_b90k",
    "openclip-l": "ViT-L-14:datacomp_xl_s13b_b90k",
    "openclip-h": "ViT-H-14:laion2b_s32b_b79k",
    "siglip2-b": "ViT-B-16-SigLIP2:webli",
    "siglip2-l": "ViT-L-16-SigLIP2-256:webli",
    "siglip2-so400m": "ViT-SO400M-14-SigLIP2:webli",
}

# If no tag is given, the first tag with the first of these prefixes is used. Not the last one listed: that is often from a
# scaling study (ViT-B-32 has 12 tags trained on 13 to 128 million images, far worse than the others).
PREFERRED = ("datacomp_xl", "webli", "laion2b", "openai")
TEXTS = 256  # prompts in one forward pass


@dataclass(frozen=True)
class Clip:
    """A frozen CLIP model.

    network: the image encoder, run and cached like a teacher's: (B, 3, S, S) -> (B, D), not of unit length.
    text: n prompts -> (n, D) float32, unit length; prompts are truncated to the model's context (77 tokens).
    weights: where they come from, for the log. hash: SHA-256 of both encoders' weights, hex; network.hash: of the image encoder's.
    """

    network: FeatureExtractor
    text: Callable[[list[str]], np.ndarray]
    weights: str
    hash: str


def class_prompts(classes: Sequence[str], templates: Sequence[str] = TEMPLATES) -> list[list[str]]:
    """Return the prompts of each class: its name, with spaces for underscores and hyphens, in every template.

    class_prompts(["polar_bear"], ["a photo of a {}."]) == [["a photo of a polar bear."]]

    Raises:
        TutelageError: no templates, one without {}, or a name without any words; all faults at once.
    """
    hint = f"write a sentence with {{}} where the class name goes, such as {TEMPLATES[0]!r}"
    faults = [TutelageError(f"template {one!r} has no {{}} in it", hint) for one in templates if "{}" not in one]
    if not templates:
        faults.append(TutelageError("no templates for text queries", hint))
    names = [" ".join(name.replace("_", " ").replace("-", " ").split()) for name in classes]
    faults += [
        TutelageError(f"class {label!r} has no words to search with", "give it a name that says what is in the image")
        for label, name in zip(classes, names, strict=True)
        if not name
    ]
    raise_all(faults)
    return [[template.replace("{}", name) for template in templates] for name in names]


def class_embeddings(clip: Clip, classes: Sequence[str], templates: Sequence[str] = TEMPLATES) -> np.ndarray:
    """Return one vector per class: the mean of its prompts' unit vectors, at unit length (Radford et al., ICML 2021, 3.1.4).

    Returns:
        (C, D) float32, unit length.

    Raises:
        TutelageError: as for class_prompts.
    """
    prompts = class_prompts(classes, templates)
    vectors = clip.text([prompt for one in prompts for prompt in one])
    return unit(vectors.reshape(len(prompts), len(templates), -1).mean(axis=1))


def _open_clip() -> ModuleType:
    """Import and return the package open_clip. Raises TutelageError: not installed."""
    try:
        import open_clip
    except ImportError as error:
        raise TutelageError(
            f"text queries, unlike image queries, need the package open_clip_torch, which cannot be imported ({error})",
            "pip install 'tutelage[text]'",
        ) from error
    return open_clip


def resolve_clip(name: str) -> tuple[str, str]:
    """Return open_clip's architecture and tag for a name.

    Args:
        name: "openclip-b", "ViT-B-32", "ViT-B/32" or "ViT-B-32:openai".

    Returns:
        ("ViT-B-32", "openai"); an empty tag if open_clip has no weights for the architecture.

    Raises:
        TutelageError: open_clip is not installed; unknown name or tag, with the most similar ones as a hint.
    """
    open_clip = _open_clip()
    arch, _, tag = CLIPS.get(name, name).replace("/", "-").partition(":")
    known = open_clip.list_models()
    if arch not in known:
        same = [k for k in [*CLIPS, *known] if k.lower() == arch.lower()]
        near = f"did you mean {same[0]!r}?" if same else did_you_mean(arch, [*CLIPS, *known], "")
        hint = f"use a short name ({shown(CLIPS, 10)}) or one of open_clip's {len(known)} names"
        hint = f"{near} Otherwise {hint}" if near else f"{hint}, which open_clip.list_models() lists"
        raise TutelageError(f"--clip {name}: no such model", hint)
    tags = open_clip.list_pretrained_tags_by_model(arch)
    if tag and tag not in tags:
        message = f"--clip {name}: no weights with that tag ({arch} has {shown(tags, 30) or 'none'})"
        raise TutelageError(message, did_you_mean(tag, tags, "leave the tag out to get the usual weights"))
    preferred = (t for start in (*PREFERRED, "") for t in tags if t.startswith(start))
    return arch, tag or next(preferred, "")


def check_clip(name: str, weights: str = "pretrained") -> tuple[Path | None, str]:
    """Check, before anything is built, that a model, its tokenizer and its weights are available.

    Returns:
        The file of the weights, None if they are random or must be downloaded; their source, for the log.

    Raises:
        TutelageError: as for build_clip, except that files are not opened; within five seconds.
    """
    arch, tag = resolve_clip(name)
    text = _open_clip().get_model_config(arch)["text_cfg"]
    for repository in {text.get("hf_model_name"), text.get("hf_tokenizer_name")} - {None, ""}:
        _check_tokenizer(name, repository)
    if file := weights_path(weights, "clip"):
        return file, f"file {file}"
    if weights == "scratch":
        return None, "scratch"
    entry = _open_clip().get_pretrained_cfg(arch, tag) if tag else {}
    where = entry.get("hf_hub") or entry.get("url")
    if not where:
        hint = "use --clip-weights FILE or --clip-weights scratch"
        raise TutelageError(f"--clip {name}: open_clip has no weights for it", hint)
    repository, _, file = where.rpartition("/")
    usual = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    files = (f"{file.rpartition('.')[0]}.safetensors", file) if file else usual
    cached = cached_file(repository, files) if entry.get("hf_hub") else None
    if not cached and (fault := hub_fault(where if where.startswith("http") else None)):
        raise no_download("clip", name, where, fault)
    return cached, f"hub {where.rstrip('/')}"


def _check_tokenizer(name: str, repository: str) -> None:
    """Check that the text encoder's tokenizer, and the package transformers to read it, are available."""
    if importlib.util.find_spec("transformers") is None:
        message = f"--clip {name} needs the package transformers for its tokenizer"
        hint = "pip install transformers sentencepiece, or use --clip openclip-b, which has CLIP's own tokenizer"
        raise TutelageError(message, hint)
    files = ("tokenizer.json", "tokenizer_config.json")
    if not cached_file(repository, files) and (fault := hub_fault()):
        raise TutelageError(
            f"--clip {name}: its tokenizer is not in the hub's cache and cannot be downloaded ({repository}): {fault}",
            "use --clip openclip-b, whose tokenizer comes with open_clip",
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence open_clip, which logs to the root logger; without a handler there, logging would add a printing one for all packages."""
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)


def _fill(model: nn.Module, path: Path, arch: str) -> None:
    """Load a weight file into the model; open_clip converts other training codes' formats and resizes position grids."""
    own = model.state_dict()
    state = without_prefix(read_file(path, "clip"), set(own))
    try:
        if shapes_of(state) == shapes_of(own):
            model.load_state_dict(state)
        else:
            _open_clip().load_checkpoint(model, str(path))
    except UNFIT as error:
        raise wrong_architecture(f"--clip-weights {path}", f"open_clip's {arch}", state, own) from error


def build_clip(name: str, weights: str = "pretrained", accelerator: Accelerator | None = None) -> Clip:
    """Build a frozen CLIP model, image and text encoder, in eval mode.

    Args:
        name: as for `resolve_clip`.
        weights: "pretrained", "scratch" (random, but the same at every call) or the path of a file.
        accelerator: sets the device of both encoders and the precision of the image encoder; None for CPU and float32.

    Raises:
        TutelageError: open_clip is not installed; unknown name; weights or tokenizer unavailable, or weights that do not fit.
    """
    open_clip = _open_clip()
    file, source = check_clip(name, weights)
    arch, tag = resolve_clip(name)
    cfg = open_clip.get_pretrained_cfg(arch, tag) if tag else {}
    hardware = accelerator or device.accelerator("cpu", "fp32")
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # Without the tag's activation, OpenAI's weights load into plain ViT-B-32 but give wrong outputs.
        quick = bool(cfg.get("quick_gelu"))
        model = open_clip.create_model(arch, pretrained_image=False, pretrained_text=False, force_quick_gelu=quick)
        tokenizer = open_clip.get_tokenizer(arch)
        if source.startswith("hub") and file is None:
            try:
                file = Path(open_clip.download_pretrained(cfg))
            except Exception as error:  # a download may raise any exception of its HTTP client
                raise no_download("clip", name, source.removeprefix("hub "), first_line(error)) from error
        if file:
            _fill(model, file, arch)
    model = model.eval().requires_grad_(False).to(hardware.device)
    network = _image_side(model, f"{arch}:{tag}" if tag else arch, cfg, hardware)

    @torch.inference_mode()
    def text(prompts: list[str]) -> np.ndarray:
        starts = range(0, len(prompts), TEXTS)
        batches = (tokenizer(prompts[start : start + TEXTS]).to(hardware.device) for start in starts)
        parts = [unit(model.encode_text(tokens).float().cpu().numpy()) for tokens in batches]
        return np.concatenate([np.zeros((0, network.width), np.float32), *parts])

    return Clip(network, text, source, weights_hash(model.state_dict()))


def _image_side(model: Any, name: str, cfg: JSON, hardware: Accelerator) -> FeatureExtractor:
    """Return the image encoder as a FeatureExtractor. `cfg`: open_clip's entry for the tag; if empty, CLIP's normalisation is used."""
    open_clip, side = _open_clip(), model.visual.image_size
    size = int(side if isinstance(side, int) else side[0])
    mean, std = cfg.get("mean", open_clip.OPENAI_DATASET_MEAN), cfg.get("std", open_clip.OPENAI_DATASET_STD)
    width = int(open_clip.get_model_config(name.partition(":")[0])["embed_dim"])

    def forward(images: torch.Tensor) -> torch.Tensor:
        with hardware.autocast():
            return model.encode_image(images, normalize=False)

    digest, where = weights_hash(model.visual.state_dict()), str(hardware.device)
    return FeatureExtractor(forward, size, mean, std, width, digest, "features", name, where, hardware.mixed_precision)
