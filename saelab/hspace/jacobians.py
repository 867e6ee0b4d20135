"""Directions of one image: the leading right singular vectors of d epsilon / d h (Haas et al. 2024, section 3.4).

Shapes: N samples, C h w of the bottleneck, H W of the image, K directions.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.base.errors import ConfigError, DataError
from saelab.base.linear_maps import LinearMap, Stacked, singular_vectors
from saelab.base.surroundings import torch_defaults
from saelab.hspace.directions import Directions
from saelab.hspace.principal import h_of, step_of
from saelab.hspace.trajectory import Trajectory
from saelab.models.denoiser import Denoiser


@torch_defaults()
def jacobian(
    denoiser: Denoiser,
    trajectory: Trajectory,
    step: int,
    components: int,
    mask: Float[Tensor, "H W"] | None = None,
    *,
    pixels: bool = False,
    oversample: int = 4,
    tol: float = 1e-3,
    max_iter: int = 30,
    seed: int = 0,
) -> Directions:
    """The directions of h that change the denoiser's prediction most, at one step, with x_t and the skips held fixed.

    J = d epsilon(x_t, h) / d h is never formed: block subspace iteration (`saelab.base.linear_maps`). Predicted x0 has
    the same right singular vectors in the same order, since it is a multiple of epsilon at fixed x_t.

    The paper's directions belong to one image: give `trajectory[i:i+1]`. For several samples the Jacobians are stacked
    (our choice): the directions that change the prediction most in the mean square over the samples. All samples' graphs are
    held at once.

    Args:
        denoiser: the one that the trajectory is of.
        trajectory: with `x` and `h` recorded.
        step: index into `trajectory.timesteps`, 0 the noisiest; negative counts from the end.
        components: K; values closer than a few percent to the next need more rounds, as the residuals say.
        mask: [H, W] over the image: only what changes there counts (eq. 9 and 10).
        pixels: of latent diffusion, the change of the decoded predicted image in place of that of epsilon (our choice): what
            changes the picture most, and a mask over its pixels.
        oversample, tol, max_iter, seed: see `singular_vectors`.

    Returns: `Directions` of one vector each, for every timestep (applied so in our notes of the paper). `scales`: the standard
        deviation of h along the vector over the samples at that step, so that strengths compare with those of a PCA; of one
        sample the root mean square entry of its h. `details`: `singular_values`, `residuals`, `timestep` and `iterations`, each
        [K, 1].

    Raises `ConfigError` for another denoiser, a step or a number of components that is not there, or a mask of another shape;
    `DataError` where x or h was not recorded.

    >>> import saelab
    >>> denoiser = saelab.load_denoiser("digits-unet")
    >>> trajectory = saelab.hspace.sample(denoiser, n=1, steps=4, seed=0)
    >>> saelab.hspace.jacobian(denoiser, trajectory, step=2, components=2)
    Directions(2 by jacobian, [64, 4, 4] at every timestep of mid_block)
    """
    h = h_of(trajectory)
    if not denoiser.made(trajectory.denoiser):
        raise ConfigError("the trajectory is of another denoiser: its h means nothing in this one")
    if trajectory.x is None:
        raise DataError('this trajectory has no x: sample it with record=("h", "x", ...)')
    step = step_of(trajectory, step)
    h_N, x_N = h[:, step], trajectory.x[:, :-1][:, step]
    with torch.no_grad():
        seen = denoiser.decode(x_N[:1]) if pixels else x_N
    if mask is not None and tuple(mask.shape) != tuple(seen.shape[-2:]):
        raise ConfigError(f"the mask is {list(mask.shape)} and the image {list(seen.shape[-2:])}: one entry a pixel")
    t = int(trajectory.timesteps[step])
    maps = [
        LinearMap(_prediction(denoiser, trajectory, x, t, mask, i, pixels), point, components + oversample)
        for i, (x, point) in enumerate(zip(x_N, h_N, strict=True))
    ]
    found = singular_vectors(Stacked(maps), components, oversample=oversample, tol=tol, max_iter=max_iter, seed=seed)
    vectors_KD = found.right
    if len(h_N) > 1:
        scales_K = (h_N.flatten(1).double().cpu() @ vectors_KD.T.cpu()).std(0)
    else:
        scales_K = h_N.double().square().mean().sqrt().cpu().expand(components)
    column = torch.ones(components, 1)
    return Directions(
        vectors_KD.float().view(components, 1, *h_N.shape[1:]).to(h), scales_K.float()[:, None].to(h), None, trajectory.site,
        trajectory.denoiser, "jacobian",
        details={
            "singular_values": found.values.float()[:, None], "residuals": found.residuals.float()[:, None],
            "timestep": column * t, "iterations": column * found.iterations,
        },
    )  # fmt: skip


def _prediction(
    denoiser: Denoiser, trajectory: Trajectory, x: Tensor, t: int, mask: Tensor | None, i: int, pixels: bool
) -> Callable[[Tensor], Tensor]:
    """epsilon, or the decoded image, as a function of a batch of h (of the branch with the condition), at one sample's x_t."""
    x = x.clone()  # autograd keeps no tensor that was made in inference mode
    weight = None if mask is None else mask.to(x)
    given = trajectory.cond
    own = None if given is None else given[0 if len(given) == 1 else i].clone()

    def of_h(h: Tensor) -> Tensor:
        cond = None if own is None else own.expand(len(h), *own.shape)
        with denoiser.intervene(trajectory.site, lambda own, where: own if where.unconditional else h):
            epsilon, x0 = denoiser.both(x.expand(len(h), *x.shape), t, cond)
        seen = denoiser.decode(x0) if pixels else epsilon
        return seen if weight is None else seen * weight

    return of_h
