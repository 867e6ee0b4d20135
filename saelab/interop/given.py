"""What whoever loads an SAE says of it that its files do not."""

from dataclasses import dataclass
from typing import Any

from saelab.base.manifests import NUMBER, Kind

SCALE = Kind("a number from 1e-30 to 1e30", lambda value: NUMBER.holds(value) and 1e-30 <= value <= 1e30)


@dataclass(frozen=True)
class Given:
    """Arguments of `saelab.load_sae`, and what the table of releases knows; None is not known."""

    site: str | None = None
    target_site: str | None = None
    model: str | None = None
    k: int | None = None
    input_scale: float | None = None  # the factor of the input in training, where the files do not have it
    normalised: str | None = None  # how each vector was by itself, in SAELens' words, where the files do not say
    centred: bool | None = None  # whether the model's writing weights were centred

    def known(self) -> dict[str, Any]:
        """What goes to the metadata."""
        names = ("site", "target_site", "model", "centred")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}
