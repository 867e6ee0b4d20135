"""Guards, bounds and defaults that ordinary data never reach: each test was made to fail without its one."""

import pytest
import torch

import saelab
from saelab.autoencoders.architecture import Batch
from saelab.autoencoders.architectures.relu import resample
from saelab.evaluation.reconstruction import Reconstruction
from saelab.kernels import columns, dense, selection, weighted
from saelab.reading.corpus import held_out_blocks
from saelab.training.schedule import Schedule
from saelab.training.step import Trainer


def test_the_bound_of_bf16_holds_where_all_rounding_errors_of_the_weights_point_along_the_row():
    d, f = 96, 2304
    sign = torch.cat([torch.ones(48), -torch.ones(48)])
    x, W = sign.repeat(64, 1), torch.zeros(f, d)
    W[:, 0] = -1.0  # silent
    W[0] = 1 + sign * torch.where(sign > 0, 0.99 * 2**-8, 0.99 * 2**-9)  # its score is .28, and in bf16 0
    W[1, 0], W[2:102, 0] = 0.2, 0.1  # the best candidate, and a full shortlist below it
    found = selection.top_k(x, W, torch.zeros(f), 1, shortlist=True)
    assert torch.equal(found.indices, dense.top_k(x, W, torch.zeros(f), 1).indices)
    assert set(found.indices.tolist()) == {0}


def test_a_score_that_is_zero_to_rounding_fires_where_the_dense_product_says_so():
    generator = torch.Generator().manual_seed(0)
    half, f = torch.randn(512, 48, generator=generator), 2304
    shuffled = torch.stack([row[torch.randperm(48, generator=generator)] for row in half])
    x = torch.cat([half, -shuffled], 1)  # adds up to nothing but rounding
    W, b = torch.zeros(f, 96), torch.full((f,), -1000.0)
    W[7], b[7] = 1.0, 0.0
    found, expected = selection.top_k(x, W, b, 1, shortlist=True), dense.top_k(x, W, b, 1)
    assert 100 < len(expected.indices) < 412  # about half of them are above zero
    assert torch.equal(found.offsets, expected.offsets) and torch.equal(found.indices, expected.indices)


def test_tokens_that_tie_to_rounding_are_ranked_as_the_dense_product_ranks_them():
    generator = torch.Generator().manual_seed(0)
    row = torch.rand(96, generator=generator)
    x = torch.stack([row[torch.randperm(96, generator=generator)] for _ in range(256)])  # equal sums, in other orders
    x = x * torch.cat([torch.full((50,), 4.0), torch.full((100,), 2.0), torch.linspace(1, 0.1, 106)])[:, None]
    W = torch.ones(64, 96) * torch.arange(1, 65)[:, None]
    m = torch.full((64,), 100)  # the cut is among the hundred that tie
    found = columns.per_latent(x, W, torch.zeros(64), m, shortlist=True)
    expected = dense.per_latent(x, W, torch.zeros(64), m)
    assert torch.equal(found.indices, expected.indices) and torch.equal(found.offsets, expected.offsets)


def test_a_shortlist_of_all_latents_has_no_next_one_to_compare_with():
    generator = torch.Generator().manual_seed(0)
    x, W, b = torch.randn(64, 16, generator=generator), torch.randn(4, 16, generator=generator), torch.zeros(4)
    found, expected = selection.top_k(x, W, b, 4, shortlist=True), dense.top_k(x, W, b, 4)
    assert torch.equal(found.indices, expected.indices) and torch.equal(found.offsets, expected.offsets)
    g, W_dec = torch.randn(64, 16, generator=generator), torch.randn(4, 16, generator=generator)
    found = weighted.top_k_weighted(x, W, b, g, W_dec, 1.0, 4, shortlist=True)
    expected = weighted.top_k_weighted(x, W, b, g, W_dec, 1.0, 4, shortlist=False)
    assert torch.equal(found.indices, expected.indices) and torch.equal(found.offsets, expected.offsets)


def test_two_scores_at_the_cut_that_tie_to_rounding_are_in_doubt():
    top = torch.tensor([[2.0, 1.0, 1.0 - 1e-7], [2.0, 1.0, 0.5], [2.0, -1.0, -1.0], [1e-9, 1.0, 0.5]])
    doubt = selection._in_doubt(top, 2, torch.full((4,), -1.0), torch.full((4,), 1e-6))
    assert doubt.tolist() == [True, False, False, True]


@pytest.mark.parametrize("best", range(100, 2304, 300))
def test_a_weighted_score_that_bf16_rounds_down_is_not_lost(best):
    i = torch.arange(2304)
    W = torch.stack(
        [torch.ones(2304), i % 128 * 2.0**-20, i // 128 * 2.0**-13], 1
    )  # from 1 to 1.0023: all are 1 in bf16
    W[best, 1:] = torch.tensor([0.0, 63 / 64 * 2**-8])
    x, g = torch.ones(64, 3), torch.zeros(64, 3)
    assert torch.equal(W, W.bfloat16().float())
    found = weighted.top_k_weighted(x, W, torch.zeros(2304), g, W, 1.0, 1, shortlist=True)
    assert set(found.indices.tolist()) == {best}


def test_the_deviation_along_a_direction_does_not_depend_on_its_length():
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7)
    trainer = Trainer(saelab.SAE(saelab.ReLU(l1=0.0, d_sae=10), 6), Schedule(tokens=2000, batch_size=200), lr=0.0)
    trainer.initialise({"x": x})
    trainer.sae.W_dec.data.mul_(torch.arange(1, 11)[:, None])
    for _ in range(10):
        trainer.step({"x": x})
    trainer.finish()
    unit = torch.nn.functional.normalize(trainer.sae.W_dec, dim=1)
    torch.testing.assert_close(trainer.sae.latent_stats.std, (x @ unit.T).std(0, unbiased=False), rtol=1e-4, atol=1e-5)


def test_rows_are_resampled_with_a_chance_of_the_squared_loss():
    sae = saelab.SAE(saelab.ReLU(l1=1.0, d_sae=1, resample=True, unit_decoder=True), 2).requires_grad_(False)
    sae.state.tokens_since_fired.fill_(10**9)
    x = torch.tensor([[1.0, 0.0], [0.0, 3.0**0.5]])  # losses of 1 and 3: chances of 1 and 9
    drawn = 0
    for seed in range(500):
        params = sae.params()
        resample(params, Batch(x, x), torch.zeros(2, 1), sae.state, seed)
        drawn += bool(params.W_dec[0, 1] > 0.5)
    assert 0.86 < drawn / 500 < 0.94


def test_the_median_over_dimensions_is_no_mean():
    found = Reconstruction(4)
    x = torch.eye(4).repeat(10, 1)
    found.add(x, x * torch.tensor([1.0, 1.0, 1.0, 0.0]))
    assert found.explained_variance_median == 1.0 and found.explained_variance < 0.8


def test_held_out_blocks_lie_around_fixed_shares_of_the_text():
    expected = [place for middle in (40, 120, 200, 280, 360) for place in range(middle - 2, middle + 2)]
    assert held_out_blocks(400).nonzero().flatten().tolist() == expected
