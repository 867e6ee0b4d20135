"""Samplers of diffusers that remember earlier steps: each run is the scheduler's own loop, and an edit of nothing is none."""

import pytest
import torch
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

import saelab
from saelab import hspace
from saelab.base.errors import ConfigError
from saelab.models.denoising import ddim
from tests import toy_denoiser as toy
from tests.toy_hspace import unet

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy, in some of diffusers' schedulers

RUNS = [  # kind, configuration, passes of a run of diffusers' 12 steps
    (PNDMScheduler, {"skip_prk_steps": True, "steps_offset": 1}, 13),
    (PNDMScheduler, {"prediction_type": "v_prediction"}, 21),
    (DPMSolverMultistepScheduler, {}, 12),
    (DPMSolverMultistepScheduler, {"final_sigmas_type": "sigma_min", "solver_order": 3}, 12),
    (DPMSolverMultistepScheduler, {"timestep_spacing": "trailing", "prediction_type": "sample"}, 12),
    (UniPCMultistepScheduler, {"prediction_type": "v_prediction"}, 12),
    (DEISMultistepScheduler, {}, 12),
    (EulerDiscreteScheduler, {"timestep_spacing": "leading", "prediction_type": "v_prediction"}, 12),
    (EulerDiscreteScheduler, {"timestep_spacing": "trailing", "final_sigmas_type": "sigma_min"}, 12),
]
EACH = pytest.mark.parametrize(("kind", "config", "passes"), RUNS, ids=[f"{run[0].__name__}-{run[2]}" for run in RUNS])


def loop(scheduler, net, start: torch.Tensor) -> list[torch.Tensor]:
    """What the network reads at each pass of a pipeline's loop of 12 steps from x_T = `start`, and the sample."""
    scheduler = type(scheduler).from_config(scheduler.config)
    scheduler.set_timesteps(12)
    sample, read = start, []
    for i, t in enumerate(scheduler.timesteps):
        if i == 0 and isinstance(scheduler, EulerDiscreteScheduler):
            sample = start * (scheduler.sigmas[0] ** 2 + 1) ** 0.5
        read.append(scheduler.scale_model_input(sample, t))
        with torch.no_grad():
            sample = scheduler.step(net(read[-1], t).sample, t, sample).prev_sample
    return [*read, sample]


@EACH
def test_a_run_is_the_schedulers_own(kind, config, passes):
    scheduler = kind(**config)
    den = toy.denoiser(scheduler)
    run = hspace.sample(den, n=3, steps=passes, progress=False)
    expected = torch.stack(loop(scheduler, den.unet, run.start), dim=1)
    final = 1.0 if scheduler.config.get("final_sigmas_type") != "sigma_min" else float(den.alphas_cumprod[0]) ** 0.5
    ours = torch.cat(
        [run.x[:, :-1], run.x[:, -1:] / (final if isinstance(scheduler, EulerDiscreteScheduler) else 1)], dim=1
    )
    size = expected.abs().amax((2, 3, 4), keepdim=True)
    assert ours.shape == expected.shape and ((ours - expected) / size).abs().max() < 1e-6
    alone = hspace.sample(den, n=2, steps=passes, batch_size=1, record=(), progress=False)  # each batch from its start
    torch.testing.assert_close(alone.samples, run.samples[:2], rtol=1e-3, atol=1e-4)
    assert torch.equal(hspace.replay(den, run, progress=False).samples, run.samples)
    if scheduler.config.prediction_type == "epsilon":
        with torch.no_grad():
            torch.testing.assert_close(ddim(den, run.start[:2], passes), run.samples[:2])


@EACH
def test_an_edit_of_nothing_is_bitwise_nothing(kind, config, passes):
    den = toy.denoiser(kind(**config))
    run = hspace.sample(den, n=2, steps=passes, progress=False)
    direction = hspace.pca(run, components=1)[0]
    assert torch.equal(hspace.edit(den, run, direction, 0.0, progress=False).samples, run.samples)
    assert not torch.equal(hspace.edit(den, run, direction, 2.0, progress=False).samples, run.samples)


def test_what_a_solver_cannot_do_is_refused_with_the_way_out():
    den = toy.denoiser(DPMSolverMultistepScheduler())
    run = hspace.sample(den, n=2, steps=4, progress=False)
    way_out = "DDIMScheduler"
    with pytest.raises(ConfigError, match=f"adds no noise.*{way_out}"):
        hspace.sample(den, n=2, steps=4, eta=1.0)
    with pytest.raises(ConfigError, match=f"asymmetric edit.*{way_out}"):
        hspace.edit(den, run, hspace.pca(run, components=1)[0], mode="asymmetric")
    with pytest.raises(ConfigError, match=f"remembers earlier.*{way_out}"):
        hspace.invert(den, run.samples)


@pytest.mark.parametrize(
    ("kind", "config", "why"),
    [
        (EulerDiscreteScheduler, {"use_karras_sigmas": True}, "use_karras_sigmas has noise levels between"),
        (EulerDiscreteScheduler, {}, "not whole numbers"),
        (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, "draws noise"),
        (EulerAncestralDiscreteScheduler, {}, "not known here"),
    ],
    ids=["Karras", "linspace", "stochastic", "unknown"],
)
def test_schedulers_that_cannot_be_followed(kind, config, why):
    den = saelab.load_denoiser(unet(), kind(**config))
    assert den.epsilon(torch.zeros(1, 1, 8, 8), 5).shape == (1, 1, 8, 8)
    with pytest.raises(ConfigError, match=f"{why}.*DDIMScheduler"):
        hspace.sample(den, n=1, steps=15)
