"""Evaluation: each figure against its definition, and against what must come out exactly."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, kl_div

import saelab
from saelab.base.codes import SparseCodes
from saelab.base.errors import ConfigError, DataError, SiteError
from saelab.evaluation.fidelity import ratio
from saelab.evaluation.reconstruction import Reconstruction
from saelab.evaluation.sparsity import ENOUGH, Firing
from saelab.models.tokens import Tokens

SITE = "blocks.2.hook_resid_post"
TEXTS = [f"Speech {i}: " + " ".join(f"w{(i * j) % 17}" for j in range(40)) for i in range(60)]
CONTRACT = "l0 explained_variance fvu mse ce_clean ce_sae ce_zero ce_score delta_ce kl dead_fraction".split()


class Parts:
    """x as its positive and negative parts: reconstructs exactly, or `times` x; for vectors of norm up to `limit`."""

    def __init__(self, d=32, times=1.0, limit=math.inf, **metadata):
        self.d_in, self.d_out, self.d_sae, self.limit = d, d, 2 * d + 2, limit
        self.metadata = {"site": SITE, "context_length": 32, **metadata}
        eye = torch.eye(d)
        self.W_dec = times * torch.cat([eye, -eye, torch.zeros(2, d)])  # the last two latents never fire

    def encode_sparse(self, x):
        return SparseCodes.from_dense(torch.cat([x.relu(), (-x).relu(), torch.zeros(len(x), 2)], 1))

    def decode(self, codes, x=None):
        return (codes.to_dense() if isinstance(codes, SparseCodes) else codes) @ self.W_dec

    def __call__(self, x):
        return self.decode(self.encode_sparse(x))

    def replaceable(self, x):
        return x.norm(dim=-1) <= self.limit


@pytest.fixture(scope="module")
def corpus():
    return saelab.load_corpus(TEXTS)


def run(sae, lm, corpus, **arguments):
    settings = {"tokens": 256, "sparsity_tokens": 256, "batch_size": 3, "progress": False}
    return saelab.evaluate(sae, lm, corpus, **{**settings, **arguments})


# accumulators


def test_reconstruction_by_hand():
    part = Reconstruction(2)
    part.add(torch.tensor([[1.0, 10.0], [3.0, 10.0]]), torch.tensor([[1.0, 10.0], [2.0, 10.0]]))
    part.add(torch.tensor([[5.0, 16.0]]), torch.tensor([[5.0, 13.0]]))
    # means 3 and 12: variation (4 + 0 + 4) + (4 + 4 + 16), errors 1 + 9
    assert part.fvu == pytest.approx(10 / 32) and part.explained_variance == pytest.approx(22 / 32)
    assert part.explained_variance_median == pytest.approx((7 / 8 + 15 / 24) / 2)
    assert part.mse == pytest.approx(10 / 6) and part.x.mean.tolist() == pytest.approx([3, 12])


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.floats(-1e6, 1e6))
def test_batches_do_not_matter(sizes, offset):
    x = torch.randn(sum(sizes) + 2, 3, dtype=torch.float64) + offset
    x_hat = x + 0.1 * torch.randn_like(x)
    part = Reconstruction(3)
    for rows, guesses in zip(x.split([*sizes, 2]), x_hat.split([*sizes, 2]), strict=True):
        part.add(rows, guesses)
    expected = float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum())
    assert part.fvu == pytest.approx(expected, rel=1e-6)


def test_nothing_varies():
    part = Reconstruction(2)
    part.add(torch.ones(3, 2), torch.ones(3, 2))
    assert math.isnan(part.fvu) and math.isnan(part.explained_variance_median) and part.mse == 0


def test_firing_by_hand():
    firing = Firing(4)
    firing.add(SparseCodes.from_dense(torch.tensor([[1.0, 0, 2, 0], [0, 0, 0, 0]])))
    firing.add(SparseCodes.from_dense(torch.tensor([[1.0, 0, 0, 0]])))
    assert firing.l0 == 1 and firing.silent_fraction == 0.5 and firing.counts.tolist() == [2, 0, 1, 0]


def test_standard_error_of_a_ratio():
    sums, counts = torch.rand(50, dtype=torch.float64), torch.full((50,), 4.0, dtype=torch.float64)
    value, error = ratio(sums, counts)
    assert value == pytest.approx(float(sums.mean() / 4)) and error == pytest.approx(float(sums.std() / 4 / 50**0.5))
    assert math.isnan(ratio(sums[:1], counts[:1])[1])


# what must come out exactly


def test_identity_changes_nothing(tiny_llama, corpus):
    report = run(Parts(), tiny_llama, corpus)
    assert report.ce_sae == report.ce_clean and report.delta_ce == 0 and report.kl == 0 and report.kl_se == 0
    assert report.explained_variance == report.explained_variance_all == report.explained_variance_median == 1
    assert report.fvu == 0 and report.mse == 0 and report.ce_score == 1 and report.ce_score_mean == 1
    assert report.l0 == pytest.approx(32) and report.dead_fraction == pytest.approx(2 / 66)


def test_zeros_everywhere_give_the_logarithm_of_the_vocabulary(tiny_llama):
    ids = saelab.load_corpus(torch.randint(256, (40, 32)))
    report = run(Parts(times=0.0), tiny_llama, ids, skip_positions=0, tokens=64)
    assert report.replaced_fraction == 1
    assert report.ce_zero == pytest.approx(math.log(258), abs=1e-5)
    assert report.ce_sae == report.ce_zero and report.ce_score == 0


def test_figures_against_a_slow_twin(tiny_llama, corpus):
    """Everything again with `lm.splice`, without batches, in float64."""
    contexts = corpus.contexts(tiny_llama, 32, "heldout")
    x_all = tiny_llama.record(contexts.ids[:8].long(), SITE)
    sae = Parts(times=0.7, limit=float(x_all.norm(dim=-1).quantile(0.8)))
    report = run(sae, tiny_llama, corpus)

    xs, hats, ce_clean, ce_sae, kl, replaced = [], [], [], [], [], 0
    for ids, mask, x in zip(contexts.ids[:8].long(), contexts.mask[:8], x_all, strict=True):
        tokens = Tokens(ids[None], torch.ones(1, 32, dtype=torch.bool))
        clean = tiny_llama.logits(tokens)[0].double()
        with tiny_llama.splice(sae) as receipt:
            spliced = tiny_llama.logits(tokens)[0].double()
        replaced += receipt.replaced
        kept = mask & (torch.arange(32) > 0) & sae.replaceable(x)
        xs.append(x[kept].double())
        hats.append(0.7 * x[kept].double())
        real = mask[1:]
        ce_clean.append(cross_entropy(clean[:-1][real], ids[1:][real], reduction="none"))
        ce_sae.append(cross_entropy(spliced[:-1][real], ids[1:][real], reduction="none"))
        pointwise = kl_div(spliced.log_softmax(-1), clean.log_softmax(-1), log_target=True, reduction="none")
        kl.append(pointwise.sum(-1)[mask])
    x, x_hat = torch.cat(xs), torch.cat(hats)
    fvu = (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
    assert report.fvu == pytest.approx(float(fvu), rel=1e-5)
    assert report.mse == pytest.approx(float((x - x_hat).square().mean()), rel=1e-5)
    assert report.ce_clean == pytest.approx(float(torch.cat(ce_clean).mean()), rel=1e-6)
    assert report.ce_sae == pytest.approx(float(torch.cat(ce_sae).mean()), rel=1e-6)
    assert report.kl == pytest.approx(float(torch.cat(kl).mean()), rel=1e-3) and report.kl > 0
    assert report.tokens == int(contexts.mask[:8].sum())
    assert report.replaced_fraction == replaced / report.tokens == len(x) / report.tokens < 0.9
    assert report.ce_score == pytest.approx((report.ce_zero - report.ce_sae) / (report.ce_zero - report.ce_clean))
    again = run(sae, tiny_llama, corpus, batch_size=8)
    assert again.kl == pytest.approx(report.kl, rel=1e-4) and again.l0 == report.l0


def test_mean_ablation_is_a_constant_at_the_replaced_positions(tiny_llama, corpus):
    contexts = corpus.contexts(tiny_llama, 32, "heldout")
    ids, kept = contexts.ids[:8].long(), contexts.mask[:8] & (torch.arange(32) > 0)
    mean = tiny_llama.record(ids, SITE)[kept].mean(0)
    with tiny_llama.intervene(SITE, lambda x, where: torch.where(kept[..., None], mean, x)):
        logits = tiny_llama.logits(ids)
    real = contexts.mask[:8, 1:]
    expected = cross_entropy(logits[:, :-1][real], ids[:, 1:][real])
    assert run(Parts(), tiny_llama, corpus).ce_mean == pytest.approx(float(expected), rel=1e-5)


def test_the_fields_score_ablates_every_position(tiny_llama, corpus):
    """Zero at the first, the special and the long positions too, which the SAE leaves alone; beside it the other figures."""
    contexts = corpus.contexts(tiny_llama, 32, "heldout")
    ids, real = contexts.ids[:8].long(), contexts.mask[:8, 1:]
    report = run(Parts(times=0.5), tiny_llama, corpus)
    with tiny_llama.intervene(SITE, lambda x, where: 0 * x):
        logits = tiny_llama.logits(ids)
    by_hand = float(cross_entropy(logits[:, :-1][real], ids[:, 1:][real]))
    assert report.ce_zero_all == pytest.approx(by_hand, rel=1e-6)
    assert by_hand == pytest.approx(math.log(258), abs=1e-5)  # nothing is left of the residual stream
    assert report.ce_zero != pytest.approx(by_hand, rel=1e-3)
    scale = report.ce_zero_all - report.ce_clean
    assert report.ce_score_all == pytest.approx((report.ce_zero_all - report.ce_sae) / scale)
    assert f"{report.ce_score_all:.4f} against zero at every position" in repr(report)


# the report, warnings, errors


def test_report_is_a_table(tiny_llama, corpus):
    report = run(Parts(times=0.5), tiny_llama, corpus)
    table = report.to_pandas()
    assert list(table.columns[: len(CONTRACT)]) == CONTRACT and len(table) == 1
    assert f"silent latents      3.03%, none in {report.sparsity_tokens} tokens, too few" in repr(report)
    assert f"{ENOUGH:,}" in repr(report) and SITE in repr(report) and "<table>" in report._repr_html_()
    assert report.delta_ce_se > 0 and report.kl_se > 0


def test_model_and_sae_are_left_as_they_were(tiny_llama, corpus):
    sae, state = Parts(times=0.5), torch.get_rng_state()
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny_llama.model.modules())
    run(sae, tiny_llama, corpus)
    assert torch.equal(torch.get_rng_state(), state)
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny_llama.model.modules())


def test_warnings(tiny_llama, corpus):
    seen = Parts(corpus_digest=corpus.digest, split="train")
    run(seen, tiny_llama, corpus)
    for split in ("train", "all"):
        with pytest.warns(UserWarning, match="trained on split 'train'"):
            run(seen, tiny_llama, corpus, split=split)
    with pytest.warns(UserWarning, match=r"ends after \d+ of the 100,000 tokens"):
        run(Parts(), tiny_llama, corpus, tokens=100_000)


def test_errors(tiny_llama, corpus):
    sae = Parts()
    del sae.metadata["site"]
    with pytest.raises(ConfigError, match="site="):
        run(sae, tiny_llama, corpus)
    assert run(sae, tiny_llama, corpus, site=SITE, context_length=32).site == SITE
    with pytest.raises(SiteError):
        run(Parts(), tiny_llama, corpus, site="blocks.9.hook_resid_post")
    with pytest.raises(SiteError, match="16"):
        run(Parts(d=16), tiny_llama, corpus)
    with pytest.raises(DataError, match="norm limit"):
        run(Parts(limit=0.0), tiny_llama, corpus)
    with pytest.raises(ConfigError, match="tokens is 0"):
        run(Parts(), tiny_llama, corpus, tokens=0)


def test_a_real_sae(tiny_llama, corpus):
    report = run(saelab.SAE(saelab.TopK(k=4, d_sae=64), d_in=32, metadata={"site": SITE}), tiny_llama, corpus,
                 context_length=32)  # fmt: skip
    assert report.l0 == pytest.approx(4) and 0 <= report.dead_fraction < 1
