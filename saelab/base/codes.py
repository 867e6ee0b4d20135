"""SparseCodes: which latents fire on which tokens, and how strongly."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.base.errors import ConfigError, DataError

DENSE_LIMIT = 8 * 2**30


class ByLatent(NamedTuple):
    """The same entries grouped by latent: `order` [nnz] into the entries, `offsets` [n_latents + 1]."""

    order: Tensor
    offsets: Tensor


class SparseCodes:
    """Codes of n tokens over n_latents latents, in compressed rows.

    `values` [nnz] are the activations, `indices` [nnz] the latents, ascending within a token, and
    `offsets` [n + 1] where each token's entries begin. Nothing else is kept: no zero is stored. Where only the places are
    asked for, `values` is empty.

    On a device, to know how many latents fire is to wait for it: codes that are `padded` have one number of entries a token
    there, zeros among them, until `compact` drops these.

    >>> import torch
    >>> codes = SparseCodes.from_dense(torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 3.0]]))
    >>> codes.values, codes.indices, codes.offsets
    (tensor([2., 1., 3.]), tensor([1, 0, 2]), tensor([0, 1, 3]))
    >>> codes.l0
    1.5
    """

    def __init__(
        self,
        values: Float[Tensor, " values"],
        indices: Int[Tensor, " nnz"],
        offsets: Int[Tensor, " offsets"],
        n_latents: int,
        padded: bool = False,
    ) -> None:
        self.values, self.indices, self.offsets, self.n_latents = values, indices, offsets, n_latents
        self.padded = padded
        self._known: dict[str, Any] = {}  # of the places, shared by all codes at the same ones

    @classmethod
    def from_rows(
        cls, values_NK: Float[Tensor, "n k"], indices_NK: Int[Tensor, "n k"], n_latents: int
    ) -> "SparseCodes":
        """At most K entries a token, `indices_NK` ascending within a row; values at or below zero are dropped, on a device
        set to zero."""
        n, k = values_NK.shape
        padded = values_NK.device.type != "cpu"
        if padded:
            values_NK = values_NK.relu()
        elif not k or not bool((values_NK > 0).all()):
            keep_NK = values_NK > 0
            return cls(values_NK[keep_NK], indices_NK[keep_NK], _offsets(keep_NK.sum(1)), n_latents)
        offsets = torch.arange(0, n * k + 1, k, device=values_NK.device)
        codes = cls(values_NK.reshape(-1), indices_NK.reshape(-1), offsets, n_latents, padded)
        codes._known["rows"] = torch.arange(n, device=offsets.device)[:, None].expand(n, k).reshape(-1)
        return codes

    @classmethod
    def from_dense(cls, codes_NF: Float[Tensor, "n latents"]) -> "SparseCodes":
        """The positive entries of a dense [n, n_latents] matrix."""
        rows, indices = (codes_NF > 0).nonzero(as_tuple=True)
        counts = counted(rows, codes_NF.shape[0])
        return cls(codes_NF[rows, indices], indices, _offsets(counts), codes_NF.shape[1])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __repr__(self) -> str:
        return f"SparseCodes({len(self):,} tokens, {self.n_latents:,} latents, l0 {self.l0:.4g})"

    @property
    def l0(self) -> float:
        """Mean number of latents that fire on a token."""
        return len(self.indices) / max(len(self), 1)

    def rows(self) -> Int[Tensor, " nnz"]:
        """The token [nnz] that each entry belongs to."""
        if "rows" not in self._known:
            counts = self.offsets.diff()
            tokens = torch.arange(len(counts), device=counts.device)
            self._known["rows"] = torch.repeat_interleave(tokens, counts, output_size=len(self.indices))
        return self._known["rows"]

    def by_latent(self) -> ByLatent:
        """The entries grouped by latent, tokens ascending; one sort, shared by every weight gradient."""
        if "by_latent" not in self._known:
            latents, order = self.indices.sort(stable=True)
            starts = torch.arange(self.n_latents + 1, dtype=latents.dtype, device=latents.device)
            self._known["by_latent"] = ByLatent(order, torch.searchsorted(latents, starts))
        return self._known["by_latent"]

    def with_values(self, values: Float[Tensor, " nnz"]) -> "SparseCodes":
        """Other activations at the same places."""
        codes = SparseCodes(values, self.indices, self.offsets, self.n_latents, self.padded)
        codes._known = self._known
        return codes

    def where(self, keep: Bool[Tensor, " nnz"]) -> "SparseCodes":
        """The entries for which `keep` [nnz] is true."""
        counts = counted(self.rows()[keep], len(self))
        return SparseCodes(self.values[keep], self.indices[keep], _offsets(counts), self.n_latents)

    def compact(self) -> "SparseCodes":
        """The same codes without padding."""
        return self.where(self.values > 0) if self.padded else self

    def to_dense(self) -> Float[Tensor, "n latents"]:
        """The dense [n, n_latents] matrix.

        Raises `ConfigError`, with the number of bytes, when it would take more than 8 GiB.
        """
        refuse_dense(len(self), self.n_latents, self.values.element_size())
        dense = self.values.new_zeros(len(self), self.n_latents)
        return dense.index_put((self.rows(), self.indices), self.values)

    def row(self, i: int) -> tuple[Float[Tensor, " k"], Int[Tensor, " k"]]:
        """The (values, latents) of token i."""
        start, stop = int(self.offsets[i]), int(self.offsets[i + 1])
        return self.values[start:stop], self.indices[start:stop]


def counted(numbers: Int[Tensor, " m"], size: int) -> Int[Tensor, " size"]:
    """How often each of 0 to size - 1 occurs; unlike `bincount`, without waiting for a device.

    >>> import torch
    >>> counted(torch.tensor([2, 0, 2]), 4)
    tensor([1, 0, 2, 0])
    """
    return torch.zeros(size, dtype=torch.int64, device=numbers.device).index_add_(
        0, numbers, torch.ones_like(numbers, dtype=torch.int64)
    )


def refuse_dense(n: int, n_latents: int, itemsize: int) -> None:
    """Raise `ConfigError` when a dense [n, n_latents] matrix would not reasonably fit."""
    size = n * n_latents * itemsize
    if size > DENSE_LIMIT:
        raise ConfigError(
            f"dense codes of {n:,} tokens by {n_latents:,} latents would take {size:,} bytes, more than "
            f"{DENSE_LIMIT:,}: use `encode_sparse`, or encode fewer tokens at a time"
        )


def check_finite(x: Float[Tensor, "*rows d"], what: str) -> None:
    """Raise `DataError` naming the first row that holds NaN or infinity; so for a tensor without values."""
    if x.is_meta:
        raise DataError(f"{what}: the rows are on the device meta, without values: load them")
    bad = ~torch.isfinite(x).all(-1)
    if bool(bad.any()):
        first = int(bad.flatten().nonzero()[0])
        raise DataError(
            f"{what}: {int(bad.sum()):,} of {bad.numel():,} rows hold NaN or infinity, the first is row {first:,}; "
            "leave them out, or look for an overflow in a low-precision model"
        )


def _offsets(counts: Tensor) -> Tensor:
    offsets = counts.new_zeros(len(counts) + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=offsets[1:])
    return offsets
