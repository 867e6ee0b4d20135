"""Random numbers by name: every use has a stream of its own, so nothing of a generator's state needs to be kept."""

import numpy as np

INIT, ORDER, NOISE, FRESH_NOISE, DROPOUT, GROWTH = range(6)


def stream(seed: int, use: int, *which: int) -> np.random.Generator:
    """The generator of this use in a run, for instance `stream(seed, ORDER, epoch)`; the same call, the same numbers.

    >>> bool((stream(0, ORDER, 3).random(4) == stream(0, ORDER, 3).random(4)).all())
    True
    """
    return np.random.Generator(np.random.SFC64([seed, use, *which]))
