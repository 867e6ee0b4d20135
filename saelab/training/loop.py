"""train and sweep: from one source of activations to one or several trained SAEs. The loop reads top to bottom."""

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from saelab.autoencoders.architecture import Architecture
from saelab.autoencoders.sae import SAE
from saelab.base import checks
from saelab.base import processes as distributed
from saelab.base.errors import CheckpointError, ConfigError
from saelab.base.files import user_path
from saelab.base.surroundings import torch_defaults
from saelab.reading.corpus import load_corpus
from saelab.training import checkpoint, running
from saelab.training.loggers import Logger, open_logger
from saelab.training.opening import open_input
from saelab.training.run import Run, Sweep, load_run
from saelab.training.schedule import Schedule
from saelab.training.step import Trainer

SAMPLE_ROWS = 32_768
SECONDS_BETWEEN_CHECKPOINTS = 60.0


@torch_defaults()
def train(
    source: Any,
    corpus: Any = None,
    *,
    site: str | None = None,
    target_site: str | None = None,
    sae: Architecture | SAE,
    tokens: int,
    batch_size: int = 4096,
    context_length: int | None = None,
    skip_positions: int = 1,
    prepend_bos: bool | None = None,
    max_norm: float | None = 4.0,
    buffer_tokens: int | str = 131_072,
    lr: float | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "auto",
    seed: int = 0,
    out: str | Path | None = None,
    resume: str = "auto",
    checkpoint_every: int | None = None,
    log_every: int | None = None,
    evaluate_every: int | None = None,
    loggers: Logger | str | Sequence[Logger | str] = (),
    progress: bool = True,
) -> Run:
    """Train an SAE on `tokens` activation vectors.

    Args:
        source: a `LanguageModel` (with `corpus` and `site`), an `ActivationStore`, a [n, d] tensor or NumPy array, a pair of
            aligned stores or tensors (input, target), or an iterable of [n, d] tensors or of pairs, such as a `DataLoader` (a
            one-shot iterator serves one epoch). What an iterable draws from the global random generators is seeded by `seed`.
        corpus: what `load_corpus` gives or takes; its train split is read. Past its end a new epoch begins, which is said.
        site: where the activations are read, e.g. "blocks.3.hook_resid_post".
        target_site: what a transcoder predicts, e.g. "blocks.3.hook_mlp_out".
        sae: a configuration such as `saelab.TopK(k=32, d_sae=4096)`, or an `SAE` to go on with (a copy is trained).
        tokens: vectors to train on, those above `max_norm` times the running median norm not counted.
        batch_size: vectors in a step.
        context_length: tokens in a context of a corpus of text: 256, or the model's maximum where that is less, unless given.
        skip_positions: first positions of each context that are left out.
        prepend_bos: whether each context begins with the model's BOS: None follows the tokenizer (what it adds itself), True
            and False decide. Kept with the SAE and used wherever it is.
        max_norm: vectors above this many running median norms are left out; None keeps them.
        buffer_tokens: capacity of the shuffling buffer of streamed sources, in vectors or as in "2GiB".
        dtype: of the SAE, as "float32" or `torch.float32`.
        device: of the SAE, as "cuda:0", "cpu", or "auto": the GPU where there is one.
        seed: of everything that is drawn.
        lr: peak learning rate; None is the architecture's, 2e-4 / sqrt(d_sae / 2^14), times sqrt(16,000 / steps) where the
            run has fewer than 16,000 steps, 8 at most (`Schedule.short_run_boost`).
        out: folder for checkpoints and the result. A run with the same arguments is continued to the same bits, a finished
            one is returned; another one is an error. A finished one with fewer `tokens` goes on for the rest: from its SAE,
            with a schedule of their own, and with the rows after those that it has read.
        resume: "auto", or "never" to refuse a folder that holds a run already.
        checkpoint_every: tokens between checkpoints: a tenth of the run, at most one a minute, unless given.
        log_every: tokens between rows of the history: a hundredth of the run unless given.
        evaluate_every: tokens between evaluations, none unless given. They add the columns of `saelab.evaluate` to the history,
            for a source that is a model; SAEs that fire by learnt thresholds are evaluated once they have some (after 20%
            of the run).
        loggers: "wandb", "tensorboard", or an object with `log(row)` and `close()`; one of them or a list.
        progress: show a bar with the rate and the time left.

    The first Ctrl-C finishes the step, writes a checkpoint and returns a `Run` with `.interrupted`; a second one raises.

    Raises `ConfigError`, `SiteError` (an SAE of another width), `DataError` (NaN or infinite activations: the batch is
    named, the weights stay as they were) and `CheckpointError`, each with the numbers and the way out.

    >>> import torch, saelab
    >>> run = saelab.train(torch.randn(512, 8), sae=saelab.TopK(k=2, d_sae=16), tokens=1024, batch_size=128, progress=False)
    >>> run.sae
    SAE(TopK(k=2, d_sae=16), d_in=8)
    """
    folder = None if out is None else user_path(out)
    return _together(
        source, corpus, [sae], [folder], folder, site=site, target_site=target_site, tokens=tokens, batch_size=batch_size,
        context_length=context_length, skip_positions=skip_positions, prepend_bos=prepend_bos, max_norm=max_norm,
        buffer_tokens=buffer_tokens, lr=lr, dtype=dtype, device=device, seed=seed, resume=resume,
        checkpoint_every=checkpoint_every, log_every=log_every, evaluate_every=evaluate_every, loggers=loggers,
        progress=progress,
    )[0]  # fmt: skip


@torch_defaults()
def sweep(
    source: Any,
    *corpus_and_saes: Any,
    tokens: int,
    site: str | None = None,
    target_site: str | None = None,
    batch_size: int = 4096,
    context_length: int | None = None,
    skip_positions: int = 1,
    prepend_bos: bool | None = None,
    max_norm: float | None = 4.0,
    buffer_tokens: int | str = 131_072,
    lr: float | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "auto",
    seed: int = 0,
    out: str | Path | None = None,
    resume: str = "auto",
    checkpoint_every: int | None = None,
    log_every: int | None = None,
    evaluate_every: int | None = None,
    progress: bool = True,
) -> Sweep:
    """Train several SAEs on one stream of activations: `sweep(x, saes, tokens=...)` or `sweep(lm, corpus, saes, site=...)`.

    The activations are made and mixed once, and every SAE sees the same batches as it would alone with the same seed; each
    result equals its own `train`. The arguments are those of `train`. With `out`, the whole continues after a kill, and each
    finished run has a folder of its own there (`00-TopK`, ...) for `load_run`.

    Raises what `train` raises, and `ConfigError` for an empty list.

    >>> import torch, saelab
    >>> x = torch.randn(512, 8)
    >>> runs = saelab.sweep(x, [saelab.TopK(k=k, d_sae=16) for k in (1, 2)], tokens=512, batch_size=128, progress=False)
    >>> len(runs), runs[1].sae.cfg
    (2, TopK(k=2, d_sae=16))
    """
    if len(corpus_and_saes) not in (1, 2) or not isinstance(corpus_and_saes[-1], (list, tuple)):
        raise ConfigError(
            "call sweep(activations, [sae, ...], tokens=...) or sweep(lm, corpus, [sae, ...], site=..., tokens=...)"
        )
    *corpus, saes = corpus_and_saes
    if not saes:
        raise ConfigError("the list of SAEs is empty: give at least one configuration")
    folder = None if out is None else user_path(out)
    names = [f"{i:02d}-{type(sae.cfg if isinstance(sae, SAE) else sae).__name__}" for i, sae in enumerate(saes)]
    folders = [None if folder is None else folder / name for name in names]
    return Sweep(_together(
        source, corpus[0] if corpus else None, list(saes), folders, folder, site=site, target_site=target_site, tokens=tokens,
        batch_size=batch_size, context_length=context_length, skip_positions=skip_positions, prepend_bos=prepend_bos,
        max_norm=max_norm,
        buffer_tokens=buffer_tokens, lr=lr, dtype=dtype, device=device, seed=seed, resume=resume,
        checkpoint_every=checkpoint_every, log_every=log_every, evaluate_every=evaluate_every, loggers=(), progress=progress,
    ))  # fmt: skip


def _together(
    source: Any, corpus: Any, saes: list[Any], folders: list[Path | None], folder: Path | None, *, site: str | None,
    target_site: str | None, tokens: int, batch_size: int, context_length: int | None, skip_positions: int,
    prepend_bos: bool | None, max_norm: float | None,
    buffer_tokens: int | str, lr: float | None, dtype: torch.dtype | str | None, device: str | torch.device, seed: int,
    resume: str, checkpoint_every: int | None, log_every: int | None, evaluate_every: int | None,
    loggers: Logger | str | Sequence[Logger | str], progress: bool,
) -> list[Run]:  # fmt: skip
    """Train the SAEs on the same batches; `folders` are the runs' own, `folder` holds the checkpoints of all."""
    tokens, batch_size = checks.count("tokens", tokens), checks.count("batch_size", batch_size)
    skip_positions = checks.count("skip_positions", skip_positions, least=0)
    if not isinstance(buffer_tokens, str):
        buffer_tokens = checks.count("buffer_tokens", buffer_tokens)
    max_norm = checks.maybe(checks.number, "max_norm", max_norm, above=0)
    lr = checks.maybe(checks.number, "lr", lr, least=0)
    checkpoint_every = checks.maybe(checks.count, "checkpoint_every", checkpoint_every)
    log_every = checks.maybe(checks.count, "log_every", log_every)
    evaluate_every = checks.maybe(checks.count, "evaluate_every", evaluate_every)
    seed, dtype, place = checks.seed(seed), checks.dtype_of(dtype), checks.device_of(device)
    checks.choice("resume", resume, ("auto", "never"))
    if (processes := distributed.world_size()) > 1:
        raise ConfigError(
            f"{processes} processes of torch.distributed each call train, which would read the same rows {processes} times and "
            "write into one folder: call it in one process (train on several is not there yet)"
        )
    several: list[Any] = list(loggers) if isinstance(loggers, (list, tuple)) else [loggers]
    if folder is not None:
        checkpoint.try_out(folder, [path for path in folders if path is not None])
    say = running.speaker(progress)
    for sae in saes:
        if not isinstance(sae, (SAE, Architecture)):
            raise ConfigError(
                f"sae is {sae!r}; give a configuration such as saelab.TopK(k=32, d_sae=4096), or an SAE to go on with"
            )
    cfgs = [sae.cfg if isinstance(sae, SAE) else sae for sae in saes]
    corpus = None if corpus is None else load_corpus(corpus, seed=seed)
    data = open_input(
        source, corpus, site=site, target_site=target_site, context_length=context_length, skip_positions=skip_positions,
        prepend_bos=prepend_bos, max_norm=max_norm, buffer_tokens=buffer_tokens, batch_size=batch_size, tokens=tokens,
        seed=seed,
        gradients=any(cfg.needs_gradients for cfg in cfgs), digests=folder is not None, say=say,
    )  # fmt: skip
    reads, writes = (data.metadata.get(name) for name in ("site", "target_site"))
    for cfg in cfgs:
        if cfg.centres_input and writes not in (None, reads):
            raise ConfigError(
                f"{cfg!r} reconstructs the site that it reads ({reads}) and was given target_site {writes!r}: leave that out, "
                f"or predict it with Transcoder(of={cfg!r})"
            )
    modules = [running.module_for(sae, data.source.widths, seed, place, dtype) for sae in saes]
    fresh = [not isinstance(sae, SAE) for sae in saes]
    digests = [running.weights_digest(sae) if folder and isinstance(sae, SAE) else None for sae in saes]

    def prints(tokens: int) -> list[dict[str, Any]]:
        """What must be the same for a run of so many tokens to be continued, for each SAE."""
        rates = [Trainer.rate(cfg, Schedule(tokens, batch_size), lr) for cfg in cfgs]
        return [
            data.fingerprint | {
                "sae": cfg.to_dict(), "continues": digest, "tokens": tokens, "batch_size": batch_size, "lr": rate,
                "dtype": str(module.dtype),
            }
            for cfg, digest, rate, module in zip(cfgs, digests, rates, modules, strict=True)
        ]  # fmt: skip

    def fingerprint(tokens: int) -> dict[str, Any]:
        each = prints(tokens)
        return (
            each[0]
            if folder == folders[0]
            else {path.name: one for path, one in zip(folders, each, strict=True) if path}
        )

    evaluation = running.evaluation_of(evaluate_every, source, corpus)

    with contextlib.ExitStack() as stack:
        histories: list[list[dict[str, Any]]] = [[] for _ in saes]
        before, latest = checkpoint.Before(), None
        if folder is not None:
            if checkpoint.finished(folder, fingerprint(tokens)) and resume == "auto":
                say(f"{folder} holds this run, finished: it is returned as it is")  # nothing need be writable for that
                checkpoint.remove_all(folder)  # those that a kill after the last step has left
                return [load_run(path) for path in folders if path is not None]
            stack.enter_context(checkpoint.locked(folder))
            found = checkpoint.read_run(folder)
            if found is not None and resume == "never":
                raise CheckpointError(
                    f"{folder} holds a run already: give another `out`, or resume='auto' to continue it"
                )
            longer = None if found is None else checkpoint.longer(found, fingerprint, tokens)
            if longer is not None:
                before = longer
                checkpoint.remove_all(folder)
                ended = [load_run(path) for path in folders if path is not None]
                histories = [run.rows for run in ended]
                modules = [run.sae.to(module.device, module.dtype) for run, module in zip(ended, modules, strict=True)]
                fresh = [False for _ in saes]
            elif found is not None:
                checkpoint.check_fingerprint(folder, found["fingerprint"], fingerprint(tokens))
                before, latest = checkpoint.Before(**found.get("before", {})), checkpoint.load_latest(folder)
        schedule = Schedule(tokens - before.tokens, batch_size)
        trainers = [Trainer(module, schedule, lr) for module in modules]
        lead = trainers[0]
        for trainer in trainers:
            lengths = {"tokens": tokens, "batch_size": batch_size, "lr": trainer.lr}
            trainer.sae.metadata = data.metadata | lengths | {"versions": running.versions()}
        record: dict[str, Any] = {
            "status": "running", "fingerprint": fingerprint(tokens), "metadata": lead.sae.metadata, "report": {},
            **({"before": dataclasses.asdict(before)} if before.tokens else {}),
        }  # fmt: skip
        if before.tokens:
            data.source.go_on(before.place, schedule.tokens)
        if latest is not None:
            step, tensors, histories = latest
            for i, trainer in enumerate(trainers):
                trainer.load_state_dict(checkpoint.part(tensors, f"{i}."))
            data.source.load_state_dict(checkpoint.part(tensors, "source."))
            say(f"continuing {folder} at step {before.steps + step:,} of {before.steps + schedule.steps:,}")
        elif before.tokens:
            say(
                f"{folder} holds this run over {before.tokens:,} tokens, finished: it goes on from its SAE for "
                f"{schedule.tokens:,} more, with a schedule of their own (warm-up, decay and optimiser begin anew)"
            )
        done = before.tokens + schedule.tokens_before(lead.done)
        bar = stack.enter_context(running.bar_of(tokens, done, progress))
        data.source.filling = lambda rows, goal: bar.set_postfix_str(f"filling the buffer: {rows:,} of {goal:,} rows")
        if latest is None:
            sample = data.source.sample(SAMPLE_ROWS)
            for trainer, new in zip(trainers, fresh, strict=True):
                trainer.initialise(running.on(trainer.sae, sample), fresh=new)
            if before.tokens and folder is not None:  # the SAE that it begins with is replaced in the end
                _checkpoint(folder, None, trainers, data.source, histories)

        runs = [Run(trainer.sae, rows, path) for trainer, rows, path in zip(trainers, histories, folders, strict=True)]
        if folder is not None:
            checkpoint.write_run(folder, record)
        opened = [open_logger(logger) for logger in several]
        for logger in opened:
            stack.callback(logger.close)
        interrupted = stack.enter_context(running.first_interrupt_noted())
        log_steps = running.every(log_every, schedule, 100)
        save_steps = running.every(checkpoint_every, schedule, 10)
        evaluate_steps = running.every(evaluate_every, schedule, 10)
        # by default no more than one checkpoint a minute: each holds the buffer
        pause = SECONDS_BETWEEN_CHECKPOINTS if checkpoint_every is None else 0.0
        saved, logged, clock, saved_at = lead.done, lead.done, time.perf_counter(), time.perf_counter()

        while lead.done < schedule.steps and not interrupted.is_set():
            step = lead.done
            rows = running.on(lead.sae, data.source.next(schedule.rows(step)))
            data.source.filling = running.silent
            last = step + 1 == schedule.steps
            evaluate = evaluation is not None and (last or (step + 1) % evaluate_steps == 0)
            log = last or step % log_steps == 0 or evaluate
            figures = [trainer.step(rows, log=log) for trainer in trainers]
            for trainer in trainers:
                trainer.sae.state.norm_limit.fill_(data.source.norms.limit)
            bar.update(len(rows["x"]))
            if log:
                done = schedule.tokens_before(lead.done)
                rate = (done - schedule.tokens_before(logged)) / (time.perf_counter() - clock)
                for trainer, history, figure in zip(trainers, histories, figures, strict=True):
                    row = running.history_row(trainer, figure, before.steps + trainer.done, before.tokens + done, rate)
                    usable = trainer.sae.cfg.usable(trainer.sae.state)
                    history.append(row | evaluation(trainer.sae) if evaluate and usable else row)
                for logger in opened:
                    logger.log(histories[0][-1])
                newest = [history[-1] for history in histories]
                explained = ", ".join(f"{row['explained_variance']:.4f}" for row in newest)
                dead = sum(row["dead"] for row in newest)
                bar.set_postfix_str(f"loss {newest[0]['loss']:.4f}, EV {explained}, dead {dead:,}", refresh=False)
                logged, clock = lead.done, time.perf_counter()
            due = lead.done - saved >= save_steps and time.perf_counter() - saved_at >= pause
            if folder is not None and due and not last:
                _checkpoint(folder, record, trainers, data.source, histories)
                saved, saved_at = lead.done, time.perf_counter()

        stopped = lead.done < schedule.steps
        report = data.source.norms.report()
        if folder is not None and stopped:
            _checkpoint(folder, record, trainers, data.source, histories)
        for run, trainer, own in zip(runs, trainers, prints(tokens), strict=True):
            run.interrupted, run.report = stopped, report
            run.sae.metadata |= report
            trainer.finish()
            if run.path is not None:
                run.write()
                if run.path != folder and not stopped:
                    entry = {"fingerprint": own, "metadata": run.sae.metadata, "report": report}
                    checkpoint.write_run(run.path, entry | {"status": "finished"})
        if folder is not None:
            status = "interrupted" if stopped else "finished"
            stand = {"place": data.source.place}  # from which more tokens would go on
            checkpoint.write_run(
                folder, record | {"status": status, "report": report, "metadata": lead.sae.metadata} | stand
            )
            if not stopped:
                checkpoint.remove_all(folder)
        if stopped:
            way_on = (
                f"run the same call again to continue in {folder}" if folder else "give `out=` to be able to continue"
            )
            say(f"interrupted after {lead.done:,} of {schedule.steps:,} steps; the SAE so far is in .sae; {way_on}")
    return runs


def _checkpoint(
    folder: Path,
    record: dict[str, Any] | None,
    trainers: list[Trainer],
    source: Any,
    histories: list[list[dict[str, Any]]],
) -> None:
    if record is not None:
        checkpoint.write_run(folder, record)  # again: somebody may have removed the folder since
    tensors = {f"source.{name}": tensor for name, tensor in source.state_dict().items()}
    for i, trainer in enumerate(trainers):
        tensors |= {f"{i}.{name}": tensor for name, tensor in trainer.state_dict().items()}
    checkpoint.save(folder, trainers[0].done, tensors, histories)
