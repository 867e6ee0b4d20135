"""How good are the features that were chosen? The protocol of our notes: a classifier and a clustering on them alone.

Source: Atashgahi et al., Machine Learning 111 (2022), section 4.1 and the authors' code, by our notes of both. Split where
there is an official one, else 80/20; scale with the statistics of the training part; train on k columns.
"""

from typing import Any

import numpy as np

from saelab.base.surroundings import OwnRandomness


def extra_trees_accuracy(
    X_train: Any,
    y_train: Any,
    X_test: Any,
    y_test: Any,
    features: Any = None,
    *,
    n_estimators: int = 50,
    random_state: Any = None,
) -> float:
    """Accuracy on the test part of extremely randomised trees that see only `features` (indices; None for all).

    50 trees, as our notes of the paper have it; their seed is left open there: `random_state`.

    >>> X = np.array([[0.0, 5.0], [1.0, 5.0]] * 20)
    >>> extra_trees_accuracy(X, X[:, 0], X, X[:, 0], [0], random_state=0)
    1.0
    """
    with OwnRandomness(0):  # scikit-learn's first import draws from Python's generator
        from sklearn.ensemble import ExtraTreesClassifier

    trees = ExtraTreesClassifier(n_estimators=n_estimators, random_state=random_state)
    trees.fit(_columns(X_train, features), np.ravel(y_train))
    return float(trees.score(_columns(X_test, features), np.ravel(y_test)))


def kmeans_accuracy(X: Any, y: Any, features: Any = None, *, runs: int = 10, random_state: int = 0) -> float:
    """Mean over `runs` starts of k-means of `cluster_accuracy`, on `features` (indices; None for all).

    As many clusters as classes; each start is one initialisation, seeded by (random_state, its number).

    >>> X = np.array([[0.0], [0.1], [9.0], [9.1]])
    >>> kmeans_accuracy(X, ["a", "a", "b", "b"])
    1.0
    """
    with OwnRandomness(0):  # scikit-learn's first import draws from Python's generator
        from sklearn.cluster import KMeans

    chosen, n_classes = _columns(X, features), len(np.unique(y))
    seeds = np.random.SeedSequence(random_state).generate_state(runs)
    fits = (KMeans(n_classes, n_init=1, random_state=int(seed)).fit(chosen) for seed in seeds)
    return float(np.mean([cluster_accuracy(y, fit.labels_) for fit in fits]))


def cluster_accuracy(y: Any, clusters: Any) -> float:
    """Share of samples whose cluster is matched to their class, under the best one-to-one matching.

    ACC = max over matchings pi of 1/n sum [y_i = pi(c_i)], by the Hungarian method on the table of counts.

    >>> cluster_accuracy([0, 0, 1, 1], [1, 1, 0, 2])
    0.75
    """
    from scipy.optimize import linear_sum_assignment

    with OwnRandomness(0):  # scikit-learn's first import draws from Python's generator
        from sklearn.metrics.cluster import contingency_matrix

    counts = contingency_matrix(np.ravel(y), np.ravel(clusters))
    rows, columns = linear_sum_assignment(counts, maximize=True)
    return float(counts[rows, columns].sum() / counts.sum())


def _columns(X: Any, features: Any) -> Any:
    X = X.to_numpy() if hasattr(X, "to_numpy") else X
    return X if features is None else X[:, np.asarray(features)]
