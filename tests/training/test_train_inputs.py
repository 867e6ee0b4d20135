"""What users hand to `train`, in any state of PyTorch: like its plain equivalent or refused by name, and left as it was."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import saelab
from saelab.base.errors import CheckpointError, ConfigError, DataError

X = torch.randn(600, 8, generator=torch.Generator().manual_seed(0))
RUN = {"sae": saelab.TopK(k=2, d_sae=16), "tokens": 512, "batch_size": 64, "progress": False}
STREAM = {**RUN, "buffer_tokens": 4096}


def train(source, **changes):
    return saelab.train(source, **{**RUN, **changes})


@pytest.fixture(scope="module")
def plain():
    return saelab.train(X, **RUN).sae


@pytest.mark.parametrize(
    "mode",
    [
        torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16), lambda: torch.device("meta"),
    ],
)  # fmt: skip
def test_the_users_mode_does_not_matter(mode, plain):
    with mode():
        grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        run = train(X)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == (grad, inference)
    assert torch.equal(run.sae.W_dec, plain.W_dec)


def test_gradients_switched_off_and_another_default_dtype_do_not_matter(plain):
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    try:
        run = train(X)
        with pytest.raises(DataError):
            train(X * float("nan"))
        assert torch.get_default_dtype() == torch.float64 and not torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)
    assert run.sae.W_dec.dtype == torch.float32 and torch.equal(run.sae.W_dec, plain.W_dec)


def made_in_inference_mode():
    with torch.inference_mode():
        return X.clone()


@pytest.mark.parametrize(
    "made",
    [
        lambda: X.clone().requires_grad_(True), lambda: X.clone().requires_grad_(True) * 1, lambda: X.numpy(),
        lambda: np.asfortranarray(X.numpy()), lambda: X.numpy().astype(">f4"), made_in_inference_mode, lambda: X.double(),
        lambda: np.lib.stride_tricks.as_strided(X.numpy(), X.shape, X.stride() and X.numpy().strides, writeable=False),
    ],
)  # fmt: skip
def test_rows_of_every_kind_train_to_the_bits_of_plain_ones(made, plain):
    rows = made()
    assert torch.equal(train(rows).sae.W_dec, plain.W_dec)
    assert getattr(rows, "grad", None) is None if not isinstance(rows, torch.Tensor) or rows.is_leaf else True


def test_a_pair_of_arrays_is_a_pair_of_tensors():
    sae = saelab.Transcoder(of=saelab.TopK(k=2, d_sae=16))
    by_arrays = train((X.numpy(), X.numpy()[:, :4]), sae=sae)
    assert torch.equal(by_arrays.sae.W_dec, train((X, X[:, :4]), sae=sae).sae.W_dec)


def test_loaders_of_tuples_and_arrays_are_streams_of_tensors():
    pieces = list(X.split(64))
    expected = saelab.train(pieces, **STREAM).sae
    for source in (
        DataLoader(TensorDataset(X), batch_size=64),
        [p.numpy() for p in pieces],
        [(p,) for p in pieces],
        (p.clone().requires_grad_(True) for p in pieces),
    ):
        assert torch.equal(saelab.train(source, **STREAM).sae.W_dec, expected.W_dec)
    sae = saelab.Transcoder(of=saelab.TopK(k=2, d_sae=16))
    pairs = saelab.train(DataLoader(TensorDataset(X, X[:, :4]), batch_size=64), **{**STREAM, "sae": sae})
    assert pairs.sae.W_dec.shape == (16, 4)


def test_a_shuffling_loader_is_read_in_an_order_of_the_seeds_own(tmp_path):
    """Neither does it draw from the user's generator, nor does that decide what is read: a run can be continued."""
    loader = DataLoader(TensorDataset(X), batch_size=64, shuffle=True)
    first = saelab.train(loader, **{**STREAM, "tokens": 2000})
    torch.manual_seed(17)
    before = torch.get_rng_state()
    again = saelab.train(loader, **{**STREAM, "tokens": 2000})
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(first.sae.W_dec, again.sae.W_dec)
    other = saelab.train(loader, **{**STREAM, "tokens": 2000}, seed=1)
    assert not torch.equal(first.sae.W_dec, other.sae.W_dec)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ([X, torch.randn(3000, 9)], DataError, r"item 1 of the iterable has widths .*9.*first had .*8"),
        ([X[0]], DataError, r"item 0 of the iterable is \[8\] of torch.float32"),
        ([X.long()], DataError, "torch.int64"),
        ([(X, X, X)], DataError, "tuple of 3"),
        ([{"x": X}], DataError, "a dict"),
        ([(X, X[:3])], DataError, "not aligned: x has 600, target has 3"),
        ([(X, X * float("nan"))], DataError, "target of item 0.*NaN"),
        ((X, X * float("nan")), DataError, "of the targets: 600 of 600"),
        ((X, X[:5]), DataError, "not aligned"),
        (X.long(), DataError, "torch.int64"),
        (X.to_sparse(), DataError, "sparse"),
        (X.numpy().astype(int), DataError, "int64"),
        (np.ma.masked_array(X.numpy(), mask=X.numpy() > 1), DataError, "masked"),
        (X[:, :0], DataError, r"\[600, 0\]"),
        (X[:0], DataError, "no rows"),
        ([], DataError, "empty"),
        ("activations", ConfigError, "cannot train on a str"),
        ({"x": X}, ConfigError, "cannot train on a dict"),
        (7, ConfigError, "cannot train on a int"),
        (X * 1e30, DataError, "600 of 600 rows have norms of 2.64 .*divide"),
        (X * 1e18, DataError, r"numbers up to .*e\+18, whose squares .*divide"),
        (torch.nested.nested_tensor([X, X], layout=torch.jagged), DataError, "nested of torch.float32"),
        (torch.cat([X, X[:1] * 1e30]), DataError, None),
        (X * float("inf"), DataError, "600 of 600 rows hold NaN"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_refused_by_name(source, error, message):
    changes = {"tokens": 3000, "buffer_tokens": 4096}
    if message is None:  # one row alone is above max_norm
        run = train(source, **changes)
        assert (
            run.report["high_norm_fraction"] == pytest.approx(1 / 601) and run.report["high_norm_variance_share"] > 0.99
        )
        changes["max_norm"], message = None, "1 of 601 rows have norms .*max_norm=4.0"
    with pytest.raises(error, match=message):
        train(source, **changes)


@pytest.mark.parametrize(
    "sae",
    [
        saelab.TopK(k=2, d_sae=16), saelab.MutualChoice(k=2, d_sae=16), saelab.FeatureChoice(k=2, d_sae=16),
        saelab.ReLU(l1=1.0, d_sae=16), saelab.ReLU(l1=1.0, d_sae=16, unit_decoder=True, resample=True),
        saelab.Gated(l1=1.0, d_sae=16), saelab.JumpReLU(target_l0=2, d_sae=16), saelab.Matryoshka(k=2, d_sae=16),
        saelab.MultiTopK(k=2, d_sae=16),
    ],
)  # fmt: skip
def test_rows_of_zeros_are_rows(sae):
    run = train(torch.zeros(600, 8), sae=sae, tokens=2048)
    assert all(torch.isfinite(parameter).all() for parameter in run.sae.parameters())
    assert run.sae(torch.zeros(2, 8)).abs().amax() < 0.01


def test_a_loss_that_runs_away_blames_the_rate_and_no_row():
    with pytest.raises(DataError, match="rows is finite .* lower the learning rate"):
        train(X, sae=saelab.ReLU(l1=1.0, d_sae=16), lr=1e30)


def test_half_precision_is_refused_with_the_way_out(plain):
    with pytest.raises(ConfigError, match="float16.*bfloat16"):
        train(X, dtype="float16")
    with pytest.raises(ConfigError, match="float16"):
        train(X, sae=saelab.SAE(plain.cfg, 8).half())


def test_going_on_with_a_frozen_sae_leaves_it_as_it_is(plain):
    assert not any(parameter.requires_grad for parameter in plain.parameters())
    before = plain.W_dec.clone()
    run = train(X, sae=plain)
    assert torch.equal(plain.W_dec, before) and not torch.equal(run.sae.W_dec, before)
    trainable = saelab.SAE(plain.cfg, 8)
    train(X, sae=trainable)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in trainable.parameters())


def test_trained_and_loaded_saes_give_codes_without_a_graph(plain, tmp_path):
    plain.save(tmp_path / "sae")
    loaded = saelab.SAE.load(tmp_path / "sae")
    train(X, out=tmp_path / "run")
    for sae in (plain, loaded, saelab.load_run(tmp_path / "run").sae):
        assert sae.encode(X).numpy().shape == (600, 16) and sae(X).numpy().shape == (600, 8)
        assert sae.W_dec.numpy().shape == (16, 8)
        x = X[:3].clone().requires_grad_(True)
        sae(x).sum().backward()
        assert x.grad is not None and bool(x.grad.any()) and sae.W_dec.grad is None


def test_a_new_sae_is_optimised_by_a_users_own_loop():
    sae = saelab.SAE(saelab.TopK(k=4, d_sae=16), 8)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = (sae(X) - X).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_one_vector_is_encoded_as_a_row_of_one(plain):
    assert plain.encode(X[0]).shape == (16,) and plain(X[0]).shape == (8,)
    assert torch.equal(plain.encode(X[0]), plain.encode(X[:1])[0]) and torch.equal(plain(X[0]), plain(X[:1])[0])
    torch.testing.assert_close(plain.decode(plain.encode(X[0])), plain(X[0]))
    assert bool(plain.replaceable(X[0]))


def test_an_sae_without_memory_has_a_name():
    assert repr(saelab.SAE(saelab.TopK(k=2, d_sae=16), 8).to("meta")) == "SAE(TopK(k=2, d_sae=16), d_in=8)"


def test_an_iterable_of_other_data_is_another_run(tmp_path):
    pieces = list(X.split(64))
    run = saelab.train(pieces, **STREAM, out=tmp_path / "run")
    again = saelab.train(pieces, **STREAM, out=tmp_path / "run")
    assert torch.equal(run.sae.W_dec, again.sae.W_dec)
    assert saelab.train(iter(pieces), **STREAM, out=tmp_path / "run").path == run.path
    for other in ([p + 1 for p in pieces], pieces[::-1], iter([p * 2 for p in pieces])):
        with pytest.raises(CheckpointError, match="rows: "):
            saelab.train(other, **STREAM, out=tmp_path / "run")
    pieces[0] += 1  # in place
    with pytest.raises(CheckpointError, match="rows: "):
        saelab.train(pieces, **STREAM, out=tmp_path / "run")


def test_the_run_says_how_far_it_knows_an_iterable(tmp_path, capsys):
    saelab.train(list(X.split(64)), **{**STREAM, "progress": True}, out=tmp_path / "run")
    assert "told from others by their first 8,192 rows" in capsys.readouterr().err


def test_texts_are_a_corpus(tiny_llama):
    texts = [f"The number {i} is not {i + 1}, and nobody says that it is." for i in range(60)]
    options = {"site": "blocks.1.hook_resid_post", "context_length": 16, "buffer_tokens": 2048}
    run = train(tiny_llama, corpus=texts, **options)
    assert torch.equal(train(tiny_llama, corpus=saelab.load_corpus(texts), **options).sae.W_dec, run.sae.W_dec)


@pytest.mark.parametrize(
    "rows", [X.to("meta"), [X.to("meta")], [torch.empty(0, 8, device="meta")]], ids=["tensor", "item", "empty"]
)
def test_rows_without_values_are_refused(rows, plain):
    with pytest.raises(DataError, match="without values"):
        train(rows)
    with pytest.raises(DataError, match="without values"):
        plain.encode(X.to("meta"))
