"""Explanations of latents: rules find what was planted, and scores are what they say they are."""

import numpy as np
import pytest
import torch

import saelab
from saelab import ConfigError
from saelab.dashboards.labels import read_labels
from saelab.evaluation.explaining import _detection, _fuzzing, balanced_accuracy
from saelab.evaluation.rules import ReadTokens, Rule, Rules, learn_rules
from tests import tiny

WORDS = [f" {first}{second}" for first in ("war", "peace", "tax", "court", "ship") for second in "abcdefghijklmnopqrst"]


def text_of(seed, n=400, length=64):
    """Contexts of words of uneven frequency."""
    chance = np.random.default_rng(seed)
    share = 1 / np.arange(5, len(WORDS) + 5)
    ids = chance.choice(len(WORDS), (n, length), p=share / share.sum())
    counted = np.ones(ids.shape, bool)
    counted[:, 0] = False
    return ReadTokens(ids, counted, WORDS.__getitem__)


def fires_on(read, planted):
    return planted.matches(read.ids) & read.counted


def scores_of(rules, read, fired):
    said, chance = rules.matches(read.ids) & read.counted, np.random.default_rng(0)
    return _detection(read, fired, said, 100, chance) | _fuzzing(read, fired, said, 100, chance)


PLANTED = {
    "tokens": Rules((Rule("", tokens=(3, 17, 42, 61, 88)),)),
    "bigram": Rules((Rule("", tokens=(4,), previous=(2,)),)),
    "bigrams": Rules((Rule("", tokens=(1,), previous=(7,)), Rule("", tokens=(30,), previous=(0,)))),
    "beginning": Rules((Rule("", tokens=tuple(range(80, 100))),)),
    "before": Rules((Rule("", previous=(25,)),)),
    "position": Rules((Rule("", position=9),)),
}


@pytest.mark.parametrize("name", PLANTED)
def test_rules_find_what_was_planted(name):
    learnt, held_out = text_of(0), text_of(1)
    rules = learn_rules(learnt, fires_on(learnt, PLANTED[name]))
    scores = scores_of(rules, held_out, fires_on(held_out, PLANTED[name]))
    assert scores["fuzzing"] >= 0.95
    assert scores["detection"] >= 0.95
    assert len(rules.rules) <= 5


def test_rules_are_at_chance_for_shuffled_labels():
    learnt, held_out = text_of(0), text_of(1)
    fired = np.random.default_rng(2).random(learnt.ids.shape) < 0.01
    rules = learn_rules(learnt, fired & learnt.counted)
    other = (np.random.default_rng(3).random(held_out.ids.shape) < 0.01) & held_out.counted
    scores = scores_of(rules, held_out, other)
    assert scores["detection_low"] <= 0.5 <= scores["detection_high"]
    assert scores["fuzzing_low"] <= 0.5 <= scores["fuzzing_high"]


def test_a_near_miss_costs_an_explanation_that_leaves_out_the_neighbour():
    read = text_of(0)
    fired = fires_on(read, PLANTED["bigram"])
    loose = scores_of(Rules((Rule("", tokens=(4,)),)), read, fired)
    assert loose["fuzzing_near"] == 0
    assert loose["fuzzing"] == pytest.approx(0.75)
    assert scores_of(PLANTED["bigram"], read, fired)["fuzzing_near"] == 1


def test_what_never_fires_has_no_rule_and_no_score():
    read = text_of(0, n=4)
    silent = np.zeros(read.ids.shape, bool)
    assert learn_rules(read, silent).text == "no rule found"
    assert np.isnan(scores_of(Rules(), read, silent)["detection"])


@pytest.mark.parametrize(("firing", "silent"), [(0.5, 0.5), (0.9, 0.7), (0.98, 0.95), (0.2, 0.95)])
def test_intervals_cover(firing, silent):
    chance, covered = np.random.default_rng(0), 0
    for _ in range(1000):
        _, low, high = balanced_accuracy(chance.random(50) < firing, chance.random(50) < silent)
        covered += low <= (firing + silent) / 2 <= high
    assert covered >= 930


def test_explanations_of_an_sae_are_scored_and_become_labels():
    lm = saelab.load_model(tiny.llama_model(), tokenizer=tiny.byte_tokenizer())
    texts = [f"{text} {number}" for number in range(60) for text in tiny.TEXTS]
    torch.manual_seed(0)
    sae = saelab.SAE(saelab.TopK(k=2, d_sae=16), d_in=32)
    sae.metadata |= {"site": "blocks.1.hook_resid_post", "context_length": 32}
    told = saelab.explain(sae, lm, texts, range(16), tokens=4096, progress=False)
    scores = saelab.score(told, sae, lm, texts, tokens=4096, examples=10, progress=False)
    table = scores.to_pandas()
    assert list(table.latent) == list(range(16))
    assert table.fuzzing.max() > 0.8
    labels = read_labels(scores.labels)
    assert labels[3].text == told[3].text
    assert labels[3].source == "saelab, detection"
    with pytest.raises(ConfigError, match="16"):
        saelab.explain(sae, lm, texts, [16], progress=False)


def test_nothing_stands_before_the_first_token():
    ids = np.array([[4, 2, 4], [4, 4, 2]])
    assert Rule("", tokens=(4,), previous=(2,)).matches(ids).tolist() == [[False, False, True], [False, False, False]]
    assert not Rule("", previous=(2, 4)).matches(ids)[:, 0].any()
