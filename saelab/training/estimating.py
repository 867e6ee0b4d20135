"""What a run will take, told before it starts: its source is read and its steps are made, a few of each."""

import dataclasses
import inspect
import math
import os
import time
import weakref
from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any, overload

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from saelab.autoencoders.architecture import Architecture
from saelab.autoencoders.architectures.topk import TopK
from saelab.autoencoders.sae import SAE
from saelab.base import checks, processes
from saelab.base.errors import ConfigError
from saelab.base.surroundings import torch_defaults
from saelab.reading.buffer import parse_capacity
from saelab.reading.reader import ContextReader
from saelab.training.loop import train
from saelab.training.opening import open_source
from saelab.training.pieces import PIECE_ROWS
from saelab.training.schedule import Schedule
from saelab.training.session import module_of
from saelab.training.settings import Settings
from saelab.training.sources import RowSource, Source
from saelab.training.step import Trainer

# Steps are not alike: statistics and calibrations belong to the last fifth and tenth. Progress -> share of the steps like it.
PHASES = {0.5: 0.8, 0.85: 0.1, 0.95: 0.1}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds, and bytes held and sent to other processes, by part; prints as one line.

    >>> print(Estimate({"model": 200.0, "autoencoder": 40.0}, memory={"buffer": 3 * 2**30}, available=2 * 2**30))
    about 4.0 min (model 3.3 min, autoencoder 40 s), 3.0 GiB (buffer 3.0 GiB) of 2.0 GiB: TOO MUCH
    """

    seconds: dict[str, float]
    memory: dict[str, int]
    available: int | None
    traffic: dict[str, int] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        total = sum(self.memory.values())
        time_parts = ", ".join(f"{part} {duration(s)}" for part, s in self.seconds.items())
        memory_parts = ", ".join(f"{part} {size(n)}" for part, n in self.memory.items())
        text = f"about {duration(sum(self.seconds.values()))} ({time_parts}), {size(total)} ({memory_parts})"
        if self.available is not None:
            text += f" of {size(self.available)}{': TOO MUCH' if total > self.available else ''}"
        return text + "".join(f", {size(n)} of {part} sent" for part, n in self.traffic.items())


@overload
def estimate(
    source: int, corpus: int, batch_size: int = ..., *, sae: Architecture = ..., tokens: int = ..., **how: Any
) -> Estimate: ...
@overload
def estimate(
    source: Any,
    corpus: Any = ...,
    batch_size: int = ...,
    *,
    sae: Architecture | SAE | Sequence[Architecture | SAE],
    tokens: int,
    **how: Any,
) -> Estimate: ...
@torch_defaults()
def estimate(
    source: Any, corpus: Any = None, batch_size: int = 4096, *, sae: Any = None, tokens: int = 10**9, **how: Any
) -> Estimate:
    """What `train` with these arguments takes, or `sweep` where `sae` is a list: seconds, bytes and traffic, by part.

    Measured, on the device of the run: two batches are read from the source, and each autoencoder makes five steps on them,
    the last one and the end watched for their memory. Memory is that of tensors: an allocator adds its own (a CPU's half as
    much again, where steps are large). Not counted are checkpoints, evaluations, and what the process held
    before; rows that a source gives at random access are not in the memory. `how` are the other arguments of `train`. Of
    processes that train together it is what each of them takes, and all must call it.

    Before there are rows, sizes do: `estimate(d_in, d_sae, batch_size)`, on rows of a normal distribution, of `TopK(k=32)`
    or of `sae` with that many latents, for a billion tokens or as many as are said. An autoencoder that a quarter of the
    device's memory does not hold is measured with a part of its latents, and what was found is multiplied.

    Raises what `train` raises, and `ConfigError` for an iterator, which reading would use up.

    >>> import torch, saelab
    >>> found = saelab.estimate(torch.randn(512, 8), sae=saelab.TopK(k=2, d_sae=16), tokens=10_000, batch_size=128)
    >>> sorted(found.memory), found.memory["autoencoder and Adam"] == 3 * 4 * (2 * 8 * 16 + 8 + 16)
    (['autoencoder and Adam', 'step'], True)
    >>> sized = saelab.estimate(8, 64, 128)
    >>> sized.memory["autoencoder and Adam"] == 3 * 4 * (2 * 8 * 64 + 8 + 64), sized.traffic
    (True, {})
    """
    if isinstance(source, Integral):
        return _of_sizes(source, corpus, batch_size, sae, {"tokens": tokens, **how})
    bound = inspect.signature(train).bind(
        source, corpus, sae=sae, tokens=tokens, batch_size=batch_size, **how | {"out": None, "progress": False}
    )
    bound.apply_defaults()
    settings = Settings.of(bound.arguments)
    if isinstance(source, Iterator):
        raise ConfigError(
            "an iterator gives its rows once, and an estimate would use them up: give what can be iterated again"
        )
    saes = [sae] if isinstance(sae, (Architecture, SAE)) else list(sae)
    cfgs = [one.cfg if isinstance(one, SAE) else one for one in saes]
    # Room for little more than a batch: the second is read when it is asked for.
    room = settings.batch_size + 2 * PIECE_ROWS * settings.lanes
    least = dataclasses.replace(settings, buffer_tokens=room, tokens=3 * room)
    data = open_source(source, corpus, least, gradients=any(cfg.needs_gradients for cfg in cfgs))
    rows, reading = _rows(data.source, settings.batch_size)
    memory = {}
    model = getattr(source, "model", getattr(source, "unet", None))
    if isinstance(model, nn.Module):
        memory["model"] = sum(p.numel() * p.element_size() for p in model.parameters())
    if not isinstance(data.source, RowSource):
        width = 4 * sum(data.source.widths.values())
        memory["buffer"] = width * parse_capacity(settings.buffer_tokens, width) // processes.world_size()
    columns = {name: column.to(settings.device) for name, column in rows.items()}
    steps = [_steps(module_of(one, data, settings), columns, settings) for one in saes]
    memory["autoencoder and Adam"] = sum(held for _, held, _ in steps)
    memory["step"] = max(peak for _, _, peak in steps)
    seconds = {"source": reading * tokens / settings.batch_size, "autoencoder": sum(spent for spent, _, _ in steps)}
    n = processes.world_size()
    # Each of a ring of n sends what is summed 2 (n - 1) / n times; weights and two moments are held, as large as gradients.
    sent = memory["autoencoder and Adam"] // 3 * 2 * (n - 1) // n * (tokens // settings.batch_size)
    return Estimate(seconds, memory, memory_of(settings.device), {"gradients": sent} if n > 1 else {})


def _of_sizes(d_in: Any, d_sae: Any, batch_size: Any, sae: Any, how: dict[str, Any]) -> Estimate:
    d_in, d_sae = checks.count("d_in", d_in), checks.count("d_sae", d_sae)
    batch_size = checks.count("batch_size", batch_size)
    sae = TopK(k=min(32, d_sae), d_sae=d_sae) if sae is None else sae
    if not isinstance(sae, Architecture) or "d_sae" not in {
        field.name for field in dataclasses.fields(sae) if field.init
    }:
        raise ConfigError(
            f"estimate(d_in, d_sae, batch_size) takes a configuration with d_sae, such as saelab.TopK(k=32, d_sae=4096), not "
            f"{sae!r}: give rows, estimate(rows, sae=...), for anything else"
        )
    available = memory_of(checks.device_of(how.get("device", "auto"))) or math.inf
    # Weights, gradients, and Adam's two moments.
    parts = max(1, math.ceil(4 * 4 * 2 * d_in * d_sae / (available / 4)))
    part = dataclasses.replace(sae, d_sae=d_sae // parts)
    rows = torch.randn(2 * batch_size, d_in, generator=torch.Generator().manual_seed(0))
    found = estimate(rows, batch_size=batch_size, sae=part, **how)
    seconds = {part: parts * spent for part, spent in found.seconds.items()}
    memory, traffic = ({part: parts * n for part, n in of.items()} for of in (found.memory, found.traffic))
    return Estimate(seconds, memory, found.available, traffic)


def _rows(source: Source, batch_size: int) -> tuple[dict[str, Any], float]:
    """A batch, and the seconds that it took, after one to warm up."""
    source.next(batch_size)
    start = time.perf_counter()
    rows = source.next(batch_size)
    return rows, time.perf_counter() - start


def _steps(sae: SAE, rows: dict[str, Any], settings: Settings) -> tuple[float, int, int]:
    """The seconds of all steps, the bytes that stay between them, and the most that a step or the end adds."""
    schedule = Schedule(settings.tokens, settings.batch_size, settings.lanes)
    trainer = Trainer(sae, schedule, settings.lr, settings.dtype)
    trainer.initialise(rows)
    trainer.step(rows, log=False)
    seconds = 0.0
    for progress, share in PHASES.items():
        trainer.done = int(progress * schedule.steps)
        _wait(settings.device)
        start = time.perf_counter()
        trainer.step(rows, log=False)
        _wait(settings.device)
        seconds += share * schedule.steps * (time.perf_counter() - start)
    trainer.optimizer.zero_grad(set_to_none=True)
    held = sum(t.numel() * t.element_size() for t in trainer.parameters)
    held += sum(t.numel() * t.element_size() for s in trainer.optimizer.state.values() for t in s.values() if t.ndim)
    with _Watch(settings.device) as watch:
        trainer.step(rows, log=False)
        trainer.finish()
    return seconds, held, watch.peak


def reading_seconds(reader: ContextReader) -> float:
    """Seconds that a row takes, from one batch of contexts after one to warm up (from the only one where there is one)."""
    batches, n, spent = reader.rows(), 0, 0.0
    for _ in range(2):
        start = time.perf_counter()
        if (rows := next(batches, None)) is not None:
            n, spent = len(rows), time.perf_counter() - start
    return spent / max(n, 1)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class _Watch(TorchDispatchMode):
    """The most bytes that tensors made within it held at once."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self.live, self.peak, self.known = device, 0, 0, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(storage) for storage in self._storages((args, kwargs))}
        made = func(*args, **kwargs or {})
        for storage in self._storages(made):
            if id(storage) not in before | self.known:
                self.known.add(id(storage))
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._gone, id(storage), storage.nbytes())
        return made

    def _storages(self, tree: Any) -> Iterator[torch.UntypedStorage]:
        for tensor in tree_leaves(tree):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == self.device.type:
                sparse = tensor.layout == torch.sparse_csr
                parts = (tensor.crow_indices(), tensor.col_indices(), tensor.values()) if sparse else (tensor,)
                yield from (part.untyped_storage() for part in parts)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def memory_of(device: torch.device) -> int | None:
    """Bytes of memory of a device, or of this machine; None where neither says."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return physical_memory() if device.type == "cpu" else None


def physical_memory() -> int | None:
    """Bytes of memory of this machine, None where the system does not say."""
    if not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def duration(seconds: float) -> str:
    """
    >>> duration(12.3), duration(90), duration(7300)
    ('12 s', '1.5 min', '2.0 h')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def size(count: int) -> str:
    """
    >>> size(512), size(3 * 2**20), size(5 * 2**30)
    ('512 B', '3.0 MiB', '5.0 GiB')
    """
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
