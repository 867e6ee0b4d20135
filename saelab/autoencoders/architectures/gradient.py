"""Gradient TopK (g-SAE): which latents fire is weighed by what the model's loss would feel of them.

(Olmo et al. 2024, "Features that make a difference: leveraging gradients for improved dictionary learning".)
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.autoencoders.allocation import PreActivations
from saelab.autoencoders.architecture import Batch, Codes, Params, State, Tensors
from saelab.autoencoders.architectures.topk import TopK
from saelab.autoencoders.averages import average_, forgetting
from saelab.base import checks
from saelab.base import processes as distributed
from saelab.base.codes import SparseCodes
from saelab.base.errors import ConfigError
from saelab.base.protocols import Dictionary
from saelab.kernels import selection, sparse, weighted

HALF_LIFE = 0.02  # of the mean influence, in shares of the run
_SAMPLE = 512  # tokens of a batch that enter it


@dataclass(frozen=True)
class GradientPreActivations(PreActivations):
    """Pre-activations of which the gradient [n, d_in] of the model's loss is known; `W_dec_FD` are the directions."""

    gradient_ND: Float[Tensor, "n d_in"]
    W_dec_FD: Float[Tensor, "d_sae d_in"]

    def per_token_by_influence(self, k: int, strength: float) -> SparseCodes:
        """The pre-activations z at the k largest relu(z)(1 + strength |gradient W_dec^T|) of each token, differentiable.

        Ties go to the lower index; at strength 0 they are those of `per_token`, bit for bit.
        """
        if strength == 0:
            return self.per_token(k)
        chosen = weighted.top_k_weighted(
            self.x_ND.detach(), self.W_FD.detach(), self.b_F.detach(), self.gradient_ND, self.W_dec_FD.detach(), strength, k
        )  # fmt: skip
        return sparse.encode_at(self.x_ND, self.W_FD, self.b_F, chosen)

    def influence(self, k: int) -> Float[Tensor, ""]:
        """Mean of |gradient W_dec^T| over the k largest pre-activations of a sample of the tokens; a scalar, computed once."""
        return self.once("influence", lambda: self._influence(k))

    def _influence(self, k: int) -> Tensor:
        rows = slice(None, None, max(1, len(self.x_ND) // _SAMPLE))
        with torch.no_grad():
            chosen = selection.top_k(self.x_ND[rows], self.W_FD, self.b_F, k)
            fired = chosen.values > 0
            influences = (
                sparse.sampled_product(self.gradient_ND[rows].contiguous(), self.W_dec_FD, chosen).abs() * fired
            )
            return distributed.sum_(influences.sum()) / distributed.sum_(fired.sum()).clamp_min(1)


@dataclass(frozen=True, repr=False, kw_only=True)
class GradientTopK(TopK):
    """A gradient SAE: the k latents of a token that fire are those of the largest z (1 + beta |g W_dec^T| / c).

    z = relu((x - b_dec) W_enc + b_enc), and g is the gradient at x of the model's summed next-token loss, so that z |g d_i|
    is to first order what removing latent i would change the loss by. The gradient only chooses: a latent that fires has
    the value z, loss and decoder are TopK's, and nothing is differentiated through the choice. With beta = 0 the masks are
    TopK's bit for bit.

    c is the running mean of |g W_dec^T| over the k largest z of each token (half-life 2% of the run), which makes beta
    dimensionless. This normalisation is our choice; whether the paper has one, and its beta, is not known to us.

    Training needs activations with gradients: a model and its corpus, or `saelab.harvest(..., gradients=True)`. Inference
    needs none: `encode` is plain TopK. `select_with_gradient` chooses as training does, to compare the two.

    Args:
        k: latents a token at most; 1 to d_sae.
        d_sae: number of latents.
        beta: weight of the gradient; 0 or more.
        aux_coefficient, aux_k, input_scale: as for `TopK`.

    Raises `ConfigError` when k is not between 1 and d_sae, or beta is negative.

    >>> GradientTopK(k=32, d_sae=4096, beta=0.3)
    GradientTopK(k=32, beta=0.3, d_sae=4096)
    """

    beta: float = 1.0

    needs_gradients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(beta=checks.number("beta", self.beta, least=0))

    def buffers(self) -> Tensors:
        zero = torch.zeros(())
        return {"influence_sum": zero, "influence_weight": zero.clone(), "influence_progress": zero.clone()}

    def rescale(self, params: Params, state: State, ratio: float) -> None:
        state.influence_sum.div_(ratio)

    def scores(self, params: Params, batch: Batch) -> PreActivations:
        plain = super().scores(params, batch)
        if batch.gradient is None:
            return plain
        return GradientPreActivations(plain.x_ND, plain.W_FD, plain.b_F, batch.gradient, params.W_dec)

    def allocate(self, scores: PreActivations, state: State, progress: float) -> SparseCodes:
        if not isinstance(scores, GradientPreActivations):
            raise ConfigError(
                "GradientTopK trains on the gradient of the model's loss beside each activation, and this batch has none: "
                "train from a model and its corpus, or from saelab.harvest(lm, corpus, ..., gradients=True)"
            )
        left = forgetting(state.influence_progress, progress, HALF_LIFE)
        total = state.influence_sum * left + scores.influence(self.k)  # this batch's is part of the mean
        return scores.per_token_by_influence(self.k, _strength(self.beta, total, state.influence_weight * left + 1))

    def observe(self, batch: Batch, codes: Codes, params: Params, state: State) -> None:
        assert isinstance(batch.scores, GradientPreActivations)
        total, weight, last = state.influence_sum, state.influence_weight, state.influence_progress
        average_(total, weight, last, batch.progress, HALF_LIFE, batch.scores.influence(self.k))

    def select(self, scores: PreActivations, state: State) -> SparseCodes:
        return scores.per_token(self.k)


def select_with_gradient(
    sae: Dictionary, x: Float[Tensor, "*rows d"], gradient: Float[Tensor, "*rows d"], beta: float | None = None
) -> SparseCodes:
    """The codes of x [..., d_in] chosen with the gradient of the loss at x, as a `GradientTopK` is trained.

    With gradients for the true next tokens this leaks them into the choice: a diagnostic, as are gradients for labels drawn
    from the model. `sae.encode_sparse(x)` is the deployable mode. `beta=None` is the SAE's own.

    Raises `ConfigError` when the SAE is not a trained `GradientTopK`, or the shapes differ.
    """
    if not isinstance(sae.cfg, GradientTopK) or not bool(sae.state.influence_weight > 0):
        raise ConfigError(f"{sae!r} is not a trained GradientTopK: it knows no scale of the gradients")
    if x.shape != gradient.shape or x.shape[-1] != sae.d_in:
        raise ConfigError(
            f"x is {list(x.shape)} and the gradient {list(gradient.shape)}; both must be [..., {sae.d_in:,}]"
        )
    params, scale = sae.params(), sae.state.scale
    rows, gradients = (t.reshape(-1, sae.d_in).to(params.b_enc.dtype) for t in (x, gradient))
    scores = sae.cfg.scores(params, Batch(rows * scale, rows * scale, gradients / scale))
    assert isinstance(scores, GradientPreActivations)
    strength = _strength(sae.cfg.beta if beta is None else beta, sae.state.influence_sum, sae.state.influence_weight)
    codes = scores.per_token_by_influence(sae.cfg.k, strength)
    return codes.with_values(codes.values / scale)


def _strength(beta: float, total: Tensor, weight: Tensor) -> float:
    """beta over the mean influence; 0 where the gradients are."""
    mean = float(total / weight)
    return beta / mean if mean > 0 else 0.0
