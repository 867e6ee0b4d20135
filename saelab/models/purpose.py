"""What an autoencoder is for: where it reads and writes, in which contexts, and at which of their positions."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.base import checks
from saelab.base.errors import ConfigError, SiteError
from saelab.base.protocols import Dictionary
from saelab.models.sites import Site
from saelab.models.tokens import Tokens
from saelab.models.where import Where

if TYPE_CHECKING:
    from saelab.models.language import LanguageModel


@dataclass(frozen=True)
class Purpose:
    """What the metadata of an autoencoder say that it is for, and an answer to every position: is it for this one?

    `skip_positions` is 1 and the other fields are None where the metadata are silent.

    >>> import saelab
    >>> sae = saelab.SAE(saelab.TopK(k=2, d_sae=16), d_in=8, metadata={"site": "blocks.3.hook_resid_post"})
    >>> purpose = Purpose.of(sae)
    >>> purpose.reads, purpose.skip_positions
    ('blocks.3.hook_resid_post', 1)
    """

    sae: Dictionary
    site: str | None
    target_site: str | None
    context_length: int | None
    prepend_bos: bool | None
    skip_positions: int

    @classmethod
    def of(cls, sae: Dictionary, site: str | None = None, skip_positions: int | None = None) -> "Purpose":
        """As the metadata say, but for a site or a number of skipped positions that are given."""
        said = checks.autoencoder("sae", sae).metadata
        skip = said.get("skip_positions") if skip_positions is None else skip_positions
        return cls(
            sae,
            site or said.get("site"),
            said.get("target_site"),
            said.get("context_length"),
            said.get("prepend_bos"),
            1 if skip is None else checks.count("skip_positions", skip, least=0),
        )

    @property
    def reads(self) -> str:
        """The name of the site that it reads; `ConfigError` where none is known."""
        if self.site is None:
            raise ConfigError("the autoencoder does not say which site it was trained on: give site=")
        return str(self.site)

    def source(self, lm: "LanguageModel") -> Site:
        """Where it reads. Raises `ConfigError` where that is unknown, `SiteError` where the model has another width there."""
        return fitting(lm.site(self.reads), self.sae.d_in, "input")

    def target(self, lm: "LanguageModel") -> Site:
        """Where it writes: a transcoder elsewhere than it reads. Errors as of `source`."""
        return fitting(lm.site(self.target_site or self.reads), self.sae.d_out, "output")

    def positions(
        self, lm: "LanguageModel", x: Float[Tensor, "batch pos d"], where: Tokens | Where
    ) -> Bool[Tensor, "batch pos"]:
        """The positions of some texts that it is for: counted ones (`counted`) within its norm limit (`within`)."""
        return self.within(x, counted(where, self.skip_positions, lm.special_ids))

    def within(self, x: Float[Tensor, "*rows d"], chosen: Bool[Tensor, "*rows"]) -> Bool[Tensor, "*rows"]:
        """Those of the chosen rows whose norm is within the limit that it keeps (`sae.replaceable`), on the rows' device."""
        ordinary = self.sae.replaceable(x.flatten(0, -2).to(self.sae.W_dec)).view(x.shape[:-1])
        return chosen.to(x.device) & ordinary.to(x.device)


def fitting(site: Site, width: int, what: str) -> Site:
    """The site; `SiteError` with both numbers unless it is `width` wide."""
    if site.width != width:
        raise SiteError(f"the autoencoder's {what} is {width} wide and site {site.name!r} {site.width}: "
                        "give the site that it was trained on, or another autoencoder")  # fmt: skip
    return site


def counted(where: Tokens | Where, skip_positions: int, special_ids: Iterable[int] = ()) -> Bool[Tensor, "batch pos"]:
    """Which tokens count: real and not special, past the first `skip_positions` real ones of their text.

    >>> counted(Tokens(torch.tensor([[7, 7, 5, 9]]), torch.tensor([[False, True, True, True]])), 1, [9])
    tensor([[False, False,  True, False]])
    """
    chosen = where.mask & (where.positions >= skip_positions)
    special = frozenset(special_ids)
    return chosen & ~among(where.ids, special) if special else chosen


def among(ids: Int[Tensor, "*shape"], wanted: Iterable[int]) -> Bool[Tensor, "*shape"]:
    """Where the ids are some of those wanted."""
    return torch.isin(ids, _tensor_of(frozenset(wanted), ids.device))


@functools.lru_cache(maxsize=64)
def _tensor_of(ids: frozenset[int], device: torch.device) -> Tensor:
    return torch.tensor(sorted(ids), dtype=torch.int64, device=device)
