"""`load_denoiser` and the two verbs on a U-Net: what is wrapped, converted, read, replaced and refused."""

import copy
import warnings

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
)

import saelab
from saelab import hspace
from saelab.base.errors import ConfigError, DataError, InterventionError, SiteError
from saelab.models import diffusion
from tests import toy_denoiser as toy
from tests.toy_hspace import unet as made


@pytest.fixture(scope="module")
def small() -> "saelab.Denoiser":
    return toy.denoiser()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 1, 8, 8)


@pytest.mark.parametrize("prediction", diffusion.PREDICTIONS)
def test_epsilon_and_x0_explain_x(prediction, x):
    """x = sqrt(a) x0 + sqrt(1 - a) e, whatever the network predicts, at a timestep for each sample."""
    den = toy.denoiser(DDIMScheduler(prediction_type=prediction, clip_sample=False))
    t = torch.tensor([3, 500, 990])
    a = den.alphas_cumprod[t].float().view(-1, 1, 1, 1)
    with torch.no_grad():
        out, epsilon, x0 = den.unet(x, t).sample, den.epsilon(x, t), den.x0(x, t)
    torch.testing.assert_close(a.sqrt() * x0 + (1 - a).sqrt() * epsilon, x, atol=1e-5, rtol=1e-5)
    v = a.sqrt() * epsilon - (1 - a).sqrt() * x0
    predicted = {"epsilon": epsilon, "sample": x0, "v_prediction": v}[prediction]
    torch.testing.assert_close(predicted, out, atol=1e-4, rtol=1e-4)


def test_a_learned_variance_is_left_out(x):
    den = toy.denoiser(out_channels=2)
    with torch.no_grad():
        assert torch.equal(den.epsilon(x, 7), den.unet(x, 7).sample[:, :1])


def test_the_users_objects_are_untouched():
    unet, scheduler = made(), DDIMScheduler(clip_sample=True)
    scheduler.set_timesteps(13)
    state, config = copy.deepcopy(unet.state_dict()), dict(scheduler.config)
    random = torch.get_rng_state()
    with pytest.warns(UserWarning, match="clip_sample=False"):
        den = saelab.load_denoiser(unet, scheduler)
    trajectory = hspace.sample(den, n=2, steps=3, eta=1.0)
    hspace.invert(den, trajectory.samples, steps=3)
    assert den.unet is unet and den.scheduler is not scheduler and not den.scheduler.config.clip_sample
    assert dict(scheduler.config) == config and scheduler.num_inference_steps == 13
    assert all(torch.equal(value, state[name]) for name, value in unet.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())


def test_folders_and_pipelines(tmp_path, x):
    unet, scheduler = made(), DDPMScheduler(clip_sample=False, beta_schedule="squaredcos_cap_v2")
    DDIMPipeline(unet, DDIMScheduler.from_config(scheduler.config)).save_pretrained(tmp_path / "pipeline")
    unet.save_pretrained(tmp_path / "unet")
    around = saelab.load_denoiser(DDIMPipeline(unet, DDIMScheduler.from_config(scheduler.config)))
    from_pipeline = saelab.load_denoiser(tmp_path / "pipeline")
    from_unet = saelab.load_denoiser(str(tmp_path / "unet"), scheduler)
    for den in (around, from_pipeline, from_unet):
        assert torch.equal(den.epsilon(x, 40), around.epsilon(x, 40))
        assert torch.equal(den.alphas_cumprod.float(), scheduler.alphas_cumprod)
    assert around.digest == from_pipeline.digest == from_unet.digest
    assert saelab.load_denoiser(unet, DDIMScheduler(clip_sample=False)).digest != around.digest


def test_the_digest_tells_what_no_weight_does():
    coarse, fine = toy.denoiser(norm_num_groups=2), toy.denoiser(norm_num_groups=4)
    fine.unet.load_state_dict(coarse.unet.state_dict())
    assert coarse.digest != fine.digest


def test_conditional_unets(x):
    den = saelab.load_denoiser(toy.conditional_unet(), DDIMScheduler(clip_sample=False))
    cond = torch.randn(3, 5, 12)
    with torch.no_grad():
        assert torch.equal(den.epsilon(x, 9, cond), den.unet(x, 9, encoder_hidden_states=cond).sample)
        assert not torch.equal(den.epsilon(x, 9, cond[:1]), den.epsilon(x, 9, cond))
    assert den.site_shape() == (16, 4, 4)
    trajectory = hspace.sample(den, n=3, steps=2, cond=cond)
    assert torch.equal(hspace.replay(den, trajectory).samples, trajectory.samples)
    with pytest.raises(ConfigError, match="needs cond"):
        den.epsilon(x, 9)
    with pytest.raises(DataError, match="2 rows for 3"):
        den.epsilon(x, 9, cond[:2])
    labelled = toy.denoiser(num_class_embeds=4)
    assert labelled.record(x, 9, cond=torch.tensor([0, 1, 3])).shape == (3, 16, 4, 4)
    with pytest.raises(ConfigError, match="labels"):
        labelled.epsilon(x, 9)
    with pytest.raises(ConfigError, match="not conditioned"):
        toy.denoiser().epsilon(x, 9, cond)


def test_sites_are_in_the_order_of_the_pass(small, x):
    table = small.sites()
    assert {"before", "after", "middle"} <= set(table["name"])
    ran: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in small.unet.named_modules()
    ]
    small.unet(x, 3)
    for hook in hooks:
        hook.remove()
    outputs = [path for path in table["module"] if not path.endswith(".input")]
    assert sorted(outputs, key=ran.index) == outputs
    first = table.set_index("name").loc["after"]
    assert (first["width"], first["height"], first["kind"]) == (16, 4, "block")


def test_record_and_intervene(small, x):
    found = small.record(x, 5, ["before", "after", "down_blocks.0.resnets.0"])
    assert {name: h.shape[1:] for name, h in found.items()} == {
        "before": (16, 4, 4), "after": (16, 4, 4), "down_blocks.0.resnets.0": (8, 8, 8)}  # fmt: skip
    with torch.no_grad():
        plain = small.epsilon(x, 5)
        with small.intervene("after", lambda h, where: h + 0 * where.timesteps.view(-1, 1, 1, 1)):
            assert torch.equal(small.epsilon(x, 5), plain)
        seen = []
        with small.intervene("after", lambda h, where: seen.append(where.timesteps.tolist()) or torch.zeros_like(h)):
            small.epsilon(x, torch.tensor([1, 2, 3]))
            assert torch.equal(small.record(x, 5), torch.zeros(3, 16, 4, 4))
        assert seen == [[1, 2, 3], [5, 5, 5]]
        # the skip of the last down block is the same tensor: only the middle block may see a change
        with small.intervene("before", lambda h, where: 2 * h):
            changed = small.record(x, 5, ["down_blocks.1", "mid_block"])
        assert torch.equal(changed["down_blocks.1"], small.record(x, 5, "down_blocks.1"))
        assert not torch.equal(changed["mid_block"], found["after"])
        assert torch.equal(small.epsilon(x, 5), plain)


def test_gradients_follow_the_caller(small, x):
    small.epsilon(x.requires_grad_(), 5).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert not small.record(x, 5).requires_grad


def test_refusals(small, x):
    with pytest.raises(SiteError, match="near it: .*mid_block"):
        small.record(x, 5, "mid_blok")
    with pytest.raises(InterventionError, match="keep the shape"), small.intervene("after", lambda h, where: h[:1]):
        small.epsilon(x, 5)
    with pytest.raises(DataError, match="from 0 to 999"):
        small.epsilon(x, 1000)
    with pytest.raises(DataError, match="whole numbers"):
        small.epsilon(x, torch.tensor(0.5))
    with pytest.raises(ConfigError, match="digits-unet"):
        saelab.load_denoiser("digits-unit")
    with pytest.raises(ConfigError, match="no denoiser"):
        saelab.load_denoiser(torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="does not come with saelab"):
        small.classifier()


def test_no_middle_block(x):
    den = toy.denoiser(mid_block_type=None)
    with pytest.raises(SiteError, match="no middle block.*down_blocks.1"):
        hspace.sample(den, n=1, steps=2)
    assert hspace.sample(den, n=1, steps=2, site="down_blocks.1").h.shape == (1, 2, 16, 4, 4)
    assert "after" not in set(den.sites()["name"])


def test_gradient_checkpointing(x):
    unet = made()
    unet.enable_gradient_checkpointing()
    with pytest.raises(ConfigError, match="gradient checkpointing"):
        saelab.load_denoiser(unet)
    unet.disable_gradient_checkpointing()
    den = saelab.load_denoiser(unet)
    unet.enable_gradient_checkpointing()
    with pytest.raises(ConfigError, match="gradient checkpointing"):
        den.record(x, 4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy, in some of diffusers' schedulers
def test_schedulers():
    unet = made()
    with pytest.raises(ConfigError, match="alphas_cumprod"):
        saelab.load_denoiser(unet, FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ConfigError, match="does not fit.*known are epsilon"):
        saelab.load_denoiser(unet, DPMSolverMultistepScheduler(prediction_type="flow_prediction"))
    with pytest.raises(ConfigError, match="not whole numbers"):
        saelab.load_denoiser(unet, EulerDiscreteScheduler(timestep_spacing="linspace")).timesteps(15)
    solvers = (PNDMScheduler(skip_prk_steps=True), DPMSolverMultistepScheduler())
    for scheduler in (*solvers, EulerDiscreteScheduler(timestep_spacing="leading")):
        assert len(saelab.load_denoiser(unet, scheduler).timesteps(10)) == 10
    with pytest.raises(ConfigError, match="1001 steps"):
        saelab.load_denoiser(unet).timesteps(1001)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saelab.load_denoiser(unet)  # nothing was clipped: nothing to say


def test_a_copy_in_double_precision(small, x):
    double = small.to(torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(double.epsilon(x.double(), 5).float(), small.epsilon(x, 5))
    assert small.dtype == torch.float32 and double.digest == small.digest


@pytest.mark.parametrize("name", diffusion.bundled_names())
def test_bundled(name):
    """The classifier knows the held-out images, and samples look like digits to it."""
    den = saelab.load_denoiser(name)
    images, labels = den.examples()
    assert images.shape[1:] == den.sample_shape and -1 <= images.min() < images.max() <= 1
    net = den.classifier()
    with torch.no_grad():
        assert (net(images).argmax(1) == labels).double().mean() > 0.95
        samples = hspace.sample(den, n=32, steps=10, record=(), progress=False).samples
        assert net(samples).softmax(1).amax(1).mean() > 0.75


def test_bundled_files_are_small():
    files = [file for file in diffusion.BUNDLED.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 8e6


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 60},
         "added_cond_kwargs"),
        ({"in_channels": 9, "out_channels": 4}, "reads 9 channels and gives 4"),
        ({"in_channels": 8, "out_channels": 4}, "reads 8 channels and gives 4"),
        ({"class_embed_type": "projection", "projection_class_embeddings_input_dim": 12}, "class embeddings"),
        ({"time_cond_proj_dim": 16}, "guidance scale"),
        ({"encoder_hid_dim": 6, "encoder_hid_dim_type": "image_proj"}, "image_proj"),
    ],
    ids=["SDXL", "inpainting", "image to image", "unCLIP", "guided in one pass", "IP-Adapter"],
)  # fmt: skip
def test_a_unet_that_needs_more_than_an_image_is_refused_by_name(more, why):
    base = dict(toy.conditional_unet().config)
    unet = UNet2DConditionModel(**{k: v for k, v in base.items() if not k.startswith("_")} | more)
    with pytest.raises(ConfigError, match=why) as caught:
        saelab.load_denoiser(unet)
    assert "saelab.models.sites.record" in str(caught.value)


def test_a_digest_that_was_saved_with_the_defaults_of_the_configuration_is_known(small):
    config = {name: value for name, value in small.unet.config.items() if not name.startswith("_")}
    before = small._digest(config)
    assert before != small.digest and small.made(before) and small.made(small.digest) and not small.made("0" * 64)


def test_a_compiled_unet_is_the_unet_inside(small, x):
    around = saelab.load_denoiser(torch.compile(small.unet, backend="eager"), small.scheduler)
    assert around.digest == small.digest and torch.equal(around.record(x, 300), small.record(x, 300))
