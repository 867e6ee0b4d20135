"""Common slips: something else than is meant where an SAE, a model, a site, a latent or a number is given.

The kind of fault: a raw error from deep inside (a missing attribute, a shape, an index), or one that blames something else.
Each slip is refused by name, with what was given and the way out, before anything is read or written.
"""

from types import SimpleNamespace

import pytest
import torch

import saelab
from saelab import SaelabError, hspace, steering
from saelab.analysis import attention, dark_matter
from saelab.analysis.circuits import recursive_dfa
from saelab.analysis.dark_matter import pursuit
from tests.toy_dashboard import SITE, TEXTS, make_sae

NOPE = "nope/sae"


@pytest.fixture(scope="module")
def have(tiny_llama, tiny_gpt2, tmp_path_factory):
    """What is given, right and wrong."""
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    run = saelab.train(x, sae=saelab.TopK(k=2, d_sae=16), tokens=400, batch_size=64, progress=False)
    return SimpleNamespace(
        lm=tiny_llama, other=tiny_gpt2, hf=tiny_llama.model, corpus=saelab.load_corpus(TEXTS), x=x, run=run,
        sae=make_sae(tiny_llama), z=make_sae(tiny_llama, "blocks.1.attn.hook_z", heads=[4, 8]), cfg=saelab.TopK(k=1, d_sae=8),
        folder=tmp_path_factory.mktemp("slips"),
    )  # fmt: skip


def page(have, sae=None, lm=None, **arguments):
    """A dashboard of the right things but for what is given."""
    usual = {"latents": 1, "tokens": 64, "evaluation": None, "parquet": False, "progress": False}
    saelab.dashboards.build(
        sae or have.sae, lm or have.lm, have.corpus, have.folder / "page.html", **(usual | arguments)
    )


def entered(context):
    with context:
        pass


def swept(have, sae, lm, **arguments):
    usual = {"latents": [1], "operations": "add", "strengths": [1.0], "prompts": ["a"]}
    steering.sweep(lm, sae, **(usual | arguments))


# name: what is done wrong, and what the message says
SLIPS = {
    # something else than an SAE
    "evaluate a run": (lambda h: saelab.evaluate(h.run, h.lm, h.corpus), r"a run .Run.: give its .sae"),
    "evaluate a path": (lambda h: saelab.evaluate(NOPE, h.lm, h.corpus), r"SAE.load\('nope/sae'\)"),
    "evaluate a configuration": (lambda h: saelab.evaluate(h.cfg, h.lm, h.corpus), "a configuration .TopK.: train it"),
    "evaluate, exchanged": (lambda h: saelab.evaluate(h.lm, h.sae, h.corpus), "are two arguments exchanged"),
    "evaluate nothing": (lambda h: saelab.evaluate(None, h.lm, h.corpus), "has to be an autoencoder, and is nothing"),
    "a page of a run": (lambda h: page(h, h.run), "give its .sae"),
    "a page of a path": (lambda h: page(h, NOPE), r"SAE.load\('nope/sae'\)"),
    "a page compared with a path": (lambda h: page(h, compare=NOPE), "compare has to be an autoencoder"),
    "a page with a path of a seed": (lambda h: page(h, seeds=[NOPE]), "one of seeds has to be an autoencoder"),
    "add from a run": (lambda h: steering.add(h.run, 3), "give its .sae"),
    "add from a path": (lambda h: steering.add(NOPE, 3), "SAE.load"),
    "add from a configuration": (lambda h: steering.add(h.cfg, 3), "train it first"),
    "add from a model": (lambda h: steering.add(h.lm, 3), "a language model"),
    "sweep a run": (lambda h: swept(h, h.run, h.lm), "give its .sae"),
    "sweep, exchanged": (lambda h: swept(h, h.lm, h.sae), "are two arguments exchanged"),
    "heads of a run": (lambda h: attention.head_attribution(h.run), "give its .sae"),
    "heads of a path": (lambda h: attention.head_attribution(NOPE), "SAE.load"),
    "attribution of a run": (lambda h: attention.direct_attribution(h.run, h.lm, "abc", 1), "give its .sae"),
    "a circuit of a run": (lambda h: recursive_dfa.trace(h.run, h.lm, "abc", 1), "give its .sae"),
    "a circuit through a run": (lambda h: recursive_dfa.trace(h.z, h.lm, "abc", 1, saes=[h.run]), "give its .sae"),
    "dark matter of a run": (lambda h: dark_matter.decompose(h.run, h.x), "give its .sae"),
    "dark matter, exchanged": (lambda h: dark_matter.decompose(h.x, h.sae), "has to be an autoencoder"),
    "pursuit of a path": (lambda h: pursuit.gradient_pursuit(NOPE, h.x), "SAE.load"),
    "splice a run": (lambda h: entered(h.lm.splice(h.run)), "give its .sae"),
    "splice a path": (lambda h: entered(h.lm.splice(NOPE)), "SAE.load"),
    "top latents of a run": (lambda h: h.lm.top_latents("abc", h.run), "give its .sae"),
    "top latents, exchanged": (lambda h: h.lm.top_latents(h.sae, "abc"), "SAE.load"),
    "steer by an SAE": (lambda h: entered(h.lm.steer(h.sae)), "steering"),
    "an SAE of no architecture": (lambda h: saelab.SAE("topk", 32), "give a configuration"),
    "an SAE of no width": (lambda h: saelab.SAE(h.cfg, 0), "d_in is 0"),
    "train a name": (lambda h: saelab.train(h.x, sae="topk", tokens=64), "topk"),
    "train a class": (lambda h: saelab.train(h.x, sae=saelab.TopK, tokens=64), "TopK"),
    # something else than a language model
    "evaluate a bare model": (lambda h: saelab.evaluate(h.sae, h.hf, h.corpus), r"LlamaForCausalLM.: give saelab.load_model"),
    "evaluate a name": (lambda h: saelab.evaluate(h.sae, "smollm2-135m", h.corpus), r"load_model\('smollm2-135m'\)"),
    "a page of a bare model": (lambda h: page(h, lm=h.hf), "give saelab.load_model"),
    "a page whose null is a bare model": (lambda h: page(h, null=h.hf), "null has to be a language model"),
    "sweep a bare model": (lambda h: swept(h, h.sae, h.hf), "give saelab.load_model"),
    "harvest a bare model": (lambda h: saelab.harvest(h.hf, h.corpus, site=SITE, tokens=64), "give saelab.load_model"),
    "attribution in a bare model": (lambda h: attention.direct_attribution(h.z, h.hf, "abc", 1), "give saelab.load_model"),
    "sample a language model": (lambda h: hspace.sample(h.lm, n=1), "has to be a denoiser, and is a language model"),
    "components of rows": (lambda h: hspace.pca(h.x, components=2), "Tensor, no trajectory"),
    # another model, site or width
    "another model": (lambda h: saelab.evaluate(h.sae, h.other, h.corpus), "32 wide .* 24"),
    "a page of another model": (lambda h: page(h, lm=h.other), "32 wide .* 24"),
    "a site that is not there": (lambda h: saelab.evaluate(h.sae, h.lm, h.corpus, site="blocks.9.hook_resid_post"), "near it"),
    "record at a number": (lambda h: h.lm.record("abc", 3), "named by a string, not by 3"),
    "record at nothing": (lambda h: h.lm.record("abc", []), "no site was asked for"),
    "record, exchanged": (lambda h: h.lm.record(SITE, "abc"), "no site 'abc'"),
    "intervene with a tensor": (lambda h: entered(h.lm.intervene(SITE, 3)), "fn is int"),
    "heads of the stream": (lambda h: attention.head_attribution(h.sae), "hook_z"),
    "attribution of the stream": (lambda h: attention.direct_attribution(h.sae, h.lm, "abc", 1), "hook_z"),
    "heads of another model": (lambda h: attention.direct_attribution(h.z, h.other, "abc", 1), "32|24|heads"),
    "rows of another width": (lambda h: h.sae(torch.zeros(2, 16)), "width 16 .* 32"),
    "codes of another width": (lambda h: h.sae.decode(torch.zeros(2, 16)), "16 latents .* 48"),
    "dark matter of another width": (lambda h: dark_matter.decompose(h.sae, torch.randn(200, 16)), "16"),
    "dark matter of a corpus": (lambda h: dark_matter.decompose(h.sae, h.corpus), "x is Corpus: give activations"),
    "a page with a seed of another width": (lambda h: page(h, seeds=[h.run.sae, saelab.SAE(h.cfg, 16)]), "16 wide.*32"),
    "a page whose null is of another width": (lambda h: page(h, null=h.other), "32 wide .* 24"),
    # latents
    **{f"a page of latents {latents!r}": (lambda h, latents=latents: page(h, latents=latents), "latents")
       for latents in ([-1], [48], 0, "all", [1.5], True, [], 1.5)},
    **{f"add latent {latent!r}": (lambda h, latent=latent: steering.add(h.sae, latent), "latent")
       for latent in (48, -1, "3", 1.5, [1, 2])},
    **{f"attribution of latent {latent!r}": (lambda h, n=latent: attention.direct_attribution(h.z, h.lm, "abc", n), "latent")
       for latent in (48, -1, "1", 1.5, [1, 2])},
    "a circuit of latent 99": (lambda h: recursive_dfa.trace(h.z, h.lm, "abc", 99), "no latent 99.*48"),
    "sweep latent 48": (lambda h: swept(h, h.sae, h.lm, latents=[48]), "48"),
    # numbers and choices
    **{f"a page with {name}={value!r}": (lambda h, pair=(name, value): page(h, **dict([pair])), name)
       for name, value in [("windows", 0), ("windows", "9"), ("windows", 9.0), ("window", 256), ("window", 4.5), ("tokens", 0),
                           ("tokens", "64"), ("tokens", 6.4), ("effects", "all"), ("evaluation", "yes"), ("seed", 1.5),
                           ("shards", 0), ("batch_tiles", 0), ("memory", 0), ("split", "test"), ("context_length", -3),
                           ("labels", {"x": "a"}), ("labels", ["a"]), ("labels", {48: "a"}), ("labels", 3), ("sweeps", 3),
                           ("sweeps", ["a"]), ("sweeps", [{"latent": 48, "text": "a"}]), ("null", True)]},
    **{f"evaluate with {name}={value!r}": (
           lambda h, pair=(name, value): saelab.evaluate(h.sae, h.lm, h.corpus, **dict([pair])), name)
       for name, value in [("tokens", 0), ("tokens", "1000"), ("tokens", 1e3), ("batch_size", 0), ("skip_positions", -1),
                           ("sparsity_tokens", -1), ("split", "test")]},
    "a strength in words": (lambda h: steering.add(h.sae, 1, strength="4"), "strength of add is '4'"),
    "a strength that is NaN": (lambda h: steering.add(h.sae, 1, strength=float("nan")), "finite"),
    "a unit of another world": (lambda h: steering.add(h.sae, 1, strength=1.0, unit="parsec"), "unknown unit"),
    "ablate to the median": (lambda h: steering.ablate(h.sae, 1, to="median"), "median"),
    "patterns of block 9": (lambda h: attention.patterns(h.lm, "abc", 9), "no block 9: .* has 4"),
    "patterns of block '1'": (lambda h: attention.patterns(h.lm, "abc", "1"), "block is '1'"),
    "a circuit at 1.5": (lambda h: recursive_dfa.trace(h.z, h.lm, "abc", 1, position=1.5), "position is 1.5"),
    "a circuit of depth 1.5": (lambda h: recursive_dfa.trace(h.z, h.lm, "abc", 1, depth=1.5), "depth is 1.5"),
    "half held out, in words": (lambda h: dark_matter.decompose(h.sae, h.x, holdout="half"), "holdout is 'half'"),
    "a budget in words": (lambda h: pursuit.gradient_pursuit(h.sae, h.x, budget=-1), "budget is -1"),
    "the top no latents": (lambda h: h.lm.top_latents("abc", h.sae, k=0), "k is 0"),
    "the largest loss": (lambda h: h.lm.loss("abc", reduction="max"), "reduction is 'max'"),
    "the text of a text": (lambda h: h.lm.token_text("a"), "token is 'a'"),
    "generate -1 tokens": (lambda h: h.lm.generate("abc", max_new_tokens=-1), "max_new_tokens"),
}  # fmt: skip


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_is_named(have, slip):
    wrong, message = SLIPS[slip]
    with pytest.raises(SaelabError, match=message) as caught:
        wrong(have)
    assert len(str(caught.value)) > 20
    assert not (have.folder / "page.html").exists()


def test_what_can_be_taken_is_taken(have):
    """Counts of NumPy, latents twice, one seed for a list, a table of rows: like their plain equivalents."""
    import numpy as np
    import pandas as pd

    folder = have.folder / "taken"
    made = [
        saelab.dashboards.build(
            have.sae, have.lm, have.corpus, folder / f"{i}.html", evaluation=None, parquet=False, progress=False, effects=None,
            work=folder / "w", **given,
        ).path.read_bytes()
        for i, given in enumerate([
            {"latents": [1, 3], "tokens": 64, "windows": 9, "seeds": [have.sae], "sweeps": [{"latent": 1, "text": "a"}]},
            {"latents": np.array([3, 1, 1]), "tokens": np.int64(64), "windows": np.int32(9), "seeds": have.sae,
             "sweeps": pd.DataFrame({"latent": [1.0, float("nan")], "text": ["a", "b"]})},
        ])
    ]  # fmt: skip
    assert made[0] == made[1]
