"""What rooms expect of objects that rooms above them make."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pandas import DataFrame


class Receipt(Protocol):
    """What `lm.steer` gives; `saelab.steering.receipt` has it."""

    def generated(self, generation: Any) -> None: ...
    def to_pandas(self) -> "DataFrame": ...
    def to_dict(self) -> dict[str, Any]: ...
    def save(self, path: str | os.PathLike) -> None: ...


class Dashboard(Protocol):
    """What `sae.show` and `run.dashboard` give; `saelab.dashboards.result` has it."""

    path: Path

    def _repr_html_(self) -> str: ...
    def open(self) -> None: ...
