"""h-space: the bottleneck of a diffusion denoiser over a whole run, its directions and edits along them.

Haas et al. (FG 2024, arXiv:2303.11073), Asyrp (Kwon et al., ICLR 2023), BoundaryDiffusion (Zhu et al., NeurIPS 2023).

>>> import saelab
>>> from saelab import hspace
>>> denoiser = saelab.load_denoiser("digits-unet")
>>> hspace.sample(denoiser, n=4, steps=5, eta=1.0, seed=0).h.shape
torch.Size([4, 5, 64, 4, 4])
"""

from typing import TYPE_CHECKING

from saelab.base.lazy import lazily

_PUBLIC = {
    "boundary": "saelab.hspace.supervised",
    "Direction": "saelab.hspace.directions",
    "Directions": "saelab.hspace.directions",
    "Edit": "saelab.hspace.editing",
    "edit": "saelab.hspace.editing",
    "Effects": "saelab.hspace.reporting",
    "effects": "saelab.hspace.reporting",
    "invert": "saelab.hspace.inversion",
    "jacobian": "saelab.hspace.jacobians",
    "latent_codes": "saelab.hspace.dictionaries",
    "latent_directions": "saelab.hspace.dictionaries",
    "latent_rows": "saelab.hspace.dictionaries",
    "mean_difference": "saelab.hspace.supervised",
    "pca": "saelab.hspace.principal",
    "random_direction": "saelab.hspace.effect_measures",
    "replay": "saelab.hspace.sampling",
    "sample": "saelab.hspace.sampling",
    "shift": "saelab.hspace.supervised",
    "show_latents": "saelab.hspace.latent_page",
    "train_latents": "saelab.hspace.dictionaries",
    "Trajectory": "saelab.hspace.trajectory",
}

__all__ = sorted(_PUBLIC)


__getattr__, __dir__ = lazily(globals(), _PUBLIC)


if TYPE_CHECKING:
    from saelab.hspace.dictionaries import latent_codes as latent_codes
    from saelab.hspace.dictionaries import latent_directions as latent_directions
    from saelab.hspace.dictionaries import latent_rows as latent_rows
    from saelab.hspace.dictionaries import train_latents as train_latents
    from saelab.hspace.directions import Direction as Direction
    from saelab.hspace.directions import Directions as Directions
    from saelab.hspace.editing import Edit as Edit
    from saelab.hspace.editing import edit as edit
    from saelab.hspace.effect_measures import random_direction as random_direction
    from saelab.hspace.inversion import invert as invert
    from saelab.hspace.jacobians import jacobian as jacobian
    from saelab.hspace.latent_page import show_latents as show_latents
    from saelab.hspace.principal import pca as pca
    from saelab.hspace.reporting import Effects as Effects
    from saelab.hspace.reporting import effects as effects
    from saelab.hspace.sampling import replay as replay
    from saelab.hspace.sampling import sample as sample
    from saelab.hspace.supervised import boundary as boundary
    from saelab.hspace.supervised import mean_difference as mean_difference
    from saelab.hspace.supervised import shift as shift
    from saelab.hspace.trajectory import Trajectory as Trajectory
