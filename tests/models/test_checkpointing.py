"""Gradient checkpointing runs parts of a model again in the backward pass: interventions act there as they did."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import saelab
from saelab import steering
from saelab.base.errors import InterventionError
from saelab.models.sites import intervene
from tests import tiny
from tests.toy_steering import sae_of

SITES = ["blocks.1.hook_mlp_out", "blocks.1.hook_resid_mid", "blocks.1.hook_resid_post"]
TEXTS = ["The state of the union", "My fellow"]


@pytest.fixture(params=[True, False], ids=["reentrant", "not reentrant"])
def reentrant(request):
    return request.param


@pytest.fixture
def lm():
    return saelab.load_model(tiny.llama_model().double(), tokenizer=tiny.byte_tokenizer(), device="cpu")


def switched_on(lm, reentrant):
    model = lm.model.train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return lm


@pytest.fixture
def checkpointed(lm, reentrant):
    return switched_on(lm, reentrant)


def loss_of(lm, texts=TEXTS):
    tokens = lm.tokenize(texts)
    return (
        lm.model(input_ids=tokens.ids, attention_mask=tokens.mask.long(), use_cache=False)
        .logits[tokens.mask]
        .sin()
        .sum()
    )


def gradients(lm, context, loss=loss_of, more=()):
    lm.model.zero_grad()
    for tensor in more:
        tensor.grad = None
    with context() as receipt:
        loss(lm).backward()
    return [p.grad.clone() for p in (*lm.model.parameters(), *more)], receipt


def ways(lm, site, vector):
    sae = sae_of(lm, site)
    sae.requires_grad_(False)
    return {
        "steer": lambda: lm.steer(steering.add(vector, strength=2.0, unit="activation", site=site)),
        "intervene": lambda: lm.intervene(site, lambda x, where: x * (1 + where.positions[..., None] * vector)),
        "splice": lambda: lm.splice(sae, error_term=True, edit=lambda codes: codes.with_values(codes.values * 1.5)),
    }


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("way", ["steer", "intervene", "splice"])
def test_gradients_and_counts_are_those_without_it(lm, reentrant, site, way):
    vector = torch.linspace(-1, 1, 32, dtype=torch.float64, requires_grad=True)
    context = ways(lm, site, vector)[way]
    more = () if way == "splice" else (vector,)

    def two(lm):  # of two calls whose places differ
        return loss_of(lm) + loss_of(lm, ["abc", "abcdefgh"])

    expected, plain = gradients(lm, context, two, more)
    found, receipt = gradients(switched_on(lm, reentrant), context, two, more)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    if way == "steer":
        assert receipt.to_pandas().equals(plain.to_pandas())
    if way == "splice":
        assert (receipt.calls, receipt.replaced) == (plain.calls, plain.replaced)


def test_what_ran_outside_is_not_changed_when_it_runs_again(checkpointed):
    lm = checkpointed
    loss_of(lm).backward()
    expected = [p.grad.clone() for p in lm.model.parameters()]
    lm.model.zero_grad()
    loss = loss_of(lm)
    with lm.intervene(SITES[0], lambda x, where: 0 * x):
        loss.backward()
    assert all(torch.equal(p.grad, one) for p, one in zip(lm.model.parameters(), expected, strict=True))


def test_a_backward_pass_after_the_context_is_refused(checkpointed):
    with checkpointed.intervene(SITES[0], lambda x, where: 2 * x):
        loss = loss_of(checkpointed)
    with pytest.raises(InterventionError, match=r"call backward\(\) within the context"):
        loss.backward()


def test_without_checkpoints_or_gradients_nothing_is_asked(lm, checkpointed):
    checkpointed.model.eval()  # transformers checkpoints in training alone
    with checkpointed.intervene(SITES[0], lambda x, where: 2 * x):
        loss = loss_of(checkpointed)
    loss.backward()
    checkpointed.model.train()
    with checkpointed.intervene(SITES[0], lambda x, where: 2 * x), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PyTorch's, that nothing here asks for a gradient
        loss_of(checkpointed)


class Parts(nn.Module):
    def __init__(self, reentrant, nested=False):
        super().__init__()
        self.one, self.two, self.reentrant, self.nested = nn.Linear(3, 3), nn.Linear(3, 3), reentrant, nested

    def part(self, x):
        if self.nested:
            return self.two(checkpoint(self.one, x, use_reentrant=self.reentrant).tanh())
        return self.two(self.one(x).tanh())

    def forward(self, x):
        return checkpoint(self.part, x, use_reentrant=self.reentrant) if self.reentrant is not None else self.part(x)


def test_any_module_with_checkpoints_of_its_own(reentrant):
    torch.manual_seed(0)
    net = Parts(reentrant)
    x = torch.randn(4, 3, requires_grad=True)
    found = {}
    for net.reentrant in (None, reentrant):
        x.grad = None
        with intervene(net, "one", lambda a, where: a * where.args[0].detach() ** 2):
            net(x).sum().backward()
        found[net.reentrant] = x.grad
    torch.testing.assert_close(found[None], found[reentrant])
    nested = Parts(reentrant, nested=True)
    with pytest.raises(InterventionError, match="within others"), intervene(nested, "one", lambda a, where: 2 * a):
        nested(x)


def test_gradients_asked_for_in_inference_mode_leave_no_graph_and_no_error(lm):
    direction = steering.add(torch.ones(32).double(), strength=2.0, unit="activation", site=SITES[2])
    with torch.inference_mode(), torch.enable_grad(), lm.steer(direction):
        found = loss_of(lm)
    with lm.steer(direction):
        assert torch.equal(found, loss_of(lm))
