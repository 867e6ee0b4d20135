"""What every reader ends in: the tensors of another project's SAE, folded into one of saelab's.

Ours takes b_dec from its input, a transcoder of ours does not; its codes, biases and thresholds are for the raw activation.
Whatever a project does otherwise is folded into the weights here, exactly.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.autoencoders.architecture import Architecture, State
from saelab.autoencoders.architectures.jumprelu import JumpReLU
from saelab.autoencoders.architectures.mutual_choice import MutualChoice
from saelab.autoencoders.architectures.transcoder import Transcoder
from saelab.autoencoders.sae import SAE
from saelab.autoencoders.serialization import unfilled
from saelab.base.errors import FormatError
from saelab.base.manifests import METADATA, check

CROSS_LAYER = "is a part of a cross-layer transcoder, whose latents write to several layers: saelab has no such"
_CENTRED = re.compile("gpt2|gpt-neo|gpt-j|pythia|opt-|distilgpt2")  # families whose norms take the mean away


@dataclass
class Parts:
    """Weights as a file has them, latents first and owned (they are changed in place).

    `centres` says whether the encoder reads x - b_dec, rather than x. `threshold` is of each latent or one for all: a latent
    fires above it, and above 0.
    """

    W_enc: Tensor  # [d_sae, d_in]
    b_enc: Tensor  # [d_sae]; of a gated SAE that of its gate
    W_dec: Tensor  # [d_sae, d_out]
    b_dec: Tensor  # [d_out]
    centres: bool
    threshold: Tensor | None = None  # [d_sae] or []
    W_skip: Tensor | None = None  # [d_out, d_in]
    r_mag: Tensor | None = None  # [d_sae], as is b_mag
    b_mag: Tensor | None = None

    def scale_input(self, s: float) -> None:
        """Of an SAE of s x make one of x, with the same codes."""
        self.W_enc *= s
        self.W_dec /= s
        self.b_dec /= s

    def scale_codes(self, s: float) -> None:
        """Multiply the codes by s: the same reconstruction, and other units."""
        for tensor in (self.W_enc, self.b_enc, self.threshold, self.b_mag):
            if tensor is not None:
                tensor *= s
        self.W_dec /= s

    def unit_rows(self) -> None:
        """Bring decoder rows to length 1 and multiply the codes by what it was; thresholds stay for those codes."""
        lengths = torch.linalg.vector_norm(self.W_dec, dim=1).clamp_min(1e-30)
        self.W_dec /= lengths[:, None]
        self.W_enc *= lengths[:, None]
        self.b_enc *= lengths
        if self.b_mag is not None:
            self.b_mag *= lengths

    def whiten(
        self, mean: Float[Tensor, " d"], matrix: Float[Tensor, "d d"], inverse_matrix: Float[Tensor, "d d"]
    ) -> None:
        """Of an SAE of (x - mean) matrix make one of x, with the same codes."""
        self.W_enc = self.W_enc @ matrix.T
        if not self.centres:
            self._shift(-self.W_enc @ mean)
        self.W_dec = self.W_dec @ inverse_matrix
        self.b_dec = self.b_dec @ inverse_matrix + mean

    def centre_input(self) -> None:
        """Read x - mean(x) instead of x, with the same codes where that mean is 0 already."""
        if self.centres:  # (x - mean(x) - b_dec) W is (x - b_dec)(W - mean W) - mean(b_dec) sum W
            self._shift(-self.b_dec.mean() * self.W_enc.sum(1))
        self.W_enc -= self.W_enc.mean(1, keepdim=True)

    def subtract_b_dec(self, wanted: bool) -> None:
        """Let the encoder read x - b_dec, or x itself, with the same codes."""
        if self.centres != wanted:
            self._shift((self.W_enc @ self.b_dec) * (1 if wanted else -1))
            self.centres = wanted

    def _shift(self, by: Tensor) -> None:
        """Add to what the encoder's product is, before gain and biases."""
        self.b_enc += by
        if self.b_mag is not None and self.r_mag is not None:
            self.b_mag += self.r_mag.exp() * by


def assembled(cfg: Architecture, parts: Parts, metadata: dict[str, Any], where: Path | str) -> SAE:
    """The SAE with these weights; a transcoder where `metadata` has a `target_site` or there is a skip connection.

    A site that a model with centred writing weights has (`metadata["centred"]`) is centred in the encoder: the codes are then
    the same on a model that was loaded without. Raises `FormatError` where widths differ and no target is known.
    """
    metadata = {name: value for name, value in metadata.items() if value is not None} | {"source": str(where)}
    check(metadata, METADATA, f"what {where} says of itself")
    d_in, d_out = parts.W_enc.shape[1], parts.W_dec.shape[1]
    if parts.W_skip is not None:
        metadata.setdefault("target_site", metadata.get("site"))
    if "target_site" in metadata or parts.W_skip is not None:
        cfg = Transcoder(of=cfg, skip=parts.W_skip is not None)
    elif d_in != d_out:
        raise FormatError(
            f"{where} turns vectors of width {d_in:,} into {d_out:,}: a transcoder. Give target_site=, what it predicts"
        )
    if metadata.pop("centred", False) and _CENTRED.search(str(metadata.get("model", "")).lower()):
        if cfg.input_scale == "token_norm":
            raise FormatError(
                f"{where} reads centred vectors divided by their own length, and those of a model that is not centred have "
                "another: which is no map of ours"
            )
        parts.centre_input()
        metadata["model_processing"] = "centred writing weights; folded into the encoder"
    parts.subtract_b_dec(cfg.centres_input)
    return _filled(cfg, parts, metadata)


def _filled(cfg: Architecture, parts: Parts, metadata: dict[str, Any]) -> SAE:
    d_sae, d_in, d_out = *parts.W_enc.shape, parts.W_dec.shape[1]
    state = State(d_sae, cfg.buffers())
    extra = cfg.extra_parameters(d_in, d_out)
    rule = cfg.of if isinstance(cfg, Transcoder) else cfg
    if isinstance(rule, JumpReLU) and parts.threshold is not None:
        state.threshold.copy_(parts.threshold)
        extra["log_threshold"] = state.threshold.clamp(min=1e-30).log()
    if isinstance(rule, MutualChoice) and parts.threshold is not None:
        state.cut_sum.copy_(parts.threshold)
        state.cut_weight.fill_(1)
    given = {"W_skip": parts.W_skip, "r_mag": parts.r_mag, "b_mag": parts.b_mag}
    extra |= {name: value for name, value in given.items() if value is not None}
    tensors = {
        "encoder_weight": parts.W_enc, "encoder_bias": parts.b_enc, "W_dec": parts.W_dec, "decoder_bias": parts.b_dec,
        **{f"extra.{name}": value for name, value in extra.items()},
        **{f"state.{name}": value for name, value in state.state_dict().items()},
    }  # fmt: skip
    sae = unfilled(cfg, d_in, d_out, torch.float32)
    sae.load_state_dict(tensors, assign=True)
    sae.metadata = metadata
    return sae.requires_grad_(False)
