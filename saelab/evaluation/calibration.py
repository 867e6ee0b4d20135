"""Activation statistics of an SAE that was not trained here: what units, dashboards and steering ask of it."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch

from saelab.autoencoders.architecture import Batch
from saelab.autoencoders.architectures.mutual_choice import MutualChoice
from saelab.autoencoders.architectures.transcoder import Transcoder
from saelab.autoencoders.sae import SAE
from saelab.autoencoders.serialization import unfilled
from saelab.base import checks
from saelab.base.errors import ConfigError, DataError
from saelab.base.progress import progress_bar
from saelab.models.purpose import Purpose
from saelab.reading.corpus import contexts_for, load_corpus
from saelab.reading.reader import ContextReader

if TYPE_CHECKING:
    from saelab.models.language import LanguageModel

THRESHOLD_SHARE = 4  # a threshold that is not there is learnt on the first such part of the contexts
_ROWS = 4096


def calibrate(
    sae: SAE,
    lm: "LanguageModel",
    corpus: Any,
    *,
    tokens: int = 200_000,
    site: str | None = None,
    context_length: int | None = None,
    skip_positions: int | None = None,
    prepend_bos: bool | None = None,
    batch_size: int = 8,
    split: str = "train",
    progress: bool = True,
) -> SAE:
    """The SAE with activation statistics of its latents on a corpus, as training would have left them; it shares its weights.

    Measured at the positions that the SAE is for: each latent's largest and mean activation and density, the standard deviation
    of the target along its decoder row (`latent_stats`), the median norm of the target, and the heads of `hook_z`
    (`metadata`). One that fires by a threshold for all and has none (BatchTopK whose file has -1) gets the mean of the batches'
    cuts on the first quarter of the contexts. The SAE given is as it was; `save` keeps what was measured.

    Args:
        sae: such as `saelab.load_sae` gives.
        lm: the model that it is for.
        corpus: what `load_corpus` gives or takes.
        tokens: up to so many go through the model as far as the site.
        site, context_length, skip_positions, prepend_bos, batch_size, split, progress: as for `evaluate`.

    Raises `ConfigError` when there is no site or an argument cannot work, `SiteError` when the site has another width,
    `DataError` when there is no position that the SAE is for.

    >>> sae = saelab.calibrate(saelab.load_sae("my-sae"), lm, corpus)  # doctest: +SKIP
    >>> sae.latent_stats.max.shape  # doctest: +SKIP
    torch.Size([16384])
    """
    checks.autoencoder("sae", sae), checks.language_model("lm", lm)
    purpose = Purpose.of(sae, site, skip_positions)
    place = purpose.source(lm)
    purpose.target(lm)  # a site that is none is said before the corpus is read
    tokens, batch_size = checks.count("tokens", tokens), checks.count("batch_size", batch_size)
    corpus = load_corpus(corpus)
    contexts = contexts_for(sae, lm, corpus, split, context_length, prepend_bos, progress)
    purpose = replace(purpose, sae=_copy(sae))
    if not sae.cfg.usable(sae.state):
        part = -(-tokens // THRESHOLD_SHARE)
        _learn_threshold(purpose, ContextReader.of(purpose, lm, contexts, part, batch_size), progress)
    _measure(purpose, ContextReader.of(purpose, lm, contexts, tokens, batch_size), progress)
    measured = cast(SAE, purpose.sae)
    heads = [place.heads, place.d_head] if place.heads else None
    measured.metadata |= {"heads": heads, "skip_positions": purpose.skip_positions}
    measured.metadata["calibrated_on"] = {"model": lm.name, "corpus": corpus.name, "split": split}
    return measured


def _copy(sae: SAE) -> SAE:
    """The same weights, and a state of its own."""
    tensors = {name: value.clone() if name.startswith("state.") else value for name, value in sae.state_dict().items()}
    copied = unfilled(sae.cfg, sae.d_in, sae.d_out, sae.dtype)
    copied.load_state_dict(tensors, assign=True)
    copied.metadata, copied.path = dict(sae.metadata), sae.path
    return copied.requires_grad_(False)


@torch.no_grad()
def _learn_threshold(purpose: Purpose, reader: ContextReader, progress: bool) -> None:
    """Let the mean of the batches' cuts be the threshold."""
    sae, source, target = purpose.sae, purpose.source(reader.lm).name, purpose.target(reader.lm).name
    rule = sae.cfg.of if isinstance(sae.cfg, Transcoder) else sae.cfg
    if not isinstance(rule, MutualChoice):
        raise ConfigError(f"{sae!r} has thresholds that are learnt in training only, and it has none: train it further")
    params, state = sae.params(), sae.state
    with progress_bar(len(reader.order), "learning a threshold", "context", progress) as bar:
        for rows in reader.rows():
            mine = sae.replaceable(rows.x[source].to(sae.W_dec))
            x, y = (rows.x[name].to(params.W_dec)[mine] for name in (source, target))
            batch = Batch(sae.scaled(x), y * state.target_scale)
            codes = rule.allocate(rule.scores(params, batch), state, 1.0)
            if len(codes.values):
                state.cut_sum += codes.values.min()
                state.cut_weight += 1
            bar.update(rows.cursor - bar.n)


@torch.no_grad()
def _measure(purpose: Purpose, reader: ContextReader, progress: bool) -> None:
    """Put what is measured into the state, in its units, and the median norm into the metadata."""
    sae, target = purpose.sae, purpose.target(reader.lm).name
    state, norms = sae.state, []
    for name in ("fires", "act_sum", "act_max", "stat_tokens"):
        getattr(state, name).zero_()
    covariance = torch.zeros(sae.d_out, sae.d_out, dtype=torch.float64, device=sae.device)
    total = torch.zeros(sae.d_out, dtype=torch.float64, device=sae.device)
    with progress_bar(len(reader.order), "measuring activations", "context", progress) as bar:
        for rows, codes in reader.coded(purpose):
            y, values = rows.x[target].to(sae.device).float(), codes.values.float() * state.target_scale
            state.fires += torch.bincount(codes.indices, minlength=sae.d_sae)
            state.act_sum.index_add_(0, codes.indices, values.double())
            state.act_max.scatter_reduce_(0, codes.indices, values, "amax")
            state.stat_tokens += len(y)
            norms.append(torch.linalg.vector_norm(y, dim=1))
            if sae.cfg.per_token and sae.cfg.centres_input:  # as its codes and directions are
                y = sae.scaled(y)
            covariance += (y.T @ y).double()
            total += y.sum(0, dtype=torch.float64)
            bar.update(rows.cursor - bar.n)
    n = int(state.stat_tokens)
    if not n:
        raise DataError(
            "no position of these contexts is one that the SAE is for: give a longer context_length or another corpus"
        )
    covariance = covariance / n - torch.outer(total / n, total / n)
    for start in range(0, sae.d_sae, _ROWS):
        d = sae.W_dec[start : start + _ROWS].double()
        variance = ((d @ covariance) * d).sum(1) / d.square().sum(1)
        state.direction_std[start : start + _ROWS] = variance.clamp_min(0).nan_to_num(0).sqrt() * state.target_scale
    sae.metadata["median_norm"] = float(torch.cat(norms).median())
