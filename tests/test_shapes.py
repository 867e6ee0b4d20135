"""The tests check the shapes in saelab's signatures, and only those."""

from typing import Protocol

import pytest
import torch
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor

from saelab.autoencoders.objectives import fraction_of_variance_unexplained
from tests.shapes import checked, rooms, without_shapes

SHAPED = [
    "base",
    "kernels",
    "models",
    "steering",
    "hspace",
    "autoencoders",
    "interop",
    "reading",
    "training",
    "evaluation",
    "selection",
    "analysis",
    "dashboards",
    "pages",
    "cli",
]
"""The rooms in which each public function that takes or gives a tensor says its shape."""


class Unrelated(Protocol):
    def anything(self) -> None: ...


@jaxtyped(typechecker=checked)
def product(a: Float[Tensor, "n d"], b: Float[Tensor, "d m"], c: Unrelated | None = None) -> Float[Tensor, "n m"]:
    return a @ b if c is None else a @ b[:, :1]


def test_what_would_be_broadcast_is_an_error():
    with pytest.raises(TypeCheckError):
        fraction_of_variance_unexplained(torch.rand(4, 3), torch.rand(4, 1))


def test_shapes_that_agree_pass():
    assert product(torch.ones(2, 3), torch.ones(3, 4)).shape == (2, 4)


def test_shapes_that_differ_fail():
    with pytest.raises(TypeCheckError):
        product(torch.ones(2, 3), torch.ones(4, 5))
    with pytest.raises(TypeCheckError):
        product(torch.ones(2, 3), torch.ones(3, 4), c="not the protocol, which is not checked")


@pytest.mark.parametrize("room", SHAPED)
def test_every_public_function_with_tensors_says_their_shapes(room):
    lacking = {str(path): without_shapes(path.read_text()) for path in sorted(rooms()[room].rglob("*.py"))}
    assert lacking and not any(lacking.values()), {path: names for path, names in lacking.items() if names}


def test_what_lacks_a_shape_is_found():
    code = """
def a(x: Float[Tensor, "n d"], f: Callable[[Float[Tensor, "n"]], float]) -> None: ...
def b(x: "torch.Tensor | None" = None): ...
def _c(x: Tensor): ...
class D:
    def __call__(self, x: Float[Tensor, "n"]) -> tuple[int, Tensor]: ...
class _E:
    def f(self, x: Tensor): ...
"""
    assert without_shapes(code) == ["b", "D.__call__"]
