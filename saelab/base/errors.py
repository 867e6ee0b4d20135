"""The errors that saelab raises: each states the numbers and the way out."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


class SaelabError(Exception):
    """Base of every error that saelab raises on purpose."""


class ConfigError(SaelabError, ValueError):
    """An argument or a configuration that cannot work."""


class SiteError(SaelabError, KeyError):
    """A site that the model does not have, or whose width is not the one asked for."""

    def __str__(self) -> str:  # KeyError would show the message in quotes
        return str(self.args[0]) if self.args else ""


class FormatError(SaelabError, ValueError):
    """A file that is not what its name or manifest says."""


class DataError(SaelabError, ValueError):
    """Text, tokens or activations that cannot be used."""


class CheckpointError(SaelabError, RuntimeError):
    """A run that cannot be written, continued or reopened."""


class ProcessError(SaelabError, RuntimeError):
    """Another of the processes that train together is gone."""


class InterventionError(SaelabError, RuntimeError):
    """An intervention that did not, or could not, do what it says."""


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_IN_THE_WAY = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY)


@contextlib.contextmanager
def disk_errors_named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Within: what the operating system refuses becomes a `CheckpointError` that names the path and the way out."""
    try:
        yield
    except OSError as error:
        reason, way = error.strerror or str(error), "give a path that can be written"
        if error.errno in _FULL:
            with contextlib.suppress(OSError):
                reason += f" ({shutil.disk_usage(existing(Path(path))).free:,} bytes free)"
            way = "free some space or give another folder"
        elif error.errno in _IN_THE_WAY:
            way = "something else has a name that is needed there: give another path, or move it away"
        raise CheckpointError(
            f"cannot write {path}: {reason}. What was there before is untouched: {way}, and run again."
        ) from error


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
