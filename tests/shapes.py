"""The type checker of the tests: beartype on the jaxtyping shapes of a signature, and on nothing else.

Other hints are mypy's: protocols, names imported for type checking only and duck-typed stand-ins are fine there.
"""

from collections.abc import Callable
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray


def has_shape(hint: Any) -> bool:
    """Whether a jaxtyping shape is in the hint, itself or within a tuple, a dict or a union."""
    return isinstance(hint, type(AbstractArray)) or any(has_shape(part) for part in get_args(hint))


def checked(function: Callable) -> Callable:
    function.__annotations__ = {name: hint for name, hint in function.__annotations__.items() if has_shape(hint)}
    return beartype(function) if function.__annotations__ else function
