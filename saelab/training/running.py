"""What the loop needs around its steps: modules, spans, figures, progress, interrupts."""

import contextlib
import copy
import hashlib
import platform
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch

from saelab.autoencoders.architecture import Architecture
from saelab.autoencoders.sae import SAE
from saelab.base import digests
from saelab.base.errors import ConfigError, SiteError
from saelab.base.progress import progress_bar
from saelab.base.version import __version__
from saelab.training.schedule import Schedule
from saelab.training.step import Trainer


def silent(rows: int, goal: int) -> None:
    """What a source tells of its buffer once training goes on."""


def module_for(
    sae: Architecture | SAE, widths: dict[str, int], seed: int, device: torch.device, dtype: torch.dtype | None
) -> SAE:
    d_in, d_out = widths["x"], widths.get("target", widths["x"])
    if isinstance(sae, SAE) and (sae.d_in, sae.d_out) != (d_in, d_out):
        raise SiteError(
            f"the SAE reads width {sae.d_in:,} and writes {sae.d_out:,}; the activations have {d_in:,} and {d_out:,}"
        )
    cfg = sae.cfg if isinstance(sae, SAE) else sae
    if not cfg.centres_input and "target" not in widths:
        raise ConfigError(
            "a transcoder predicts another site than it reads: give target_site=, or a pair (input, target) as the source"
        )
    module = copy.deepcopy(sae) if isinstance(sae, SAE) else SAE(sae, d_in, seed=seed, d_out=d_out)
    module.path = None
    dtype = dtype or module.dtype
    if dtype == torch.float16:
        raise ConfigError(
            "an SAE cannot be trained in float16, in which the squares of small gradients are zero: give dtype='bfloat16' or "
            "'float32', and convert what was trained (sae.to(torch.float16))"
        )
    return module.to(device=device, dtype=dtype)


def weights_digest(sae: Any) -> str:
    digest = hashlib.sha256()
    for tensor in sae.state_dict().values():
        digest.update(digests.content(tensor.float()))
    return digest.hexdigest()


def on(module: SAE, rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(module.device) for name, tensor in rows.items()}


def every(tokens: int | None, schedule: Schedule, parts: int) -> int:
    """A span in tokens, or that part of the run, in steps."""
    return max(1, schedule.steps // parts if tokens is None else tokens // schedule.batch_size)


def evaluation_of(every: int | None, source: Any, corpus: Any) -> Any:
    if every is None:
        return None
    if corpus is None:
        raise ConfigError(
            "evaluate_every needs a model and its corpus as the source; evaluate the SAE afterwards instead"
        )
    from saelab.evaluation.fidelity import evaluate

    return lambda module: evaluate(module, source, corpus, progress=False).to_pandas().iloc[0].to_dict()


def history_row(trainer: Trainer, figures: dict[str, Any], step: int, tokens: int, rate: float) -> dict[str, Any]:
    numbers = {name: float(value) for name, value in figures.items()}
    dead = int(trainer.sae.state.dead.sum())
    return {"step": step, "tokens": tokens, **numbers, "dead": dead, "tokens_per_second": rate}


def versions() -> dict[str, str]:
    return {
        "saelab": __version__, "torch": torch.__version__, "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
    }  # fmt: skip


def speaker(progress: bool) -> Any:
    if not progress:
        return lambda message: None
    from tqdm.auto import tqdm

    return lambda message: tqdm.write(message, file=sys.stderr)


def bar_of(tokens: int, done: int, progress: bool) -> Any:
    return progress_bar(tokens, "train", " tokens", progress, initial=done, unit_scale=True, delay=0)


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
