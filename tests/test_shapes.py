"""The tests check the shapes in saelab's signatures, and only those."""

from typing import Protocol

import pytest
import torch
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor

from tests.shapes import checked


class Unrelated(Protocol):
    def anything(self) -> None: ...


@jaxtyped(typechecker=checked)
def product(a: Float[Tensor, "n d"], b: Float[Tensor, "d m"], c: Unrelated | None = None) -> Float[Tensor, "n m"]:
    return a @ b if c is None else a @ b[:, :1]


def test_shapes_that_agree_pass():
    assert product(torch.ones(2, 3), torch.ones(3, 4)).shape == (2, 4)


def test_shapes_that_differ_fail():
    with pytest.raises(TypeCheckError):
        product(torch.ones(2, 3), torch.ones(4, 5))
    with pytest.raises(TypeCheckError):
        product(torch.ones(2, 3), torch.ones(3, 4), c="not the protocol, which is not checked")
