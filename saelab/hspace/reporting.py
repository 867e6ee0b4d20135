"""What directions do to attributes: a table of edits and of random edits as large, matrix, curves, page.

The matrix is that of Haas et al. 2024, table I, with a classifier's probabilities in place of CLIP scores.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from saelab.base.errors import ConfigError
from saelab.base.progress import progress_bar
from saelab.base.statistics import spearman
from saelab.hspace.directions import Direction
from saelab.hspace.editing import edit
from saelab.hspace.effect_measures import CONTROLS, changes, judge, random_direction
from saelab.hspace.trajectory import Trajectory
from saelab.models.denoiser import Denoiser

if TYPE_CHECKING:
    from pandas import DataFrame

EDIT = "edit"


@dataclasses.dataclass(frozen=True, repr=False)
class Effects:
    """The table of `effects`, the classes' names, and images of a few samples at each strength.

    `table`: a row for each direction, kind ("edit" or a control), draw and strength, with the figures of
    `effect_measures.changes`, `target` (a class or None), `p_target`, `change_target`, and `off_target` (mean absolute
    change of the other classes' mean probabilities) with `off_target_signed`. `images` maps a direction's name to
    (strengths, images [strengths, samples, C, H, W]), `control_images` to a kind of control and its first draw's images by
    strength.
    """

    table: "DataFrame"
    classes: tuple[str, ...]
    images: dict[str, tuple[list[float], Tensor]]
    control_images: dict[str, tuple[str, dict[float, Tensor]]] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        strengths = sorted(set(self.table.strength))
        return (
            f"Effects({self.table.direction.nunique()} directions at {len(strengths)} strengths from {strengths[0]:g} to "
            f"{strengths[-1]:g} scales, {len(self.classes)} classes, {len(self.table):,} rows)"
        )

    def to_pandas(self) -> "DataFrame":
        """The whole table."""
        return self.table

    def matrix(self, strength: float) -> "DataFrame":
        """Change of each class's mean probability (columns) by each direction (rows) at one strength."""
        mine = self.table[(self.table.kind == EDIT) & (self.table.strength == strength)]
        if not len(mine):
            raise ConfigError(f"strength {strength:g} was not measured: {sorted(set(self.table.strength))} were")
        matrix = mine.set_index("direction")[[f"change_{k}" for k in range(len(self.classes))]]
        return matrix.set_axis(list(self.classes), axis=1)

    def monotonicity(self) -> "DataFrame":
        """For each direction with a target: Spearman's rank correlation of strength and the target's mean probability, and
        the probability at the least and at the greatest strength."""
        import pandas

        rows = []
        mine = self.table[(self.table.kind == EDIT) & self.table.target.notna()]
        for name, some in mine.groupby("direction", sort=False):
            some = some.sort_values("strength")
            rows.append({"direction": name, "target": self.classes[int(some.target.iloc[0])],
                         "spearman": spearman(some.strength, some.p_target), "p_least": some.p_target.iloc[0],
                         "p_greatest": some.p_target.iloc[-1], "identity": some.identity.iloc[-1]})  # fmt: skip
        return pandas.DataFrame(rows)

    def against_random(self, measure: str = "rms") -> "DataFrame":
        """A measure of each direction and strength over the mean of its random controls, by kind.

        The covariance-matched ratio is the one to look at: h hardly varies along most isotropic directions. Of one draw
        (the default of `effects`) a ratio has no spread to be held against; take `draws=20` before believing it.
        """
        means = self.table.groupby(["direction", "strength", "kind"], sort=False)[measure].mean().unstack("kind")
        for kind in CONTROLS:
            if kind in means:
                means[f"ratio_{kind}"] = means[EDIT] / means[kind]
        return means.reset_index()

    def plot(self) -> Any:
        """Plotly: the target's mean probability against strength for each direction, with its controls."""
        from saelab.hspace.effect_figures import curves

        return curves(self)

    def gallery(self, direction: str | None = None) -> Any:
        """Plotly: images of the same samples (rows) at each strength (columns), of one direction."""
        from saelab.hspace.effect_figures import gallery

        return gallery(self, direction)

    def to_html(self, path: str | os.PathLike[str], title: str = "h-space directions") -> None:
        """One self-contained page: galleries, matrix, curves and table. It opens offline and fetches nothing."""
        from saelab.base.files import whole_file
        from saelab.hspace.effects_page import page

        with whole_file(path) as temporary:
            temporary.write_text(page(self, title), encoding="utf-8")


def effects(
    denoiser: Denoiser,
    trajectory: Trajectory,
    directions: Direction | Sequence[Direction],
    strengths: Sequence[float] = (-2.0, -1.0, 0.0, 1.0, 2.0),
    *,
    classifier: Callable[[Shaped[Tensor, "..."]], Shaped[Tensor, "..."]] | None = None,
    classes: Sequence[str] | None = None,
    targets: Mapping[str, int] | None = None,
    controls: Sequence[str] = CONTROLS,
    draws: int = 1,
    data: Float[Tensor, "n C H W"] | None = None,
    kept: int = 8,
    seed: int = 0,
    progress: bool = True,
    **how: Any,
) -> Effects:
    """Edit the samples of a trajectory along directions, and along random ones as large, and measure what changed.

    Args:
        denoiser, trajectory: of the samples; `h` is needed only for the covariance-matched control.
        directions: to be measured, each alone; their names must differ.
        strengths: in units of each direction's scale; at 0 nothing is run, the figures are those of the samples.
        classifier: images -> logits [n, classes], `.features` where it has them; None is the bundled denoiser's own.
        classes: their names.
        targets: from a direction's name to the class it should raise; of a mean difference its own (its positive class).
        controls: "isotropic", "covariance", or neither, at every strength but 0.
        draws: random directions of each kind a direction.
        data: real images, for the distance to the nearest.
        kept: how many samples' images the result keeps, for galleries.
        seed: of the random directions.
        progress: show a bar with the rate and the time left.
        how: `mode`, `window`, `mask`, `normalize_gain` of `hspace.edit`.

    Raises `ConfigError` for names that repeat, a control that is not there, or classes that do not fit.

    >>> import saelab
    >>> denoiser = saelab.load_denoiser("digits-unet")
    >>> trajectory = saelab.hspace.sample(denoiser, n=4, steps=3, seed=0)
    >>> found = effects(denoiser, trajectory, saelab.hspace.pca(trajectory, 1), [1.0], controls=())
    >>> found.matrix(1.0).shape
    (1, 10)
    """
    import pandas

    directions = [directions] if isinstance(directions, Direction) else list(directions)
    names = [direction.name for direction in directions]
    if len(set(names)) < len(names):
        raise ConfigError(f"directions with the same name cannot be told apart in a table: {names}")
    judges = classifier if classifier is not None else denoiser.classifier()
    images = trajectory.samples
    was = judge(judges, images)
    classes = tuple(classes or map(str, range(was.probabilities.shape[1])))
    if len(classes) != was.probabilities.shape[1]:
        raise ConfigError(f"{len(classes)} names of classes and {was.probabilities.shape[1]} logits: one each")
    targets = {**_own_targets(directions, classes), **(targets or {})}
    real = None if data is None else judge(judges, data.to(images)).features
    rows = []
    kept_images: dict[str, list[tuple[float, Tensor]]] = {}
    control_images: dict[str, tuple[str, dict[float, Tensor]]] = {}
    jobs = [(direction, s) for direction in directions for s in sorted(strengths)]
    for direction, strength in progress_bar(len(jobs), "editing", "edit", progress, iterable=jobs):
        variants = _variants(direction, trajectory, controls if strength else (), draws, seed)
        for kind, draw, variant in variants:
            after = images
            if strength:
                after = edit(denoiser, trajectory, variant, strength, record=(), progress=False, **how).samples
            figures = changes(images, after, was, judge(judges, after), real)
            target = targets.get(direction.name)
            rows.append({"direction": direction.name, "kind": kind, "draw": draw, "strength": float(strength),
                         **_targeted(figures, target, len(classes)), **figures})  # fmt: skip
            if kind == EDIT:
                kept_images.setdefault(direction.name, []).append((float(strength), after[:kept].cpu()))
            elif (kind, draw) == (controls[-1], 0):
                of_control = control_images.setdefault(direction.name, (kind, {}))[1]
                of_control[float(strength)] = after[:kept].cpu()
    stacked = {name: ([s for s, _ in some], torch.stack([x for _, x in some])) for name, some in kept_images.items()}
    return Effects(pandas.DataFrame(rows), classes, stacked, control_images)


def _variants(
    direction: Direction, trajectory: Trajectory, controls: Sequence[str], draws: int, seed: int
) -> list[tuple[str, int, Direction]]:
    """Kind, draw and direction: the edit itself, and each of its controls."""
    drawn = [(kind, draw) for kind in controls for draw in range(draws)]
    random = [(kind, draw, random_direction(direction, trajectory, kind, seed + draw)) for kind, draw in drawn]
    return [(EDIT, 0, direction), *random]


def _targeted(figures: dict[str, Any], target: int | None, classes: int) -> dict[str, Any]:
    others = [figures[f"change_{k}"] for k in range(classes) if k != target]
    return {
        "target": target,
        "p_target": math.nan if target is None else figures[f"p_{target}"],
        "change_target": math.nan if target is None else figures[f"change_{target}"],
        "off_target": sum(map(abs, others)) / len(others),
        "off_target_signed": sum(others) / len(others),
    }


def _own_targets(directions: Sequence[Direction], classes: Sequence[str]) -> dict[str, int]:
    """The class that a mean difference goes towards."""
    return {
        direction.name: int(direction.details["positive"][0])
        for direction in directions
        if "positive" in direction.details and 0 <= int(direction.details["positive"][0]) < len(classes)
    }
