"""What a direction of the residual stream writes to the logits: the last norm's gain and the unembedding.

Shapes: D width of the stream, V vocabulary, N directions.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from saelab.errors import ConfigError

if TYPE_CHECKING:
    from saelab.models.language import LanguageModel


class Unembedding(NamedTuple):
    """`gain` [D] of the last norm, whether it subtracts the mean (`centred`), and `W_U` [D, V]."""

    gain: Tensor
    centred: bool
    W_U: Tensor

    def logits(self, directions_ND: Tensor) -> Tensor:
        """(directions * gain) W_U, [N, V] in at least fp32: the logits' change for a small step, the norm's scale left out."""
        rows = directions_ND.detach().to(self.gain)
        if self.centred:
            rows = rows - rows.mean(-1, keepdim=True)
        return (rows * self.gain) @ self.W_U


def unembedding(lm: "LanguageModel") -> Unembedding:
    """The unembedding of a language model.

    The gain is read off the last norm by running it on a vector and its negative, so that a gain of 1 + gamma (Gemma)
    or a bias needs no table. Raises `ConfigError` where the model has no such norm or no unembedding.

    >>> import torch
    >>> Unembedding(torch.tensor([2.0, 1.0]), False, torch.eye(2)).logits(torch.tensor([[1.0, 3.0]]))
    tensor([[2., 3.]])
    """
    W_U = _weight(lm)
    norm = _last_norm(lm.inner, W_U.shape[0])
    if norm is None:
        raise ConfigError(f"no norm of width {W_U.shape[0]} stands before the unembedding of {lm.name}: what a latent "
                          "writes to the logits is unknown here")  # fmt: skip
    ones = torch.ones_like(next(norm.parameters()))
    probe = ones.clone()  # of mean 0, without zeros
    probe[1::2] = -1
    if len(probe) % 2:
        probe[1] = -2
    with torch.no_grad():
        odd, even = norm(probe) - norm(-probe), norm(ones) - norm(-ones)
    gain = odd / 2 * probe.norm() / len(probe) ** 0.5 / probe
    centred = bool(even.abs().max() < 1e-3 * odd.abs().max())
    exact = torch.promote_types(W_U.dtype, torch.float32)
    return Unembedding(gain.to(exact), centred, W_U.detach().to(exact))


def _weight(lm: "LanguageModel") -> Tensor:
    """[D, V]"""
    found: Any = getattr(lm.inner, "get_output_embeddings", lambda: None)()
    if found is not None and getattr(found, "weight", None) is not None:
        return found.weight.T
    W_U = getattr(lm.model, "W_U", None)
    if not isinstance(W_U, Tensor):
        raise ConfigError(f"{lm.name} has no unembedding matrix: what a latent writes to the logits is unknown here")
    return W_U


def _last_norm(runner: nn.Module, width: int) -> nn.Module | None:
    """The last module with one weight vector of the stream's width, outside the blocks."""
    blocks = {id(module) for parent in runner.modules() if isinstance(parent, nn.ModuleList)
              for module in parent.modules()}  # fmt: skip
    norms = [
        module
        for module in runner.modules()
        if id(module) not in blocks
        and any(getattr(p, "ndim", 0) == 1 and len(p) == width for p in module.parameters(recurse=False))
        and not any(p.ndim > 1 for p in module.parameters(recurse=False))
    ]
    return norms[-1] if norms else None
