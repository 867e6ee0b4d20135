"""Attention-output SAEs: which heads, which source positions and which features of the residual stream a latent comes from.

After "Interpreting Attention Layer Outputs with Sparse Autoencoders" (Kissane, Krzyzanowski, Bloom, Conmy, Nanda, arXiv
2406.17759). The SAEs are of an attention layer's `hook_z`, all heads side by side, as `lm.sites()` lists it.

>>> import saelab
>>> sae = saelab.SAE(saelab.TopK(k=2, d_sae=6), d_in=8, metadata={"site": "blocks.0.attn.hook_z", "heads": [2, 4]})
>>> shares = head_attribution(sae)
>>> shares.shape, bool((shares.sum(1) - 1).abs().max() < 1e-6)
(torch.Size([6, 2]), True)
"""

from saelab.analysis.attention.families_of_latents import LatentFamilies, latent_families
from saelab.analysis.attention.heads import (
    HeadAgreement,
    firing_head_attribution,
    head_agreement,
    head_attribution,
    polysemanticity,
    top_latents,
)
from saelab.analysis.attention.source_positions import DirectAttribution, at_positions, direct_attribution, patterns
from saelab.analysis.circuits.residual_sources import FeatureAttribution, feature_attribution

__all__ = [
    "DirectAttribution",
    "FeatureAttribution",
    "HeadAgreement",
    "LatentFamilies",
    "at_positions",
    "direct_attribution",
    "feature_attribution",
    "firing_head_attribution",
    "head_agreement",
    "head_attribution",
    "latent_families",
    "patterns",
    "polysemanticity",
    "top_latents",
]
