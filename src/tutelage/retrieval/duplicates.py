"""Near duplicates: pictures that are copies of each other, re-encoded, resized, cropped to 90 % or mirrored.

Candidates come from two searches, since each finds what the other misses: embeddings find crops (all within the 5 nearest
of 22,700; a JPEG of a 32-pixel image at quality 40 only within 888), the layout of small pixels finds everything else
(all within the 3 nearest; crops only within 4,114). A candidate is confirmed on 16 x 16 thumbnails: one image's thumbnail
against crops of the other, in every place. All in three opponent colours (grey; red - blue; red - 2 green + blue).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import numpy as np
from threadpoolctl import threadpool_limits

from tutelage.data.decode import fit
from tutelage.retrieval.graph import COMPONENTS, unit_embeddings
from tutelage.retrieval.search import search
from tutelage.retrieval.vectors import Vectors

THUMB = 16
DETAIL = 64  # pixels of a held image from which its crops are made
COPIES = (
    20  # neighbours to search for a held image, by embedding and by layout; more copies than these may slip through
)
FLOOR = 0.45  # of either cosine: the embeddings of copies to 90 % start at 0.51, the layouts of other copies at 0.68
NEIGHBOURS = 10  # of each image in near_duplicates
MANY = 5_000  # images, above which only their first principal components are searched: 2 s instead of 5 for 20,000
SURE = 0.8  # layouts above this are looked at whatever the embeddings say
CROPS = (0.95, 0.9)  # sides of the crops; what lies between is reached by the shift below
STEP = 0.025  # of their corners, in sides; half of it is 0.2 of a thumbnail's pixels
HOW = ("", "same picture", "mirrored", "cropped", "cropped and mirrored")

# A copy: residual against local structure at most LOCAL everywhere, and against the whole picture's at most OVERALL.
# Of 1,000 copies (32 and 224 px, a third as JPEG at quality 40) 99.5 % stay below 0.75 and 0.21. Other pictures: CIFAR's
# 5,000 most alike pairs that are no copies start at 1.0, emoji (another face on the same disc) at 0.76.
LOCAL, OVERALL = 0.8, 0.3
WORTH = 0.45  # a crop whose layout is further off is not compared: copies reach 0.32, and their contrast may change
BLOCK = 1024  # pairs looked at in one go: 80 MB
NOISE = 16.0  # levels of structure that a window is taken to have at least: rounding and JPEG are no difference
FAINT = 1.5  # levels of residual that are allowed in a picture without structure
WINDOW = 3  # pixels of a thumbnail; with 4, 5 emoji for 3 pass as another face
SHIFT, GAIN = 0.75, 0.12  # how far a crop may be moved (in pixels of a thumbnail) and its contrast changed to agree
COLOUR = 0.5  # weight of colour against grey: JPEG at quality 40 harms colour twice as much

_OPPONENT = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]], np.float32) / np.sqrt([[3], [2], [6]], dtype=np.float32)
_OPPONENT = np.ascontiguousarray((_OPPONENT * np.array([[1], [COLOUR], [COLOUR]], np.float32)).T)


def thumbnail(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> (16, 16, 3) uint8: the whole image, squashed, antialiased."""
    return fit(image, THUMB, "squash")


def layout(thumbs: np.ndarray) -> np.ndarray:
    """What is light and what is dark where, for a search by inner product.

    Args:
        thumbs: (n, 16, 16, 3) uint8.

    Returns:
        (n, 192) float32: 8 x 8 pixels without their mean colour, of unit length; shorter where there is hardly any
        structure, so that the rounding of a blank image looks like nothing.
    """
    flat = _less_mean(_halved(_opponent(thumbs)))
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), THUMB // 2)  # one level a pixel


def search_layouts(
    held: Sequence[np.ndarray], layouts: Vectors, k: int = COPIES, memory: int | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The gallery images whose layout is nearest to that of a held image or of its mirror image.

    Args:
        held: H images, (H_i, W_i, 3) uint8 each. layouts: those of the gallery, 192 features, as they are.
        memory, advance: as in `search`.

    Returns:
        (H, 2 k) float32 cosines and (H, 2 k) int64 rows of the gallery: k for the image, k for its mirror image; a row may be in both;
        -1 where there are no more.
    """
    thumbs = np.array([thumbnail(image) for image in held], np.uint8).reshape(-1, THUMB, THUMB, 3)
    queries = layout(np.concatenate([thumbs, thumbs[:, :, ::-1]]))
    similarity, rows = search(layouts, queries, k, memory=memory, advance=advance)
    return (np.concatenate(np.split(similarity, 2), axis=1), np.concatenate(np.split(rows, 2), axis=1))


def find_leaks(
    similarity: np.ndarray,
    rows: np.ndarray,
    held: Sequence[np.ndarray],
    thumbs: Callable[[np.ndarray], np.ndarray],
    advance: Callable[[int], None] = lambda n: None,
) -> list[tuple[int, int, str, float]]:
    """Gallery images that are copies of held-out images.

    Args:
        similarity: (H, k) float32 cosines; those below FLOOR are passed over.
        rows: (H, k) int64, gallery images near each held image: by embedding and by `search_layouts`, side by side in
            any order; -1 for none.
        held: H images, (H_i, W_i, 3) uint8 each. thumbs: (m,) int64 rows -> their (m, 16, 16, 3) uint8 thumbnails.
        advance: called with the number of held images just done.

    Returns:
        (row, position of the held image, how, similarity), ordered by row, each row once with the most similar image
        that it is a copy of. how: one of HOW[1:].
    """

    def copies_of(position: int) -> list[tuple[int, int, str, float]]:
        near: dict[int, float] = {}
        for row, cosine in zip(rows[position].tolist(), similarity[position].tolist(), strict=True):
            if row >= 0 and cosine >= FLOOR:
                near[row] = max(cosine, near.get(row, cosine))
        candidates = np.array(sorted(near), np.int64)
        how = confirm(held[position], thumbs(candidates)) if len(candidates) else candidates
        kinds = zip(candidates[how > 0].tolist(), how[how > 0].tolist(), strict=True)
        return [(row, position, HOW[kind], near[row]) for row, kind in kinds]

    found: dict[int, tuple[int, int, str, float]] = {}
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(os.cpu_count()) as pool:
        for copies in pool.map(copies_of, range(len(held))):
            for copy in copies:
                if copy[0] not in found or copy[3] > found[copy[0]][3]:
                    found[copy[0]] = copy
            advance(1)
    return [found[row] for row in sorted(found)]


def confirm(image: np.ndarray, thumbs: np.ndarray) -> np.ndarray:
    """Which thumbnails show the picture of an image, or a crop of it, or a picture that it is a crop of.

    Args:
        image: (H, W, 3) uint8. thumbs: (m, 16, 16, 3) uint8.

    Returns:
        (m,) int64, index in HOW: 0 another picture, 1 the same, 2 mirrored, 3 cropped, 4 cropped and mirrored.
    """
    small, own = _opponent(thumbs), _opponent(thumbnail(image)[None])
    every = np.arange(len(thumbs))
    how = _compare(_opponent(fit(image, DETAIL, "squash")[None]), small, 0 * every, every)
    rest = np.flatnonzero(how == 0)
    how[rest] = _compare(small[rest], own, every[: len(rest)], 0 * rest)
    return how


def near_duplicates(
    embeddings: np.ndarray, thumbs: np.ndarray, floor: float = FLOOR, fresh: np.ndarray | None = None
) -> np.ndarray:
    """The first image of each picture: an image is a duplicate when it is a copy of an earlier one that is none.

    Images that are copies of a duplicate only (a crop of a crop) are kept.

    Args:
        embeddings: (n, D) float32, unit length. thumbs: (n, 16, 16, 3) uint8.
        floor: pairs whose embeddings have a smaller cosine are looked at only when their layouts agree to SURE.
        fresh: (m,) int64 positions; the others are known not to be copies of each other. None: nothing is known.

    Returns:
        (n,) int64: the smallest position of a kept image that this one is a copy of; its own where it is kept.
    """
    first, small, layouts = np.arange(len(thumbs)), _opponent(thumbs), layout(thumbs)
    asked = first if fresh is None else fresh
    while len(asked):  # of many copies of one picture, the neighbours of some are all dropped: those are asked again
        kept = np.flatnonzero(first == np.arange(len(first)))
        pairs = kept[_pairs(embeddings[kept], layouts[kept], floor, np.searchsorted(kept, asked))]
        for b, a in _copies(small, pairs).tolist():
            if first[a] == a and first[b] == b:
                first[b] = a
        dropped = first[pairs] != pairs
        asked = np.unique(pairs[dropped.any(axis=1)])
        asked = asked[first[asked] == asked] if dropped.any() else asked[:0]
    while (first[first] != first).any():  # kept at first, and dropped later
        first = first[first]
    return first


def _copies(small: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Of pairs (p, 2) int64, those that are copies of each other: (q, 2), the later first, in its order."""
    pairs = np.concatenate([pairs, pairs[:, ::-1]])  # either may be a crop of the other
    pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]

    def copies_in(start: int) -> np.ndarray:
        block = pairs[start : start + BLOCK]
        source, number = np.unique(block[:, 0], return_inverse=True)
        other, target = np.unique(block[:, 1], return_inverse=True)
        return block[_compare(small[source], small[other], number, target) > 0]

    # Two threads of BLAS on busy cores took 3 times as long.
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(os.cpu_count()) as pool:
        copies = [np.zeros((0, 2), np.int64), *pool.map(copies_in, range(0, len(pairs), BLOCK))]
    return np.unique(np.sort(np.concatenate(copies), axis=1)[:, ::-1], axis=0)


def _pairs(embeddings: np.ndarray, layouts: np.ndarray, floor: float, fresh: np.ndarray) -> np.ndarray:
    """(p, 2) int64, a < b: whom to look at, of the nearest neighbours of `fresh` by embedding and by layout (mirrored ones too)."""
    half = THUMB // 2
    mirrored = np.ascontiguousarray(layouts.reshape(-1, half, half, 3)[:, :, ::-1]).reshape(layouts.shape)
    if len(fresh) > MANY and embeddings.shape[1] > COMPONENTS:
        embeddings = unit_embeddings(embeddings)
    a, b = _near(embeddings, embeddings, floor, fresh)
    blank = np.minimum(_length(layouts[a]), _length(layouts[b])) < 0.99  # their layout says little
    alike = [np.einsum("pd,pd->p", one[a], layouts[b]) for one in (layouts, mirrored)]
    keep = blank | (np.maximum(*alike) >= FLOOR)
    found = [(a[keep], b[keep]), *(_near(layouts, queries, SURE, fresh) for queries in (layouts, mirrored))]
    pairs = np.concatenate([np.stack(both, axis=1) for both in found])
    return np.unique(np.sort(pairs, axis=1), axis=0)


def _near(base: np.ndarray, queries: np.ndarray, floor: float, fresh: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(p,), (p,) int64: pairs of a query in `fresh` and one of its nearest in base, not itself, with at least this cosine."""
    import faiss

    index = faiss.IndexFlatIP(base.shape[1])
    index.add(np.ascontiguousarray(base, np.float32))  # type: ignore[call-arg]
    cosines, near = index.search(np.ascontiguousarray(queries[fresh], np.float32), NEIGHBOURS + 1)  # type: ignore[call-arg]
    query, near = np.repeat(fresh, near.shape[1]), near.ravel()
    good = (near >= 0) & (near != query) & (cosines.ravel() >= floor)
    return query[good], near[good]


def _opponent(images: np.ndarray) -> np.ndarray:
    """(..., 3) uint8 RGB -> (..., 3) float32 grey and two colours, lengths kept but for COLOUR."""
    return images.astype(np.float32) @ _OPPONENT


def _halved(thumbs: np.ndarray) -> np.ndarray:
    """(..., 16, 16, 3) float32 -> (..., 8, 8, 3): means of 2 x 2 pixels."""
    rows = thumbs[..., ::2, :, :] + thumbs[..., 1::2, :, :]  # 20 times as fast as mean() over two short axes
    return (rows[..., ::2, :] + rows[..., 1::2, :]) / np.float32(4)


@cache
def _lines(size: int, pixels: int) -> np.ndarray:
    """(9, pixels, size) float32: how a line of pixels and its crops are resized. The whole is first.

    Shrunk as Pillow's bilinear does; enlarged by the cubic with a = -0.75: crops of thumbnails made bilinearly are so
    blurred that 39 of 100 copies cropped to 90 % were not known again, and are 7 of 100 so.
    """
    lines = []
    for side in (1.0, *CROPS):
        for corner in np.arange(0, 1 - side + 1e-6, STEP):
            scale = side * size / pixels
            centres = corner * size + (np.arange(pixels) + 0.5) * scale
            x = np.abs(np.arange(size) + 0.5 - centres[:, None]) / max(scale, 1)
            near, far = 1.25 * x**3 - 2.25 * x**2 + 1, -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
            cubic = np.where(x < 1, near, np.where(x < 2, far, 0))
            weights = cubic if scale < 1 else np.maximum(1 - x, 0)
            lines.append(weights / weights.sum(axis=1, keepdims=True))
    return np.array(lines, np.float32)


def _layouts_of_crops(images: np.ndarray) -> np.ndarray:
    """(n, S, S, 3) float32 -> (n, 81, 192) float32: 8 x 8 pixels of the whole, then of every crop, less their mean."""
    half = THUMB // 2
    lines = _lines(images.shape[1], half)
    flat = lines.reshape(-1, lines.shape[2])
    every = flat @ images.transpose(0, 3, 1, 2) @ flat.T
    every = every.reshape(len(images), 3, len(lines), half, len(lines), half)
    mean = lines.mean(axis=1)
    every -= (mean @ images.transpose(0, 3, 1, 2) @ mean.T)[:, :, :, None, :, None]
    return np.ascontiguousarray(every.transpose(0, 2, 4, 3, 5, 1)).reshape(len(images), len(lines) ** 2, 3 * half**2)


def _crop(images: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """(m, S, S, 3) float32 and (m,) in [0, 81): which crop -> (m, 16, 16, 3) float32."""
    lines = _lines(images.shape[1], THUMB)
    down, across = np.divmod(numbers, len(lines))
    crops = lines[down][:, None] @ images.transpose(0, 3, 1, 2) @ lines[across][:, None].transpose(0, 1, 3, 2)
    return crops.transpose(0, 2, 3, 1)


def _less_mean(images: np.ndarray) -> np.ndarray:
    """(..., h, w, 3) float32 -> (..., h * w * 3): without their mean colour."""
    *others, height, width, colours = images.shape
    flat = images.reshape(*others, height * width, colours)
    return (flat - flat.mean(axis=-2, keepdims=True)).reshape(*others, height * width * colours)


def _length(vectors: np.ndarray) -> np.ndarray:
    """(..., d) float32 -> (...): squared lengths."""
    return np.einsum("...d,...d->...", vectors, vectors)


def _compare(images: np.ndarray, thumbs: np.ndarray, image: np.ndarray, thumb: np.ndarray) -> np.ndarray:
    """How pairs of an image and a thumbnail are related: the whole image, and of its crops the one whose layout fits best.

    Args:
        images: (n, S, S, 3) float32. thumbs: (t, 16, 16, 3) float32. Both in opponent colours.
        image, thumb: (p,) int64, which of them; ordered by image.

    Returns:
        (p,) int64, index in HOW: the simplest that agrees.
    """
    layouts = _layouts_of_crops(images)
    mirrored = thumbs[:, :, ::-1]
    small = _halved(thumbs)
    small = np.stack([small, small[:, :, ::-1]])
    wanted = _less_mean(small)
    length = _length(wanted)
    worth = FAINT**2 * (THUMB // 2) ** 2 + WORTH**2 * length
    crop = np.zeros((2, 2, len(image)), np.int64)  # whole or cropped; as it is or mirrored; pair
    near = np.zeros(crop.shape, bool)
    ends = np.searchsorted(image, np.arange(len(images) + 1))
    for number, (start, end) in enumerate(pairwise(ends)):
        here = wanted[:, thumb[start:end]]
        apart = length[:, thumb[start:end], None] + _length(layouts[number]) - 2 * here @ layouts[number].T
        best = 1 + apart[:, :, 1:].argmin(axis=2)
        crop[1, :, start:end] = best
        least = np.stack([apart[:, :, 0], np.take_along_axis(apart, best[:, :, None], 2)[:, :, 0]])
        near[:, :, start:end] = least <= worth[:, thumb[start:end]]
    agree = np.zeros(crop.shape, bool)
    cropped, turned, pair = np.nonzero(near)
    for start in range(0, len(pair), BLOCK):
        which = tuple(index[start : start + BLOCK] for index in (cropped, turned, pair))
        shown = _crop(images[image[which[2]]], crop[which])
        targets = np.where(which[1][:, None, None, None] == 1, mirrored[thumb[which[2]]], thumbs[thumb[which[2]]])
        agree[which] = _agree(shown, targets)
    ordered = agree.reshape(4, -1)  # whole, whole mirrored, cropped, cropped and mirrored
    return np.where(ordered.any(axis=0), ordered.argmax(axis=0) + 1, 0)


def _agree(shown: np.ndarray, thumbs: np.ndarray) -> np.ndarray:
    """Whether two thumbnails are of one picture: colours first, since that takes little, then `_structure_agrees`.

    Args:
        shown: (m, 16, 16, 3) float32, which may be moved a little. thumbs: (m, 16, 16, 3) float32.

    Returns:
        (m,) bool.
    """
    a, b = (images - images.mean(axis=(1, 2), keepdims=True) for images in (shown, thumbs))
    contrast = np.sqrt((np.square(a) + np.square(b)).sum(axis=3).mean(axis=(1, 2)) / 2)
    # Brightness may change by 17 of 255 levels and colour by half of that, but not where colour is all there is to see.
    shift = np.abs(shown.mean(axis=(1, 2)) - thumbs.mean(axis=(1, 2)))
    agree = shift[:, 0] <= np.minimum(4 + 0.3 * contrast, 30)
    agree &= (shift[:, 1:] <= np.minimum(2 + 0.06 * contrast, 8)[:, None]).all(axis=1)
    if agree.any():
        agree[agree] = _structure_agrees(a[agree], b[agree], contrast[agree])
    return agree


def _structure_agrees(a: np.ndarray, b: np.ndarray, contrast: np.ndarray) -> np.ndarray:
    """Whether what is left between two thumbnails is small on the whole, and everywhere by the structure there.

    Before, one is moved and stretched by up to SHIFT pixels and its contrast changed by up to GAIN so that it agrees best
    with the other (least squares of the first derivatives, as Lucas and Kanade, IJCAI 1981).

    Args:
        a: (m, 16, 16, 3) float32 without its mean, to be moved. b: (m, 16, 16, 3) float32, likewise. contrast: (m,).

    Returns:
        (m,) bool.
    """
    down, across = np.gradient(a, axis=(1, 2))
    place = ((np.arange(THUMB) + 0.5) / THUMB * 2 - 1).astype(np.float32)
    x, y = place[:, None], place[:, None, None]
    ways = np.stack([across, across * x, down, down * y, a], axis=1)
    ways = (ways - ways.mean(axis=(2, 3), keepdims=True)).reshape(len(a), 5, -1)
    left = (b - a).reshape(len(a), -1, 1)
    normal = ways @ ways.transpose(0, 2, 1) + np.eye(5, dtype=np.float32)  # of a blank image nothing is moved
    most = np.array([SHIFT, SHIFT, SHIFT, SHIFT, GAIN], np.float32)
    amount = np.clip(np.linalg.solve(normal, ways @ left)[:, :, 0], -most, most)
    rest = np.square(left[:, :, 0] - (amount[:, None] @ ways)[:, 0]).reshape(a.shape).sum(axis=3)

    overall = rest.mean(axis=(1, 2)) <= FAINT**2 + np.square(OVERALL * contrast)
    structure = (_variance(a) + _variance(b)) / 2 + NOISE**2
    return overall & (_window(rest) <= LOCAL**2 * structure).all(axis=(1, 2))


def _window(values: np.ndarray) -> np.ndarray:
    """(m, 16, 16, ...) float32 -> (m, 14, 14, ...): means of all windows of 3 x 3 pixels."""
    most = THUMB - WINDOW + 1
    rows = np.add.reduce([values[:, at : at + most] for at in range(WINDOW)])
    return np.add.reduce([rows[:, :, at : at + most] for at in range(WINDOW)]) / np.float32(WINDOW**2)


def _variance(values: np.ndarray) -> np.ndarray:
    """(m, 16, 16, 3) float32 -> (m, 14, 14): variance in all windows, summed over the colours."""
    return _window(np.square(values).sum(axis=3)) - np.square(_window(values)).sum(axis=3)
