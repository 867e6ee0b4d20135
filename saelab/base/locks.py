"""Who writes where: locks of the operating system, which end with their process however it ends.

Some file systems of clusters have none. Nobody is kept apart there, and what a killed process left behind stays, because
nothing tells it from what a living one is writing.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from saelab.base.errors import CheckpointError, disk_errors_named

LOCK = ".lock"
_said: set[str] = set()


def lock(handle: int, wait: bool = False) -> bool | None:
    """Lock an open file or folder until its handle is closed: False when another holds it, None where there are no locks."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # Windows; ENOLCK, EOPNOTSUPP, ENOSYS and others of network file systems
        return None
    return True


@contextlib.contextmanager
def locked(folder: Path, keep: bool = True) -> Iterator[None]:
    """Hold a folder, made where it is missing; `CheckpointError` when another process does or it cannot be written.

    The file that is locked stays in the folder afterwards if `keep`. Where the file system has no locks a warning says so,
    once, and nothing is held.
    """
    path = folder / LOCK
    with disk_errors_named(folder):
        Path(os.path.realpath(folder)).mkdir(parents=True, exist_ok=True)  # of a link, what it stands for
        handle, held = _opened(path)
    try:
        if held is False:
            raise CheckpointError(
                f"another process is writing into {folder}: wait for it (the same call then goes on from, or gives, what it "
                "made), or give another `out`"
            )
        if held is None and "no locks" not in _said:
            _said.add("no locks")
            warnings.warn(
                f"the file system of {folder} has no locks: see to it that no other process writes there", stacklevel=4
            )
        yield
        if held and not keep:
            path.unlink(missing_ok=True)
    finally:
        os.close(handle)


def _opened(path: Path) -> tuple[int, bool | None]:
    """A handle on the file and whether it is locked, once it is the file that has this name: the holder may have removed it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        held = lock(handle)
        if not held or path.exists() and os.path.samestat(os.fstat(handle), os.stat(path)):
            return handle, held
        os.close(handle)
