"""The beginning of a text: `prepend_bos` follows the tokenizer, is kept with the SAE and used wherever that is."""

import json

import pytest
import torch
from tokenizers import processors

import saelab
from saelab import cli, steering
from saelab.base.errors import ConfigError
from tests.tiny import TEXTS, byte_tokenizer, llama_model

SITE = "blocks.0.hook_resid_post"
BOS = 257
TOKENS = dict(tokens=1024, batch_size=256, context_length=32, progress=False)
DOCUMENTS = [f"{text} {i}" for i in range(40) for text in TEXTS]
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def model(adds=True, chat=None):
    """A model whose tokenizer puts a BOS of its own before each text, as Gemma's and Llama's do, or not."""
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = "<|pad|>"
    tokenizer.pad_token = tokenizer.eos_token
    if adds:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|pad|> $A", special_tokens=[("<|pad|>", BOS)]
        )
    tokenizer.chat_template = chat
    return saelab.load_model(llama_model(), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def bos_model():
    return model()


@pytest.fixture(scope="module")
def bos_run(bos_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    return saelab.train(bos_model, DOCUMENTS, site=SITE, sae=saelab.TopK(k=4, d_sae=64), out=out, **TOKENS)


def test_texts_begin_as_the_tokenizer_lets_them(bos_model):
    plain = model(adds=False)
    own = bos_model.tokenizer(TEXTS[0])["input_ids"]
    assert own[0] == BOS and bos_model.to_tokens(TEXTS[0]).rows() == [own]
    assert plain.to_tokens(TEXTS[0]).rows() == bos_model.to_tokens(TEXTS[0], prepend_bos=False).rows() == [own[1:]]
    assert plain.to_tokens(TEXTS[0], prepend_bos=True).rows() == [own]
    assert bos_model.tokenize(["a", "bc"]).rows() == [[BOS, *row] for row in plain.tokenize(["a", "bc"]).rows()]
    ids = torch.tensor([own])
    for prepend_bos, tokens in ((None, ids), (True, ids), (False, ids[:, 1:])):
        assert torch.equal(bos_model.record(TEXTS[0], SITE, prepend_bos), bos_model.record(tokens, SITE))
        assert torch.equal(bos_model.logits(TEXTS[0], prepend_bos), bos_model.logits(tokens))
        assert bos_model.loss(TEXTS[0], prepend_bos=prepend_bos) == bos_model.loss(tokens)
        new = bos_model.generate(TEXTS[0], 6, temperature=0, prepend_bos=prepend_bos)
        assert [new] == bos_model.generate(tokens, 6, temperature=0)
    assert bos_model.to_tokens("").rows() == [[BOS]]  # a text of nothing but its beginning


def test_asking_leaves_the_tokenizer_alone(bos_model):
    bos_model.tokenizer("a b", padding="max_length", truncation=True, max_length=4)
    before = bos_model.tokenizer.backend_tokenizer.to_str()
    assert bos_model.prepends_bos(None)
    assert bos_model.tokenizer.backend_tokenizer.to_str() == before


def test_a_bos_that_is_there_is_not_doubled():
    chat = [{"role": "user", "content": "peace"}, {"role": "assistant", "content": "bread"}]
    for adds in (True, False):
        lm = model(adds, TEMPLATE)
        for prepend_bos in (None, True, False):
            assert [row.count(BOS) for row in lm.tokenize([chat, chat], prepend_bos=prepend_bos).rows()] == [1, 1]
        assert lm.to_tokens("<|pad|>peace", prepend_bos=True).rows()[0].count(BOS) == 1
        contexts = saelab.load_corpus([chat] * 30).contexts(lm, 16, "all", prepend_bos=True)
        assert (contexts.ids[:, 0] == BOS).all() and not (contexts.ids[:, 1:] == BOS).any()
    own = saelab.load_corpus([chat] * 30).contexts(model(False, TEMPLATE), 16, "all")
    assert (own.ids == BOS).sum() > 20  # what the template writes stays


def test_contexts_follow_the_tokenizer(bos_model):
    corpus = saelab.load_corpus(DOCUMENTS)
    followed, asked, without = (corpus.contexts(bos_model, 32, "all", bos) for bos in (None, True, False))
    assert followed.prepend_bos and followed.digest == asked.digest != without.digest and not without.prepend_bos
    assert (followed.ids[:, 0] == BOS).all() and not followed.mask[:, 0].any()
    assert without.digest == corpus.contexts(model(adds=False), 32, "all").digest


def test_it_is_kept_with_the_sae_and_used_wherever_that_is(bos_model, bos_run, tmp_path):
    sae, plain = bos_run.sae, model(adds=False)
    assert sae.metadata["prepend_bos"] is True and sae.metadata["context_length"] == 32
    sae.save(tmp_path / "sae")
    assert json.loads((tmp_path / "sae" / "cfg.json").read_text())["metadata"]["prepend_bos"] is True
    assert saelab.SAE.load(tmp_path / "sae").metadata["prepend_bos"] is True
    # the other tokenizer adds none, the SAE knows better
    for lm in (bos_model, plain):
        reports = [
            saelab.evaluate(sae, lm, DOCUMENTS, tokens=200, progress=False, prepend_bos=bos)
            for bos in (None, True, False)
        ]
        assert reports[0] == reports[1] != reports[2]
        latents = lm.top_latents("The economy grew.", sae)
        assert latents.position.min() >= 1 and lm.token_text(lm.to_tokens("The", True).ids[0, 1]) == "T"
        assert latents.equals(bos_model.top_latents("The economy grew.", sae))
    latent = int(sae.latent_stats.density.argmax())
    tables = [
        steering.sweep(
            lm, sae, [latent], ["add"], [1.0], ["The economy"], max_new_tokens=3, progress=False, corpus=DOCUMENTS
        )
        for lm in (bos_model, plain)
    ]
    assert (
        tables[0].settings["prompt_ids"]
        == tables[1].settings["prompt_ids"]
        == bos_model.to_tokens(["The economy"]).rows()
    )
    without = steering.sweep(plain, sae, [latent], ["add"], [1.0], ["The economy"], prepend_bos=False, max_new_tokens=3,
                             progress=False)  # fmt: skip
    assert without.settings["prompt_ids"] == plain.to_tokens(["The economy"]).rows()
    assert steering.find(plain, sae, "war and peace").equals(steering.find(bos_model, sae, "war and peace"))
    page = saelab.dashboards.build(sae, plain, DOCUMENTS, tmp_path / "page.html", latents=[latent], tokens=2_000,
                                   prompts="The economy", effects=None, progress=False)  # fmt: skip
    again = saelab.dashboards.build(sae, bos_model, DOCUMENTS, tmp_path / "again.html", latents=[latent], tokens=2_000,
                                    prompts=["The economy"], effects=None, progress=False)  # fmt: skip
    assert page.path.stat().st_size == again.path.stat().st_size


def test_true_and_false_decide_and_a_run_is_of_one(bos_model, bos_run):
    again = saelab.train(bos_model, DOCUMENTS, site=SITE, sae=saelab.TopK(k=4, d_sae=64), out=bos_run.path, prepend_bos=True,
                         **TOKENS)  # fmt: skip
    assert torch.equal(again.sae.W_dec, bos_run.sae.W_dec)
    with pytest.raises(saelab.CheckpointError, match="prepend_bos"):
        saelab.train(bos_model, DOCUMENTS, site=SITE, sae=saelab.TopK(k=4, d_sae=64), out=bos_run.path, prepend_bos=False,
                     **TOKENS)  # fmt: skip
    without = saelab.sweep(bos_model, DOCUMENTS, [saelab.TopK(k=4, d_sae=64)], site=SITE, prepend_bos=False, **TOKENS)[
        0
    ]
    plain = saelab.train(model(adds=False), DOCUMENTS, site=SITE, sae=saelab.TopK(k=4, d_sae=64), **TOKENS)
    assert without.sae.metadata["prepend_bos"] is False and plain.sae.metadata["prepend_bos"] is False
    assert torch.equal(without.sae.W_dec, plain.sae.W_dec)
    store = saelab.harvest(bos_model, DOCUMENTS, site=SITE, tokens=100, context_length=32, progress=False)
    assert store.metadata["prepend_bos"] is True and store.positions.min() == 1


def test_a_tokenizer_without_bos():
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None
    lm = saelab.load_model(llama_model(), tokenizer=tokenizer)
    corpus = saelab.load_corpus(DOCUMENTS)
    assert not corpus.contexts(lm, 32).prepend_bos and lm.to_tokens("peace").ids.shape == (1, 5)
    for call in (
        lambda: lm.tokenize("peace", prepend_bos=True), lambda: lm.record("peace", SITE, prepend_bos=True),
        lambda: lm.generate("peace", 3, prepend_bos=True), lambda: corpus.contexts(lm, 32, prepend_bos=True),
        lambda: saelab.harvest(lm, corpus, site=SITE, tokens=10, prepend_bos=True, progress=False),
        lambda: saelab.load_model(llama_model()).logits(torch.ones(1, 2).long(), prepend_bos=True),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="no BOS token"):
            call()
    with pytest.raises(ConfigError, match="'yes'"):
        lm.tokenize("peace", prepend_bos="yes")


def test_rows_of_ids_are_as_they_are(bos_model):
    ids = torch.randint(0, 256, (40, 8), generator=torch.Generator().manual_seed(0))
    begun = torch.cat([torch.full((40, 1), BOS), ids], 1)
    assert not saelab.load_corpus(ids).contexts(bos_model).prepend_bos
    assert saelab.load_corpus(begun).contexts(bos_model).prepend_bos
    followed, asked = (
        saelab.load_corpus(begun).contexts(bos_model, prepend_bos=bos, split="all") for bos in (None, True)
    )
    assert torch.equal(followed.ids.long(), begun[followed.documents[:, 0].long()]) and asked.digest == followed.digest
    with pytest.raises(ConfigError, match="row 0 does not begin with the BOS 257"):
        saelab.load_corpus(ids).contexts(bos_model, prepend_bos=True)
    with pytest.raises(ConfigError, match="row 0 does not begin"):
        bos_model.logits(ids, prepend_bos=True)


def test_flags(bos_run, bos_model, monkeypatch, capsys):
    monkeypatch.setitem(saelab.__dict__, "load_model", lambda name, device="auto": bos_model)
    (bos_run.path / "texts.txt").write_text(" ".join(DOCUMENTS))
    texts = str(bos_run.path / "texts.txt")
    assert cli.main(["evaluate", str(bos_run.path), "--corpus", texts, "--tokens", "64", "--prepend-bos", "yes"]) == 0
    first = capsys.readouterr().out
    assert cli.main(["evaluate", str(bos_run.path), "--corpus", texts, "--tokens", "64"]) == 0
    assert capsys.readouterr().out == first
    assert cli.main(["evaluate", str(bos_run.path), "--corpus", texts, "--tokens", "64", "--prepend-bos", "no"]) == 0
    assert capsys.readouterr().out != first
    assert cli.main(["evaluate", str(bos_run.path), "--prepend-bos", "perhaps"]) == 2
    assert "'perhaps' is not yes or no or auto" in capsys.readouterr().err


# contexts no longer than the model reads


def test_the_usual_context_is_the_models_own_where_that_is_shorter(bos_model):
    lm = saelab.load_model(type(bos_model.model)(_shorter(bos_model.model.config)), tokenizer=bos_model.tokenizer)
    corpus = saelab.load_corpus(DOCUMENTS)
    with pytest.warns(UserWarning, match="contexts have 48 tokens, the model's maximum, rather than 256"):
        assert corpus.contexts(lm).ids.shape[1] == 48
    with pytest.raises(ConfigError, match="context_length is 64, and the model reads at most 48"):
        corpus.contexts(lm, 64)
    with pytest.warns(UserWarning, match="the model's maximum"):
        run = saelab.train(
            lm, corpus, site=SITE, sae=saelab.TopK(k=4, d_sae=64), tokens=512, batch_size=64, progress=False
        )
    assert run.sae.metadata["context_length"] == 48
    assert saelab.evaluate(run.sae, lm, corpus, tokens=96, progress=False).tokens > 90
    with pytest.raises(ConfigError, match="at most 48"):
        saelab.harvest(lm, corpus, site=SITE, tokens=10, context_length=256, progress=False)


def _shorter(config):
    return type(config)(**{**config.to_dict(), "max_position_embeddings": 48})


def test_the_command_line_evaluates_at_the_length_of_the_training(bos_run, bos_model, monkeypatch, capsys):
    lengths = []
    monkeypatch.setitem(saelab.__dict__, "load_model", lambda name, device="auto": bos_model)
    load, real = saelab.load_corpus, saelab.evaluate
    monkeypatch.setitem(saelab.__dict__, "load_corpus", lambda name, seed=0: load(DOCUMENTS))
    monkeypatch.setitem(
        saelab.__dict__, "evaluate", lambda *a, **k: lengths.append(k["context_length"]) or real(*a, **k)
    )
    assert cli.main(["evaluate", str(bos_run.path), "--corpus", "x", "--tokens", "64"]) == 0
    assert lengths == [None] and "tokens" in capsys.readouterr().out
