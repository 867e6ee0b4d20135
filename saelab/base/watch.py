"""Which of the processes that train together is gone: each says that it lives, and sees whether the others do.

A killed process closes its connections, and whoever waits for it has an error at once. One that hangs, or whose machine is
gone, closes nothing: after `SILENCE` seconds those who wait for it say so and end.
"""

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from saelab.base.errors import ProcessError

PERIOD, MISSED, SILENCE = 1.0, 5.0, 45.0  # seconds: of one sign to the next, to the suspicion, to the end
ENDED = "ended"  # what a process leaves that has done its work
_watches: list["Watch"] = []
_count = 0


class Watch:
    """The signs of life of `size` processes, in the place where they met; that of this one, `rank`, is given by a thread."""

    def __init__(self, rank: int, size: int, number: int) -> None:
        meeting: Any = dist.distributed_c10d._get_default_store()
        self.rank, self.size = rank, size
        self.store = dist.distributed_c10d.PrefixStore(f"saelab {number}", meeting.clone())  # a connection of its own
        self.heard = dict.fromkeys(range(size), ("", time.monotonic()))
        self.over = threading.Event()
        self.lock = threading.Lock()
        self.store.set(f"who {rank}", f"{socket.gethostname()}, process {os.getpid()}")
        self.thread = threading.Thread(target=self._run, name="saelab watch", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        beats = 0
        while not self.over.wait(PERIOD * max(1, self.size / 64)):
            beats += 1
            try:
                with self.lock:
                    self.store.set(f"beat {self.rank}", str(beats))
                    gone = self.silent(SILENCE)
            except RuntimeError:  # the meeting place is gone, and process 0 with it: who waits for it has an error
                return
            if gone and not self.over.is_set():
                sys.stderr.write(f"saelab: ProcessError: {self.named(gone[0], f'silent for {SILENCE:.0f} s')}\n")
                sys.stderr.flush()
                os._exit(2)  # what waits in torch for another process cannot be woken

    def silent(self, seconds: float) -> list[int]:
        """Who has given no sign of life for so long, and has not said that it ended."""
        now = time.monotonic()
        for rank in range(self.size):
            name = f"beat {rank}"
            beat = self.store.get(name).decode() if self.store.check([name]) else ""
            if beat != self.heard[rank][0]:
                self.heard[rank] = (beat, now)
        quiet = [rank for rank, (_, at) in self.heard.items() if rank != self.rank and now - at > seconds]
        return [rank for rank in quiet if self.left(rank) != ENDED]

    def left(self, rank: int) -> str | None:
        """What a process said when it went: `ENDED`, or its error."""
        name = f"left {rank}"
        return self.store.get(name).decode() if self.store.check([name]) else None

    def named(self, rank: int, what: str) -> str:
        who = self.store.get(f"who {rank}").decode() if self.store.check([f"who {rank}"]) else "never seen"
        return (
            f"process {rank} of {self.size} ({who}) is gone ({what}), and the run ends with it: start all of them again, "
            "and with `out` it goes on from its last checkpoint"
        )

    def culprit(self) -> str:
        """Who is gone, by name: one that left with an error of its own, or else one that gives no more signs of life."""
        deadline = time.monotonic() + 2 * MISSED
        while time.monotonic() < deadline:
            with self.lock:
                for rank in range(self.size):
                    left = self.left(rank)
                    if rank != self.rank and left and left != ENDED:
                        return left if left.startswith("process ") else self.named(rank, left)
                if gone := self.silent(MISSED):
                    return self.named(gone[0], "killed, or its machine or connection is lost")
            time.sleep(PERIOD / 4)
        return "the connection to another process is lost"

    def leave(self, error: BaseException | None) -> None:
        self.over.set()
        text = ENDED
        if error is not None:
            text = str(error) if isinstance(error, ProcessError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(RuntimeError), self.lock:
            self.store.set(f"left {self.rank}", text)
        self.thread.join()


@contextlib.contextmanager
def watched(rank: int, size: int) -> Iterator[None]:
    """Within, this process and the others watch each other."""
    global _count
    _count += 1
    watch = Watch(rank, size, _count)
    _watches.append(watch)
    try:
        yield
    except BaseException as error:
        watch.leave(error)
        raise
    else:
        watch.leave(None)
    finally:
        _watches.remove(watch)


def blamed(error: Exception) -> Any:
    """The error to raise for one of torch's, from a wait for another process."""
    if not _watches:
        return error
    try:
        return ProcessError(_watches[-1].culprit())
    except RuntimeError:
        return ProcessError("process 0 is gone, where the processes met: start all of them again")
