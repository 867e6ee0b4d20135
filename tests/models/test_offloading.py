"""Models that accelerate has put off to memory or disk, or split, are the plain ones, bit for bit."""

import copy
import warnings

import pytest
import torch

import saelab
from saelab.analysis.circuits import frozen
from saelab.models.identity import fingerprint
from saelab.models.unembedding import unembedding
from tests.tiny import TEXTS, byte_tokenizer, gpt2_model, llama_model

accelerate = pytest.importorskip("accelerate")
SITE = "blocks.1.hook_resid_post"
CPU = torch.device("cpu")


def put_off(model, how, folder):
    if how == "memory":
        accelerate.cpu_offload(model, execution_device=CPU)
    elif how == "disk":
        accelerate.disk_offload(model, str(folder), execution_device=CPU)
    else:
        blocks = "transformer.h" if hasattr(model, "transformer") else "model.layers"
        paths = [path for path, m in model.named_modules() if path.count(".") == 1 and path != blocks] + ["lm_head"]
        places = dict.fromkeys(paths, "cpu") | {f"{blocks}.{i}": "disk" if i else "cpu" for i in range(4)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of accelerate's own: which parameters are on disk
            accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)
    return saelab.load_model(model, tokenizer=byte_tokenizer(), device="cpu")


@pytest.mark.parametrize("how", ["memory", "disk", "split"])
@pytest.mark.parametrize("make", [gpt2_model, llama_model])
def test_what_was_put_off_is_the_plain_model(make, how, tmp_path):
    plain = saelab.load_model(make(), tokenizer=byte_tokenizer(), device="cpu")
    lm = put_off(make(), how, tmp_path)
    assert any(p.is_meta for p in lm.model.parameters()) and lm.device == CPU and "on cpu" in repr(lm)
    assert lm.digest == plain.digest and lm.sites().equals(plain.sites())
    names = list(plain.sites()["name"])
    ours, theirs = lm.record(list(TEXTS), names), plain.record(list(TEXTS), names)
    assert all(torch.equal(ours[name], theirs[name]) for name in names)
    assert lm.generate("My", 6) == plain.generate("My", 6)
    corpus = saelab.load_corpus([f"{i}. {text}" for i in range(3) for text in TEXTS])
    rows = [saelab.harvest(x, corpus, site=SITE, tokens=60, context_length=16, progress=False)[:] for x in (lm, plain)]
    assert torch.equal(*rows)


def test_weights_that_analyses_read_are_fetched(tmp_path):
    plain = saelab.load_model(llama_model(), tokenizer=byte_tokenizer(), device="cpu")
    lm = put_off(llama_model(), "disk", tmp_path)
    assert torch.equal(unembedding(lm).W_U, unembedding(plain).W_U)
    tokens = plain.tokenize(TEXTS[0])
    one, other = (frozen.read(x, tokens, [1]).layers[1] for x in (lm, plain))
    assert torch.equal(one.values, other.values) and torch.equal(one.sigma, other.sigma)
    assert all(p.is_meta for p in lm.model.model.layers[1].parameters())


def test_weights_that_are_nowhere_are_an_error():
    model = llama_model()
    model.lm_head.to("meta")
    with pytest.raises(saelab.ConfigError, match=r"lm_head\.weight are not in memory.*no hook"):
        fingerprint(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.bool])
def test_a_fingerprint_tells_every_write(dtype):
    model = torch.nn.Module()
    model.register_buffer("x", torch.arange(3 * 8192 + 5).remainder(2).view(-1, 1).to(dtype))
    seen = [fingerprint(model)]
    for change in (
        lambda x: x[-1].logical_not_(),
        lambda x: x[4097].logical_not_(),
        lambda x: x[:2].copy_(x[:2].flip(0)),
    ):
        held = copy.deepcopy(model)
        change(held.x.data)
        seen.append(fingerprint(held))
    assert len(set(seen)) == 4 and fingerprint(copy.deepcopy(model)) == seen[0]


def test_a_digest_is_made_once_for_the_same_weights(monkeypatch):
    lm = saelab.load_model(llama_model(), device="cpu")
    made = []
    whole = saelab.models.identity.state_digest
    monkeypatch.setattr("saelab.models.identity.state_digest", lambda model: made.append(1) or whole(model))
    first = lm.digest
    assert (lm.digest, len(made)) == (first, 1)
    lm.model.lm_head.weight.data[3, 3] += 1e-3
    assert lm.digest != first and len(made) == 2
