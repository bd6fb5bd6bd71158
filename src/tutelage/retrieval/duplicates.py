"""Near duplicates: pictures that are copies of each other, re-encoded, resized, cropped to 90 % or mirrored.

Candidates come from two searches, since each finds what the other misses: embeddings find crops (all within the 5 nearest
of 22,700; a JPEG of a 32-pixel image at quality 40 only within 888), the layout of small pixels finds everything else
(all within the 3 nearest; crops only within 4,114). A candidate is confirmed on 16 x 16 thumbnails: one image's thumbnail
against crops of the other, in every place. All in three opponent colours (grey; red - blue; red - 2 green + blue).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache

import numpy as np

from tutelage.data.decode import fit

THUMB = 16
DETAIL = 64  # pixels of a held image from which its crops are made
COPIES = (
    20  # neighbours to search for a held image, by embedding and by layout; more copies than these may slip through
)
FLOOR = 0.45  # of either cosine: the embeddings of copies to 90 % start at 0.51, the layouts of other copies at 0.68
NEIGHBOURS = 10  # of each image in near_duplicates
SURE = 0.8  # layouts above this are looked at whatever the embeddings say
CROPS = (0.95, 0.9)  # sides of the crops; what lies between is reached by the shift below
STEP = 0.025  # of their corners, in sides; half of it is 0.2 of a thumbnail's pixels
HOW = ("", "same picture", "mirrored", "cropped", "cropped and mirrored")

# A copy: residual against local structure at most LOCAL everywhere, and against the whole picture's at most OVERALL.
# Of 1,000 copies (32 and 224 px, a third as JPEG at quality 40) 99.5 % stay below 0.75 and 0.21. Other pictures: CIFAR's
# 5,000 most alike pairs that are no copies start at 1.0, emoji (another face on the same disc) at 0.76.
LOCAL, OVERALL = 0.85, 0.3
WORTH = 0.6  # a crop whose layout is further off than this is not compared: twice OVERALL
NOISE = 8.0  # levels of structure that a window is taken to have at least: rounding and JPEG are no difference
FAINT = 1.5  # levels of residual that are allowed in a picture without structure
WINDOW = 4  # pixels of a thumbnail; 6 tells mouths and small emblems less well apart
SHIFT, GAIN = 0.75, 0.2  # how far a crop may be moved (in pixels of a thumbnail) and its contrast changed to agree
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
    held: Sequence[np.ndarray], thumb_parts: Iterable[np.ndarray], k: int = COPIES
) -> tuple[np.ndarray, np.ndarray]:
    """The gallery images whose layout is nearest to that of a held image or of its mirror image.

    Args:
        held: H images, (H_i, W_i, 3) uint8 each. thumb_parts: (n, 16, 16, 3) uint8 each, the gallery in pieces.

    Returns:
        (H, k) float32 cosines and (H, k) int64 rows of the gallery, best first; -1 where there are no more.
    """
    import faiss

    thumbs = np.array([thumbnail(image) for image in held], np.uint8).reshape(-1, THUMB, THUMB, 3)
    queries = layout(np.concatenate([thumbs, thumbs[:, :, ::-1]]))
    heap = faiss.ResultHeap(len(queries), k, keep_max=True)
    start = 0
    for part in thumb_parts:
        index = faiss.IndexFlatIP(queries.shape[1])
        index.add(layout(np.asarray(part)))  # type: ignore[call-arg]
        similarity, rows = index.search(queries, k)  # type: ignore[call-arg]
        heap.add_result(similarity, np.where(rows < 0, -1, rows + start))
        start += len(part)
    heap.finalize()
    similarity = np.concatenate(np.split(heap.D, 2), axis=1)
    rows = np.concatenate(np.split(heap.I, 2), axis=1).astype(np.int64)
    similarity[rows < 0] = -np.inf
    order = np.argsort(-similarity, axis=1, kind="stable")
    similarity, rows = np.take_along_axis(similarity, order, 1), np.take_along_axis(rows, order, 1)
    twice = np.array([[row in line[:at] for at, row in enumerate(line)] for line in rows.tolist()], bool)
    twice = twice.reshape(rows.shape)  # found by the image and by its mirror image
    similarity[twice], rows[twice] = -np.inf, -1
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarity, order, 1), np.take_along_axis(rows, order, 1)


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
    found: dict[int, tuple[int, int, str, float]] = {}
    for position in range(len(held)):
        near: dict[int, float] = {}
        for row, cosine in zip(rows[position].tolist(), similarity[position].tolist(), strict=True):
            if row >= 0 and cosine >= FLOOR:
                near[row] = max(cosine, near.get(row, cosine))
        candidates = np.array(sorted(near), np.int64)
        if len(candidates):
            how = confirm(held[position], thumbs(candidates))
            for row, kind in zip(candidates[how > 0].tolist(), how[how > 0].tolist(), strict=True):
                if row not in found or near[row] > found[row][3]:
                    found[row] = (row, position, HOW[kind], near[row])
        advance(1)
    return [found[row] for row in sorted(found)]


def confirm(image: np.ndarray, thumbs: np.ndarray) -> np.ndarray:
    """Which thumbnails show the picture of an image, or a crop of it, or a picture that it is a crop of.

    Args:
        image: (H, W, 3) uint8. thumbs: (m, 16, 16, 3) uint8.

    Returns:
        (m,) int64, index in HOW: 0 another picture, 1 the same, 2 mirrored, 3 cropped, 4 cropped and mirrored.
    """
    small = _opponent(thumbs)
    forth = _matches(_opponent(fit(image, DETAIL, "squash")[None]), _with_mirrored(small[None]))
    how = _kind(forth[0])
    rest = np.flatnonzero(how == 0)
    if len(rest):
        own = np.repeat(_opponent(thumbnail(image)[None, None]), len(rest), axis=0)
        how[rest] = _kind(_matches(small[rest], _with_mirrored(own))[:, 0])
    return how


def near_duplicates(embeddings: np.ndarray, thumbs: np.ndarray, floor: float = FLOOR) -> np.ndarray:
    """The first image of each picture: an image is a duplicate when it is a copy of an earlier one that is none.

    Images that are copies of a duplicate only (a crop of a crop) are kept.

    Args:
        embeddings: (n, D) float32, unit length. thumbs: (n, 16, 16, 3) uint8.
        floor: pairs whose embeddings have a smaller cosine are looked at only when their layouts agree to SURE.

    Returns:
        (n,) int64: the smallest position of a kept image that this one is a copy of; its own where it is kept.
    """
    pairs = _pairs(embeddings, layout(thumbs), floor)
    partners: list[list[int]] = [[] for _ in range(len(thumbs))]
    for a, b in pairs.tolist():
        partners[a].append(b)
        partners[b].append(a)
    copies: set[tuple[int, int]] = set()
    small = _opponent(thumbs)
    for position, others in enumerate(partners):
        if others:
            how = _kind(_matches(small[position][None], _with_mirrored(small[others][None]))[0])
            copies |= {(min(position, b), max(position, b)) for b in np.array(others)[how > 0].tolist()}
    first = np.arange(len(thumbs))
    for a, b in sorted(copies, key=lambda pair: (pair[1], pair[0])):
        if first[a] == a and first[b] == b:
            first[b] = a
    return first


def _pairs(embeddings: np.ndarray, layouts: np.ndarray, floor: float) -> np.ndarray:
    """(p, 2) int64, a < b: whom to look at, of the nearest neighbours by embedding and by layout (mirrored ones too)."""
    import faiss

    found = [np.zeros((0, 2), np.int64)]
    half = THUMB // 2
    mirrored = layouts.reshape(-1, half, half, 3)[:, :, ::-1].reshape(layouts.shape)
    for base, queries in ((embeddings, embeddings), (layouts, layouts), (layouts, np.ascontiguousarray(mirrored))):
        index = faiss.IndexFlatIP(base.shape[1])
        index.add(np.ascontiguousarray(base, np.float32))  # type: ignore[call-arg]
        cosines, near = index.search(np.ascontiguousarray(queries, np.float32), NEIGHBOURS + 1)  # type: ignore[call-arg]
        a, b, cosine = np.repeat(np.arange(len(base)), near.shape[1]), near.ravel(), cosines.ravel()
        good = (b >= 0) & (a != b) & (cosine >= (floor if base is embeddings else SURE))
        a, b = a[good], b[good]
        if base is embeddings:  # copies that are nothing alike in layout are too far cropped to be confirmed
            alike = np.maximum((layouts[a] * layouts[b]).sum(axis=1), (mirrored[a] * layouts[b]).sum(axis=1))
            blank = (np.linalg.norm(layouts[a], axis=1) < 0.99) & (np.linalg.norm(layouts[b], axis=1) < 0.99)
            keep = (alike >= FLOOR) | blank
            a, b = a[keep], b[keep]
        found.append(np.stack([np.minimum(a, b), np.maximum(a, b)], axis=1))
    return np.unique(np.concatenate(found), axis=0)


def _opponent(images: np.ndarray) -> np.ndarray:
    """(..., 3) uint8 RGB -> (..., 3) float32 grey and two colours, lengths kept but for COLOUR."""
    return images.astype(np.float32) @ _OPPONENT


def _halved(thumbs: np.ndarray) -> np.ndarray:
    """(..., 16, 16, 3) float32 -> (..., 8, 8, 3): means of 2 x 2 pixels."""
    half = THUMB // 2
    return thumbs.reshape(*thumbs.shape[:-3], half, 2, half, 2, 3).mean(axis=(-4, -2))


def _with_mirrored(thumbs: np.ndarray) -> np.ndarray:
    """(n, m, 16, 16, 3) -> (n, 2 m, 16, 16, 3): as they are, then mirrored."""
    return np.concatenate([thumbs, thumbs[:, :, :, ::-1]], axis=1)


@cache
def _lines(size: int, pixels: int) -> np.ndarray:
    """(9, pixels, size) float32: how a line of pixels and its crops are resized, as Pillow's bilinear does. The whole is first."""
    lines = []
    for side in (1.0, *CROPS):
        for corner in np.arange(0, 1 - side + 1e-6, STEP):
            scale = side * size / pixels
            centres = corner * size + (np.arange(pixels) + 0.5) * scale
            weights = np.maximum(1 - np.abs(np.arange(size) + 0.5 - centres[:, None]) / max(scale, 1), 0)
            lines.append(weights / weights.sum(axis=1, keepdims=True))
    return np.array(lines, np.float32)


def _layouts_of_crops(images: np.ndarray) -> np.ndarray:
    """(n, S, S, 3) float32 -> (n, 81, 192) float32: 8 x 8 pixels of the whole, then of every crop, less their mean."""
    half = THUMB // 2
    lines = _lines(images.shape[1], half)
    flat = lines.reshape(-1, lines.shape[2])
    every = flat @ images.transpose(0, 3, 1, 2) @ flat.T
    every = every.reshape(len(images), 3, len(lines), half, len(lines), half)
    every -= every.mean(axis=(3, 5), keepdims=True)
    return np.ascontiguousarray(every.transpose(0, 2, 4, 3, 5, 1)).reshape(len(images), len(lines) ** 2, -1)


def _crop(images: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """(m, S, S, 3) float32 and (m,) in [0, 81): which crop -> (m, 16, 16, 3) float32."""
    lines = _lines(images.shape[1], THUMB)
    down, across = np.divmod(numbers, len(lines))
    crops = lines[down][:, None] @ images.transpose(0, 3, 1, 2) @ lines[across][:, None].transpose(0, 1, 3, 2)
    return crops.transpose(0, 2, 3, 1)


def _less_mean(images: np.ndarray) -> np.ndarray:
    """(..., h, w, 3) float32 -> (..., h * w * 3): without their mean colour."""
    return (images - images.mean(axis=(-3, -2), keepdims=True)).reshape(*images.shape[:-3], -1)


def _matches(images: np.ndarray, thumbs: np.ndarray) -> np.ndarray:
    """Whether a thumbnail agrees with the whole of an image, and with the crop whose layout fits it best.

    Args:
        images: (n, S, S, 3) float32, opponent colours. thumbs: (n, 2 m, 16, 16, 3) float32 from `_with_mirrored`.

    Returns:
        (n, m, 2, 2) bool: as it is, mirrored; whole, cropped.
    """
    count, several = thumbs.shape[:2]
    a, b = _layouts_of_crops(images), _less_mean(_halved(thumbs))
    length = np.square(b).sum(axis=2)[:, :, None]
    apart = length + np.square(a).sum(axis=2)[:, None, :] - 2 * b @ a.transpose(0, 2, 1)
    best = np.stack([np.zeros((count, several), np.int64), 1 + apart[:, :, 1:].argmin(axis=2)], axis=2)
    apart = np.take_along_axis(apart, best, 2)
    pixels = b.shape[2] / 3
    near = apart <= FAINT**2 * pixels + WORTH**2 * length  # the rest cannot be made to agree
    image, thumb, which = np.nonzero(near)
    agree = np.zeros(near.shape, bool)
    agree[near] = _agree(_crop(images[image], best[image, thumb, which]), thumbs[image, thumb])
    return agree.reshape(count, 2, several // 2, 2).swapaxes(1, 2)


def _kind(agree: np.ndarray) -> np.ndarray:
    """(m, 2, 2) bool from `_matches` -> (m,) int64, index in HOW of the simplest that agrees."""
    ordered = agree.swapaxes(1, 2).reshape(-1, 4)  # whole, whole mirrored, cropped, cropped and mirrored
    return np.where(ordered.any(axis=1), ordered.argmax(axis=1) + 1, 0)


def _agree(shown: np.ndarray, thumbs: np.ndarray) -> np.ndarray:
    """Whether two thumbnails are of one picture.

    One is moved and stretched by up to SHIFT pixels and its contrast changed by up to GAIN so that it agrees best with
    the other (least squares of the first derivatives); what is left must be small everywhere, by the structure there.

    Args:
        shown: (m, 16, 16, 3) float32, to be moved. thumbs: (m, 16, 16, 3) float32.

    Returns:
        (m,) bool.
    """
    if not len(shown):
        return np.zeros(0, bool)
    mean_shown, mean_thumbs = shown.mean(axis=(1, 2), keepdims=True), thumbs.mean(axis=(1, 2), keepdims=True)
    a, b = shown - mean_shown, thumbs - mean_thumbs
    down, across = np.gradient(a, axis=1), np.gradient(a, axis=2)
    place = ((np.arange(THUMB) + 0.5) / THUMB * 2 - 1).astype(np.float32)
    x, y = place[None, None, :, None], place[None, :, None, None]
    ways = np.stack([across, across * x, down, down * y, a], axis=4)
    ways = (ways - ways.mean(axis=(1, 2), keepdims=True)).reshape(len(a), -1, 5)
    left = (b - a).reshape(len(a), -1, 1)
    normal = ways.transpose(0, 2, 1) @ ways + np.eye(5, dtype=np.float32)  # of a blank image nothing is moved
    most = np.array([SHIFT, SHIFT, SHIFT, SHIFT, GAIN], np.float32)
    amount = np.clip(np.linalg.solve(normal, ways.transpose(0, 2, 1) @ left)[:, :, 0], -most, most)
    left = (left[:, :, 0] - (ways @ amount[:, :, None])[:, :, 0]).reshape(a.shape)

    contrast = np.sqrt((np.square(a) + np.square(b)).sum(axis=3).mean(axis=(1, 2)) / 2)
    overall = np.square(left).sum(axis=3).mean(axis=(1, 2)) <= FAINT**2 + np.square(OVERALL * contrast)
    structure = (_variance(a) + _variance(b)) / 2 + NOISE**2
    local = (_window(np.square(left).sum(axis=3)) <= LOCAL**2 * structure).all(axis=(1, 2))
    # Brightness may change by 17 of 255 levels and colour by half of that, but not where colour is all there is to see.
    shift = np.abs(mean_shown - mean_thumbs)[:, 0, 0]
    grey = shift[:, 0] <= np.minimum(4 + 0.3 * contrast, 30)
    colour = (shift[:, 1:] <= np.minimum(2 + 0.06 * contrast, 8)[:, None]).all(axis=1)
    return overall & local & grey & colour


def _window(values: np.ndarray) -> np.ndarray:
    """(m, 16, 16, ...) float32 -> (m, 13, 13, ...): means of all windows of 4 x 4 pixels."""
    most = THUMB - WINDOW + 1
    rows = sum(values[:, at : at + most] for at in range(WINDOW))
    return sum(rows[:, :, at : at + most] for at in range(WINDOW)) / np.float32(WINDOW**2)


def _variance(values: np.ndarray) -> np.ndarray:
    """(m, 16, 16, 3) float32 -> (m, 13, 13): variance in all windows, summed over the colours."""
    return _window(np.square(values).sum(axis=3)) - np.square(_window(values)).sum(axis=3)
