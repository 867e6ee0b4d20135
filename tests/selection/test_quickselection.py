"""QuickSelection as users meet it: a scikit-learn selector that finds planted features, resumes, and says what is wrong."""

import os
import signal
import tracemalloc
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from sklearn.base import clone
from sklearn.datasets import make_classification
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch.utils._python_dispatch import TorchDispatchMode

import saelab
from saelab import CheckpointError, ConfigError, DataError, QuickSelection
from saelab.selection import runs
from saelab.selection.autoencoder import Autoencoder
from saelab.selection.runs import Stability


def small(**options: Any) -> QuickSelection:
    return QuickSelection(
        **{"n_hidden": 40, "epsilon": 4, "epochs": 6, "random_state": 0, "batch_size": 20, "progress": False, **options}
    )


def table(n: int = 100, d: int = 15) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n, d))


@pytest.mark.filterwarnings("ignore::UserWarning")  # the checks' few samples, and classes for tags of their own
@parametrize_with_checks([QuickSelection(epochs=3, n_hidden=30, progress=False)])
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


def test_planted_features_are_found():
    X, _ = make_classification(
        2080,
        500,
        n_informative=5,
        n_redundant=15,
        n_clusters_per_class=16,
        class_sep=2.0,
        shuffle=False,
        random_state=0,
    )
    selector = QuickSelection(20, output="tanh", epochs=25, random_state=0, progress=False).fit(X)
    assert (selector.top(20) < 20).sum() >= 12  # 0.8 by chance
    assert selector.loss_history_[-1] < 0.8 * selector.loss_history_[0]
    recovered = [(np.argsort(-strength)[:20] < 20).sum() for strength in selector.strength_history_]
    assert recovered[0] <= 4


def test_what_a_fit_leaves():
    selector = small(n_features_to_select=4).fit(table())
    assert sorted(selector.ranking_) == list(range(15))
    np.testing.assert_array_equal(selector.rank_[selector.ranking_], np.arange(1, 16))
    assert np.all(np.diff(selector.strength_[selector.ranking_]) <= 0)
    np.testing.assert_array_equal(selector.get_support(indices=True), np.sort(selector.top(4)))
    assert selector.get_support().sum() == 4 == selector.n_features_to_select_
    assert selector.strength_history_.shape == (5, 15) and selector.loss_history_.shape == (6,)
    w_in, w_out = selector.sparse_weights_
    assert (w_in.shape, w_out.shape) == ((15, 40), (40, 15)) and w_in.format == w_out.format == "csr"
    assert selector.n_parameters_ == w_in.nnz + w_out.nnz + 15 + 40
    assert (selector.n_epochs_, selector.interrupted_) == (6, False)
    np.testing.assert_array_equal(selector.transform(table()), table()[:, selector.get_support()])
    assert small().fit(table()).get_support().sum() == 7  # half


def test_the_ranking_is_read_in_the_last_epoch_but_one():
    long, short = small(epochs=6).fit(table()), small(epochs=4).fit(table())
    np.testing.assert_array_equal(long.strength_history_[:3], short.strength_history_)
    np.testing.assert_array_equal(short.strength_, short.strength_history_[2])
    once = small(epochs=1).fit(table())
    np.testing.assert_allclose(once.strength_, np.abs(once.sparse_weights_[0].toarray()).sum(1), rtol=1e-5)


def test_strengths_and_sums():
    kinds = {kind: small(strength=kind, epochs=1).fit(table()) for kind in ("input", "output", "both", "degree")}
    w_in, w_out = (weights.toarray() for weights in kinds["input"].sparse_weights_)
    np.testing.assert_allclose(kinds["output"].strength_, np.abs(w_out).sum(0), rtol=1e-5)
    np.testing.assert_allclose(kinds["both"].strength_, kinds["input"].strength_ + kinds["output"].strength_)
    np.testing.assert_array_equal(kinds["degree"].strength_, (w_in != 0).sum(1))
    summed = small(aggregate="sum").fit(table())
    np.testing.assert_allclose(summed.strength_, small().fit(table()).strength_history_.sum(0))


def test_topologies():
    first = small(epochs=1).fit(table()).sparse_weights_
    static, evolving = small(topology="static").fit(table()), small().fit(table())
    for start, fixed, moved in zip(first, static.sparse_weights_, evolving.sparse_weights_, strict=True):
        assert ((start != 0) != (fixed != 0)).nnz == 0
        assert start.nnz == moved.nnz and ((start != 0) != (moved != 0)).nnz > 0
    dense = small(topology="dense").fit(table())
    assert dense.n_parameters_ == 2 * 15 * 40 + 15 + 40 and np.isfinite(dense.strength_).all()
    assert dense.loss_history_[-1] < dense.loss_history_[0]


@pytest.mark.parametrize("kind", [scipy.sparse.csr_array, scipy.sparse.csc_matrix])
def test_sparse_input_ranks_alike_and_stays_sparse(kind):
    X = table() * (np.random.default_rng(1).random((100, 15)) < 0.3)
    dense, sparse = small().fit(X), small().fit(kind(X))
    np.testing.assert_allclose(sparse.strength_, dense.strength_, rtol=1e-4)
    chosen = sparse.transform(kind(X))
    assert scipy.sparse.issparse(chosen)
    np.testing.assert_array_equal(chosen.toarray(), dense.transform(X))


def test_frames_pipelines_and_names():
    frame = pd.DataFrame(table(), columns=[f"gene {i}" for i in range(15)])
    selector = small(n_features_to_select=3).set_output(transform="pandas")
    chosen = selector.fit_transform(frame)
    assert list(chosen.columns) == list(selector.get_feature_names_out()) == list(frame.columns[selector.get_support()])
    assert set(selector.feature_names_in_[selector.top(3)]) == set(chosen.columns)
    pipeline = make_pipeline(small(n_features_to_select=3), KNeighborsClassifier()).fit(table(), table()[:, 0] > 0)
    assert pipeline.predict(table()).shape == (100,)


def test_the_seed_repeats_and_nothing_else_is_touched():
    X, numpy_state, torch_state = table(), np.random.get_state()[1].copy(), torch.get_rng_state()
    one, two, other = small().fit(X), small().fit(X), small(random_state=1).fit(X)
    np.testing.assert_array_equal(one.strength_, two.strength_)
    assert not np.array_equal(one.strength_, other.strength_)
    assert not np.array_equal(one.strength_, small(random_state=None).fit(X).strength_)
    np.testing.assert_array_equal(X, table())
    assert np.array_equal(numpy_state, np.random.get_state()[1]) and torch.equal(torch_state, torch.get_rng_state())
    np.testing.assert_array_equal(small().fit(X.astype(np.float32)).ranking_, one.ranking_)


def test_constant_features_come_last():
    X = table()
    X[:, 2], X[:, 7] = 0.1, 0.0
    with pytest.warns(UserWarning, match="2 of 15 features are constant"):
        selector = small(n_features_to_select=13).fit(X)
    assert set(selector.ranking_[-2:]) == {2, 7} and not selector.strength_[[2, 7]].any()
    assert selector.constant_features_.nonzero()[0].tolist() == [2, 7]
    X[:, 7] = 0.3
    X[::2, 7] = 0.1 + 0.2  # the last bit differs
    for kind in (np.asarray, scipy.sparse.csr_array):
        with pytest.warns(UserWarning, match="2 of 15 features are constant"):
            assert small().fit(kind(X)).constant_features_.nonzero()[0].tolist() == [2, 7]
    with pytest.warns(UserWarning, match="15 of 15"):
        np.testing.assert_array_equal(small().fit(np.ones((100, 15))).ranking_, np.arange(15))


def test_the_density_follows_few_features_unless_epsilon_is_given():
    selector = small(epsilon=None).fit(table(d=3))
    assert selector.sparse_weights_[0].nnz < 3 * 40
    with pytest.raises(ConfigError, match=r"density of 4.66.*epsilon up to 2.79"):
        small(epsilon=13).fit(table(d=3))


class _Largest(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                self.numel = max(self.numel, tensor.numel())
        return out


def test_no_array_of_features_by_hidden_units_is_made():
    X = np.random.default_rng(0).normal(size=(40, 2000)).astype(np.float32)
    selector = QuickSelection(n_hidden=1000, epochs=3, batch_size=20, random_state=0, progress=False)
    tracemalloc.start()
    with _Largest() as largest:
        selector.fit(X)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert largest.numel < 2000 * 1000 / 10 and peak < 2000 * 1000 * 4


def test_early_stopping():
    stopped = small(epochs=50, patience=2, min_overlap=0.1).fit(table())
    assert stopped.n_epochs_ == 3 and len(stopped.strength_history_) == 3 and not stopped.interrupted_
    assert small(epochs=5, patience=5).fit(table()).n_epochs_ == 5
    a, b = np.array([3.0, 2, 1, 0]), np.array([0.0, 1, 2, 3])
    stability = Stability(patience=2, overlap=1.0, k=2, aggregate="last")
    assert stability.reached([b, a, a, a]) and stability.reached([a, a, a])
    assert not stability.reached([a, b, a, a]) and not stability.reached([a, a])


def test_early_stopping_does_not_wait_for_constant_features(monkeypatch):
    seen: list[np.ndarray] = []
    monkeypatch.setattr(Stability, "reached", lambda self, strengths: bool(seen.append(strengths[-1])))
    X = table()
    X[:, 5:10] = 1.0
    with pytest.warns(UserWarning, match="5 of 15 features are constant"):
        small(patience=2).fit(X)
    assert len(seen) == 5 and not np.array(seen)[:, 5:10].any() and np.array(seen)[:, :5].all()


def interrupting(monkeypatch, epoch: int, stop) -> list[int]:
    """Call `stop` within that epoch; the epochs that are trained."""
    trained, train_epoch = [], Autoencoder.train_epoch

    def noted(self, *args: Any) -> float:
        trained.append(len(trained) + 1)
        if len(trained) == epoch:
            stop()
        return train_epoch(self, *args)

    monkeypatch.setattr(Autoencoder, "train_epoch", noted)
    return trained


def same(one: QuickSelection, other: QuickSelection) -> None:
    np.testing.assert_array_equal(one.strength_history_, other.strength_history_)
    np.testing.assert_array_equal(one.loss_history_, other.loss_history_)
    for ours, theirs in zip(one.sparse_weights_, other.sparse_weights_, strict=True):
        np.testing.assert_array_equal(ours.toarray(), theirs.toarray())


@pytest.mark.parametrize("topology", ["set", "dense"])
def test_ctrl_c_leaves_a_selector_and_the_same_call_goes_on_to_the_same_bits(topology, tmp_path, monkeypatch):
    whole = small(topology=topology).fit(table())
    selector = small(topology=topology, out=tmp_path / "run")
    with monkeypatch.context() as patch:
        interrupting(patch, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.warns(UserWarning, match="interrupted after 3 of 6 epochs: the same call continues it"):
            selector.fit(table())
    assert selector.interrupted_ and selector.n_epochs_ == 3 and selector.transform(table()).shape == (100, 7)
    trained = interrupting(monkeypatch, 0, None)
    again = clone(selector).fit(table())
    assert len(trained) == 3 and not again.interrupted_
    same(again, whole)
    same(clone(selector).fit(table()), whole)
    assert len(trained) == 3  # finished: returned as it is


def test_a_second_ctrl_c_raises(monkeypatch):
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)  # in this thread: two that another takes may come as one
        signal.raise_signal(signal.SIGINT)

    interrupting(monkeypatch, 2, twice)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a worker of the tests ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            small().fit(table())
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    whole, selector = small(random_state=None, out=tmp_path / "whole").fit(table()), small(out=tmp_path / "run")

    def die() -> None:
        raise MemoryError

    for options in ({}, {"random_state": None}):
        selector.set_params(**options, out=tmp_path / f"run {options}")
        with monkeypatch.context() as patch:
            interrupting(patch, 5, die)
            with pytest.raises(MemoryError):
                selector.fit(table())
        with monkeypatch.context() as patch:
            trained = interrupting(patch, 0, None)
            selector.fit(table())
        assert len(trained) == 2
        if not options:
            same(selector, small().fit(table()))
    assert not np.array_equal(whole.strength_, selector.strength_)  # no random_state: seeds of their own


def test_a_folder_of_another_run_is_refused(tmp_path):
    small(out=tmp_path / "run").fit(table())
    for other, X in ((small(lr=0.02), table()), (small(random_state=1), table()), (small(), table() + 1)):
        with pytest.raises(CheckpointError, match=r"holds another run \((lr|random_state|data): "):
            other.set_params(out=tmp_path / "run").fit(X)
    assert small(out=tmp_path / "run", n_features_to_select=2).fit(table()).get_support().sum() == 2
    file = tmp_path / "run" / runs.FILE
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="damaged: remove it"):
        small(out=tmp_path / "run").fit(table())


def test_samples_that_cannot_be_used():
    with pytest.raises(DataError, match="1 sample: give two or more"):
        small().fit(table(n=1))
    X = table()
    X[3, 4] = X[5, 4] = np.nan
    X[0, 9] = np.inf
    with pytest.raises(DataError, match=r"3 NaN or infinite \(inf\) values in 2 features, the first is 4"):
        small().fit(X)
    with pytest.raises(DataError, match="the first is 'f4'"):
        small().fit(pd.DataFrame(X, columns=[f"f{i}" for i in range(15)]))
    with pytest.raises(DataError, match="3 NaN"):
        small().fit(scipy.sparse.csr_array(X))
    with pytest.raises(DataError, match=r"diverged at lr=1e\+30; lower `lr`"):
        small(lr=1e30).fit(table())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_features_to_select": 16}, "is 16.*from 1 to 15"),
        ({"n_features_to_select": 0}, "whole number, from 1 to 15"),
        ({"n_features_to_select": 0.5}, "is 0.5.*from 1 to 15"),
        ({"epsilon": 0}, "density of 0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"n_hidden": 2.5}, "n_hidden is 2.5"),
        ({"patience": 0}, "patience is 0"),
        ({"zeta": 1.0}, "zeta is 1.0"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"lr": 0}, "lr is 0"),
        ({"min_overlap": 2}, "min_overlap is 2"),
        ({"topology": "fixed"}, "topology is 'fixed'; use one of 'set', 'static', 'dense'"),
        ({"scale": "robust"}, "scale is 'robust'"),
    ],
)
def test_arguments_that_cannot_work(options, message):
    with pytest.raises(ConfigError, match=message):
        small(**options).fit(table())


def test_few_samples_make_one_batch_and_too_many_tops_are_refused():
    with pytest.warns(UserWarning, match="10 samples are fewer than batch_size 20"):
        selector = small().fit(table(n=10))
    assert np.isfinite(selector.strength_).all()
    with pytest.raises(ConfigError, match="top 16 of 15"):
        selector.top(16)
    assert len(selector.top(15)) == 15


def test_a_bar_is_shown_when_it_lasts(capsys, monkeypatch):
    import tqdm.auto

    shown = tqdm.auto.tqdm
    monkeypatch.setattr(tqdm.auto, "tqdm", lambda **options: shown(**{**options, "delay": 0}))
    small(progress=True).fit(table())
    assert "QuickSelection" in (bar := capsys.readouterr().err) and "6/6" in bar and "loss=" in bar
    small(progress=False).fit(table())
    assert capsys.readouterr().err == ""


def test_it_is_public():
    assert saelab.QuickSelection is QuickSelection
