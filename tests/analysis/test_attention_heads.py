"""Attribution to heads over firings, its null, and how many things a head does."""

import numpy as np
import pandas as pd
import pytest
import torch

import saelab
from saelab.analysis import attention
from saelab.analysis.circuits import frozen
from tests.models.test_models_families import IDS
from tests.toy_attribution import attention_sae


def test_the_mean_over_firings(tiny_llama):
    sae = attention_sae(tiny_llama, 2)
    x = torch.cat([tiny_llama.record(IDS, "blocks.2.attn.hook_z").flatten(0, 1), torch.randn(300, 32)])
    sae.state.norm_limit.fill_(float(x.norm(dim=1).quantile(0.9)))
    found = attention.firing_head_attribution(sae, x, rows=50)
    ordinary = x[sae.replaceable(x)]
    assert 0 < len(ordinary) < len(x)
    codes = sae.encode(ordinary).detach()
    for latent in range(sae.d_sae):
        fires = codes[:, latent] > 0
        if not fires.any():
            assert found[latent].isnan().all()
            continue
        by_head = (ordinary * sae.W_enc[:, latent]).detach().unflatten(1, (4, 8)).sum(2)[fires].mean(0)
        torch.testing.assert_close(found[latent], by_head, atol=1e-5, rtol=1e-4)
    bias = frozen.readers(sae, torch.arange(sae.d_sae)).bias
    means = codes.sum(0) / (codes > 0).sum(0)
    torch.testing.assert_close(found.sum(1) + bias, means, atol=1e-5, rtol=1e-4, equal_nan=True)


def test_agreement_against_shuffles():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(400, 9, generator=generator)
    same = attention.head_agreement(truth, truth + 0.05 * torch.randn(400, 9, generator=generator))
    assert same.agreement > 0.85 and same.clear and same.p_value < 1e-3
    unrelated = attention.head_agreement(truth, torch.randn(400, 9, generator=generator))
    assert not unrelated.clear and unrelated.agreement < unrelated.null_99 + 0.02
    assert abs(unrelated.null - 1 / 9) < 0.02 and unrelated.chance == pytest.approx(1 / 9)


def test_the_null_keeps_how_often_each_head_is_named():
    """Both sides name head 0 four times in five: shuffles agree .8^2 + .2^2 of the time, and that is no finding."""
    one = torch.tensor([[1.0, 0.0]] * 80 + [[0.0, 1.0]] * 20)
    other = one[torch.randperm(100, generator=torch.Generator().manual_seed(1))]
    found = attention.head_agreement(one, other)
    assert found.null == pytest.approx(0.68, abs=0.01) and not found.clear


def test_shuffles_that_agree_as_often_count_against_the_agreement():
    """All latents name one head on both sides: every shuffle agrees as well, and nothing was found."""
    one = torch.tensor([[1.0, 0.0]] * 20)
    found = attention.head_agreement(one, one, permutations=50)
    assert found.agreement == found.null == 1 and found.p_value == 1


def test_silent_latents_are_left_out_and_shapes_checked():
    weights, attribution = torch.eye(3), torch.eye(3)
    attribution[1] = float("nan")
    assert attention.head_agreement(weights, attribution).latents == 2
    with pytest.raises(saelab.DataError, match=r"\[3, 3\] and \[3, 2\]"):
        attention.head_agreement(weights, attribution[:, :2])
    with pytest.raises(saelab.DataError, match="0 latents"):
        attention.head_agreement(weights, torch.full((3, 3), float("nan")))


class TestPolysemanticity:
    def planted(self, tiny_llama):
        """Head k's top latents are 6k .. 6k + 5; those of head 0 write one direction, of head 1 many."""
        sae = attention_sae(tiny_llama, 2)
        with torch.no_grad():
            rows = torch.zeros(24, 4, 8)
            for latent in range(24):
                rows[latent, latent // 6, 0 if latent < 6 else latent % 8] = 1.0
            sae.W_dec.copy_(rows.flatten(1))
        return sae

    def test_by_labels(self, tiny_llama):
        labels = ["induction"] * 6 + ["a", "b", "c", "a", "b", "c"] + [None] * 6 + ["name"] * 5 + ["other"]
        table = attention.polysemanticity(self.planted(tiny_llama), labels, top=6).set_index("head")
        assert table.looks_monosemantic.tolist() == [True, False, False, False]
        assert table.loc[0, "common"] == "induction" and table.loc[0, "share"] == 1
        assert table.loc[1, "distinct"] == 3 and table.loc[2, "distinct"] == 6
        assert pd.isna(table.loc[2, "common"])  # unlabelled latents are no kind
        assert table.loc[3, "share"] == pytest.approx(5 / 6)
        assert sorted(table.loc[1, "latents"]) == list(range(6, 12)) and table.own.tolist() == [6] * 4
        assert table.loc[0, "dimensions"] == pytest.approx(1) and table.loc[1, "dimensions"] == pytest.approx(6)
        assert (table.mean_share == 1).all()
        eased = attention.polysemanticity(self.planted(tiny_llama), labels, top=6, majority=0.8)
        assert eased.looks_monosemantic.tolist() == [True, False, False, True]

    def test_chance(self, tiny_llama):
        every = attention.polysemanticity(self.planted(tiny_llama), ["x"] * 24, top=6)
        assert (every.chance == 1).all() and every.looks_monosemantic.all()
        rare = attention.polysemanticity(self.planted(tiny_llama), {0: "x", 1: "x"}, top=6)
        assert (rare.chance == 0).all() and not rare.looks_monosemantic.any()
        half = attention.polysemanticity(self.planted(tiny_llama), ["x"] * 12 + ["y"] * 12, top=2, majority=1.0)
        assert half.chance[0] == pytest.approx(2 * 12 / 24 * 11 / 23, abs=0.05)

    def test_seeds(self, tiny_llama):
        runs = [attention.polysemanticity(self.planted(tiny_llama), list("xy" * 12), top=3, seed=s) for s in (0, 0, 1)]
        assert runs[0].equals(runs[1]) and np.isfinite(runs[2].chance).all()
