"""Training straight from a language model and its corpus."""

import pytest
import torch

import saelab
from saelab import ConfigError, SiteError, TopK
from tests.training.test_train import interrupting

SITE = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def corpus():
    generator = torch.Generator().manual_seed(0)
    words = ["economy", "union", "the", "state", "of", "war", "peace", "congress", "a", "nation"]
    texts = [
        " ".join(words[int(i)] for i in torch.randint(10, (120,), generator=generator)) + f" {n}" for n in range(60)
    ]
    return saelab.load_corpus(texts)


def run_on(lm, corpus, **arguments):
    defaults = {"site": SITE, "sae": TopK(k=4, d_sae=64), "tokens": 12_000, "batch_size": 256, "progress": False}
    return saelab.train(lm, corpus, **defaults | {"context_length": 32, "buffer_tokens": 2048} | arguments)


def test_a_model_trains_an_sae_that_knows_where_it_comes_from(tiny_llama, corpus):
    run = run_on(tiny_llama, corpus, lr=1e-2)
    assert run.history.explained_variance.iloc[-1] > run.history.explained_variance.iloc[0]
    metadata = run.sae.metadata
    assert metadata["site"] == SITE and metadata["model"] == tiny_llama.name
    assert metadata["model_digest"] == tiny_llama.digest and metadata["corpus_digest"] == corpus.digest
    assert metadata["skip_positions"] == 1 and metadata["context_length"] == 32 and metadata["split"] == "train"
    assert metadata["norm_limit"] == pytest.approx(float(run.sae.state.norm_limit), rel=1e-6)
    assert run.sae.d_in == 32


def test_heads_are_kept(tiny_llama, corpus):
    run = run_on(tiny_llama, corpus, site="blocks.1.attn.hook_z", tokens=1000)
    heads, d_head = run.sae.metadata["heads"]
    assert heads * d_head == run.sae.d_in


def test_every_train_position_but_the_first_serves_once_an_epoch(tiny_llama, corpus):
    contexts = corpus.contexts(tiny_llama, 32, split="train")
    kept = int(contexts.mask[:, 1:].sum())
    run_on(
        tiny_llama, corpus, tokens=kept, max_norm=None, batch_size=100, sae=Recording(k=1, d_sae=4, input_scale=None),
        lr=0.0,
    )  # fmt: skip
    seen, Recording.rows = Recording.rows, []
    rows = torch.cat(seen)
    with torch.no_grad():
        x = torch.cat([tiny_llama.record(contexts.ids[i : i + 8].long(), SITE) for i in range(0, len(contexts), 8)])
    wanted = x[:, 1:][contexts.mask[:, 1:]]
    assert len(rows) == len(wanted) == kept
    for column in (0, 7, 31):
        torch.testing.assert_close(rows[:, column].sort().values, wanted[:, column].sort().values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rows.T @ rows, wanted.T @ wanted, rtol=1e-4, atol=0.5)


class Recording(TopK):
    """A TopK that writes down what it is trained on."""

    rows: list[torch.Tensor] = []

    def losses(self, batch, codes, x_hat, params, state):
        Recording.rows.append(batch.x.clone())
        return super().losses(batch, codes, x_hat, params, state)


def test_an_interrupted_run_continues_to_the_same_bits(tiny_llama, corpus, tmp_path):
    whole = run_on(tiny_llama, corpus, log_every=1)
    part = run_on(tiny_llama, corpus, log_every=1, out=tmp_path / "run", loggers=[interrupting(17)])
    assert part.interrupted
    rest = run_on(tiny_llama, corpus, log_every=1, out=tmp_path / "run")
    assert all(torch.equal(rest.sae.state_dict()[name], tensor) for name, tensor in whole.sae.state_dict().items())


def test_evaluations_on_request_enter_the_history(tiny_llama, corpus):
    with pytest.warns(UserWarning):  # the held-out part is shorter than 8,192 tokens
        history = run_on(tiny_llama, corpus, tokens=2000, evaluate_every=1000).history
    assert {"ce_score", "delta_ce", "kl"} <= set(history.columns)
    assert history.delta_ce.notna().any()


@pytest.mark.parametrize("wrapped", [False, True])
def test_evaluations_wait_for_thresholds(tiny_llama, corpus, wrapped):
    cfg = saelab.MutualChoice(k=4, d_sae=64)
    more = {"target_site": "blocks.1.hook_mlp_out"} if wrapped else {}
    with pytest.warns(UserWarning):
        history = run_on(
            tiny_llama,
            corpus,
            sae=saelab.Transcoder(of=cfg) if wrapped else cfg,
            tokens=2560,
            evaluate_every=256,
            **more,
        ).history
    assert history.delta_ce.notna().tolist() == [False] * 2 + [True] * 8  # 10 steps; thresholds from a fifth on


def test_the_model_is_left_as_it_was(tiny_llama, corpus):
    before = {name: tensor.clone() for name, tensor in tiny_llama.model.state_dict().items()}
    run_on(tiny_llama, corpus, tokens=1000)
    assert all(torch.equal(tiny_llama.model.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in tiny_llama.model.modules())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"site": None}, ConfigError, "needs site"),
        ({"site": "blocks.1.hook_resid_pots"}, SiteError, "hook_resid_post"),
        ({"context_length": 100_000}, ConfigError, "100,000"),
        ({"buffer_tokens": 200}, ConfigError, "buffer of 200 tokens is smaller than the batch of 256"),
        ({"sae": saelab.SAE(TopK(k=2, d_sae=8), 12)}, SiteError, "width 12"),
    ],
)
def test_bad_arguments(tiny_llama, corpus, arguments, error, message):
    with pytest.raises(error, match=message):
        run_on(tiny_llama, corpus, **arguments)


def test_a_model_without_a_corpus_is_refused(tiny_llama):
    with pytest.raises(ConfigError, match="needs corpus"):
        run_on(tiny_llama, None)
