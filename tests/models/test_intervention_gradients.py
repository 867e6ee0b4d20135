"""What is right in value is right in derivative: finite differences in float64 through every way to change a pass."""

import pytest
import torch
from torch import nn

import saelab
from saelab import steering
from saelab.base.errors import ConfigError
from saelab.models.hooks import plus
from saelab.models.sites import intervene
from saelab.steering import Direction
from tests import tiny
from tests.toy_steering import busy, sae_of

SITES = ["blocks.1.hook_resid_post", "blocks.1.hook_resid_mid"]  # the second is written into the tensor itself
TEXTS = ["The state of", "My fellow"]


@pytest.fixture(scope="module", params=SITES)
def site(request):
    return request.param


@pytest.fixture(scope="module")
def lm():
    # a Llama's norms are computed in float32, too coarse for differences
    return saelab.load_model(tiny.gpt2_model().double(), tokenizer=tiny.byte_tokenizer(), device="cpu")


@pytest.fixture(scope="module")
def sae(lm, site):
    return sae_of(lm, site)


def loss_of(lm):
    tokens = lm.tokenize(TEXTS)
    return lm.model(input_ids=tokens.ids, attention_mask=tokens.mask.long()).logits[tokens.mask].sin().sum()


def check(loss, tensors, step=1e-6):
    """Autograd's gradients of a loss with respect to each tensor are its slopes along a direction of each."""
    generator = torch.Generator().manual_seed(5)
    for tensor, gradient in zip(tensors, torch.autograd.grad(loss(), tensors), strict=True):
        along = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        before, values = tensor.detach().clone(), []
        with torch.no_grad():
            for sign in (1, -1):
                tensor.copy_(before + sign * step * along)
                values.append(loss().item())
            tensor.copy_(before)
        slope = (values[0] - values[1]) / (2 * step)
        assert abs(slope) > 1e-4 and (gradient * along).sum().item() == pytest.approx(slope, rel=1e-4)


def learned(*values):
    return torch.tensor(values if len(values) > 1 else values[0], dtype=torch.float64, requires_grad=True)


# any module


def test_intervening_on_a_module_is_composing_functions():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x, gain = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), learned(1.0)
    for path, by_hand in (("0", lambda: net[2](net[1](net[0](x) ** 2 * gain))),
                          ("2.input", lambda: net[2](net[1](net[0](x)) ** 2 * gain))):  # fmt: skip
        with intervene(net, path, lambda a, where: a**2 * gain):
            found = torch.autograd.grad(net(x).sum(), [x, gain, *net.parameters()])
        expected = torch.autograd.grad(by_hand().sum(), [x, gain, *net.parameters()])
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_intervening_on_a_language_model(lm, site):
    shift, model = learned(*[0.1] * 24), lm.model.transformer

    def loss():
        with lm.intervene(site, lambda x, where: x * (1 + shift) + x.flip(2) * where.mask[..., None]):
            return loss_of(lm)

    check(loss, [shift, model.wte.weight, model.h[0].mlp.c_fc.weight, model.h[2].mlp.c_fc.weight])


# steering

KINDS = {"add": 0.4, "clamp": 0.3, "cap": 0.02, "scale": 1.5, "ablate": None, "project_out": None}  # with a strength


def made(kind, *source, strength, **more):
    return getattr(steering, kind)(*source, **({} if strength is None else {"strength": strength}), **more)


@pytest.mark.parametrize("kind", KINDS)
def test_every_operation_on_a_latent(lm, sae, site, kind):
    strength = None if KINDS[kind] is None else learned(KINDS[kind])
    units = ["max_activation", "residual_norm"] if kind in ("add", "clamp") else [None]
    reads = kind not in ("add", "project_out")
    for unit in units:
        operation = made(kind, sae, busy(sae, 1)[0], strength=strength, **({"unit": unit} if unit else {}))

        def loss(operation=operation):
            with lm.steer(operation):
                return loss_of(lm)

        tensors = [sae.W_dec, lm.model.transformer.wte.weight]
        check(loss, [*tensors, *([sae.encoder_weight] if reads else []), *([] if strength is None else [strength])])


@pytest.mark.parametrize("kind", KINDS)
def test_every_operation_on_a_vector_that_is_learned(lm, site, kind):
    vector = torch.randn(24, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    strength = None if KINDS[kind] is None else learned(KINDS[kind])
    units = ["activation", "residual_norm", "std"] if kind in ("add", "clamp") else [None]
    for unit in units:
        direction = Direction(vector, site, residual_norm=0.7, std=0.3)
        operation = made(kind, direction, strength=strength, **({"unit": unit} if unit else {}))

        def loss(operation=operation):
            with lm.steer(operation):
                return loss_of(lm)

        check(loss, [vector, lm.model.transformer.wte.weight, *([] if strength is None else [strength])])


@pytest.mark.parametrize("kind", ["add", "scale"])
def test_a_learned_strength_that_changes_nothing_yet(lm, sae, site, kind):
    strength = learned({"add": 0.0, "scale": 1.0}[kind])

    def loss():
        with lm.steer(made(kind, sae, busy(sae, 1)[0], strength=strength)):
            return loss_of(lm)

    assert torch.equal(loss(), loss_of(lm))
    check(loss, [strength])


def test_several_operations_at_once(lm, sae, site):
    one, two = (torch.randn(24, dtype=torch.float64, requires_grad=True) for _ in range(2))
    operations = [steering.project_out(one, site=site), steering.project_out(two, site=site),
                  steering.clamp(sae, busy(sae, 1)[0], strength=0.5)]  # fmt: skip

    def loss():
        with lm.steer(*operations):
            return loss_of(lm)

    check(loss, [one, two, sae.W_dec, lm.model.transformer.wte.weight])


def test_a_vector_is_learned_within_one_context_and_its_receipt_is_plain(lm, site):
    vector = torch.ones(24, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([vector], lr=0.01)
    losses = []
    with lm.steer(steering.add(vector, strength=learned(1.0), unit="activation", site=site)) as receipt:
        for _ in range(3):
            optimizer.zero_grad()
            losses.append(loss_of(lm))
            losses[-1].backward()
            optimizer.step()
    assert losses[0] > losses[1] > losses[2]
    lm.model.zero_grad()
    for tally in receipt.tallies:
        assert not tally.relative.requires_grad
    content = receipt.to_dict()
    (operation,) = content["steering"]["every_row"]
    assert operation["strength"] == 1.0 and operation["source"]["vector"] == vector.tolist()
    plain = torch.ones(24, dtype=torch.float64)
    copy = Direction(plain, site)
    plain.zero_()  # what is not learned is kept as it was
    assert copy.vector.sum() == 24


def test_a_strength_is_one_number():
    with pytest.raises(ConfigError, match=r"one number, not \[2\]"):
        steering.add(torch.ones(24), strength=torch.ones(2), unit="activation", site=SITES[0])


# splicing


def gained(gain):
    def edit(codes):
        return codes.with_values(codes.values * gain[codes.indices])

    return edit


def halved(codes):
    codes.values *= 0.5
    return codes


@pytest.mark.parametrize("error_term", [True, False])
@pytest.mark.parametrize("edit", ["none", "same", "gained", "in place"])
def test_splicing(lm, sae, site, error_term, edit):
    gain = torch.ones(sae.d_sae, dtype=torch.float64, requires_grad=True)  # nothing is changed yet
    edits = {"none": None, "same": lambda codes: codes, "gained": gained(gain), "in place": halved}

    def loss():
        with lm.splice(sae, error_term=error_term, edit=edits[edit]):
            return loss_of(lm)

    same = error_term and edit != "in place"
    assert torch.equal(loss(), loss_of(lm)) == same
    tensors = [lm.model.transformer.wte.weight, lm.model.transformer.h[2].mlp.c_fc.weight]
    tensors += [] if same else [sae.W_dec, sae.encoder_weight]
    check(loss, [*tensors, *([gain] if edit == "gained" else [])])


@pytest.mark.parametrize("error_term", [True, False])
def test_the_gradient_of_the_latents_is_that_of_their_share_of_the_activation(lm, sae, site, error_term):
    seen = {}

    def edit(codes):
        codes.values.retain_grad()
        seen["codes"] = codes
        return codes

    def at_the_site(x, where):
        x.retain_grad()
        seen["x"], seen["mask"] = x, where.mask & (where.positions > 0)
        return x

    with lm.splice(sae, error_term=error_term, edit=edit), lm.intervene(site, at_the_site):
        loss_of(lm).backward()
    lm.model.zero_grad()
    sae.zero_grad()
    codes = seen["codes"]
    slopes = seen["x"].grad[seen["mask"]] @ sae.W_dec.detach().T
    torch.testing.assert_close(codes.values.grad, slopes[codes.rows(), codes.indices], rtol=1e-9, atol=1e-12)
    assert codes.values.grad.abs().min() > 0


def test_a_sum_keeps_the_bits_of_what_it_does_not_change():
    x = torch.tensor([-0.0, 0.0, 1e-40, -3.0, 2.0])
    for dtype in (torch.float32, torch.bfloat16):
        y = x.to(dtype)
        for zero in (torch.zeros(5), -torch.zeros(5)):
            same = plus(y, zero)
            assert same.dtype is dtype and torch.equal(same.signbit(), y.signbit()) and torch.equal(same, y)
    change = torch.randn(5, dtype=torch.float64)
    assert torch.equal(plus(x.double(), change), x.double() + change)
    assert torch.autograd.gradcheck(plus, (x.double().requires_grad_(), torch.zeros(5).double().requires_grad_()))
