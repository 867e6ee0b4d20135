"""The same positions are steered however a text is generated, and what cannot be known is refused."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

import saelab
from saelab import steering
from saelab.base.errors import InterventionError
from saelab.models.tokens import padded
from saelab.models.where import prompt
from saelab.steering import Scope
from tests import tiny
from tests.toy_steering import doubles

SCOPES = [
    Scope(),
    Scope(generated=False),
    Scope(prompt=False),
    Scope(positions=[-1, 2]),
    Scope(windows=[(-2, None)]),
    Scope(exclude_positions=[-1], skip_positions=0),
]
NEW = 4
ROWS = [[5, 6, 7, 8, 9, 3, 11], [9, 10, 4]]


@pytest.fixture(scope="module")
def lm():
    return doubles()[0]


def push(scope, width=32, site="blocks.1.hook_resid_post"):
    return steering.add(torch.linspace(-1, 1, width), strength=6.0, unit="activation", site=site, scope=scope)


def theirs(lm, rows=ROWS, **more):
    tokens = padded(rows, 257, left=True)
    return lm.model.generate(input_ids=tokens.ids, attention_mask=tokens.mask.long(), max_new_tokens=NEW, do_sample=False,
                             pad_token_id=257, eos_token_id=None, **more)[:, -NEW:].tolist()  # fmt: skip


def touched(lm, scope, run):
    """Texts, and the places at which the steering acted, each once however often it was run."""
    places = set()

    def look(x, where):
        for row, column in scope.mask(where, lm).nonzero().tolist():
            places.add((row, int(where.positions[row, column])))
        return x

    with lm.steer(push(scope)) as receipt, lm.intervene("blocks.0.hook_resid_pre", look):
        texts = run()
    return texts, places, receipt


WAYS = {
    "no cache": {"use_cache": False},
    "chunks": {"prefill_chunk_size": 3},
    "small chunks": {"prefill_chunk_size": 1},
    "static": {"cache_implementation": "static"},
    "beams": {"num_beams": 1, "num_return_sequences": 1},
}


@pytest.mark.parametrize("scope", SCOPES, ids=repr)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rows", [ROWS, ROWS[:1]], ids=["padded", "one"])
def test_transformers_own_generate_in_every_way(lm, scope, way, rows):
    expected, places, _ = touched(lm, scope, lambda: theirs(lm, rows))
    assert expected != theirs(lm, rows)
    lengths = [len(row) for row in rows]
    for row, length in enumerate(lengths):  # the last generated token is never run
        every = range(1 if scope.skip_positions else 0, length + NEW - 1)
        chosen = {
            "Scope()": every,
            "Scope(generated=False)": [p for p in every if p < length],
            "Scope(prompt=False)": [p for p in every if p >= length],
            "Scope(positions=(-1, 2))": [length - 1, 2],
            "Scope(windows=((-2, None),))": [p for p in every if p >= length - 2],
            "Scope(exclude_positions=(-1,), skip_positions=0)": [p for p in every if p != length - 1],
        }[repr(scope)]
        assert {p for r, p in places if r == row} == set(chosen)
    assert touched(lm, scope, lambda: theirs(lm, rows, **WAYS[way]))[:2] == (expected, places)


def test_the_settings_of_a_tuned_model_leave_the_cache_off(lm):
    lm.model.generation_config.use_cache = False
    try:
        with lm.steer(push(Scope(generated=False))) as receipt:
            theirs(lm)
    finally:
        lm.model.generation_config.use_cache = True
    assert int(receipt.to_pandas().positions[0]) == NEW * sum(len(row) - 1 for row in ROWS)


def test_embeddings_for_a_prompt_and_a_cache_to_go_on_from(lm):
    ids = torch.tensor([ROWS[0]])
    expected = touched(lm, Scope(positions=[-1]), lambda: theirs(lm, ROWS[:1]))[:2]

    def embedded():
        x = lm.model.get_input_embeddings()(ids)
        return lm.model.generate(inputs_embeds=x, max_new_tokens=NEW, do_sample=False, eos_token_id=None).tolist()

    assert touched(lm, Scope(positions=[-1]), embedded)[:2] == expected

    def going_on():
        cache = lm.model(input_ids=ids[:, :3], use_cache=True).past_key_values
        return lm.model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=NEW, do_sample=False,
                                 eos_token_id=None)[:, -NEW:].tolist()  # fmt: skip

    # its beginning was a call of its own, whose last token was the last of a text
    texts, places, _ = touched(lm, Scope(positions=[-1]), going_on)
    assert places == {(0, 2), (0, 6)}
    assert len(texts[0]) == NEW


def test_models_whose_cache_is_a_state():
    config = AutoConfig.for_model("mamba", vocab_size=258, hidden_size=32, num_hidden_layers=2, state_size=4,
                                  bos_token_id=256, eos_token_id=256, pad_token_id=257)  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    lm = saelab.load_model(model, tokenizer=tiny.byte_tokenizer(), device="cpu")
    for scope in (Scope(), Scope(generated=False), Scope(prompt=False), Scope(positions=[-1])):
        found = []
        for more in ({}, {"use_cache": False}):
            places = []

            def look(x, where, places=places, scope=scope):
                mask = scope.mask(where, lm)
                places.extend(where.positions[mask].tolist())
                return x + 3 * mask[..., None]

            with lm.intervene("backbone.layers.0", look):
                found.append((theirs(lm, ROWS[:1], **more), sorted(set(places))))
        assert found[0] == found[1]
        assert found[0][1] == {
            "Scope()": [*range(1, 10)], "Scope(generated=False)": [*range(1, 7)], "Scope(prompt=False)": [7, 8, 9],
            "Scope(positions=(-1,))": [6],
        }[repr(scope)]  # fmt: skip
    ids = torch.tensor([ROWS[0]])
    state = model(input_ids=ids, use_cache=True).cache_params
    with pytest.raises(InterventionError, match="how many tokens it has read"), lm.steer(
            push(Scope(), site="backbone.layers.0")):  # fmt: skip
        model(input_ids=ids[:, :1], cache_params=state)


def test_a_cache_that_forgets():
    config = Gemma2Config(vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                          num_key_value_heads=2, head_dim=8, sliding_window=4, max_position_embeddings=64,
                          bos_token_id=256, eos_token_id=256, pad_token_id=257)  # fmt: skip
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).double().eval()
    lm = saelab.load_model(model, tokenizer=tiny.byte_tokenizer(), device="cpu")
    for scope in SCOPES:
        expected = touched(lm, scope, lambda: theirs(lm))[:2]
        assert touched(lm, scope, lambda: theirs(lm, use_cache=False))[:2] == expected


# loops of one's own


def loop(lm, cached, ids):
    cache, step = None, ids
    for _ in range(NEW):
        output = lm.model(input_ids=step, past_key_values=cache, use_cache=cached)
        new = output.logits[:, -1:].argmax(2)
        ids, cache = torch.cat([ids, new], 1), output.past_key_values
        step = new if cached else ids
    return ids[:, -NEW:].tolist()


def test_a_loop_with_a_cache_is_known_and_one_without_has_to_be_told(lm):
    ids = torch.tensor([ROWS[0]])
    for scope in SCOPES:
        expected = touched(lm, scope, lambda: theirs(lm, ROWS[:1]))[:2]
        assert touched(lm, scope, lambda: loop(lm, True, ids))[:2] == expected

        def told():
            with prompt(ids.shape[1]):
                return loop(lm, False, ids)

        assert touched(lm, scope, told)[:2] == expected
        if scope == Scope():
            assert touched(lm, scope, lambda: loop(lm, False, ids))[:2] == expected
        else:
            with pytest.raises(InterventionError, match=r"prompt\(width\)"):
                touched(lm, scope, lambda: loop(lm, False, ids))


def test_several_tokens_after_a_cache_may_be_prompt_or_answer(lm):
    ids = torch.tensor([ROWS[0]])

    def in_parts():
        cache = lm.model(input_ids=ids[:, :4], use_cache=True).past_key_values
        lm.model(input_ids=ids[:, 4:], past_key_values=cache)

    for scope in SCOPES[1:]:
        with pytest.raises(InterventionError, match="needs to know"):
            touched(lm, scope, in_parts)
    assert touched(lm, Scope(), in_parts)[1] == {(0, p) for p in range(1, 7)}

    def told():
        with prompt(7):
            in_parts()

    assert touched(lm, Scope(generated=False), told)[1] == {(0, p) for p in range(1, 7)}


def test_texts_that_do_not_go_on_from_the_last_are_texts_of_their_own(lm):
    with lm.steer(push(Scope(generated=False))) as receipt:
        for row in ([5, 6], [5, 6, 7, 8], [6, 6, 7, 8, 9], [6, 6, 7, 8]):
            lm.logits(torch.tensor([row]))
    assert int(receipt.to_pandas().positions[0]) == 1 + 3 + 4 + 3


def test_texts_packed_in_one_row_are_no_generation(lm):
    ids = torch.tensor([ROWS[0]])
    with pytest.raises(InterventionError, match="needs to know"), lm.steer(push(Scope(generated=False))):
        lm.model(input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3]]))
