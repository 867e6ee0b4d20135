"""SAEs trained on the parts of another SAE's error: is there structure left that such an SAE would find?"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.analysis.dark_matter.decomposition import Decomposition
from saelab.analysis.dark_matter.rows import LEARN, SCORE
from saelab.autoencoders.architecture import Architecture
from saelab.base.errors import ConfigError
from saelab.evaluation.reconstruction import Reconstruction
from saelab.evaluation.sparsity import Firing
from saelab.training.loop import train

PARTS = ("error", "linear", "nonlinear")


class PartRows:
    """One part of the error of the rows x of one use (`saelab.analysis.dark_matter.rows`), in chunks, as often as one likes.

    Raises `ConfigError` for an unknown part.
    """

    def __init__(self, parts: Decomposition, x: Any, part: str, use: int) -> None:
        if part not in PARTS:
            raise ConfigError(f"part is {part!r}; use one of {', '.join(PARTS)}")
        self.parts, self.x, self.part, self.use = parts, x, part, use

    def __iter__(self) -> Iterator[Float[Tensor, "n d"]]:
        for chunk in self.parts.chunks(self.x):
            if chunk.use == self.use:
                _, linear, nonlinear = self.parts.split(chunk.x)
                yield {"error": linear + nonlinear, "linear": linear, "nonlinear": nonlinear}[self.part]


def train_on_parts(
    parts: Decomposition, x: Any, sae: Architecture, tokens: int, which: tuple[str, ...] = PARTS, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """Train an SAE on each part of the error, and compare them on rows that neither they nor the map have seen.

    Of the rows that the map was not fitted on, one half trains, the other scores; a `holdout` of two thirds in `decompose`
    makes the three parts alike. `x` are the rows that were decomposed. `sae` is a configuration such as
    `TopK(k=32, d_sae=..., aux_coefficient=0.0)` (our notes of the paper: k 32, 16 times the width, no auxiliary loss).
    `options` are those of `saelab.train`; no row is left out for its norm unless `max_norm` says so, because the decomposition
    has done that already.

    Gives (table, runs by part): a pandas.DataFrame indexed by part with fvu, explained_variance, l0 and silent_fraction. A
    higher FVU of the nonlinear part says that it has less of what SAEs find.

    >>> import saelab
    >>> sae = saelab.SAE(saelab.TopK(k=2, d_sae=16), d_in=4)
    >>> x = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
    >>> from saelab.analysis.dark_matter.decomposition import decompose
    >>> table, runs = train_on_parts(decompose(sae, x), x, saelab.TopK(k=1, d_sae=8), tokens=512, batch_size=128,
    ...                              buffer_tokens=4096, progress=False)
    >>> list(table.index), runs["linear"].sae
    (['error', 'linear', 'nonlinear'], SAE(TopK(k=1, d_sae=8), d_in=4))
    """
    import pandas

    options = {"max_norm": None} | options
    table, runs = [], {}
    for part in which:
        runs[part] = train(PartRows(parts, x, part, LEARN), sae=sae, tokens=tokens, **options)
        trained = runs[part].sae
        seen, firing = Reconstruction(trained.d_in), Firing(trained.d_sae)
        with torch.no_grad():
            for rows in PartRows(parts, x, part, SCORE):
                codes = trained.encode_sparse(rows)
                firing.add(codes)
                seen.add(rows, trained.decode(codes, rows))
        table.append(
            {
                "part": part, "fvu": seen.fvu, "explained_variance": seen.explained_variance, "l0": firing.l0,
                "silent_fraction": firing.silent_fraction, "tokens_heldout": seen.n,
            }
        )  # fmt: skip
    return pandas.DataFrame(table).set_index("part"), runs
