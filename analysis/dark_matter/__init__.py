"""The dark matter of SAEs: what they miss, decomposed (Engels, Riggs, Tegmark, arXiv 2410.14670).

`decompose` splits an SAE's error into what is linear in its input and the rest. Around it: the `family` of several widths and
its power law, `downstream_cost` with each part restored, `train_on_parts`, the `planted_experiment` that validates the method,
`predict_from_earlier` SAEs, and `norm_baselines`. Searching codes in place of encoding them is in
`pursuit`.

>>> import torch, saelab
>>> sae = saelab.SAE(saelab.TopK(k=2, d_sae=16), d_in=4)
>>> decompose(sae, torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))).tokens_per_dimension > 40
True
"""

from saelab.analysis.dark_matter import pursuit
from saelab.analysis.dark_matter.decomposition import Decomposition, decompose
from saelab.analysis.dark_matter.downstream import downstream_cost, unseen_documents
from saelab.analysis.dark_matter.earlier import predict_from_earlier
from saelab.analysis.dark_matter.error_saes import train_on_parts
from saelab.analysis.dark_matter.norm_baselines import norm_baselines
from saelab.analysis.dark_matter.planted import Planted, planted_experiment
from saelab.analysis.dark_matter.power_law import PowerLaw, fit_power_law
from saelab.analysis.dark_matter.scaling import Family, Scaling, family, per_token_scaling, settled

__all__ = [
    "Decomposition",
    "Family",
    "Planted",
    "PowerLaw",
    "Scaling",
    "decompose",
    "downstream_cost",
    "family",
    "fit_power_law",
    "norm_baselines",
    "per_token_scaling",
    "planted_experiment",
    "predict_from_earlier",
    "pursuit",
    "settled",
    "train_on_parts",
    "unseen_documents",
]
