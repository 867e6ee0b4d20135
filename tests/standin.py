"""A device that is none: tensors whose device is `standin:0` and whose numbers lie on the CPU. Mixing the two raises.

It counts what is done there, and where the host waits for it: numbers that are read, copies to the CPU, and operations
whose shape depends on values.
"""

import collections
import traceback
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("standin")
DEVICE = torch.device("standin", 0)
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")  # take indices of the CPU on any device
_PLAIN = ("_local_scalar_dense", "is_nonzero", "equal")  # give numbers
_WAITING = (*_PLAIN, "nonzero", "masked_select", "_unique2", "unique_consecutive", "bincount", "multinomial")
_VIEWS = (
    "detach",
    "alias",
    "view",
    "_unsafe_view",
    "t",
    "transpose",
    "slice",
    "select",
    "expand",
    "unsqueeze",
    "squeeze",
    "split",
    "as_strided",
    "unbind",
    "permute",
    "split_with_sizes",
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
)
_HERE = {"saelab", "dashboards", "analysis"}


class Held(torch.Tensor):
    """A tensor of the stand-in device; `inner` has its numbers."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner):
        held = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=0, dtype=inner.dtype, device=DEVICE
        )
        held.inner = inner
        return held

    def __init__(self, inner):
        pass

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Counts:
    """What was done since it was made: operations by name, and waits by the line that waits."""

    def __init__(self):
        self.operations, self.waits = collections.Counter(), collections.Counter()

    def note(self, name, waits):
        self.operations[name] += name not in _VIEWS
        if waits:
            frames = [f for f in traceback.extract_stack() if _HERE & set(Path(f.filename).parts)]
            self.waits[f"{name} at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else name] += 1


counts = Counts()


class StandIn(TorchDispatchMode):
    """Within, `.to(DEVICE)` and `device=DEVICE` work."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func, args, kwargs):
    name, flat = func._schema.name.split("::")[1], tree_flatten((args, kwargs))[0]
    held = [t for t in flat if isinstance(t, Held)]
    plain = [t for t in flat if isinstance(t, torch.Tensor) and not isinstance(t, Held) and t.ndim]
    asked = kwargs.get("device")
    wanted = asked is not None and torch.device(asked).type == DEVICE.type
    if not held and not wanted:
        return func(*args, **kwargs)
    to_here = name in ("_to_copy", "copy_") and not (wanted or isinstance(args[0], Held) and asked is None)
    counts.note(name, name in _WAITING or to_here or _by_mask(name, args) or _unsized(name, kwargs))
    if held and plain and name not in ("copy_", *_INDEXING):
        raise RuntimeError(f"Expected all tensors to be on the same device: {name} mixes {DEVICE} and cpu")
    inner_args, inner_kwargs = tree_map(lambda t: t.inner if isinstance(t, Held) else t, (args, kwargs))
    if wanted:
        inner_kwargs["device"] = torch.device("cpu")
    out = func(*inner_args, **inner_kwargs)
    if name == "copy_":
        return args[0]
    if name == "_to_copy":
        out = out.clone() if out is inner_args[0] else out
        return Held(out) if wanted or (asked is None and held) else out
    if name in _PLAIN:
        return out
    same = {id(t.inner): t for t in held}  # an operation in place gives its argument back
    return tree_map(lambda t: same[id(t)] if id(t) in same else Held(t) if isinstance(t, torch.Tensor) else t, out)


def _by_mask(name, args):
    places = tree_flatten(args[1])[0] if name in _INDEXING else ()
    return any(isinstance(t, torch.Tensor) and t.dtype == torch.bool for t in places)


def _unsized(name, kwargs):
    return name == "repeat_interleave" and kwargs.get("output_size") is None
