"""Proxies: a guess, in terms of tokens, at what a latent fires on, and how specific and sensitive the latent is for it.

After the deep dive into one induction feature of Kissane et al. (arXiv 2406.17759): a proxy is true at some positions
of a text; a latent is *specific* when the proxy is true where it fires, *sensitive* when it fires where the proxy is
true.

Shapes: B texts, P positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.base.errors import ConfigError, DataError
from saelab.models.tokens import Tokens

if TYPE_CHECKING:
    from pandas import DataFrame

    from saelab.models.language import LanguageModel


def same_word(lm: "LanguageModel", ids: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """A number for each token, equal for tokens that differ in upper case or in one space before the word only.

    Without a tokenizer each token is a word of its own. The shape is that of `ids`.
    """
    if lm.tokenizer is None:
        return ids
    distinct, place = ids.unique(return_inverse=True)
    texts = [lm.token_text(token) for token in distinct.tolist()]
    words = [text.removeprefix(" ").lower() for text in texts]
    numbers = {word: i for i, word in enumerate(dict.fromkeys(words))}
    return torch.tensor([numbers[word] for word in words], device=ids.device)[place]


def token_induction(lm: "LanguageModel", tokens: Tokens, target: int) -> Bool[Tensor, "batch position"]:
    """Where the current token was seen before and `target` came after it: the authors' proxy of "board induction".

    Tokens match in any case, with and without a space before (their rule, but for words in capitals, which match here
    too); the token after must be `target` itself. Never at the first position, nor at padding.

    >>> import torch, transformers, saelab
    >>> config = transformers.GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2)
    >>> lm = saelab.load_model(transformers.GPT2LMHeadModel(config).eval())
    >>> tokens = lm.to_tokens(torch.tensor([[4, 7, 4, 1, 4, 7]]))
    >>> token_induction(lm, tokens, target=7).int().tolist()
    [[0, 0, 1, 0, 1, 0]]
    """
    words = same_word(lm, tokens.ids)
    found = torch.zeros_like(tokens.mask)
    for b, s in (tokens.ids[:, 1:] == target).nonzero().tolist():
        # the target stands at s + 1, after the word at s
        if tokens.mask[b, s] and tokens.mask[b, s + 1]:
            later = torch.arange(words.shape[1], device=words.device) > s
            found[b] |= later & (words[b] == words[b, s])
    return found & tokens.mask


def after_token(lm: "LanguageModel", tokens: Tokens, target: int) -> Bool[Tensor, "batch position"]:
    """Where the token before is `target`, in any case, with or without a space before it: of previous-token latents."""
    texts = torch.cat([tokens.ids, torch.full_like(tokens.ids[:, :1], target)], dim=1)
    words = same_word(lm, texts)
    found = torch.zeros_like(tokens.mask)
    found[:, 1:] = (words[:, :-2] == words[:, -1:]) & tokens.mask[:, :-1]
    return found & tokens.mask


@dataclass(frozen=True)
class Proxy:
    """A latent beside its proxy, over positions; `compare` makes it.

    `activation` [n] of the latent and `true` [n] of the proxy, at the same positions.
    """

    name: str
    activation: Tensor
    true: Tensor

    def specificity(self, above: float = 0.0) -> float:
        """Of the positions where the latent is above `above`, the share at which the proxy is true; NaN where there is
        none."""
        fires = self.activation > above
        return _share(self.true & fires, fires)

    @property
    def sensitivity(self) -> float:
        """Of the positions where the proxy is true, the share at which the latent fires; NaN where there is none."""
        return _share(self.true & (self.activation > 0), self.true)

    @property
    def base_rate(self) -> float:
        """How often the proxy is true at all: the specificity of a latent that fires anywhere."""
        return float(self.true.double().mean())

    def by_activation(self, bins: int = 100) -> "DataFrame":
        """Of `bins` equal stretches from 0 to the largest activation, where it fires: `centre`, counts with the proxy
        `true` and `false`, and `expected_true`, `expected_false` = centre times the share of all positions (the
        authors' expected value)."""
        import pandas as pd

        fires = self.activation > 0
        if not bool(fires.any()):
            raise DataError(f"{self.name} fires at none of {len(self.activation):,} positions: read more text")
        values, true = self.activation[fires].double(), self.true[fires]
        edges = torch.linspace(0, float(values.max()), bins + 1, dtype=torch.float64, device=values.device)
        place = torch.bucketize(values, edges[1:-1])
        parts = {"true": true, "false": ~true}
        counts = {name: torch.bincount(place[chosen], minlength=bins) for name, chosen in parts.items()}
        centre = (edges[1:] + edges[:-1]) / 2
        table = {"centre": centre, **counts}
        table |= {f"expected_{name}": centre * count / len(self.activation) for name, count in counts.items()}
        return pd.DataFrame({name: column.cpu().numpy() for name, column in table.items()})

    def histogram(self, bins: int = 100) -> Any:
        """Specificity: a stacked plotly histogram of the activation where the latent fires, split by the proxy."""
        return self._bars(bins, ("true", "false"), "positions")

    def expected_value(self, bins: int = 100) -> Any:
        """The same, each stretch weighed by its activation: what share of the latent's activation the proxy accounts
        for."""
        return self._bars(bins, ("expected_true", "expected_false"), "activation x probability")

    def _bars(self, bins: int, columns: Sequence[str], title: str) -> Any:
        import plotly.graph_objects as go

        table = self.by_activation(bins)
        names = dict(zip(columns, ("proxy true", "proxy false"), strict=True))
        figure = go.Figure([go.Bar(x=table.centre, y=table[column], name=name) for column, name in names.items()])
        told = f"specificity {self.specificity():.2f}, sensitivity {self.sensitivity:.2f}"
        figure.update_layout(barmode="stack", bargap=0, title=f"{self.name}: {told}")
        figure.update_layout(xaxis_title="activation", yaxis_title=title)
        return figure

    def missed(self, k: int = 20) -> Int[Tensor, " _"]:
        """The first `k` positions (in the order of the rows) where the proxy is true and the latent silent."""
        return (self.true & (self.activation <= 0)).nonzero().flatten()[:k]


def compare(
    activation: Float[Tensor, "..."],
    proxy: Bool[Tensor, "..."],
    mask: Bool[Tensor, "..."] | None = None,
    name: str = "latent",
) -> Proxy:
    """A latent's activations beside a proxy (bool); `mask` says which positions count (all by default). All of one shape.

    Raises `ConfigError` when the shapes differ.

    >>> import torch
    >>> found = compare(torch.tensor([2.0, 1.0, 0.0, 0.0]), torch.tensor([True, False, True, False]))
    >>> found.specificity(), found.sensitivity, found.base_rate
    (0.5, 0.5, 0.5)
    >>> found.specificity(above=1.5)
    1.0
    """
    if activation.shape != proxy.shape or (mask is not None and mask.shape != proxy.shape):
        shapes = f"activations are {list(activation.shape)} and the proxy {list(proxy.shape)}"
        raise ConfigError(f"{shapes}: give one of each for a position")
    chosen = torch.ones_like(proxy) if mask is None else mask
    return Proxy(name, activation.detach()[chosen], proxy[chosen])


def _share(part: Tensor, whole: Tensor) -> float:
    return float(part.sum()) / int(whole.sum()) if bool(whole.any()) else float("nan")
