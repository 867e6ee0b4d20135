"""Weights of half precision: as the same ones in fp32, with no copy of a matrix."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import saelab
from saelab.autoencoders.architectures.gradient import select_with_gradient
from saelab.kernels import mixed
from tests.training.test_distributed import SAES

F, D = 700, 24


def cfg_of(name):
    fields = SAES[name].to_dict()
    return saelab.autoencoders.architecture.Architecture.from_dict(
        fields | ({"of": fields["of"] | {"d_sae": F}} if "of" in fields else {"d_sae": F})
    )


def pair_of(name, dtype):
    """An SAE of half precision whose parameters all are random, and the same one in fp32."""
    cfg = cfg_of(name)
    sae = saelab.SAE(cfg, D, d_out=None if cfg.centres_input else 20)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        for buffer in ("cut_sum", "cut_weight", "influence_sum", "influence_weight"):
            if buffer in sae.state._buffers:
                sae.state._buffers[buffer].fill_(0.5)
    low = sae.to(dtype)
    return low, copy.deepcopy(low).float()


@pytest.fixture(autouse=True)
def few_latents_a_part(monkeypatch):
    monkeypatch.setattr(mixed, "_LATENTS", 128)


@pytest.mark.parametrize("name", SAES)
def test_they_encode_and_decode_as_in_fp32(name):
    for dtype in (torch.bfloat16, torch.float16):
        low, full = pair_of(name, dtype)
        found = []
        for sae in (low, full):
            x = torch.randn(90, D, generator=torch.Generator().manual_seed(1)).requires_grad_()
            codes, x_hat = sae.encode_sparse(x), sae(x)
            weights = torch.randn(x_hat.shape, generator=torch.Generator().manual_seed(2))
            loss = (x_hat * weights).sum() + codes.values.sum()
            gradients = torch.autograd.grad(loss, [x, sae.W_dec, sae.encoder_weight])
            dense = sae.decode(codes.to_dense(), x)
            found.append((codes.indices, codes.values, x_hat, dense, *gradients))
        assert torch.equal(found[0][0], found[1][0]) and len(found[0][0])
        for one, other in zip(*found, strict=True):
            bound = 1e-5 if one.dtype == torch.float32 else 2e-2  # gradients of the matrices are of their precision
            assert (one - other).abs().amax() <= bound * other.abs().amax()


def test_the_choice_by_gradients_is_that_in_fp32():
    low, full = pair_of("gradient", torch.bfloat16)
    x, gradient = torch.randn(2, 90, D).unbind(0)
    one, other = (select_with_gradient(sae, x, gradient) for sae in (low, full))
    assert torch.equal(one.indices, other.indices)
    torch.testing.assert_close(one.values, other.values)


class Largest(TorchDispatchMode):
    """The most numbers of fp32 that an operation gave."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
            self.numbers = max(self.numbers, out.numel())
        return out


@pytest.mark.parametrize("name", SAES)
def test_no_matrix_is_copied(name):
    low, full = pair_of(name, torch.bfloat16)
    x = torch.randn(4, D)
    for sae, copies in ((low, False), (full, True)):
        with Largest() as largest, torch.no_grad():
            sae(x)
            if copies:
                sae.W_dec + 0.0
        assert (largest.numbers >= F * 20) == copies
