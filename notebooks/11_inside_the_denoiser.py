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
# # Inside the denoiser
#
# A denoiser has learnt a density: what it takes away from a noisy image says where images lie. In this notebook we look
# at how (the basis in which it shrinks, the features that it computes), ask whether small denoisers memorise their
# training images or generalise, and train an autoencoder on the features of one.
#
# Everything works with no network, in a few minutes on two cores.

# %%
# On Colab, or wherever saelab is not installed: put the address in and take the first two characters of each line away.
# # %pip install -q "saelab[diffusion] @ git+<address of the repository>"

# %%
import torch
from sklearn.datasets import load_digits

import saelab
from saelab.analysis import denoisers

# %% tags=["parameters"]
RUNS, STEPS, LAGS = 4, 8, [1, 2, 4]
COUNTS, TRAINING = [10, 100, 700], 800
PLACES = 30_000

# %%
denoiser = saelab.load_denoiser("digits-unet")
sites = ["down_blocks.1", "mid_block", "up_blocks.1"]
found = denoisers.overview_of(denoiser, sites=sites, n=RUNS, steps=STEPS, lags=LAGS)
found

# %% [markdown]
# ## Geometry
#
# With y = x + sigma n, the Jacobian of the best denoiser is the covariance of the images that y may have come from,
# over sigma^2: large eigenvalues are directions in which the image is still open. Its rank over the timestep is
# expected to have a minimum at middling noise (Wang et al. 2024), and the effective dimension (the sum of the
# eigenvalues) to grow as the noise falls. At high noise the Jacobian of a small network is mostly not symmetric, which
# that of a best denoiser would be: there, do not read it.

# %%
found.tables["spectrum"].round(2)

# %%
found.plot("spectrum")

# %% [markdown]
# ## Dynamics
#
# How much features change from a step to the next, and the causal question: what does the predicted noise lose when a
# block's features are those of some steps ago? The second decides what may be reused (Faster Diffusion, DeepCache); the
# first only hints at it.

# %%
found.plot("dynamics")

# %%
found.plot("reuse")

# %% [markdown]
# The longest of the lags for which every error is within 5%, by block and timestep:

# %%
found.tables["schedule"]

# %% [markdown]
# ## What is left of the image
#
# Linear probes for the digit, at each timestep and site, with the noisy image itself ("x_t") beside them.

# %%
found.plot("probes")

# %% [markdown]
# ## Memorise or generalise?
#
# Two denoisers are trained on disjoint images. Kadkhodaie et al. (2024) find that with few images each knows its own by
# heart and nothing of the other's, and that with many they come to agree on images that neither has seen, which is only
# possible if both have learnt the same thing. The denoisers have no additive constants and are given no noise level, so
# that f(a y) = a f(y).

# %%
digits = torch.tensor(load_digits().images).float()[:, None] / 16
split = denoisers.two_split(digits, COUNTS, steps=TRAINING, batch_size=64, samples=8, out="two-split", progress=False)
split.curves.round(3)

# %%
split.plot()

# %% [markdown]
# The slope of PSNR out over PSNR in, the cosine of the two denoisers' samples from the same noise (`between`), and that
# of a sample and the training image nearest to it (`nearest`):

# %%
split.slopes().merge(split.samples, on="images").round(3)

# %% [markdown]
# How many samples does it take in principle? For a subspace of d dimensions d of them, exactly; for a mixture of
# subspaces a few more.

# %%
denoisers.phase_curve(rank=4, counts=[2, 3, 4, 8, 16, 32], dimensions=24, components=2, draws=4).round(3)

# %% [markdown]
# ## Latents
#
# An SAE at the middle block: a row is what the block gives at one place of one noised image.

# %%
images, labels = denoiser.examples()
run = saelab.train(
    denoiser, images, site="mid_block", sae=saelab.TopK(k=8, d_sae=512), tokens=PLACES, batch_size=1024,
    buffer_tokens=16_384, progress=False,
)  # fmt: skip
report = saelab.evaluate(run.sae, denoiser, images, tokens=1_024, sparsity_tokens=4_096, progress=False)
report

# %%
report.by_timestep.round(4)

# %% [markdown]
# With its error term the splice is the denoiser itself, to the bit:

# %%
with torch.no_grad(), denoiser.splice(run.sae, error_term=True, edit=lambda codes: codes):
    spliced = denoiser.epsilon(images[:4], 300)
print(torch.equal(spliced, denoiser.epsilon(images[:4], 300)))

# %% [markdown]
# ## What was seen
#
# - The Jacobian's rank has its minimum (24.5 of 64) at middling noise, timesteps 250 to 375, and rises to either side: the
#   U that was expected. At 625 and above its asymmetry is near 1 and the eigenvalues are as often negative as not: what the
#   rank is there says nothing of images.
# - Features of the encoder's last block may be some steps old at any timestep (error 5% or less); those of the decoder's last
#   block only at high noise, and at the end one step is already too many. The middle block is in between.
# - The digit can be read from the middle block better than from the noisy image at every timestep below 400, by 16 points
#   at 250; from 625 on from nothing.
# - With 10 images each, the denoisers are 1.1 to 5.9 dB better on their own than on others, and differ from each other by
#   1.48 sigma at the lowest noise; with 100 by .2 to .5 dB and .60; with 700 by .1 dB and .54. Most of the way is done
#   by 100. Their samples from the same noise have a cosine of .89, .98 and .98. That samples of few images are copies of
#   them was not seen: the nearest training image has .75 at 10 and .83 at 700, where there are hundreds to be near to. One
#   start in eight led nowhere: both figures are of the other seven.
# - Two subspaces of 4 dimensions are found from 8 samples each; with 16 one draw of four missed one of them, by a poor start
#   of the search and not for want of samples.
# - The SAE explains .73 of the variance at the middle block, and splicing it changes the predicted noise by 2 in 10,000. So
#   would zeros, nearly: the loss hardly depends on this block (.0717 and .0722 without), so that `loss_score` has no meaning
#   here. On seven held-out images no difference of these losses is to be believed.
