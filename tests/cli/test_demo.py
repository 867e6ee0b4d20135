"""The demo on a small model, and the ranking of its latents against a direct count."""

from types import SimpleNamespace

import pytest
import torch

import saelab
from saelab.cli.demonstration import demo, most_focused
from tests import tiny

SITE = "blocks.1.hook_resid_post"
TEXTS = [f"{number}. {text}" for number in range(1_000) for text in tiny.TEXTS]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAELAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield saelab.load_corpus(TEXTS)


def test_the_demo_runs_from_end_to_end(tiny_llama, corpus, tmp_path, capsys):
    out = str(tmp_path / "run")
    run = demo(
        tokens=10_000, d_sae=64, k=4, out=out, model=tiny_llama, corpus=corpus, site=SITE, look_at=1_000, pages=5,
        page_tokens=1_000,
    )  # fmt: skip
    shown = capsys.readouterr().out
    for line in (
        "[1/5]",
        "[2/5]",
        "[3/5]",
        "[4/5]",
        "[5/5]",
        "dashboard.html",
        "explained_variance",
        "fires on",
        "done in",
    ):
        assert line in shown
    again = saelab.load_run(out).sae
    assert torch.equal(again.W_dec, run.sae.W_dec)


def test_most_focused_against_a_direct_count(tiny_llama, corpus):
    sae = saelab.train(
        torch.randn(2_000, 32), sae=saelab.TopK(k=4, d_sae=16), tokens=2_000, batch_size=250, progress=False
    ).sae
    found = most_focused(sae, tiny_llama, corpus, site=SITE, tokens=500, latents=3, top=2, before=4)
    store = saelab.harvest(tiny_llama, corpus, site=SITE, tokens=500, split="heldout", progress=False)
    x = store[: len(store)]
    codes = sae.encode(x).detach() * sae.replaceable(x)[:, None]
    ids = store.tokens.unique()
    shares = torch.stack([codes[store.tokens == id].sum(0) / ((store.tokens == id).sum() + 4) for id in ids])
    focus = (shares.amax(0) / codes.amax(0)).nan_to_num(0)
    assert [latent.latent for latent in found] == focus.topk(3).indices.tolist()
    first = found[0]
    assert first.density == pytest.approx(float((codes[:, first.latent] > 0).float().mean()))
    named = ids[shares[:, first.latent].topk(2).indices]
    assert first.tokens == [
        (tiny_llama.tokenizer.decode([int(id)]), pytest.approx(float(codes[store.tokens == id, first.latent].max())))
        for id in named
    ]
    strongest = int(store.tokens[codes[:, first.latent].argmax()])
    assert first.example.endswith(f"[{tiny_llama.tokenizer.decode([strongest])}]".lstrip())


def test_an_interrupted_demo_stops_after_training(monkeypatch, capsys):
    monkeypatch.setitem(saelab.__dict__, "load_model", lambda name: None)
    monkeypatch.setitem(saelab.__dict__, "load_corpus", lambda name: None)
    monkeypatch.setitem(saelab.__dict__, "train", lambda *a, **k: SimpleNamespace(interrupted=True))
    assert demo().interrupted
    assert "[3/5]" not in capsys.readouterr().out
