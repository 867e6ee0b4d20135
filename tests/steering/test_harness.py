"""The file for lm-evaluation-harness, applied as its `steered` model does it (0.4.13), in hooks of our own."""

import pytest
import torch

import saelab
from saelab import ConfigError, SiteError, steering
from saelab.steering.harness import EVERYWHERE
from tests.tiny import byte_tokenizer, gpt2_model, llama_model

SITE = "blocks.1.hook_resid_post"
MODELS = {"llama": (llama_model, "layers.1", 32), "gpt2": (gpt2_model, "h.1", 24)}


@pytest.fixture(params=MODELS)
def case(request):
    make, hook, width = MODELS[request.param]
    lm = saelab.load_model(make(), byte_tokenizer())
    directions = [steering.Direction(torch.randn(width), site=SITE, residual_norm=3.0, mean=0.7) for _ in range(2)]
    return lm, hook, directions


def as_the_harness(lm, plan, ids):
    """Logits with what `hf_steered.py` does to the output of each module."""

    def hook(entry):
        vector, size = entry["steering_vector"], entry["steering_coefficient"]

        def fn(module, args, output):
            x = output[0] if isinstance(output, tuple) else output
            if entry["action"] == "add":
                x = x + vector * size
            else:
                unit = vector / vector.norm()
                x = x + unit * (size - (x * unit).sum(-1, keepdim=True))
            return (x, *output[1:]) if isinstance(output, tuple) else x

        return fn

    modules = dict(lm.model.base_model.named_modules())
    handles = [modules[name].register_forward_hook(hook(entry)) for name, entry in plan.items()]
    try:
        return lm.logits(ids)
    finally:
        [handle.remove() for handle in handles]


@pytest.mark.parametrize("kind", ["add", "two", "clamp", "project_out", "ablate", "mean"])
def test_the_harness_does_what_steer_does(case, tmp_path, kind):
    lm, hook, (one, two) = case
    options = {"scope": EVERYWHERE}
    operations = {
        "add": [steering.add(one, strength=2.0, **options)],
        "two": [
            steering.add(one, strength=2.0, **options),
            steering.add(two, strength=-1.0, unit="activation", **options),
        ],
        "clamp": [steering.clamp(one, strength=1.5, **options)],
        "project_out": [steering.project_out(one, **options)],
        "ablate": [steering.ablate(one, **options)],
        "mean": [steering.ablate(one, to="mean", **options)],
    }[kind]
    plan = torch.load(steering.to_lm_eval(lm, operations, tmp_path / "steer.pt"), weights_only=True)
    assert list(plan) == [hook]
    ids = torch.randint(0, 250, (2, 9))
    with lm.steer(*operations):
        expected = lm.logits(ids)
    torch.testing.assert_close(as_the_harness(lm, plan, ids), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(lm.logits(ids), expected, atol=1e-3)


def test_what_the_harness_cannot_do_is_named(case, tmp_path):
    lm, _, (one, two) = case
    everywhere = {"scope": EVERYWHERE}
    sae = saelab.SAE(saelab.TopK(k=2, d_sae=40), len(one.vector), {"site": SITE})
    for operations, match in (
        (steering.add(one, strength=1.0), "leaves positions out"),
        (steering.scale(one, strength=2.0, **everywhere), "cannot do scale"),
        (steering.clamp(sae, 3, strength=2.0, unit="activation", **everywhere), "cannot do clamp"),
        (
            [steering.project_out(one, **everywhere), steering.add(two, strength=1.0, **everywhere)],
            "only additions add up",
        ),
        (
            steering.add(one.vector, strength=1.0, unit="activation", site="blocks.1.attn.hook_z", **everywhere),
            "no output",
        ),
        ([], "at least one operation"),
    ):
        with pytest.raises(ConfigError, match=match):
            steering.to_lm_eval(lm, operations, tmp_path / "steer.pt")
    with pytest.raises(SiteError, match="3 wide"):
        narrow = steering.add(torch.ones(3), strength=1.0, unit="activation", site=SITE, **everywhere)
        steering.to_lm_eval(lm, narrow, tmp_path / "steer.pt")
    with pytest.raises(ConfigError, match=r"'\*.pt'"):
        steering.to_lm_eval(lm, steering.add(one, strength=1.0, **everywhere), tmp_path / "steer.csv")
    assert not list(tmp_path.iterdir())
