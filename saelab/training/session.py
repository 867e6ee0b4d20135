"""The runs of one call of `train` or `sweep`, from where they stand to their end."""

import contextlib
import copy
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelab.autoencoders.architecture import Architecture
from saelab.autoencoders.sae import SAE
from saelab.base import processes as distributed
from saelab.base.errors import CheckpointError, ConfigError, SiteError
from saelab.base.progress import progress_bar
from saelab.training import checkpoint, running
from saelab.training.loggers import open_logger
from saelab.training.opening import Input
from saelab.training.run import Run, load_run
from saelab.training.schedule import Schedule
from saelab.training.settings import Settings
from saelab.training.step import Trainer

SAMPLE_ROWS = 32_768
SECONDS_BETWEEN_CHECKPOINTS = 60.0


class Session:
    """Several SAEs trained on the same batches: `resume`, then `step`, `log` and `checkpoint`, and `close`.

    `folders` are the runs' own, `settings.out` holds the checkpoints of all. Within the `with` the folder is locked and the
    first Ctrl-C ends the steps; whatever was opened is closed after it.
    """

    def __init__(
        self, data: Input, saes: Sequence[Architecture | SAE], folders: Sequence[Path | None], settings: Settings
    ) -> None:
        self.data, self.folders, self.settings = data, folders, settings
        self.folder = settings.out
        self.modules = [module_of(sae, data, settings) for sae in saes]
        self.fresh = [not isinstance(sae, SAE) for sae in saes]
        self.digests = [running.weights_digest(sae) if self.folder and isinstance(sae, SAE) else None for sae in saes]
        if settings.evaluate_every is not None and data.evaluate is None:
            raise ConfigError(
                "evaluate_every needs a model and its corpus as the source; evaluate the SAE afterwards instead"
            )
        self.dtypes = [settings.dtype or module.dtype for module in self.modules]
        self.histories: list[list[dict[str, Any]]] = [[] for _ in saes]
        self.before = checkpoint.Before()
        self.stack = contextlib.ExitStack()

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same in all processes that train together."""
        settings, folder = self.settings, self.folder
        each = {str(i): one for i, one in enumerate(self.fingerprints(settings.tokens))}
        cadence = {
            name: getattr(settings, name) for name in ("log_every", "checkpoint_every", "evaluate_every", "resume")
        }
        there = {} if folder is None else {"out": folder, "found there": checkpoint.standing(folder)}
        return checkpoint.leaves(each) | cadence | running.versions() | there

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.__exit__(*error)

    def fingerprints(self, tokens: int) -> list[dict[str, Any]]:
        """What must be the same for a run of so many tokens to be continued, for each SAE."""
        batch_size, lr = self.settings.batch_size, self.settings.lr
        return [
            self.data.fingerprint | {
                "sae": module.cfg.to_dict(), "continues": digest, "tokens": tokens, "batch_size": batch_size,
                "lr": Trainer.rate(module.cfg, Schedule(tokens, batch_size), lr), "dtype": str(dtype),
            }
            for digest, module, dtype in zip(self.digests, self.modules, self.dtypes, strict=True)
        ]  # fmt: skip

    def fingerprint(self, tokens: int) -> dict[str, Any]:
        """That of the folder: the run's, or those of all its runs by name."""
        each = self.fingerprints(tokens)
        if self.folders[0] == self.folder:
            return each[0]
        return {path.name: one for path, one in zip(self.folders, each, strict=True) if path}

    def finished(self) -> list[Run]:
        """The runs as they are, where the folder holds them finished: nothing need be writable for that."""
        folder, settings = self.folder, self.settings
        if folder is None or settings.resume == "never":
            return []
        if not checkpoint.finished(folder, self.fingerprint(settings.tokens)):
            return []
        settings.say(f"{folder} holds this run, finished: it is returned as it is")
        if distributed.first():
            checkpoint.remove_all(folder)  # those that a kill after the last step has left
        return self._ended()

    def _ended(self) -> list[Run]:
        return [load_run(path) for path in self.folders if path is not None]

    def resume(self) -> None:
        """Stand where the folder's run stands, or at the beginning; from here on the folder is this session's.

        Raises `CheckpointError` for a folder with another run, or with any where `resume` is "never".
        """
        settings, source, folder = self.settings, self.data.source, self.folder
        latest = None if folder is None else distributed.together(lambda: self._found(folder))
        before = self.before
        self.schedule = schedule = Schedule(settings.tokens - before.tokens, settings.batch_size, settings.lanes)
        pairs = zip(self.modules, self.dtypes, strict=True)
        self.trainers = [Trainer(module, schedule, settings.lr, dtype) for module, dtype in pairs]
        self.lead = self.trainers[0]
        for trainer in self.trainers:
            lengths = {"tokens": settings.tokens, "batch_size": settings.batch_size, "lr": trainer.lr}
            trainer.sae.metadata = self.data.metadata | lengths | {"versions": running.versions()}
        self.record: dict[str, Any] = {
            "status": "running", "fingerprint": self.fingerprint(settings.tokens), "metadata": self.lead.sae.metadata,
            "report": {}, **({"before": dataclasses.asdict(before)} if before.tokens else {}),
        }  # fmt: skip
        if before.tokens:
            source.go_on(before.place, schedule.tokens)
        if latest is not None:
            step, tensors, self.histories = latest
            for i, trainer in enumerate(self.trainers):
                trainer.load_state_dict(checkpoint.part(tensors, f"{i}."))
            source.load_state_dict(checkpoint.part(tensors, "source."))
            settings.say(f"continuing {folder} at step {before.steps + step:,} of {before.steps + schedule.steps:,}")
        elif before.tokens:
            settings.say(
                f"{folder} holds this run over {before.tokens:,} tokens, finished: it goes on from its SAE for "
                f"{schedule.tokens:,} more, with a schedule of their own (warm-up, decay and optimiser begin anew)"
            )
        self._show_progress()
        if latest is None:
            self._begin()
        self._write(self.record)
        self._open_logs()

    def _write(self, record: dict[str, Any]) -> None:
        if (folder := self.folder) is not None:
            distributed.by_first(lambda: checkpoint.write_run(folder, record))

    def _found(self, folder: Path) -> tuple[int, dict[str, Tensor], list[list[dict[str, Any]]]] | None:
        """The newest checkpoint of the run that the folder holds, if it holds one; a finished shorter one is taken over."""
        tokens = self.settings.tokens
        if distributed.first():
            self.stack.enter_context(checkpoint.locked(folder))
        found = checkpoint.read_run(folder)
        if found is None:
            return None
        if self.settings.resume == "never":
            raise CheckpointError(f"{folder} holds a run already: give another `out`, or resume='auto' to continue it")
        longer = checkpoint.longer(found, self.fingerprint, tokens)
        if longer is None:
            checkpoint.check_fingerprint(folder, found["fingerprint"], self.fingerprint(tokens))
            self.before = checkpoint.Before(**found.get("before", {}))
            return checkpoint.load_latest(folder)
        self.before = longer
        if distributed.first():
            checkpoint.remove_all(folder)
        ended = self._ended()
        self.histories = [run.rows for run in ended]
        pairs = zip(ended, self.modules, strict=True)
        self.modules = [run.sae.to(module.device) for run, module in pairs]
        self.fresh = [False for _ in ended]
        return None

    def _begin(self) -> None:
        """Set what depends on a sample of rows."""
        sample = self.data.source.sample(SAMPLE_ROWS)
        for trainer, fresh in zip(self.trainers, self.fresh, strict=True):
            trainer.initialise(_on(trainer.sae, sample), fresh=fresh)
        if self.before.tokens and self.folder is not None:  # the SAE that it begins with is replaced in the end
            self._save(self.folder)

    def _show_progress(self) -> None:
        done = self.before.tokens + self.schedule.tokens_before(self.lead.done)
        total, progress = self.settings.tokens, self.settings.progress
        bar = progress_bar(total, "train", " tokens", progress, initial=done, unit_scale=True, delay=0)
        self.bar = self.stack.enter_context(bar)
        self.data.source.filling = lambda rows, goal: bar.set_postfix_str(
            f"filling the buffer: {rows:,} of {goal:,} rows"
        )

    def _open_logs(self) -> None:
        self.loggers = [open_logger(logger) for logger in self.settings.loggers]
        for logger in self.loggers:
            self.stack.callback(logger.close)
        self.interrupted = self.stack.enter_context(running.first_interrupt_noted())
        self.log_steps = self._every(self.settings.log_every, 100)
        self.checkpoint_steps = self._every(self.settings.checkpoint_every, 10)
        self.evaluate_steps = self._every(self.settings.evaluate_every, 10)
        self.saved = self.logged = self.lead.done
        self.saved_at = self.logged_at = time.perf_counter()

    def _every(self, tokens: int | None, parts: int) -> int:
        """A span in tokens, or that part of the run, in steps."""
        return max(1, self.schedule.steps // parts if tokens is None else tokens // self.schedule.batch_size)

    @property
    def goes_on(self) -> bool:
        """Whether there is a next step: neither the end was reached nor, in any process, Ctrl-C pressed."""
        return self.lead.done < self.schedule.steps and not distributed.any_(self.interrupted.is_set())

    def _evaluates_after(self, step: int) -> bool:
        due = step == self.schedule.steps or step % self.evaluate_steps == 0
        return self.settings.evaluate_every is not None and due

    @property
    def log_is_due(self) -> bool:
        """Whether the next step is one of those whose figures are kept."""
        step = self.lead.done
        return step + 1 == self.schedule.steps or step % self.log_steps == 0 or self._evaluates_after(step + 1)

    def step(self, log: bool) -> list[dict[str, Any]]:
        """One batch for every SAE: the figures of each, all of them where they are to be logged."""
        source = self.data.source
        n = self.schedule.rows(self.lead.done)
        rows = _on(self.lead.sae, source.next(n))
        source.filling = lambda rows, goal: None
        figures = [trainer.step(rows, log=log) for trainer in self.trainers]
        for trainer in self.trainers:
            trainer.sae.state.norm_limit.fill_(source.norms.limit)
        self.bar.update(n)
        return figures

    def log(self, figures: list[dict[str, Any]]) -> None:
        """Add the last step to the histories, tell the loggers and the progress bar."""
        done = self.schedule.tokens_before(self.lead.done)
        seconds = time.perf_counter() - self.logged_at
        rate = (done - self.schedule.tokens_before(self.logged)) / seconds
        evaluates = self._evaluates_after(self.lead.done)
        for trainer, history, found in zip(self.trainers, self.histories, figures, strict=True):
            sae = trainer.sae
            row: dict[Any, Any] = {
                "step": self.before.steps + trainer.done, "tokens": self.before.tokens + done,
                **{name: float(value) for name, value in found.items()},
                "dead": int(sae.state.dead.sum()), "tokens_per_second": rate,
            }  # fmt: skip
            if evaluates and self.data.evaluate is not None and sae.cfg.usable(sae.state):
                row |= self.data.evaluate(sae).to_pandas().iloc[0].to_dict()
            history.append(row)
        for logger in self.loggers:
            logger.log(self.histories[0][-1])
        newest = [history[-1] for history in self.histories]
        explained = ", ".join(f"{row['explained_variance']:.4f}" for row in newest)
        dead = sum(row["dead"] for row in newest)
        self.bar.set_postfix_str(f"loss {newest[0]['loss']:.4f}, EV {explained}, dead {dead:,}", refresh=False)
        self.logged, self.logged_at = self.lead.done, time.perf_counter()

    @property
    def checkpoint_is_due(self) -> bool:
        """By default once in a tenth of the run and no more than once a minute: each checkpoint holds the buffer."""
        pause = SECONDS_BETWEEN_CHECKPOINTS if self.settings.checkpoint_every is None else 0.0
        due = self.folder is not None and self.saved + self.checkpoint_steps <= self.lead.done < self.schedule.steps
        return due and distributed.any_(distributed.first() and time.perf_counter() - self.saved_at >= pause)

    def checkpoint(self) -> None:
        """Write all that the next step depends on."""
        assert self.folder is not None
        self._write(self.record)  # again: somebody may have removed the folder since
        self._save(self.folder)
        self.saved, self.saved_at = self.lead.done, time.perf_counter()

    def _save(self, folder: Path) -> None:
        source = distributed.to_first(self.data.source.state_dict())
        tensors = {f"source.{name}": tensor for name, tensor in source.items()}
        for i, trainer in enumerate(self.trainers):
            tensors |= {f"{i}.{name}": tensor for name, tensor in trainer.state_dict().items()}
        distributed.by_first(lambda: checkpoint.save(folder, self.lead.done, tensors, self.histories))

    def close(self) -> list[Run]:
        """The runs, finished or interrupted, written into their folders."""
        stopped = self.lead.done < self.schedule.steps
        report = self.data.source.norms.report()
        if self.folder is not None and stopped:
            self.checkpoint()
        runs = []
        prints = self.fingerprints(self.settings.tokens)
        for trainer, history, path, own in zip(self.trainers, self.histories, self.folders, prints, strict=True):
            run = Run(trainer.sae, history, path, stopped, report)
            run.sae.metadata |= report
            trainer.finish()
            distributed.by_first(run.write)
            if distributed.first() and path is not None and path != self.folder and not stopped:
                entry = {"fingerprint": own, "metadata": run.sae.metadata, "report": report}
                checkpoint.write_run(path, entry | {"status": "finished"})
            runs.append(run)
        if self.folder is not None:
            ended = {
                "status": "interrupted" if stopped else "finished", "report": report,
                "metadata": self.lead.sae.metadata, "place": self.data.source.place,  # from which more tokens would go on
            }  # fmt: skip
            self._write(self.record | ended)
            if not stopped and distributed.first():
                checkpoint.remove_all(self.folder)
        if stopped:
            out = self.folder
            way_on = f"run the same call again to continue in {out}" if out else "give `out=` to be able to continue"
            self.settings.say(
                f"interrupted after {self.lead.done:,} of {self.schedule.steps:,} steps; the SAE so far is in .sae; {way_on}"
            )
        return runs


def _on(module: SAE, rows: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(module.device) for name, tensor in rows.items()}


def module_of(sae: Architecture | SAE, data: Input, settings: Settings) -> SAE:
    """The SAE that is trained: a new one, or a copy. Raises `ConfigError` and `SiteError` where it does not fit the rows."""
    cfg, widths = sae.cfg if isinstance(sae, SAE) else sae, data.source.widths
    d_in, d_out = widths["x"], widths.get("target", widths["x"])
    reads, writes = (data.metadata.get(name) for name in ("site", "target_site"))
    if cfg.centres_input and writes not in (None, reads):
        raise ConfigError(
            f"{cfg!r} reconstructs the site that it reads ({reads}) and was given target_site {writes!r}: leave that out, "
            f"or predict it with Transcoder(of={cfg!r})"
        )
    if isinstance(sae, SAE) and (sae.d_in, sae.d_out) != (d_in, d_out):
        raise SiteError(
            f"the SAE reads width {sae.d_in:,} and writes {sae.d_out:,}; the activations have {d_in:,} and {d_out:,}"
        )
    if not cfg.centres_input and "target" not in widths:
        raise ConfigError(
            "a transcoder predicts another site than it reads: give target_site=, or a pair (input, target) as the source"
        )
    module = copy.deepcopy(sae) if isinstance(sae, SAE) else SAE(sae, d_in, seed=settings.seed, d_out=d_out)
    module.path = None
    if (settings.dtype or module.dtype) == torch.float16:
        raise ConfigError(
            "an SAE cannot be trained in float16: give dtype='bfloat16' or 'float32', and convert "
            "what was trained (sae.to(torch.float16))"
        )
    return module.to(settings.device)
