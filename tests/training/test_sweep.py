import pytest
import torch

import saelab
from saelab import CheckpointError, ConfigError, MutualChoice, TopK
from saelab.training.session import Session
from tests.training.test_train import planted

SAES = [TopK(k=2, d_sae=40), TopK(k=4, d_sae=40), MutualChoice(k=2, d_sae=33)]
ARGUMENTS = {"tokens": 6000, "batch_size": 256, "progress": False}


@pytest.mark.parametrize("streamed", [False, True])
def test_each_result_is_that_of_its_solo_run(streamed):
    x = planted()
    source = list(x.split(700)) if streamed else x
    runs = saelab.sweep(source, SAES, **ARGUMENTS)
    for sae, run in zip(SAES, runs, strict=True):
        alone = saelab.train(source, sae=sae, **ARGUMENTS)
        assert all(torch.equal(run.sae.state_dict()[name], t) for name, t in alone.sae.state_dict().items())
        assert run.history.loss.tolist() == alone.history.loss.tolist()


def test_the_table_and_the_plot():
    runs = saelab.sweep(planted(), SAES, **ARGUMENTS)
    assert runs.to_pandas().sae.tolist() == [repr(sae) for sae in SAES]
    assert {trace.name for trace in runs.plot().data} == {"TopK", "MutualChoice"}
    assert "TopK(k=4" in repr(runs) and len(runs[1:]) == 2
    with pytest.raises(ConfigError, match="delta_ce"):
        runs.plot("delta_ce")


def test_a_killed_sweep_continues_to_the_same_bits(tmp_path, monkeypatch):
    x = planted()
    whole = saelab.sweep(x, SAES, **ARGUMENTS)
    saved = []

    def killed(*arguments):
        if saved:
            raise RuntimeError("power cut")
        saved.append(real(*arguments))

    real = Session.checkpoint
    monkeypatch.setattr(Session, "checkpoint", killed)
    with pytest.raises(RuntimeError):
        saelab.sweep(x, SAES, out=tmp_path / "s", checkpoint_every=2000, **ARGUMENTS)
    with pytest.raises(CheckpointError, match="unfinished sweep"):
        saelab.load_run(tmp_path / "s")
    monkeypatch.setattr(Session, "checkpoint", real)
    rest = saelab.sweep(x, SAES, out=tmp_path / "s", checkpoint_every=2000, **ARGUMENTS)
    again = saelab.sweep(x, SAES, out=tmp_path / "s", checkpoint_every=2000, **ARGUMENTS)
    for one, two, three in zip(whole, rest, again, strict=True):
        assert torch.equal(one.sae.W_dec, two.sae.W_dec) and torch.equal(one.sae.W_dec, three.sae.W_dec)
    assert saelab.load_run(tmp_path / "s" / "02-MutualChoice").sae.cfg == SAES[2]
    with pytest.raises(CheckpointError, match="00-TopK, 01-TopK"):
        saelab.load_run(tmp_path / "s")


def test_a_model_and_its_corpus(tiny_llama):
    corpus = saelab.load_corpus(["the state of the union " * 40 + str(i) for i in range(30)])
    runs = saelab.sweep(
        tiny_llama, corpus, SAES[:2], site="blocks.1.hook_resid_post", context_length=32, buffer_tokens=1024,
        tokens=2000, batch_size=128, progress=False,
    )  # fmt: skip
    assert [run.sae.metadata["site"] for run in runs] == ["blocks.1.hook_resid_post"] * 2


@pytest.mark.parametrize("arguments", [(), (TopK(k=1, d_sae=4),), ([],), (None, None, SAES)])
def test_wrong_calls(arguments):
    with pytest.raises(ConfigError):
        saelab.sweep(planted(100), *arguments, **ARGUMENTS)


def test_another_sweep_in_the_same_folder_names_what_differs(tmp_path):
    saelab.sweep(planted(), SAES[:2], out=tmp_path / "s", **ARGUMENTS)
    other = [TopK(k=3, d_sae=40), SAES[1]]
    with pytest.raises(CheckpointError, match=r"holds another run \([^;]*00-TopK\.sae\.k: 2 there, 3 asked\)"):
        saelab.sweep(planted(), other, out=tmp_path / "s", **ARGUMENTS)
