"""SAE: one module for training and for inference. Shapes: N tokens, D inputs, F latents."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

import saelab.autoencoders.registry  # noqa: F401  (every architecture there is)
from saelab.autoencoders import token_norm
from saelab.autoencoders.architecture import Architecture, Batch, Params, State
from saelab.base import checks
from saelab.base.codes import SparseCodes, check_finite, refuse_dense
from saelab.base.errors import ConfigError
from saelab.base.files import user_path
from saelab.base.lazy import provided
from saelab.base.protocols import Dashboard
from saelab.base.surroundings import torch_defaults
from saelab.kernels import mixed, sparse


class LatentStats(NamedTuple):
    """Figures of each latent [d_sae] over the tokens that it was trained on, in raw units.

    `max` and `mean` are of its activation (the mean over the tokens on which it fires), `density` is the share of
    tokens on which it fires, `std` the standard deviation of the activation vector along its decoder direction.
    """

    max: Float[Tensor, " d_sae"]
    mean: Float[Tensor, " d_sae"]
    density: Float[Tensor, " d_sae"]
    std: Float[Tensor, " d_sae"]


class _Extra(nn.ParameterDict):
    """Parameters of which the vectors (thresholds, gains) keep their precision: bf16 could not hold their small steps."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Extra":
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device) if tensor.ndim < 2 else fn(tensor), recurse)


class SAE(nn.Module):
    """A sparse autoencoder of vectors of width `d_in` with `cfg.d_sae` latents, or a transcoder to width `d_out`.

    `sae(x)` reconstructs, `encode` gives dense codes [..., d_sae], `encode_sparse` the same as `SparseCodes`, `decode`
    takes either. Codes, biases and reconstructions are always in the units of the raw activation, whatever scale
    training used. `metadata` says what the SAE was made from.

    A new one is a module to be optimised, as any other of PyTorch. What `train` gives and `load` reads is frozen
    (`requires_grad` is False): `encode(x).numpy()` works, gradients go to x and to nothing else, and
    `sae.requires_grad_(True)` makes it trainable again.

    Args:
        cfg: the architecture, such as `saelab.TopK(k=32, d_sae=4096)`.
        d_in: width of the input.
        d_out: width of the output, of a transcoder; None is `d_in`.
        metadata: model, site and so on, for what is spliced or saved.
        seed: of the initialisation: decoder rows uniform on the sphere, encoder tied to them (of a transcoder: rows of its
            own, drawn alike), biases zero.

    Raises `ConfigError` when `d_out` is another width and the architecture is no transcoder.

    >>> import torch, saelab
    >>> sae = SAE(saelab.TopK(k=2, d_sae=8), d_in=4)
    >>> x = torch.randn(3, 4)
    >>> sae.encode(x).shape, sae(x).shape
    (torch.Size([3, 8]), torch.Size([3, 4]))
    >>> sae
    SAE(TopK(k=2, d_sae=8), d_in=4, untrained)
    """

    @torch_defaults(allows_meta=True)
    def __init__(
        self,
        cfg: Architecture,
        d_in: int,
        metadata: dict[str, Any] | None = None,
        seed: int = 0,
        d_out: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(cfg, Architecture):
            raise ConfigError(
                f"the architecture is {cfg!r}: give a configuration, such as saelab.TopK(k=32, d_sae=4096)"
            )
        d_in, d_out = checks.count("d_in", d_in), checks.maybe(checks.count, "d_out", d_out)
        self.cfg, self.d_in, self.d_out, self.d_sae = cfg, d_in, d_out or d_in, cfg.d_sae
        if cfg.centres_input and self.d_out != d_in:
            raise ConfigError(
                f"the input has width {d_in:,} and the target {self.d_out:,}: an autoencoder needs them equal, use "
                f"Transcoder(of={cfg!r})"
            )
        self.metadata = dict(metadata or {})
        self.path: Path | None = None  # the folder it was last saved to or loaded from
        generator = torch.Generator().manual_seed(seed)
        W_dec = _unit_rows(self.d_sae, self.d_out, generator)
        W_enc = W_dec.clone() if cfg.centres_input else _unit_rows(self.d_sae, d_in, generator)
        self.W_dec = nn.Parameter(W_dec)
        self.encoder_weight = nn.Parameter(W_enc)  # [d_sae, d_in]: a latent's encoder is contiguous
        self.encoder_bias = nn.Parameter(torch.zeros(self.d_sae))  # the biases are in units of target * target_scale
        self.decoder_bias = nn.Parameter(torch.zeros(self.d_out))
        self.extra = _Extra(cfg.extra_parameters(d_in, self.d_out))
        self.state = State(self.d_sae, cfg.buffers())

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:
        """A latent's encoder is a column."""
        return self.encoder_weight.T if self.cfg.centres_input else self.encoder_weight.T * self._gain

    @property
    def b_enc(self) -> Float[Tensor, " d_sae"]:
        """In raw units."""
        return self.encoder_bias / self.state.target_scale

    @property
    def b_dec(self) -> Float[Tensor, " d_out"]:
        """In raw units."""
        return self.decoder_bias / self.state.target_scale

    @property
    def W_skip(self) -> Float[Tensor, "d_out d_in"] | None:
        """What a transcoder adds of its input to its output; None where there is no such connection."""
        return self.extra["W_skip"] * self._gain if "W_skip" in self.extra else None

    @property
    def _gain(self) -> Tensor:
        """From weights between the scaled spaces to weights between the raw ones."""
        return self.state.scale / self.state.target_scale

    @property
    def device(self) -> torch.device:
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        return self.W_dec.dtype

    def params(self) -> Params:
        """The weights as the architecture sees them; of half precision, the vectors in fp32, in which it computes."""
        low = self.dtype in (torch.bfloat16, torch.float16)
        b_enc, b_dec = (b.float() if low else b for b in (self.encoder_bias, self.decoder_bias))
        extra, centres = dict(self.extra.items()), self.cfg.centres_input
        return Params(self.encoder_weight, b_enc, self.W_dec, b_dec, extra, centres=centres)

    def encode_sparse(self, x: Float[Tensor, "*rows d"]) -> SparseCodes:
        """The codes of x [..., d_in], its leading dimensions flattened to rows.

        Raises `ConfigError` when the width is not `d_in`, `DataError` when a row holds NaN or infinity.
        """
        params = self.params()
        rows = self._rows(x).to(params.b_enc.dtype)
        scaled = self.scaled(rows)
        codes = self.cfg.select(self.cfg.scores(params, Batch(scaled, scaled)), self.state)
        return codes.with_values(codes.values / self.state.target_scale).compact()

    def scaled(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """x [..., d_in] as the encoder sees it: times the scale of training, or normalised vector by vector."""
        return token_norm.normalised(x, self.cfg.input_scale) if self.cfg.per_token else x * self.state.scale

    def encode(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d_sae"]:
        """The dense codes [..., d_sae]. Raises `ConfigError`, with the number of bytes, where they would not fit."""
        refuse_dense(_tensor(x).numel() // self.d_in, self.d_sae, 4)
        return self.encode_sparse(x).to_dense().view(*x.shape[:-1], self.d_sae)

    def decode(
        self, codes: Float[Tensor, "*rows d_sae"] | SparseCodes, x: Float[Tensor, "*rows d"] | None = None
    ) -> Float[Tensor, "*rows d_out"]:
        """The reconstruction [..., d_out] of dense codes [..., d_sae] or of `SparseCodes`.

        A skip connection adds its share where the inputs x [..., d_in] are given too. An autoencoder of vectors normalised one
        by one (`input_scale` "layer_norm" or "token_norm") needs them: `ConfigError` without. Others have no use for them.
        """
        params = self.params()
        if isinstance(codes, SparseCodes):
            decoded = sparse.decode(codes, params.W_dec) + self.b_dec
        elif _tensor(codes).shape[-1] != self.d_sae:
            raise ConfigError(f"codes have {codes.shape[-1]:,} latents and the SAE has {self.d_sae:,}")
        else:
            decoded = mixed.combine(codes.to(params.b_dec.dtype), params.W_dec) + self.b_dec
        if self.cfg.per_token and self.cfg.centres_input:
            if x is None:
                raise ConfigError(
                    f"{self!r} reads each vector normalised by itself, and its output is scaled back by that: give "
                    "decode(codes, x)"
                )
            return token_norm.restored(decoded, x.to(decoded.dtype).view(decoded.shape), self.cfg.input_scale)
        if x is None or self.W_skip is None:
            return decoded
        return decoded + (x.to(decoded.dtype) @ self.W_skip.to(decoded.dtype).T).view(decoded.shape)

    def forward(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d_out"]:
        """The reconstruction of x [..., d_in]: [..., d_out], in the dtype of x."""
        return self.decode(self.encode_sparse(x), x.reshape(-1, self.d_in)).view(*x.shape[:-1], self.d_out).to(x.dtype)

    def replaceable(self, x: Float[Tensor, "*rows d"]) -> Bool[Tensor, "*rows"]:
        """Which vectors [...] the SAE is for: those whose norm is within the limit that it was trained with."""
        return torch.linalg.vector_norm(x.float(), dim=-1) <= self.state.norm_limit.to(x.device)

    @property
    def latent_stats(self) -> LatentStats:
        """Maximum, mean, density and standard deviation of each latent, tracked over the end of training.

        Raises `ConfigError` for an SAE that was not trained here and has none.
        """
        state = self.state
        if not int(state.stat_tokens):
            raise ConfigError(
                "this SAE has no activation statistics: it was not trained by saelab, or not to the end; saelab.calibrate "
                "measures them"
            )
        fires = state.fires.clamp(min=1)
        return LatentStats(
            max=state.act_max / state.target_scale,
            mean=(state.act_sum / fires).float() / state.target_scale,
            density=(state.fires / state.stat_tokens).float(),
            std=state.direction_std / state.target_scale,
        )

    def save(self, path: str | os.PathLike[str], format: str | None = None) -> None:
        """Write a folder in SAELens v6's layout, with what is ours beside it (`saelab.autoencoders.serialization`).

        With `format` "saelens", "dictionary_learning", "sparsify" or "circuit-tracer" it is that library's layout and
        nothing of ours (`saelab.interop.save_as` says which SAEs each can hold). Files name the model as the hub does:
        where `sae.metadata["model"]` is another name, set `sae.metadata["model_name"]`.

        Raises `CheckpointError` on a full or read-only disk, and when `path` is a folder that holds something else,
        `ConfigError` for a format that cannot hold this SAE.
        """
        from saelab.autoencoders import serialization

        if format is not None:
            provided("save_as")(self, path, format)
            return
        serialization.save(self, path)
        self.path = user_path(path).absolute()

    def push_to_hub(self, repo: str, report: Any = None, private: bool = True, dry_run: bool = False) -> Any:
        """Send it to a repository of the Hugging Face hub with a card: `saelab.publish`, which takes a dashboard too.

        Args:
            repo: "name" or "organisation/name"; it is made where it is not there.
            report: what `saelab.evaluate` gives, for the card's figures.
            private: whether nobody else sees a new repository.
            dry_run: send nothing, only say what would be sent.

        >>> import saelab
        >>> SAE(saelab.TopK(k=2, d_sae=8), 4).push_to_hub("me/my-saes", dry_run=True).private
        True
        """
        return provided("publish")(self, repo, report, private=private, dry_run=dry_run)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], device: str | torch.device = "cpu", dtype: torch.dtype | str | None = None
    ) -> "SAE":
        """The SAE in a local folder or file: ours with the class, configuration and codes of before, or another project's.

        Formats are those of `saelab.load_sae`, which also takes names. Weights come in `dtype`, by default as they were saved
        (another project's in fp32). Its parameters need no gradient. Raises `FormatError` when it is no SAE, or a file was cut
        short or changed, `ConfigError` for what is no device or dtype.

        >>> import tempfile, torch, saelab
        >>> SAE(saelab.TopK(k=2, d_sae=8), 4).save(folder := tempfile.mkdtemp() + "/sae")
        >>> SAE.load(folder, dtype="bfloat16").dtype
        torch.bfloat16
        """
        where, kind = checks.device_of(device), checks.dtype_of(dtype)
        sae: SAE = provided("read_path")(user_path(path)).to(device=where, dtype=kind)
        sae.path = user_path(path).absolute()
        return sae

    def show(self, latents: int | Sequence[int], lm: Any = None, corpus: Any = None, **options: Any) -> Dashboard:
        """The page of one latent, or of a few, for a notebook: from 50,000 tokens and without effects unless asked for.

        Model and corpus are those of the training unless given; `options` are those of `saelab.dashboards.build`.

        >>> sae.show(123)  # doctest: +SKIP
        """
        return provided("show")(self, latents, lm, corpus, **options)

    def __repr__(self) -> str:
        site, model = self.metadata.get("site"), self.metadata.get("model")
        at = (f", {site}" if site else "") + (f" of {model}" if model else "")
        known = at or self.device.type == "meta" or int(self.state.stat_tokens)
        trained = "" if known else ", untrained"
        width = f"d_in={self.d_in}" if self.cfg.centres_input else f"d_in={self.d_in}, d_out={self.d_out}"
        return f"SAE({self.cfg!r}, {width}{at}{trained})"

    def _rows(self, x: Tensor) -> Tensor:
        if _tensor(x).shape[-1:] != (self.d_in,):
            width = f"{x.shape[-1]:,}" if x.ndim else "none, a single number,"
            raise ConfigError(
                f"the vectors have width {width} and this SAE reads {self.d_in:,}"
                + (f" (at {self.metadata['site']})" if self.metadata.get("site") else "")
            )
        rows = x.reshape(-1, self.d_in)
        if rows.is_meta or not bool(torch.isfinite(rows.sum())):
            check_finite(rows, "input of the SAE")
        return rows


def _tensor(x: object) -> Tensor:
    if not isinstance(x, Tensor):
        raise ConfigError(f"an SAE reads tensors, and this is {type(x).__name__}: give torch.as_tensor(...) of it")
    return x


def _unit_rows(n: int, d: int, generator: torch.Generator) -> Tensor:
    rows = torch.randn(n, d, generator=generator)
    return rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))
