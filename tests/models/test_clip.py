"""What text queries by a CLIP model promise; the model here is tiny and random."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from conftest import TINY_CLIP
from tutelage.data.image_cache import Images
from tutelage.device import accelerator
from tutelage.errors import SeveralErrors, TutelageError
from tutelage.features.output_cache import run_network
from tutelage.features.view_batches import CLEAN, ViewSettings
from tutelage.models.clip import (
    CLIPS,
    TEMPLATES,
    build_clip,
    check_clip,
    class_embeddings,
    class_prompts,
    resolve_clip,
)

open_clip = pytest.importorskip("open_clip", reason="the optional package open_clip_torch is not installed")

NAME = TINY_CLIP


@pytest.fixture(scope="module", autouse=True)
def tiny(tiny_clip):
    """open_clip knows the tiny model while these tests run."""


@pytest.fixture(scope="module")
def clip(tiny):
    """The tiny model with random weights."""
    return build_clip(NAME, "scratch")


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """A hub that refuses connections, and an empty cache."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def model() -> torch.nn.Module:
    """The same model without us."""
    torch.manual_seed(0)
    return open_clip.create_model(NAME).eval()


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# Prompts


def test_prompts_of_a_class():
    """The worked example: underscores and hyphens are spaces, and every template is filled in."""
    assert class_prompts(["polar_bear"], ["a photo of a {}."]) == [["a photo of a polar bear."]]
    assert class_prompts(["T-shirt__red ", "cat"], ["{}", "no {} but {}"]) == [
        ["T shirt red", "no T shirt red but T shirt red"],
        ["cat", "no cat but cat"],
    ]
    assert all(len(one) == len(TEMPLATES) == 7 for one in class_prompts(["{cat}", "dog"]))
    assert class_prompts(["{cat}"], ["a {c} {}"]) == [["a {c} {cat}"]]


def test_faulty_prompts_are_all_told():
    """A template without a place for the name and a name without words are named, all in one message."""
    with pytest.raises(SeveralErrors) as error:
        class_prompts(["cat", "__-"], ["a photo of {}", "a photo", "{ }"])
    assert [e.message for e in error.value.errors] == [
        "template 'a photo' has no {} in it",
        "template '{ }' has no {} in it",
        "class '__-' has no words to search with",
    ]
    with pytest.raises(TutelageError, match="no templates"):
        class_prompts(["cat"], [])


# Names


def test_names():
    """Short names, OpenAI's spelling and tags lead to what open_clip calls them; every short name has weights."""
    assert resolve_clip("ViT-B/32:openai") == ("ViT-B-32", "openai")
    assert resolve_clip("ViT-B-32") == ("ViT-B-32", "datacomp_xl_s13b_b90k")
    assert resolve_clip("openclip-b") == ("ViT-B-16", "datacomp_xl_s13b_b90k")
    assert resolve_clip(NAME) == (NAME, "")
    for short, full in CLIPS.items():
        assert ":".join(resolve_clip(short)) == full


@pytest.mark.parametrize(
    ("name", "mend"),
    [
        ("ViT-B-33", "ViT-B-32"),
        ("vit-b-16-siglip2", "did you mean 'ViT-B-16-SigLIP2'?"),
        ("openclipb", "openclip-b"),
        ("ViT-B-32:opnai", "did you mean 'openai'?"),
        ("hf-hub:laion/some", "open_clip.list_models()"),
    ],
)
def test_unknown_names(name: str, mend: str):
    """An unknown model or tag is refused with the nearest names, and no repository is fetched by its name."""
    with pytest.raises(TutelageError) as error:
        build_clip(name, "scratch")
    assert error.value.message.startswith(f"--clip {name}: no ")
    assert mend in error.value.hint


def test_package_is_missing(monkeypatch):
    """Without open_clip the message says how to install it."""
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(TutelageError) as error:
        build_clip(NAME, "scratch")
    assert error.value.hint == "pip install 'tutelage[text]'"


def test_tokenizer_of_another_package(monkeypatch):
    """A model whose tokenizer needs transformers says so, before it is built."""
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else real(name))
    with pytest.raises(TutelageError, match="transformers") as error:
        check_clip("siglip2-b", "scratch")
    assert "openclip-b" in error.value.hint


def test_tokenizer_from_a_hub_that_is_away(monkeypatch, no_hub):
    """A tokenizer that only the hub has is told within five seconds, even where the weights are a file."""
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    start = time.monotonic()
    with pytest.raises(
        TutelageError, match=r"tokenizer is not in the hub.s cache and cannot be downloaded \(timm/ViT-B-16-SigLIP2\)"
    ) as error:
        check_clip("siglip2-b", __file__)
    assert time.monotonic() - start < 5
    assert "openclip-b" in error.value.hint


# What a model gives


def test_class_embeddings_are_the_mean_of_unit_vectors(clip):
    """A class's vector is the mean of its prompts' unit vectors at unit length, prompt by prompt."""
    found = class_embeddings(clip, ["polar_bear", "cat"], TEMPLATES[:3])
    tokenize, plain = open_clip.get_tokenizer(NAME), model()
    for row, name in zip(found, ["polar bear", "cat"], strict=True):
        each = []
        for template in TEMPLATES[:3]:
            with torch.no_grad():
                vector = plain.encode_text(tokenize([template.format(name)]))[0].numpy()
            each.append(vector / np.linalg.norm(vector))
        mean = np.mean(each, axis=0)
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-5)
    assert found.dtype == np.float32
    assert found.shape == (2, 16)


def test_text_gives_unit_vectors(clip):
    """Any number of prompts, long or in any script, gives float32 of unit length, whatever else is in the batch."""
    prompts = ["a cat", "日本の犬", "word " * 200, *(f"number {i}" for i in range(300))]
    vectors = clip.text(prompts)
    assert (vectors.shape, vectors.dtype) == ((303, 16), np.dtype(np.float32))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(clip.text(prompts[290:292]), vectors[290:292], atol=1e-5)
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3
    assert clip.text([]).shape == (0, 16)


def test_image_side_is_a_network(clip):
    """The image side gives open_clip's own features, not normalised, and says what a cache needs to know."""
    network = clip.network
    with torch.no_grad():
        expected = model().encode_image(images(3))
    torch.testing.assert_close(network.forward(images(3)), expected)
    assert (network.size, network.width, network.output, network.name) == (32, 16, "features", NAME)
    assert network.mean == open_clip.OPENAI_DATASET_MEAN
    assert (network.device, network.precision) == ("cpu", "no")


def test_gallery_is_embedded_as_with_a_teacher(clip):
    """The code that runs a teacher over stored images runs the image side."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 40, 40, 3), dtype=np.uint8)
    places = np.array([[0, i * 4800] for i in range(4)])
    stored = Images(np.zeros((4, 32), np.uint8), np.full((4, 2), 40, np.int32), places, (pixels.reshape(-1),))
    features = run_network(clip.network, stored, np.arange(4), CLEAN, ViewSettings())
    assert features.shape == (4, 16)
    assert len(np.unique(features.round(4), axis=0)) == 4


def test_accelerator_gives_the_precision():
    """With an accelerator the image side runs in its precision and on its device, and the text side in float32."""
    clip = build_clip(NAME, "scratch", accelerator("cpu", "bf16"))
    assert clip.network.precision == "bf16"
    with torch.no_grad():
        assert clip.network.forward(images(1)).dtype == torch.bfloat16
    assert clip.text(["a cat"]).tobytes() == build_clip(NAME, "scratch").text(["a cat"]).tobytes()


# Weights


def test_random_weights_are_the_same_at_every_call(clip):
    """Random weights do not depend on what ran before, and leave the random state as it was."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = build_clip(NAME, "scratch")
    assert torch.equal(torch.get_rng_state(), before)
    assert (again.hash, again.network.hash) == (clip.hash, clip.network.hash)
    assert again.weights == "scratch"


def test_weights_from_a_file(tmp_path, clip):
    """A file gives its own weights, wrapped or not, with a hash of its own, and no pretrained weights are asked for."""
    torch.manual_seed(9)
    state = open_clip.create_model(NAME).state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "clip.safetensors")
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "clip.pt")
    first, second = (build_clip(NAME, str(tmp_path / file)) for file in ("clip.safetensors", "clip.pt"))
    assert first.hash == second.hash != clip.hash
    assert first.network.hash == second.network.hash != clip.network.hash
    assert np.array_equal(first.text(["a cat"]), second.text(["a cat"]))
    assert not np.allclose(first.text(["a cat"]), clip.text(["a cat"]))
    assert first.weights == f"file {tmp_path / 'clip.safetensors'}"


def test_weights_of_another_grid_are_resized(tmp_path):
    """A file of another input size is taken where open_clip can resize its position grid."""
    state = dict(model().state_dict())
    state["visual.positional_embedding"] = torch.randn(1 + 16, 32)
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "larger.safetensors")
    assert torch.isfinite(build_clip(NAME, str(tmp_path / "larger.safetensors")).network.forward(images(1))).all()


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"weight": torch.zeros(3)}, "weights of another architecture"),
        ({"visual.proj": torch.full((32, 16), float("nan"))}, "NaN or infinity"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, tensors, said: str):
    """A file of another model or with values that are no number is refused, with its name."""
    save_file(tensors, tmp_path / "wrong.safetensors")
    with pytest.raises(TutelageError) as error:
        build_clip(NAME, str(tmp_path / "wrong.safetensors"))
    assert f"--clip-weights {tmp_path / 'wrong.safetensors'}: {said}" in error.value.message


def test_missing_file_and_no_weights(tmp_path):
    """A file that is not there is named as such; a model without pretrained weights says what may be given instead."""
    with pytest.raises(TutelageError, match="no such file"):
        build_clip(NAME, str(tmp_path / "absent.safetensors"))
    with pytest.raises(TutelageError, match="open_clip has no weights") as error:
        build_clip(NAME, "pretrained")
    assert "--clip-weights FILE" in error.value.hint


def test_hub_refused(no_hub):
    """A hub that cannot be reached is told within five seconds, before the model is built, with the other way."""
    start = time.monotonic()
    with pytest.raises(TutelageError) as error:
        build_clip("openclip-b")
    assert time.monotonic() - start < 5
    assert "laion/CLIP-ViT-B-16-DataComp.XL-s13B-b90K" in error.value.message
    assert "--clip-weights FILE" in error.value.hint


def test_weights_in_the_hubs_cache(no_hub, monkeypatch, tmp_path):
    """Weights that are in the hub's cache load without the hub, with the activation and the input that their tag names."""
    from open_clip import pretrained

    entry = {"hf_hub": "somebody/tiny/", "quick_gelu": True, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    monkeypatch.setitem(pretrained._PRETRAINED, NAME, {"own": entry})
    snapshot = tmp_path / "hub" / "models--somebody--tiny" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    plain = model()
    save_file({k: v.contiguous() for k, v in plain.state_dict().items()}, snapshot / "open_clip_model.safetensors")
    clip = build_clip(NAME)
    assert clip.weights == "hub somebody/tiny"
    assert (clip.network.name, clip.network.mean) == (f"{NAME}:own", (0.5, 0.5, 0.5))
    quick = open_clip.create_model(NAME, force_quick_gelu=True).eval()
    quick.load_state_dict(plain.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(clip.network.forward(images(2)), quick.encode_image(images(2)))
        assert not torch.allclose(clip.network.forward(images(2)), plain.encode_image(images(2)), atol=1e-4)


def test_root_logger_is_left_alone(monkeypatch, capfd):
    """open_clip's news of random weights is not printed, and no handler stays behind on the root logger."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    build_clip(NAME, "scratch")
    assert root.handlers == []
    assert capfd.readouterr().err == ""
