"""Rule 5: what the user has is as before after each public call, also after an exception raised within it.

The user's models, SAE, tensors, random generators, gradient mode, default dtype and device, threads and folders, in the state
that a fresh process has and in another one (no gradients, float64, a model with a hook of the user's).
"""

import contextlib
import os
import random

import numpy as np
import pytest
import torch

import saelab
from saelab import hspace, steering
from saelab.analysis import attention, dark_matter
from saelab.analysis.dark_matter import pursuit
from tests import tiny, toy_denoiser
from tests.toy_sweep import trained

SITE, Z = "blocks.1.hook_resid_post", "blocks.2.attn.hook_z"
TEXT = "The state of the union is strong."
QUIET = {"progress": False}
PAGE = {"parquet": False, "evaluation": None, **QUIET}
RUN = {"sae": saelab.TopK(k=2, d_sae=16), "tokens": 256, "batch_size": 64, **QUIET}


class Users:
    """Everything that is the user's, and a fault in it that can be armed."""

    def __init__(self, folder):
        self.folder = folder
        self.model = tiny.llama_model()
        self.lm = saelab.load_model(self.model, tokenizer=tiny.byte_tokenizer(), device="cpu")
        self.sae, _ = trained(self.lm)
        place = self.lm.site(Z)
        facts = {"site": Z, "heads": [place.heads, place.width // place.heads], "skip_positions": 1}
        self.z_sae = saelab.SAE(saelab.TopK(k=4, d_sae=48), place.width, facts)
        self.corpus = saelab.load_corpus(
            [f"{TEXT} It was so in {1800 + i}; the people know it well." for i in range(60)]
        )
        self.x = torch.randn(2000, 32)
        self.store = saelab.harvest(self.lm, self.corpus, site=SITE, tokens=300, context_length=32, **QUIET)
        self.denoiser = toy_denoiser.denoiser()
        self.trajectory = hspace.sample(self.denoiser, n=12, steps=3, eta=1.0, **QUIET)
        self.direction = hspace.pca(self.trajectory, components=1)[0]
        self.table = np.random.default_rng(0).normal(size=(60, 12))
        (folder / "notes.txt").write_text("mine")
        self.sae.save(folder / "sae")
        self.plain = saelab.train(self.x, out=folder / "run", **RUN).sae
        self.armed = False
        for module in (self.model.model.layers[1], self.denoiser.unet.mid_block):
            module.register_forward_hook(self._fault)

    def _fault(self, *ignored):
        if self.armed:
            raise Interruption

    def state(self):
        """A description of everything, to be compared."""
        tensors = {"x": self.x, "h": self.trajectory.h, "table": torch.from_numpy(self.table)}
        for name, module in (
            ("model", self.model),
            ("sae", self.sae),
            ("z", self.z_sae),
            ("p", self.plain),
            ("unet", self.denoiser.unet),
        ):
            tensors |= {f"{name}.{key}": tensor for key, tensor in module.state_dict(keep_vars=True).items()}
        modules = [module for top in (self.model, self.denoiser.unet, self.sae) for module in top.modules()]
        return {
            "tensors": {
                name: (tensor.dtype, tensor.requires_grad, tensor.grad is None, tensor.detach().clone())
                for name, tensor in tensors.items()
            },
            "modules": [
                (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), m.forward.__name__) for m in modules
            ],
            "metadata": (dict(self.sae.metadata), dict(self.z_sae.metadata)),
            "torch": torch.get_rng_state(),
            "numpy": np.random.get_state()[1].tolist(),
            "python": random.getstate(),
            "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
            "defaults": (torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads()),
            "flags": (torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()),
            "files": sorted(str(p) for p in self.folder.rglob("*")) + os.listdir(),
        }


class Interruption(Exception):
    pass


def same(one, other):
    """Whether two descriptions are equal, NaN included."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one.nan_to_num(-1.5), other.nan_to_num(-1.5))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def within(context, user):
    with context:
        user.lm.logits(TEXT)


def sweep_of(user, **options):
    latents = (user.sae.latent_stats.density > 0).nonzero().flatten()[:1].tolist()
    grid = {"operations": ["add"], "strengths": [1.0], "prompts": ["The"], "max_new_tokens": 2, "draws": 1}
    return steering.sweep(user.lm, user.sae, latents, **grid, **options, **QUIET)


def live(user):
    return int(user.sae.latent_stats.density.argmax())


CALLS = {
    "record": lambda u, out: u.lm.record(TEXT, SITE),
    "logits": lambda u, out: u.lm.loss(TEXT),
    "intervene": lambda u, out: within(u.lm.intervene(SITE, lambda x, where: x * 2), u),
    "splice": lambda u, out: within(u.lm.splice(u.sae, error_term=True, edit=lambda codes: codes), u),
    "steer": lambda u, out: within(u.lm.steer(steering.add(u.sae, live(u), strength=1.0)), u),
    "generate": lambda u, out: u.lm.generate(TEXT, max_new_tokens=3),
    "top_latents": lambda u, out: u.lm.top_latents(TEXT, u.sae),
    "harvest": lambda u, out: saelab.harvest(u.lm, u.corpus, site=SITE, tokens=200, context_length=32, out=out, **QUIET),
    "harvest, gradients": lambda u, out: saelab.harvest(
        u.lm, u.corpus, site=SITE, tokens=200, context_length=32, gradients=True, **QUIET
    ),
    "train, model": lambda u, out: saelab.train(
        u.lm, u.corpus, site=SITE, context_length=32, buffer_tokens=1024, out=out, **RUN
    ),
    "train, tensor": lambda u, out: saelab.train(u.x, out=out, **RUN),
    "train, sae": lambda u, out: saelab.train(u.x, **{**RUN, "sae": u.sae}),
    "train, store": lambda u, out: saelab.train(u.store, **RUN),
    "train, iterable": lambda u, out: saelab.train(list(u.x.split(50)), buffer_tokens=4096, **RUN),
    "sweep": lambda u, out: saelab.sweep(u.x, [RUN["sae"]], tokens=256, batch_size=64, out=out, **QUIET),
    "evaluate": lambda u, out: saelab.evaluate(
        u.sae, u.lm, u.corpus, tokens=96, sparsity_tokens=200, context_length=32, split="all", **QUIET
    ),
    "dashboards": lambda u, out: saelab.dashboards.build(
        u.sae, u.lm, u.corpus, out / "page.html", tokens=500, latents=3, windows=9, window=8, **PAGE
    ),
    "steering.sweep": lambda u, out: sweep_of(u, out=out),
    "decompose": lambda u, out: dark_matter.decompose(u.plain, u.x),
    "pursuit": lambda u, out: pursuit.gradient_pursuit(u.plain, u.x[:20], budget=3),
    "head_attribution": lambda u, out: attention.head_attribution(u.z_sae),
    "direct_attribution": lambda u, out: attention.direct_attribution(u.z_sae, u.lm, TEXT, latent=0),
    "sae": lambda u, out: (u.sae(u.x), u.sae.encode(u.x[0]), u.sae.save(out / "sae")),
    "hspace.sample": lambda u, out: hspace.sample(u.denoiser, n=2, steps=3, eta=1.0, **QUIET),
    "hspace.edit": lambda u, out: hspace.edit(u.denoiser, u.trajectory, u.direction, **QUIET),
    "hspace.pca": lambda u, out: hspace.pca(u.trajectory, components=2),
    "hspace.jacobian": lambda u, out: hspace.jacobian(u.denoiser, u.trajectory, step=1, components=1),
    "hspace.mean_difference": lambda u, out: hspace.mean_difference(u.trajectory, torch.arange(12) % 2, positive=1),
    "hspace.boundary": lambda u, out: hspace.boundary(u.trajectory, torch.arange(12) % 2, step=1),
    "QuickSelection": lambda u, out: saelab.QuickSelection(
        n_hidden=20, epsilon=4, epochs=2, batch_size=20, random_state=0, progress=False
    ).fit(u.table),
    "load_corpus": lambda u, out: saelab.load_corpus([TEXT] * 30, seed=3),
    "load_model": lambda u, out: saelab.load_model(u.model, tokenizer=u.lm.tokenizer, device="cpu"),
    "load_denoiser": lambda u, out: saelab.load_denoiser(u.denoiser.unet),
    "SAE.load": lambda u, out: saelab.SAE.load(u.folder / "sae"),
    "load_run": lambda u, out: saelab.load_run(u.folder / "run"),
}  # fmt: skip
RUNS_A_MODEL = [
    "record", "logits", "intervene", "splice", "steer", "generate", "top_latents", "harvest", "harvest, gradients",
    "train, model", "evaluate", "dashboards", "steering.sweep", "direct_attribution",
    "hspace.sample", "hspace.edit", "hspace.jacobian",
]  # fmt: skip
READS_ROWS = ["train, tensor", "train, sae", "train, iterable", "sweep", "decompose", "pursuit", "QuickSelection"]


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAELAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Users(tmp_path_factory.mktemp("users"))


@contextlib.contextmanager
def other_state():
    """As a user may have it who has switched gradients off and computes in float64."""
    with torch.no_grad():
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def out_of(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("mode", [contextlib.nullcontext, other_state, torch.inference_mode])
@pytest.mark.parametrize("name", CALLS)
def test_a_call_leaves_everything_as_it_was(user, tmp_path, name, mode):
    out = out_of(tmp_path)
    with mode():
        before = user.state()
        CALLS[name](user, out)
        after = user.state()
    assert [key for key in before if not same(before[key], after[key])] == []


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("mode", [contextlib.nullcontext, other_state])
@pytest.mark.parametrize("name", RUNS_A_MODEL)
def test_so_does_a_call_that_fails_within_the_users_model(user, tmp_path, name, mode):
    out = out_of(tmp_path)
    with mode():
        before = user.state()
        user.armed = True
        try:
            with pytest.raises(Interruption):
                CALLS[name](user, out)
        finally:
            user.armed = False
        after = user.state()
    assert [key for key in before if not same(before[key], after[key])] == []


@pytest.mark.parametrize("mode", [contextlib.nullcontext, other_state])
@pytest.mark.parametrize("name", READS_ROWS)
def test_so_does_a_call_that_refuses_its_data(user, tmp_path, monkeypatch, name, mode):
    x, table = user.x.clone(), user.table.copy()
    x[3], table[3, 3] = float("nan"), float("nan")
    monkeypatch.setattr(user, "x", x)
    monkeypatch.setattr(user, "table", table)
    out = out_of(tmp_path)
    with mode():
        before = user.state()
        with pytest.raises(saelab.DataError):
            CALLS[name](user, out)
        after = user.state()
    assert [key for key in before if not same(before[key], after[key])] == []
