"""Directions from labels: differences of class means, and linear boundaries at a mixing step.

Shapes: N samples, S steps, D = C h w entries of h.
"""

from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from saelab.base.errors import ConfigError, DataError
from saelab.base.surroundings import OwnRandomness
from saelab.hspace.directions import Direction, Directions, unit
from saelab.hspace.principal import h_of, step_of
from saelab.hspace.trajectory import Trajectory

KINDS = ("svm", "logistic")
ANNULUS = 0.02  # how far the norms of inverted latents may be from those of sampled ones at a mixing step


def mean_difference(
    trajectory: Trajectory,
    labels: Shaped[Tensor, "..."],
    positive: int,
    negative: int | None = None,
    *,
    extremes: int | None = None,
) -> Directions:
    """The mean of h over the samples of one class less the mean over the others, at each step (Haas et al. 2024, eq. 11).

    Strength 1 adds the whole difference.

    Args:
        trajectory: with `h` recorded.
        labels: [N] class numbers; with `extremes`, [N, classes] probabilities (or any scores).
        positive: the class to move to.
        negative: the class to move away from. None: each of the other classes with equal weight. The paper contrasts the
            samples with the highest and the lowest probability; the lowest of one class are often all of one other class,
            so that the direction is that one's opposite. Hence this default, our choice.
        extremes: that many samples with the highest score of `positive` against as many with the lowest (or, with
            `negative`, with the highest of that class): the paper's contrast.

    Returns: `Directions` of length 1; `details`: the class `positive` and the numbers of samples `positives` and
    `negatives`, [1, 1].

    Raises `DataError` for labels of another length or a class without samples, `ConfigError` for arguments that contradict.

    >>> import saelab, torch
    >>> trajectory = saelab.hspace.sample(saelab.load_denoiser("digits-unet"), n=6, steps=3, seed=0)
    >>> saelab.hspace.mean_difference(trajectory, torch.tensor([0, 1, 2, 0, 1, 2]), positive=1)[0]
    Direction('towards 1', [64, 4, 4] at 3 timesteps of mid_block)
    """
    h_NSChw = h_of(trajectory)
    _check_length(labels, h_NSChw)
    if positive == negative:
        raise ConfigError(f"class {positive} against itself: give another negative, or None for all others")
    if extremes is not None:
        groups = _extremes(labels, positive, negative, extremes)
    elif labels.ndim != 1 or labels.is_floating_point():
        raise ConfigError(
            f"labels are {list(labels.shape)} of {labels.dtype}: class numbers [n] are needed, or extremes=k for scores"
        )
    else:
        others = [negative] if negative is not None else sorted(set(labels.tolist()) - {positive})
        groups = [torch.nonzero(labels == label).flatten() for label in (positive, *others)]
        if not others or not all(len(group) for group in groups):
            counts = dict(zip(*(some.tolist() for some in labels.unique(return_counts=True)), strict=True))
            raise DataError(
                f"a class has no samples: asked for {positive} against {others or 'others'}, and there are {counts}"
            )
    means = [h_NSChw[group.to(h_NSChw.device)].double().mean(0) for group in groups]
    vectors, scales = unit((means[0] - torch.stack(means[1:]).mean(0))[None])
    away = "" if negative is None else f" from {negative}"
    figures = {"positive": positive, "positives": len(groups[0]), "negatives": sum(map(len, groups[1:]))}
    return Directions(
        vectors.to(h_NSChw), scales.to(h_NSChw), trajectory.timesteps.clone(), trajectory.site, trajectory.denoiser,
        "mean difference", details={name: torch.tensor([[float(value)]]) for name, value in figures.items()},
        names=[f"towards {positive}{away}"],
    )  # fmt: skip


def boundary(
    trajectory: Trajectory,
    labels: Shaped[Tensor, "..."],
    step: int | None = None,
    kind: str = "svm",
    *,
    reference: Trajectory | None = None,
    holdout: float = 0.3,
    seed: int = 0,
) -> Directions:
    """The normal of a linear boundary between two classes of h at one "mixing" step (after Zhu et al. 2023, BoundaryDiffusion).

    Without a `step` it is searched: the one with the best accuracy on h in a part of the training samples that is kept out
    of the fit for this, the noisiest of equally good ones; with a `reference` only among steps where the mean norm of x_t is
    within 2% of the reference's. (The criterion of the authors could not be read; this one is ours.) The boundary is then
    fitted on all training samples, as if that step had been given. What is held out has chosen nothing.

    Args:
        trajectory: with `h` recorded; for real images, of `hspace.invert(..., method="ddim")`.
        labels: [N], of two values; the normal points to the larger.
        step: index into the timesteps, 0 the noisiest; None searches.
        kind: "svm" (linear, C = 1) or "logistic".
        reference: a sampled trajectory of the same timesteps, for inverted ones.
        holdout: the share of each class kept for the accuracy; a search keeps as large a share of the others for choosing.
        seed: of these splits.

    Returns: `Directions` of length 1, of one step. `scales`: the standard deviation of h along the normal, over the samples.
        `details` [1, 1]: `accuracy` and `accuracy_x`, held out, of h and of x_t (a boundary of h is worth something where it
        beats that of x_t), `chance` (the larger class), `intercept` (of the unit normal); of a search also `norm_ratio` and
        `accuracies`, [1, S], those that chose: the largest is not what it does on other samples. `shift` edits to a distance.

    Raises `DataError` unless there are two classes with 4 samples each; `ConfigError` for a step or kind that is not there.

    >>> import saelab, torch
    >>> trajectory = saelab.hspace.sample(saelab.load_denoiser("digits-unet"), n=12, steps=3, seed=0)
    >>> saelab.hspace.boundary(trajectory, torch.arange(12) % 2, step=1)[0]
    Direction('boundary of 1 against 0', [64, 4, 4] at 1 timesteps of mid_block)
    """
    h_NSChw = h_of(trajectory)
    if kind not in KINDS:
        raise ConfigError(f"there is no boundary {kind!r}: choose one of {', '.join(KINDS)}")
    y_N, values = _two_classes(labels, h_NSChw)
    train, test = _split(y_N, holdout, seed)
    if step is None:
        inner, choosing = (train[part] for part in _split(y_N[train], holdout, seed))
        found = [_fit(rows, y_N, inner, choosing, kind)[2] for rows in h_NSChw.unbind(1)]
        step, details = _best_step(found, trajectory, reference)
    else:
        step, details = step_of(trajectory, step), {}
    normal_D, intercept, accuracy = _fit(h_NSChw[:, step], y_N, train, test, kind)
    along_N = h_NSChw[:, step].flatten(1).double().cpu() @ normal_D
    figures = {"accuracy": accuracy, "chance": _chance(y_N[test]), "intercept": intercept}
    if trajectory.x is not None:
        figures["accuracy_x"] = _fit(trajectory.x[:, step], y_N, train, test, kind)[2]
    details |= {name: torch.tensor([[value]]) for name, value in figures.items()}
    return Directions(
        normal_D.view(1, 1, *h_NSChw.shape[2:]).to(h_NSChw), along_N.std()[None, None].to(h_NSChw),
        trajectory.timesteps[step : step + 1].clone(), trajectory.site, trajectory.denoiser, f"boundary ({kind})",
        details=details, names=[f"boundary of {values[1]} against {values[0]}"],
    )  # fmt: skip


def shift(direction: Direction, trajectory: Trajectory, distance: float | Float[Tensor, "..."]) -> Float[Tensor, " N"]:
    """The strength for each sample that puts its h at a signed distance from a boundary, for an edit at that step alone.

    The distance is <h, n> + intercept of the unit normal n, positive on the side of the larger label (the authors leave the
    intercept out). Use it as

        t = int(direction.timesteps[0])
        hspace.edit(denoiser, trajectory, direction, hspace.shift(direction, trajectory, 5.0), window=(t, t))

    Before that step nothing is edited, so that h there is the trajectory's own.

    Raises `ConfigError` for a direction of many steps, or of a timestep that the trajectory does not have.
    """
    if direction.timesteps is None or len(direction.timesteps) != 1:
        made = "every timestep" if direction.timesteps is None else f"{len(direction.timesteps)} timesteps"
        raise ConfigError(f"a shift is to a boundary at one step: this direction is of {made}")
    at = torch.nonzero(trajectory.timesteps == direction.timesteps[0]).flatten()
    if not len(at):
        raise ConfigError(f"the trajectory has no timestep {int(direction.timesteps[0])}, where the boundary is")
    h_ND = h_of(trajectory)[:, int(at[0])].flatten(1)
    now_N = h_ND @ direction.vector[0].flatten().to(h_ND) + direction.details.get("intercept", torch.zeros(1)).to(h_ND)
    return (distance - now_N) / direction.scale.to(h_ND)


def _two_classes(labels: Tensor, h_NSChw: Tensor) -> tuple[Tensor, list[Any]]:
    """Whether [N] a sample is of the larger value, and the two values."""
    _check_length(labels, h_NSChw)
    values = sorted(set(labels.tolist()))
    if labels.ndim != 1 or len(values) != 2 or min(int((labels == value).sum()) for value in values) < 4:
        raise DataError(f"a boundary needs two classes with 4 samples each; these labels hold {values[:6]} (a class against "
                        "the rest: labels == 3)")  # fmt: skip
    return (labels == values[1]).long().cpu(), values


def _chance(y_N: Tensor) -> float:
    """The share of the larger class."""
    share = float(y_N.float().mean())
    return max(share, 1 - share)


def _best_step(
    found: list[float], trajectory: Trajectory, reference: Trajectory | None
) -> tuple[int, dict[str, Tensor]]:
    """The most accurate step of those where the norms of x_t are the reference's, and the figures that chose it."""
    details, allowed_S = {"accuracies": torch.tensor([found])}, torch.ones(len(found), dtype=torch.bool)
    if reference is not None:
        ratio_S = _norms(trajectory) / _norms(reference)
        details["norm_ratio"] = ratio_S[None].float()
        allowed_S = (ratio_S - 1).abs() <= ANNULUS
        if not bool(allowed_S.any()):
            raise DataError(f"at no step are the norms of x_t within {ANNULUS:.0%} of the reference's (the nearest is "
                            f"{float((ratio_S - 1).abs().min()):.1%} off): give a step, or no reference")  # fmt: skip
    return int(torch.where(allowed_S, torch.tensor(found), -1.0).argmax()), details


def _fit(rows: Tensor, y_N: Tensor, train: Tensor, test: Tensor, kind: str) -> tuple[Tensor, float, float]:
    """(unit normal [D], intercept, held-out accuracy) of a linear classifier of raw rows."""
    x_ND = rows.flatten(1).double().cpu().numpy()
    with OwnRandomness(0):  # libsvm draws from NumPy's global generator, scikit-learn's first import from Python's
        from sklearn.linear_model import LogisticRegression
        from sklearn.svm import SVC

        model: Any = SVC(kernel="linear", C=1.0) if kind == "svm" else LogisticRegression(max_iter=2_000)
        model.fit(x_ND[train], y_N[train].numpy())
    normal = torch.tensor(model.coef_[0], dtype=torch.float64)
    length = normal.norm().clamp(min=1e-300)
    return normal / length, float(model.intercept_[0] / length), float(model.score(x_ND[test], y_N[test].numpy()))


def _split(y_N: Tensor, holdout: float, seed: int) -> tuple[Tensor, Tensor]:
    """Training and held-out rows, the same share of each class."""
    generator = torch.Generator().manual_seed(seed)
    train, test = [], []
    for value in (0, 1):
        rows = torch.nonzero(y_N == value).flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        kept = min(max(round(holdout * len(rows)), 1), len(rows) - 2)
        test.append(rows[:kept])
        train.append(rows[kept:])
    return torch.cat(train), torch.cat(test)


def _extremes(scores: Tensor, positive: int, negative: int | None, k: int) -> list[Tensor]:
    if scores.ndim != 2 or not scores.is_floating_point():
        raise ConfigError(f"extremes need scores [n, classes], and labels are {list(scores.shape)} of {scores.dtype}")
    if not 1 <= k <= len(scores) // 2:
        raise ConfigError(f"extremes={k} of {len(scores)} samples: at most half of them can be at each end")
    if negative is None:
        order = scores[:, positive].argsort(descending=True, stable=True)
        return [order[:k], order[-k:]]
    return [scores[:, label].argsort(descending=True, stable=True)[:k] for label in (positive, negative)]


def _norms(trajectory: Trajectory) -> Tensor:
    """The mean norm of x_t at each step [S]."""
    if trajectory.x is None:
        raise DataError('a mixing step with a reference needs x: sample or invert with record=("h", "x", ...)')
    return trajectory.x[:, :-1].flatten(2).double().norm(dim=2).mean(0)


def _check_length(labels: Tensor, h_NSChw: Tensor) -> None:
    if len(labels) != len(h_NSChw):
        raise DataError(f"{len(labels)} labels for {len(h_NSChw)} samples: one each")
