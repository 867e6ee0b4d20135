"""What a count, a number, a seed, a dtype and a device given by a user may be, and what stands where an autoencoder, a language
model or a denoiser is meant: one function each.

Each gives back the plain Python or torch value, so that `np.int64(8)` and "float32" do what 8 and `torch.float32` do and
manifests hold plain numbers, or raises `ConfigError` that names the argument, what was given and the way out.
"""

import contextlib
import math
import numbers
import operator
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from saelab.base.errors import ConfigError

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LARGEST_SEED = 2**32 - 1  # NumPy's
# known by what they have, so that foreign objects of the same kind pass
_MEMBERS = {
    "an autoencoder": ("W_dec", "encode_sparse", "metadata"),
    "a language model": ("to_tokens", "site", "runner"),
    "a denoiser": ("epsilon", "timesteps"),
}


def count(name: str, value: Any, least: int = 1, most: int | None = None, of: str = "") -> int:
    """A whole number of any integer type: Python's, NumPy's, or a tensor of one integer. `of` says what `most` is.

    Floats are refused even where they are whole: 1e6 is written `int(1e6)` or `1_000_000`.

    >>> count("tokens", 64), count("skip_positions", 0, least=0)
    (64, 0)
    """
    found = None
    if not isinstance(value, bool) and not (isinstance(value, Tensor) and value.dtype == torch.bool):
        with contextlib.suppress(TypeError, ValueError):
            found = operator.index(value)
    if found is None or found < least or (most is not None and found > most):
        bound = f"{least:,} or more" if most is None else f"from {least:,} to {most:,}" + (f" ({of})" if of else "")
        way = f": write int({value!r})" if isinstance(value, float) and value.is_integer() else ""
        raise ConfigError(f"{name} is {value!r}; it must be a whole number, {bound}{way}")
    return found


def counts(name: str, values: Any, least: int = 1, most: int | None = None, of: str = "") -> list[int]:
    """Several of them, each once and in the order given; one number is a list of one.

    >>> counts("latents", [3, 1, 3], least=0), counts("latents", 7)
    ([3, 1], [7])
    """
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0:
        return [count(name, values, least, most, of)]
    return list(dict.fromkeys(count(f"one of {name}", value, least, most, of) for value in values))


def number(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> float:
    """A finite number within the bounds: `least` and `most` may be reached, `above` and `below` not.

    >>> number("lr", 3e-4, above=0), number("beta", 1, least=0)
    (0.0003, 1)
    """
    bounds = {"at least": least, "above": above, "at most": most, "below": below}
    plain = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    found = math.nan
    if isinstance(plain, numbers.Real) and not isinstance(plain, bool):
        found = int(plain) if isinstance(plain, numbers.Integral) else float(plain)
    if (
        not math.isfinite(found)
        or (least is not None and found < least)
        or (above is not None and found <= above)
        or (most is not None and found > most)
        or (below is not None and found >= below)
    ):
        asked = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None)
        raise ConfigError(f"{name} is {value!r}; it must be a finite number" + (f", {asked}" if asked else ""))
    return found


def maybe(check: Callable[..., Any], name: str, value: Any, **bounds: Any) -> Any:
    """The check of an argument that may be None.

    >>> maybe(count, "log_every", None), maybe(count, "log_every", 5)
    (None, 5)
    """
    return None if value is None else check(name, value, **bounds)


def seed(value: Any, name: str = "seed") -> int:
    """A whole number from 0 to 2^32 - 1.

    >>> seed(0)
    0
    """
    return count(name, value, least=0, most=LARGEST_SEED)


def choice(name: str, value: Any, choices: Sequence[Any]) -> Any:
    """One of the choices.

    >>> choice("split", "train", ("train", "heldout"))
    'train'
    """
    if not any(value is each or (type(value) is type(each) and value == each) for each in choices):
        raise ConfigError(f"{name} is {value!r}; use one of {', '.join(map(repr, choices))}")
    return value


def dtype_of(value: Any, name: str = "dtype") -> torch.dtype | None:
    """A floating-point `torch.dtype`, by itself or by name ("float32", "torch.bfloat16"); None stays None.

    >>> dtype_of("bfloat16"), dtype_of(torch.float32), dtype_of(None)
    (torch.bfloat16, torch.float32, None)
    """
    known = {str(dtype).removeprefix("torch."): dtype for dtype in _FLOATS}
    asked = getattr(value, "__name__", str(value)).removeprefix("torch.")
    if value is not None and asked not in known:
        raise ConfigError(f"{name} is {value!r}; use one of {', '.join(known)}")
    return known.get(asked)


def device_of(value: Any, name: str = "device") -> torch.device:
    """The device asked for, by name or as a `torch.device`; "auto" is the GPU where there is one.

    >>> device_of("cpu")
    device(type='cpu')
    """
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if isinstance(value, str) and value == "auto":
        return torch.device("cuda" if n_gpus else "cpu")
    there = ["cpu", *(f"cuda:{i}" for i in range(n_gpus)), *(["mps"] if torch.backends.mps.is_available() else [])]
    try:
        found = torch.device(value)
    except (RuntimeError, TypeError, ValueError, AssertionError):
        found = None
    missing = found is not None and (
        found.type == "meta"
        or (found.type == "cuda" and (found.index or 0) >= n_gpus)
        or (found.type == "mps" and "mps" not in there)
    )
    if found is None or missing:
        raise ConfigError(f"{name} is {value!r}, and this machine has {', '.join(there)}: use one of these, or 'auto'")
    return found


def betas(values: Any) -> tuple[float, float]:
    """Adam's two, each at least 0 and below 1, from any sequence (JSON has lists).

    >>> betas([0, 0.999])
    (0, 0.999)
    """
    found = tuple(values) if isinstance(values, Iterable) else ()
    if len(found) != 2:
        raise ConfigError(f"betas is {values!r}; it must be two numbers, each at least 0 and below 1")
    return number("betas[0]", found[0], least=0, below=1), number("betas[1]", found[1], least=0, below=1)


def autoencoder(name: str, value: Any) -> Any:
    """An SAE of ours, or what can do the same."""
    return _checked_object(value, name, "an autoencoder", "saelab.SAE.load({path})", {
        "a run": "give its .sae", "a configuration": "train it first: saelab.train(...).sae",
    })  # fmt: skip


def language_model(name: str, value: Any) -> Any:
    """A `LanguageModel`."""
    return _checked_object(value, name, "a language model", "saelab.load_model({path})", {
        "a model of another library": "give saelab.load_model(model, tokenizer=...)",
    })  # fmt: skip


def denoiser(name: str, value: Any) -> Any:
    """A `Denoiser`."""
    return _checked_object(value, name, "a denoiser", "saelab.load_denoiser({path})", {
        "a model of another library": "give saelab.load_denoiser(unet, scheduler)",
    })  # fmt: skip


def _checked_object(value: Any, name: str, wanted: str, loader: str, ways: dict[str, str]) -> Any:
    if not isinstance(value, type) and all(hasattr(value, member) for member in _MEMBERS[wanted]):
        return value
    what, way = _kind(value), f"give {wanted}"
    if isinstance(value, str | os.PathLike):
        what, way = f"the text {os.fspath(value)!r}", f"give {loader.format(path=repr(os.fspath(value)))}"
    elif what in _MEMBERS:
        way += ": are two arguments exchanged?"
    raise ConfigError(f"{name} has to be {wanted}, and is {what} ({type(value).__name__}): {ways.get(what, way)}")


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    for kind, members in _MEMBERS.items():
        if all(hasattr(value, member) for member in members):
            return kind
    if hasattr(value, "sae") and hasattr(value, "history"):
        return "a run"
    if hasattr(value, "allocate") and hasattr(value, "d_sae"):
        return "a configuration"
    if hasattr(value, "forward") and hasattr(value, "parameters"):
        return "a model of another library"
    return "something else"
