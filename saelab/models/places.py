"""The places of a denoiser's activation as rows, one of a feature map [n, C, h, w] or of tokens [n, L, C] each, and an
autoencoder put in their place.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.base.errors import ConfigError, DataError, InterventionError, SiteError
from saelab.base.protocols import Dictionary
from saelab.models.checkpointing import recomputing
from saelab.models.identity import warn_of_other_weights
from saelab.models.purpose import Purpose
from saelab.models.splice import Edit, Splice, written

if TYPE_CHECKING:
    from saelab.models.denoiser import Denoiser, Moment


def rows_of_places(activation: Float[Tensor, "n *shape"]) -> Float[Tensor, "rows C"]:
    """A row a place: sample after sample, within one line by line (of a feature map), or token by token.

    >>> rows_of_places(torch.arange(8.0).view(1, 2, 2, 2)).tolist()
    [[0.0, 4.0], [1.0, 5.0], [2.0, 6.0], [3.0, 7.0]]
    """
    if activation.ndim == 4:
        activation = activation.permute(0, 2, 3, 1)
    elif activation.ndim != 3:
        raise DataError(f"an activation {list(activation.shape)} has no places: choose a site with a feature map [n, C, h, w] "
                        "or tokens [n, L, C]")  # fmt: skip
    return activation.reshape(-1, activation.shape[-1])


def places_of_rows(rows: Float[Tensor, "rows C"], shape: torch.Size | tuple[int, ...]) -> Float[Tensor, "n *shape"]:
    """The activation of this shape of which these are the rows: the way back."""
    if len(shape) == 3:
        return rows.view(shape)
    n, channels, height, width = shape
    return rows.view(n, height, width, channels).permute(0, 3, 1, 2)


def width_of(shape: tuple[int, ...]) -> int:
    """The width of a row, of one sample's activation [C, h, w] or [L, C].

    >>> width_of((64, 4, 4)), width_of((16, 32))
    (64, 32)
    """
    return shape[0] if len(shape) == 3 else shape[-1]


def reading_site(denoiser: "Denoiser", purpose: Purpose) -> str:
    """The path of the site that an autoencoder reads and writes.

    Raises `ConfigError` where that is unknown or it is a transcoder, `SiteError` where the denoiser has another width there.
    """
    site = denoiser.site(purpose.reads)
    if purpose.target_site not in (None, purpose.site) or purpose.sae.d_out != purpose.sae.d_in:
        raise ConfigError(
            "a transcoder cannot be put into a denoiser: train an autoencoder (no target_site) at the site"
        )
    if (width := width_of(denoiser.site_shape(site))) != purpose.sae.d_in:
        raise SiteError(f"the autoencoder is {purpose.sae.d_in} wide and site {site!r} {width}: give the site that it was "
                        "trained on, or another autoencoder")  # fmt: skip
    return site


@contextlib.contextmanager
def splice_places(
    denoiser: "Denoiser", sae: Dictionary, error_term: bool = False, edit: Edit | None = None, site: str | None = None
) -> Iterator[Splice]:
    """See `Denoiser.splice`."""
    purpose = Purpose.of(sae, site)
    path = reading_site(denoiser, purpose)
    warn_of_other_weights(denoiser, sae, stacklevel=4)
    receipt = Splice()

    def write(h: Tensor, where: "Moment") -> Tensor:
        rows = rows_of_places(h)
        every = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        chosen = purpose.within(rows, every)
        if not recomputing():
            receipt.count(every, chosen)
        if error_term and edit is None:
            return h
        new = rows.clone()
        new[chosen] = written(sae, rows[chosen], rows[chosen], error_term, edit).to(rows)
        return places_of_rows(new, h.shape)

    with denoiser.intervene(path, write):
        yield receipt
    if not receipt.calls:
        raise InterventionError(
            f"nothing was replaced: {path} never ran inside the splice. Call the denoiser (epsilon, x0, "
            "saelab.hspace.sample) within it"
        )
