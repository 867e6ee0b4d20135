"""Denoisers from inside: Jacobian spectra, feature dynamics, scores, representations, probes, exact oracles.

>>> import torch
>>> from saelab.analysis import denoisers
>>> denoisers.mutual_knn(torch.eye(12), torch.eye(12), k=3)
1.0
"""

from saelab.base.lazy import lazily

_MODULES = {
    "bias_free": ("BiasFree", "coarse_to_fine", "train_bias_free"),
    "dynamics": ("Dynamics", "feature_dynamics", "feature_reuse", "reuse_schedule"),
    "generalisation": ("TwoSplit", "phase_curve", "two_split"),
    "geometry": (
        "Basis", "homogeneity_error", "jacobian_basis", "jacobian_spectrum", "leading_directions", "posterior_mean",
        "score_error", "sure",
    ),
    "overview": ("Overview", "overview_of"),
    "oracles": ("Gaussian", "LowRankMixture", "subspace_affinity"),
    "probes": ("posterior_gap", "probe_timesteps"),
    "score": ("blind_parameter", "langevin", "score_of", "total_variation", "tweedie"),
    "similarity": ("alignment", "cka", "cknna", "hsic", "mutual_knn"),
}  # fmt: skip
_PUBLIC = {name: f"saelab.analysis.denoisers.{module}" for module, names in _MODULES.items() for name in names}

__all__ = sorted(_PUBLIC)

__getattr__, __dir__ = lazily(globals(), _PUBLIC)
