"""Whom an open context acts for: `intervene`, `splice` and `steer` change the passes of the one who opened them.

The rule. What is opened acts in the context that opened it (a thread, an asyncio task) and in every copy of that
context made while it is open (`contextvars.copy_context().run`, `asyncio.to_thread`, tasks). Python gives a plain
thread an empty context and does not say who started it; so what the *main* thread opens also acts in the threads that
start while it is open, which is how pools and streamers are used, and not in those that were running before. What
another thread opens stays in that thread. Forward passes of all others go by untouched.
"""

import contextlib
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet


@dataclass(eq=False)
class _Opening:
    """One open context: what was opened, and the threads that were running before it."""

    item: Any
    before: "WeakSet[threading.Thread]" = field(default_factory=lambda: WeakSet(threading.enumerate()))
    open: bool = True


_reaching: ContextVar[tuple[_Opening, ...] | None] = ContextVar("reaching", default=None)
_reaching.set(())  # a copy of this context has a value; only a plain thread's has none
_of_main: tuple[_Opening, ...] = ()  # written by the main thread alone


@contextlib.contextmanager
def opened(item: Any) -> Iterator[None]:
    """Within it `item` is among `reached()`, after all that was opened before."""
    global _of_main
    opening = _Opening(item)
    _reaching.set((*_openings(), opening))
    main = threading.current_thread() is threading.main_thread()
    if main:
        _of_main = (*_of_main, opening)
    try:
        yield
    finally:
        # by identity and with a flag: contexts of generators may close in any order, and elsewhere
        opening.open = False
        _reaching.set(tuple(other for other in _openings() if other is not opening))
        if main:
            _of_main = tuple(other for other in _of_main if other is not opening)


def reached() -> list[Any]:
    """The items whose contexts are open for the caller, outermost first."""
    return [opening.item for opening in _openings() if opening.open]


def _openings() -> tuple[_Opening, ...]:
    own = _reaching.get()
    if own is not None:
        return own
    return tuple(opening for opening in _of_main if threading.current_thread() not in opening.before)
