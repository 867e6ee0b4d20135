"""The evaluation protocol and the baselines against brute force and dense formulas."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits, make_blobs

from saelab.selection.baselines import laplacian_score, mcfs, neighbor_graph
from saelab.selection.scoring import cluster_accuracy, extra_trees_accuracy, kmeans_accuracy

LABELS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30)


@settings(max_examples=50, deadline=None)
@given(LABELS)
def test_the_best_matching_is_that_of_brute_force(pairs):
    y, clusters = np.array(pairs).T
    best = max(np.mean(np.array(names)[clusters] == y) for names in permutations(range(4)))
    assert cluster_accuracy(y, clusters) == pytest.approx(best)


def test_only_the_features_given_are_seen():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 300)
    X = np.c_[rng.normal(size=(300, 3)), y + 0.01 * rng.normal(size=300)]
    parts = (X[:200], y[:200], X[200:], y[200:])
    assert extra_trees_accuracy(*parts, [3], random_state=0) == 1.0
    assert extra_trees_accuracy(*parts, [0, 1], random_state=0) < 0.7
    assert extra_trees_accuracy(*parts, random_state=0) == extra_trees_accuracy(*parts, random_state=0) > 0.95


def test_clusters_are_found_in_the_right_features():
    X, y = make_blobs(150, 2, centers=3, cluster_std=0.3, random_state=0)
    X = np.c_[X, np.random.default_rng(0).normal(size=(150, 2))]
    assert kmeans_accuracy(X, y, [0, 1]) > 0.9
    assert kmeans_accuracy(X, y, [2, 3]) < 0.6
    assert kmeans_accuracy(X, y, [2, 3], random_state=1) == kmeans_accuracy(X, y, [2, 3], random_state=1)


def test_the_laplacian_score_is_its_formula():
    X = np.random.default_rng(0).normal(size=(40, 6))
    X[:, 5] = 2.0
    graph, degree = neighbor_graph(X, 5)
    S = graph.toarray()
    np.testing.assert_array_equal(S, S.T)
    D, L = np.diag(degree), np.diag(degree) - S
    for column, score in zip(X.T[:5], laplacian_score(X)[:5], strict=True):
        centred = column - column @ D @ np.ones(40) / degree.sum()
        assert score == pytest.approx(centred @ L @ centred / (centred @ D @ centred))
    assert np.isinf(laplacian_score(X)[5])


def test_multi_cluster_selection_finds_the_features_of_the_clusters():
    X, _ = make_blobs(200, 2, centers=4, cluster_std=0.5, random_state=1)
    X = np.c_[np.random.default_rng(0).normal(size=(200, 8)), X]
    scores = mcfs(X, 4, n_clusters=3)
    assert set(np.argsort(-scores)[:2]) == {8, 9} and (scores > 0).sum() <= 3 * 4
    np.testing.assert_array_equal(scores, mcfs(X, 4, n_clusters=3))


def test_samples_far_from_all_others_are_no_clusters():
    """A few outliers in rare features, as scaled pixels of a border have them, are an island of the graph, not structure."""
    X, _ = make_blobs(300, 2, centers=4, cluster_std=1.5, random_state=1)
    rare = np.zeros((300, 6))
    for feature in range(6):
        rare[3 * feature : 3 * feature + 3, feature] = 40 + np.arange(3)
    scores = mcfs(np.c_[rare, np.random.default_rng(0).normal(size=(300, 4)), X], 3, n_clusters=3)
    assert set(np.argsort(-scores)[:2]) == {10, 11}


def test_constant_features_of_images_do_no_harm():
    X, _ = load_digits(n_class=5, return_X_y=True)
    constant = np.ptp(X, axis=0) == 0
    assert constant.any() and not mcfs(X, 10, n_clusters=5)[constant].any()
    assert np.isinf(laplacian_score(X)[constant]).all()
