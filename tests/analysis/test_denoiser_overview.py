"""The overview holds the tables of the functions that it names, and draws them."""

import pytest
import torch

import saelab
from saelab import hspace
from saelab.analysis import denoisers
from saelab.base.errors import ConfigError
from tests import toy_denoiser as toy


def test_the_tables_are_those_of_the_functions():
    den, sites = toy.denoiser(), ["mid_block", "up_blocks.0"]
    images, labels = torch.randn(20, 1, 8, 8), torch.arange(20) % 2
    found = denoisers.overview_of(den, images, labels, sites=sites, n=3, steps=4, lags=[1, 2], tolerance=0.5, seed=1)
    run = hspace.sample(den, 3, 4, seed=1, record=("x",), progress=False)
    assert found.tables["spectrum"].equals(denoisers.jacobian_spectrum(den, run[:2]))
    assert found.tables["dynamics"].equals(denoisers.feature_dynamics(den, run, sites).table)
    reuse = denoisers.feature_reuse(den, run, sites, [1, 2])
    assert found.tables["reuse"].equals(reuse)
    assert found.tables["schedule"].set_index("site").equals(denoisers.reuse_schedule(reuse, 0.5))
    timesteps = run.timesteps.tolist()
    assert found.tables["gap"].equals(denoisers.posterior_gap(den, images, timesteps, 1))
    assert set(found.tables["probes"].site) == {*sites, "x_t"}
    lines = {name: len(found.plot(name).data) for name in ("spectrum", "dynamics", "reuse", "gap", "probes")}
    assert lines == {"spectrum": 2, "dynamics": 2, "reuse": 4, "gap": 1, "probes": 3}
    with pytest.raises(ConfigError, match="name"):
        found.plot("schedule")


def test_what_there_is_nothing_for_is_left_out():
    den = toy.denoiser()
    found = denoisers.overview_of(den, sites=["mid_block"], n=2, steps=2, lags=[1])
    assert list(found.tables) == ["spectrum", "dynamics", "reuse", "schedule"]
    with pytest.raises(ConfigError, match="cond"):
        denoisers.overview_of(saelab.load_denoiser(toy.dit()))
