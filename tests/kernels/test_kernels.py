"""The sparse kernels against their dense twins, through every output and every gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelab.base.codes import SparseCodes
from saelab.kernels import dense, selection, sparse, threshold, weighted

shapes = st.tuples(st.integers(1, 70), st.integers(1, 9), st.integers(1, 40), st.integers(1, 8), st.integers(0, 10_000))


def problem(n, d, f, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=dtype)
    W = torch.randn(f, d, generator=generator, dtype=dtype)
    return x, W, torch.randn(f, generator=generator, dtype=dtype) * 0.1


@given(shapes)
@settings(max_examples=60, deadline=None)
def test_the_k_largest_are_those_of_a_stable_sort(shape):
    n, d, f, k, seed = shape
    x, W, b = problem(n, d, f, seed)
    x, W = x.round(), W.round()  # many ties and zeros
    found, wanted = selection.top_k(x, W, b.round(), min(k, f)), dense.top_k(x, W, b.round(), min(k, f))
    assert torch.equal(found.indices, wanted.indices)
    assert torch.equal(found.offsets, wanted.offsets)
    assert torch.equal(found.values, wanted.values)


def test_ties_go_to_the_lower_index_and_non_positive_scores_are_dropped():
    x = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, -1.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    codes = selection.top_k(x, torch.eye(4), torch.zeros(4), 2)
    assert codes.indices.tolist() == [0, 1, 2]
    assert codes.offsets.tolist() == [0, 2, 3, 3]


@pytest.mark.parametrize("k", [1, 8, 32])
@pytest.mark.parametrize("kind", ["random", "trained", "tied", "few positive", "zeros"])
def test_a_bf16_shortlist_gives_the_fp32_masks(k, kind):
    x, W, b = problem(640, 96, 2304, 7, torch.float32)
    if kind == "trained":
        x = torch.randn(640, 20) @ W[:20] + 0.3 * x
    if kind == "tied":
        W[1::2] = W[::2]
    if kind == "few positive":
        b = b - 35
    if kind == "zeros":
        x[::3] = 0
        b = torch.zeros_like(b)
    short = selection.top_k(x, W, b, k, shortlist=True)
    for other in (selection.top_k(x, W, b, k, shortlist=False), dense.top_k(x, W, b, k)):
        assert torch.equal(short.indices, other.indices)
        assert torch.equal(short.offsets, other.offsets)
        torch.testing.assert_close(short.values, other.values, rtol=1e-5, atol=1e-4)


def test_rows_that_rounding_could_change_fall_back():
    x, W, b = problem(640, 96, 2304, 3, torch.float32)
    W = W[:1] + 1e-4 * W  # all scores of a token within bf16's rounding of each other
    assert torch.equal(selection.top_k(x, W, b * 0, 8, shortlist=True).indices, dense.top_k(x, W, b * 0, 8).indices)


def test_masks_do_not_depend_on_the_number_of_rows():
    x, W, b = problem(1100, 64, 512, 5, torch.float32)
    whole = selection.top_k(x, W, b, 8, shortlist=False)
    part = selection.top_k(x[:700], W, b, 8, shortlist=False)
    assert torch.equal(part.indices, whole.indices[: len(part.indices)])
    assert torch.equal(part.values, whole.values[: len(part.values)])


@given(shapes)
@settings(max_examples=40, deadline=None)
def test_every_gradient_equals_the_dense_twins(shape):
    n, d, f, k, seed = shape
    x, W, b = problem(n, d, f, seed)
    W_dec = torch.randn(f, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    gradients = []
    for kernels, top_k in ((sparse, selection.top_k), (dense, dense.top_k)):
        leaves = [t.clone().requires_grad_() for t in (x, W, b, W_dec)]
        chosen = top_k(x, W, b, min(k, f))
        codes = kernels.encode_at(*leaves[:3], chosen)
        x_hat = kernels.decode(codes, leaves[3])
        loss = (x_hat - leaves[0].detach()).square().sum() + codes.values.cos().sum() + (x_hat * 0.3).sin().sum()
        gradients.append([x_hat, codes.values, *torch.autograd.grad(loss, leaves)])
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_gradient_that_is_not_contiguous_is_right_too():
    x, W, b = problem(6, 4, 10, 0)
    W.requires_grad_()
    codes = dense.top_k(x, W.detach(), b, 3)
    sparse.decode(codes, W).T.sum(1).square().sum().backward()
    found, W.grad = W.grad, None
    dense.decode(codes, W).T.sum(1).square().sum().backward()
    torch.testing.assert_close(found, W.grad)


def test_half_precision_sampling_agrees_with_fp32():
    x, W, b = problem(5, 8, 12, 1, torch.float32)
    codes = dense.top_k(x, W, b, 3)
    low = sparse.sampled_product(x.bfloat16(), W.bfloat16(), codes)
    torch.testing.assert_close(low.float(), sparse.sampled_product(x, W, codes), rtol=0.05, atol=0.05)


def test_codes_without_any_entry_have_zero_reconstruction_and_gradients():
    W = torch.randn(4, 3, requires_grad=True)
    codes = SparseCodes.from_dense(torch.zeros(2, 4))
    out = sparse.decode(codes, W)
    out.sum().backward()
    assert out.tolist() == [[0.0] * 3] * 2
    assert not W.grad.any()


@given(st.tuples(st.integers(1, 70), st.integers(1, 6), st.integers(1, 80), st.integers(1, 400), st.integers(0, 9999)))
@settings(max_examples=60, deadline=None)
def test_the_largest_of_a_batch_are_those_of_the_flattened_matrix(shape):
    n, d, f, budget, seed = shape
    x, W, b = problem(n, d, f, seed)
    x, W, b = x.round(), W.round(), b.round()
    found, wanted = threshold.top_total(x, W, b, budget), dense.top_total(x, W, b, budget)
    assert torch.equal(found.indices, wanted.indices) and torch.equal(found.offsets, wanted.offsets)
    assert torch.equal(found.values, wanted.values)


@pytest.mark.parametrize("f", [2304, 2310])
@pytest.mark.parametrize("kind", ["random", "heavy token", "tied", "few positive", "zeros"])
def test_a_bf16_shortlist_gives_the_fp32_masks_of_a_batch(kind, f):
    x, W, b = problem(640, 96, f, 7, torch.float32)
    if kind == "heavy token":
        x[::50] *= 30
    if kind == "tied":
        W[1::2] = W[::2]
    if kind == "few positive":
        b = b - 35
    if kind == "zeros":
        x[::3] = 0
        b = torch.zeros_like(b)
    wanted = dense.top_total(x, W, b, 8 * 640)
    for shortlist in (True, False):
        found = threshold.top_total(x, W, b, 8 * 640, shortlist=shortlist)
        assert torch.equal(found.indices, wanted.indices) and torch.equal(found.offsets, wanted.offsets)
        torch.testing.assert_close(found.values, wanted.values, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shortlist", [True, False])
@pytest.mark.parametrize("per_latent", [True, False])
@pytest.mark.parametrize("f", [2304, 2310, 30])
def test_above_a_threshold(shortlist, per_latent, f):
    x, W, b = problem(200, 96, f, 3, torch.float32)
    cut = torch.rand(f) * 20 if per_latent else torch.tensor(15.0)
    scores = torch.nn.functional.linear(x, W, b)
    found = threshold.above(x, W, b, cut, shortlist=shortlist)
    assert torch.equal(found.to_dense() > 0, scores > cut)
    torch.testing.assert_close(found.to_dense(), scores * (scores > cut), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shortlist", [True, False])
def test_no_tokens_give_no_codes_above_a_threshold(shortlist):
    x, W, b = problem(0, 96, 2304, 1, torch.float32)
    codes = threshold.above(x, W, b, torch.tensor(1.0), shortlist)
    assert len(codes) == 0 and len(codes.values) == 0 and codes.n_latents == 2304


def test_the_weighted_choice_of_every_latent_needs_none_left_over():
    x, W, g = torch.randn(64, 8), torch.randn(16, 8), torch.randn(64, 8)
    found = weighted.top_k_weighted(x, W, torch.zeros(16), g, W, 0.5, k=16, shortlist=True)
    torch.testing.assert_close(found.to_dense(), (x @ W.T).relu())
