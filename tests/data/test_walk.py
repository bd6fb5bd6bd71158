"""The walk that training and `predict` share: which files are images, whatever they are called, and which folders are entered."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from tutelage.data import image_kinds
from tutelage.data.decode import decode
from tutelage.data.gallery import list_gallery
from tutelage.data.sources import list_images, read_bytes
from tutelage.deploy.runtime import files_in
from tutelage.errors import TutelageError, Unreadable

NOISE = Image.effect_noise((12, 8), 60).convert("RGB")
HEIC = b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf" + bytes(40)


def encoded(kind: str, image: Image.Image = NOISE, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def put(path: Path, data: bytes | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded("PNG") if data is None else data)
    return path


def both(place: Path) -> list[str]:
    """The images of a folder, for which training and `predict` must agree."""
    trained = [ref.id for ref in list_images(place)[0]]
    assert [Path(one).relative_to(place).as_posix() for one in files_in([str(place)])] == trained
    return trained


@pytest.mark.parametrize(
    "ending", ["ico", "tga", "pcx", "sgi", "dds", "dib", "qoi", "jpx", "apng", "jpeg~", "png_orig", "", "3"]
)
def test_the_first_bytes_decide_not_the_ending(tmp_path: Path, ending: str):
    """Every kind that Pillow reads safely is found under its own ending, and under none, and read as it was stored."""
    kind = {"": "WEBP", "3": "TIFF", "jpx": "JPEG2000", "jpeg~": "JPEG", "png_orig": "PNG", "apng": "PNG"}.get(
        ending, ending.upper()
    )
    options = {"WEBP": {"lossless": True}, "ICO": {"sizes": [(12, 8)]}}.get(kind, {})
    data = encoded(kind, **options)
    put(tmp_path / ("photo." + ending if ending else "photo"), data)
    put(tmp_path / "another", data)
    assert len(both(tmp_path)) == 2
    rgb, size = decode(data)
    assert size == (8, 12)
    if kind not in ("JPEG", "ICO"):
        np.testing.assert_array_equal(rgb, np.asarray(NOISE))


@pytest.mark.parametrize("kind", ["ICO", "TGA", "PCX", "SGI", "DDS", "DIB", "QOI"])
def test_every_cut_of_the_rarer_kinds(kind: str):
    """Wherever such a file breaks off, decoding gives an image or says why not."""
    data = encoded(kind)
    for end in range(0, len(data), 7):
        with contextlib.suppress(Unreadable):
            assert decode(data[:end])[0].shape[2] == 3


def test_what_is_no_image_is_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch):
    """Texts, films and data among images are counted in one line, archives named in another, pictures of other kinds rejected."""
    monkeypatch.setattr(image_kinds, "_HEIF", None)
    monkeypatch.setattr(logging.getLogger("tutelage"), "propagate", True)
    put(tmp_path / "1.bmp", encoded("BMP"))
    put(tmp_path / "IMG_2", HEIC)
    put(tmp_path / "3.exr", b"v/1\1" + bytes(60))
    put(tmp_path / "film.mp4", b"\0\0\0\x18ftypisom\0\0\2\0isommp42" + bytes(40))
    put(tmp_path / "notes", b"Begin with these.\n")
    put(tmp_path / "sub" / "labels.csv", b"path,label\n")
    put(tmp_path / "font.ttf", b"\0\1\0\0\0\x0c\0\x80\0\3\0\x40" + bytes(40))
    put(tmp_path / "rest.tar.zst", b"\x28\xb5\x2f\xfd" + bytes(40))
    with caplog.at_level(logging.INFO, "tutelage"):
        refs, _ = list_images(tmp_path)
    assert [ref.id for ref in refs] == ["1.bmp", "3.exr", "IMG_2"]
    assert f"4 files of 8 in {tmp_path} are no images: film.mp4, font.ttf, notes, sub/labels.csv" in caplog.text
    assert f"{tmp_path} holds archives that are not read: rest.tar.zst; unpack them" in caplog.text
    reasons = {}
    for i, data in read_bytes(refs):
        assert isinstance(data, bytes)
        try:
            decode(data)
        except Unreadable as error:
            reasons[refs[i].id] = str(error)
    assert "pip install pillow-heif" in reasons["IMG_2"]
    assert "OpenEXR, not an image of a kind that is read" in reasons["3.exr"]
    assert set(reasons) == {"3.exr", "IMG_2"}


def test_a_raw_photograph_is_no_small_preview(tmp_path: Path):
    """Of a raw photograph in a TIFF, whose first image is a preview, the preview is not taken for the photograph."""
    for tags in ({254: 1}, {50706: b"\1\4\0\0"}):
        with pytest.raises(Unreadable, match="raw photograph"):
            decode(encoded("TIFF", tiffinfo=tags))


def test_members_of_a_tar_without_endings(tmp_path: Path):
    """In tars, packed or not, the first bytes of a member decide too."""
    members = {
        "a": encoded("PNG"),
        "b.gif_small": encoded("GIF"),
        "c.bin": b"nothing",
        "d.txt": b"P1 is",
        ".e": encoded("PNG"),
    }
    for name, mode in (("t.tar", "w"), ("t.tgz", "w:gz")):
        with tarfile.open(tmp_path / name, mode) as tar:  # type: ignore[call-overload]
            for member, data in members.items():
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        refs, rejected = list_images(tmp_path / name)
        assert ([ref.id for ref in refs], rejected) == ([f"{name}/a", f"{name}/b.gif_small"], [])
        assert [data for _, data in read_bytes(refs)] == [members["a"], members["b.gif_small"]]


def test_a_place_may_be_one_image_without_ending(tmp_path: Path):
    """A single file that is named is an image if its first bytes say so."""
    assert [ref.id for ref in list_images(put(tmp_path / "photo"))[0]] == ["photo"]
    with pytest.raises(TutelageError, match="not a kind of file"):
        list_images(put(tmp_path / "text", b"words"))


def test_folders_that_link_each_other_are_walked_once(tmp_path: Path):
    """A folder is walked once, by its own place before any link; one that lies elsewhere by the first of its links."""
    names = [f"f{i}" for i in range(6)]
    for name in names:
        put(tmp_path / "in" / name / "1.png")
    put(tmp_path / "out" / "x" / "1.png")
    for name in names:
        for other in names:
            if other != name:
                (tmp_path / "in" / name / f"to-{other}").symlink_to(tmp_path / "in" / other)
    (tmp_path / "in" / "a-link").symlink_to(tmp_path / "in" / "f3")
    (tmp_path / "in" / "b").symlink_to(tmp_path / "out")
    (tmp_path / "in" / "c").symlink_to(tmp_path / "out" / "x")
    (tmp_path / "out" / "x" / "back").symlink_to(tmp_path / "in" / "f1")
    (tmp_path / "in" / "self").symlink_to("self")
    assert both(tmp_path / "in") == ["b/x/1.png", *(f"{name}/1.png" for name in names)]


def test_a_link_that_leads_up_is_not_followed(tmp_path: Path):
    """Neither to what holds the place, nor, from a folder that lies elsewhere, to what holds the link."""
    put(tmp_path / "all" / "photos" / "deep" / "1.png")
    put(tmp_path / "all" / "others" / "2.png")
    put(tmp_path / "far" / "away" / "3.png")
    put(tmp_path / "far" / "4.png")
    (tmp_path / "all" / "photos" / "deep" / "up").symlink_to("../..")
    (tmp_path / "all" / "photos" / "root").symlink_to("/")
    (tmp_path / "all" / "photos" / "away").symlink_to(tmp_path / "far" / "away")
    (tmp_path / "far" / "away" / "up").symlink_to("..")
    assert both(tmp_path / "all" / "photos") == ["away/3.png", "deep/1.png"]


def test_what_tutelage_wrote_is_left_out_or_refused(tmp_path: Path):
    """A run among photos is left out by training and `predict`, also behind a link; a place inside of one is refused by both."""
    photos, run = tmp_path / "photos", tmp_path / "photos" / "runs" / "one"
    put(photos / "1.png")
    put(run / "curate" / "montage.jpg")
    put(tmp_path / "other" / "export.json", b"{}")
    put(tmp_path / "other" / "preprocess.json", b"{}")
    put(tmp_path / "other" / "examples" / "1.png")
    (run / "settings.toml").write_text('[versions]\ntutelage = "1"\n')
    (photos / "link").symlink_to(tmp_path / "other" / "examples")
    assert both(photos) == ["1.png"]
    for place in (run, run / "curate", tmp_path / "other" / "examples"):
        for read in (list_images, lambda one: files_in([str(one)])):
            with pytest.raises(TutelageError, match=r"lies in .*, (a run|an export) of tutelage"):
                read(place)
    with pytest.raises(TutelageError, match="a run of tutelage"):
        list_gallery([photos, run / "curate"])
    (run / "settings.toml").write_text("[app]\n")  # another program's settings above somebody's photos
    assert [ref.id for ref in list_images(run / "curate")[0]] == ["montage.jpg"]


def test_predict_names_what_it_does_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch):
    """Tars, which training reads, are named by `predict` instead of passed over."""
    monkeypatch.setattr(logging.getLogger("tutelage"), "propagate", True)
    put(tmp_path / "1.png")
    tarfile.open(tmp_path / "more.tar", "w").close()
    assert files_in([str(tmp_path)]) == [str(tmp_path / "1.png")]
    assert "tars and Parquet files, which predict does not read: more.tar" in caplog.text


def test_a_closed_folder_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch):
    """A folder that cannot be opened is rejected by name, and named by `predict`; the others are read."""
    put(tmp_path / "shut" / "1.png")
    put(tmp_path / "2.png")
    scandir = os.scandir

    def closed(folder: str):
        if Path(folder).name == "shut":
            raise PermissionError(errno.EACCES, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", closed)  # the tests run as root, which may open every folder
    monkeypatch.setattr(logging.getLogger("tutelage"), "propagate", True)
    refs, rejected = list_images(tmp_path)
    assert [ref.id for ref in refs] == ["2.png"]
    assert [(bad.id, bad.reason) for bad in rejected] == [("shut", "cannot be read: Permission denied")]
    assert files_in([str(tmp_path)]) == [str(tmp_path / "2.png")]
    assert f"folders that cannot be opened: {tmp_path / 'shut'} (Permission denied)" in caplog.text


def test_heic_is_read_where_its_reader_is_installed(monkeypatch):
    """With pillow-heif HEIC is read by it, and AVIF of the same container is not."""
    monkeypatch.setattr(image_kinds, "_HEIF", lambda data: PngImagePlugin.PngImageFile(io.BytesIO(encoded("PNG"))))
    np.testing.assert_array_equal(decode(HEIC)[0], np.asarray(NOISE))
    with pytest.raises(Unreadable):
        decode(HEIC.replace(b"heic", b"avif"))
