"""The type checker of the tests: beartype on the jaxtyping shapes of a signature, and on nothing else; and which lack them.

Other hints are mypy's: protocols, names imported for type checking only and duck-typed stand-ins are fine there.
"""

import ast
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import jaxtyping
from beartype import beartype
from beartype._check.code import codemain
from jaxtyping import AbstractArray

# Of a list it checks one item that it draws by Python's global generator, whose state our tests compare.
codemain.getrandbits = random.Random(0).getrandbits


def has_shape(hint: Any) -> bool:
    """Whether a jaxtyping shape is in the hint, itself or within a tuple, a dict or a union of such and None.

    Where a number or a text may stand as well, the function itself names what it does not take.
    """
    if get_origin(hint) in (Union, UnionType):
        parts = [part for part in get_args(hint) if part is not NoneType]
        return bool(parts) and all(map(has_shape, parts))
    if get_origin(hint) is Callable:
        return False
    return isinstance(hint, type(AbstractArray)) or any(has_shape(part) for part in get_args(hint))


def checked(function: Callable) -> Callable:
    function.__annotations__ = {name: hint for name, hint in function.__annotations__.items() if has_shape(hint)}
    return beartype(function) if function.__annotations__ else function


def without_shapes(code: str) -> list[str]:
    """The public functions and methods in this code that take or give a `Tensor` which no jaxtyping shape is around.

    >>> without_shapes("def f(x: Float[Tensor, 'n d'], y: list[Tensor]): ...")
    ['f']
    """
    found = []
    for name, function in _public(ast.parse(code)):
        arguments = ast.walk(function.args)
        hints = [part.annotation for part in arguments if isinstance(part, ast.arg)] + [function.returns]
        found += [name] if any(_bare(hint) for hint in hints if hint is not None) else []
    return found


def _public(tree: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from _public(node, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name.startswith("__")):
            yield prefix + node.name, node


def _bare(hint: ast.AST) -> bool:
    if isinstance(hint, ast.Constant) and isinstance(hint.value, str):
        hint = ast.parse(hint.value, mode="eval")
    if isinstance(hint, ast.Subscript) and isinstance(hint.value, ast.Name) and hasattr(jaxtyping, hint.value.id):
        return False
    name = hint.id if isinstance(hint, ast.Name) else hint.attr if isinstance(hint, ast.Attribute) else ""
    return name == "Tensor" or any(map(_bare, ast.iter_child_nodes(hint)))


def rooms() -> dict[str, Path]:
    """The folder of each room."""
    root = Path(__file__).parents[1]
    inside = [path for path in (root / "saelab").iterdir() if path.is_dir()]
    return {path.name: path for path in [root / "analysis", root / "dashboards", *inside] if not path.is_symlink()}
