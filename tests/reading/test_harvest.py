"""Harvesting: which rows there are, that they are the model's, and what happens when something is wrong."""

import warnings

import pytest
import torch

import saelab
from saelab.base.errors import ConfigError, DataError
from saelab.models.generation import drawn
from saelab.models.tokens import Tokens
from saelab.reading import reader as module
from saelab.reading.harvest import harvest
from tests import toy_harvest
from tests.toy_harvest import ToyCorpus, ToyModel


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(module, "run_recording", toy_harvest.run_recording)
    return ToyModel()


def arguments(**other):
    return {"tokens": 50, "context_length": 8, "batch_size": 4, "progress": False, **other}


def test_gradients_leave_out_the_last_position(toy):
    store = harvest(toy, ToyCorpus(), site="late", gradients=True, **arguments())
    assert len(store) == len(store.gradients) == 50 and int(store.positions.max()) == 6
    assert torch.equal(store.gradients[3:40], 2 * store[3:40])
    plain = harvest(toy, ToyCorpus(), site="late", **arguments())
    assert plain.gradients is None and int(plain.positions.max()) == 7


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("on_disk", [False, True])
def test_nan_and_infinite_activations_name_site_context_and_position(toy, tmp_path, value, on_disk):
    contexts = ToyCorpus().contexts(toy, 8)
    context, position = 13, 5
    contexts.ids[context, position], contexts.mask[context, position] = 95, True
    corpus = ToyCorpus()
    corpus.contexts = lambda *args, **kwargs: contexts
    spoiled = ToyModel(bad={95: value})
    out = {"out": tmp_path / "h"} if on_disk else {}
    with pytest.raises(DataError, match=f"late.*context {context}, position {position}"):
        harvest(spoiled, corpus, sites=["early", "late"][::-1], **arguments(tokens=100), **out)
    contexts.mask[context, position] = False  # a place without a row may hold anything
    assert len(harvest(spoiled, corpus, site="late", **arguments(tokens=100))) == 100


def test_large_finite_rows_whose_sum_overflows_are_fine_but_not_in_half_precision(toy):
    spoiled = ToyModel(bad={token: 3e38 for token in range(90)})
    assert len(harvest(spoiled, ToyCorpus(), site="early", **arguments())) == 50
    with pytest.raises(DataError, match="float16"):
        harvest(spoiled, ToyCorpus(), site="early", dtype="float16", **arguments())


def test_a_corpus_that_is_too_short_stops_the_harvest_with_both_numbers(toy):
    available = int(ToyCorpus().contexts(toy, 8).mask[:, 1:].sum())
    with pytest.warns(UserWarning, match=f"{available} tokens.*1,000 were asked"):
        store = harvest(toy, ToyCorpus(), site="early", **arguments(tokens=1_000))
    assert len(store) == available
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(harvest(toy, ToyCorpus(), site="early", **arguments(tokens=available))) == available


def test_the_seed_decides_which_contexts_are_read(toy):
    first, again, other = (harvest(toy, ToyCorpus(), site="early", **arguments(seed=s)) for s in (0, 0, 1))
    assert torch.equal(first[:], again[:]) and first.digest == again.digest
    assert set(first.contexts.tolist()) != set(other.contexts.tolist()) and first.digest != other.digest
    ids = ToyCorpus().contexts(toy, 8).ids
    assert torch.equal(other.tokens, ids[other.contexts.long(), other.positions.long()])


def test_no_more_forward_passes_than_needed(toy):
    harvest(toy, ToyCorpus(), sites=["early", "late"], **arguments(tokens=10))
    assert toy.calls == 1


def test_an_interrupt_returns_the_rows_so_far_or_leaves_them_in_the_folder(toy, monkeypatch, tmp_path):
    def interrupted(lm, *args, **kwargs):
        if lm.calls == 2:
            raise KeyboardInterrupt
        return toy_harvest.run_recording(lm, *args, **kwargs)

    whole = harvest(toy, ToyCorpus(), site="early", **arguments(tokens=100))
    monkeypatch.setattr(module, "run_recording", interrupted)
    with pytest.warns(UserWarning, match="interrupted: .* of 100 tokens"):
        part = harvest(ToyModel(), ToyCorpus(), site="early", **arguments(tokens=100))
    assert 0 < len(part) < 100 and torch.equal(part[:], whole[: len(part)])

    with pytest.raises(KeyboardInterrupt) as stop:
        harvest(ToyModel(), ToyCorpus(), site="early", **arguments(tokens=100), out=tmp_path / "h")
    assert "goes on" in stop.value.__notes__[0]
    monkeypatch.setattr(module, "run_recording", toy_harvest.run_recording)
    whole_again = harvest(toy, ToyCorpus(), site="early", **arguments(tokens=100), out=tmp_path / "h")
    assert torch.equal(whole_again[:], whole[:])


@pytest.mark.parametrize(
    "wrong",
    [
        {"site": "early", "sites": ["late"]},
        {},
        {"sites": []},
        {"sites": ["early", "early"]},
        {"sites": "early"},
        {"site": "early", "tokens": 0},
        {"site": "early", "batch_size": 0},
        {"site": "early", "skip_positions": 8},
        {"site": "early", "skip_positions": 7, "gradients": True},
        {"site": "early", "skip_positions": -1},
        {"site": "early", "dtype": torch.int8},
        {"site": "early", "dtype": "float8"},
    ],
)
def test_arguments_that_cannot_work(toy, wrong):
    with pytest.raises(ConfigError):
        harvest(toy, ToyCorpus(), **arguments(**wrong))


def test_a_corpus_of_special_tokens_only(toy):
    corpus = ToyCorpus()
    contexts = corpus.contexts(toy, 8)
    contexts.mask[:] = False
    corpus.contexts = lambda *args, **kwargs: contexts
    with pytest.raises(DataError, match="none of the 160 tokens"):
        harvest(toy, corpus, site="early", **arguments())


def test_progress_is_shown_unless_turned_off(toy, capsys):
    harvest(toy, ToyCorpus(), site="early", **arguments())
    assert capsys.readouterr().err == ""
    harvest(toy, ToyCorpus(), site="early", **arguments(progress=True))
    shown = capsys.readouterr().err
    assert "harvest: 100%" in shown and "50/50" in shown and "tokens/s" in shown


# With real language models


def test_rows_of_a_real_model_are_what_record_gives(tiny_llama):
    texts = ["The state of the union. " * 12, "My fellow citizens: " * 9, "Peace and work! " * 15]
    corpus = saelab.load_corpus(texts * 8)
    sites = ["blocks.1.hook_resid_post", "blocks.2.attn.hook_z"]
    stores = harvest(tiny_llama, corpus, sites=sites, tokens=400, context_length=32, batch_size=4, progress=False)
    contexts = corpus.contexts(tiny_llama, 32)
    recorded = tiny_llama.record(contexts.ids.long(), sites)
    for site in sites:
        store = stores[site]
        at = store.contexts.long(), store.positions.long()
        assert torch.equal(store.tokens, contexts.ids[at].int())
        assert torch.equal(store.documents, contexts.documents[at].int())
        torch.testing.assert_close(store[:], recorded[site][at].float(), atol=1e-5, rtol=1e-4)
        assert store.positions.min() >= 1 and not set(store.tokens.tolist()) & set(tiny_llama.special_ids)
    assert stores[sites[1]].metadata["heads"] == [4, 8] and stores[sites[0]].metadata["heads"] is None
    assert stores[sites[0]].metadata["model_digest"] == tiny_llama.digest


def test_gradients_of_a_real_model_are_those_of_the_summed_loss(tiny_llama):
    """Against finite differences of the loss along one direction at one place."""
    site = "blocks.1.hook_resid_post"
    corpus = saelab.load_corpus(["The state of the union is strong, and the people know it. " * 4] * 24)
    store = harvest(
        tiny_llama, corpus, site=site, tokens=40, context_length=16, batch_size=1, gradients=True, progress=False
    )
    ids = corpus.contexts(tiny_llama, 16).ids.long()
    context, position = int(store.contexts[5]), int(store.positions[5])
    direction = torch.randn(store.d_in, generator=torch.Generator().manual_seed(0))

    def loss(step):
        def moved(activation, where):
            activation = activation.clone()
            activation[:, position] += step * direction
            return activation

        with tiny_llama.intervene(site, moved):
            return float(tiny_llama.loss(ids[context : context + 1], reduction="none").double().sum())

    finite = (loss(1e-3) - loss(-1e-3)) / 2e-3
    assert finite == pytest.approx(float(store.gradients[5] @ direction), rel=2e-2, abs=2e-3)


def test_smollm2_rows_are_the_hidden_states_of_transformers(smollm2):
    corpus = saelab.load_corpus(["The state of the union is strong, and in 1862 the people knew it. " * 3] * 24)
    store = harvest(
        smollm2, corpus, site="blocks.3.hook_resid_post", tokens=50, context_length=32, batch_size=2, progress=False
    )
    ids = corpus.contexts(smollm2, 32).ids.long()[store.contexts.long().unique()]
    with torch.inference_mode():
        hidden = smollm2.model(ids, output_hidden_states=True).hidden_states[4]
    place = torch.searchsorted(store.contexts.long().unique(), store.contexts.long())
    torch.testing.assert_close(store[:], hidden[place, store.positions.long()].float(), atol=2e-3, rtol=1e-3)


def test_sampled_gradients_are_those_of_labels_that_the_model_draws(tiny_llama):
    site, corpus = "blocks.1.hook_resid_post", saelab.load_corpus(torch.randint(256, (40, 16)))
    store, again = (
        saelab.harvest(
            tiny_llama,
            corpus,
            site=site,
            tokens=60,
            context_length=16,
            batch_size=size,
            gradients="sampled",
            progress=False,
        )  # fmt: skip
        for size in (1, 4)
    )
    assert torch.equal(store.tokens[:], again.tokens[:]) and store.metadata["gradients"] == "sampled"
    torch.testing.assert_close(store.gradients[:], again.gradients[:], rtol=1e-4, atol=1e-6)
    contexts = corpus.contexts(tiny_llama, 16, "train")
    number = int(store.contexts[0])
    ids = contexts.ids[number : number + 1].long()
    labels = drawn(tiny_llama.logits(ids)[:, :-1], [number])
    assert not torch.equal(labels, ids[:, 1:])
    tokens = Tokens(ids, torch.ones_like(ids, dtype=torch.bool))
    x = tiny_llama.record(tokens, site).requires_grad_()
    with tiny_llama.intervene(site, lambda activation, where: x):
        logits = tiny_llama.forward(tokens)
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0], reduction="sum")
    (slope,) = torch.autograd.grad(loss, x)
    mine = store.contexts[:] == number
    torch.testing.assert_close(
        store.gradients[:][mine], slope[0, store.positions[:][mine].long()], rtol=1e-4, atol=1e-6
    )
    with pytest.raises(ConfigError, match="'sampled'"):
        saelab.harvest(tiny_llama, corpus, site=site, tokens=4, gradients="model", progress=False)


def test_labels_are_drawn_from_the_models_distribution():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).expand(1, 20_000, 4)
    labels = drawn(logits, [3])
    shares = torch.bincount(labels[0], minlength=4) / 20_000
    torch.testing.assert_close(shares, logits[0, 0].softmax(0), rtol=0, atol=0.01)
    assert torch.equal(drawn(logits.expand(2, -1, -1), [5, 3])[1], labels[0])
