"""An SAE of every kind, with weights, scales, biases and thresholds drawn at random: nothing is trained."""

import torch

import saelab
from saelab import SAE, Transcoder

D, F, K = 16, 48, 5
PLAIN = {
    "TopK": saelab.TopK(k=K, d_sae=F),
    "MultiTopK": saelab.MultiTopK(k=K, d_sae=F),
    "GradientTopK": saelab.GradientTopK(k=K, d_sae=F),
    "MutualChoice": saelab.MutualChoice(k=K, d_sae=F),
    "Matryoshka": saelab.Matryoshka(k=K, d_sae=F),
    "FeatureChoice": saelab.FeatureChoice(k=K, d_sae=F),
    "ReLU": saelab.ReLU(l1=1.0, d_sae=F),
    "ReLU of unit rows": saelab.ReLU(l1=1.0, d_sae=F, unit_decoder=True),
    "Gated": saelab.Gated(l1=1.0, d_sae=F),
    "JumpReLU": saelab.JumpReLU(target_l0=4.0, d_sae=F),
}
TRANSCODERS = {
    f"{name}{' skip' if skip else ''} transcoder": Transcoder(of=cfg, skip=skip)
    for name, cfg in PLAIN.items()
    if name != "GradientTopK"
    for skip in (False, True)
}
KINDS = PLAIN | TRANSCODERS


def made(name: str, layer: int = 0) -> SAE:
    """The SAE of this kind, at a site of this layer."""
    cfg, draw = KINDS[name], torch.Generator().manual_seed(len(name) + layer)
    sae = SAE(cfg, D, {"site": f"blocks.{layer}.hook_resid_post", "model": "tiny", "context_length": 32}, seed=layer)
    if name in TRANSCODERS:
        sae.metadata |= {"site": f"blocks.{layer}.ln2.hook_normalized", "target_site": f"blocks.{layer}.hook_mlp_out"}

    def normal(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=draw)

    with torch.no_grad():
        for weight in (sae.encoder_bias, sae.decoder_bias, *sae.extra.values()):
            weight.add_(0.2 * normal(weight))
        sae.encoder_weight.add_(0.1 * normal(sae.encoder_weight))
        if not cfg.recipe.unit_decoder:
            sae.W_dec.mul_(1 + torch.rand(F, 1, generator=draw))
        sae.state.scale.fill_(0.5)
        sae.state.target_scale.fill_(0.5 if name in PLAIN else 0.25)
        for threshold in ("threshold", "latent_cut"):
            if hasattr(sae.state, threshold):
                getattr(sae.state, threshold).copy_(0.2 + torch.rand(F, generator=draw))
        for value in ("cut_sum", "cut_weight", "histogram_weight"):
            if hasattr(sae.state, value):
                getattr(sae.state, value).fill_(0.6 if value == "cut_sum" else 1.0)
    return sae.requires_grad_(False)


def rows(n: int = 64) -> torch.Tensor:
    return 2 * torch.randn(n, D, generator=torch.Generator().manual_seed(1))
