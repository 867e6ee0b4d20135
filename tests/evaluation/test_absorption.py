"""Absorption: found where it is planted and nowhere else."""

import numpy as np
import pytest
import torch

import saelab
from saelab import ConfigError
from saelab.evaluation.absorption import Absorption, absorbed, probed_letters, split_latents, vocabulary
from saelab.evaluation.text_means import UNTRAINED
from tests import tiny

WORDS, CHILDREN, D = 90, 18, 48
EACH = CHILDREN // 3  # of these, every third word, are held out


def planted(absorbing=True):
    """Words of three letters, 90 each: x has a direction for the letter. The first 18 words of "a" have a latent of their own,
    which fires in place of the letter's and holds its direction too."""
    chance = np.random.default_rng(0)
    letters = np.repeat(np.array(["a", "b", "c"]), WORDS)
    axes = np.linalg.qr(chance.normal(size=(D, D)))[0]
    rows, codes = np.zeros((3 + CHILDREN, D)), np.zeros((3 * WORDS, 3 + CHILDREN))
    rows[:3] = axes[:3]
    codes[np.arange(3 * WORDS), np.repeat([0, 1, 2], WORDS)] = 1.0
    for child in range(CHILDREN):
        rows[3 + child] = (axes[0] + axes[3 + child]) / 2**0.5 if absorbing else axes[3 + child]
        codes[child, 3 + child] = 2**0.5 if absorbing else 1.0
        codes[child, 0] = 0.0 if absorbing else 1.0
    x = codes @ rows + 0.02 * chance.normal(size=(3 * WORDS, D))
    return x, codes, rows, letters, np.arange(3 * WORDS) % 3 == 2


def test_absorption_is_found_where_it_is_planted_and_nowhere_else():
    x, codes, rows, letters, heldout = planted()
    table = absorbed(x, codes, rows, letters, heldout, probed_letters(x, letters, heldout)).set_index("letter")
    assert table["full absorption"].to_dict() == {"a": EACH / (WORDS / 3), "b": 0, "c": 0}
    assert table["absorption fraction"].to_dict() == {"a": EACH / (WORDS / 3), "b": 0, "c": 0}
    assert table["split latents"].tolist() == [1, 1, 1] and table["latents"].tolist() == ["0", "1", "2"]
    x, codes, rows, letters, heldout = planted(absorbing=False)
    table = absorbed(x, codes, rows, letters, heldout, probed_letters(x, letters, heldout))
    assert table[["full absorption", "absorption fraction"]].to_numpy().max() == 0


def test_a_child_beside_a_weaker_parent_takes_the_fraction_that_the_parent_lacks():
    x, codes, rows, letters, heldout = planted()
    codes[:CHILDREN, 0] = 0.25  # of the 1.25 that the letter's direction has now
    x = codes @ rows
    table = absorbed(x, codes, rows, letters, heldout, probed_letters(x, letters, heldout)).set_index("letter")
    assert table.loc["a", "full absorption"] == 0
    assert table.loc["a", "absorption fraction"] == pytest.approx(EACH / (WORDS / 3) * 0.8, rel=0.05)


def test_a_letter_of_two_halves_is_split_in_two():
    _, codes, _, letters, heldout = planted()
    halves = np.zeros((len(codes), 2))
    halves[:45, 0], halves[45:90, 1] = 1, 1
    latents, first = split_latents(np.c_[halves, codes[:, 1:3]], letters == "a", heldout)
    assert sorted(latents) == [0, 1] and first == pytest.approx(2 / 3)


def test_letters_that_mean_nothing_are_no_letters():
    x, codes, rows, letters, heldout = planted()
    shuffled = np.random.default_rng(1).permutation(letters)
    assert probed_letters(x, shuffled, heldout) == {}
    assert absorbed(x, codes, rows, shuffled, heldout, {}).empty


def test_the_order_of_latents_changes_no_figure():
    x, codes, rows, letters, heldout = planted()
    probes, order = probed_letters(x, letters, heldout), np.random.default_rng(2).permutation(len(rows))
    first, moved = (
        absorbed(x, codes[:, by], rows[by], letters, heldout, probes).drop(columns="latents")
        for by in (np.arange(len(rows)), order)
    )
    assert first.equals(moved)


@pytest.fixture
def lm(monkeypatch):
    """Every token is a word of its letter, and its embedding says which."""
    model = tiny.llama_model()
    with torch.no_grad():
        model.model.embed_tokens.weight += 2 * torch.eye(3, 32)[torch.arange(258) % 3]
    lm = saelab.load_model(model, tokenizer=tiny.byte_tokenizer())
    monkeypatch.setattr(type(lm), "token_text", lambda self, token: f" {'aBc'[token % 3]}ord")
    return lm


def test_words_are_those_of_the_vocabulary(lm):
    sae = saelab.SAE(saelab.TopK(k=3, d_sae=40), 32, metadata={"site": "blocks.0.hook_resid_post"})
    scores = saelab.benchmark({"x": sae}, lm, Absorption(words=60))
    assert scores.value("letters") == 3 and scores.value("f1 of the probe") > 0.9
    assert 0 <= scores.value("full absorption", source=UNTRAINED) <= 1
    assert (scores.to_pandas().figure == "f1 of the probe").sum() == 1
    assert scores.details["absorption"].groupby("source").size().tolist() == [3, 3, 3]
    ids, letters = vocabulary(lm, 10, 0)
    assert len(ids) == 30 and sorted(set(letters)) == ["a", "b", "c"]


def test_a_vocabulary_without_words_is_named(lm, monkeypatch):
    monkeypatch.setattr(type(lm), "token_text", lambda self, token: chr(token))
    with pytest.raises(ConfigError, match="0 tokens that are words"):
        saelab.benchmark(
            saelab.SAE(saelab.TopK(k=1, d_sae=8), 32, metadata={"site": "blocks.0.hook_resid_post"}), lm, "absorption"
        )
