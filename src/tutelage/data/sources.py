"""References to images that are not decoded yet: files, members of a tar, or rows of a Parquet file.

Listing reads names and sizes only; `read_bytes` reads the bytes and opens each container once. Nothing is ever
unpacked to disk. An image that cannot be used becomes a `Rejected` (while listing) or is yielded as an
`Unreadable` (while reading): bad images are reported, never silently dropped and never raised.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import struct
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import pyarrow.parquet as pq

from tutelage.data.decode import hidden
from tutelage.data.image_kinds import HEAD, SUFFIXES, is_image
from tutelage.data.tabular import image_column, read_rows
from tutelage.data.walk import (
    CLOSED,
    CONTAINER,
    IMAGE,
    IMAGE_SUFFIXES,
    SIDECARS,
    TAR_SUFFIXES,
    Found,
    kind_of_file,
    walk,
    what_is_ours,
)
from tutelage.errors import TutelageError, Unreadable, did_you_mean, shown
from tutelage.progress import logger
from tutelage.regular_file import regular

__all__ = ["IMAGE_SUFFIXES", "TAR_SUFFIXES", "ImageRef", "Rejected", "list_images", "read_bytes", "what_is_ours"]
MAX_BYTES = 1 << 30  # no image of at most decode.MAX_PIXELS needs more


@dataclass(frozen=True, slots=True)
class ImageRef:
    """Location of the bytes of one image.

    id: its name for people and manifests, always encodable as UTF-8. container: absolute path of the file, the tar or the Parquet file.
    kind: "file", "tar" or "parquet"; "mask" is the mask in a row of a Parquet file.
    position: 0, or the byte where the member's data starts (in the unpacked stream for tar.gz), or the row number.
    length: bytes; -1 for Parquet. fingerprint: 16 bytes; if they are the same as last time, so is the image, and it need not be read.
    """

    id: str
    container: str
    kind: str
    position: int
    length: int
    fingerprint: bytes


SOURCE = ("id", "container", "kind", "position", "length", "fingerprint")  # the fields of an ImageRef


@dataclass(frozen=True, slots=True)
class Rejected:
    """An image, or a whole container, that cannot be used, and why."""

    id: str
    reason: str


def list_images(root: str | Path) -> tuple[list[ImageRef], list[Rejected]]:
    """List the images under a folder, in a .tar, .tar.gz, .tgz or .parquet file, or one image file.

    Folders are walked as `walk.walk` says; tars and Parquet files inside are opened too. Ids are the path under the root, for
    members `tarname/member`, for rows `file.parquet#row`.

    Raises:
        TutelageError: no such path, an unsupported kind of file, a Parquet file without one clear image column, or a folder of tutelage.
    """
    path = os.path.abspath(root)
    if not os.path.exists(path):
        raise missing(root)
    name = os.path.basename(path)
    if os.path.isdir(path):
        found = [one for file in walk(path) for one in _listed(file)]
    elif kind_of_file(path) in (IMAGE, CONTAINER):
        found = _inside(path, clean(name), named=True)
    else:
        hint = f"use a folder, a .tar, .tar.gz, .tgz or .parquet file, or an image ({' '.join(SUFFIXES)})"
        raise TutelageError(f"{root} is not a kind of file that tutelage reads", hint)
    return [one for one in found if isinstance(one, ImageRef)], [one for one in found if isinstance(one, Rejected)]


def file_ref(path: str, id: str) -> ImageRef:
    """Return the reference of one image file. Raises OSError if it is missing or not a regular file."""
    path = os.path.abspath(path)
    status = regular(path)
    return ImageRef(id, path, "file", 0, status.st_size, fingerprints_of("file", path, status)(0))


def read_bytes(refs: Sequence[ImageRef]) -> Iterator[tuple[int, bytes | Unreadable]]:
    """Yield (position in refs, bytes or why they cannot be read) for every reference, by container, never raising.

    Memory holds one image of a file or tar, or BATCH_BYTES of a Parquet column (only the image column is read).
    """
    positions: dict[str, list[int]] = defaultdict(list)
    for i, ref in enumerate(refs):
        positions[ref.container].append(i)
    for wanted in positions.values():
        wanted.sort(key=lambda i: refs[i].position)
        reader = {"file": _read_file, "tar": _read_tar, "parquet": _read_parquet, "mask": _read_parquet}[
            refs[wanted[0]].kind
        ]
        left, reason = iter(wanted), "the container ends before this image"
        try:
            for data in reader([refs[i] for i in wanted]):
                yield next(left), data
        except Exception as error:  # the readers of broken files raise almost anything
            reason = why(error)
        for i in left:
            yield i, Unreadable(reason)


def missing(path: str | Path, flag: str = "") -> TutelageError:
    """Return the error for a path that does not exist, with similar names beside it; `flag` ("--target ") is put first."""
    path = Path(path)
    try:
        beside = os.listdir(path.absolute().parent)
        hint = did_you_mean(path.name, beside, f"check the path; {path.absolute().parent} is there")
    except OSError:
        hint = f"there is no {path.parent} either"
    return TutelageError(f"{flag}{path}: no such file or folder", hint)


def clean(name: str) -> str:
    """Return a file name as a str that UTF-8 can encode; bytes that are not text become \\xNN."""
    try:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        return name.encode("utf-8", "backslashreplace").decode("utf-8")


def why(error: Exception) -> str:
    """Return why a file could not be read, in one short line."""
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    return f"cannot be read: {' '.join(str(error).split())[:120] or type(error).__name__}"


def _listed(file: Found) -> Sequence[ImageRef | Rejected]:
    """Return the images of what lies in a folder."""
    if file.kind == CLOSED:
        return [Rejected(clean(file.name or file.path), f"cannot be read: {file.reason}")]
    return _inside(file.path, clean(file.name), named=False) if file.kind in (IMAGE, CONTAINER) else []


def _inside(path: str, id: str, named: bool) -> Sequence[ImageRef | Rejected]:
    """Return the images of one file. named: whether the user named this very file, so that a wrong kind of Parquet is an error."""
    name = id.lower()
    try:
        if name.endswith(TAR_SUFFIXES):
            return _list_tar(path, id)
        return _list_parquet(path, id) if name.endswith(".parquet") else [file_ref(path, id)]
    except FileNotFoundError:
        reason = "a link to nothing" if os.path.islink(path) else "the file is gone"
    except TutelageError as error:
        if named or "no image column" not in error.message:
            raise
        reason = error.message.removeprefix(f"{path}: ")  # such as a manifest among images
    except Exception as error:  # the readers of broken files raise almost anything
        reason = why(error)
        if named and name.endswith(".parquet"):
            hint = "check that it is a whole Parquet file, or copy it again"
            raise TutelageError(f"{path} {reason}", hint) from error
    return [Rejected(id, reason)]


def fingerprints_of(kind: str, path: str, status: os.stat_result) -> Callable[[int], bytes]:
    """Return a function from position to fingerprint for one container."""
    head = f"{kind}\0".encode() + os.fsencode(path) + struct.pack("<xqq", status.st_size, status.st_mtime_ns)
    base = hashlib.blake2b(head, digest_size=16)

    def fingerprint(position: int) -> bytes:
        digest = base.copy()
        digest.update(struct.pack("<q", position))
        return digest.digest()

    return fingerprint


# Tar


def _open_tar(path: str) -> IO[bytes]:
    """Open the byte stream of a tar; of a compressed tar the unpacked stream, which is read forwards only."""
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return cast(IO[bytes], gzip.open(path, "rb")) if packed else open(path, "rb")


def _list_tar(path: str, id: str) -> list[ImageRef | Rejected]:
    """Return the images of a tar. Of members with the same name the last one counts, as when unpacked."""
    status = regular(path)
    fingerprint = fingerprints_of("tar", path, status)
    last: dict[str, ImageRef] = {}
    rejected: list[Rejected] = []
    others: list[str] = []
    with _open_tar(path) as stream:
        size = None if isinstance(stream, gzip.GzipFile) else status.st_size
        try:
            for member, head in _members(stream, size):
                name = clean(member.name).removeprefix("./")
                member_id = f"{id}/{name}"
                if reason := _refusal(member):
                    rejected.append(Rejected(member_id, reason))
                elif not member.isreg() or any(map(hidden, name.split("/"))) or name.lower().endswith(SIDECARS):
                    continue
                elif not (name.lower().endswith(IMAGE_SUFFIXES) or is_image(head)):
                    others.append(name)
                else:
                    if member_id in last:
                        reason = "this name comes again later in the tar; the last one counts"
                        rejected.append(Rejected(member_id, reason))
                    at = member.offset_data
                    last[member_id] = ImageRef(member_id, path, "tar", at, member.size, fingerprint(at))
        except Unreadable as error:
            rejected.append(Rejected(id, f"{error}; images before that are used"))
    if others:
        logger.info(f"members of {path} that are no images: {shown(others)}")
    refs = sorted(last.values(), key=lambda ref: ref.position)
    return [*refs, *rejected]


def _members(stream: IO[bytes], size: int | None) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Yield the complete members, each with its first HEAD bytes; raise Unreadable where the tar breaks off or is inconsistent.

    size: bytes of the stream if known (plain tar), None if only reading reveals it (tar.gz).
    """
    end, name = 0, ""
    try:
        with tarfile.open(fileobj=stream, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep all of them
                name, start = member.name, member.offset_data
                if member.size < 0 or start < end:
                    raise Unreadable(f"broken at byte {end}: a member that goes backwards")
                data_end = start + (member.size if member.isreg() and not member.issparse() else 0)
                stream.seek(start)
                head = stream.read(min(HEAD, data_end - start))
                if not _reaches(stream, data_end, size):
                    break
                yield member, head
                end, name = data_end, ""
            end = end if name else tar.offset
            stream.seek(end)
            if not name and stream.read(512) == bytes(512):
                return
    except Unreadable:
        raise
    except Exception as error:
        if size is None or end + 1024 < size:
            raise Unreadable(f"broken off after byte {end}: {why(error)}") from None
    inside = f", inside {clean(name)}" if name else ""
    if size is not None and (name or end + 512 > size):
        raise Unreadable(f"the tar breaks off at byte {size}{inside}")
    raise Unreadable(f"the tar is broken or breaks off after byte {end}{inside}")


def _reaches(stream: IO[bytes], end: int, size: int | None) -> bool:
    """Return whether the stream has at least `end` bytes."""
    if size is not None:
        return end <= size
    stream.seek(max(end - 1, stream.tell()))
    return end == 0 or stream.tell() >= end or len(stream.read(1)) == 1


def _refusal(member: tarfile.TarInfo) -> str:
    """Return why a member is refused whatever its suffix, or an empty string."""
    if member.isdir():
        return ""
    parts = member.name.replace("\\", "/").split("/")
    if parts[0] == "" or re.match(r"[A-Za-z]:", parts[0]):
        return "an absolute path in a tar"
    if ".." in parts:
        return "a path with .. in a tar"
    if member.issym() or member.islnk():
        return "a link in a tar"
    if not member.isreg():
        return "a device or pipe in a tar"
    return "a sparse file in a tar" if member.issparse() else ""


def _read_tar(refs: list[ImageRef]) -> Iterator[bytes | Unreadable]:
    with _open_tar(refs[0].container) as stream:
        for ref in refs:
            if ref.length > MAX_BYTES:
                yield Unreadable(f"{ref.length:,} bytes, the limit is {MAX_BYTES:,}")
                continue
            stream.seek(ref.position)
            data = stream.read(ref.length)
            yield data if len(data) == ref.length else Unreadable("the tar breaks off inside this image")


def _read_file(refs: list[ImageRef]) -> Iterator[bytes | Unreadable]:
    for ref in refs:
        with open(ref.container, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        yield data if len(data) <= MAX_BYTES else Unreadable(f"more than {MAX_BYTES:,} bytes")


# Parquet


def _read_parquet(refs: list[ImageRef]) -> Iterator[bytes | Unreadable]:
    return read_rows(refs[0].container, [ref.position for ref in refs], refs[0].kind == "mask")


def _list_parquet(path: str, id: str) -> list[ImageRef]:
    fingerprint = fingerprints_of("parquet", path, regular(path))
    with pq.ParquetFile(path) as file:
        image_column(file.schema_arrow, path)
        rows = file.metadata.num_rows
    return [ImageRef(f"{id}#{row}", path, "parquet", row, -1, fingerprint(row)) for row in range(rows)]
