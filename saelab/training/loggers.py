"""Where history rows go besides `run.history`: opt-in trackers."""

from collections.abc import Callable
from typing import Any, Protocol

from saelab.base.errors import ConfigError


class Logger(Protocol):
    """Anything with these two methods can be passed to `train(loggers=[...])`."""

    def log(self, row: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class WandbLogger:
    """Sends every row to Weights & Biases; needs `pip install wandb`."""

    def __init__(self, **init: Any) -> None:
        import wandb

        self._run = wandb.init(**{"project": "saelab", **init})

    def log(self, row: dict[str, Any]) -> None:
        self._run.log(row, step=row["step"])

    def close(self) -> None:
        self._run.finish()


class TensorBoardLogger:
    """Writes every row for TensorBoard; needs `pip install tensorboard`."""

    def __init__(self, folder: str = "runs/tensorboard") -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder)

    def log(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._writer.close()


def open_logger(logger: Logger | str) -> Logger:
    """A logger as it is; "wandb" or "tensorboard" by name. Raises `ConfigError` for another name or a missing package."""
    kinds: dict[str, Callable[[], Logger]] = {"wandb": WandbLogger, "tensorboard": TensorBoardLogger}
    if not isinstance(logger, str):
        return logger
    if logger not in kinds:
        raise ConfigError(
            f"unknown logger {logger!r}: use 'wandb', 'tensorboard' or an object with log(row) and close()"
        )
    try:
        return kinds[logger]()
    except ImportError as error:
        raise ConfigError(f"the logger {logger!r} needs its package: pip install {logger}") from error
