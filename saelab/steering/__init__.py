"""Activation steering: operations on directions at a site, units of strength, scopes, receipts, sweeps.

>>> from saelab import steering
>>> import torch
>>> steering.add(torch.ones(8), strength=0.2, site="blocks.3.hook_resid_post")
add(direction, 0.2 residual_norm)
"""

from typing import TYPE_CHECKING

from saelab.base.lazy import lazily

_PUBLIC = {
    "Direction": "saelab.steering.vectors",
    "Operation": "saelab.steering.operations",
    "Receipt": "saelab.steering.receipt",
    "Scope": "saelab.steering.scope",
    "Sweep": "saelab.steering.sweep_table",
    "ablate": "saelab.steering.operations",
    "add": "saelab.steering.operations",
    "cap": "saelab.steering.operations",
    "clamp": "saelab.steering.operations",
    "difference": "saelab.steering.contrast",
    "find": "saelab.steering.search",
    "input_scores": "saelab.steering.scores",
    "load_sweep": "saelab.steering.experiments",
    "measured": "saelab.steering.contrast",
    "output_scores": "saelab.steering.scores",
    "project_out": "saelab.steering.operations",
    "replay": "saelab.steering.replaying",
    "scale": "saelab.steering.operations",
    "steer": "saelab.steering.apply",
    "steer_rows": "saelab.steering.apply",
    "sweep": "saelab.steering.experiments",
    "to_lm_eval": "saelab.steering.harness",
    "top_tokens": "saelab.steering.scores",
    "unit_size": "saelab.steering.units",
}

__all__ = sorted(_PUBLIC)


__getattr__, __dir__ = lazily(globals(), _PUBLIC)


if TYPE_CHECKING:
    from saelab.steering.apply import steer as steer
    from saelab.steering.apply import steer_rows as steer_rows
    from saelab.steering.contrast import difference as difference
    from saelab.steering.contrast import measured as measured
    from saelab.steering.experiments import load_sweep as load_sweep
    from saelab.steering.experiments import sweep as sweep
    from saelab.steering.harness import to_lm_eval as to_lm_eval
    from saelab.steering.operations import Operation as Operation
    from saelab.steering.operations import ablate as ablate
    from saelab.steering.operations import add as add
    from saelab.steering.operations import cap as cap
    from saelab.steering.operations import clamp as clamp
    from saelab.steering.operations import project_out as project_out
    from saelab.steering.operations import scale as scale
    from saelab.steering.receipt import Receipt as Receipt
    from saelab.steering.replaying import replay as replay
    from saelab.steering.scope import Scope as Scope
    from saelab.steering.scores import input_scores as input_scores
    from saelab.steering.scores import output_scores as output_scores
    from saelab.steering.scores import top_tokens as top_tokens
    from saelab.steering.search import find as find
    from saelab.steering.sweep_table import Sweep as Sweep
    from saelab.steering.units import unit_size as unit_size
    from saelab.steering.vectors import Direction as Direction
