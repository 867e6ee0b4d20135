"""Head scores and the long-prefix protocol, on a hand-made model whose heads are known; proxies on constructed texts."""

import numpy as np
import pytest
import torch

import saelab
from saelab.analysis import attention
from saelab.analysis.attention import induction, proxies
from saelab.models.tokens import Tokens
from tests import toy_attention


@pytest.fixture(scope="module")
def copier():
    return toy_attention.copier()


def tokens(*rows):
    ids = torch.tensor(rows)
    return Tokens(ids, torch.ones_like(ids, dtype=torch.bool))


def test_hand_made_heads_have_the_scores_they_were_made_for(copier):
    table = induction.head_scores(copier, length=12, n=3).set_index(["block", "head"])
    assert table.previous_token[0, 0] == pytest.approx(1, abs=1e-4)
    # the first token of all attends to itself in block 0, so that its copy finds it and not the one after
    assert table.induction[1, 0] == pytest.approx(11 / 12, abs=1e-4)
    assert table.duplicate[1, 0] == pytest.approx(1 / 12, abs=1e-4)
    assert table.induction[0, 0] < 1e-4 and table.duplicate[0, 0] < 1e-4 and table.previous_token[1, 0] < 1e-4


def test_head_scores_are_the_patterns_of_the_same_texts(tiny_llama):
    length, n, seed = 7, 2, 3
    table = induction.head_scores(tiny_llama, length=length, n=n, seed=seed).set_index(["block", "head"])
    generator = torch.Generator().manual_seed(seed)
    ordinary = torch.tensor([i for i in range(tiny_llama.d_vocab) if i not in tiny_llama.special_ids])
    expected = torch.zeros(4, 3)
    for _ in range(n):
        once = ordinary[torch.randperm(len(ordinary), generator=generator)[:length]]
        ids = torch.cat([torch.tensor([tiny_llama.bos_id]), once, once])[None]
        for head in range(4):
            A = attention.patterns(tiny_llama, ids, 2)[0, head]
            for column, back in enumerate((length - 1, 1, length)):
                expected[head, column] += sum(A[t, t - back] for t in range(1 + length, 1 + 2 * length)) / length / n
    found = table.loc[2, ["induction", "previous_token", "duplicate"]].to_numpy()
    assert found == pytest.approx(expected.numpy(), abs=1e-6)


def test_texts_longer_than_the_context_are_refused(copier):
    with pytest.raises(saelab.ConfigError, match="do not fit into the model's context of 40"):
        induction.head_scores(copier, length=21)


def test_a_vocabulary_too_small_for_distinct_tokens_is_refused(copier):
    with pytest.raises(saelab.ConfigError, match="38 distinct tokens were asked for, and the vocabulary has 26"):
        induction.long_prefix(copier, [(1, 0)], prefixes=[1], examples=2, length=38)


def test_copies_are_where_the_protocol_puts_them(tiny_llama):
    generator = torch.Generator().manual_seed(0)
    ids, destinations, sources = induction._copies(tiny_llama, 3, 20, 64, generator)
    for text, t, s in zip(ids, destinations.tolist(), sources.tolist(), strict=True):
        assert text[0] == tiny_llama.bos_id
        assert torch.equal(text[t - 2 : t + 1], text[s - 3 : s])
        assert s - 3 >= 1 and t - 2 > s and t < 64
        assert len(text.unique()) == 64 - 3


def test_long_prefix_is_attention_and_what_the_head_adds_to_the_logit(tiny_llama):
    found = induction.long_prefix(tiny_llama, [(3, 1), (0, 2)], prefixes=[2], examples=3, length=40, seed=0)
    assert found[["block", "head", "prefix"]].to_numpy().tolist() == [[0, 2, 2], [3, 1, 2]]
    ids, destinations, sources = induction._copies(tiny_llama, 2, 3, 40, torch.Generator().manual_seed(2))
    score, dla = [], []
    norm, W_U = tiny_llama.model.model.norm, tiny_llama.model.lm_head.weight.detach()
    for text, t, s in zip(ids, destinations, sources, strict=True):
        score.append(float(attention.patterns(tiny_llama, text, 3)[0, 1, t, s]))
        z = tiny_llama.record(text, "blocks.3.attn.hook_z")[0, t].view(4, 8)
        last = tiny_llama.record(text, "blocks.3.hook_resid_post")[0, t]
        written = tiny_llama.model.model.layers[3].self_attn.o_proj.weight[:, 8:16] @ z[1]
        scaled = norm.weight * written / (last.square().mean() + norm.variance_epsilon).sqrt()
        dla.append(float(scaled.detach() @ (W_U[text[s]] - W_U.mean(0))))
    assert found.score[1] == pytest.approx(sum(score) / 3, abs=1e-6)
    assert found.dla[1] == pytest.approx(sum(dla) / 3, rel=5e-3)  # but for the epsilon of the last norm
    assert found.score_se[1] == pytest.approx(np.std(score, ddof=1) / 3**0.5, abs=1e-6)


@pytest.mark.parametrize("prefixes", [[], [0], [15]])
def test_prefixes_that_do_not_fit_are_refused(tiny_llama, prefixes):
    with pytest.raises(saelab.ConfigError, match="prefixes are 1 to 14 long"):
        induction.long_prefix(tiny_llama, [(0, 0)], prefixes=prefixes, examples=1)


def test_heads_that_are_not_there_are_refused(tiny_llama):
    with pytest.raises(saelab.ConfigError, match="no head 4 in block 0"):
        induction.long_prefix(tiny_llama, [(0, 4)], prefixes=[1], examples=1)


def test_natural_prefixes_count_what_matches(copier):
    text = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 4, 5, 10, 11, 12], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]])
    found = induction.natural_prefixes(copier, saelab.load_corpus(text), (1, 0), split="all")
    # the second 4 finds the 5 after the first one; the text without repeats has no row
    assert len(found) == 1
    row = found.iloc[0]
    assert (row.destination, row.source, row.prefix) == (7, 2, 1) and row.attention == pytest.approx(1, abs=1e-4)
    assert np.isnan(row.attention_broken)


def test_a_broken_prefix_is_measured_again(copier):
    # 3 4 matches, the head looks for the 4 alone: a random token for the first 3 changes nothing for it
    text = torch.tensor([[3, 4, 5, 6, 7, 3, 4, 8, 9, 10], [3, 4, 5, 6, 7, 3, 4, 8, 9, 11]])
    found = induction.natural_prefixes(copier, saelab.load_corpus(text), (1, 0), split="all")
    assert (found.destination == 6).all() and (found.source == 2).all() and (found.prefix == 2).all()
    assert found.attention_broken.to_numpy() == pytest.approx(1, abs=1e-4)


def test_a_head_without_a_case_is_an_error(copier):
    corpus = saelab.load_corpus(torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]))
    with pytest.raises(saelab.DataError, match="in 2 texts"):
        induction.natural_prefixes(copier, corpus, (1, 0), split="all")


def test_token_induction_holds_where_the_word_was_followed_by_the_target(tiny_llama):
    batch = tiny_llama.tokenize(["xbaXb", "xb"])  # bytes: x b a X b
    target = int(batch.ids[0, 1])
    found = proxies.token_induction(tiny_llama, batch, target)
    assert found.tolist() == [[False, False, False, True, False], [False] * 5]


def test_after_token(tiny_llama):
    batch = tiny_llama.tokenize(["abAcab", "ab"])
    target = int(batch.ids[0, 0])
    found = proxies.after_token(tiny_llama, batch, target)
    assert found.tolist() == [[False, True, False, True, False, True], [False, True, False, False, False, False]]


def test_same_word_leaves_case_and_one_space_aside(smollm2):
    ids = torch.tensor([smollm2.tokenize(text).ids[0, 0] for text in (" Board", "board", "Board", " board", " boards")])
    numbers = proxies.same_word(smollm2, ids).tolist()
    assert len(set(numbers[:4])) == 1 and numbers[4] != numbers[0]


def test_specificity_sensitivity_and_expected_value():
    activation = torch.tensor([0.0, 1.0, 2.0, 2.0, 0.0, 4.0])
    true = torch.tensor([True, False, True, True, False, True])
    found = proxies.compare(activation, true, name="board")
    assert found.specificity() == 0.75 and found.specificity(above=1.5) == 1 and found.sensitivity == 0.75
    assert found.base_rate == pytest.approx(4 / 6)
    table = found.by_activation(bins=4)
    assert table.centre.tolist() == [0.5, 1.5, 2.5, 3.5]
    assert table.true.sum() == 3 and table.false.tolist() == [1, 0, 0, 0]
    assert table.expected_true.tolist() == pytest.approx([0, 2 * 1.5 / 6, 0, 3.5 / 6])
    assert found.missed().tolist() == [0]


def test_positions_that_do_not_count_are_left_out():
    activation, true = torch.tensor([[1.0, 1.0], [0.0, 3.0]]), torch.tensor([[True, False], [False, True]])
    found = proxies.compare(activation, true, torch.tensor([[True, False], [False, True]]))
    assert len(found.activation) == 2 and found.specificity() == found.sensitivity == 1


def test_proxy_figures_stack_to_the_firings():
    found = proxies.compare(torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([True, False, True, True]))
    for figure, total in ((found.histogram(10), 3), (found.expected_value(10), None)):
        assert figure.layout.barmode == "stack" and len(figure.data) == 2
        assert total is None or sum(sum(bar.y) for bar in figure.data) == total


def test_a_silent_latent_has_no_figure_and_shapes_must_agree():
    with pytest.raises(saelab.DataError, match="fires at none of 3"):
        proxies.compare(torch.zeros(3), torch.ones(3, dtype=torch.bool)).histogram()
    with pytest.raises(saelab.ConfigError, match=r"\[3\] and the proxy \[2\]"):
        proxies.compare(torch.zeros(3), torch.ones(2, dtype=torch.bool))
