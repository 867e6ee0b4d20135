"""What a language model loses when a site is replaced by an autoencoder's reconstruction, or by a transcoder's."""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.autoencoders.architectures.gradient import select_with_gradient
from saelab.base import checks
from saelab.base.errors import ConfigError, DataError
from saelab.base.progress import progress_bar
from saelab.base.protocols import Dictionary
from saelab.evaluation.passes import CleanPass, context_ce, context_kl
from saelab.evaluation.reconstruction import Reconstruction
from saelab.evaluation.report import Report
from saelab.evaluation.sparsity import Firing
from saelab.models.identity import warn_of_other_weights
from saelab.models.purpose import Purpose
from saelab.models.sites import run_recording
from saelab.models.tokens import Tokens
from saelab.reading.corpus import contexts_for, load_corpus
from saelab.reading.reader import ContextReader

if TYPE_CHECKING:
    from saelab.models.language import LanguageModel
    from saelab.reading.corpus import Corpus
    from saelab.reading.images import Images
    from saelab.reading.packing import Contexts

__all__ = ["Report", "evaluate"]

SELECTIONS = ("plain", "grad_model", "grad_true")


def evaluate(
    sae: Dictionary,
    lm: Any,
    corpus: Any,
    *,
    tokens: int = 8_192,
    sparsity_tokens: int = 200_000,
    site: str | None = None,
    context_length: int | None = None,
    skip_positions: int | None = None,
    prepend_bos: bool | None = None,
    batch_size: int = 8,
    split: str = "heldout",
    selection: str = "plain",
    progress: bool = True,
) -> Any:
    """Evaluate an SAE in its model: reconstruction, sparsity, and what the model's predictions lose.

    Contexts of the split are read whole, from its start. Replaced are exactly the positions that the SAE is for:
    neither padding nor special, past `skip_positions`, within the norm limit of the training; zero and mean ablation
    replace the same ones. The field ablates every position, the first too, where a residual stream holds the sink:
    `ce_score_all` is that figure.
    Cross-entropy is over real targets, KL over real positions, separators and BOS excluded from both. `Report` defines
    each figure. Of a transcoder, what is replaced, explained and ablated is the target, at the positions whose input it
    is for.

    In place of a language model a `Denoiser` with images as its corpus: its report is a `DenoiserReport`
    (`saelab.evaluation.denoising` says what is measured), and what is said of contexts means nothing.

    Args:
        corpus: what `load_corpus` gives or takes. Of one with fewer than 20 documents the held-out split is unseen contexts of
            the documents trained on (`Corpus.contexts`).
        tokens: at least so many go through the whole model: clean, and with the SAE, zeros, the mean, and zeros everywhere in
            place of the activation.
        sparsity_tokens: up to so many go through the model as far as the site, for dead latents and the mean.
        site: where the SAE is put, that of `sae.metadata` unless given.
        context_length: tokens in a context; that of `sae.metadata` unless given, else 256 or the model's maximum.
        skip_positions: first positions of each context that keep the model's activation; as in `sae.metadata`, else 1.
        prepend_bos: whether each context begins with the model's BOS; as in `sae.metadata`, else as the tokenizer does.
        batch_size: contexts a forward pass.
        split: "heldout", "train" or "all".
        selection: how the latents are chosen: "plain", as `sae.encode` does and anyone will who uses the SAE; for a
            `GradientTopK` also with the gradient of the loss at labels drawn from the model ("grad_model") or at the true
            next tokens ("grad_true"), as it was trained (`select_with_gradient`). The last leaks the answer into the choice:
            both are diagnostics. Dead latents are those of the plain selection always.
        progress: show a bar with the rate and the time left.

    Warns when the SAE was trained on the tokens that are read, and when the split ends short of `tokens`.

    Raises `ConfigError` when there is no site or an argument cannot work (a gradient selection for another SAE than a
    `GradientTopK`), `SiteError` when the site has another width,
    `DataError` when the split has no whole context or nothing to replace.

    >>> import saelab
    >>> report = saelab.evaluate(sae, lm, saelab.load_corpus("sotu"))  # doctest: +SKIP
    >>> report.delta_ce, report.kl, report.explained_variance  # doctest: +SKIP
    """
    if hasattr(lm, "alphas_cumprod"):
        _refuse_text(context_length, skip_positions, prepend_bos, selection)
        from saelab.evaluation.denoising import evaluate_denoiser

        return evaluate_denoiser(
            sae, lm, corpus, tokens=tokens, sparsity_tokens=sparsity_tokens, site=site, batch_size=batch_size, split=split,
            progress=progress,
        )  # fmt: skip
    checks.autoencoder("sae", sae), checks.language_model("lm", lm)
    purpose = Purpose.of(sae, site, skip_positions)
    purpose.source(lm), purpose.target(lm)  # a site that is none is said before the corpus is read
    warn_of_other_weights(lm, sae)
    checks.choice("selection", selection, SELECTIONS)
    tokens, sparsity_tokens = checks.count("tokens", tokens), checks.count("sparsity_tokens", sparsity_tokens)
    batch_size = checks.count("batch_size", batch_size)
    corpus = load_corpus(corpus)
    contexts = contexts_for(sae, lm, corpus, split, context_length, prepend_bos)
    warn_of_training_tokens(sae, corpus, split)
    _warn_of_short_split(contexts, tokens, split)

    with torch.no_grad():
        reader = ContextReader.of(purpose, lm, contexts, sparsity_tokens, batch_size)
        firing, mean = _sparsity(purpose, reader, progress)
        sums, count = _Fidelity(purpose, lm, mean, selection), contexts.enough(tokens)
        with progress_bar(count, "evaluating", "context", progress) as bar:
            for start in range(0, count, batch_size):
                rows = slice(start, min(start + batch_size, count))
                sums.add(contexts, rows)
                bar.update(rows.stop - rows.start)
    return sums.report(firing, split)


def _refuse_text(context_length: Any, skip_positions: Any, prepend_bos: Any, selection: str) -> None:
    of_text = {"context_length": context_length, "skip_positions": skip_positions, "prepend_bos": prepend_bos,
               "selection": None if selection == "plain" else selection}  # fmt: skip
    if given := [name for name, value in of_text.items() if value is not None]:
        raise ConfigError(
            f"a denoiser reads images and not text, so that {', '.join(given)} means nothing: leave it out"
        )


def warn_of_training_tokens(sae: Dictionary, corpus: "Corpus | Images", split: str) -> None:
    """Say so where an SAE is evaluated on what it was trained on."""
    trained = sae.metadata.get("split")
    if sae.metadata.get("corpus_digest") == corpus.digest and (trained == split or "all" in (trained, split)):
        warnings.warn(
            f"this SAE was trained on split {trained!r} of this corpus, and {split!r} is what it is evaluated on: the "
            'figures are not held-out ones (split="heldout" is, for an SAE trained on "train")',
            stacklevel=3,
        )


def _warn_of_short_split(contexts: "Contexts", tokens: int, split: str) -> None:
    if contexts.ids.numel() < tokens:
        warnings.warn(
            f"the {split} split ends after {contexts.ids.numel():,} of the {tokens:,} tokens asked for: the figures "
            "are over those",
            stacklevel=3,
        )


def _sparsity(purpose: Purpose, reader: ContextReader, progress: bool) -> tuple[Firing, Tensor]:
    """Firings of every latent and the mean of what is replaced [d_out], over the positions that the SAE is for."""
    sae, target, count = purpose.sae, purpose.target(reader.lm).name, len(reader.order)
    firing, total = Firing(sae.d_sae), torch.zeros(sae.d_out, dtype=torch.float64)
    with progress_bar(count, "counting firings", "context", progress) as bar:
        for rows, codes in reader.coded(purpose):
            firing.add(codes)
            total += rows.x[target].sum(0, dtype=torch.float64).cpu()
            bar.update(rows.cursor - bar.n)
    if not firing.n:
        raise DataError(
            f"no position of {count:,} contexts of {reader.contexts.ids.shape[1]:,} tokens is one that the SAE is for: all "
            f"are special, among the first {purpose.skip_positions}, or above the norm limit"
        )
    return firing, total / firing.n


class _Fidelity:
    """Sums over batches of contexts; what is summed per context gives the standard errors."""

    def __init__(self, purpose: Purpose, lm: "LanguageModel", mean: Tensor, selection: str) -> None:
        self.purpose, self.sae, self.lm, self.mean = purpose, purpose.sae, lm, mean
        self.selection = selection
        self.for_sae, self.all = Reconstruction(self.sae.d_out), Reconstruction(self.sae.d_out)
        self.fired = 0
        self.per_context: dict[str, list[Tensor]] = {}

    def add(self, contexts: "Contexts", rows: slice) -> None:
        """Add some contexts."""
        clean = CleanPass(self.purpose, self.lm, contexts, rows)
        mask, ids, targets = clean.mask, clean.inputs.ids, clean.targets
        x_ND, target_ND = (x[mask].to(self.sae.W_dec) for x in (clean.x, clean.target))
        mine_N = clean.mine[mask].to(x_ND.device)
        codes = self._codes(x_ND, clean.inputs, mask, range(rows.start, rows.stop))
        x_hat_ND = self.sae.decode(codes, x_ND)
        self.all.add(target_ND, x_hat_ND)
        self.for_sae.add(target_ND[mine_N], x_hat_ND[mine_N])
        self.fired += int(codes.offsets.diff()[mine_N.to(codes.offsets.device)].sum())

        self._sum("targets", targets.sum(1))
        self._sum("positions", mask.sum(1))
        self._sum("ce_clean", context_ce(clean.logits, ids, targets))
        spliced = clean.again(x_hat_ND[mine_N], clean.mine)
        self._sum("ce_sae", context_ce(spliced, ids, targets))
        self._sum("kl", context_kl(clean.logits, spliced, mask))
        del clean.logits, spliced
        zero, everywhere = torch.zeros_like(self.mean), torch.ones_like(mask)
        ablations = {
            "ce_zero": (zero, clean.mine),
            "ce_mean": (self.mean, clean.mine),
            "ce_zero_all": (zero, everywhere),
        }
        for name, (value, where) in ablations.items():
            self._sum(name, context_ce(clean.again(value, where), ids, targets))

    def _codes(self, x_ND: Tensor, inputs: Tokens, mask: Tensor, numbers: Sequence[int]) -> Any:
        if self.selection == "plain":
            return self.sae.encode_sparse(x_ND)
        seeds = list(numbers) if self.selection == "grad_model" else None
        site = self.purpose.source(self.lm)
        slopes = run_recording(self.lm, inputs, [site], gradients=True, label_seeds=seeds)[1]
        return select_with_gradient(self.sae, x_ND, slopes[site.name][mask].to(x_ND))

    def _sum(self, name: str, values: Tensor) -> None:
        self.per_context.setdefault(name, []).append(values.double().cpu())

    def report(self, firing: Firing, split: str) -> Report:
        sums = {name: torch.cat(parts) for name, parts in self.per_context.items()}
        if not self.for_sae.n or not sums["targets"].any():
            raise DataError("no position of these contexts is one that the SAE is for, or none has a target to predict")
        source, target = self.purpose.source(self.lm).name, self.purpose.target(self.lm).name
        targets, positions = sums["targets"], sums["positions"]
        ce = {name: float(total.sum() / targets.sum()) for name, total in sums.items() if name.startswith("ce_")}
        delta, delta_se = ratio(sums["ce_sae"] - sums["ce_clean"], targets)
        kl, kl_se = ratio(sums["kl"], positions)
        return Report(
            l0=self.fired / self.for_sae.n,
            explained_variance=self.for_sae.explained_variance,
            fvu=self.for_sae.fvu,
            mse=self.for_sae.mse,
            **ce,
            ce_score=_score(ce["ce_zero"], ce),
            delta_ce=delta,
            kl=kl,
            dead_fraction=firing.silent_fraction,
            tokens=self.all.n,
            sparsity_tokens=firing.n,
            explained_variance_all=self.all.explained_variance,
            explained_variance_median=self.for_sae.explained_variance_median,
            ce_score_mean=_score(ce["ce_mean"], ce),
            ce_score_all=_score(ce["ce_zero_all"], ce),
            replaced_fraction=self.for_sae.n / self.all.n,
            delta_ce_se=delta_se,
            kl_se=kl_se,
            site=source if source == target else f"{source} to {target}",
            split=split,
            selection=self.selection,
        )


def _score(ablated: float, ce: dict[str, float]) -> float:
    scale = ablated - ce["ce_clean"]
    return (ablated - ce["ce_sae"]) / scale if scale else float("nan")


def ratio(sums: Float[Tensor, " n"], counts: Float[Tensor, " n"]) -> tuple[float, float]:
    """sum(sums) / sum(counts), and its standard error over contexts (Cochran 1977, ratio estimator); NaN for one.

    With equal counts the standard error is that of the contexts' means.

    >>> ratio(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]))
    (2.0, 1.0)
    """
    value = sums.sum() / counts.sum()
    n = len(sums)
    if n < 2:
        return float(value), float("nan")
    spread = (sums - value * counts).square().sum() * n / (n - 1)
    return float(value), float(spread.sqrt() / counts.sum())
