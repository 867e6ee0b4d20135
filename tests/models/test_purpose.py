"""What an autoencoder is for, as its metadata say."""

from types import SimpleNamespace

import pytest
import torch

import saelab
from saelab.base.errors import ConfigError, SiteError
from saelab.models.purpose import Purpose, counted
from saelab.models.tokens import Tokens

SITE = "blocks.1.hook_resid_post"


def of(d_in=32, **metadata):
    return saelab.SAE(saelab.TopK(k=2, d_sae=16), d_in=d_in, metadata=metadata, seed=0)


def test_what_the_metadata_say_and_what_holds_where_they_are_silent():
    silent = Purpose.of(of(skip_positions=None))
    assert (silent.site, silent.target_site, silent.context_length, silent.prepend_bos) == (None,) * 4
    assert silent.skip_positions == Purpose.of(of()).skip_positions == 1
    said = Purpose.of(of(site=SITE, skip_positions=0, context_length=32, prepend_bos=True))
    assert (said.reads, said.skip_positions, said.context_length, said.prepend_bos) == (SITE, 0, 32, True)
    given = Purpose.of(of(site=SITE, skip_positions=3), site="blocks.0.hook_resid_pre", skip_positions=2)
    assert (given.reads, given.skip_positions) == ("blocks.0.hook_resid_pre", 2)
    with pytest.raises(ConfigError, match="give site="):
        _ = silent.reads
    with pytest.raises(ConfigError, match="skip_positions is -1"):
        Purpose.of(of(), skip_positions=-1)


def test_both_sites_have_to_fit(tiny_llama):
    purpose = Purpose.of(of(site=SITE))
    assert purpose.source(tiny_llama) == purpose.target(tiny_llama) == tiny_llama.site(SITE)
    with pytest.raises(SiteError, match="input is 8 wide.* 32"):
        Purpose.of(of(8, site=SITE)).source(tiny_llama)
    with pytest.raises(SiteError, match="output is 8 wide.* 32"):
        Purpose.of(of(8, site=SITE)).target(tiny_llama)
    assert (
        Purpose.of(of(site=SITE, target_site="blocks.1.hook_mlp_out")).target(tiny_llama).name
        == "blocks.1.hook_mlp_out"
    )


def test_positions_are_real_ordinary_past_the_skipped_and_within_the_limit():
    lm = SimpleNamespace(special_ids=frozenset([9]))
    tokens = Tokens(torch.tensor([[0, 5, 5, 9, 5, 5], [5, 5, 5, 5, 5, 0]]), torch.ones(2, 6, dtype=torch.bool))
    tokens.mask[0, 0] = tokens.mask[1, 5] = False
    sae = of(2, skip_positions=2)
    sae.state.norm_limit.fill_(2.0)
    x = torch.ones(2, 6, 2)
    x[1, 3] = 5.0
    by_hand = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 1, 0, 1, 0]], dtype=torch.bool)
    assert torch.equal(Purpose.of(sae).positions(lm, x, tokens), by_hand)
    assert torch.equal(counted(tokens, 2, [9]) & ~(x[..., 0] > 2), by_hand)
    assert torch.equal(counted(tokens, 0), tokens.mask)
