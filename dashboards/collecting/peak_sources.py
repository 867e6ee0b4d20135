"""Where the peaks of an attention layer's latents come from: direct attribution by source position and head, at the peaks
of the examples only.

The parts of one peak are [heads, source positions], and the peaks of a context share one truncated forward pass.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from saelab.analysis.attention.source_positions import at_positions
from saelab.analysis.circuits import frozen
from saelab.base.errors import ConfigError
from saelab.base.progress import progress_bar
from saelab.base.protocols import Dictionary
from saelab.dashboards.collecting.effects import Places
from saelab.models.attention import attention_parts
from saelab.models.sites import Site

if TYPE_CHECKING:
    from saelab.models.language import LanguageModel
    from saelab.reading.packing import Contexts

N = 5
_BATCH = 8  # contexts


class Sources(NamedTuple):
    """Of each place its N sources with the largest absolute contribution, best first: how many tokens `back`, the `head`
    that carries most of it, and the `value`, in units of the pre-activation; 0 where there are fewer."""

    back: np.ndarray
    head: np.ndarray
    value: np.ndarray


def block_of(lm: "LanguageModel", site: Site) -> int | None:
    """The block whose attention the site reads, head by head; None for other sites and models of unknown attention."""
    parts = site.name.split(".")
    if not (site.heads and parts[0] == "blocks" and parts[1].isdigit() and parts[-1] in ("hook_z", "hook_in")):
        return None
    try:
        attention_parts(lm, int(parts[1]))
    except ConfigError:
        return None
    return int(parts[1])


def sources(
    lm: "LanguageModel", sae: Dictionary, block: int, contexts: "Contexts", places: Places, progress: bool = True
) -> Sources:
    """Of each (latent, row); their values play no part."""
    length = contexts.ids.shape[1]
    n = min(N, length)
    made = Sources(*(np.zeros((len(places), N), dtype) for dtype in ("<u2", "u1", "<f8")))
    by_context = places.by_context(length)
    needed = np.array(list(by_context), np.int64)
    with progress_bar(len(needed), "attention sources", "context", progress) as bar:
        for numbers in (needed[k : k + _BATCH] for k in range(0, len(needed), _BATCH)):
            tokens = contexts.tokens(torch.from_numpy(numbers)).to(lm.device)
            layer = frozen.read(lm, tokens, [block]).layers[block]
            for c, number in enumerate(numbers.tolist()):
                mine = by_context[number]
                at = torch.from_numpy(places.rows[mine] % length).to(lm.device)
                latents = torch.from_numpy(places.latents[mine]).to(sae.device)
                parts_nHS = at_positions(sae, layer, c, at, latents)
                summed_nS = parts_nHS.sum(1)
                best = summed_nS.abs().topk(n, dim=1).indices
                value = summed_nS.gather(1, best)
                # of a contribution's sign, so that a head which takes away is not said to give
                carried = parts_nHS.gather(2, best[:, None].expand(-1, parts_nHS.shape[1], -1)) * value.sign()[:, None]
                back = (at[:, None] - best).clamp(min=0)
                for column, found in zip(made, (back, carried.argmax(1), value), strict=True):
                    column[mine, :n] = found.cpu().numpy()
            bar.update(len(numbers))
    return made
