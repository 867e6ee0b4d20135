"""The regression of an SAE's error repeated where its answer is known or would be trivial."""

from dataclasses import dataclass

from torch import Tensor

from saelab.base.moments import Moments, divided
from saelab.base.protocols import Dictionary


@dataclass(frozen=True, repr=False)
class Control:
    """The same regression of another error: `scale` of the reconstruction, `bias` or none; figures on held-out rows."""

    scale: float
    bias: bool
    fvu: float
    r2_error: float
    r2_error_pooled: float

    def __repr__(self) -> str:
        return f"Control(scale={self.scale:.4g}, bias={self.bias}, fvu={self.fvu:.4f}, r2_error={self.r2_error:.4f})"


def controls(sae: Dictionary, fit_rows: Moments, heldout: Moments, bias: bool) -> dict[str, Control]:
    """The controls of `Decomposition.controls`, from the moments of x and its error that are at hand.

    The error of s x_hat = s (x - e) is (1 - s) x + s e, so no row has to be read again.
    """

    def control(scale: float, with_bias: bool, shift: Tensor | None = None) -> Control:
        fitted, seen = (moments.combined(1 - scale, scale, shift) for moments in (fit_rows, heldout))
        fit = fitted.fit(with_bias)
        return Control(
            scale,
            with_bias,
            divided(seen.squares, float(seen.xx.trace())),
            float(seen.r2(fit).nanmean()),
            seen.r2_pooled(fit),
        )

    scale = _best_scale(fit_rows, centred=bias)
    mean = -((1 - scale) * fit_rows.mean_x + scale * fit_rows.mean_y) if bias else None
    return {
        "rescaled": control(scale, bias, mean),
        "dead": control(0.0, bias, -sae.b_dec.detach().to(fit_rows.xx)),
        "other_bias": control(1.0, not bias),
    }


def _best_scale(moments: Moments, centred: bool) -> float:
    """argmin over s of sum |x - s x_hat|^2, of x and x_hat less their means where `centred`."""
    n = 0 if centred else moments.n
    xx = float(moments.xx.trace()) + n * float(moments.mean_x.square().sum())
    xe = float(moments.xy.trace()) + n * float(moments.mean_x @ moments.mean_y)
    ee = float(moments.yy.sum()) + n * float(moments.mean_y.square().sum())
    reconstruction = xx - 2 * xe + ee
    return (xx - xe) / reconstruction if reconstruction > 0 else 1.0
