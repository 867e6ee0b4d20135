"""What a denoiser loses when a site is replaced by an autoencoder's reconstruction, by timestep.

n images, T timesteps.
"""

import contextlib
import html
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.base import checks
from saelab.base.errors import DataError
from saelab.base.progress import progress_bar
from saelab.base.protocols import Dictionary
from saelab.evaluation.fidelity import ratio, warn_of_training_tokens
from saelab.evaluation.reconstruction import Reconstruction
from saelab.evaluation.sparsity import Firing
from saelab.models.denoising import ddim, draws
from saelab.models.identity import warn_of_other_weights
from saelab.models.places import places_of_rows, reading_site, rows_of_places
from saelab.models.purpose import Purpose
from saelab.reading.images import Images, Noised, NoisedPlaces, load_images, noised

if TYPE_CHECKING:
    from pandas import DataFrame

    from saelab.models.denoiser import Denoiser, Moment

TIMESTEPS = 10
SAMPLES, SAMPLE_STEPS = 16, 20
WAYS = ("clean", "sae", "zero", "mean")


@dataclass(frozen=True, repr=False)
class DenoiserReport:
    """What `saelab.evaluate` finds of an autoencoder in a denoiser; each number is a column of `to_pandas()`.

    The denoising loss is the mean square error of the predicted noise, an entry of the image. Replaced are the places whose
    vector is within the norm limit of the SAE's training. Standard errors are over images.
    """

    l0: float
    """mean number of latents that fire at a replaced place"""
    explained_variance: float
    """1 - sum ||h - h_hat||^2 / sum ||h - mean||^2 over replaced places of all timesteps"""
    fvu: float
    """1 - explained_variance"""
    mse: float
    """mean squared error over replaced places and channels"""
    loss_clean: float
    """denoising loss of the plain denoiser, mean over images and timesteps"""
    loss_sae: float
    """the same with replaced places reconstructed"""
    loss_zero: float
    """the same with exactly those places set to zero"""
    loss_mean: float
    """the same with them set to their mean over the sparsity pass"""
    loss_score: float
    """(loss_zero - loss_sae) / (loss_zero - loss_clean)"""
    delta_loss: float
    """loss_sae - loss_clean"""
    delta_loss_se: float
    """its standard error"""
    output_change: float
    """sum ||e_sae - e||^2 / sum ||e||^2 of the predicted noise"""
    sample_change: float
    """mean over 16 samples of 20 steps (DDIM) of ||x_sae - x|| / ||x||, from the same x_T; NaN for a conditional denoiser"""
    dead_fraction: float
    """share of latents that fired at no replaced place of `sparsity_tokens`"""
    tokens: int
    """places read for everything but dead_fraction and the mean"""
    sparsity_tokens: int
    """replaced places read for those"""
    replaced_fraction: float
    """share of the places that were replaced"""
    site: str
    split: str
    by_timestep: "DataFrame"
    """a row a timestep: t, the four losses, delta_loss and its standard error, output_change, explained_variance, l0"""

    def to_pandas(self) -> "DataFrame":
        """One row, a column a number."""
        from pandas import DataFrame

        return DataFrame([{f.name: getattr(self, f.name) for f in fields(self) if f.name != "by_timestep"}])

    def _lines(self) -> list[tuple[str, str]]:
        return [
            ("l0", f"{self.l0:.2f}"),
            ("explained variance", f"{self.explained_variance:.4f}"),
            ("delta loss", f"{self.delta_loss:.4g} ± {self.delta_loss_se:.2g} an entry"),
            ("denoising loss", f"clean {self.loss_clean:.4f}, sae {self.loss_sae:.4f}, zero {self.loss_zero:.4f}, mean "
                               f"{self.loss_mean:.4f}; score {self.loss_score:.4f}"),
            ("output, samples", f"{self.output_change:.4f} of the noise's square, {self.sample_change:.4f} of a sample's norm"),
            ("silent latents", f"{self.dead_fraction:.2%}, none at {self.sparsity_tokens:,} places"),
            ("replaced", f"{self.replaced_fraction:.2%} of {self.tokens:,} places ({self.split})"),
        ]  # fmt: skip

    def __repr__(self) -> str:
        return "\n".join([f"Report at {self.site}", *(f"  {name:<20}{value}" for name, value in self._lines())])

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in self._lines())
        return f"<table><caption>{html.escape(self.site)}</caption>{rows}</table>"


def evaluate_denoiser(
    sae: Dictionary,
    denoiser: "Denoiser",
    images: Any = None,
    *,
    tokens: int = 8_192,
    sparsity_tokens: int = 200_000,
    timesteps: int = TIMESTEPS,
    site: str | None = None,
    batch_size: int = 8,
    split: str = "heldout",
    progress: bool = True,
) -> DenoiserReport:
    """Evaluate an SAE in its denoiser: reconstruction, sparsity, and what the predicted noise and the samples lose.

    `saelab.evaluate(sae, denoiser, images)` is this. Each image is noised, by one noise of its own, to the middles of equal
    parts of the schedule; the noise that was added is what the loss is measured against.

    Args:
        images: what `load_images` takes: [n, C, H, W], a pair (images, cond), or None for the denoiser's own samples.
        tokens: at least so many places are read with the whole network, images times timesteps times places.
        sparsity_tokens: at least so many, over random timesteps, for dead latents and the mean.
        timesteps: how many.
        site: where the SAE is put, that of `sae.metadata` unless given.
        batch_size: images a forward pass.
        split: "heldout" (5% of the images), "train" or "all".
        progress: show a bar with the rate and the time left.

    Warns when the split ends short of `tokens`, and when the SAE was trained on its images.
    Raises `ConfigError`, `SiteError` and `DataError` as `Denoiser.splice` and
    `load_images` do, and `DataError` where nothing is replaced.

    >>> import saelab
    >>> denoiser = saelab.load_denoiser("digits-unet")
    >>> sae = saelab.SAE(saelab.TopK(k=4, d_sae=64), 64, {"site": "mid_block"})
    >>> report = evaluate_denoiser(sae, denoiser, denoiser.examples()[0], tokens=256, sparsity_tokens=256, progress=False)
    >>> report.by_timestep.t.tolist()
    [50, 150, 250, 350, 450, 550, 650, 750, 850, 950]
    """
    checks.autoencoder("sae", sae), checks.denoiser("denoiser", denoiser)
    tokens, sparsity_tokens = checks.count("tokens", tokens), checks.count("sparsity_tokens", sparsity_tokens)
    batch_size = checks.count("batch_size", batch_size)
    total = len(denoiser.alphas_cumprod)
    grid = [int((j + 0.5) * total / timesteps) for j in range(checks.count("timesteps", timesteps, most=total))]
    purpose = Purpose.of(sae, site)
    path = reading_site(denoiser, purpose)
    warn_of_other_weights(denoiser, sae)
    images = load_images(images, denoiser)
    warn_of_training_tokens(sae, images, split)
    chosen = images.split(split)
    count = _count(chosen, split, tokens, math.prod(denoiser.site_shape(path)) // sae.d_in * len(grid))
    with torch.no_grad():
        firing, mean = _sparsity(purpose, NoisedPlaces(denoiser, chosen, path, 0), sparsity_tokens)
        sums = _Sums(purpose, denoiser, path, mean)
        for numbers, t in _jobs(count, batch_size, grid, progress):
            sums.add(noised(denoiser, chosen, numbers, torch.full_like(numbers, t), f"evaluated {int(numbers[0])}"), t)
        change = float("nan") if denoiser.conditional else _sample_change(denoiser, sae, path)
    return sums.report(firing, grid, change, split)


def _jobs(count: int, batch_size: int, grid: list[int], progress: bool) -> Iterator[tuple[Tensor, int]]:
    """The numbers of the images of each forward pass, and their timestep."""
    with progress_bar(count * len(grid), "evaluating", "image", progress) as bar:
        for first in range(0, count, batch_size):
            numbers = torch.arange(first, min(first + batch_size, count))
            for t in grid:
                yield numbers, t
                bar.update(len(numbers))


def _count(chosen: Images, split: str, tokens: int, places: int) -> int:
    """Images of so many places that make up the tokens; all, and a warning, where they are too few."""
    count = min(len(chosen), -(-tokens // places))
    if (read := count * places) < tokens:
        warnings.warn(f"the {split} split ends after {len(chosen):,} images, {read:,} of the {tokens:,} places asked for: the "
                      "figures are over those", stacklevel=3)  # fmt: skip
    return count


def _sparsity(purpose: Purpose, places: NoisedPlaces, wanted: int) -> tuple[Firing, Tensor]:
    """Firings of every latent and the mean of the rows [d], over the places that the SAE is for."""
    sae = purpose.sae
    firing, total, seen, epoch = Firing(sae.d_sae), torch.zeros(sae.d_in, dtype=torch.float64), 0, 0
    while seen < wanted:
        for rows, _ in places.read(epoch, 0):
            x = rows["x"].to(sae.W_dec)
            mine = x[sae.replaceable(x)]
            firing.add(sae.encode_sparse(mine))
            total += mine.sum(0, dtype=torch.float64).cpu()
            seen += len(x)
            if seen >= wanted:
                break
        epoch += 1
    if not firing.n:
        raise DataError(f"none of {seen:,} places is one that the SAE is for: all are above its norm limit of "
                        f"{float(sae.state.norm_limit):.4g}")  # fmt: skip
    return firing, total / firing.n


class _Sums:
    """Sums by image and timestep."""

    def __init__(self, purpose: Purpose, denoiser: "Denoiser", path: str, mean: Tensor) -> None:
        self.purpose, self.sae, self.denoiser, self.path = purpose, purpose.sae, denoiser, path
        self.values = {"zero": torch.zeros_like(mean), "mean": mean}
        self.places, self.found = 0, dict[tuple[str, int], list[Tensor]]()
        self.parts: dict[int, Reconstruction] = {}
        self.whole = Reconstruction(self.sae.d_in)
        self.fired: dict[int, int] = {}

    def add(self, seen: Noised, t: int) -> None:
        """Some images at one timestep."""
        kept: dict[str, Tensor] = {}

        def keep(h: Tensor, where: "Moment") -> Tensor:
            return kept.setdefault("h", h)

        outputs = {"clean": self._epsilon(seen, keep)}
        h = kept["h"]
        rows = rows_of_places(h)
        mine = self.purpose.within(rows, torch.ones(len(rows), dtype=torch.bool, device=rows.device))
        x = rows[mine].to(self.sae.W_dec)
        codes = self.sae.encode_sparse(x)
        x_hat = self.sae.decode(codes, x)
        for part in (self.whole, self.parts.setdefault(t, Reconstruction(self.sae.d_in))):
            part.add(x, x_hat)
        self.fired[t] = self.fired.get(t, 0) + len(codes.indices)
        self.places += len(rows)
        for name, value in {"sae": x_hat, **self.values}.items():
            new = rows.clone()
            new[mine] = value.to(new)
            outputs[name] = self._epsilon(seen, _putting(places_of_rows(new, h.shape)))
        for name, epsilon in outputs.items():
            self._keep(name, t, (epsilon - seen.noise).square().flatten(1).mean(1))
        self._keep("change", t, (outputs["sae"] - outputs["clean"]).square().flatten(1).sum(1))
        self._keep("size", t, outputs["clean"].square().flatten(1).sum(1))

    def _epsilon(self, seen: Noised, fn: Callable[..., Tensor]) -> Tensor:
        with self.denoiser.intervene(self.path, fn):
            return self.denoiser.epsilon(seen.x, seen.timesteps, seen.cond)

    def _keep(self, name: str, t: int, values: Float[Tensor, " n"]) -> None:
        self.found.setdefault((name, t), []).append(values.double().cpu())

    def report(self, firing: Firing, grid: list[int], sample_change: float, split: str) -> DenoiserReport:
        import pandas

        if not self.whole.n:
            raise DataError("no place of these images is one that the SAE is for: all are above its norm limit")
        sums = {key: torch.cat(parts) for key, parts in self.found.items()}
        rows = []
        for t in grid:
            losses = {f"loss_{way}": float(sums[way, t].mean()) for way in WAYS}
            part = self.parts[t]
            rows.append({
                "t": t, **losses, **_delta(sums["sae", t] - sums["clean", t]),
                "output_change": float(sums["change", t].sum() / sums["size", t].sum()),
                "explained_variance": part.explained_variance, "l0": self.fired[t] / part.n if part.n else float("nan"),
            })  # fmt: skip
        over = {name: torch.stack([sums[name, t] for t in grid]).mean(0) for name in (*WAYS, "change", "size")}
        loss = {f"loss_{way}": float(over[way].mean()) for way in WAYS}
        scale = loss["loss_zero"] - loss["loss_clean"]
        return DenoiserReport(
            l0=sum(self.fired.values()) / self.whole.n,
            explained_variance=self.whole.explained_variance,
            fvu=self.whole.fvu,
            mse=self.whole.mse,
            **loss,
            loss_score=(loss["loss_zero"] - loss["loss_sae"]) / scale if scale else float("nan"),
            **_delta(over["sae"] - over["clean"]),
            output_change=float(over["change"].sum() / over["size"].sum()),
            sample_change=sample_change,
            dead_fraction=firing.silent_fraction,
            tokens=self.places,
            sparsity_tokens=firing.n,
            replaced_fraction=self.whole.n / self.places,
            site=self.path,
            split=split,
            by_timestep=pandas.DataFrame(rows),
        )


def _putting(h: Tensor) -> Callable[..., Tensor]:
    return lambda *_: h


def _delta(differences: Float[Tensor, " n"]) -> dict[str, float]:
    delta, se = ratio(differences, torch.ones_like(differences))
    return {"delta_loss": delta, "delta_loss_se": se}


def _sample_change(denoiser: "Denoiser", sae: Dictionary, path: str) -> float:
    start = draws(denoiser, SAMPLES, 0, "evaluated", 1)[:, 0]
    found = []
    for context in (contextlib.nullcontext(), denoiser.splice(sae, site=path)):
        with context:
            found.append(ddim(denoiser, start, SAMPLE_STEPS).flatten(1))
    return float(((found[1] - found[0]).norm(dim=1) / found[0].norm(dim=1)).mean())
