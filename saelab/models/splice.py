"""Put an autoencoder in place of an activation, in every forward pass of a language model."""

import contextlib
import copy
import functools
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from jaxtyping import Bool, Float
from torch import Tensor

from saelab.base.errors import InterventionError
from saelab.base.protocols import Dictionary
from saelab.models.checkpointing import recomputing
from saelab.models.hooks import plus
from saelab.models.identity import warn_of_other_weights
from saelab.models.purpose import Purpose
from saelab.models.where import Where

if TYPE_CHECKING:
    from saelab.models.language import LanguageModel

Edit = Callable[[Any], Any]  # SparseCodes -> SparseCodes


class Splice:
    """What a splice did so far: `positions` real ones seen, `replaced` of them taken from the autoencoder.

    Counts add up over forward passes; without a key-value cache a position counts once in each.
    """

    def __init__(self) -> None:
        self.calls = 0
        self._positions: list[Tensor] = []  # added up when asked, so that no pass waits for the device
        self._replaced: list[Tensor] = []

    @property
    def positions(self) -> int:
        """Real positions (no padding) that went by."""
        return sum(int(count) for count in self._positions)

    @property
    def replaced(self) -> int:
        """Positions that took the autoencoder's value; the others kept the model's own activation."""
        return sum(int(count) for count in self._replaced)

    def count(self, real: Bool[Tensor, "*positions"], replaced: Bool[Tensor, "*positions"]) -> None:
        """Add one forward pass."""
        self.calls += 1
        self._positions.append(real.sum())
        self._replaced.append(replaced.sum())

    def __repr__(self) -> str:
        return f"Splice(replaced={self.replaced:,} of positions={self.positions:,})"


@contextlib.contextmanager
def splice(
    lm: "LanguageModel", sae: Dictionary, error_term: bool = False, edit: Edit | None = None, site: str | None = None
) -> Iterator[Splice]:
    """See `LanguageModel.splice`."""
    purpose = Purpose.of(sae, site)
    source, target = purpose.source(lm), purpose.target(lm)
    warn_of_other_weights(lm, sae, stacklevel=4)
    receipt = Splice()
    waiting = threading.local()  # what was read, until the thread's forward pass comes to where it is written

    def read(x: Tensor, where: Where) -> Tensor:
        chosen = purpose.positions(lm, x, where)
        if not recomputing():
            receipt.count(where.mask, chosen)
        waiting.read = (x[chosen], chosen)
        return x

    def write(y: Tensor, where: Where) -> Tensor:
        if getattr(waiting, "read", None) is None:
            raise InterventionError(f"{target.name} runs before {source.name}: an autoencoder reads first, then writes (and "
                                    "both in one part of the model where gradient checkpointing runs parts again)")  # fmt: skip
        rows, chosen = waiting.read
        waiting.read = None
        if error_term and edit is None:
            return y
        replaced = y.clone()
        replaced[chosen] = written(sae, rows, y[chosen], error_term, edit).to(y)
        return replaced

    def in_place(x: Tensor, where: Where) -> Tensor:
        return write(read(x, where), where)

    with contextlib.ExitStack() as hooks:
        if target == source:
            hooks.enter_context(lm.intervene(source, in_place))
        else:
            hooks.enter_context(lm.intervene(source, read))
            hooks.enter_context(lm.intervene(target, write))
        yield receipt
    if not receipt.calls:
        raise InterventionError(
            f"nothing was replaced: {source.name} never ran inside the splice. Call the wrapped model (lm.logits, lm.loss, "
            "lm.generate or lm.model) within it, in the thread that opened it or one that the main thread started since "
            "(others through contextvars.copy_context().run)"
        )


def written(
    sae: Dictionary, x: Float[Tensor, "n d"], y: Float[Tensor, "n d_out"], error_term: bool, edit: Edit | None
) -> Float[Tensor, "n d_out"]:
    """The new rows: the reconstruction, or y + (decode(edited) - decode(codes)) with the error term.

    `x` are the rows read, `y` those that stand where it is written.
    """
    x = x.to(sae.W_dec)
    if edit is None:
        return sae(x)
    codes = sae.encode_sparse(x)
    # an object of another library's has no `cfg`; of what others add of x nothing is left in the difference
    by_token = getattr(getattr(sae, "cfg", None), "per_token", False)
    decode = functools.partial(sae.decode, x=x) if by_token else sae.decode
    plain = decode(codes)
    # codes of its own for the edit, which may write into them, and whose gradient is that of the edited share alone
    edited = copy.copy(codes)
    edited.values = codes.values.clone()
    change = decode(edit(edited)) - plain
    return plus(y, change) if error_term else sae(x) + change
