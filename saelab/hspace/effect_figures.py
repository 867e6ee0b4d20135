"""Plotly figures of what directions do: curves of the target's probability, galleries of edited images."""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.base.errors import ConfigError
from saelab.hspace.effect_measures import CONTROLS

if TYPE_CHECKING:
    from saelab.hspace.reporting import Effects

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22")
DASHES = {"edit": "solid", **dict(zip(CONTROLS, ("dot", "dash"), strict=True))}


def curves(effects: "Effects") -> Any:
    """See `Effects.plot`: with a target its probability, without the root mean square change of the pixels."""
    import plotly.graph_objects as go

    table = effects.table
    measure, title = (("p_target", "mean probability of the target")
                      if table.target.notna().any() else ("rms", "change of the pixels, root mean square"))  # fmt: skip
    figure = go.Figure()
    for number, (name, mine) in enumerate(table.groupby("direction", sort=False)):
        start = mine[(mine.kind == "edit") & (mine.strength == 0)]
        for kind, some in mine.groupby("kind", sort=False):
            if kind != "edit" and len(start):  # at strength 0 a control is the edit: nothing
                some = some.merge(start, how="outer")
            points = some.groupby("strength")[measure].mean()
            figure.add_scatter(
                x=points.index, y=points, mode="lines+markers", name=name if kind == "edit" else f"{name}, {kind}",
                legendgroup=name, line={"color": COLOURS[number % len(COLOURS)], "dash": DASHES[str(kind)]},
                opacity=1.0 if kind == "edit" else 0.6,
            )  # fmt: skip
    figure.update_xaxes(title_text="strength")
    figure.update_yaxes(title_text=title)
    figure.update_layout(height=460, margin={"t": 32}, hovermode="closest")
    return figure


def gallery(effects: "Effects", direction: str | None) -> Any:
    """See `Effects.gallery`: one picture, samples down and strengths across."""
    import plotly.graph_objects as go

    name = next(iter(effects.images)) if direction is None else direction
    if name not in effects.images:
        raise ConfigError(f"there is no direction {name!r} here: choose one of {', '.join(effects.images)}")
    strengths, images = effects.images[name]
    sheet, cell = mosaic(images.transpose(0, 1))
    # a heat map rather than an image: it needs no encoding, and its pixels stay sharp at any size
    figure = go.Figure(go.Heatmap(z=sheet, colorscale="gray", zmin=-1, zmax=1, showscale=False, hoverinfo="skip"))
    figure.update_xaxes(
        tickvals=[cell[1] * i + (cell[1] - 1) / 2 for i in range(len(strengths))], ticktext=[f"{s:g}" for s in strengths],
        title_text=f"strength along {name}", constrain="domain", showgrid=False, zeroline=False,
    )  # fmt: skip
    figure.update_yaxes(
        autorange="reversed",
        scaleanchor="x",
        showticklabels=False,
        title_text="samples",
        constrain="domain",
        showgrid=False,
        zeroline=False,
    )
    figure.update_layout(
        width=120 + 72 * images.shape[0],
        height=120 + 72 * images.shape[1],
        margin={"t": 24, "r": 12},
        plot_bgcolor="white",
    )
    return figure


def mosaic(images_RKCHW: Float[Tensor, "R K C H W"]) -> tuple[Any, tuple[int, int]]:
    """Rows and columns of images as one picture of brightness [-1, 1] with gaps of NaN, and a cell's (height, width)."""
    R, K, _, H, W = images_RKCHW.shape
    gap = max(1, H // 14)
    grey = images_RKCHW.float().mean(2).clamp(-1, 1)
    padded = torch.full((R, K, H + gap, W + gap), float("nan"))
    padded[:, :, :H, :W] = grey
    sheet = padded.permute(0, 2, 1, 3).reshape(R * (H + gap), K * (W + gap))
    return sheet[:-gap, :-gap].numpy(), (H + gap, W + gap)
