"""What the embeddings of a gallery promise: the same bits whoever computes them, bad images passed over and told."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from textures import CLASSES, texture
from tutelage.curation import embed
from tutelage.curation.embed import ByNetwork, EmbeddingCache, pieces_of
from tutelage.curation.image_match import thumbnail
from tutelage.curation.vectors import Vectors
from tutelage.data.gallery import list_gallery
from tutelage.errors import TutelageError
from tutelage.models.adapted_teacher import FeatureExtractor


def network(scale: float = 1.0) -> FeatureExtractor:
    """A small convolution with fixed weights, whose results depend in the last bits on what is in a batch."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 24, 5, stride=3), torch.nn.GELU(), torch.nn.AdaptiveAvgPool2d(1))

    def forward(images: torch.Tensor) -> torch.Tensor:
        return scale * layers(images).flatten(1)

    return FeatureExtractor(forward, 32, (0.5,) * 3, (0.5,) * 3, 24, f"hash {scale}", "features", "tiny")


@pytest.fixture
def gallery(tmp_path, monkeypatch) -> Path:
    """120 textures in a folder, 40 in a tar, four broken files; pieces of 16 on the mean."""
    monkeypatch.setattr(embed, "PIECE_BITS", 4)
    folder = tmp_path / "gallery"
    folder.mkdir()
    for seed in range(120):
        Image.fromarray(texture(CLASSES[seed % 3], seed)).save(folder / f"{seed:03d}.png")
    (folder / "004-broken.png").write_bytes(b"no image")
    (folder / "050-empty.png").write_bytes(b"")
    (folder / "119-cut.png").write_bytes((folder / "119.png").read_bytes()[:300])
    with tarfile.open(folder / "more.tar", "w") as tar:
        for seed in range(200, 241):
            data = io.BytesIO()
            Image.fromarray(texture(CLASSES[seed % 3], seed)).save(data, "PNG")
            content = data.getvalue() if seed != 220 else b"nothing"
            member = tarfile.TarInfo(f"{seed}.png")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return folder


def all_rows(embedded) -> np.ndarray:
    return np.concatenate([part() for part in embedded.parts])


def test_pieces_depend_on_the_images_alone(gallery):
    """Pieces cover the gallery in order, end with their tar, and an image more in a folder changes one of them."""
    refs = list_gallery([gallery])[0]
    pieces = pieces_of(refs)
    assert [ref for piece in pieces for ref in piece.refs] == refs
    assert [piece.first for piece in pieces] == np.cumsum([0, *(len(p.refs) for p in pieces[:-1])]).tolist()
    assert all(len({ref.kind for ref in piece.refs}) == 1 for piece in pieces)
    assert len(pieces) > 4
    Image.fromarray(texture("dots", 999)).save(gallery / "060-new.png")
    after = {piece.name for piece in pieces_of(list_gallery([gallery])[0])}
    assert len(after - {piece.name for piece in pieces}) <= 2  # it may end a piece itself


def test_shares_and_restarts_give_the_same_bits(gallery, tmp_path):
    """Whether one process embeds the gallery, or three shares in another order with one piece done again: the same files."""
    refs, tiny = list_gallery([gallery])[0], network()
    whole = EmbeddingCache(tmp_path / "one", ByNetwork(tiny, "squash"), 40)
    shared = EmbeddingCache(tmp_path / "three", ByNetwork(tiny, "squash"), 40)
    pieces = pieces_of(refs)
    for piece in pieces:
        whole.embed(piece)
    for share in (2, 0, 1):
        for piece in reversed(pieces[share::3]):
            shared.embed(piece)
    (shared.folder / f"{pieces[1].name}.arrow").unlink()
    assert [shared.has(piece) for piece in pieces[:3]] == [True, False, True]
    shared.embed(pieces[1])
    for path in whole.folder.iterdir():
        assert path.read_bytes() == (shared.folder / path.name).read_bytes(), path.name


def test_rows_are_the_usable_images(gallery, tmp_path):
    """Every usable image has its row, key and thumbnail, in the gallery's order; the others are told with the reason."""
    refs, tiny = list_gallery([gallery])[0], network()
    cache = EmbeddingCache(tmp_path / "cache", ByNetwork(tiny, "squash"), 40)
    seen = []
    for piece in pieces_of(refs):
        cache.embed(piece, seen.append)
    embedded = cache.load(pieces_of(refs))
    assert sum(seen) == len(refs) == 164
    assert {bad.id for bad in embedded.rejected} == {
        "004-broken.png",
        "050-empty.png",
        "119-cut.png",
        "more.tar/220.png",
    }
    assert all(bad.reason for bad in embedded.rejected)
    assert len(embedded) == 160 == len(np.unique(embedded.keys, axis=0))
    assert embedded.positions.tolist() == [
        i for i, ref in enumerate(refs) if ref.id not in {b.id for b in embedded.rejected}
    ]
    features = all_rows(embedded)
    assert features.dtype == np.float16
    rows = np.array([150, 3, 77])
    for row, small in zip(rows, embedded.thumbs(rows), strict=True):
        ref = refs[embedded.positions[row]]
        number = int(Path(ref.id).stem)
        pixels = texture(CLASSES[number % 3], number)
        assert np.array_equal(small, thumbnail(pixels))
        batch = (torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.5
        assert features[row] == pytest.approx(tiny.forward(batch)[0].detach().numpy(), abs=2e-3)


def test_another_encoder_has_another_folder(gallery, tmp_path):
    """Embeddings of other weights, sizes or ways to resize never meet."""
    tiny = network()
    ways = [(tiny, "squash", 40), (tiny, "pad", 40), (tiny, "squash", 64), (network(2.0), "squash", 40)]
    folders = {EmbeddingCache(tmp_path, ByNetwork(one, resize), side).folder for one, resize, side in ways}
    assert len(folders) == 4


def test_embeddings_that_are_no_number_are_refused(gallery, tmp_path):
    """An encoder that overflows is told, with the mend, and leaves no piece behind."""
    piece = pieces_of(list_gallery([gallery])[0])[0]
    cache = EmbeddingCache(tmp_path / "cache", ByNetwork(network(1e9), "squash"), 40)
    with pytest.raises(TutelageError, match="NaN, infinite or beyond 65,504"):
        cache.embed(piece)
    assert not cache.has(piece)


def test_an_empty_gallery_has_no_pieces():
    """Nothing to embed is no error here."""
    assert pieces_of([]) == []


def test_a_tar_without_a_usable_image(gallery, tmp_path):
    """A shard of which no image can be read is a piece without rows, and all of it is told."""
    with tarfile.open(gallery / "bad.tar", "w") as tar:
        for number in range(3):
            member = tarfile.TarInfo(f"{number}.png")
            member.size = 7
            tar.addfile(member, io.BytesIO(b"nothing"))
    pieces = pieces_of(list_gallery([gallery])[0])
    cache = EmbeddingCache(tmp_path / "cache", ByNetwork(network(), "squash"), 40)
    for piece in pieces:
        cache.embed(piece)
    embedded = cache.load(pieces)
    assert len(embedded) == 160
    assert {"bad.tar/0.png", "bad.tar/1.png", "bad.tar/2.png"} <= {bad.id for bad in embedded.rejected}
    assert Vectors(embedded.layout_parts, None).count == 160
