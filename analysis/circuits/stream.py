"""One text, frozen: every reading of the residual stream as a sum of what was written to it.

The stream before block l is the embedding, plus what the attention and the MLP of each block before l added. Where there is
an SAE of an attention layer, what the layer added is its latents' decoder rows through W_O (and a norm after attention,
frozen), the SAE's error and its biases; where there is one of the stream itself, its latents, error and bias. Any reading,
a vector at a position, is then a sum of terms, exactly.

Shapes: P positions, D width of the stream, H heads, E width of a head.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saelab.analysis.circuits import frozen
from saelab.analysis.circuits.residual_sources import of_codes, residual_block
from saelab.base import checks
from saelab.base.codes import SparseCodes
from saelab.base.errors import ConfigError, DataError
from saelab.base.protocols import Dictionary
from saelab.models.purpose import Purpose

if TYPE_CHECKING:
    from saelab.models.language import LanguageModel

ATTENTION, RESIDUAL = "attention", "residual"  # latents
EMBEDDING, MLP, ATTENTION_OUTPUT, ERROR, BIAS, REST = "embedding", "mlp", "attention output", "error", "bias", "rest"

TERM = np.dtype([("kind", "U16"), ("of", "U16"), ("block", "i8"), ("position", "i8"), ("latent", "i8"),
                 ("activation", "f8"), ("value", "f8")])  # fmt: skip


class Reading(NamedTuple):
    """A latent's activation as terms: sum of `terms["value"]` + `bias` = `total`.

    `terms` is of TERM, -1 and NaN where there is no position, latent or activation; `heads` [position] the head that moves
    most (by size) from each position to a latent of an attention layer, None of another.
    """

    terms: np.ndarray
    bias: float
    total: float
    heads: np.ndarray | None = None


class Stream:
    """A frozen pass of one text through a model, seen through SAEs of attention layers and of the stream between blocks.

    Args:
        lm: the model.
        tokens: one text; it begins as the first SAE was trained to read it (`LanguageModel.tokens_for`).
        saes: at most one for each site. Raises `ConfigError` for two of one site, or one of another kind of site.
        end: (kind, block) of the latents up to which is read; SAEs of later places are left out.
    """

    def __init__(self, lm: "LanguageModel", tokens: Any, saes: Iterable[Dictionary], end: tuple[str, int]) -> None:
        saes = list(saes)
        self.lm, self.tokens = lm, lm.tokens_for(saes[0], tokens) if saes else lm.to_tokens(tokens)
        if len(self.tokens.ids) != 1:
            raise DataError(f"a circuit is one text's, not {len(self.tokens.ids)}: call it for each")
        self.saes: dict[tuple[str, int], Any] = {}
        for sae in saes:
            place = place_of(sae, lm)
            if place in self.saes:
                raise ConfigError(f"two autoencoders of {Purpose.of(sae).reads}: give one for each site")
            self.saes[place] = sae
        self.saes = {place: sae for place, sae in self.saes.items() if order(*place) <= order(*end)}
        added = [f"blocks.{block}.hook_{part}_out" for block in range(end[1]) for part in ("attn", "mlp")]
        boundaries = {block for kind, block in self.saes if kind == RESIDUAL}
        before = [f"blocks.{block}.hook_resid_pre" for block in sorted(boundaries | {0})]
        layers = sorted(block for kind, block in self.saes if kind == ATTENTION)
        self.layers, self.sites = frozen.read(lm, self.tokens, layers, [*added, *before])
        self._check_sum([*added, "blocks.0.hook_resid_pre"], end)
        self.coded = {place: self._coded(*place) for place in self.saes}

    def _check_sum(self, written: list[str], end: tuple[str, int]) -> None:
        """`ConfigError` where the stream is another sum of its parts (a residual multiplier, a norm of the whole)."""
        x = self.layers[end[1]].x if end[0] == ATTENTION else self.read_by(*end)
        gap = (sum(self.sites[name] for name in written) - x).norm() / x.norm()
        if not float(gap) <= max(1e-3, 16 * torch.finfo(self.lm.dtype).eps):
            raise ConfigError(
                f"the stream before block {end[1]} of {self.lm.name} is not the sum of the embedding and of what attention and "
                f"MLPs gave (by {float(gap):.1%} of its norm): a circuit through it would leave something out"
            )

    def reading(self, kind: str, block: int, position: int, latent: int) -> Reading:
        """The activation of a latent (where it does not fire, what it would read) as terms."""
        sae = self.saes[kind, block]
        reader = frozen.readers(sae, frozen.check_latent(sae, latent))
        with torch.no_grad():
            if kind == RESIDUAL:
                x = self.sites[f"blocks.{block}.hook_resid_pre"][0, position]
                vector_1D = reader.weights.to(x)
                positions = torch.tensor([position], device=x.device)
                terms, bias = self._written(block, positions, vector_1D)
                return Reading(terms, bias + float(reader.bias), float(vector_1D[0] @ x + reader.bias.to(x)))
            layer = self.layers[block]
            weights_HE = reader.weights.to(layer.z).view(layer.z.shape[2:])
            pulled = frozen.pulled(layer, weights_HE, 0, position)
            positions = torch.arange(position + 1, device=layer.z.device)
            stream_PD = pulled.stream[: position + 1]
            terms, bias = self._by_sae(block, positions, stream_PD)
            bias += float(pulled.norm.sum() + pulled.value.sum() + reader.bias)
            total = float((layer.z[0, position] * weights_HE).sum() + reader.bias.to(layer.z))
            return Reading(terms, bias, total, pulled.by_head.abs().argmax(0).cpu().numpy())

    def read_by(self, kind: str, block: int) -> Float[Tensor, "1 pos width"]:
        """What the SAE there reads, [1, position, width]."""
        return self.sites[f"blocks.{block}.hook_resid_pre"] if kind == RESIDUAL else self.layers[block].z.flatten(2)

    def _coded(self, kind: str, block: int) -> frozen.Coded:
        return frozen.coded(self.lm, self.saes[kind, block], self.read_by(kind, block), self.tokens)

    def _by_sae(self, block: int, positions: Tensor, vectors_PD: Tensor) -> tuple[np.ndarray, float]:
        """Readings of the stream before a block by the SAE there, or by what was written where there is none."""
        if (RESIDUAL, block) not in self.saes:
            return self._written(block, positions, vectors_PD)
        return self._latents(RESIDUAL, block, positions, vectors_PD)

    def _latents(self, kind: str, block: int, positions: Tensor, vectors_PX: Tensor) -> tuple[np.ndarray, float]:
        """Readings of what an SAE reads, as its latents and errors, and its b_dec."""
        sae, (codes, error) = self.saes[kind, block], self.coded[kind, block]
        readings = torch.zeros_like(error).index_copy_(0, positions, vectors_PX)
        some = codes.where(torch.isin(codes.rows(), positions))
        found = [
            _terms(kind, kind, block, some.rows(), of_codes(some, sae.W_dec.to(readings), readings), some),
            _terms(ERROR, kind, block, positions, (error[positions] * vectors_PX).sum(1)),
        ]
        return np.concatenate(found), float((vectors_PX @ sae.b_dec.to(vectors_PX)).sum())

    def _written(self, block: int, positions: Tensor, vectors_PD: Tensor) -> tuple[np.ndarray, float]:
        """Readings of the stream before a block, as what was written to it: embedding, attention, MLPs."""

        def of_site(name: str) -> Tensor:
            return (self.sites[name][0, positions] * vectors_PD).sum(1)

        found, bias = [_terms(EMBEDDING, "", -1, positions, of_site("blocks.0.hook_resid_pre"))], 0.0
        for earlier in range(block):
            found.append(_terms(MLP, "", earlier, positions, of_site(f"blocks.{earlier}.hook_mlp_out")))
            if (ATTENTION, earlier) not in self.saes:
                found.append(
                    _terms(ATTENTION_OUTPUT, "", earlier, positions, of_site(f"blocks.{earlier}.hook_attn_out"))
                )
                continue
            layer, read_PD = self.layers[earlier], vectors_PD
            post = layer.parts.post_norm
            if post is not None and layer.post_sigma is not None:
                bias += float((read_PD @ post.beta).sum())
                read_PD = post.pull(read_PD) / layer.post_sigma[0, positions, None]
            read_PX = read_PD @ layer.parts.W_O.flatten(0, 1).T
            terms, constant = self._latents(ATTENTION, earlier, positions, read_PX)
            found.append(terms)
            bias += constant + float((read_PD @ layer.parts.b_O).sum())
        return np.concatenate(found), bias


def order(kind: str, block: int) -> int:
    """Later in the model is larger: the stream before a block, then its attention."""
    return 2 * block + (kind == ATTENTION)


def place_of(sae: Dictionary, lm: "LanguageModel") -> tuple[str, int]:
    """(kind of latents, block) of an SAE; `ConfigError` where it is neither of attention's hook_z nor of the stream."""
    if checks.language_model("lm", lm).site(Purpose.of(sae).reads).name.endswith("attn.hook_z"):
        return ATTENTION, frozen.attention_site(sae, lm)[0]
    return RESIDUAL, residual_block(sae, lm)


def _terms(
    kind: str, of: str, block: int, positions: Tensor, values: Tensor, codes: SparseCodes | None = None
) -> np.ndarray:
    terms = np.empty(len(values), TERM)
    terms["kind"], terms["of"], terms["block"] = kind, of, block
    terms["position"], terms["value"] = positions.cpu().numpy(), values.cpu().numpy()
    terms["latent"] = -1 if codes is None else codes.indices.cpu().numpy()
    terms["activation"] = np.nan if codes is None else codes.values.cpu().numpy()
    return terms
