"""The Triton kernels against dense twins, by Triton's interpreter on the CPU, and compiled ahead for GPUs: `make triton`."""

import os
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed: make triton makes an environment that has it")
if os.environ.get("TRITON_INTERPRET") != "1":  # read where Triton is first imported, which torch does
    pytest.skip("TRITON_INTERPRET is not 1: make triton sets it", allow_module_level=True)

import torch  # noqa: E402

from saelab.base.codes import SparseCodes  # noqa: E402
from saelab.kernels import dense, gpu, sparse  # noqa: E402

with (
    pytest.MonkeyPatch.context() as patched
):  # what checks shapes would wrap the programs, of which Triton reads the source
    patched.setattr(
        sys, "meta_path", [finder for finder in sys.meta_path if "jaxtyping" not in type(finder).__module__]
    )
    from saelab.kernels.gpu import launch

launch.LONGEST, launch.TILE = 16, 64  # small ones, for the interpreter is slow
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def problem(kind, dtype, n=37, d=19, f=21, density=0.2):
    """Codes and matrices of odd sizes; a hot latent fires on more tokens than one program sums."""
    generator = torch.Generator().manual_seed(0)
    codes_NF = torch.rand(n, f, generator=generator) * (torch.rand(n, f, generator=generator) < density)
    if kind == "hot latent":
        codes_NF[:, 5] = 1 + torch.rand(n, generator=generator)
        codes_NF[: 2 * launch.LONGEST, 6] = 1.0
    if kind == "empty rows":
        codes_NF[::2] = 0
        codes_NF[:, ::3] = 0
    if kind == "nothing fires":
        codes_NF[:] = 0
    x_ND, W_FD = (torch.randn(m, d, generator=generator).to(dtype) for m in (n, f))
    return SparseCodes.from_dense(codes_NF), x_ND, W_FD


def assert_close(found, wanted, dtype):
    scale = float(wanted.abs().amax()) if wanted.numel() else 1.0
    assert found.dtype == torch.float32 and found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE[dtype] * max(scale, 1.0))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["random", "hot latent", "empty rows", "nothing fires"])
def test_sums_of_rows_are_those_of_the_dense_product(kind, dtype):
    """The decoder, and the gradient of either weight matrix."""
    codes, x_ND, W_FD = problem(kind, dtype)
    decoded = launch.bags(codes.indices, W_FD, codes.offsets, codes.values)
    assert_close(decoded, dense.decode(codes, W_FD.float()), dtype)
    order, offsets = codes.by_latent()
    gradient = launch.bags(codes.rows()[order], x_ND, offsets, codes.values[order])
    assert_close(gradient, codes.to_dense().T @ x_ND.float(), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["random", "empty rows", "nothing fires"])
def test_sampled_products_are_those_of_the_dense_product(kind, dtype):
    codes, x_ND, W_FD = problem(kind, dtype)
    found = launch.sampled_product(x_ND, W_FD, codes.rows(), codes.indices)
    assert_close(found, (x_ND.float() @ W_FD.float().T)[codes.rows(), codes.indices], dtype)


@pytest.mark.parametrize("f", [5, 64, 150])
@pytest.mark.parametrize("kind", ["random", "tied", "zeros"])
def test_the_largest_are_those_of_a_stable_sort(f, kind):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4, f, generator=generator)
    if kind == "tied":
        scores = scores.mul(2).round()
    if kind == "zeros":
        scores = scores * (torch.rand(4, f, generator=generator) < 0.1)
    for k in (1, 3, 5):
        wanted = scores.relu().sort(dim=1, descending=True, stable=True).indices[:, :k]
        assert torch.equal(launch.largest(scores, k), wanted)


def test_they_stand_behind_decode_and_encode_at(monkeypatch):
    """Through every gradient."""
    codes, x_ND, W_FD = problem("random", torch.float32)
    W_enc, b_F, found = W_FD.flip(0), torch.zeros(len(W_FD)), []
    for fast in (False, True):
        monkeypatch.setattr(gpu, "serves", lambda tensor, fast=fast: fast)
        x, W, b, W_dec = (t.clone().requires_grad_() for t in (x_ND, W_enc, b_F, W_FD))
        if fast:
            out = sparse.decode(sparse.encode_at(x, W, b, found[0][0]), W_dec)
        else:
            out = dense.decode(chosen := dense.encode_at(x, W, b, codes), W_dec)
        out.square().sum().backward()
        taken = chosen.with_values(chosen.values.detach())
        found.append((taken, out.detach(), *(t.grad for t in (x, W, b, W_dec))))
    for wanted, got in zip(found[0][1:], found[1][1:], strict=True):
        assert_close(got, wanted, torch.float32)
