"""train and sweep: from one source of activations to one or several trained SAEs. The loop reads top to bottom."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from saelab.autoencoders.architecture import Architecture
from saelab.autoencoders.sae import SAE
from saelab.base import processes as distributed
from saelab.base.errors import ConfigError
from saelab.base.surroundings import torch_defaults
from saelab.training import checkpoint
from saelab.training.loggers import Logger
from saelab.training.opening import open_source
from saelab.training.run import Run, Sweep
from saelab.training.session import Session
from saelab.training.settings import Settings


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
    lanes: int | None = None,
) -> Run:
    """Train an SAE on `tokens` activation vectors.

    Args:
        source: a `LanguageModel` (with `corpus` and `site`), a `Denoiser` (with `site`), an `ActivationStore`, a [n, d]
            tensor or NumPy array, a pair of aligned stores or tensors (input, target), or an iterable of [n, d] tensors or of
            pairs, such as a `DataLoader` (a one-shot iterator serves one epoch). What an iterable draws from the global random
            generators is seeded by `seed`. A store of more than 256 shards (16 GiB as `harvest` writes them) is read shard by
            shard, in an order drawn for each epoch, and mixed in the buffer; a smaller one at random access.
        corpus: what `load_corpus` gives or takes; its train split is read. Past its end a new epoch begins, which is said. Of a
            denoiser clean images [n, C, H, W], a pair (images, cond), or nothing: 512 of its own samples. Each is seen once an
            epoch, noised to a random timestep, and each place of the activation is a row.
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
        dtype: of the SAE in the end, as "float32" or `torch.float32`. "bfloat16" is trained in fp32, moments too, then rounded.
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
        lanes: how many equal parts the rows of a batch come in, each from contexts, a buffer and a generator of its own. The
            processes that `torchrun` starts share them out, so a run with the same lanes has the same rows on any number of
            processes that divides it. None is one for each process.

    Processes that `torchrun` has started train one SAE together, each on its part of every batch.

    The first Ctrl-C finishes the step, writes a checkpoint and returns a `Run` with `.interrupted`; a second one raises.

    Raises `ConfigError`, `SiteError` (an SAE of another width), `DataError` (NaN or infinite activations: the batch is
    named, the weights stay as they were) and `CheckpointError`, each with the numbers and the way out.

    >>> import torch, saelab
    >>> run = saelab.train(torch.randn(512, 8), sae=saelab.TopK(k=2, d_sae=16), tokens=1024, batch_size=128, progress=False)
    >>> run.sae
    SAE(TopK(k=2, d_sae=16), d_in=8)
    """
    distributed.join()
    settings = Settings.of(locals())
    return _together(source, corpus, [sae], [settings.out], settings)[0]


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
    lanes: int | None = None,
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
    distributed.join()
    arguments = locals() | {"loggers": ()}
    if len(corpus_and_saes) not in (1, 2) or not isinstance(corpus_and_saes[-1], (list, tuple)):
        raise ConfigError(
            "call sweep(activations, [sae, ...], tokens=...) or sweep(lm, corpus, [sae, ...], site=..., tokens=...)"
        )
    *corpus, saes = corpus_and_saes
    if not saes:
        raise ConfigError("the list of SAEs is empty: give at least one configuration")
    settings = Settings.of(arguments)
    names = [f"{i:02d}-{type(sae.cfg if isinstance(sae, SAE) else sae).__name__}" for i, sae in enumerate(saes)]
    folders = [None if settings.out is None else settings.out / name for name in names]
    return Sweep(_together(source, corpus[0] if corpus else None, saes, folders, settings))


def _together(
    source: Any, corpus: Any, saes: Sequence[Any], folders: Sequence[Path | None], settings: Settings
) -> list[Run]:
    """Train the SAEs on the same batches; `folders` are the runs' own, `settings.out` holds the checkpoints of all."""
    with distributed.watched():
        session = distributed.together(lambda: _opened(source, corpus, saes, folders, settings))
        distributed.agree(session.identity)
        with session:
            if runs := session.finished():
                return runs
            session.resume()
            while session.goes_on:
                log = session.log_is_due
                figures = session.step(log)
                if log:
                    session.log(figures)
                if session.checkpoint_is_due:
                    session.checkpoint()
            return session.close()


def _opened(
    source: Any, corpus: Any, saes: Sequence[Any], folders: Sequence[Path | None], settings: Settings
) -> Session:
    """The session, once what was asked for is known to be possible."""
    if settings.out is not None and distributed.first():
        checkpoint.try_out(settings.out, [path for path in folders if path is not None])
    for sae in saes:
        if not isinstance(sae, (SAE, Architecture)):
            raise ConfigError(
                f"sae is {sae!r}; give a configuration such as saelab.TopK(k=32, d_sae=4096), or an SAE to go on with"
            )
    cfgs = [sae.cfg if isinstance(sae, SAE) else sae for sae in saes]
    data = open_source(source, corpus, settings, gradients=any(cfg.needs_gradients for cfg in cfgs))
    return Session(data, saes, folders, settings)
