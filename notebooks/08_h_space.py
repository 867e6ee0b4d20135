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
# # h-space: directions in the bottleneck of a diffusion denoiser
#
# A diffusion model turns noise into an image in many small steps, each by the same U-Net. What passes through the
# U-Net's middle block at all steps together is called **h-space** (Kwon et al. 2023): add a vector there, at every
# step, and the image changes in what it *shows* rather than in its pixels. In this notebook we sample a small denoiser
# of digits that comes with saelab, find such directions in four ways, edit with them, and ask with controls whether
# they did anything special.
#
# Everything works with no network, in a few minutes on two cores.

# %%
# On Colab, or where saelab is missing: put the address in, and take the first `# ` away.
# # %pip install -q "saelab[diffusion] @ git+<address of the repository>"

# %%
import torch

import saelab
from saelab import hspace

# %% tags=["parameters"]
N, STEPS, EDITED = 300, 50, 64
ROWS = 300_000

# %%
denoiser = saelab.load_denoiser("digits-unet")
denoiser.sites().head(8)

# %% [markdown]
# ## Trajectories
#
# A **trajectory** is everything about a set of samples: where they started (x_T), the noise that was added at each
# step, and what was recorded on the way. Because the noise is kept, it replays to the same bits, and an edit changes
# nothing but what the edit does.

# %%
trajectory = hspace.sample(denoiser, n=N, steps=STEPS, eta=1.0, seed=0)
assert torch.equal(hspace.replay(denoiser, trajectory).samples, trajectory.samples)
print(trajectory)
print("h:", tuple(trajectory.h.shape), "(samples, steps, channels, height, width)")

# %% [markdown]
# The bundled classifier says what the samples are: we need it to measure edits, and as labels for supervised
# directions.

# %%
with torch.no_grad():
    labels = denoiser.classifier()(trajectory.samples).argmax(1)
labels.bincount(minlength=10)

# %% [markdown]
# ## Directions without labels: principal components
#
# One PCA at each step, over samples (Haas et al. 2024). The paper pairs the j-th components of all steps; in small
# models they are not the same direction from one step to the next, so saelab matches each step's components to those of
# the step before. The `alignment` column is the mean cosine between neighbouring steps: where it is low, do not trust
# the pairing.

# %%
components = hspace.pca(trajectory, components=4)
components.to_pandas()

# %% [markdown]
# What do they do? `hspace.effects` edits the same samples at several strengths (in standard deviations), beside
# **random directions of the same length**: isotropic ones, and ones that vary as h varies. Without such controls every
# push looks meaningful.

# %%
some = trajectory[:EDITED]
found = hspace.effects(denoiser, some, components, strengths=[-2, -1, 0, 1, 2])
found.against_random("rms").query("strength == 2")

# %%
found.gallery("pca 0")

# %% [markdown]
# The matrix says how each class's mean probability changes, in the manner of the paper's table I.

# %%
found.matrix(2.0).round(2)

# %% [markdown]
# ## Directions with labels: differences of class means
#
# The mean h of one class less the mean h of the others, at each step. Strength 1 adds the whole difference. A good
# direction raises the probability of its class steadily, and leaves the sample recognisable: `identity` is how far the
# edited sample is from itself, where 1 is as far as another sample.

# %%
classes = [k for k in (3, 7) if (labels == k).sum() > 1]
towards = [hspace.mean_difference(trajectory, labels, positive=k)[0] for k in classes]
rising = hspace.effects(denoiser, some, towards, strengths=[0, 0.25, 0.5, 1, 1.5], controls=["isotropic"])
rising.monotonicity()

# %%
rising.plot()

# %% [markdown]
# ## Taking other attributes out
#
# Directions overlap: what makes a 3 may also make a 2. `project_out` removes the span of other directions, over all steps at
# once.

# %%
others = [
    hspace.mean_difference(trajectory, labels, positive=int(k))[0] for k in labels.unique() if k not in classes[:1]
][:3]
plain = hspace.mean_difference(trajectory, labels, positive=classes[0])
clean = plain.project_out(others)
both = hspace.effects(
    denoiser, some, [plain[0], clean[0]], strengths=[1.5], controls=(), targets={clean[0].name: classes[0]}
)
both.to_pandas()[["direction", "change_target", "off_target", "identity"]]

# %% [markdown]
# ## Directions of one image: the Jacobian
#
# Which directions of h change *this* image's prediction most, at one step? The leading right singular vectors of the
# Jacobian, found by subspace iteration without ever forming it; a mask asks for changes in one part of the image.
# `residuals` says how well they converged.

# %%
left = torch.zeros(8, 8)
left[:, :4] = 1
local = hspace.jacobian(denoiser, trajectory[:1], step=STEPS // 2, components=3, mask=left)
local.to_pandas()

# %% [markdown]
# ## A boundary at a mixing step
#
# A linear classifier of h at one step, whose normal is a direction; `shift` gives each sample the strength that puts it
# at a chosen distance, and the edit happens at that step alone (after Zhu et al. 2023). Without `step=` the step is
# searched.

# %%
boundary = hspace.boundary(trajectory, (labels == classes[0]).long(), step=-STEPS // 3)
t = int(boundary.timesteps[0])
strength = hspace.shift(boundary[0], some, distance=3 * float(boundary.scales[0, 0]))
moved = hspace.edit(denoiser, some, boundary[0], strength, window=(t, t))
boundary.to_pandas()[["name", "accuracy", "accuracy_x", "chance"]]

# %% [markdown]
# ## Sparse autoencoders of h
#
# The trainers for language models work here as they are: a row is h at one place of one sample at one step. Each latent
# has a time (at which noise levels it fires) and a place. The page shows both, with the samples that fire it most.

# %%
run = hspace.train_latents(trajectory, saelab.TopK(k=4, d_sae=256), tokens=ROWS, batch_size=1024)
hspace.show_latents(run.sae, some, "latents.html", latents=24, classifier=denoiser.classifier())
run

# %% [markdown]
# ![The page of the latents](pictures/08-latents.png)
#
# A latent is a direction too: `hspace.latent_directions(run.sae, [3])`, to edit with like any other.
#
# ## Keep it
#
# Directions are saved with the digest of their denoiser, and refuse to edit another. The page of the effects is one
# file with a slider of strengths; it opens offline. The same from the command line: `saelab hspace --help`.
#
# ![The page of the directions](pictures/08-directions.png)

# %%
components.save("pca.safetensors")
again = hspace.Directions.load("pca.safetensors", denoiser)
found.to_html("directions.html", title="Principal components of the digits")
print(again)

# %% [markdown]
# ## What was seen
#
# - Two of the four principal components (1 and 3) change the pictures 1.7 times as much as random directions that vary as
#   h varies, component 0 a little more (1.2), component 2 less (.8). Against isotropic directions all look strong (4 to 8
#   times): that control is too easy.
# - Differences of class means do what they are for: the probability of a 3 rises steadily from .10 to .33, of a 7 from
#   .13 to .56, at 40% and 49% of the distance to another sample.
# - Taking three other classes out cost the direction a sixth of its effect (.23 to .20) and left the other classes moving
#   as before (.044 and .045): here it bought nothing.
# - The boundary at one step is right for 84% of the held-out samples, and always saying "no 3" would be right for 88%:
#   with 300 samples it found no boundary, and its edit should not be believed.
# - Of 256 latents of h six stayed dead; which of the others mean anything, the page is for.
