"""What QuickSelection is compared with: two classical unsupervised scores that read a graph of near neighbours.

Shapes: N samples, D features, C clusters. Both keep [N, N] as a sparse graph.
"""

from typing import Any

import numpy as np

from saelab.base.surroundings import OwnRandomness


def laplacian_score(X: Any, *, neighbors: int = 5) -> np.ndarray:
    """Laplacian score of each feature [d]: the *smaller*, the better it keeps near neighbours together.

    With the graph S, D = diag(S 1), L = D - S and f centred by D: f^T L f / f^T D f (He, Cai and Niyogi, NIPS 2005, equation
    7). Constant features get infinity. The width of the heat kernel is the neighbours' mean squared distance (our choice).

    >>> X = np.array([[0.0, 0.0], [0.1, 1.0], [5.0, 0.0], [5.1, 1.0]])
    >>> laplacian_score(X, neighbors=1).argmin()
    np.int64(0)
    """
    X = np.asarray(X, dtype=np.float64)
    graph, degree_N = neighbor_graph(X, neighbors)
    centred = X - (degree_N @ X) / degree_N.sum()
    spread_D = np.einsum("nd,n,nd->d", centred, degree_N, centred)
    together_D = np.einsum("nd,nd->d", centred, graph @ centred)
    constant_D = np.ptp(X, axis=0) == 0
    return np.where(constant_D, np.inf, (spread_D - together_D) / np.where(constant_D, 1.0, spread_D))


def mcfs(X: Any, n_features: int, *, n_clusters: int, neighbors: int = 5) -> np.ndarray:
    """Multi-cluster feature selection: a score of each feature [d], the *larger* the better.

    The `n_clusters` smoothest eigenvectors of the graph (L y = lambda D y, the trivial one left out) are each regressed on
    the features by least angle regression with at most `n_features` coefficients; a feature's score is its largest
    absolute coefficient (Cai, Zhang and He, KDD 2010). Neighbours weigh 1, one of their weightings: under a heat kernel of one
    width a few samples far from all others, as rare pixels make them once features are scaled, hang together by next to
    nothing, and such islands are the smoothest eigenvectors there are.

    >>> rng = np.random.default_rng(0)
    >>> X = np.c_[rng.normal(size=(60, 3)), np.repeat([0.0, 9.0], 30) + rng.normal(size=60)]
    >>> mcfs(X, 1, n_clusters=1).argmax()
    np.int64(3)
    """
    with OwnRandomness(0):  # its first import draws from Python's generator
        from sklearn.linear_model import Lars

    X = np.asarray(X, dtype=np.float64)
    centred = X - X.mean(0)
    gram, best_D = centred.T @ centred, np.zeros(X.shape[1])
    for target_N in _embedding(X, n_clusters, neighbors).T:
        lars = Lars(n_nonzero_coefs=n_features, fit_intercept=False, precompute=gram)
        best_D = np.maximum(best_D, np.abs(lars.fit(centred, target_N - target_N.mean()).coef_))
    return best_D


def neighbor_graph(X: np.ndarray, neighbors: int) -> tuple[Any, np.ndarray]:
    """(graph, degrees): a symmetric sparse [n, n] matrix of exp(-distance^2 / width) between near neighbours, its row sums."""
    with OwnRandomness(0):  # scikit-learn's first import draws from Python's generator
        from sklearn.neighbors import kneighbors_graph

    graph = kneighbors_graph(X, min(neighbors, len(X) - 1), mode="distance")
    squared = graph.data**2
    graph.data = np.exp(-squared / (squared.mean() or 1.0))
    graph = graph.maximum(graph.T).tocsr()
    return graph, np.asarray(graph.sum(1)).ravel()


def _embedding(X: np.ndarray, n_clusters: int, neighbors: int) -> np.ndarray:
    """The smoothest eigenvectors of L y = lambda D y after the constant one: [n, n_clusters]."""
    from scipy.sparse import diags_array
    from scipy.sparse.linalg import eigsh

    with OwnRandomness(0):  # scikit-learn's first import draws from Python's generator
        from sklearn.neighbors import kneighbors_graph

    graph = kneighbors_graph(X, min(neighbors, len(X) - 1))
    graph = graph.maximum(graph.T).tocsr()
    root = diags_array(1 / np.sqrt(np.asarray(graph.sum(1)).ravel()))
    start = np.random.default_rng(0).normal(size=len(X))
    values, vectors = eigsh(root @ graph @ root, k=n_clusters + 1, which="LA", v0=start)
    return root @ vectors[:, np.argsort(-values)[1:]]
