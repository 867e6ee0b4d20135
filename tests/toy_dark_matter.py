"""Activations and SAEs whose dark matter is known."""

import torch

import saelab


def planted(n: int = 3000, d: int = 12, f: int = 36, seed: int = 0) -> torch.Tensor:
    """Sparse sums of f directions, plus a mean: [n, d]. The directions depend on d and f alone."""
    directions = torch.nn.functional.normalize(torch.randn(f, d, generator=torch.Generator().manual_seed(7)), dim=1)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.rand(n, f, generator=generator) * (torch.rand(n, f, generator=generator) < 3 / f)
    return codes @ directions * 20 + 1


def trained(x: torch.Tensor, k: int = 3, d_sae: int = 48, tokens: int = 30_000) -> saelab.SAE:
    """A small TopK SAE of these rows."""
    sae = saelab.TopK(k=k, d_sae=d_sae)
    return saelab.train(x, sae=sae, tokens=tokens, batch_size=256, lr=3e-3, progress=False).sae


def multiple(d: int, times: float) -> saelab.SAE:
    """An SAE that gives `times` x: one latent for each direction of each axis."""
    sae = saelab.SAE(saelab.ReLU(l1=1.0, d_sae=2 * d), d)
    signs = torch.cat([torch.eye(d), -torch.eye(d)])
    with torch.no_grad():
        sae.encoder_weight.copy_(signs)
        sae.W_dec.copy_(times * signs)
    return sae


def dead(d: int) -> saelab.SAE:
    """An SAE that gives its bias, 2 everywhere, whatever comes in."""
    sae = saelab.SAE(saelab.TopK(k=1, d_sae=4), d)
    with torch.no_grad():
        sae.encoder_bias.fill_(-1e9)
        sae.decoder_bias.fill_(2.0)
    return sae
