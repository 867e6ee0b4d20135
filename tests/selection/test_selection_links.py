"""QuickSelection's layers, samples and training step against dense references and the paper's invariants."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from sklearn.preprocessing import MinMaxScaler, StandardScaler

import saelab.selection.samples as samples_module
from saelab.selection.autoencoder import Autoencoder, Recipe
from saelab.selection.dense_twin import DenseLinks
from saelab.selection.links import Links
from saelab.selection.samples import Samples

RECIPE = Recipe(lr=0.05, momentum=0.9, weight_decay=1e-3, dropout=0.0, tanh=False, zeta=0.2)
SIZES = st.tuples(st.integers(1, 12), st.integers(1, 9), st.integers(1, 5), st.integers(0, 10**6))


def layer(d: int = 40, h: int = 30, epsilon: float = 4.0, seed: int = 0) -> Links:
    links = Links.random(d, h, epsilon, np.random.default_rng(seed))
    links.momentum.normal_(generator=torch.Generator().manual_seed(seed))
    return links


def as_dict(links: Links, what: str) -> dict[int, float]:
    return dict(zip(links.keys.tolist(), getattr(links, what).tolist(), strict=True))


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(("d", "h", "epsilon"), [(500, 1000, 13), (784, 1000, 13), (64, 200, 5), (2000, 100, 20)])
def test_the_density_of_the_start_is_that_of_draws_with_replacement(d, h, epsilon):
    draws, places = epsilon * (d + h), d * h
    expected = places * (1 - np.exp(-draws / places))
    deviation = np.sqrt(places * np.exp(-draws / places) * (1 - (1 + draws / places) * np.exp(-draws / places)))
    links = Links.random(d, h, epsilon, np.random.default_rng(1))
    assert abs(len(links) - expected) < 3 * deviation
    assert abs(float(links.values.std()) - 0.1) < 0.01 and not links.momentum.any()


@settings(max_examples=40, deadline=None)
@given(SIZES)
def test_products_and_update_equal_the_dense_twin(sizes):
    d, h, b, seed = sizes
    links = layer(d, h, 0.7 * d * h / (d + h), seed)
    twin = DenseLinks.like(links)
    x_DB, h_HB = normal(d, b), normal(h, b)
    torch.testing.assert_close(links.to_hidden(x_DB), twin.to_hidden(x_DB))
    torch.testing.assert_close(links.to_features(h_HB), twin.to_features(h_HB))
    for each in (links, twin):
        each.update(x_DB, h_HB, lr=0.1, momentum=0.9, decay=0.01)
    after = DenseLinks.like(links)
    torch.testing.assert_close(after.weights_DH, twin.weights_DH)
    torch.testing.assert_close(after.momentum_DH, twin.momentum_DH)
    np.testing.assert_allclose(links.strength(), twin.strength(), rtol=1e-5)
    np.testing.assert_array_equal(links.to_scipy().toarray(), after.weights_DH)


@settings(max_examples=40, deadline=None)
@given(SIZES, st.floats(0, 0.9))
def test_pruning_drops_a_share_of_each_sign_and_growth_fills_it_up(sizes, zeta):
    d, h, _, seed = sizes
    before = layer(d, h, 0.9 * d * h / (d + h), seed)
    kept = before.pruned(zeta)
    old, new = as_dict(before, "values"), as_dict(kept, "values")
    for sign in (1, -1):
        signed = sorted(sign * value for value in old.values() if sign * value > 0)
        left = sorted(sign * value for value in new.values() if sign * value > 0)
        assert left == signed[int(zeta * len(signed)) :]
    grown = kept.grown(len(before) - len(kept), np.random.default_rng(seed))
    assert len(grown) == len(before) and np.all(np.diff(grown.keys) > 0) and grown.keys.max(initial=0) < d * h
    for what in ("values", "momentum"):
        assert as_dict(grown, what).items() >= as_dict(kept, what).items()
    momentum = as_dict(grown, "momentum")
    assert all(momentum[key] == 0 for key in momentum.keys() - new.keys())


def test_growth_fills_the_last_empty_places_and_finds_all_alike():
    links = layer(6, 5, 1.0)
    full = links.grown(30 - len(links), np.random.default_rng(0))
    np.testing.assert_array_equal(full.keys, np.arange(30))
    empty = Links(np.empty(0, np.int64), torch.empty(0), torch.empty(0), (20, 10))
    counts = sum(np.bincount(empty.grown(20, np.random.default_rng(seed)).keys, minlength=200) for seed in range(500))
    assert counts.min() > 50 - 5 * 7 and counts.max() < 50 + 5 * 7  # mean 50, deviation 6.7


@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_step_follows_the_gradient_that_autograd_finds_with_dropout_straight_through(tanh, dropout):
    d, h, b = 12, 8, 6
    model = Autoencoder([layer(d, h, 2.0, seed) for seed in (0, 1)], d, h)
    for each in model.layers:
        each.momentum.zero_()
    recipe = Recipe(lr=0.5, momentum=0.9, weight_decay=0.0, dropout=dropout, tanh=tanh, zeta=0.2)
    clean_DB, noisy_DB = normal(d, b), normal(d, b + 1)[:, :b].contiguous()

    w_in, w_out = (DenseLinks.like(each).weights_DH.requires_grad_() for each in model.layers)
    bias_H1, bias_D1 = torch.zeros(h, 1, requires_grad=True), torch.zeros(d, 1, requires_grad=True)
    kept_HB = torch.from_numpy(np.random.default_rng(3).random((h, b), dtype=np.float32)) >= dropout
    h_HB = torch.sigmoid(w_in.T @ noisy_DB + bias_H1)
    left_HB = h_HB + (h_HB * kept_HB - h_HB).detach()  # units left out of the product still learn
    y_DB = w_out @ left_HB + bias_D1
    loss = ((y_DB.tanh() if tanh else y_DB) - clean_DB).square().sum() / (2 * b)
    loss.backward()
    value = loss.item()

    assert model.step(clean_DB, noisy_DB, recipe, np.random.default_rng(3)) == pytest.approx(value, rel=1e-5)
    for each, gradient in zip(model.layers, (w_in.grad, w_out.grad), strict=True):
        at_links = gradient[each.codes.rows(), each.codes.indices]
        torch.testing.assert_close(each.momentum, -0.5 * at_links)
    torch.testing.assert_close(model.momentum_H1, -0.5 * bias_H1.grad)
    torch.testing.assert_close(model.bias_D1, -0.5 * bias_D1.grad)


def test_an_epoch_equals_that_of_the_dense_masked_twin():
    data = np.random.default_rng(0).normal(size=(200, 30))
    samples = Samples(data, scale="standard", noise_factor=0.2, resample=False, batch_size=20, seed=0)
    sparse, twin = (Autoencoder.sparse(30, 25, 4.0, 7) for _ in range(2))
    twin.layers = [DenseLinks.like(each) for each in twin.layers]
    recipe = Recipe(lr=0.01, momentum=0.9, weight_decay=1e-5, dropout=0.2, tanh=True, zeta=0.2)
    losses = [m.train_epoch(samples.batches(1), recipe, np.random.default_rng(1)) for m in (sparse, twin)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for ours, dense in zip(sparse.layers, twin.layers, strict=True):
        torch.testing.assert_close(DenseLinks.like(ours).weights_DH, dense.weights_DH, rtol=1e-4, atol=1e-6)


def test_strength_is_read_between_pruning_and_growth():
    model = Autoencoder.sparse(30, 20, 4.0, 0)
    pruned = model.layers[0].pruned(0.2)
    sizes = [len(each) for each in model.layers]
    strength_D = model.evolve(RECIPE, seed=0, epoch=1, kind="input")
    np.testing.assert_array_equal(strength_D, pruned.strength())
    assert [len(each) for each in model.layers] == sizes
    assert not np.array_equal(strength_D, model.strength("input"))


@pytest.mark.parametrize("scale", ["standard", "minmax"])
def test_scaling_is_scikit_learns_and_the_same_for_sparse_data(scale):
    data = np.random.default_rng(0).normal(size=(50, 9)) * (np.random.default_rng(1).random((50, 9)) < 0.5)
    data[:, 3], data[:, 4] = 0.1, 0.0
    options = {"scale": scale, "noise_factor": 0.2, "resample": False, "batch_size": 10, "seed": 0}
    dense, sparse = Samples(data, **options), Samples(csr_array(data), **options)
    scaler = StandardScaler() if scale == "standard" else MinMaxScaler()
    np.testing.assert_allclose(dense.x_ND, scaler.fit_transform(data), atol=1e-6)
    assert dense.constant_D.nonzero()[0].tolist() == sparse.constant_D.nonzero()[0].tolist() == [3, 4]
    assert not dense.x_ND[:, 3:5].any()
    for ours, theirs in zip(dense.batches(1), sparse.batches(1), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_an_epoch_reads_every_sample_once_and_leaves_out_what_does_not_fill_a_batch():
    data = np.arange(46.0)[:, None]
    samples = Samples(data, scale=None, noise_factor=0.0, resample=False, batch_size=10, seed=0)
    epochs = [torch.cat([clean_DB for clean_DB, _ in samples.batches(epoch)], 1).flatten() for epoch in (1, 2)]
    assert all(len(epoch) == 40 == len(epoch.unique()) for epoch in epochs)
    assert not torch.equal(*epochs)


def by_sample(samples: Samples, epoch: int) -> dict[float, torch.Tensor]:
    """The noise of each sample, by its first feature."""
    return {
        float(clean_D[0]): noisy_D - clean_D
        for clean_DB, noisy_DB in samples.batches(epoch)
        for clean_D, noisy_D in zip(clean_DB.T, noisy_DB.T, strict=True)
    }


def test_noise_is_fixed_unless_resampled_and_the_same_kept_or_made_again(monkeypatch):
    data = np.random.default_rng(0).normal(size=(400, 30))
    options = {"scale": "standard", "noise_factor": 0.2, "batch_size": 40, "seed": 0}
    kept = Samples(data, resample=False, **options)
    one, two = by_sample(kept, 1), by_sample(kept, 2)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert float(torch.stack(list(one.values())).std()) == pytest.approx(0.2, rel=0.03)

    monkeypatch.setattr(samples_module, "NOISE_KEPT", 0)
    again = Samples(data, resample=False, **options)
    assert again.noisy_ND is None
    for ours, theirs in zip(kept.batches(3), again.batches(3), strict=True):
        assert torch.equal(ours[1], theirs[1])

    fresh = Samples(data, resample=True, **options)
    one, two = by_sample(fresh, 1), by_sample(fresh, 2)
    assert not any(torch.equal(one[key], two[key]) for key in one)
