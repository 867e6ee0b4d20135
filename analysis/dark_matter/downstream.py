"""What each part of an SAE's error costs the model: cross-entropy and KL with the part restored."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saelab.analysis.dark_matter.decomposition import Decomposition
from saelab.base.errors import ConfigError, DataError
from saelab.base.progress import progress_bar
from saelab.evaluation.fidelity import ratio
from saelab.evaluation.passes import CleanPass, context_ce, context_kl
from saelab.models.purpose import Purpose
from saelab.reading.corpus import contexts_for, load_corpus

if TYPE_CHECKING:
    from saelab.models.language import LanguageModel
    from saelab.reading.corpus import Corpus

SETTINGS = ("sae", "sae + linear", "sae + nonlinear")


def unseen_documents(parts: Decomposition, corpus: "Corpus") -> "Corpus":
    """The documents that the map of `parts` was not fitted on, as a corpus, for `downstream_cost(..., split="all")`.

    `corpus` is the one that the decomposed store was harvested from. Raises `ConfigError` where no documents were held out.

    >>> unseen_documents(dark_matter.decompose(sae, x), corpus)  # doctest: +SKIP
    """
    if parts.held_out_by != "document" or corpus.documents is None:
        raise ConfigError(
            f"rows were held out by {parts.held_out_by}: decompose an ActivationStore of several documents of text"
        )
    return load_corpus([corpus.documents[number] for number in parts.groups.tolist()])


def downstream_cost(
    parts: Decomposition,
    lm: "LanguageModel",
    corpus: "Corpus",
    *,
    tokens: int = 8_192,
    site: str | None = None,
    context_length: int | None = None,
    batch_size: int = 8,
    split: str = "heldout",
    progress: bool = True,
) -> Any:
    """Replace the activation by the reconstruction, alone and with one part of the error restored, and compare.

    The positions replaced are those of `saelab.evaluate`; others keep the model's activation. Contexts should be none that the
    map was fitted on: those of the held-out split, or of `unseen_documents`.

    Args:
        tokens: tokens that go through the model, in each setting.
        site: that of the SAE's metadata unless given.
        context_length: tokens in a context, that of the SAE's training unless given.
        batch_size: contexts a forward pass.
        split: "heldout", "train" or "all".
        progress: show a bar with the rate and the time left.

    A pandas.DataFrame indexed by setting ("clean", "sae", "sae + linear", "sae + nonlinear"): `ce`, `delta_ce` = CE - CE of the
    clean model and `kl` = KL(clean || intervened), in nats a token; `recovered` = 100 (CE_sae - CE) / (CE_sae - CE_clean);
    each with its standard error over contexts (too small where they are of few documents); and, to compare with it, the
    restored part's shares in percent: `variance_share` = 100 (FVU_sae - FVU) / FVU_sae, `norm_share` = 100 mean |part| / mean
    |error|. A part that costs what its size suggests has the three alike (arXiv 2410.14670, the downstream experiment).

    Raises `ConfigError` without a site, `SiteError` for another width, `DataError` where nothing is replaced.

    >>> downstream_cost(dark_matter.decompose(sae, x), lm, corpus, tokens=4_096)  # doctest: +SKIP
    """
    sae = parts.sae
    purpose = Purpose.of(sae, site)
    purpose.source(lm)  # a site that is none is said before the corpus is read
    contexts = contexts_for(sae, lm, corpus, split, context_length)
    count = contexts.enough(tokens)
    sums = _Sums(parts)
    with torch.no_grad(), progress_bar(count, "restoring parts", "context", progress) as bar:
        for start in range(0, count, batch_size):
            stop = min(start + batch_size, count)
            sums.add(CleanPass(purpose, lm, contexts, slice(start, stop)))
            bar.update(stop - start)
    return sums.table()


class _Sums:
    """Sums by context and setting."""

    def __init__(self, parts: Decomposition) -> None:
        self.parts = parts
        self.by_context: dict[str, list[Tensor]] = {}
        self.squares = dict.fromkeys(SETTINGS, 0.0)  # of what each setting leaves out
        self.norms = dict.fromkeys(SETTINGS, 0.0)  # of the error, and of what is restored

    def add(self, clean: CleanPass) -> None:
        x_ND = clean.x[clean.mine].to(self.parts.sae.device)
        reconstruction, linear, nonlinear = self.parts.split(x_ND) if len(x_ND) else (x_ND, x_ND, x_ND)
        error = linear + nonlinear
        values = {
            "sae": reconstruction,
            "sae + linear": reconstruction + linear,
            "sae + nonlinear": reconstruction + nonlinear,
        }
        left_out = {"sae": error, "sae + linear": nonlinear, "sae + nonlinear": linear}
        restored = {"sae": error, "sae + linear": linear, "sae + nonlinear": nonlinear}
        ids, targets = clean.inputs.ids, clean.targets
        self._sum("targets", targets.sum(1))
        self._sum("positions", clean.mask.sum(1))
        self._sum("clean ce", context_ce(clean.logits, ids, targets))
        for name in SETTINGS:
            logits = clean.again(values[name], clean.mine)
            self._sum(f"{name} ce", context_ce(logits, ids, targets))
            self._sum(f"{name} kl", context_kl(clean.logits, logits, clean.mask))
            self.squares[name] += float(left_out[name].square().sum())
            self.norms[name] += float(torch.linalg.vector_norm(restored[name], dim=1).sum())

    def _sum(self, name: str, values: Tensor) -> None:
        self.by_context.setdefault(name, []).append(values.double().cpu())

    def table(self) -> Any:
        import pandas

        sums = {name: torch.cat(found) for name, found in self.by_context.items()}
        if not self.norms["sae"] or not float(sums["targets"].sum()):
            raise DataError("no position of these contexts is one that the SAE is for, or none has a target to predict")
        targets, clean = sums["targets"], sums["clean ce"]
        rows = [{"setting": "clean", "ce": float(clean.sum() / targets.sum()), "delta_ce": 0.0, "kl": 0.0}]
        for name in SETTINGS:
            ce = sums[f"{name} ce"]
            delta, delta_se = ratio(ce - clean, targets)
            recovered, recovered_se = ratio(sums["sae ce"] - ce, sums["sae ce"] - clean)
            kl, kl_se = ratio(sums[f"{name} kl"], sums["positions"])
            row = {
                "setting": name, "ce": float(ce.sum() / targets.sum()), "delta_ce": delta, "delta_ce_se": delta_se, "kl": kl,
                "kl_se": kl_se, "recovered": 100 * recovered, "recovered_se": 100 * recovered_se,
                "variance_share": 100 * (1 - self.squares[name] / self.squares["sae"]),
                "norm_share": 100 * self.norms[name] / self.norms["sae"] if name != "sae" else 0.0,
            }  # fmt: skip
            rows.append(row)
        return pandas.DataFrame(rows).set_index("setting")
