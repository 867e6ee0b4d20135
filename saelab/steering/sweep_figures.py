"""Plotly figures of a sweep."""

from typing import TYPE_CHECKING, Any

from saelab.base.errors import ConfigError
from saelab.steering.grid import RANDOM_DIRECTION
from saelab.steering.summaries import check_columns, curve

if TYPE_CHECKING:
    from pandas import DataFrame

KINDS = ("effect", "frontier")
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2")


def figure(table: "DataFrame", settings: dict[str, Any], kind: str, effect: str, kl: str) -> Any:
    """See `Sweep.plot`."""
    from plotly.subplots import make_subplots

    if kind not in KINDS:
        raise ConfigError(f"there is no plot {kind!r}: choose one of {', '.join(KINDS)}")
    check_columns(effect, kl)
    operations = settings["operations"]
    drawn = make_subplots(rows=1, cols=len(operations), subplot_titles=operations, shared_yaxes=True)
    for column, operation in enumerate(operations, start=1):
        for number, latent in enumerate(settings["latents"]):
            mine = table[(table.latent == latent) & (table.operation == operation)]
            colour = COLOURS[number % len(COLOURS)]
            points = curve(mine, effect, kl).sort_values(kl if kind == "frontier" else "strength")
            place = {"row": 1, "col": column}
            if kind == "effect":
                for trace in _band(mine, effect, colour):
                    drawn.add_trace(trace, **place)
            drawn.add_scatter(
                x=points[kl] if kind == "frontier" else points.strength.fillna(0),
                y=points[effect],
                text=[f"strength {s:g}" for s in points.strength],
                mode="lines+markers",
                name=f"latent {latent}",
                legendgroup=str(latent),
                showlegend=column == 1,
                line_color=colour,
                **place,
            )
        unit = settings.get("unit") or ""
        title = f"{kl}, nats" if kind == "frontier" else f"strength ({unit})" if unit else "strength"
        drawn.update_xaxes(title_text=title, row=1, col=column)
    drawn.update_yaxes(title_text=effect, row=1, col=1)
    drawn.update_layout(height=420, margin={"t": 48}, hovermode="closest")
    return drawn


def band(table: "DataFrame", effect: str) -> "DataFrame":
    """Mean and standard deviation over the random directions' mean effects, at each strength."""
    controls = table[table.baseline == RANDOM_DIRECTION]
    means = controls.groupby(["strength", "draw"], dropna=False)[effect].mean()
    found = means.groupby("strength", dropna=False).agg(["mean", "std"]).reset_index()
    return found.fillna({"std": 0.0})


def _band(table: "DataFrame", effect: str, colour: str) -> list[Any]:
    import plotly.graph_objects as go

    found = band(table, effect)
    if not len(found):
        return []
    x, low, high = found.strength.fillna(0), found["mean"] - found["std"], found["mean"] + found["std"]
    common = {"mode": "lines", "line": {"width": 0, "color": colour}, "showlegend": False, "hoverinfo": "skip"}
    return [
        go.Scatter(x=x, y=low, **common),
        go.Scatter(x=x, y=high, fill="tonexty", opacity=0.2, **common),
    ]
