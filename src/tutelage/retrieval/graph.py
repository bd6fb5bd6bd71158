"""Neighbours of embeddings, and label propagation over them."""

from __future__ import annotations

import numpy as np

NEIGHBOURS = 20
ALPHA = 0.99  # how far labels travel; 0.95 to 0.99 differ by less than a point
SHARPNESS = 3  # power of the cosine in the graph's weights
COMPONENTS = 256  # principal components kept for the search: the graph is as good and the search 5 times faster


def principal_axes(features: np.ndarray, components: int = COMPONENTS) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and the first principal axes (D, min(D, components)) of (n, D) float32 features, the largest first."""
    from threadpoolctl import threadpool_limits

    mean = features.mean(axis=0)
    centred = features - mean
    with threadpool_limits(1):  # on busy cores two threads of eigh took 6 to 10 s instead of 0.6
        _, vectors = np.linalg.eigh((centred.T @ centred).astype(np.float64))
    return mean, np.ascontiguousarray(vectors[:, ::-1][:, :components].astype(np.float32))


def unit_embeddings(features: np.ndarray, components: int = COMPONENTS) -> np.ndarray:
    """Centred features on their first principal components, at unit length.

    Args:
        features: (n, D) float32.

    Returns:
        (n, min(D, components)) float32.
    """
    centred = features - features.mean(axis=0)
    if centred.shape[1] > components:
        centred = centred @ principal_axes(features, components)[1]
    return np.ascontiguousarray(centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12))


def neighbour_graph(embeddings: np.ndarray, neighbours: int = NEIGHBOURS):
    """Symmetric, normalised nearest-neighbour graph (Zhou et al., NIPS 2003; Iscen et al., CVPR 2019).

    A_ij = max(cos_ij, 0)^3 for the k nearest j of i; W = A + A^T; S = D^-1/2 W D^-1/2.

    Args:
        embeddings: (n, d) float32, unit length.
        neighbours: k, cut to n - 1.

    Returns:
        scipy.sparse CSR matrix (n, n) float32.
    """
    import faiss
    import scipy.sparse as sparse

    count = len(embeddings)
    k = min(neighbours, count - 1)
    index = faiss.IndexFlatIP(embeddings.shape[1])
    index.add(embeddings)  # type: ignore[call-arg]
    similarity, near = index.search(embeddings, k + 1)  # type: ignore[call-arg]
    own = near == np.arange(count)[:, None]
    own[~own.any(axis=1), -1] = True  # an exact duplicate may stand before the image itself
    rows = np.repeat(np.arange(count), k)
    weights = np.maximum(similarity[~own], 0) ** SHARPNESS
    graph = sparse.csr_matrix((weights, (rows, near[~own])), shape=(count, count), dtype=np.float32)
    graph = graph + graph.T
    scale = sparse.diags(1 / np.sqrt(np.maximum(np.asarray(graph.sum(axis=1)).ravel(), 1e-12)))
    return (scale @ graph @ scale).tocsr().astype(np.float32)


def propagate(graph, labelled: np.ndarray, labels: np.ndarray, shares: np.ndarray, steps: int = 30) -> np.ndarray:
    """Label propagation with the classes' shares held: what the labelled images' neighbourhoods say of every image.

    F <- alpha S F + (1 - alpha) Y from F = Y (Zhou et al., NIPS 2003), then rows and columns are scaled in turn until
    the classes' sums agree with `shares` (Sinkhorn).

    Args:
        graph: (n, n) from neighbour_graph.
        labelled: (m,) int64 positions. labels: (m,) int64 in [0, C).
        shares: (C,) float64, expected share of each class, sums to 1.

    Returns:
        (n, C) float32 probabilities. An image that no label reaches starts from `shares`, and takes what they lack; where
        whole parts of the graph hear of one class only, the sums cannot agree with `shares` and stay nearer to the labels.
    """
    start = np.zeros((graph.shape[0], len(shares)), dtype=np.float32)
    start[labelled, labels] = 1
    flow = start.copy()
    for _ in range(steps):
        flow = ALPHA * (graph @ flow) + (1 - ALPHA) * start
    reached = flow.sum(axis=1) > 1e-12
    flow[~reached] = shares
    for _ in range(20):
        flow = flow * (shares * len(flow) / np.maximum(flow.sum(axis=0), 1e-12))
        flow = flow / np.maximum(flow.sum(axis=1, keepdims=True), 1e-12)
    return flow.astype(np.float32)


def mixed_logits(view_logits: np.ndarray, propagated: np.ndarray) -> np.ndarray:
    """Geometric mean of a view's probabilities and the image's propagated ones, as logits.

    Args:
        view_logits: (B, C) float32. propagated: (B, C) float32 probabilities.

    Returns:
        (B, C) float32: (log softmax(view) + log propagated) / 2.
    """
    shifted = view_logits - view_logits.max(axis=1, keepdims=True)
    log_view = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return 0.5 * (log_view + np.log(np.maximum(propagated, 1e-6)))
