"""Indirect object identification: which latents at the second subject matter, and what attention moves from there.

After Kissane et al. (arXiv 2406.17759, the IOI section): single latents of an attention-output SAE are ablated where the
subject comes a second time (S2), and attention output there is noised by that of other prompts. Shapes: N prompts, D
width of a site.

>>> import saelab
>>> from saelab.analysis.attention import ioi
>>> lm = saelab.load_model("smollm2-135m")  # doctest: +SKIP
>>> some = ioi.prompts(lm, n=40)  # doctest: +SKIP
>>> ioi.task(lm, some)  # doctest: +SKIP
Task(smollm2-135m does it: logit difference 3.80 +- 0.32, 40 of 40 prompts)
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.analysis.attention.ioi_prompts import Prompts, prompts
from saelab.analysis.circuits import frozen
from saelab.base.errors import ConfigError, DataError
from saelab.base.progress import progress_bar
from saelab.base.protocols import Dictionary
from saelab.models.purpose import Purpose, fitting
from saelab.models.sites import Site
from saelab.models.where import Where

if TYPE_CHECKING:
    from pandas import DataFrame

    from saelab.models.language import LanguageModel

__all__ = ["Prompts", "Task", "ablate_latents", "by_latent", "noising", "prompts", "task", "zero_by_block"]

BATCH = 16
ENOUGH = 0.75  # of the prompts: our choice


@dataclass(frozen=True)
class Task:
    """How well a model does the task: `logit_difference` [N] is logit(indirect object) - logit(subject) at the end.

    `.does_it` when the mean difference is above 0 and at least three quarters of the prompts are right (our choice).
    """

    model: str
    logit_difference: Tensor

    @property
    def mean(self) -> float:
        return float(self.logit_difference.mean())

    @property
    def standard_error(self) -> float:
        """Of the mean, over prompts; NaN for one prompt."""
        return _error(self.logit_difference)

    @property
    def correct(self) -> int:
        """Prompts on which the indirect object is likelier than the subject."""
        return int((self.logit_difference > 0).sum())

    @property
    def accuracy(self) -> float:
        return self.correct / len(self.logit_difference)

    @property
    def does_it(self) -> bool:
        return self.mean > 0 and self.accuracy >= ENOUGH

    def __repr__(self) -> str:
        return (
            f"Task({self.model} {'does it' if self.does_it else 'does not do it'}: logit difference {self.mean:.2f} +- "
            f"{self.standard_error:.2f}, {self.correct} of {len(self.logit_difference)} prompts)"
        )


def task(lm: "LanguageModel", prompts: Prompts) -> Task:
    """The model's logit differences on the prompts. Never an error where a model fails the task: see `Task.does_it`."""
    return Task(lm.name, torch.cat([logit_difference(lm, part) for part in prompts.batches(BATCH)]))


def logit_difference(lm: "LanguageModel", prompts: Prompts) -> Float[Tensor, " n"]:
    """logit(indirect object) - logit(subject) at each prompt's end, [N] on the CPU."""
    rows = torch.arange(len(prompts))
    at_end = lm.logits(prompts.tokens)[rows, prompts.end].cpu()
    return at_end[rows, prompts.indirect] - at_end[rows, prompts.subject]


def zero_by_block(lm: "LanguageModel", prompts: Prompts, *, must_work: bool = True) -> "DataFrame":
    """The logit difference with one block's attention output set to zero at S2, block by block.

    Where attention at S2 matters in a model that is new to you: candidates for `noising`. A pandas.DataFrame indexed by
    block: `logit_difference`, `change` from the clean one and its standard error. `must_work` is that of `noising`.
    """
    import pandas as pd

    clean = _checked(lm, prompts, must_work).logit_difference
    rows = []
    for block in range(lm.n_layers):
        zero = _replaced(lm, prompts, _zeros(lm, prompts, [_output_site(block)]))
        rows.append((block, float(zero.mean()), float((zero - clean).mean()), _error(zero - clean)))
    return pd.DataFrame(rows, columns=["block", "logit_difference", "change", "standard_error"]).set_index("block")


def noising(
    lm: "LanguageModel", prompts: Prompts, blocks: Sequence[int], *, seed: int = 0, must_work: bool = True
) -> "DataFrame":
    """Attention output of `blocks` at S2, replaced by that of other prompts at their S2: what of the task survives?

    "other names" has other names, a sentence before and a phrase in the middle, but the names still joined by " and";
    "alongside" is the same prompt with " alongside" there. Both against "zero" (the attention output of these blocks at S2 set
    to zero) and "zero everywhere" (at all positions, as in our notes of the authors' code).

    A pandas.DataFrame indexed by setting ("clean" first): `logit_difference` and its `standard_error` over prompts,
    `accuracy`, `ratio` = LD / LD_clean, and `normalised` = (LD - LD_zero) / (LD_clean - LD_zero), NaN where zeroing
    changes nothing; `normalised_everywhere` takes "zero everywhere" for LD_zero.

    Raises `ConfigError` for a block that the model does not have; `DataError`, with the numbers, where the model does not
    do the task, unless `must_work=False`.
    """
    import pandas as pd

    if not blocks or not all(0 <= block < lm.n_layers for block in blocks):
        raise ConfigError(f"blocks={list(blocks)}: give some of 0 to {lm.n_layers - 1}")
    found = {"clean": _checked(lm, prompts, must_work).logit_difference}
    sites = [_output_site(block) for block in blocks]
    controls = {"other names": prompts.with_other_names(lm, seed), "alongside": prompts.alongside(lm)}
    for name, others in controls.items():
        found[name] = _replaced(lm, prompts, _outputs_at_s2(lm, others, sites))
    zeros = _zeros(lm, prompts, sites)
    found["zero"] = _replaced(lm, prompts, zeros)
    found["zero everywhere"] = _replaced(lm, prompts, zeros, everywhere=True)
    means = {name: float(values.mean()) for name, values in found.items()}
    rows = {
        name: {
            "logit_difference": means[name],
            "standard_error": _error(values),
            "accuracy": float((values > 0).double().mean()),
            "ratio": _ratio(means[name], means["clean"]),
            "normalised": _ratio(means[name] - means["zero"], means["clean"] - means["zero"]),
            "normalised_everywhere": _ratio(
                means[name] - means["zero everywhere"], means["clean"] - means["zero everywhere"]
            ),
        }
        for name, values in found.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("setting")


def ablate_latents(
    lm: "LanguageModel",
    sae: Dictionary,
    prompts: Prompts,
    *,
    site: str | None = None,
    must_work: bool = True,
    progress: bool = True,
) -> "DataFrame":
    """Take out, one at a time, every latent that is live at S2, and the SAE's error there: the change of the logit
    difference.

    x becomes x - f_i d_i at S2, what `lm.splice(sae, error_term=True, edit=...)` makes of it when the edit drops the
    latent; SAEs spliced elsewhere with their error terms and no edit would change nothing, so none are needed. The error
    x - sae(x) is taken out alike. Prompts at whose S2 the SAE is not for the activation (its norm limit) have no rows.

    A long pandas.DataFrame: prompt, part ("latent" or "error"), latent (<NA> for the error), activation (the norm of the
    error for the error), logit_difference, change. `by_latent` sums it up.

    Raises `ConfigError` without a site, `SiteError` for another width, and `DataError` as `noising` does.
    """
    import pandas as pd

    place = fitting(Purpose.of(sae, site).source(lm), sae.d_out, "output")
    clean = _checked(lm, prompts, must_work).logit_difference
    variants, changes = _variants(lm, sae, prompts, place)
    found = []
    with progress_bar(len(variants), "ablating", "run", progress) as bar:
        for start in range(0, len(variants), BATCH):
            numbers = torch.tensor([variant[0] for variant in variants[start : start + BATCH]])
            part, change = prompts[numbers], changes[start : start + BATCH]
            with lm.intervene(place, _add_at_s2(part, change)):
                found.append(logit_difference(lm, part))
            bar.update(len(part))
    table = pd.DataFrame(variants, columns=["prompt", "part", "latent", "activation"]).astype({"latent": "Int64"})
    table["logit_difference"] = torch.cat(found).double().numpy() if found else []
    table["change"] = table.logit_difference - clean.double().numpy()[table.prompt.to_numpy(dtype="int64")]
    return table


def by_latent(table: "DataFrame", n: int) -> "DataFrame":
    """`ablate_latents` summed up, the strongest on these prompts first (on others expect less of it): part, latent, on how
    many of the `n` prompts it was live, mean activation there, `change` (mean over the prompts where live) and `total` = sum
    of changes / n, its share of the average prompt's."""
    grouped = table.groupby(["part", "latent"], dropna=False)
    found = grouped.agg(live=("prompt", "nunique"), activation=("activation", "mean"), change=("change", "mean"))
    found["total"] = grouped["change"].sum() / n
    return found.reset_index().sort_values("total", key=abs, ascending=False, ignore_index=True)


def _variants(
    lm: "LanguageModel", sae: Dictionary, prompts: Prompts, place: Site
) -> tuple[list[tuple[Any, ...]], Tensor]:
    """(prompt, part, latent, activation) of everything that is taken out, and what is added at S2 to do so [n, D]."""
    frozen.refuse_normalised(sae)
    variants: list[tuple[Any, ...]] = []
    changes: list[Tensor] = []
    number = 0
    for part in prompts.batches(BATCH):
        x_ND, for_sae = _at_s2(lm, sae, part, place)
        with torch.no_grad():
            codes = sae.encode_sparse(x_ND)
            error_ND = x_ND - sae.decode(codes)
        for row in for_sae.nonzero().flatten().tolist():
            values, latents = codes.row(row)
            changes += [-values[:, None] * sae.W_dec.detach()[latents], -error_ND[row : row + 1]]
            variants += [
                (number + row, "latent", *pair) for pair in zip(latents.tolist(), values.tolist(), strict=True)
            ]
            variants.append((number + row, "error", None, float(error_ND[row].norm())))
        number += len(part)
    return variants, torch.cat(changes) if changes else sae.W_dec.new_zeros(0, sae.d_in)


def _at_s2(lm: "LanguageModel", sae: Dictionary, prompts: Prompts, place: Site) -> tuple[Tensor, Tensor]:
    """The site's activation at S2 [N, D], and for which prompts the SAE is for it [N]."""
    found: list[tuple[Tensor, Tensor]] = []
    rows, s2 = torch.arange(len(prompts)), prompts.s2

    def look(x: Tensor, where: Where) -> Tensor:
        found.append((x[rows, s2].to(sae.W_dec), Purpose.of(sae).positions(lm, x, where)[rows, s2]))
        return x

    with lm.intervene(place, look):
        lm.record(prompts.tokens, place)
    return found[0]


def _replaced(lm: "LanguageModel", prompts: Prompts, values: dict[str, Tensor], *, everywhere: bool = False) -> Tensor:
    """Logit differences [N] with `values[site]` [N, D] in place of the activation, at S2 or at all positions."""
    found, start = [], 0
    for part in prompts.batches(BATCH):
        with contextlib.ExitStack() as hooks:
            for site, value_ND in values.items():
                mine = value_ND[start : start + len(part)]
                hooks.enter_context(lm.intervene(site, _everywhere(mine) if everywhere else _put_at_s2(part, mine)))
            found.append(logit_difference(lm, part))
        start += len(part)
    return torch.cat(found)


def _outputs_at_s2(lm: "LanguageModel", prompts: Prompts, sites: Sequence[str]) -> dict[str, Tensor]:
    """Attention output at each prompt's S2, {site: [N, D]}."""
    parts = [
        {site: x[torch.arange(len(part)), part.s2] for site, x in lm.record(part.tokens, sites).items()}
        for part in prompts.batches(BATCH)
    ]
    return {site: torch.cat([part[site] for part in parts]) for site in sites}


def _zeros(lm: "LanguageModel", prompts: Prompts, sites: Sequence[str]) -> dict[str, Tensor]:
    return {site: torch.zeros(len(prompts), lm.site(site).width, device=lm.device) for site in sites}


def _output_site(block: int) -> str:
    return f"blocks.{block}.hook_attn_out"


def _put_at_s2(prompts: Prompts, value_ND: Tensor) -> Callable[[Tensor, Where], Tensor]:
    def put(x: Tensor, where: Where) -> Tensor:
        changed = x.clone()
        changed[torch.arange(len(prompts)), prompts.s2] = value_ND.to(x)
        return changed

    return put


def _everywhere(value_ND: Tensor) -> Callable[[Tensor, Where], Tensor]:
    return lambda x, where: value_ND.to(x)[:, None].expand_as(x)


def _add_at_s2(prompts: Prompts, change_ND: Tensor) -> Callable[[Tensor, Where], Tensor]:
    def add(x: Tensor, where: Where) -> Tensor:
        changed = x.clone()
        changed[torch.arange(len(prompts)), prompts.s2] += change_ND.to(x)
        return changed

    return add


def _checked(lm: "LanguageModel", prompts: Prompts, must_work: bool) -> Task:
    found = task(lm, prompts)
    if must_work and not found.does_it:
        raise DataError(
            f"{found}: there is no behaviour to take apart, and what ablations would move is noise. Use a model that does the "
            "task, or must_work=False to run the experiment all the same"
        )
    return found


def _error(values: Tensor) -> float:
    return float(values.double().std() / len(values) ** 0.5) if len(values) > 1 else float("nan")


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
