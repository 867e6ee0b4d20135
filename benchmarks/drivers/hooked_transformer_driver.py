"""Runs in the sae-lens environment with the checkout on PYTHONPATH: see hooked_transformer.py."""

from importlib.metadata import version

import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig

import saelab
from saelab.analysis import attention

SHAPES = {  # the two block shapes that HookedTransformer knows, GPT-2's and Llama's
    "GPT-2-like": {"act_fn": "gelu_new", "normalization_type": "LN", "positional_embedding_type": "standard"},
    "Llama-like": {
        "act_fn": "silu", "normalization_type": "RMS", "positional_embedding_type": "rotary", "rotary_dim": 8,
        "gated_mlp": True, "n_key_value_heads": 2,
    },
}  # fmt: skip


def main() -> None:
    for label, shape in SHAPES.items():
        cfg = HookedTransformerConfig(
            n_layers=3, d_model=32, d_head=8, n_heads=4, d_mlp=64, n_ctx=32, d_vocab=100, seed=0, device="cpu", **shape
        )
        model = HookedTransformer(cfg).eval()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        lm = saelab.load_model(model)
        ids = torch.randint(100, (2, 12), generator=torch.Generator().manual_seed(0))
        sites = list(lm.sites()["name"])
        recorded = lm.record(ids, sites)
        with torch.no_grad():
            logits, cache = model.run_with_cache(ids)
        for site in sites:
            torch.testing.assert_close(recorded[site], cache[site].flatten(2))
        torch.testing.assert_close(lm.logits(ids), logits)
        per_token = model.loss_fn(logits, ids, per_token=True)
        torch.testing.assert_close(lm.loss(ids, reduction="none"), per_token)
        site = "blocks.1.hook_resid_post"
        halved = model.run_with_hooks(ids, fwd_hooks=[(site, lambda activation, hook: activation * 0.5)])
        with lm.intervene(site, lambda activation, where: activation * 0.5):
            torch.testing.assert_close(lm.logits(ids), halved)
        torch.testing.assert_close(lm.logits(ids), logits)
        heads = {"site": "blocks.2.attn.hook_z", "heads": [4, 8]}
        sae = saelab.SAE(saelab.TopK(k=2, d_sae=16), d_in=32, metadata=heads)
        parts = attention.direct_attribution(sae, lm, ids, latent=3)
        assert parts.error < 1e-4 and float(parts.by_source.abs().max()) > 1e-2
        assert all(value.equal(before[name]) for name, value in model.state_dict().items()), "the model was changed"
        print(
            f"{label}: {len(sites)} sites, logits, losses, intervention, attribution agree: {', '.join(sites[:6])}, ..."
        )
    print(f"transformer-lens {version('transformer-lens')}, torch {torch.__version__}: all agree")


if __name__ == "__main__":
    main()
