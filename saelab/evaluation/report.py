"""What an evaluation found, as a table."""

import html
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from saelab.evaluation.sparsity import ENOUGH

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True, repr=False)
class Report:
    """The figures of `saelab.evaluate`; each field is a column of `to_pandas()`.

    "Replaced" positions are those that the SAE is for: real tokens (neither padding nor special), past the skipped
    positions of their context, with a norm within the limit of the training.

    >>> report = saelab.evaluate(sae, lm, corpus, tokens=8_192)  # doctest: +SKIP
    >>> report.ce_score, report.to_pandas().columns  # doctest: +SKIP
    """

    l0: float
    """mean number of latents that fire on a replaced position"""
    explained_variance: float
    """1 - sum ||x - x_hat||^2 / sum ||x - mean||^2 over replaced positions"""
    fvu: float
    """1 - explained_variance"""
    mse: float
    """mean squared error over replaced positions and dimensions"""
    ce_clean: float
    """next-token cross-entropy of the plain model, nats a real target"""
    ce_sae: float
    """the same with replaced positions reconstructed"""
    ce_zero: float
    """the same with exactly those positions set to zero"""
    ce_score: float
    """(ce_zero - ce_sae) / (ce_zero - ce_clean)"""
    delta_ce: float
    """ce_sae - ce_clean"""
    kl: float
    """KL(clean || spliced) of the next-token distribution, nats a real position"""
    dead_fraction: float
    """share of latents that fired on no replaced position of `sparsity_tokens`"""
    tokens: int
    """real tokens read for everything but dead_fraction"""
    sparsity_tokens: int
    """replaced positions read for dead_fraction"""
    explained_variance_all: float
    """explained variance over all real tokens, skipped and high-norm ones too"""
    explained_variance_median: float
    """median over dimensions, at replaced positions"""
    ce_mean: float
    """cross-entropy with replaced positions set to their mean over the sparsity pass"""
    ce_score_mean: float
    """(ce_mean - ce_sae) / (ce_mean - ce_clean)"""
    ce_zero_all: float
    """cross-entropy with every position set to zero, the first of a context and special ones too, as the field has it"""
    ce_score_all: float
    """(ce_zero_all - ce_sae) / (ce_zero_all - ce_clean): to be held beside the scores of SAELens, SAEBench and Gao et al."""
    replaced_fraction: float
    """replaced positions among the real tokens"""
    delta_ce_se: float
    """standard error of delta_ce over contexts: too small where they are of few documents, whose contexts are alike"""
    kl_se: float
    """standard error of kl over contexts, likewise"""
    site: str
    """where the SAE was put"""
    split: str
    """the split of the corpus that was read"""
    selection: str = "plain"
    """how the latents were chosen: "plain", or with gradients: a diagnostic of a `GradientTopK`"""

    def to_pandas(self) -> "DataFrame":
        """One row, a column a field."""
        from pandas import DataFrame

        return DataFrame([asdict(self)])

    def _lines(self) -> list[tuple[str, str]]:
        silent = "dead" if self.sparsity_tokens >= ENOUGH else "silent"
        few = "" if silent == "dead" else f", too few to call them dead ({ENOUGH:,})"
        return [
            ("l0", f"{self.l0:.2f}"),
            (
                "explained variance",
                f"{self.explained_variance:.4f} (all tokens {self.explained_variance_all:.4f}, median over dimensions "
                f"{self.explained_variance_median:.4f})",
            ),
            ("fvu, mse", f"{self.fvu:.4f}, {self.mse:.4g}"),
            ("delta ce", f"{self.delta_ce:.4f} ± {self.delta_ce_se:.4f} nats a token"),
            ("kl", f"{self.kl:.4f} ± {self.kl_se:.4f} nats a token"),
            (
                "cross-entropy",
                f"clean {self.ce_clean:.4f}, sae {self.ce_sae:.4f}, zero {self.ce_zero:.4f}, mean {self.ce_mean:.4f}, zero at "
                f"every position {self.ce_zero_all:.4f}",
            ),
            (
                "ce score",
                f"{self.ce_score:.4f} against zero, {self.ce_score_mean:.4f} against the mean, {self.ce_score_all:.4f} "
                "against zero at every position",
            ),
            (f"{silent} latents", f"{self.dead_fraction:.2%}, none in {self.sparsity_tokens:,} tokens{few}"),
            *(
                []
                if self.selection == "plain"
                else [("selection", f"{self.selection}, a diagnostic: not how it is used")]
            ),
            ("replaced", f"{self.replaced_fraction:.2%} of {self.tokens:,} tokens ({self.split})"),
        ]

    def __repr__(self) -> str:
        lines = [f"  {name:<20}{value}" for name, value in self._lines()]
        return "\n".join([f"Report at {self.site}", *lines])

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in self._lines())
        return f"<table><caption>{html.escape(self.site)}</caption>{rows}</table>"
