"""What a run needs around it: what it began with, what it runs on, and Ctrl-C."""

import contextlib
import hashlib
import platform
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch

from saelab.base import digests
from saelab.base.protocols import Dictionary
from saelab.base.version import __version__


def weights_digest(sae: Dictionary) -> str:
    digest = hashlib.sha256()
    for tensor in sae.state_dict().values():
        digest.update(digests.content(tensor.float()))
    return digest.hexdigest()


def versions() -> dict[str, str]:
    return {
        "saelab": __version__, "torch": torch.__version__, "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
    }  # fmt: skip


@contextlib.contextmanager
def first_interrupt_noted() -> Iterator[threading.Event]:
    """Within: the first Ctrl-C of the main thread sets the event, the next one raises as usual."""
    noted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return

    def note(signum: int, frame: Any) -> None:
        noted.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)
