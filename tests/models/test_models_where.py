"""Interventions know where they are: positions, ids, padding and phase for any call of the wrapped model."""

import pytest
import torch

import saelab
from saelab.base.errors import InterventionError
from saelab.models.tokens import padded
from saelab.models.where import locator

SITE = "blocks.1.hook_resid_post"


def seen_by(lm, run, site=SITE):
    seen = []
    with lm.intervene(site, lambda x, where: seen.append(where) or x):
        run()
    return seen


@pytest.fixture(params=["tiny_llama", "tiny_gpt2"])
def lm(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("left", [False, True])
def test_padding_on_either_side(lm, left):
    tokens = padded([[5, 6, 7, 8], [9, 10]], 257, left=left)
    (where,) = seen_by(lm, lambda: lm.model(input_ids=tokens.ids, attention_mask=tokens.mask.long()))
    assert torch.equal(where.mask, tokens.mask)
    assert where.positions[0].tolist() == [0, 1, 2, 3]
    assert where.positions[1][where.mask[1]].tolist() == [0, 1]
    assert torch.equal(where.ids, tokens.ids)
    assert where.phase == "prompt" and not where.generated.any()


def test_our_generation_with_and_without_cache(lm):
    prompts = ["abcdef", "xyz"]
    cached = seen_by(lm, lambda: lm.generate(prompts, 4, temperature=0))
    whole = seen_by(lm, lambda: lm.generate(prompts, 4, temperature=0, use_cache=False))
    assert len(cached) == len(whole) == 4
    assert [w.phase for w in cached] == ["prompt", "generated", "generated", "generated"]
    assert cached[0].mask.tolist() == [[True] * 6, [False] * 3 + [True] * 3]
    assert [w.positions.tolist() for w in cached[1:]] == [[[6], [3]], [[7], [4]], [[8], [5]]]
    last = whole[-1]
    assert last.generated.tolist() == [[False] * 6 + [True] * 3] * 2
    assert last.positions.tolist() == [list(range(9)), [0, 0, 0, *range(6)]]
    assert torch.equal(last.ids[:, -1:], cached[-1].ids)


def test_generation_of_transformers(lm):
    tokens = padded([[5, 6, 7, 8], [9, 10]], 257, left=True)
    seen = seen_by(lm, lambda: lm.model.generate(
        input_ids=tokens.ids, attention_mask=tokens.mask.long(), max_new_tokens=3, do_sample=False, eos_token_id=None,
        pad_token_id=257))  # fmt: skip
    assert [w.phase for w in seen] == ["prompt", "generated", "generated"]
    assert [w.positions.tolist() for w in seen[1:]] == [[[4], [2]], [[5], [3]]]
    assert all(w.mask.all() for w in seen[1:])


def test_an_edit_by_position_is_the_same_with_and_without_cache(lm):
    def push(x, where):
        at = (where.positions >= 3) & where.mask & where.generated
        return x + 5.0 * at[..., None] * torch.linspace(-1, 1, x.shape[-1])

    with lm.intervene(SITE, push):
        with_cache = lm.generate(["abcdef", "xy"], 8, seed=3)
        without = lm.generate(["abcdef", "xy"], 8, seed=3, use_cache=False)
    assert with_cache == without != lm.generate(["abcdef", "xy"], 8, seed=3)


def test_embeddings_instead_of_ids(tiny_llama):
    embedded = tiny_llama.model.model.embed_tokens(torch.tensor([[5, 6]]))
    (where,) = seen_by(tiny_llama, lambda: tiny_llama.model(inputs_embeds=embedded))
    assert where.ids.tolist() == [[-1, -1]] and where.positions.tolist() == [[0, 1]]


def test_position_ids_and_masks_of_new_tokens_only():
    locate = locator(["input_ids", "attention_mask", "position_ids"])
    ids = torch.tensor([[4, 5]])
    assert locate((ids,), {"position_ids": torch.tensor([[7, 8]])}).positions.tolist() == [[7, 8]]

    class Cache:
        def get_seq_length(self):
            return 3

    where = locate((ids, torch.tensor([[1, 1]])), {"past_key_values": Cache()})
    assert where.positions.tolist() == [[3, 4]] and where.phase == "generated"
    assert locate((), {"input_ids": ids, "past_key_values": Cache()}).positions.tolist() == [[3, 4]]


def test_part_of_the_model_on_its_own_is_an_error(tiny_llama):
    block = tiny_llama.model.model
    with pytest.raises(InterventionError, match="call the model that was loaded"), tiny_llama.intervene(
            SITE, lambda x, where: x):  # fmt: skip
        block(input_ids=torch.tensor([[1, 2]]))


def test_returning_the_activation_changes_no_bit(tiny_llama):
    plain = tiny_llama.logits("some text")
    for site in ("blocks.1.attn.hook_z", "blocks.1.hook_resid_mid", SITE):
        with tiny_llama.intervene(site, lambda x, where: x):
            assert torch.equal(tiny_llama.logits("some text"), plain)


def test_finding_a_width_is_no_pass_of_the_users(tiny_gpt2):
    lm = saelab.LanguageModel(tiny_gpt2.model, tiny_gpt2.tokenizer)
    seen = seen_by(lm, lambda: lm.site("transformer.h.0.mlp.c_fc"))
    assert seen == [] and lm.site("h.0.mlp.c_fc").width == 96
