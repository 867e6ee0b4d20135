"""Untrained autoencoders of the small random models, and the oracles of attribution written out with dense sums."""

import copy

import torch

import saelab


def attention_sae(lm, block, cfg=None, seed=1):
    """An untrained SAE of a block's hook_z, with biases and a scale."""
    return _sae(lm, f"blocks.{block}.attn.hook_z", cfg or saelab.TopK(k=4, d_sae=24), seed)


def residual_sae(lm, block, cfg=None, seed=2):
    """An untrained SAE of the stream before a block, with biases and a scale."""
    return _sae(lm, f"blocks.{block}.hook_resid_pre", cfg or saelab.TopK(k=4, d_sae=40), seed)


def _sae(lm, name, cfg, seed):
    site = lm.site(name)
    heads = [site.heads, site.d_head] if site.heads else None
    metadata = {"site": site.name, "heads": heads, "skip_positions": 1}
    sae = saelab.SAE(cfg, d_in=site.width, metadata=metadata, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        sae.state.scale.fill_(4.0)
        sae.state.target_scale.fill_(4.0)
        for bias in (sae.encoder_bias, sae.decoder_bias, *sae.extra.values()):
            bias.copy_(0.3 * torch.randn(bias.shape, generator=generator))
    return sae


def pre_activation(sae, x, latent):
    """(x - b_dec) W_enc + b_enc of one latent, by its definition."""
    return ((x - sae.b_dec) @ sae.W_enc[:, latent] + sae.b_enc[latent]).detach()


def eager_pattern(model, ids, block):
    """A [batch, head, destination, source] as transformers' own eager attention gives it, on a copy: asked for patterns, a
    model keeps transformers' hooks."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(ids, output_attentions=True).attentions[block]
