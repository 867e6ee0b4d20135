"""How much of an SAE's error earlier SAEs' reconstructions predict: is it left over from features found before?"""

from collections.abc import Mapping
from typing import Any

import torch

from saelab.analysis.dark_matter.decomposition import Decomposition
from saelab.analysis.dark_matter.rows import LEARN, SCORE
from saelab.base.errors import ConfigError, DataError
from saelab.base.moments import Moments

PARTS = ("error", "linear", "nonlinear")


def predict_from_earlier(parts: Decomposition, x: Any, sources: Mapping[str, tuple[Any, Any]]) -> Any:
    """R^2 of least squares, with a bias, from the reconstructions of other SAEs to each part of the error.

    Args:
        parts: the decomposition of the SAE whose error is predicted, of the rows x (a tensor or a store).
        sources: name -> (SAE, its activations), rows aligned with x: what `saelab.harvest` gives for several sites. The same
            SAE on x itself is the comparison: earlier layers should do better on the nonlinear part (arXiv 2410.14670).

    A pandas.DataFrame, one row a source: source, and for error, linear and nonlinear the mean R^2 over dimensions and the
    pooled one ("_pooled"): fitted on one half of the rows that the map has not seen, taken on the other.

    Raises `ConfigError` for no source, `DataError` for one whose rows are not as many.

    >>> predict_from_earlier(parts, x, {"same": (sae, x), "block 2": (earlier_sae, earlier_x)})  # doctest: +SKIP
    """
    import pandas

    if not sources:
        raise ConfigError("no sources: give name -> (SAE, aligned activations)")
    for name, (_, rows) in sources.items():
        if len(rows) != len(x):
            raise DataError(
                f"the rows of {name!r} are not aligned: {len(rows):,} for {len(x):,} of x; harvest them together"
            )
    d, device = parts.sae.d_in, "cpu"
    moments = {
        name: {use: Moments(sae.d_out, 3 * d, device) for use in (LEARN, SCORE)} for name, (sae, _) in sources.items()
    }
    for chunk in parts.chunks(x):
        if not chunk.held:
            continue
        _, linear, nonlinear = parts.split(chunk.x)
        target = torch.cat([linear + nonlinear, linear, nonlinear], 1)
        for name, (sae, rows) in sources.items():
            with torch.no_grad():
                reconstruction = sae(rows[chunk.row].to(sae.device).float())
            moments[name][chunk.use].add(reconstruction, target)
    return pandas.DataFrame([{"source": name, **_figures(found, d)} for name, found in moments.items()])


def _figures(moments: dict[int, Moments], d: int) -> dict[str, float]:
    fit, scored = moments[LEARN].fit(), moments[SCORE]
    residual, total, r2 = scored.residual(fit), scored.yy, scored.r2(fit)
    found = {}
    for i, part in enumerate(PARTS):
        mine = slice(i * d, (i + 1) * d)
        found[part] = float(r2[mine].nanmean())
        found[f"{part}_pooled"] = 1 - float(residual[mine].sum() / total[mine].sum())
    return found
