"""Generation: seeds, batches, padding, cache, ends."""

import pytest
import torch

import saelab
from saelab.base.errors import ConfigError, DataError
from saelab.base.seeds import named_generator
from saelab.models.generation import continuation_text, generate_ids, pick

PROMPTS = ["The state of the union", "My", "economy"]


@pytest.fixture(params=["tiny_llama", "tiny_gpt2"])
def lm(request):
    return request.getfixturevalue(request.param)


def test_a_string_for_a_string_and_a_list_for_a_list(lm):
    assert isinstance(lm.generate("The", 3), str)
    assert [type(text) for text in lm.generate(["The"], 3)] == [str]
    assert lm.generate(["The"], 3) == [lm.generate("The", 3)] == lm.generate(lm.tokenize("The"), 3)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_neither_batch_nor_cache_nor_padding_changes_a_row(lm, temperature):
    together = lm.generate(PROMPTS, 12, temperature)
    assert together == lm.generate(PROMPTS, 12, temperature, use_cache=False)
    assert together[:2] == lm.generate(PROMPTS[:2], 12, temperature)
    assert together[0] == lm.generate(PROMPTS[0], 12, temperature)


def test_seeds(lm):
    assert lm.generate("The", 12, seed=1) == lm.generate("The", 12, seed=1) != lm.generate("The", 12, seed=2)
    first, second = lm.generate(["The", "The"], 12)
    assert first != second
    state = torch.get_rng_state()
    lm.generate("The", 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_greedy_agrees_with_transformers(lm):
    tokens = lm.tokenize("The state of")
    theirs = lm.model.generate(input_ids=tokens.ids, attention_mask=tokens.mask.long(), max_new_tokens=10,
                               do_sample=False, pad_token_id=257)  # fmt: skip
    ours = generate_ids(lm, tokens, 10, temperature=0)
    assert ours[0] == [t for t in theirs[0, tokens.ids.shape[1] :].tolist() if t != 256]


def test_a_row_ends_at_the_end_of_text(lm):
    """Only the row that ended stops; the end itself is not in the text."""

    def end_first_row(x, where):
        x = x.clone()
        if where.phase == "generated" and where.positions[0, -1] == 6:
            x[0, -1, 256] = 1e4
        return x

    clean = generate_ids(lm, lm.tokenize(["abcde", "xy"]), 6, temperature=0)
    with lm.intervene("lm_head", end_first_row):
        ended = generate_ids(lm, lm.tokenize(["abcde", "xy"]), 6, temperature=0)
    assert ended == [clean[0][:2], clean[1]]


def test_sampling_follows_the_probabilities():
    logits = torch.tensor([[1.0, 2.0, float("-inf"), 0.0]])
    generators = [named_generator("0,0")]
    drawn = torch.cat([pick(logits, 0.5, generators) for _ in range(4000)])
    frequency = torch.bincount(drawn, minlength=4) / 4000
    torch.testing.assert_close(frequency, torch.softmax(logits[0] / 0.5, 0), atol=0.03, rtol=0)
    assert frequency[2] == 0
    assert pick(torch.tensor([[3.0, 3.0]]), 0, generators).tolist() == [0]


def test_a_text_that_decodes_otherwise_alone_keeps_its_space():
    class Metaspace:
        """Drops the space of the first word, as SentencePiece tokenizers do."""

        def decode(self, ids, skip_special_tokens):
            return "".join([" one", " two", " three"][i] for i in ids).lstrip()

    assert continuation_text(Metaspace(), [0], [1, 2]) == " two three"


def test_errors(lm):
    with pytest.raises(DataError, match=r"3 tokens and 300 .* 256"):
        lm.generate("abc", 300)
    with pytest.raises(ConfigError, match="temperature is -1"):
        lm.generate("abc", 3, temperature=-1)
    with pytest.raises(ConfigError, match="max_new_tokens is 0"):
        lm.generate("abc", 0)
    with pytest.raises(DataError, match="no tokens"):
        lm.generate(["abc", ""], 3)
    with pytest.raises(DataError, match="NaN"), lm.intervene("lm_head", lambda x, where: x * float("nan")):
        lm.generate("abc", 3)
    with pytest.raises(ConfigError, match="tokenizer="):
        saelab.load_model(lm.model, device="cpu").generate(torch.tensor([1, 2]), 3)


def test_chat(tiny_tokenizer, tiny_llama):
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    lm = saelab.load_model(tiny_llama.model, tokenizer=tokenizer, device="cpu")
    user = {"role": "user", "content": "hi"}

    def text(tokens):
        return tokenizer.batch_decode(tokens.rows())

    assert text(lm.tokenize([user])) == ["<user>hi<assistant>"] == text(lm.tokenize("hi", chat=True))
    assert text(lm.tokenize([user, {"role": "assistant", "content": "yes"}])) == ["<user>hi<assistant>yes"]
    assert text(lm.tokenize([[user], [user, user]])) == ["<user>hi<assistant>", "<user>hi<user>hi<assistant>"]
    assert lm.generate([user], 4) == lm.generate("<user>hi<assistant>", 4)
    assert lm.generate([[user]], 4) == [lm.generate([user], 4)]
    with pytest.raises(ConfigError, match="chat template"):
        tiny_llama.tokenize([user])
