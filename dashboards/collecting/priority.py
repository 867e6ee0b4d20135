"""Pseudo-random order without a generator: a hash of what is ordered, the same whatever came before it."""

import numpy as np

_GOLDEN, _A, _B = (np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def splitmix64(x: np.ndarray) -> np.ndarray:
    """Steele, Lea and Flood's SplitMix64 (2014) of each uint64.

    >>> hex(int(splitmix64(np.zeros(1, np.uint64))[0]))
    '0xe220a8397b1dcdaf'
    """
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * _A
    x = (x ^ (x >> np.uint64(27))) * _B
    return x ^ (x >> np.uint64(31))


def priorities(seed: int, latents: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """uint64 [n]: the priority of each (latent, row) pair; the lowest are taken first.

    >>> a, b = priorities(0, np.array([3, 4]), np.array([5, 5]))
    >>> bool(a == priorities(0, np.array([3]), np.array([5]))[0]), bool(a == b)
    (True, False)
    """
    salt = splitmix64(np.array([seed & 0xFFFFFFFFFFFFFFFF], np.uint64))
    pairs = (latents.astype(np.uint64) << np.uint64(32)) | rows.astype(np.uint64)
    return splitmix64(pairs ^ salt)
