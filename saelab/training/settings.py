"""What a call of `train` or `sweep` asks for, checked once."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from saelab.base import checks
from saelab.base import processes as distributed
from saelab.base.errors import ConfigError
from saelab.base.files import user_path
from saelab.training.loggers import Logger


@dataclass(frozen=True)
class Settings:
    """The arguments that `train` and `sweep` share, as plain values; `train` says what each means."""

    site: str | None
    target_site: str | None
    tokens: int
    batch_size: int
    context_length: int | None
    skip_positions: int
    prepend_bos: bool | None
    max_norm: float | None
    buffer_tokens: int | str
    lr: float | None
    dtype: torch.dtype | None
    device: torch.device
    seed: int
    out: Path | None
    resume: str
    checkpoint_every: int | None
    log_every: int | None
    evaluate_every: int | None
    loggers: Sequence[Logger | str]
    progress: bool
    lanes: int

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "Settings":
        """From the arguments of a call, others than these passed over. Raises `ConfigError` for one that cannot be."""
        given = {field.name: arguments[field.name] for field in fields(cls)}
        given["out"] = None if given["out"] is None else user_path(given["out"])
        for name in ("tokens", "batch_size"):
            given[name] = checks.count(name, given[name])
        given["skip_positions"] = checks.count("skip_positions", given["skip_positions"], least=0)
        if not isinstance(given["buffer_tokens"], str):
            given["buffer_tokens"] = checks.count("buffer_tokens", given["buffer_tokens"])
        given["max_norm"] = checks.maybe(checks.number, "max_norm", given["max_norm"], above=0)
        given["lr"] = checks.maybe(checks.number, "lr", given["lr"], least=0)
        for name in ("checkpoint_every", "log_every", "evaluate_every"):
            given[name] = checks.maybe(checks.count, name, given[name])
        given["seed"] = checks.seed(given["seed"])
        given["dtype"] = checks.dtype_of(given["dtype"])
        given["device"] = distributed.device(checks.device_of(given["device"]))
        checks.choice("resume", given["resume"], ("auto", "never"))
        if not isinstance(given["loggers"], (list, tuple)):
            given["loggers"] = [given["loggers"]]
        if not distributed.first():
            given |= {"loggers": [], "progress": False}
        given["lanes"] = _lanes(given)
        return cls(**given)

    def say(self, message: str) -> None:
        """Tell the user, above the progress bar."""
        if self.progress:
            tqdm.write(message, file=sys.stderr)


def _lanes(given: Mapping[str, Any]) -> int:
    """How many lanes the rows come in: one for each process unless given."""
    processes = distributed.world_size()
    lanes = processes if given["lanes"] is None else checks.count("lanes", given["lanes"])
    if lanes % processes:
        raise ConfigError(
            f"{lanes} lanes do not divide among {processes} processes: give lanes={processes} or a multiple"
        )
    for name in ("batch_size", "tokens"):
        if given[name] % lanes:
            nearest = max(1, given[name] // lanes) * lanes
            raise ConfigError(
                f"{name}={given[name]:,} does not divide into {lanes} lanes: give {nearest:,}, or other `lanes`"
            )
    return lanes
