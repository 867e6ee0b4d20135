"""The bar that long work shows."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm


def progress_bar(total: int | None, what: str, unit: str, progress: bool = True, **options: Any) -> "tqdm[Any]":
    """A bar of tqdm, which a notebook draws too: what is done of `total` units, the rate and the time left.

    It appears after two seconds, and with `progress=False` never; `options` are tqdm's own.

    >>> with progress_bar(3, "counting", "step", progress=False) as steps:
    ...     steps.update()
    """
    from tqdm.auto import tqdm

    return tqdm(**{"total": total, "desc": what, "unit": unit, "delay": 2, "disable": not progress, **options})
