"""Each measure of steering by hand, and the logit directions against the model itself."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from torch import nn
from torch.nn.functional import kl_div
from transformers import PreTrainedTokenizerFast

import saelab
from saelab import ConfigError, steering
from saelab.base.statistics import kl, spearman
from saelab.models.unembedding import unembedding
from saelab.steering import scores
from saelab.steering import text_measures as measures
from saelab.steering.ranks import ENOUGH, at_equal_divergence, p_by_rank
from saelab.steering.summaries import area
from tests import tiny, toy_sweep

NAN = math.nan
IDS = st.lists(st.integers(0, 3), max_size=12)


@pytest.fixture(scope="module")
def sweep_sae(tiny_llama):
    return toy_sweep.trained(tiny_llama)


def same(a, b):
    return a == b or (math.isnan(a) and math.isnan(b))


# distributions


def test_kl_by_hand():
    clean, steered = (
        torch.tensor([[0.0, 0.0], [math.log(3), 0.0]]),
        torch.tensor([[math.log(3), 0.0], [math.log(3), 0.0]]),
    )
    half = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)  # (1/2, 1/2) against (3/4, 1/4)
    assert kl(clean.double(), steered.double()).tolist() == pytest.approx([half, 0.0])
    assert kl(steered.double(), clean.double())[0] == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


def test_kl_is_torchs():
    clean, steered = torch.randn(5, 7), 3 * torch.randn(5, 7)
    oracle = kl_div(steered.log_softmax(-1), clean.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(kl(clean.double(), steered.double()).float(), oracle)


def test_mass_by_hand():
    logits = torch.tensor([[0.0, math.log(2), math.log(5), -math.inf]])
    assert measures.mass(logits, torch.tensor([1, 3])).item() == pytest.approx(2 / 8)
    assert measures.mass(logits, torch.tensor([0, 1, 2])).item() == pytest.approx(1)


def test_perplexity_by_hand():
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])  # probabilities of the targets: 1/2 and 1/4
    assert measures.perplexity(logits, torch.tensor([1, 1])) == pytest.approx(math.sqrt(8))
    assert math.isnan(measures.perplexity(logits[:0], torch.zeros(0, dtype=torch.int64)))


# texts


@pytest.mark.parametrize(
    ("ids", "n", "expected"),
    [([1, 1, 1, 1, 1, 1], 4, 2 / 3), ([1, 2, 3, 4, 5], 4, 0.0), ([1, 2, 3], 4, NAN), ([1, 2, 1, 2, 1], 2, 0.5)],
)
def test_repetition_by_hand(ids, n, expected):
    assert same(measures.repetition(ids, n), pytest.approx(expected, nan_ok=True))


@pytest.mark.parametrize(("ids", "expected"), [([1, 2, 1, 2], 2 / 3), ([7, 7, 7], 0.5), ([1], NAN), ([], NAN)])
def test_distinct_by_hand(ids, expected):
    assert measures.distinct(ids) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    ("ids", "reference", "share", "first"),
    [
        ([1, 2, 3], [1, 2, 3], 0.0, NAN),
        ([1, 2, 3, 4], [1, 9, 3], 0.5, 1.0),
        ([1, 2], [1, 2, 3, 4], 0.5, 2.0),
        ([], [5], 1.0, 0.0),
        ([], [], 0.0, NAN),
    ],
)
def test_changes_of_the_text_by_hand(ids, reference, share, first):
    assert measures.changed_share(ids, reference) == share
    assert same(measures.first_divergence(ids, reference), first)


@given(ids=IDS, reference=IDS)
@settings(max_examples=200, deadline=None)
def test_properties_of_the_text_measures(ids, reference):
    share, first = measures.changed_share(ids, reference), measures.first_divergence(ids, reference)
    assert share == measures.changed_share(reference, ids) and 0 <= share <= 1
    assert (share == 0) == math.isnan(first) == (ids == reference)
    if not math.isnan(first):
        assert ids[: int(first)] == reference[: int(first)] and ids[: int(first) + 1] != reference[: int(first) + 1]
    if len(ids) >= 4:
        assert (
            measures.repetition(ids) == pytest.approx(1 - measures.distinct(ids, 4))
            and 0 <= measures.repetition(ids) < 1
        )


# activations and codes


def test_relative_change_by_hand():
    h, steered = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[3.0, 4.0], [0.0, 3.0]])
    assert measures.relative_change(h, steered) == pytest.approx((0.25, 1.25))


def test_latent_changes_by_hand():
    clean = torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 4.0, 0.0, 0.0]])
    steered = torch.tensor([[3.0, 0.0, 1.5, 0.0], [1.0, 0.0, 0.0, 2.0]])
    # others: row 0 |1.5 - 2| = .5 and none flips; row 1 4 + 2 = 6 and two flip
    assert measures.latent_changes(clean, steered, 0) == (0.5, 2.0, 3.25, 1.0)
    assert torch.equal(clean, torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 4.0, 0.0, 0.0]]))


# scores


def test_output_score_by_hand():
    logits = torch.tensor([0.0, math.log(2), math.log(4), math.log(1)])  # 1/8, 1/4, 1/2, 1/8
    assert measures.output_score(logits, torch.tensor([0, 2])) == pytest.approx(0.5)  # rank 0
    assert measures.output_score(logits, torch.tensor([0, 1])) == pytest.approx((1 - 1 / 4) / 4)  # rank 1
    assert measures.output_score(logits, torch.tensor([3])) == pytest.approx((1 - 2 / 4) / 8)  # ties share a rank


def test_input_score_by_hand():
    assert measures.input_score([1, 2, 2, 3], torch.tensor([2, 9])) == 0.5
    assert math.isnan(measures.input_score([], torch.tensor([2])))


@pytest.mark.parametrize("make", [tiny.llama_model, tiny.gpt2_model])
def test_logit_directions_are_the_models(make, tiny_tokenizer):
    """A step so large that nothing else counts: the model's logits go as (d * gain) W_U, up to a positive factor."""
    model = make()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # the gains and biases of random models are all alike
            nn.init.normal_(parameter)
    lm = saelab.load_model(model, tokenizer=tiny_tokenizer, device="cpu")
    last = f"blocks.{lm.n_layers - 1}.hook_resid_post"
    width = lm.site(last).width
    direction = torch.randn(width)
    with lm.intervene(last, lambda x, where: x + 1e5 * direction):
        steered = lm.logits("abc")[0, -1]
    with lm.intervene(last, lambda x, where: x - 1e5 * direction):  # what the last norm's bias adds goes out
        steered = (steered - lm.logits("abc")[0, -1]) / 2
    wanted = unembedding(lm).logits(direction[None])[0]
    scaled = steered * wanted.norm() / steered.norm()
    torch.testing.assert_close(scaled, wanted, atol=2e-3 * float(wanted.abs().max()), rtol=1e-3)
    assert torch.equal(scores.top_tokens(lm, direction[None])[0, :3], steered.sort(descending=True).indices[:3])


def test_a_model_without_unembedding():
    lm = saelab.load_model(tiny.gpt2_model(), device="cpu")
    lm.model.get_output_embeddings = lambda: None
    with pytest.raises(ConfigError, match="no unembedding"):
        unembedding(lm)
    with pytest.raises(ConfigError, match="no unembedding"):
        scores.top_tokens(lm, torch.ones(1, 24))


def test_output_scores_are_single_forward_passes(tiny_llama, sweep_sae):
    sae, live = sweep_sae
    found = scores.output_scores(tiny_llama, sae, live[:5], batch_size=2)
    for latent, score in zip(live[:5], found, strict=True):
        with tiny_llama.steer(steering.add(sae, latent, strength=10.0)):
            logits = tiny_llama.logits(scores.NEUTRAL_PROMPT)[0, -1]
        top = scores.top_tokens(tiny_llama, sae.W_dec[[latent]], 20)[0]
        assert score == pytest.approx(measures.output_score(logits, top), rel=1e-4)


def test_input_scores_against_a_dense_search(tiny_llama, sweep_sae):
    sae, live = sweep_sae
    corpus = saelab.load_corpus([f"{i} of the people, by the people {i * i}" * 8 for i in range(40)])
    latents = live[:6]
    found = scores.input_scores(tiny_llama, sae, latents, corpus, tokens=400, contexts=5)
    contexts = corpus.contexts(tiny_llama, 32, "heldout")
    count = min(len(contexts), 13)  # of 32 tokens, 400 in all
    tops = scores.top_tokens(tiny_llama, sae.W_dec[latents], 20)
    x = tiny_llama.record(contexts.ids[:count].long(), sae.metadata["site"])
    codes = sae.encode(x).detach()
    usable = contexts.mask[:count] & sae.replaceable(x) & (torch.arange(32) >= 1)
    for latent, score, top in zip(latents, found, tops, strict=True):
        values = torch.where(usable, codes[..., latent], 0.0)
        pairs = zip(values, contexts.ids, strict=False)
        best = sorted(((float(row.max()), int(ids[row.argmax()])) for row, ids in pairs), reverse=True)
        peaks = [token for value, token in best if value > 0][:5]
        assert same(score, measures.input_score(peaks, top))


# summaries


def test_area_by_hand():
    assert area([], 2.0) == 0
    assert area([(1.0, 4.0)], 2.0) == 2.0
    assert area([(0.5, -1.0), (1.0, 3.0), (1.5, 1.0), (9.0, 100.0)], 2.0) == 1.5  # 0 up to 1, then 3


def test_spearman_by_hand():
    assert spearman([1, 2, 3, 4], [10, 30, 20, 40]) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert spearman([1, 2], [2, 1]) == -1
    assert math.isnan(spearman([1], [1])) and math.isnan(spearman([1, 2], [3, 3]))


# ranks among random directions


def curves(generator, directions=21, prompts=6, noise=0.5):
    """Directions that are all of one kind: each its own strength of effect and divergence, each prompt with its noise."""
    strengths = np.array([0.5, 1.0, 2.0, 4.0])[None, :, None]
    slope, steepness = generator.normal(0, 1, (directions, 1, 1)), generator.lognormal(0, 0.5, (directions, 1, 1))
    bend = generator.normal(0, 1, (directions, 1, 1))  # the best strength differs between them
    scatter = noise * generator.normal(0, 1, (directions, 4, prompts))
    effect = slope * strengths + bend * np.sin(2 * strengths) + scatter
    return effect, steepness * strengths**2 * generator.lognormal(0, 0.3, (1, 1, prompts))


def test_effects_at_equal_divergence_by_hand():
    kl = np.array([[[0.25, 0.25], [1.0, 4.0]], [[1.0, 1.0], [9.0, 9.0]]])
    effect = np.array([[[1.0, 2.0], [3.0, 6.0]], [[4.0, 5.0], [7.0, 8.0]]])
    level, found = at_equal_divergence(effect, kl, budget=2.25)
    assert level == 1.0  # the first direction gets no further on the first prompt
    # the first: strength 2 by prompt 0, read on prompt 1; by prompt 1 a third of the way, read on prompt 0
    assert found.tolist() == pytest.approx([(6 + (1 + 2 / 3)) / 2, (5 + 4) / 2])
    level, found = at_equal_divergence(effect, kl, budget=0.0625)  # half of the first strength, and a quarter
    assert level == 0.0625 and found.tolist() == pytest.approx([1.5 / 2, 4.5 / 4])
    assert np.isnan(at_equal_divergence(effect, kl, 0.0625, at_rest=math.nan)[1]).all()
    assert np.isnan(at_equal_divergence(effect, 0 * kl, 1.0)[1]).all()


def test_the_order_of_the_strengths_does_not_matter():
    effect, kl = curves(np.random.default_rng(0))
    level, found = at_equal_divergence(effect, kl, 1.0)
    again = at_equal_divergence(effect[:, ::-1], kl[:, ::-1], 1.0)
    assert again[0] == level and np.array_equal(again[1], found)


def test_p_is_uniform_where_the_latent_is_a_random_direction():
    """Nothing is chosen where it is reported: at .05 one in twenty passes, at .5 one in two."""
    ps = np.array([p_by_rank(at_equal_divergence(*curves(np.random.default_rng(i)), 1.0)[1]) for i in range(600)])
    assert ps.min() == pytest.approx(1 / (ENOUGH + 1))
    for level in (0.05, 0.25, 0.5):
        assert abs((ps <= level).mean() - level) < 3.5 * (level * (1 - level) / 600) ** 0.5 + 1 / 42


def test_p_is_small_where_the_latent_does_more_and_counts_ties_against_it():
    effect, kl = curves(np.random.default_rng(0))
    effect[0] = 10 * np.sqrt(kl[0])
    assert p_by_rank(at_equal_divergence(effect, kl, 1.0)[1]) == pytest.approx(1 / 21)
    assert p_by_rank(np.ones(21)) == 1


def test_a_tokenizer_that_knows_nothing_of_the_neutral_prompt(tiny_tokenizer):
    """Chess, DNA: the neutral prompt is all unknown tokens, which are not steered; ordinary tokens stand in for it."""
    words = Tokenizer(
        tokenizer_models.WordLevel({"<unk>": 0, **{f"w{i}": i for i in range(1, 258)}}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    lm = saelab.load_model(
        tiny.llama_model(), tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    )
    texts = [" ".join(f"w{1 + (i * j) % 250}" for j in range(1, 30)) for i in range(1, 40)]
    site = "blocks.2.hook_resid_post"
    sae = saelab.train(lm, texts, site=site, sae=saelab.TopK(k=4, d_sae=32), tokens=512, batch_size=128, context_length=16,
                       progress=False).sae  # fmt: skip
    latent = int(sae.latent_stats.density.argmax())
    assert scores.neutral_tokens(lm, sae).ids.tolist() == [[1, 2, 3, 4]]
    found = steering.sweep(lm, sae, [latent], ["add"], [2.0], ["w5 w9 w33"], max_new_tokens=3, progress=False)
    expected = scores.output_scores(lm, sae, [latent], prompt=torch.tensor([[1, 2, 3, 4]]))
    assert found.scores["output_score"] == expected and 0 <= expected[0] <= 1
    assert scores.neutral_tokens(saelab.load_model(tiny.llama_model(), tokenizer=tiny_tokenizer), sae).lengths == [19]
