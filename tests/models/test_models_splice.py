"""An autoencoder in place of an activation: which positions, which bits, which errors."""

from dataclasses import dataclass

import pytest
import torch

import saelab
from saelab.base.errors import ConfigError, InterventionError, SiteError
from saelab.models.tokens import padded

SITE = "blocks.1.hook_resid_post"


@dataclass
class Codes:
    """As `SparseCodes`: what the splice needs of it."""

    values: torch.Tensor
    indices: torch.Tensor
    row: torch.Tensor
    n: int

    def rows(self):
        return self.row


class StandIn:
    """Two latents (the first two dimensions), with the members of an SAE that models use."""

    def __init__(self, d_in=32, d_out=None, limit=None, **metadata):
        self.d_in, self.d_out, self.limit = d_in, d_out or d_in, limit
        self.metadata = {"site": SITE, "skip_positions": 1, **metadata}
        self.W_dec = torch.zeros(2, self.d_out)
        self.W_dec[0, 0] = self.W_dec[1, 1] = 1.0

    def encode_sparse(self, x):
        row, latent = (x[:, :2] > 0).nonzero(as_tuple=True)
        return Codes(x[row, latent], latent, row, len(x))

    def decode(self, codes):
        dense = torch.zeros(codes.n, 2).index_put((codes.row, codes.indices), codes.values)
        return dense @ self.W_dec

    def __call__(self, x):
        return self.decode(self.encode_sparse(x))

    def replaceable(self, x):
        return torch.ones(len(x), dtype=torch.bool) if self.limit is None else x.norm(dim=1) <= self.limit


def doubled(codes):
    return Codes(codes.values * 2, codes.indices, codes.row, codes.n)


TEXTS = ["The state of the union", "My fellow<|endoftext|>"]


def test_the_reconstruction_stands_at_ordinary_positions_only(tiny_llama):
    lm, sae = tiny_llama, StandIn()
    tokens = lm.tokenize(TEXTS)
    plain = lm.record(tokens, SITE)
    sae.limit = plain[0, 5].norm().item()
    ordinary = (plain.norm(dim=-1) <= sae.limit) & tokens.mask & (tokens.ids != 256)
    ordinary[:, 0] = False
    with lm.splice(sae) as receipt:
        spliced = lm.record(tokens, SITE)
    assert torch.equal(spliced[~ordinary], plain[~ordinary])
    assert torch.equal(spliced[ordinary], sae(plain[ordinary]))
    assert 0 < receipt.replaced == int(ordinary.sum()) < receipt.positions == int(tokens.mask.sum())
    assert repr(receipt) == f"Splice(replaced={receipt.replaced} of positions={receipt.positions})"


def test_the_first_token_is_left_alone_where_the_metadata_do_not_say(tiny_llama):
    sae = StandIn()
    del sae.metadata["skip_positions"]
    plain = tiny_llama.record("abcdef", SITE)
    with tiny_llama.splice(sae) as receipt:
        spliced = tiny_llama.record("abcdef", SITE)
    assert torch.equal(spliced[:, 0], plain[:, 0]) and (receipt.replaced, receipt.positions) == (5, 6)


@pytest.mark.parametrize("edit", [None, lambda codes: codes])
def test_with_its_error_term_nothing_changes_not_even_a_bit(tiny_llama, edit):
    plain = tiny_llama.logits(TEXTS)
    for site in (SITE, "blocks.1.attn.hook_z", "blocks.1.hook_resid_mid"):
        with tiny_llama.splice(StandIn(), error_term=True, edit=edit, site=site) as receipt:
            assert torch.equal(tiny_llama.logits(TEXTS), plain)
    assert receipt.replaced > 20


def test_an_edit_with_and_without_the_error_term(tiny_llama):
    lm, sae = tiny_llama, StandIn()
    plain = lm.record("abcdef", SITE)[0, 1:]
    with lm.splice(sae, edit=doubled):
        torch.testing.assert_close(lm.record("abcdef", SITE)[0, 1:], 2 * sae(plain))
    with lm.splice(sae, error_term=True, edit=doubled):
        torch.testing.assert_close(lm.record("abcdef", SITE)[0, 1:], plain + sae(plain))


def test_padding_on_the_left_and_a_cache_count_places_alike(tiny_llama):
    lm, sae = tiny_llama, StandIn(skip_positions=3)
    with lm.splice(sae) as cached:
        first = lm.generate(["abcdef", "x"], 4, temperature=0)
    with lm.splice(sae):
        assert lm.generate(["abcdef", "x"], 4, temperature=0, use_cache=False) == first
    # of 6 + 3 positions run 6 are past the third, of 1 + 3 one is (the last token is not run)
    assert (cached.replaced, cached.positions) == (6 + 1, 9 + 4)
    tokens = padded([[1, 2, 3, 4, 5], [6, 7]], 257, left=True)
    with lm.splice(sae) as receipt:
        lm.model(input_ids=tokens.ids, attention_mask=tokens.mask.long())
    assert receipt.replaced == 2


def test_a_transcoder_reads_at_one_site_and_writes_at_another(tiny_llama):
    lm, into, out = tiny_llama, "blocks.1.mlp.hook_pre", "blocks.1.hook_mlp_out"
    sae = StandIn(64, 32, site=into, target_site=out)
    before = lm.record("abcdef", [into, out])
    with lm.splice(sae) as receipt:
        after = lm.record("abcdef", [into, out])
    assert torch.equal(after[into], before[into])
    assert torch.equal(after[out][:, 0], before[out][:, 0])
    assert torch.equal(after[out][0, 1:], sae(before[into][0, 1:])) and receipt.replaced == 5
    with lm.splice(sae, error_term=True, edit=doubled):
        edited = lm.record("abcdef", out)
    torch.testing.assert_close(edited[0, 1:], before[out][0, 1:] + sae(before[into][0, 1:]))
    sae.d_in, sae.d_out = 32, 64
    sae.metadata.update(site=out, target_site=into)
    with pytest.raises(InterventionError, match="reads first"), lm.splice(sae):
        lm.logits("abc")


def test_errors_state_the_numbers(tiny_llama):
    with pytest.raises(SiteError, match=r"48 wide and site .* 32"), tiny_llama.splice(StandIn(48)):
        pass
    with pytest.raises(SiteError, match=r"output is 16 wide"), tiny_llama.splice(StandIn(32, 16)):
        pass
    with pytest.raises(ConfigError, match="site="), tiny_llama.splice(StandIn(site=None)):
        pass
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny_llama.model.modules())


def test_a_splice_in_which_nothing_ran_is_an_error(tiny_llama):
    with pytest.raises(InterventionError, match="never ran"), tiny_llama.splice(StandIn()):
        pass
    with pytest.raises(ZeroDivisionError), tiny_llama.splice(StandIn()):
        raise ZeroDivisionError


def test_bf16_models_keep_their_dtype():
    from tests import tiny

    lm = saelab.load_model(tiny.llama_model().bfloat16(), tokenizer=tiny.byte_tokenizer(), device="cpu")
    plain = lm.logits("abcdef")
    assert plain.dtype is torch.bfloat16 and lm.loss("abcdef").dtype is torch.float32
    with lm.splice(StandIn(), error_term=True, edit=lambda codes: codes):
        assert torch.equal(lm.logits("abcdef"), plain)
    with lm.splice(StandIn()):
        assert lm.record("abcdef", SITE).dtype is torch.bfloat16


def test_top_latents_is_a_table_of_the_strongest(tiny_llama):
    lm, sae = tiny_llama, StandIn(labels={"1": "second"})
    table = lm.top_latents("The state", sae, k=5)
    assert list(table.columns) == ["position", "token", "latent", "activation", "label"]
    x = lm.record("The state", SITE)[0, 1:, :2]
    best = x.flatten().topk(5)
    assert table.activation.tolist() == best.values.tolist()
    assert table.position.tolist() == (best.indices // 2 + 1).tolist()
    assert table.latent.tolist() == (best.indices % 2).tolist()
    assert [("", "second")[latent] for latent in table.latent] == table.label.tolist()
    assert table.token.tolist() == ["The state"[position] for position in table.position]
    with pytest.raises(saelab.DataError, match="one text"):
        lm.top_latents(["a", "b"], sae)
    with pytest.raises(SiteError, match="48"):
        lm.top_latents("abc", StandIn(48))
