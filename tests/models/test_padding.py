"""Padded rows of token ids: what is padding is masked, from the corpus to every figure, as transformers would mask it."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import saelab
from saelab.analysis.attention.families_of_latents import latent_families
from saelab.base.errors import DataError
from saelab.models.tokens import Tokens, real_places
from tests.tiny import gpt2_model, llama_model

SITE = "blocks.0.hook_resid_post"
PAD, END = 257, 256


def word_tokenizer(**special):
    """258 words, of which `special` names some."""
    core = Tokenizer(models.WordLevel({**{f"w{i}": i for i in range(256)}, "<end>": END, "<pad>": PAD}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def padded_rows(pad, left, n=48, width=20):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 256, (n, width), generator=generator)
    lengths = torch.randint(8, width + 1, (n, 1), generator=generator)
    places = torch.arange(width)
    mask = places >= width - lengths if left else places < lengths
    return ids.masked_fill(~mask, pad), mask


@pytest.fixture(params=["llama", "gpt2"])
def model(request):
    return {"llama": llama_model, "gpt2": gpt2_model}[request.param]()


CASES = {
    "dedicated, left": (PAD, True, {"pad_token": "<pad>", "eos_token": "<end>", "bos_token": "<end>"}),
    "dedicated, right": (PAD, False, {"pad_token": "<pad>", "eos_token": "<end>"}),
    "end of text, left": (END, True, {"pad_token": "<end>", "eos_token": "<end>", "padding_side": "left"}),
    "end of text, right": (END, False, {"pad_token": "<end>", "eos_token": "<end>"}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_padded_corpus_is_read_as_transformers_reads_it(model, case):
    pad, left, special = case
    lm = saelab.load_model(model, tokenizer=word_tokenizer(**special))
    ids, mask = padded_rows(pad, left)
    sae = saelab.SAE(saelab.TopK(k=3, d_sae=64), lm.site(SITE).width, {"site": SITE})
    for source in (ids, {"input_ids": ids, "attention_mask": mask.long()}, Tokens(ids, mask), ids.tolist()):
        report = saelab.evaluate(sae, lm, source, tokens=ids.numel(), split="all", progress=False)
        places = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(ids, attention_mask=mask.long(), position_ids=places).logits
        targets = mask[:, 1:] & mask[:, :-1]
        loss = -logits[:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        assert report.ce_clean == pytest.approx(float(loss[targets].mean()), rel=1e-6)
        assert report.tokens == int(mask.sum())

        store = saelab.harvest(lm, source, site=SITE, tokens=int(mask.sum()) - len(ids), split="all", progress=False)
        assert bool((places[store.documents.long(), store.positions.long()] >= 1).all())
        assert bool(mask[store.documents.long(), store.positions.long()].all()) and len(store) == int(mask.sum()) - len(
            ids
        )
        with torch.no_grad():
            x = model(ids, attention_mask=mask.long(), position_ids=places, output_hidden_states=True).hidden_states[1]
        torch.testing.assert_close(store[:], x[store.documents.long(), store.positions.long()], atol=2e-5, rtol=1e-4)
    assert torch.equal(lm.to_tokens(ids).mask, mask)
    short = [row[keep].tolist() for row, keep in zip(ids[:4], mask[:4], strict=True)]
    assert lm.generate(ids[:4], 5) == lm.generate(short, 5)


def test_the_first_padded_text_is_read_like_the_next(model):
    """Whether a model can be padded on the left is measured in the pass that first asks."""
    lm = saelab.load_model(model)
    tokens = Tokens(torch.arange(10).view(2, 5), torch.tensor([[False, True, True, True, True], [True] * 5]))
    x = lm.record(tokens, SITE)
    assert torch.equal(x, lm.record(tokens, SITE))
    torch.testing.assert_close(x[0, 1:], lm.record(tokens.ids[:1, 1:], SITE)[0], atol=1e-5, rtol=1e-4)


def test_gradients_do_not_see_padding(tiny_llama):
    ids, mask = padded_rows(PAD, left=False)
    with pytest.warns(UserWarning, match="the harvest stops there"):
        store = saelab.harvest(tiny_llama, ids, site=SITE, tokens=10_000, gradients=True, split="all", progress=False)
    assert len(store) == int(mask.sum()) - 2 * len(ids)  # neither the first token nor the last real one
    row = 17
    document, position = int(store.documents[row]), int(store.positions[row])
    alone = ids[document][mask[document]][None]
    with pytest.warns(UserWarning, match="the harvest stops there"):
        other = saelab.harvest(tiny_llama, alone, site=SITE, tokens=10_000, gradients=True, split="all", progress=False)
    at = (other.positions == position).nonzero().flatten()
    torch.testing.assert_close(store.gradients[row : row + 1], other.gradients[at], atol=1e-5, rtol=1e-4)


def test_every_tool_gives_the_same_for_padded_and_for_cut_rows(tiny_llama, tmp_path):
    """Rows of one length, once as they are and once with padding before them."""
    from saelab.dashboards.collecting.one_pass import Reader

    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 256, (40, 12), generator=generator)
    wide = torch.cat([torch.full((40, 5), PAD), ids], 1)
    site = "blocks.1.attn.hook_z"
    width = tiny_llama.site(site).width
    sae = saelab.SAE(saelab.TopK(k=3, d_sae=64), width, {"site": site, "heads": [4, 8]})
    families = [latent_families(sae, tiny_llama, x, split="all", progress=False).table for x in (ids, wide)]
    columns = ["firings", "previous_token", "first_position", "current_token", "induction"]
    for column in columns:
        assert families[0][column].to_numpy() == pytest.approx(families[1][column].to_numpy(), abs=1e-4)
    firings = []
    for x in (ids, wide):
        contexts = saelab.load_corpus(x).contexts(tiny_llama, split="all")
        reader = Reader.of(tiny_llama, [sae], contexts, 40 * x.shape[1])
        tiles = [tile[0] for tile in reader.tiles(0, reader.n_tiles)]
        rows = torch.cat([tile.rows for tile in tiles])
        columns = rows % x.shape[1] - (x.shape[1] - 12)
        latents = torch.cat([tile.latents for tile in tiles])
        order = contexts.documents[:, -1][rows.div(x.shape[1], rounding_mode="floor").long()]
        firings.append(sorted(zip(order.tolist(), columns.tolist(), latents.tolist(), strict=True)))
    assert firings[0] == firings[1]
    kept = tiny_llama.splice(sae)
    with kept as spliced:
        tiny_llama.logits(wide)
    assert spliced.positions == 40 * 12 and spliced.replaced == 40 * 11


def tokenizer(pad=None, bos=None, eos=None, side="right"):
    return type(
        "T",
        (),
        {"pad_token_id": pad, "bos_token_id": bos, "eos_token_id": eos, "padding_side": side, "unk_token_id": 9},
    )()


@pytest.mark.parametrize(
    ("tok", "ids", "expected"),
    [
        (tokenizer(1), [[1, 5, 6]], [[0, 1, 1]]),
        (tokenizer(1), [[5, 1, 6], [5, 6, 1]], [[1, 1, 1], [1, 1, 0]]),  # inside, it is a token like others
        (tokenizer(1), [[1, 1, 1]], [[1, 1, 1]]),  # nothing but padding: read as it is
        (tokenizer(1, side="left"), [[5, 1, 1]], [[1, 0, 0]]),
        (tokenizer(0, 0, 0), [[0, 5, 6], [0, 7, 8]], [[1, 1, 1], [1, 1, 1]]),  # each begins with BOS
        (tokenizer(0, 0, 0), [[0, 5, 6, 7], [0, 7, 0, 0]], [[1, 1, 1, 1], [1, 1, 0, 0]]),
        (tokenizer(0, 0, 0, "left"), [[0, 0, 5], [4, 7, 8]], [[0, 0, 1], [1, 1, 1]]),
        (tokenizer(0, 0, 0, "left"), [[0, 5, 6], [0, 7, 8]], [[1, 1, 1], [1, 1, 1]]),
        (tokenizer(0, 0, 0), [[5, 6, 0]], [[1, 1, 1]]),  # one text that ends
        (tokenizer(0, 0, 0), [[5, 6, 0], [5, 6, 7]], [[1, 1, 0], [1, 1, 1]]),
        (tokenizer(9), [[9, 9, 5]], None),  # the unknown token, on the side that is not padded
        (tokenizer(None, 0, 0), [[0, 0, 5]], None),
        (tokenizer(None, 0, 0), [[5, 0, 0]], None),
        (tokenizer(0, 0, 0), [[0, 0, 5]], None),
        (tokenizer(0, 0, 0, "left"), [[5, 0, 0]], None),
        (tokenizer(0, 0, 0, "left"), [[0, 5, 6], [7, 5, 6]], None),  # a beginning, or one that is shorter
        (tokenizer(None, 0, 0), [[0, 5, 0]], [[1, 1, 1]]),
        (tokenizer(), [[0, 0, 0]], [[1, 1, 1]]),
        (None, [[0, 0, 5]], [[1, 1, 1]]),
    ],
)  # fmt: skip
def test_what_is_padding(tok, ids, expected):
    if expected is None:
        with pytest.raises(DataError, match="cannot be told from padding.*attention_mask"):
            real_places(torch.tensor(ids), tok)
    else:
        assert real_places(torch.tensor(ids), tok).int().tolist() == expected


def test_an_untold_padding_is_refused_everywhere():
    lm = saelab.load_model(gpt2_model(), tokenizer=word_tokenizer(eos_token="<end>", bos_token="<end>"))
    ids, mask = padded_rows(END, left=True)
    for call in (lm.logits, lambda x: lm.record(x, SITE), lambda x: saelab.load_corpus(x).contexts(lm, split="all")):
        with pytest.raises(DataError, match="has no padding token"):
            call(ids)
    assert torch.equal(saelab.load_corpus(Tokens(ids, mask)).contexts(lm, split="all").real.sum(), mask.sum())


def test_rows_longer_than_the_model_reads(tiny_llama):
    with pytest.raises(DataError, match="300 ids do not fit into the model's context of 256"):
        saelab.load_corpus(torch.ones(4, 300).long()).contexts(tiny_llama, split="all")


@pytest.mark.parametrize("left", [True, False])
def test_effects_on_the_loss_do_not_see_padding(tiny_llama, left):
    from saelab.dashboards.collecting.effects import Clean

    ids, mask = padded_rows(PAD, left, n=3)
    place = tiny_llama.site(SITE)
    together = Clean.of(tiny_llama, place, Tokens(ids, mask), None)
    for row in range(3):
        alone = Clean.of(tiny_llama, place, tiny_llama.to_tokens(ids[row][mask[row]]), None)
        torch.testing.assert_close(together.gradient[row][mask[row]], alone.gradient[0], atol=1e-5, rtol=1e-4)
        assert together.loss(row) == pytest.approx(alone.loss(0), rel=1e-5)
