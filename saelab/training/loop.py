"""train: from a source of activations to a trained SAE. The loop reads top to bottom."""

import contextlib
import copy
import platform
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import saelab
from saelab.autoencoders.architecture import Architecture
from saelab.autoencoders.sae import SAE
from saelab.errors import CheckpointError, ConfigError, SiteError
from saelab.training import checkpoint, distributed
from saelab.training.inputs import open_input
from saelab.training.loggers import Logger, open_logger
from saelab.training.run import Run, load_run
from saelab.training.schedule import Schedule
from saelab.training.step import Trainer

SAMPLE_ROWS = 32_768
SECONDS_BETWEEN_CHECKPOINTS = 60.0


def train(
    source: Any,
    corpus: Any = None,
    *,
    site: str | None = None,
    target_site: str | None = None,
    sae: Architecture | SAE,
    tokens: int,
    batch_size: int = 4096,
    context_length: int = 256,
    skip_positions: int = 1,
    max_norm: float | None = 4.0,
    buffer_tokens: int | str = 131_072,
    lr: float | None = None,
    dtype: torch.dtype | None = None,
    device: str = "auto",
    seed: int = 0,
    out: str | Path | None = None,
    resume: str = "auto",
    checkpoint_every: int | None = None,
    log_every: int | None = None,
    evaluate_every: int | None = None,
    loggers: Sequence[Logger | str] = (),
    progress: bool = True,
) -> Run:
    """Train an SAE on `tokens` activation vectors.

    Args:
        source: a `LanguageModel` (with `corpus` and `site`), an `ActivationStore`, a [n, d] tensor, a pair of aligned stores or
            tensors (input, target), or an iterable of [n, d] tensors (a one-shot iterator serves one epoch).
        corpus: what `load_corpus` gives; its train split is read. Past its end a new epoch begins, which is said.
        sae: a configuration such as `saelab.TopK(k=32, d_sae=4096)`, or an `SAE` to go on with (a copy is trained).
        tokens: vectors to train on, those above `max_norm` times the running median norm not counted.
        skip_positions: first positions of each context that are left out.
        buffer_tokens: capacity of the shuffling buffer of streamed sources, in vectors or as in "2GiB".
        lr: peak learning rate; None is the architecture's, 2e-4 / sqrt(d_sae / 2^14), times sqrt(16,000 / steps) where the
            run has fewer than 16,000 steps, 8 at most (`Schedule.short_run_boost`).
        out: folder for checkpoints and the result. A run with the same arguments is continued to the same bits, a finished
            one is returned; another one is an error.
        resume: "auto", or "never" to refuse a folder that holds a run already.
        checkpoint_every, log_every, evaluate_every: in tokens; by default a tenth of the run (at most once a minute), a
            hundredth, and never.
            `evaluate_every` adds the columns of `saelab.evaluate` to the history, for a source that is a model.
        loggers: "wandb", "tensorboard", or objects with `log(row)` and `close()`.

    The first Ctrl-C finishes the step, writes a checkpoint and returns a `Run` with `.interrupted`; a second one raises.

    Raises `ConfigError`, `SiteError` (an SAE of another width), `DataError` (NaN or infinite activations: the batch is
    named, the weights stay as they were) and `CheckpointError`, each with the numbers and the way out.

    >>> import torch, saelab
    >>> run = saelab.train(torch.randn(512, 8), sae=saelab.TopK(k=2, d_sae=16), tokens=1024, batch_size=128, progress=False)
    >>> run.sae
    SAE(TopK(k=2, d_sae=16), d_in=8)
    """
    _check_numbers(tokens=tokens, batch_size=batch_size, context_length=context_length)
    if resume not in ("auto", "never"):
        raise ConfigError(f"resume is {resume!r}; use 'auto' or 'never'")
    folder = None if out is None else Path(out)
    say = _speaker(progress)
    schedule = Schedule(tokens, batch_size)
    cfg = sae.cfg if isinstance(sae, SAE) else sae
    data = open_input(
        source, corpus, site=site, target_site=target_site, context_length=context_length, skip_positions=skip_positions,
        max_norm=max_norm, buffer_tokens=buffer_tokens, batch_size=batch_size, tokens=tokens, seed=seed,
        gradients=cfg.needs_gradients, digests=folder is not None, say=say,
    )  # fmt: skip
    module = _module(sae, data.source.widths, seed, device, dtype)
    trainer = Trainer(module, schedule, lr)
    module.metadata = data.metadata | {
        "tokens": tokens,
        "batch_size": batch_size,
        "lr": trainer.lr,
        "versions": _versions(),
    }
    fingerprint = data.fingerprint | {
        "sae": cfg.to_dict(), "continues": _weights_digest(sae) if folder and isinstance(sae, SAE) else None,
        "tokens": tokens, "batch_size": batch_size, "lr": trainer.lr, "dtype": str(module.dtype), "device": str(module.device),
    }  # fmt: skip
    evaluation = _evaluation(evaluate_every, source, corpus)

    with contextlib.ExitStack() as stack:
        history: list[dict[str, Any]] = []
        if folder is not None:
            stack.enter_context(checkpoint.locked(folder))
            found = checkpoint.read_run(folder)
            if found is not None:
                if resume == "never":
                    raise CheckpointError(
                        f"{folder} holds a run already: give another `out`, or resume='auto' to continue it"
                    )
                checkpoint.check_fingerprint(folder, found["fingerprint"], fingerprint)
                if found["status"] == "finished":
                    say(f"{folder} holds this run, finished: it is returned as it is")
                    return load_run(folder)
                latest = checkpoint.load_latest(folder)
                if latest is not None:
                    step, tensors, history = latest
                    trainer.load_state_dict(tensors)
                    data.source.load_state_dict({k[7:]: v for k, v in tensors.items() if k.startswith("source.")})
                    say(f"continuing {folder} at step {step:,} of {schedule.steps:,}")
        bar = stack.enter_context(_bar(tokens, trainer.done * batch_size, progress))
        data.source.filling = lambda rows, goal: bar.set_postfix_str(f"filling the buffer: {rows:,} of {goal:,} rows")
        if trainer.done == 0:
            trainer.initialise(_on(module, data.source.sample(SAMPLE_ROWS)), fresh=not isinstance(sae, SAE))

        run = Run(module, history, folder)
        record = {"status": "running", "fingerprint": fingerprint, "metadata": module.metadata, "report": {}}
        if folder is not None:
            checkpoint.write_run(folder, record)
        opened = [open_logger(logger) for logger in loggers]
        for logger in opened:
            stack.callback(logger.close)
        interrupted = stack.enter_context(_first_interrupt_noted())
        log_steps = _every(log_every, schedule, 100)
        save_steps = _every(checkpoint_every, schedule, 10)
        evaluate_steps = _every(evaluate_every, schedule, 10)
        # by default no more than one checkpoint a minute: each holds the buffer
        pause = SECONDS_BETWEEN_CHECKPOINTS if checkpoint_every is None else 0.0
        saved, logged, clock, saved_at = trainer.done, trainer.done, time.perf_counter(), time.perf_counter()

        while trainer.done < schedule.steps and not interrupted.is_set():
            rows = _on(module, data.source.next(schedule.rows(trainer.done)))
            data.source.filling = _silent
            last = trainer.done + 1 == schedule.steps
            log = last or trainer.done % log_steps == 0
            figures = trainer.step(rows, log=log)
            module.state.norm_limit.fill_(data.source.norms.limit)
            done_tokens = min(trainer.done * batch_size, tokens)
            bar.update(len(rows["x"]))
            if log:
                elapsed, steps = time.perf_counter() - clock, trainer.done - logged
                row = _row(trainer, figures, done_tokens, steps * batch_size / elapsed)
                if evaluation is not None and (last or (trainer.done - 1) % evaluate_steps == 0):
                    row |= evaluation(module)
                history.append(row)
                for logger in opened:
                    logger.log(row)
                bar.set_postfix_str(
                    f"loss {row['loss']:.4f}, EV {row['explained_variance']:.4f}, dead {row['dead']:,}", refresh=False
                )
                logged, clock = trainer.done, time.perf_counter()
            due = trainer.done - saved >= save_steps and time.perf_counter() - saved_at >= pause
            if folder is not None and due and not last:
                _checkpoint(folder, trainer, data.source, history)
                saved, saved_at = trainer.done, time.perf_counter()

        run.interrupted = trainer.done < schedule.steps
        run.report = data.source.norms.report()
        module.metadata |= run.report
        trainer.finish()
        if folder is not None:
            record |= {"report": run.report, "metadata": module.metadata}
            if run.interrupted:
                _checkpoint(folder, trainer, data.source, history)
                record["status"] = "interrupted"
            run.write()
            checkpoint.write_run(folder, record | ({} if run.interrupted else {"status": "finished"}))
            if not run.interrupted:
                checkpoint.remove_all(folder)
        if run.interrupted:
            way_on = (
                f"run the same call again to continue in {folder}" if folder else "give `out=` to be able to continue"
            )
            say(f"interrupted after {trainer.done:,} of {schedule.steps:,} steps; the SAE so far is in .sae; {way_on}")
    return run


def _silent(rows: int, goal: int) -> None:
    """What a source tells of its buffer once training goes on."""


def _check_numbers(**numbers: int) -> None:
    for name, value in numbers.items():
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} is {value!r}; it must be a whole number, 1 or more")


def _module(sae: Architecture | SAE, widths: dict[str, int], seed: int, device: str, dtype: torch.dtype | None) -> SAE:
    d_in, d_out = widths["x"], widths.get("target", widths["x"])
    if d_in != d_out:
        raise ConfigError(f"the input has width {d_in:,} and the target {d_out:,}: this architecture needs them equal")
    if isinstance(sae, SAE) and sae.d_in != d_in:
        raise SiteError(f"the SAE reads width {sae.d_in:,} and the activations have width {d_in:,}")
    module = copy.deepcopy(sae) if isinstance(sae, SAE) else SAE(sae, d_in, seed=seed)
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    return module.to(device=where, dtype=dtype or module.dtype)


def _weights_digest(sae: Any) -> str:
    import hashlib

    digest = hashlib.sha256()
    for tensor in sae.state_dict().values():
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _on(module: SAE, rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(module.device) for name, tensor in rows.items()}


def _every(tokens: int | None, schedule: Schedule, parts: int) -> int:
    """A span in tokens, or that part of the run, in steps."""
    return max(1, schedule.steps // parts if tokens is None else tokens // schedule.batch_size)


def _evaluation(every: int | None, source: Any, corpus: Any) -> Any:
    if every is None:
        return None
    if corpus is None:
        raise ConfigError(
            "evaluate_every needs a model and its corpus as the source; evaluate the SAE afterwards instead"
        )
    from saelab.evaluation.fidelity import evaluate

    return lambda module: evaluate(module, source, corpus, progress=False).to_pandas().iloc[0].to_dict()


def _row(trainer: Trainer, figures: dict[str, Any], tokens: int, rate: float) -> dict[str, Any]:
    numbers = {name: float(value) for name, value in figures.items()}
    dead = int(trainer.sae.state.dead.sum())
    return {"step": trainer.done, "tokens": tokens, **numbers, "dead": dead, "tokens_per_second": rate}


def _checkpoint(folder: Path, trainer: Trainer, source: Any, history: list[dict[str, Any]]) -> None:
    if distributed.rank() == 0:
        tensors = trainer.state_dict() | {f"source.{name}": tensor for name, tensor in source.state_dict().items()}
        checkpoint.save(folder, trainer.done, tensors, history)


def _versions() -> dict[str, str]:
    return {
        "saelab": saelab.__version__, "torch": torch.__version__, "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
    }  # fmt: skip


def _speaker(progress: bool) -> Any:
    if not progress:
        return lambda message: None
    from tqdm.auto import tqdm

    return lambda message: tqdm.write(message, file=sys.stderr)


def _bar(tokens: int, done: int, progress: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(
        total=tokens, initial=min(done, tokens), unit=" tokens", unit_scale=True, desc="train", disable=not progress
    )


@contextlib.contextmanager
def _first_interrupt_noted() -> Iterator[threading.Event]:
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
