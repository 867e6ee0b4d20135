"""The Jacobian of a function as a linear map, never formed: products from both sides, and its leading singular vectors.

Shapes: B rows worked on together, M entries of the output, D of the input, K singular vectors.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from saelab.base.errors import ConfigError


class LinearMap:
    """The Jacobian J [M, D] of `fn` at `point`, for blocks of at most `block` rows at a time.

    `fn` maps a batch [B, ...] to a batch, row by row on its own, as a network in evaluation mode does. It runs once, on
    `block` copies of the point; after that `push` (J v) and `pull` (J^T u) only walk the graph that this left.

    J v is the derivative of u -> J^T u, which is linear in u: two reverse passes in place of a forward-mode one. On torch 2.13
    forward mode stops at a group norm after attention ("view size is not compatible"), and with torch's fused attention neither
    forward mode nor a second reverse pass is implemented, hence the plain kernel here.

    >>> square = LinearMap(lambda x: x**2, torch.tensor([1.0, 3.0]), block=2)
    >>> square.push(torch.eye(2)), square.pull(torch.ones(1, 2))
    (tensor([[2., 0.],
             [0., 6.]]), tensor([[2., 6.]]))
    """

    def __init__(
        self,
        fn: Callable[[Float[Tensor, "B *input"]], Float[Tensor, "B *output"]],
        point: Float[Tensor, "*input"],
        block: int,
    ) -> None:
        with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            self._x = point.detach().expand(block, *point.shape).clone().requires_grad_()
            self._y = fn(self._x)
            self._u = torch.zeros_like(self._y).requires_grad_()
            (self._pulled,) = torch.autograd.grad(self._y, self._x, self._u, create_graph=True)
        self.block, self.inputs, self.outputs = block, self._x[0].numel(), self._y[0].numel()

    def push(self, v_KD: Float[Tensor, "K D"]) -> Float[Tensor, "K M"]:
        """J v for each row."""
        return self._blocks(v_KD, self._pulled, self._u)

    def pull(self, u_KM: Float[Tensor, "K M"]) -> Float[Tensor, "K D"]:
        """J^T u for each row."""
        return self._blocks(u_KM, self._y, self._x)

    def _blocks(self, rows: Tensor, of: Tensor, by: Tensor) -> Tensor:
        done = []
        for some in rows.split(self.block):
            padded = torch.zeros_like(of).flatten(1)
            padded[: len(some)] = some.to(padded)
            (found,) = torch.autograd.grad(of, by, padded.view_as(of), retain_graph=True)
            done.append(found.flatten(1)[: len(some)])
        return torch.cat(done)


class Stacked:
    """Linear maps of one input under each other, divided by the root of their number: |J v|^2 is the mean over the maps.

    >>> one = LinearMap(lambda x: 2 * x, torch.zeros(3), block=1)
    >>> Stacked([one, one]).push(torch.ones(1, 3)).norm() ** 2
    tensor(12.)
    """

    def __init__(self, maps: Sequence[LinearMap]) -> None:
        self.maps, self.weight = list(maps), len(maps) ** -0.5
        self.inputs, self.outputs = maps[0].inputs, sum(one.outputs for one in maps)

    def push(self, v_KD: Float[Tensor, "K D"]) -> Float[Tensor, "K M"]:
        return self.weight * torch.cat([one.push(v_KD) for one in self.maps], dim=1)

    def pull(self, u_KM: Float[Tensor, "K M"]) -> Float[Tensor, "K D"]:
        parts = u_KM.split([one.outputs for one in self.maps], dim=1)
        return self.weight * torch.stack([one.pull(part) for one, part in zip(self.maps, parts, strict=True)]).sum(0)


@dataclasses.dataclass(frozen=True)
class SingularVectors:
    """`values` [K] descending, `left` [K, M], `right` [K, D] (rows orthonormal), `residuals` [K] = |J^T J v - s^2 v| / s^2."""

    values: Float[Tensor, " K"]
    left: Float[Tensor, "K M"]
    right: Float[Tensor, "K D"]
    residuals: Float[Tensor, " K"]
    iterations: int


def singular_vectors(
    jacobian: LinearMap | Stacked, k: int, *, oversample: int = 4, tol: float = 1e-3, max_iter: int = 30, seed: int = 0,
) -> SingularVectors:  # fmt: skip
    """The k leading singular values and vectors of a Jacobian by block subspace iteration.

    Haas et al. 2024, algorithm 1: an orthonormal block, pushed through J and pulled back, until the values stand still. Our
    choices: it iterates on the smaller side, as by our notes the authors' code does for one vector at a time; `oversample`
    more vectors are carried and dropped, which is what makes the last ones converge; each round ends in the singular value
    decomposition of J restricted to the block, so that vectors within the block are told apart at once.

    It stops when every kept residual is below `tol`, or after `max_iter` rounds: two neighbours whose values differ by a few
    percent need more rounds than others, and `residuals` say which.

    Raises `ConfigError` for a k that is larger than the smaller side.

    >>> diagonal = LinearMap(lambda x: x * torch.tensor([3.0, 2.0, 1.0]), torch.zeros(3), block=3)
    >>> singular_vectors(diagonal, 2).values
    tensor([3.0000, 2.0000], dtype=torch.float64)
    """
    smaller = min(jacobian.inputs, jacobian.outputs)
    if not 1 <= k <= smaller:
        raise ConfigError(
            f"{k} components of a Jacobian of {jacobian.outputs:,} x {jacobian.inputs:,}: ask for 1 to {smaller:,}"
        )
    out, back = (
        (jacobian.push, jacobian.pull) if jacobian.inputs <= jacobian.outputs else (jacobian.pull, jacobian.push)
    )
    size = min(k + oversample, smaller)
    generator = torch.Generator().manual_seed(seed)
    V = torch.randn(smaller, size, generator=generator, dtype=torch.float64)
    for iteration in range(1, max_iter + 1):
        V = torch.linalg.qr(V).Q  # [smaller, size]
        U = out(V.T).T.double().to(V)
        left, values, turn = torch.linalg.svd(U, full_matrices=False)  # U = left values turn: J on the block
        V = V @ turn.T
        W = back((left * values).T).T.double().to(V)  # J^T J V
        residuals = torch.linalg.vector_norm(W - V * values**2, dim=0) / (values**2).clamp(min=1e-300)
        if bool((residuals[:k] < tol).all()):
            break
        if iteration < max_iter:
            V = W
    on_input, on_output = (V, left) if jacobian.inputs <= jacobian.outputs else (left, V)
    return SingularVectors(values[:k], on_output.T[:k], on_input.T[:k], residuals[:k], iteration)
