"""What an image is before it is decoded: folders, tars, Parquet files, and galleries made of them."""

from __future__ import annotations

import gzip
import io
import os
import struct
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from conftest import DATA
from tutelage.data import tabular
from tutelage.data.gallery import list_gallery
from tutelage.data.sources import ImageRef, list_images, read_bytes
from tutelage.errors import TutelageError, Unreadable


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (2, 2), value).save(buffer, "PNG")
    return buffer.getvalue()


def put(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(value))
    return path


def make_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def make_parquet(path: Path, images: list[bytes | None], **options) -> Path:
    rows = [None if data is None else {"bytes": data, "path": f"{i}.png"} for i, data in enumerate(images)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(rows, kind), "label": pa.array(range(len(rows)), pa.int64())})
    pq.write_table(table, path, **options)
    return path


def ids(root: Path) -> list[str]:
    return [ref.id for ref in list_images(root)[0]]


def contents(refs: list[ImageRef]) -> dict[str, bytes | str]:
    return {refs[i].id: data if isinstance(data, bytes) else str(data) for i, data in read_bytes(refs)}


def test_a_folder_is_listed_sorted_with_all_that_is_in_it(tmp_path: Path):
    """Images, tars and Parquet files under a folder are listed in order of name; hidden and other files are not."""
    for name in ("b/2.JPG", "b/10.webp", "a.png", ".hidden.png", ".cache/x.png", "b/._2.JPG", "c.avif", "z.tiff"):
        put(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    make_tar(tmp_path / "m.tar", {"./x/1.png": png(1), "x/1.json": b"{}", ".h/2.png": b"", "0.png": png(2)})
    make_parquet(tmp_path / "p.parquet", [png(3), png(4)])
    refs, rejected = list_images(tmp_path)
    assert [r.id for r in refs] == [
        "a.png", "b/10.webp", "b/2.JPG", "c.avif", "m.tar/x/1.png", "m.tar/0.png", "p.parquet#0", "p.parquet#1",
        "z.tiff",
    ]  # fmt: skip
    assert rejected == []
    assert [r.kind for r in refs] == ["file"] * 4 + ["tar"] * 2 + ["parquet"] * 2 + ["file"]
    assert all(os.path.isabs(r.container) and len(r.fingerprint) == 16 for r in refs)
    assert len({r.fingerprint for r in refs}) == len(refs)
    got = contents(refs)
    assert got["m.tar/x/1.png"] == png(1)
    assert got["m.tar/0.png"] == png(2)
    assert got["p.parquet#1"] == png(4)
    assert got["a.png"] == png(0)


def test_single_files_are_places_too(tmp_path: Path):
    """One image, one tar or one Parquet file can be named itself; relative paths work."""
    put(tmp_path / "one.png")
    make_tar(tmp_path / "t.tar", {"i.png": png(1)})
    make_parquet(tmp_path / "p.parquet", [png(1)])
    assert ids(tmp_path / "one.png") == ["one.png"]
    assert ids(tmp_path / "t.tar") == ["t.tar/i.png"]
    assert ids(Path(os.path.relpath(tmp_path / "p.parquet"))) == ["p.parquet#0"]
    with pytest.raises(TutelageError, match=r"hint: use a folder, a \.tar"):
        list_images(put(tmp_path / "x.zip"))


def test_a_missing_path_is_told_with_the_nearest_name(tmp_path: Path):
    """A misspelt path is an error that names what is there."""
    (tmp_path / "gallery").mkdir()
    with pytest.raises(TutelageError, match=r"no such file or folder(.|\n)*did you mean 'gallery'"):
        list_images(tmp_path / "galery")
    with pytest.raises(TutelageError, match="either"):
        list_images(tmp_path / "no" / "where")


def test_links_are_followed_but_never_in_circles(tmp_path: Path):
    """Linked files and folders are listed, a link upwards ends, and a link to nothing is told."""
    put(tmp_path / "real" / "a.png")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "b.png").symlink_to(tmp_path / "real" / "a.png")
    (tmp_path / "root" / "folder").symlink_to(tmp_path / "real")
    (tmp_path / "root" / "loop").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "gone.png").symlink_to(tmp_path / "nothing.png")
    os.mkfifo(tmp_path / "root" / "pipe.png")
    os.mkfifo(tmp_path / "root" / "pipe.tar")
    refs, rejected = list_images(tmp_path / "root")
    assert [r.id for r in refs] == ["b.png", "folder/a.png"]
    assert {r.id: r.reason for r in rejected} == {
        "gone.png": "a link to nothing",
        "pipe.png": "cannot be read: not a regular file",
        "pipe.tar": "cannot be read: not a regular file",
    }


def test_any_name_works(tmp_path: Path):
    """Unicode, line breaks and bytes that are no text keep their files readable under ids that UTF-8 can encode."""
    names = [os.fsencode(n) for n in ("日本 語.png", "a\nb.png", "ünï.png")] + [b"bad\xff.png"]
    for value, name in enumerate(names):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(png(value))
    make_tar(tmp_path / "t.tar", {"ß\n.png": png(9), "bad\udcfe.png": png(8)})
    refs, rejected = list_images(tmp_path)
    assert rejected == []
    assert [r.id.encode("utf-8") for r in refs]
    got = contents(refs)
    assert got["日本 語.png"] == png(0)
    assert got["a\nb.png"] == png(1)
    assert got["bad\\xff.png"] == png(3)
    assert got["t.tar/ß\n.png"] == png(9)
    assert got["t.tar/bad\\xfe.png"] == png(8)


def test_the_fingerprint_changes_with_the_file(tmp_path: Path):
    """The fingerprint is the same while the file is, and another after it was written again."""
    path = put(tmp_path / "a.png")
    first = list_images(path)[0][0]
    assert list_images(path)[0][0] == first
    os.utime(path, ns=(1, first.position + 10**18))
    assert list_images(path)[0][0].fingerprint != first.fingerprint


def test_a_hostile_tar_is_harmless(tmp_path: Path):
    """Absolute paths, .., links and devices are rejected with the reason; nothing is written; the rest is read."""
    root = tmp_path / "root"
    root.mkdir()
    with tarfile.open(root / "t.tar", "w") as tar:

        def add(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", data: bytes = b"") -> None:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, link, len(data)
            tar.addfile(info, io.BytesIO(data))

        add("/etc/evil.png", data=png(1))
        add("a/../../evil.png", data=png(1))
        add("..\\evil.png", data=png(1))
        add("C:\\evil.png", data=png(1))
        add("link.png", tarfile.SYMTYPE, "/etc/passwd")
        add("hard.png", tarfile.LNKTYPE, "good.png")
        add("null.png", tarfile.CHRTYPE)
        add("pipe.png", tarfile.FIFOTYPE)
        add("folder", tarfile.DIRTYPE)
        add("twice.png", data=png(1))
        add("good.png", data=png(7))
        add("twice.png", data=png(2))
        add("none.png")
    refs, rejected = list_images(root)
    reasons = {r.id: r.reason for r in rejected}
    assert reasons["t.tar//etc/evil.png"] == reasons["t.tar/C:\\evil.png"] == "an absolute path in a tar"
    assert reasons["t.tar/a/../../evil.png"] == reasons["t.tar/..\\evil.png"] == "a path with .. in a tar"
    assert reasons["t.tar/link.png"] == reasons["t.tar/hard.png"] == "a link in a tar"
    assert reasons["t.tar/null.png"] == reasons["t.tar/pipe.png"] == "a device or pipe in a tar"
    assert "the last one counts" in reasons["t.tar/twice.png"]
    assert len(rejected) == 9
    assert contents(refs) == {"t.tar/good.png": png(7), "t.tar/twice.png": png(2), "t.tar/none.png": b""}
    assert [p.name for p in tmp_path.rglob("*")] == ["root", "t.tar"]


@pytest.mark.parametrize("packed", [False, True])
def test_a_tar_that_breaks_off_keeps_what_came_before(tmp_path: Path, packed: bool):
    """However a tar ends early, the whole images before that are used and one row says where it ended."""
    members = {f"{i}.png": bytes(os.urandom(700)) for i in range(4)}  # a header block and two data blocks each
    whole = make_tar(tmp_path / "w.tar", members).read_bytes()
    name = "t.tar.gz" if packed else "t.tar"
    for end, kept in [(3 * 1536 + 900, 3), (2 * 1536, 2), (2 * 1536 + 100, 2), (512 + 200, 0), (4 * 1536, 4), (100, 0)]:
        data = gzip.compress(whole)[: -len(whole) // 4] if packed and end == 100 else whole[:end]
        path = tmp_path / name
        path.write_bytes(gzip.compress(data) if packed and end != 100 else data)
        refs, rejected = list_images(path)
        if not (packed and end == 100):
            assert [r.id for r in refs] == [f"{name}/{i}.png" for i in range(kept)], end
        assert [r.id for r in rejected] == [name], end
        assert "break" in rejected[0].reason or "broke" in rejected[0].reason
        if not packed:
            assert f"byte {end}" in rejected[0].reason
        assert contents(refs) == {r.id: members[r.id.split("/")[-1]] for r in refs}


def test_rubbish_called_tar(tmp_path: Path):
    """A text, an empty file, a tar with rubbish in its middle and one that goes backwards are told, and end."""
    whole = make_tar(tmp_path / "w", {"a.png": png(1), "b.png": png(2)}).read_bytes()
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "text.tar").write_bytes(b"this is a text\n" * 1000)
    (tmp_path / "middle.tar").write_bytes(whole[:1024] + b"x" * 512 + whole[1536:])
    back = bytearray(whole)
    back[124:136] = b"\xff" * 4 + struct.pack(">q", -1024)  # size in base 256: negative
    back[148:156] = b"%06o\0 " % (sum(back[:148]) + 8 * 32 + sum(back[156:512]))
    (tmp_path / "back.tar").write_bytes(bytes(back))
    refs, rejected = list_images(tmp_path)
    assert [r.id for r in refs] == ["middle.tar/a.png"]
    assert [r.id for r in rejected] == ["back.tar", "empty.tar", "middle.tar", "text.tar"]


@pytest.mark.parametrize("name", ["t.tar.gz", "t.tgz", "t.tar"])
def test_compressed_tars(tmp_path: Path, name: str):
    """A gzipped tar gives the same images, in any order of asking, also when it is called .tar."""
    members = {f"{i}.png": png(i) * (i % 5 + 1) for i in range(40)}
    refs, rejected = list_images(make_tar(tmp_path / name, members, "w:gz"))
    assert rejected == []
    assert contents(refs[::-1]) == {f"{name}/{n}": data for n, data in members.items()}


def test_parquet_is_read_by_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Any selection of rows is read, in batches, and null images are told; the label column is never read."""
    images = [png(i % 256) if i % 7 else None for i in range(100)]
    path = make_parquet(tmp_path / "p.parquet", images, row_group_size=30)
    asked: list[list[str]] = []
    original = pq.ParquetFile.iter_batches

    def spy(self, *args, **kwargs):
        asked.append(kwargs["columns"])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    monkeypatch.setattr(tabular, "BATCH_BYTES", 500)
    refs, _ = list_images(path)
    got = contents(refs)
    assert [got[f"p.parquet#{i}"] for i in range(100)] == [x or "the row holds no image bytes" for x in images]
    assert asked == [["image.bytes"]] * 4
    some = [refs[i] for i in (95, 3, 3, 64)]
    assert [i for i, _ in read_bytes(some)] == [1, 2, 3, 0]
    assert len(asked) == 7


def test_the_image_column_is_found_or_asked_for(tmp_path: Path):
    """A struct with bytes or a binary column of a known name is the image; none or several are an error with names."""
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"x": [1], "JPG": pa.array([png(5)], pa.large_binary()), "mask": [b"m"]}), path)
    assert contents(list_images(path)[0]) == {"p.parquet#0": png(5)}
    pq.write_table(pa.table({"image": [{"bytes": b"", "path": ""}], "png": [b""]}), path)
    with pytest.raises(TutelageError, match=r"2 image columns \(image, png\)"):
        list_images(path)
    with pytest.raises(TutelageError, match="2 image columns"):
        list_images(tmp_path)
    pq.write_table(pa.table({"name": ["a"], "label": [1]}), path)
    with pytest.raises(TutelageError, match=r"no image column \(columns: name \(string\), label \(int64\)\)"):
        list_images(path)
    put(tmp_path / "a.png")
    refs, rejected = list_images(tmp_path)
    assert [r.id for r in refs] == ["a.png"]
    assert "no image column" in rejected[0].reason
    path.write_bytes(b"PAR1 no more")
    with pytest.raises(TutelageError, match="whole Parquet file"):
        list_images(path)
    assert list_images(tmp_path)[1][0].id == "p.parquet"


def test_reading_never_raises(tmp_path: Path):
    """Files that vanish or break between listing and reading are yielded as unreadable, the others still read."""
    for name in ("a.png", "b.png", "c.png"):
        put(tmp_path / name)
    make_tar(tmp_path / "t.tar", {"1.png": png(1), "2.png": png(2)})
    make_parquet(tmp_path / "p.parquet", [png(1), png(2)])
    refs, _ = list_images(tmp_path)
    (tmp_path / "b.png").unlink()
    (tmp_path / "p.parquet").write_bytes(b"rubbish")
    data = (tmp_path / "t.tar").read_bytes()
    (tmp_path / "t.tar").write_bytes(data[:1030])
    got = dict(read_bytes(refs))
    assert sorted(got) == list(range(7))
    assert [refs[i].id for i, x in got.items() if isinstance(x, Unreadable)] == [
        "b.png", "p.parquet#0", "p.parquet#1", "t.tar/2.png",
    ]  # fmt: skip
    assert "No such file" in str(got[1])


def test_a_gallery_of_several_places(tmp_path: Path):
    """Several places become one gallery; ids that collide get the place's name, and the same file counts once."""
    for name in ("x/a/1.png", "y/a/1.png", "x/a/2.png", "z/3.png"):
        put(tmp_path / name)
    gallery, _ = list_gallery([tmp_path / "x" / "a", tmp_path / "z"])
    assert [r.id for r in gallery] == ["1.png", "2.png", "3.png"]
    gallery, _ = list_gallery([tmp_path / "x" / "a", tmp_path / "y" / "a", tmp_path / "z", str(tmp_path / "z")])
    assert [r.id for r in gallery] == ["a/1.png", "a/2.png", "a-2/1.png", "z/3.png"]


def test_a_gallery_without_images_is_an_error(tmp_path: Path):
    """Empty, missing and unusable places are all told at once."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").symlink_to("nothing")
    with pytest.raises(TutelageError) as caught:
        list_gallery([tmp_path / "empty", tmp_path / "bad", tmp_path / "none"])
    text = str(caught.value)
    assert "no images in it" in text
    assert "a.png (a link to nothing)" in text
    assert "none: no such file" in text
    assert len(caught.value.errors) == 3


@pytest.mark.skipif(not (DATA / "photos1k").is_dir(), reason=f"no photos1k in {DATA}")
def test_real_tars():
    """Two real tar shards list 1,000 images, and read as tarfile reads them."""
    gallery, rejected = list_gallery([DATA / "photos1k" / "00000.tar", DATA / "photos1k" / "00001.tar"])
    assert (len(gallery), rejected) == (1000, [])
    got = contents(gallery)
    with tarfile.open(DATA / "photos1k" / "00001.tar") as tar:
        for member in tar.getmembers()[::50]:
            file = tar.extractfile(member)
            assert file is not None
            assert got[f"00001.tar/{member.name}"] == file.read()
