"""The sampler against the scheduler's own steps, replay, edits of nothing and the first-order gains of an edit."""

import dataclasses

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

import saelab
from saelab import hspace
from saelab.base.errors import ConfigError, FormatError
from saelab.hspace.sampling import clean
from saelab.models.denoising import advance, draws, steps_of
from tests import toy_denoiser as toy

SPACINGS = ("leading", "trailing", "linspace")


@pytest.fixture(scope="module")
def small() -> "saelab.Denoiser":
    return toy.denoiser()


@pytest.fixture(scope="module")
def drawn(small) -> "hspace.Trajectory":
    return hspace.sample(small, n=5, steps=6, eta=1.0, seed=3, batch_size=2, record=("h", "x", "x0", "epsilon"))


def direction(den: "saelab.Denoiser", size: float = 3.0, **changes) -> "hspace.Direction":
    vector = torch.randn(1, *den.site_shape(), generator=torch.Generator().manual_seed(5))
    vector /= vector.norm()
    return hspace.Direction(**{"vector": vector, "scale": torch.tensor([size]), "timesteps": None, "site": "mid_block",
                               "denoiser": den.digest, **changes})  # fmt: skip


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
def test_every_step_is_the_schedulers(kind, prediction, spacing):
    scheduler = kind(prediction_type=prediction, timestep_spacing=spacing, clip_sample=False)
    den = toy.denoiser(scheduler)
    for steps in (7, 12):
        for eta in (0.0, 0.5, 1.0) if kind is DDIMScheduler else (1.0,):
            trajectory = hspace.sample(den, n=2, steps=steps, eta=eta)
            expected = toy.scheduler_steps(den, trajectory)
            if kind is DDIMScheduler:
                assert torch.equal(trajectory.x[:, 1:], expected)
            size = expected.abs().amax((2, 3, 4), keepdim=True)
            assert ((trajectory.x[:, 1:] - expected) / size).abs().max() < 1e-6


def test_a_scheduler_that_does_not_end_at_a_clean_image():
    den = toy.denoiser(DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1))
    trajectory = hspace.sample(den, n=2, steps=10)
    torch.testing.assert_close(trajectory.x[:, 1:], toy.scheduler_steps(den, trajectory), atol=1e-6, rtol=1e-6)
    assert int(trajectory.timesteps[-1]) == 1


def test_readings(small, drawn):
    """What is recorded is what the network saw and gave, at every step."""
    assert torch.equal(drawn.x[:, 0], drawn.start) and torch.equal(drawn.x[:, -1], drawn.samples)
    for i, t in enumerate(drawn.timesteps.tolist()):
        x = drawn.x[:2, i]
        assert torch.equal(drawn.h[:2, i], small.record(x, t))
        with torch.no_grad():
            assert torch.equal(drawn.epsilon[:2, i], small.epsilon(x, t))
            torch.testing.assert_close(drawn.x0[:2, i], small.x0(x, t), rtol=1e-4, atol=1e-5)
    bare = hspace.sample(small, n=5, steps=6, eta=1.0, seed=3, batch_size=2, record=())
    assert torch.equal(bare.samples, drawn.samples) and bare.recorded == ()


def test_replay_from_a_file_is_bitwise(small, drawn, tmp_path):
    drawn.save(tmp_path / "t.safetensors")
    loaded = hspace.Trajectory.load(tmp_path / "t.safetensors")
    again = hspace.replay(small, loaded)
    for name in ("samples", "h", "x", "x0", "epsilon"):
        assert torch.equal(getattr(again, name), getattr(drawn, name))
    torch.testing.assert_close(loaded.h, drawn.h, rtol=1e-3, atol=1e-4)  # half precision
    other = toy.denoiser(DDPMScheduler(beta_schedule="scaled_linear", clip_sample=False))
    with pytest.raises(ConfigError, match="load the one that made it"):
        hspace.replay(other, loaded)
    with open(tmp_path / "t.safetensors", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(FormatError, match="cannot be read"):
        hspace.Trajectory.load(tmp_path / "t.safetensors")


def test_values_that_half_precision_cannot_hold_are_kept(small, drawn, tmp_path):
    large = dataclasses.replace(drawn, h=1e6 * drawn.h)
    large.save(tmp_path / "large.safetensors")
    assert torch.equal(hspace.Trajectory.load(tmp_path / "large.safetensors").h, large.h)


def test_a_sample_does_not_depend_on_how_many_there_are(small, drawn):
    fewer = hspace.sample(small, n=2, steps=6, eta=1.0, seed=3, batch_size=2)
    assert torch.equal(fewer.samples, drawn.samples[:2]) and torch.equal(fewer.noise, drawn.noise[:2])
    torch.testing.assert_close(hspace.replay(small, drawn[1:4]).samples, drawn.samples[1:4], rtol=1e-5, atol=1e-5)


def test_streams_are_independent(small):
    """x_T and the noise come from different streams (equal ones break sampling), and so do samples and seeds."""
    parts = [draws(small, 2, seed, use, 400).flatten(1) for seed in (0, 1) for use in ("start", "noise")]
    correlations = torch.corrcoef(torch.cat(parts)) - torch.eye(8)
    assert correlations.abs().max() < 0.03
    one = hspace.sample(small, n=2, steps=2, eta=1.0, seed=1)
    assert torch.equal(one.start[:, None], draws(small, 2, 1, "start", 1))
    assert torch.equal(one.noise, draws(small, 2, 1, "noise", 400)[:, :2])


def test_quality_boosting(small):
    boosted = hspace.sample(small, n=1, steps=10, boost_below=300)
    assert boosted.eta.tolist() == [0.0] * 7 + [1.0] * 3  # 900 to 300, then 200, 100, 0
    plain = hspace.sample(small, n=1, steps=10)
    assert torch.equal(boosted.x[:, :8], plain.x[:, :8]) and not torch.equal(boosted.samples, plain.samples)


@pytest.mark.parametrize("mode", ["symmetric", "asymmetric"])
def test_an_edit_of_nothing_is_bitwise_nothing(small, drawn, mode):
    for strength, window in ((0.0, None), (5.0, (200, 100))):
        edited = hspace.edit(small, drawn, direction(small), strength, mode=mode, window=window)
        untouched = 6 if strength == 0 else int((drawn.timesteps > 200).sum())
        assert torch.equal(edited.x[:, : untouched + 1], drawn.x[:, : untouched + 1])
        assert torch.equal(edited.samples, drawn.samples) == (strength == 0)


def test_an_edit_replays_and_its_h_is_from_before(small, drawn, tmp_path):
    edited = hspace.edit(small, drawn, direction(small), torch.arange(5.0), window=(900, 200), record=("h", "x"))
    torch.testing.assert_close(edited.h[:, 0], drawn.h[:, 0])
    edited.save(tmp_path / "e.safetensors")
    again = hspace.replay(small, hspace.Trajectory.load(tmp_path / "e.safetensors"))
    assert torch.equal(again.samples, edited.samples) and torch.equal(again.h, edited.h)
    how = hspace.Edit(direction(small), torch.arange(5.0), window=(900, 200))
    fresh = hspace.sample(small, 5, 6, 1.0, 3, how, batch_size=2)
    assert torch.equal(fresh.samples, edited.samples)
    assert torch.equal(edited.samples[0], drawn.samples[0])  # strength 0
    assert torch.equal(hspace.replay(small, edited[2:4]).samples, edited.samples[2:4])


def test_strengths_masks_and_several_directions(small, drawn):
    one, other = direction(small), direction(small, size=1.0)
    both = hspace.edit(small, drawn, [one, other], [2.0, torch.full((5,), 1.0)])
    single = hspace.edit(small, drawn, one, 2.0 + 1.0 / 3.0)  # the same vector: 2 * 3 + 1 * 1
    torch.testing.assert_close(both.samples, single.samples, rtol=1e-4, atol=1e-5)
    everywhere = hspace.edit(small, drawn, one, mask=torch.ones(4, 4))
    assert torch.equal(everywhere.samples, hspace.edit(small, drawn, one).samples)
    mask = torch.zeros(5, 4, 4)
    mask[3] = 1
    third = hspace.edit(small, drawn, one, mask=mask)
    assert torch.equal(third.samples[:3], drawn.samples[:3]) and not torch.equal(third.samples[3], drawn.samples[3])


def test_refused_edits(small, drawn):
    other = toy.denoiser(DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False))
    for changes, reason in (
        ({"denoiser": other.digest}, "make it again"),
        ({"site": "down_blocks.0"}, "one site for both"),
        ({"vector": torch.ones(1, 16, 2, 2)}, r"h is \[16, 4, 4\]"),
    ):
        with pytest.raises(ConfigError, match=reason):
            hspace.edit(small, drawn, direction(small, **changes))
    good = direction(small)
    for arguments, reason in (
        ({"strength": torch.ones(4)}, "one a sample"),
        ({"strength": [1.0, 2.0]}, "2 strengths for 1 directions"),
        ({"mode": "replace"}, "neither of symmetric and asymmetric"),
        ({"window": (100, 500)}, r"\(high, low\)"),
        ({"window": (99, 98)}, "widen it"),
        ({"mask": torch.ones(8, 8)}, r"give \[4, 4\]"),
        ({"record": ("g",)}, "cannot record g"),
    ):
        with pytest.raises(ConfigError, match=reason):
            hspace.edit(small, drawn, good, **arguments)
    with pytest.raises(ConfigError, match="eta is 2"):
        hspace.sample(small, n=1, eta=2.0)
    with pytest.raises(ConfigError, match="n is 0"):
        hspace.sample(small, n=0)


@given(steps=st.integers(2, 300), eta=st.floats(0, 1), step=st.integers(0, 299), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_gains_are_derivatives_of_the_update(steps, eta, step, seed):
    """d x' / d epsilon by finite differences, in both modes, at any step of any schedule."""
    plan = steps_of(toy.denoiser(), steps, eta)
    step %= steps
    x, epsilon, change, noise = torch.randn(4, 1, 1, 4, 4, generator=torch.Generator().manual_seed(seed)).double()
    before = advance(plan, step, clean(plan, step, x, epsilon), epsilon, noise)
    seen = epsilon + 1e-3 * change
    for mode, plain in (("symmetric", seen), ("asymmetric", epsilon)):
        after = advance(plan, step, clean(plan, step, x, seen), plain, noise)
        gain = float(plan.gain(mode)[step])
        torch.testing.assert_close((after - before) / 1e-3, gain * change, rtol=1e-3, atol=1e-9)


def test_gains_through_the_network():
    """A small edit at one step alone changes the next x by gain * (change of epsilon), to 1e-3."""
    den = toy.denoiser().to(torch.float64)
    start = hspace.sample(den, n=2, steps=12, eta=0.3, record=("x", "epsilon"))
    for mode in ("symmetric", "asymmetric"):
        for i, t in list(enumerate(start.timesteps.tolist()))[::4]:
            vector = torch.ones(1, 16, 4, 4, dtype=torch.float64) / 16
            one = hspace.Direction(vector, torch.ones(1), None, "mid_block", den.digest)
            edited = hspace.edit(den, start, one, 1e-4, mode=mode, window=(t, t))
            moved = edited.x[:, i + 1] - start.x[:, i + 1]
            expected = float(steps_of(den, 12, 0.3).gain(mode)[i]) * (edited.epsilon[:, i] - start.epsilon[:, i])
            assert moved.abs().max() > 0 and (moved - expected).abs().max() < 1e-3 * moved.abs().max()


@pytest.mark.parametrize("steps", [4, 10, 50, 250, 1000])
def test_symmetric_gains_add_up_to_the_first_noise_level(steps):
    """In y = x / sqrt(a), at eta 0: each is the fall of sqrt((1 - a) / a), so that the sum does not depend on the steps."""
    plan = steps_of(toy.denoiser(), steps)
    level = ((1 - plan.alpha) / plan.alpha).sqrt()
    in_y = plan.gain("symmetric") / plan.alpha_next.sqrt()
    assert abs(float(in_y.sum() + level[0])) < 1e-12 * float(level[0])


def test_published_gains():
    """The linear schedule at t = 500 (h-space.md's table): symmetric at eta 0 and 1, asymmetric."""
    for steps, expected in {
        1000: (-0.0053, -0.0105, -0.965),
        50: (-0.109, -0.207, -1.06),
        10: (-0.617, -0.982, -1.51),
    }.items():
        at = steps_of(toy.denoiser(), steps).timesteps.tolist().index(500)
        found = [steps_of(toy.denoiser(), steps, eta).gain(mode)[at]
                 for eta, mode in ((0.0, "symmetric"), (1.0, "symmetric"), (0.0, "asymmetric"))]  # fmt: skip
        torch.testing.assert_close(torch.stack(found).float(), torch.tensor(expected), rtol=1e-2, atol=1e-4)


def test_normalised_gain_keeps_an_asymmetric_effect(small):
    """Asyrp's effect grows with the steps; divided by their number it stays within a third, undivided it doubles."""
    one, sizes = direction(small), {}
    for normalize in (False, True):
        for steps in (8, 16):
            plain = hspace.sample(small, n=2, steps=steps, record=())
            edited = hspace.edit(small, plain, one, 0.01, mode="asymmetric", normalize_gain=normalize)
            sizes[normalize, steps] = float((edited.samples - plain.samples).norm())
    assert 0.75 < sizes[True, 16] / sizes[True, 8] < 1.33
    assert 1.5 < sizes[False, 16] / sizes[False, 8] < 2.67
