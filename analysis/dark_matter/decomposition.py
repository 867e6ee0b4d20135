"""What an SAE misses, split into a linear function of its input and the rest (Engels, Riggs, Tegmark, arXiv 2410.14670).

    x = Sae(x) + LinearError(x) + NonlinearError(x),   LinearError(x) = x B + b,   (B, b) = argmin E |x - Sae(x) - x B - b|^2

Two passes over the rows: the first adds up the moments from which the maps, their R^2 and the controls follow, the second
the norms of the parts of the held-out rows. Shapes: N rows, D dimensions.
"""

import dataclasses
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.analysis.dark_matter.coded_rows import CodedRows, for_sae, wide
from saelab.analysis.dark_matter.controls import Control, controls
from saelab.analysis.dark_matter.rows import LEARN, MAP, SCORE, Chunk, Rows
from saelab.base import checks
from saelab.base.errors import ConfigError, DataError
from saelab.base.moments import LinearFit, Moments, Spread, TargetMoments, divided, merged
from saelab.base.protocols import Dictionary

PARTS = ("x", "sae", "error", "linear", "nonlinear")
TOKENS_PER_DIMENSION = 40  # the paper has 150,000 / 3,584, by our notes


@dataclass(frozen=True, repr=False)
class Decomposition:
    """The parts of an SAE's error, with figures on held-out rows. Error e = x - Sae(x), about x @ linear_map + bias.

    Attributes
    ----------
    linear_map [d, d], bias [d]: float64, fitted on the other rows (`bias` zeros where none was asked for).
    r2_error: R^2 of the error's prediction, the mean over dimensions (constant ones left out); `r2_error_pooled` is
        1 - sum of all squared residuals / sum of all squares around the mean.
    r2_norm: for each part, R^2 of predicting its squared norm from x by least squares, fitted on one half of the held-out rows
        and taken on the other (`dark_matter.rows`).
    fvu, fvu_nonlinear, fvu_linear: of Sae(x); of Sae(x) + linear part, which leaves the nonlinear one; of Sae(x) +
        nonlinear part. FVU = sum |x - x_hat|^2 / sum |x - mean|^2, the mean of the held-out rows.
    norms: mean norm of each part, in units of the activation.
    l0: latents that fire on a row, mean.
    controls: "rescaled" (the error of the best scalar multiple of Sae(x), around the means where there is a bias: what an
        SAE misses only because it shrinks is linear, and gone here),
        "dead" (an SAE that puts out its bias whatever comes in: all error is linear, R^2 is 1 with a bias),
        "other_bias" (without bias where there is one, with one where there is none).
    tokens_fit, tokens_heldout, tokens_per_dimension (of the fit), held_out_by ("document", "context" or "row").
    dropped, dropped_variance: share of the rows above the SAE's norm limit, which are left out, and of the variance of all
        rows that they hold.
    groups [g], sums [g, 3]: of the held-out rows of each document (or block): squared deviations of x, squared error,
        squared nonlinear error. Bootstraps draw from them.
    """

    sae: Dictionary
    linear_map: Tensor
    bias: Tensor
    r2_error: float
    r2_error_pooled: float
    r2_norm: dict[str, float]
    fvu: float
    fvu_nonlinear: float
    fvu_linear: float
    norms: dict[str, float]
    l0: float
    controls: dict[str, Control]
    tokens_fit: int
    tokens_heldout: int
    tokens_per_dimension: float
    held_out_by: str
    dropped: float
    dropped_variance: float
    groups: Tensor
    sums: Tensor
    holdout: float
    seed: int
    high_norm: bool

    def split(
        self, x: Float[Tensor, "*rows d"]
    ) -> tuple[Float[Tensor, "*rows d"], Float[Tensor, "*rows d"], Float[Tensor, "*rows d"]]:
        """(reconstruction, linear, nonlinear) [..., d] in at least fp32; they add up to x."""
        with torch.no_grad():
            x = wide(x)
            reconstruction = self.sae(x)
            linear = LinearFit(self.linear_map, self.bias)(x)
            return reconstruction, linear, x - reconstruction - linear

    def chunks(self, x: Any) -> Iterator[Chunk]:
        """The chunks of the same rows, each of one use (`dark_matter.rows`); rows of high norm left out as in the fit."""
        for chunk in Rows(x, self.holdout, self.seed):
            mine, _ = for_sae(self.sae, chunk, self.high_norm)
            if len(mine.x):
                yield mine

    def to_pandas(self) -> Any:
        """The figures as a pandas.DataFrame of one row."""
        import pandas

        plain = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if isinstance(getattr(self, field.name), int | float | str)
        }
        nested = {f"r2_norm_{name}": value for name, value in self.r2_norm.items()}
        nested |= {f"norm_{name}": value for name, value in self.norms.items()}
        for name, control in self.controls.items():
            nested |= {f"{name}_{key}": value for key, value in dataclasses.asdict(control).items() if key != "bias"}
        return pandas.DataFrame([{"sae": repr(self.sae.cfg), "d_sae": self.sae.d_sae, **plain, **nested}])

    def __repr__(self) -> str:
        return (
            f"Decomposition(fvu={self.fvu:.4f}, fvu_nonlinear={self.fvu_nonlinear:.4f}, r2_error={self.r2_error:.4f}, "
            f"r2_norm of the error={self.r2_norm['error']:.4f}, {self.tokens_heldout:,} rows held out by {self.held_out_by})"
        )


def decompose(
    sae: Dictionary,
    x: Any,
    holdout: float = 0.5,
    bias: bool = True,
    *,
    high_norm: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Decomposition:
    """Split the error of an SAE into what is linear in its input and what is not.

    Args:
        sae: any SAE of the site (no transcoder: its error is not one of its input).
        x: activations: a tensor [n, d], an `ActivationStore`, or a re-iterable of tensors [n, d] that gives the same rows
            each time. The SAE should not have been trained on them.
        holdout: share of the rows that the map is not fitted on and every figure is taken on; whole documents of a store, rows
            elsewhere (`Rows`).
        bias: fit an intercept. By our notes the paper's main runs have none and rely on a near-constant direction in x.
        high_norm: keep the rows above the norm limit that the SAE was trained with.
        seed: of the rows drawn, where there are no documents.

    Normal equations in float64, so memory does not grow with the rows; up to 512 MiB of sparse codes are kept for the second
    pass, so that few rows are encoded twice. The authors' code, by our notes, fits on random rows and takes FVU on all of
    them: ours is held out by document throughout.

    Warns when there are under 40 rows of the fit for each dimension, or of those that the norms are fitted on. Raises
    `ConfigError` for another width, a transcoder, a one-shot iterator or an impossible `holdout`; `DataError` for NaN, too few
    rows, or rows that change between the passes.

    >>> import torch, saelab
    >>> sae = saelab.SAE(saelab.TopK(k=2, d_sae=16), d_in=4)
    >>> parts = decompose(sae, torch.randn(1000, 4, generator=torch.Generator().manual_seed(0)))
    >>> x = torch.randn(3, 4)
    >>> torch.allclose(sum(parts.split(x)), x, atol=1e-5), parts.fvu_nonlinear < parts.fvu
    (True, True)
    """
    checks.autoencoder("sae", sae)
    if sae.d_in != sae.d_out or not sae.cfg.centres_input:
        raise ConfigError(f"{sae!r} is a transcoder: its error is not one of its input, give an autoencoder")
    rows = Rows(x, holdout, seed)
    reader = CodedRows(sae, rows, high_norm, progress)
    with torch.no_grad():
        moments = _moments(reader, sae, holdout)
        fit_rows, heldout = moments[MAP], merged(moments[LEARN], moments[SCORE])
        fit = fit_rows.fit(bias)
        norms = _norms(reader, sae, fit, moments, heldout.mean_x)
    _warn_of_few(fit_rows.n, moments[LEARN].n, sae.d_in, holdout)
    return Decomposition(
        **_figures(fit, heldout, norms, bias),
        **_counts(fit_rows, heldout, reader.dropped),
        sae=sae,
        l0=reader.fired / heldout.n,
        controls=controls(sae, fit_rows, heldout, bias),
        held_out_by=rows.held_out_by,
        holdout=holdout,
        seed=seed,
        high_norm=high_norm,
    )


def _moments(reader: CodedRows, sae: Dictionary, holdout: float) -> dict[int, Moments]:
    """The first pass: of the error, given x, for each use of the rows."""
    moments = {use: Moments(sae.d_in, sae.d_in, _accumulator(sae.device)) for use in (MAP, LEARN, SCORE)}
    for chunk, codes in reader.read("moments of the error"):
        moments[chunk.use].add(chunk.x, chunk.x - sae.decode(codes, chunk.x))
    n = {use: found.n for use, found in moments.items()}
    if min(n.values()) < 2:
        raise DataError(
            f"{n[MAP]:,} rows to fit on and {n[LEARN]:,} and {n[SCORE]:,} held out: give more rows "
            f"({_wanted(sae.d_in, holdout):,} would do)"
        )
    return moments


def _warn_of_few(n_map: int, n_learn: int, d: int, holdout: float) -> None:
    if min(n_map, n_learn) < TOKENS_PER_DIMENSION * d:
        warnings.warn(
            f"{d:,} dimensions, {n_map:,} tokens to fit the map on ({n_map / d:.1f} a dimension), {n_learn:,} for the norms: "
            f"below about {TOKENS_PER_DIMENSION} a dimension R^2 comes out too low, harvest {_wanted(d, holdout):,} tokens or "
            "more",
            stacklevel=3,
        )


def _figures(fit: LinearFit, heldout: Moments, norms: "_Norms", bias: bool) -> dict[str, Any]:
    """The fields of a `Decomposition` that follow from the two passes."""
    r2_norm = norms.moments[SCORE].r2(norms.moments[LEARN].fit(bias))
    variation = float(heldout.xx.trace())
    groups = sorted(norms.groups)
    return {
        "linear_map": fit.map,
        "bias": fit.bias,
        "r2_error": float(heldout.r2(fit).nanmean()),
        "r2_error_pooled": heldout.r2_pooled(fit),
        "r2_norm": dict(zip(PARTS, r2_norm.tolist(), strict=True)),
        "fvu": divided(heldout.squares, variation),
        "fvu_nonlinear": divided(float(heldout.residual(fit).sum()), variation),
        "fvu_linear": divided(float(norms.squares[PARTS.index("linear")]), variation),
        "norms": {name: float(value) / heldout.n for name, value in zip(PARTS, norms.lengths, strict=True)},
        "groups": torch.tensor(groups),
        "sums": torch.tensor([norms.groups[group] for group in groups], dtype=torch.float64),
    }


@dataclass
class _Norms:
    moments: dict[int, Moments]  # of the squared norms of the parts, given x
    lengths: Tensor  # [5], summed over held-out rows
    squares: Tensor  # [5], likewise
    groups: dict[int, list[float]]


def _norms(reader: CodedRows, sae: Dictionary, fit: LinearFit, known: dict[int, Moments], mean_D: Tensor) -> _Norms:
    """The second pass; `mean_D` of the held-out rows."""
    targets = {use: TargetMoments(known[use], len(PARTS)) for use in (LEARN, SCORE)}
    lengths, squares = (torch.zeros(len(PARTS), dtype=torch.float64) for _ in range(2))
    groups: dict[int, list[float]] = {}
    for chunk, codes in reader.read("norms of the parts", again=True):
        x_ND, reconstruction = chunk.x, sae.decode(codes, chunk.x)
        error, linear = x_ND - reconstruction, fit(x_ND)
        parts = (x_ND, reconstruction, error, linear, error - linear)
        norms_N5 = torch.stack([torch.linalg.vector_norm(part, dim=1) for part in parts], 1).to("cpu", torch.float64)
        squares_N5 = norms_N5.square()
        targets[chunk.use].add(x_ND, squares_N5)
        lengths += norms_N5.sum(0)
        squares += squares_N5.sum(0)
        deviation = (x_ND.to(mean_D) - mean_D).square().sum(1).cpu()
        sums = torch.stack([deviation, squares_N5[:, 2], squares_N5[:, 4]], 1)
        names, place = chunk.group.unique(return_inverse=True)
        added = torch.zeros(len(names), 3, dtype=torch.float64).index_add_(0, place, sums)
        for name, row in zip(names.tolist(), added.tolist(), strict=True):
            groups[name] = [a + b for a, b in zip(groups.get(name, (0.0, 0.0, 0.0)), row, strict=True)]
    for use, total in targets.items():
        seen, before = float(total.moments().mean_y[2]) if total.n else 0.0, known[use].squares / known[use].n
        if total.n != known[use].n or abs(seen - before) > 1e-4 * before + 1e-12:
            raise DataError(
                f"the second time the rows were not the same ({total.n:,} rows of mean squared error {seen:.6g}, before "
                f"{known[use].n:,} of {before:.6g}): give an iterable that starts anew with the same rows"
            )
    return _Norms({use: total.moments() for use, total in targets.items()}, lengths, squares, groups)


def _wanted(d: int, holdout: float) -> int:
    """Rows of which enough are for the map and for what is learnt from the parts."""
    return round(TOKENS_PER_DIMENSION * d / min(1 - holdout, holdout / 2))


def _counts(fit_rows: Moments, heldout: Moments, dropped: Spread) -> dict[str, Any]:
    return {
        "tokens_fit": fit_rows.n,
        "tokens_heldout": heldout.n,
        "tokens_per_dimension": fit_rows.n / len(dropped.mean),
        "dropped": dropped.n / (dropped.n + fit_rows.n + heldout.n),
        "dropped_variance": _dropped_variance(dropped, fit_rows, heldout),
    }


def _dropped_variance(dropped: Spread, *kept: Moments) -> float:
    everything = Spread(len(dropped.mean))
    everything.merge(dropped.n, dropped.mean, dropped.squares)
    for moments in kept:
        everything.merge(moments.n, moments.mean_x.cpu(), moments.xx.diag().cpu())
    around = dropped.squares + dropped.n * (dropped.mean - everything.mean).square()
    return divided(float(around.sum()), float(everything.squares.sum())) if dropped.n else 0.0


def _accumulator(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "mps" else device  # which has no float64
