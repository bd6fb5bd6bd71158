"""The gallery: a large set of unlabelled images to choose from. Nothing is decoded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tutelage.data.sources import ImageRef, Rejected, clean, list_images
from tutelage.errors import TutelageError, raise_all, shown

KINDS = (
    "check the path, or unpack the archives in it; a gallery is a folder, tar or Parquet file with images "
    "(.jpg, .png, .webp, ...; hidden names are skipped)"
)


def list_gallery(paths: Sequence[str | Path]) -> tuple[list[ImageRef], list[Rejected]]:
    """List the images of folders, tars, Parquet files or single images. Nothing is decoded.

    A file reached from two of the paths is listed once. If an id occurs under two paths, all ids are prefixed with the
    name of their path.

    Returns:
        the images, each with a unique id, in the order of the paths and within each path as listed; those that were found but cannot be
        used, and why.

    Raises:
        TutelageError: a path that is missing or cannot be read, or one without images.
    """
    errors: list[TutelageError] = []
    listed: list[tuple[list[ImageRef], list[Rejected]]] = []
    seen: set[bytes] = set()  # the same fingerprint is the same bytes of the same file
    for path in paths:
        try:
            refs, rejected = list_images(path)
        except TutelageError as error:
            errors.append(error)
            continue
        if not refs:
            bad = shown((f"{image.id} ({image.reason})" for image in rejected), 3)
            what = f"no images that can be used: {bad}" if rejected else "no images in it"
            errors.append(TutelageError(f"gallery {path} has {what}", KINDS))
        listed.append(([ref for ref in refs if ref.fingerprint not in seen], rejected))
        seen.update(ref.fingerprint for ref in refs)
    raise_all(errors)

    listed = unique_ids(listed, place_names(paths))
    return [ref for refs, _ in listed for ref in refs], [bad for _, bads in listed for bad in bads]


def place_names(paths: Sequence[str | Path]) -> list[str]:
    """Return a name for every path: its last part, with a number appended if that name is taken."""
    names: list[str] = []
    for path in paths:
        name = stem = clean(os.path.basename(os.path.abspath(path))) or "root"
        number = 2
        while name in names:
            name, number = f"{stem}-{number}", number + 1
        names.append(name)
    return names


def unique_ids(
    listed: list[tuple[list[ImageRef], list[Rejected]]], names: Sequence[str]
) -> list[tuple[list[ImageRef], list[Rejected]]]:
    """Prefix all ids with the name of their path if two paths share an id; otherwise leave the ids unchanged."""
    ids = [{ref.id for ref in refs} for refs, _ in listed]
    if len(set().union(*ids)) == sum(map(len, ids)):
        return listed
    return [
        ([replace(ref, id=f"{name}/{ref.id}") for ref in refs], [Rejected(f"{name}/{b.id}", b.reason) for b in bads])
        for name, (refs, bads) in zip(names, listed, strict=True)
    ]
