"""A small SAE of a small random model, with statistics, for the tests of steering sweeps."""

import saelab

SITE = "blocks.1.hook_resid_post"


def trained(lm: "saelab.LanguageModel") -> tuple["saelab.SAE", list[int]]:
    """48 latents at block 1, and the numbers of those that fire."""
    corpus = saelab.load_corpus([f"the state of the union {i} " * 40 for i in range(30)])
    run = saelab.train(
        lm, corpus, site=SITE, sae=saelab.TopK(k=4, d_sae=48), tokens=4000, context_length=32, buffer_tokens=1024,
        batch_size=128, progress=False,
    )  # fmt: skip
    return run.sae, (run.sae.latent_stats.density > 0.01).nonzero().flatten().tolist()
