"""Counts, numbers, seeds, dtypes and devices as users write them: like their plain equivalents, or refused by name."""

import numpy as np
import pytest
import torch

import saelab
from saelab.base import checks
from saelab.base.errors import ConfigError

X = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
RUN = {"sae": saelab.TopK(k=2, d_sae=16), "tokens": 256, "batch_size": 64, "progress": False}


@pytest.mark.parametrize("value", [np.int64(3), np.uint8(3), torch.tensor(3), 3])
def test_every_integer_type_is_a_count(value):
    found = checks.count("k", value)
    assert found == 3 and type(found) is int


@pytest.mark.parametrize("value", [0, -1, 1.5, "3", None, True, np.True_, torch.tensor(True), torch.tensor(3.0), [3]])
def test_what_is_no_count_is_refused(value):
    with pytest.raises(ConfigError, match="k is .*whole number, 1 or more"):
        checks.count("k", value)


def test_a_whole_float_is_refused_with_the_way_out():
    with pytest.raises(ConfigError, match=r"tokens is 1000000.0.*write int\(1000000.0\)"):
        checks.count("tokens", 1e6)


def test_counts_are_kept_once_and_in_order():
    assert checks.counts("latents", np.array([3, 1, 3]), least=0) == [3, 1]
    assert checks.counts("latents", torch.tensor(7)) == [7]
    with pytest.raises(ConfigError, match="one of latents is 9.*from 0 to 8"):
        checks.counts("latents", [1, 9], least=0, most=8)


@pytest.mark.parametrize("value", [np.float32(0.5), 0.5, torch.tensor(0.5)])
def test_every_real_type_is_a_number(value):
    found = checks.number("lr", value, above=0)
    assert found == 0.5 and type(found) is float


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 0.0, "1", None, True, 1j])
def test_what_is_no_positive_number_is_refused(value):
    with pytest.raises(ConfigError, match="lr is .*finite number, above 0"):
        checks.number("lr", value, above=0)


def test_bounds_of_numbers_may_be_reached_or_not():
    assert checks.number("cap", 1, above=0, most=1) == 1 and checks.number("b", 0, least=0, below=1) == 0
    for bad, bounds in ((1, {"below": 1}), (1.5, {"most": 1}), (-0.5, {"least": 0}), (0, {"above": 0})):
        with pytest.raises(ConfigError):
            checks.number("x", bad, **bounds)


@pytest.mark.parametrize("value", [1.5, -1, 2**32, "0", None])
def test_seeds_that_no_generator_takes_are_refused(value):
    with pytest.raises(ConfigError, match="seed is"):
        checks.seed(value)


@pytest.mark.parametrize("value", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_dtypes_by_name(value):
    assert checks.dtype_of(value) is torch.bfloat16


def test_other_dtypes_are_refused_with_the_list():
    assert checks.dtype_of(np.float32) is torch.float32
    for bad in ("float", torch.int64, "int8", 32):
        with pytest.raises(ConfigError, match="float32, bfloat16, float16, float64"):
            checks.dtype_of(bad)


def test_devices_that_are_not_there_are_refused_with_those_that_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert checks.device_of("auto").type == "cuda" and checks.device_of("cuda:1").index == 1
    assert checks.device_of(torch.device("cpu")).type == "cpu"
    for bad in ("gpu0", "cuda:2", "meta", 1.5, None):
        with pytest.raises(ConfigError, match=r"cpu, cuda:0, cuda:1"):
            checks.device_of(bad)


@pytest.mark.parametrize(
    "wrong",
    [
        {"tokens": 1e6}, {"tokens": True}, {"batch_size": 0}, {"lr": float("nan")}, {"lr": -1.0}, {"seed": 1.5},
        {"seed": -1}, {"device": "gpu0"}, {"dtype": "float31"}, {"max_norm": float("nan")}, {"log_every": 0},
        {"checkpoint_every": 2.5}, {"skip_positions": -1}, {"buffer_tokens": 0}, {"resume": "always"},
    ],
)  # fmt: skip
def test_train_and_sweep_refuse_what_cannot_be(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        saelab.train(X, **{**RUN, **wrong})
    others = {name: value for name, value in {**RUN, **wrong}.items() if name != "sae"}
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        saelab.sweep(X, [RUN["sae"]], **others)


def test_numpy_numbers_and_names_train_to_the_bits_of_plain_ones(tmp_path):
    plain = saelab.train(X, **RUN, lr=1e-3, seed=3, dtype=torch.float32, out=tmp_path / "run")
    others = {"tokens": np.int64(256), "batch_size": np.int32(64), "lr": np.float64(1e-3), "seed": np.int64(3)}
    sae = saelab.TopK(k=np.int64(2), d_sae=np.int64(16))
    again = saelab.train(X, sae=sae, progress=False, dtype="float32", device="cpu", out=tmp_path / "run", **others)
    assert again.path == plain.path and torch.equal(again.sae.W_dec, plain.sae.W_dec)  # the same fingerprint, in JSON
    assert type(sae.k) is int and sae == RUN["sae"]


@pytest.mark.parametrize(
    "made",
    [
        lambda: saelab.TopK(k=2.0, d_sae=16), lambda: saelab.TopK(k=17, d_sae=16), lambda: saelab.TopK(k=2, d_sae=True),
        lambda: saelab.TopK(k=2, d_sae=16, aux_coefficient=float("nan")), lambda: saelab.TopK(k=2, d_sae=16, aux_k=0),
        lambda: saelab.MutualChoice(k=2, d_sae=16, tau=float("inf")), lambda: saelab.ReLU(l1=float("nan"), d_sae=16),
        lambda: saelab.ReLU(l1=1, d_sae=16, betas=(0.9,)), lambda: saelab.JumpReLU(target_l0=float("nan"), d_sae=16),
        lambda: saelab.JumpReLU(target_l0=2, d_sae=16, betas=(2.0, 0.9)), lambda: saelab.Gated(l1="1", d_sae=16),
        lambda: saelab.FeatureChoice(k=2, d_sae=16, seed=0.5), lambda: saelab.FeatureChoice(k=2, d_sae=16, cap=0),
        lambda: saelab.Matryoshka(k=2, d_sae=16, groups=(float("nan"), 1)), lambda: saelab.GradientTopK(k=2, d_sae=16, beta=-1),
    ],
)  # fmt: skip
def test_architectures_refuse_what_cannot_be(made):
    with pytest.raises(ConfigError):
        made()


def test_one_logger_needs_no_list():
    class Counting:
        rows, closed = 0, False

        def log(self, row):
            self.rows += 1

        def close(self):
            self.closed = True

    logger = Counting()
    saelab.train(X, **RUN, loggers=logger)
    assert logger.rows and logger.closed
    with pytest.raises(ConfigError, match="unknown logger 'wand'"):
        saelab.train(X, **RUN, loggers="wand")
