"""Operations as the file from which lm-evaluation-harness steers a model, so that its tasks score what steering costs."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saelab.base.errors import ConfigError
from saelab.base.files import user_path, whole_file
from saelab.steering.apply import _checked_site
from saelab.steering.operations import Operation
from saelab.steering.scope import Scope
from saelab.steering.units import mean_activation, unit_size

if TYPE_CHECKING:
    from saelab.models.language import LanguageModel

EVERYWHERE = Scope(skip_positions=0, special=True, high_norm=True)


def to_lm_eval(lm: "LanguageModel", operations: Operation | Sequence[Operation], path: str | os.PathLike[str]) -> Path:
    """Write operations for lm-evaluation-harness: `lm_eval --model steered --model_args pretrained=...,steer_path=PATH`.

    The harness adds vectors to the outputs of modules, or sets the coordinate along a direction, at every position. It holds

    * `add`, several at a site as their sum;
    * of a plain vector `clamp`, `project_out` and `ablate`, one at a site. What is done to a latent's own activation it
      cannot: it knows no encoder.

    The file is what `torch.save` writes, a dictionary of module path (below the base model) to vector, coefficient and action.

    Args:
        lm: the model, one of transformers: where its modules are.
        operations: one or several, with the scope `steering.Scope(skip_positions=0, special=True, high_norm=True)`: the harness
            leaves no position out.
        path: the file, "*.pt".

    Raises `ConfigError` for what the harness cannot do, `CheckpointError` where the file cannot be written.

    >>> from saelab import steering
    >>> everywhere = steering.Scope(skip_positions=0, special=True, high_norm=True)
    >>> steering.to_lm_eval(lm, steering.add(sae, 123, strength=2.0, scope=everywhere), "steer.pt")  # doctest: +SKIP
    """
    given = [operations] if isinstance(operations, Operation) else list(operations)
    target = user_path(path)
    if not given or target.suffix != ".pt":
        raise ConfigError(
            f"give at least one operation and a file '*.pt' (by the ending it is known), not {str(path)!r}"
        )
    base = getattr(lm.inner, "base_model", None)
    names = {id(module): name for name, module in base.named_modules()} if base is not None else {}
    places: dict[str, list[Operation]] = {}
    for operation in given:
        site = _checked_site(lm, operation)
        if operation.scope != EVERYWHERE:
            raise ConfigError(
                f"{operation!r} leaves positions out and the harness does not: give it scope=steering.{EVERYWHERE!r}"
            )
        hook = names.get(id(lm.inner.get_submodule(site.path)), "")
        if site.side != "output" or not hook:
            raise ConfigError(
                f"{site.name} is no output of a module of the base model, which is all that the harness steers"
            )
        places.setdefault(hook, []).append(operation)
    plan = {hook: _entry(hook, here) for hook, here in places.items()}
    with whole_file(target) as temporary:
        torch.save(plan, temporary)
    return target


def _entry(hook: str, operations: list[Operation]) -> dict[str, Any]:
    for operation in operations:
        if operation.normalised and operation.unit != "residual_norm":
            raise ConfigError(
                f"the harness adds one vector at every position, and {operation!r} depends on each activation's size: give it "
                "the unit 'residual_norm'"
            )
    first, vectors = operations[0], [operation.direction.float().cpu() for operation in operations]
    sizes = [(operation.amount or 0.0) * unit_size(operation) for operation in operations]
    if all(operation.kind == "add" for operation in operations):
        if len(operations) == 1:
            return _row("add", vectors[0], sizes[0])
        return _row(
            "add", sum((size * vector for size, vector in zip(sizes, vectors, strict=True)), 0 * vectors[0]), 1.0
        )
    if len(operations) > 1:
        raise ConfigError(
            f"the harness does one thing at a module, and at {hook} are {operations}: only additions add up"
        )
    if first.latent is not None or first.kind in ("scale", "cap"):
        raise ConfigError(
            f"the harness adds vectors or sets the coordinate along one, it cannot do {first!r}: use steering.add"
        )
    if first.kind == "ablate" and first.to == "mean":
        sizes = [mean_activation(first)]
    return _row("clamp", vectors[0], sizes[0] * float(vectors[0].norm()))


def _row(action: str, vector: Tensor, coefficient: float) -> dict[str, Any]:
    return {
        "steering_vector": vector,
        "steering_coefficient": coefficient,
        "action": action,
        "bias": None,
        "head_index": None,
    }
