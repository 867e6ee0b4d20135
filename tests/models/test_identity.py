"""What is kept under a digest is found again only by the object that it describes: as it is when it is compared."""

import functools
import warnings

import pytest
import torch
from torch import nn

import saelab
from saelab import dashboards, hspace, steering
from saelab.base.errors import InterventionError
from saelab.models.identity import state_digest, weights_digest
from tests import toy_denoiser
from tests.tiny import TEXTS, byte_tokenizer, gpt2_model, llama_model

SITE = "blocks.1.hook_resid_post"
FEW = {"site": SITE, "tokens": 120, "context_length": 16, "progress": False}


@pytest.fixture
def lm():
    return saelab.load_model(llama_model(), tokenizer=byte_tokenizer())


@pytest.fixture
def corpus():
    return saelab.load_corpus([f"{i}. {text}" for i in range(3) for text in TEXTS])


def tune(model, by=0.3):
    """As an optimizer of another library does it: in place, also where autograd's counter of writes does not see it."""
    for parameter in model.parameters():
        parameter.data.mul_(1 + by)


class Adapted(nn.Linear):
    """A linear layer with a low-rank adapter, with the attributes that peft's layers have."""

    def __init__(self, base):
        super().__init__(base.in_features, base.out_features, bias=False)
        self.weight.data.copy_(base.weight.data)
        generator = torch.Generator().manual_seed(0)
        self.lora = nn.Parameter(torch.randn(base.out_features, base.in_features, generator=generator))
        self.disable_adapters, self.active_adapters, self.merged_adapters = False, ["default"], []
        self.scaling = {"default": 0.5}

    def forward(self, x):
        return super().forward(x) if self.disable_adapters else super().forward(x) + 0.5 * x @ self.lora.T


def adapter_of(lm):
    layer = lm.inner.model.layers[0].mlp
    layer.up_proj = Adapted(layer.up_proj)
    return layer.up_proj


def test_a_model_tuned_in_place_is_harvested_again(lm, corpus, tmp_path):
    before = lm.digest
    saelab.harvest(lm, corpus, out=tmp_path / "x", **FEW)
    tune(lm.model)
    assert lm.digest != before
    with pytest.raises(saelab.CheckpointError, match="model_digest"):
        saelab.harvest(lm, corpus, out=tmp_path / "x", **FEW)
    tune(lm.model, 1 / 1.3 - 1)
    lm.model.load_state_dict(llama_model().state_dict())
    assert lm.digest == before and len(saelab.harvest(lm, corpus, out=tmp_path / "x", **FEW)) == 120


def test_a_model_tuned_in_place_is_trained_on_again(lm, corpus, tmp_path):
    options = {
        **FEW,
        "sae": saelab.TopK(k=2, d_sae=16),
        "batch_size": 32,
        "buffer_tokens": 512,
        "out": tmp_path / "run",
    }
    saelab.train(lm, corpus, **options)
    assert saelab.train(lm, corpus, **options).path == tmp_path / "run"
    tune(lm.model)
    with pytest.raises(saelab.CheckpointError, match="model_digest"):
        saelab.train(lm, corpus, **options)


def test_an_adapter_on_off_scaled_or_merged_is_another_model(lm):
    plain, layer = lm.digest, adapter_of(lm)
    seen = [plain, lm.digest]
    for name, value in (("disable_adapters", True), ("active_adapters", ["default", "second"]),
                        ("scaling", {"default": 2.0}), ("merged_adapters", ["default"])):  # fmt: skip
        old = getattr(layer, name)
        setattr(layer, name, value)
        seen.append(lm.digest)
        setattr(layer, name, old)
    assert len(set(seen)) == 6 and lm.digest == seen[1]


def test_dropout_that_acts_is_part_of_the_digest():
    model = gpt2_model()
    lm = saelab.load_model(model, device="cpu")
    plain = lm.digest
    model.transformer.h[1].mlp.dropout.train()
    one = lm.digest
    model.train()
    assert len({plain, one}) == 2 and lm.digest == one and "dropout" not in plain
    model.eval()
    assert lm.digest == plain == weights_digest(model) == state_digest(model)


def test_what_comes_from_a_file_keeps_the_digest_of_the_file_until_it_is_changed():
    model = llama_model()
    lm = saelab.LanguageModel(model, None, "bundled", "f" * 64)
    assert lm.digest == "f" * 64
    tune(model)
    assert lm.digest == weights_digest(model)
    model.load_state_dict(llama_model().state_dict())
    assert lm.digest == "f" * 64


def opened(lm, corpus, how):
    if how == "intervene":
        return lm.intervene(SITE, lambda x, where: 0 * x)
    if how == "steer":
        return lm.steer(steering.add(torch.ones(32), strength=1.0, unit="activation", site=SITE))
    sae = saelab.train(
        torch.randn(200, 32), sae=saelab.TopK(k=2, d_sae=16), tokens=100, batch_size=50, progress=False
    ).sae
    return lm.splice(sae, site=SITE)


@pytest.mark.parametrize("how", ["intervene", "steer", "splice"])
def test_nothing_is_kept_under_a_digest_while_an_intervention_is_open(lm, corpus, tmp_path, how):
    with pytest.raises(InterventionError, match="close it first"), opened(lm, corpus, how):
        saelab.harvest(lm, corpus, out=tmp_path / "x", **FEW)
    with pytest.raises(InterventionError, match="close it first"), opened(lm, corpus, how):
        saelab.train(
            lm, corpus, sae=saelab.TopK(k=2, d_sae=16), batch_size=32, buffer_tokens=512, out=tmp_path / "r", **FEW
        )
    assert not (tmp_path / "x").exists() and not (tmp_path / "r").exists()
    with lm.intervene(SITE, lambda x, where: 0 * x):
        assert not saelab.harvest(lm, corpus, **FEW)[:].any()
    assert saelab.harvest(lm, corpus, out=tmp_path / "x", **FEW)[:].any()


def test_hooks_of_the_users_are_said_where_something_is_kept(lm, corpus, tmp_path):
    from saelab.dashboards.collecting.collect import fingerprint
    from saelab.dashboards.collecting.one_pass import Reader

    reader = Reader.of(lm, [sae_of(lm, corpus)], corpus.contexts(lm, 16), 64)
    plain = saelab.harvest(lm, corpus, out=tmp_path / "x", **FEW)[:]
    lm.model(torch.tensor([[1, 2]]), output_hidden_states=True)  # transformers leaves hooks that only read
    assert torch.equal(saelab.harvest(lm, corpus, out=tmp_path / "x", **FEW)[:], plain)
    assert fingerprint(reader) == fingerprint(reader)

    def doubled(module, args, output):
        return output * 2

    for hook in (doubled, functools.partial(doubled)):
        handle = lm.model.get_input_embeddings().register_forward_hook(hook)
        with pytest.warns(UserWarning, match=r"the model has 1 \(tests.*doubled at model.embed_tokens\)"):
            saelab.harvest(lm, corpus, out=tmp_path / "x", **FEW)
        assert fingerprint(reader) != fingerprint(reader)  # never found again
        handle.remove()


def sae_of(lm, corpus):
    return saelab.train(lm, corpus, sae=saelab.TopK(k=2, d_sae=16), batch_size=32, buffer_tokens=512, **FEW).sae


def uses(lm, sae, corpus, path):
    yield lambda: saelab.evaluate(sae, lm, corpus, tokens=32, sparsity_tokens=32, context_length=16, split="all",
                                  progress=False)  # fmt: skip
    yield lambda: dashboards.build(sae, lm, corpus, path / "page.html", tokens=64, latents=2, windows=2, window=8,
                                   effects=None, context_length=16, evaluation=None, parquet=False, progress=False)  # fmt: skip

    def spliced():
        with lm.splice(sae):
            lm.logits("The state")

    def steered():
        with lm.steer(steering.add(sae, 3, strength=1.0, unit="activation")):
            lm.logits("The state")

    yield spliced
    yield steered
    yield lambda: lm.top_latents("The state", sae)
    yield lambda: steering.find(lm, sae, "The state", progress=False)


@pytest.mark.parametrize("number", range(6), ids=["evaluate", "dashboard", "splice", "steer", "top_latents", "find"])
def test_other_weights_than_the_saes_are_said_once(lm, corpus, tmp_path, number):
    sae = sae_of(lm, corpus)
    use = list(uses(lm, sae, corpus, tmp_path))[number]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="this SAE was trained on split")
        use()  # the same model: nothing to say
        with torch.no_grad():
            lm.model.lm_head.weight.add_(1e-4)
        with pytest.warns(UserWarning, match="other weights, adapters, dtype or mode") as said:
            use()
        assert len([w for w in said if "other weights" in str(w.message)]) == 1
        use()
        sae.metadata.pop("model_digest")  # of another library
        lm.compared.clear()
        use()


def test_counted_firings_are_those_of_the_sae_as_it_is(lm, corpus):
    from saelab.dashboards.collecting.collect import fingerprint
    from saelab.dashboards.collecting.one_pass import Reader

    sae = sae_of(lm, corpus)
    reader = Reader.of(lm, [sae], corpus.contexts(lm, 16), 64)
    before = fingerprint(reader)
    sae.metadata["skip_positions"] = 3
    skipping = fingerprint(reader)
    with torch.no_grad():
        sae.W_dec[0, 0] += 1
    assert len({before, skipping, fingerprint(reader)}) == 3
    with lm.intervene(SITE, lambda x, where: 0 * x):
        assert fingerprint(reader) != fingerprint(reader)  # never found again


def test_a_corpus_keeps_what_it_was_made_from():
    texts, ids = [f"{i}. {text}" for i, text in enumerate(TEXTS)], torch.arange(40).view(4, 10)
    corpus, rows = saelab.load_corpus(texts), saelab.load_corpus(ids)
    before = (corpus.digest, list(corpus.documents), rows.digest, rows.rows.clone())
    texts[0] = "something else"
    ids.zero_()
    assert (corpus.digest, list(corpus.documents), rows.digest) == before[:3] and torch.equal(rows.rows, before[3])


def test_a_denoiser_tuned_or_held_open_makes_other_trajectories():
    denoiser = toy_denoiser.denoiser()
    trajectory = hspace.sample(denoiser, n=1, steps=2, progress=False)
    hspace.replay(denoiser, trajectory, progress=False)
    with denoiser.intervene("after", lambda h, where: 0 * h):
        touched = hspace.sample(denoiser, n=1, steps=2, progress=False)
    with pytest.raises(saelab.ConfigError, match="load the one that made it"):
        hspace.replay(denoiser, touched, progress=False)
    tune(denoiser.unet)
    with pytest.raises(saelab.ConfigError, match="load the one that made it"):
        hspace.replay(denoiser, trajectory, progress=False)
