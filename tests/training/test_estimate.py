"""What a run takes, by `saelab.estimate`, against the run."""

import time

import numpy as np
import pytest
import torch

import saelab
from saelab.training import estimating
from tests import tiny

X = torch.randn(2048, 16, generator=torch.Generator().manual_seed(0))
D_SAE = 64
EVERY = [
    saelab.TopK(k=4, d_sae=D_SAE), saelab.MutualChoice(k=4, d_sae=D_SAE), saelab.FeatureChoice(k=4, d_sae=D_SAE),
    saelab.Matryoshka(k=4, d_sae=D_SAE), saelab.MultiTopK(k=4, d_sae=D_SAE), saelab.JumpReLU(target_l0=4, d_sae=D_SAE),
    saelab.ReLU(l1=1.0, d_sae=D_SAE), saelab.Gated(l1=1.0, d_sae=D_SAE),
]  # fmt: skip


@pytest.mark.parametrize("sae", EVERY, ids=lambda sae: type(sae).__name__)
def test_every_architecture_is_estimated(sae):
    found = saelab.estimate(X, sae=sae, tokens=100_000, batch_size=256)
    parameters = sum(p.numel() for p in saelab.SAE(sae, 16).parameters())
    assert found.memory["autoencoder and Adam"] == 3 * 4 * parameters
    assert found.memory["step"] >= 4 * parameters  # the gradient is made within it
    assert found.seconds["autoencoder"] > 0 and "buffer" not in found.memory


def test_time_grows_with_tokens_and_several_are_the_sum():
    sae = saelab.TopK(k=4, d_sae=D_SAE)
    one, two = (saelab.estimate(X, sae=one, tokens=50_000, batch_size=256) for one in (sae, [sae, sae]))
    assert two.memory["autoencoder and Adam"] == 2 * one.memory["autoencoder and Adam"]
    assert two.memory["step"] == one.memory["step"]  # their steps come one after the other


def test_what_a_model_and_its_buffer_hold(monkeypatch):
    lm = saelab.load_model(tiny.llama_model(), tokenizer=tiny.byte_tokenizer(), device="cpu")
    how = {"site": "blocks.1.hook_resid_post", "tokens": 10_000, "batch_size": 64, "buffer_tokens": 9_000}
    found = saelab.estimate(lm, [text * 200 for text in tiny.TEXTS], sae=saelab.TopK(k=2, d_sae=64), **how)
    assert found.memory["buffer"] == 9_000 * 4 * 32
    assert found.memory["model"] == sum(p.numel() * 4 for p in lm.model.parameters())
    assert found.seconds["source"] > 0


def test_a_temporary_of_a_step_is_seen(monkeypatch):
    before = saelab.estimate(X, sae=EVERY[0], tokens=10_000, batch_size=256).memory["step"]
    observe = saelab.TopK.observe
    monkeypatch.setattr(saelab.TopK, "observe", lambda *arguments: (torch.ones(10_000_000), observe(*arguments))[1])
    assert saelab.estimate(X, sae=EVERY[0], tokens=10_000, batch_size=256).memory["step"] > before + 30_000_000


def test_time_in_a_phase_counts_by_its_share(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    step = estimating.Trainer.step

    def timed(self, rows, log=True):
        clock[0] += 10.0 if self.schedule.progress(self.done) >= 0.9 else 1.0
        return step(self, rows, log)

    monkeypatch.setattr(estimating.Trainer, "step", timed)
    found = saelab.estimate(X, sae=EVERY[0], tokens=25_600, batch_size=256)
    assert found.seconds["autoencoder"] == pytest.approx(90 * 1.0 + 10 * 10.0)


def test_an_iterator_is_not_used_up():
    items = iter([X, X])
    with pytest.raises(saelab.ConfigError, match="would use them up"):
        saelab.estimate(items, sae=EVERY[0], tokens=1000, batch_size=64)
    assert len(list(items)) == 2


def test_the_arguments_are_those_of_train():
    with pytest.raises(TypeError, match="batchsize"):
        saelab.estimate(X, sae=EVERY[0], tokens=1000, batchsize=64)
    with pytest.raises(saelab.ConfigError, match="batch_size"):
        saelab.estimate(X, sae=EVERY[0], tokens=1000, batch_size=0)


def test_reading_is_timed_a_row():
    lm = saelab.load_model(tiny.llama_model(), tokenizer=tiny.byte_tokenizer(), device="cpu")
    contexts = saelab.load_corpus([text * 20 for text in tiny.TEXTS]).contexts(lm, 32)
    reader = estimating.ContextReader(lm, contexts, ["blocks.0.hook_resid_post"], batch_size=2)
    assert 0 < estimating.reading_seconds(reader) < 1


def test_of_sizes_alone():
    found = saelab.estimate(16, 64, 256, sae=saelab.TopK(k=4, d_sae=8), tokens=100_000)
    same = saelab.estimate(torch.randn(512, 16), sae=saelab.TopK(k=4, d_sae=64), tokens=100_000, batch_size=256)
    assert found.memory == same.memory and found.seconds.keys() == same.seconds.keys()


def test_what_memory_does_not_hold_is_measured_in_part_and_multiplied(monkeypatch):
    whole = saelab.estimate(16, 4096, 64, tokens=6400)
    monkeypatch.setattr(estimating, "memory_of", lambda device: 2**21)
    seen = []
    steps = estimating._steps
    monkeypatch.setattr(estimating, "_steps", lambda sae, *rest: (seen.append(sae.d_sae), steps(sae, *rest))[1])
    found = saelab.estimate(16, 4096, 64, tokens=6400)
    assert seen == [1024]
    held = "autoencoder and Adam"
    assert found.memory[held] == pytest.approx(whole.memory[held], rel=0.01)
    assert found.memory["step"] == pytest.approx(whole.memory["step"], rel=0.3)
    assert str(found).endswith("TOO MUCH") or sum(found.memory.values()) <= found.available


@pytest.mark.parametrize(("sizes", "named"), [((0, 64), "d_in"), ((16, None), "d_sae"), ((16, 64, 1.5), "batch_size")])
def test_sizes_are_whole_numbers(sizes, named):
    with pytest.raises(saelab.ConfigError, match=f"{named} is .*; it must be a whole number"):
        saelab.estimate(*sizes)


def test_sizes_of_any_integer_type_where_no_memory_is_known(monkeypatch):
    monkeypatch.setattr(estimating, "memory_of", lambda device: None)
    found = saelab.estimate(np.int64(16), np.int64(64), np.int64(64), tokens=6400)
    assert found.available is None and found.memory["autoencoder and Adam"] == 3 * 4 * (2 * 16 * 64 + 16 + 64)


@pytest.mark.parametrize("sae", [saelab.SAE(EVERY[0], 16), EVERY[:2], saelab.Transcoder(of=EVERY[0]), "TopK"])
def test_of_sizes_a_configuration_is_asked_for(sae):
    with pytest.raises(saelab.ConfigError, match="a configuration with d_sae, such as"):
        saelab.estimate(16, 64, sae=sae)


def test_what_is_sent_prints():
    found = estimating.Estimate({"autoencoder": 60.0}, {"step": 2**20}, 2**30, {"gradients": 2**30})
    assert (
        str(found)
        == "about 1.0 min (autoencoder 1.0 min), 1.0 MiB (step 1.0 MiB) of 1.0 GiB, 1.0 GiB of gradients sent"
    )
