"""Units of strength: how much of a direction one unit is."""

from typing import TYPE_CHECKING, Any

from saelab.base.errors import ConfigError

if TYPE_CHECKING:
    from saelab.steering.operations import Operation

UNITS = ("max_activation", "activation", "residual_norm", "std")


def unit_size(operation: "Operation") -> float:
    """u: one unit of the operation's strength, as a multiple of its direction d *as it is* (whatever its length).

    So `strength * unit_size(op) * op.direction` is what `add` adds, and the value that `clamp` and `cap` hold an
    activation to is `strength * unit_size(op)` in every unit:

    * "activation": 1.
    * "max_activation": the latent's largest activation on its corpus (`sae.latent_stats.max`).
    * "residual_norm": R / |d|, with R the median norm of the activations at the trained positions
      (`sae.metadata["median_norm"]`, `Direction.residual_norm`), so that adding 1 adds a vector of length R.
    * "std": the standard deviation of the activations along d (`sae.latent_stats.std`, `Direction.std`), over |d|.

    1 for operations that have no unit. Raises `ConfigError` that names the missing figure.

    >>> import torch
    >>> from saelab import steering
    >>> warm = steering.Direction(torch.tensor([3.0, 4.0]), site="blocks.3.hook_resid_post", residual_norm=20.0)
    >>> unit_size(steering.add(warm, strength=0.5))
    4.0
    """
    figure, is_length = unit_figure(operation)
    return figure / float(operation.direction.double().norm()) if is_length else figure


def unit_figure(operation: "Operation") -> tuple[float, bool]:
    """The figure behind `unit_size`, and whether it is a length, to be divided by that of the direction."""
    if operation.unit in (None, "activation"):
        return 1.0, False
    figure = _of_latent(operation) if operation.latent is not None else _of_vector(operation)
    return figure, operation.unit != "max_activation"


def mean_activation(operation: "Operation") -> float:
    """What `ablate(to="mean")` clamps to: the mean over all tokens, those on which the latent is silent included."""
    if operation.latent is None:
        if operation.source.mean is None:
            raise _missing(operation, "mean coordinate", "Direction(..., mean=...)")
        return float(operation.source.mean)
    stats = _stats(operation, "mean activation")
    return float(stats.mean[operation.latent] * stats.density[operation.latent])


def _of_latent(operation: "Operation") -> float:
    sae, latent = operation.source, operation.latent
    if operation.unit == "residual_norm":
        figure = sae.metadata.get("median_norm")
        if figure is None:
            raise _missing(
                operation,
                'median norm (sae.metadata["median_norm"])',
                "an SAE trained by saelab, or measured by saelab.calibrate",
            )
        return float(figure)
    stats = _stats(operation, "largest activation" if operation.unit == "max_activation" else "standard deviation")
    return float(stats.max[latent] if operation.unit == "max_activation" else stats.std[latent])


def _of_vector(operation: "Operation") -> float:
    if operation.unit == "max_activation":
        raise ConfigError(f"{operation.name} is a plain vector and has no largest activation: "
                          "take the unit 'residual_norm', 'std' or 'activation'")  # fmt: skip
    figure = getattr(operation.source, str(operation.unit))
    if figure is None:
        name = {"residual_norm": "median norm", "std": "standard deviation"}[str(operation.unit)]
        raise _missing(operation, name, f"Direction(..., {operation.unit}=...), steering.measured(...)")
    return float(figure)


def _stats(operation: "Operation", figure: str) -> Any:
    try:
        return operation.source.latent_stats
    except (AttributeError, ConfigError) as error:
        raise _missing(operation, figure, "an SAE trained by saelab") from error


def _missing(operation: "Operation", figure: str, source: str) -> ConfigError:
    return ConfigError(f"{operation!r}: the {figure} of {operation.name} is not known: "
                       f"it comes with {source}; or take unit='activation'")  # fmt: skip
