"""What an architecture says: its configuration and the four functions in which it differs from the others."""

import copy
import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from saelab.autoencoders.allocation import PreActivations
from saelab.base import checks
from saelab.base.codes import SparseCodes
from saelab.base.errors import ConfigError

REGISTRY: dict[str, type["Architecture"]] = {}


@dataclass
class Batch:
    """Aligned rows in the SAE's own units: input x [n, d_in], target [n, d_out], gradient [n, d_in] where there are any.

    `scores` is what the architecture made of them, for losses that need more than the codes.
    """

    x: Tensor
    target: Tensor
    gradient: Tensor | None = None
    scores: PreActivations | None = None


@dataclass
class Params:
    """The weights as an architecture sees them, in the SAE's own units.

    `W_enc` [d_sae, d_in] (a latent's encoder is a row, for contiguous reads), `b_enc` [d_sae], `W_dec` [d_sae, d_out],
    `b_dec` [d_out]; `extra` holds what an architecture adds, by name. An autoencoder takes b_dec from its input, `centres`;
    a transcoder does not, and may have a skip connection, `extra["W_skip"]` [d_out, d_in].
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    extra: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    centres: bool = True

    def centred(self, x_ND: Tensor) -> Tensor:
        """What the encoder multiplies: x - b_dec, or x itself."""
        return x_ND - self.b_dec if self.centres else x_ND

    def base(self, x_ND: Tensor) -> Tensor:
        """The output when no latent fires: b_dec [d_out], or b_dec + x W_skip^T [n, d_out]."""
        W_skip = self.extra.get("W_skip")
        return self.b_dec if W_skip is None else self.b_dec + x_ND @ W_skip.T


class State(nn.Module):
    """What training learns beside the weights; kept in the state_dict, and in its own precision in any `.to(dtype)`."""

    scale: Tensor
    target_scale: Tensor
    norm_limit: Tensor
    dead_after: Tensor
    tokens_since_fired: Tensor
    fires: Tensor
    act_sum: Tensor
    act_max: Tensor
    direction_std: Tensor
    stat_tokens: Tensor

    def __init__(self, d_sae: int, extra: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in extra.items():
            self.register_buffer(name, tensor)
        self.register_buffer("scale", torch.ones(()))  # of the input; the next one, of target, codes and biases
        self.register_buffer("target_scale", torch.ones(()))
        self.register_buffer("norm_limit", torch.tensor(math.inf))
        self.register_buffer("dead_after", torch.tensor(10_000_000))
        self.register_buffer("tokens_since_fired", torch.zeros(d_sae, dtype=torch.int64))
        self.register_buffer("fires", torch.zeros(d_sae, dtype=torch.int64))
        self.register_buffer("act_sum", torch.zeros(d_sae, dtype=torch.float64))
        self.register_buffer("act_max", torch.zeros(d_sae))
        self.register_buffer("direction_std", torch.full((d_sae,), math.nan))
        self.register_buffer("stat_tokens", torch.zeros((), dtype=torch.int64))

    if TYPE_CHECKING:  # the buffers of each architecture

        def __getattr__(self, name: str) -> Tensor: ...

    def _apply(self, fn: Any, recurse: bool = True) -> "State":
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(fn(buffer).device)
        return self

    @property
    def dead(self) -> Tensor:
        """Latents [d_sae] silent for `dead_after` tokens or more."""
        return self.tokens_since_fired >= self.dead_after


@dataclass(frozen=True, repr=False, kw_only=True)
class Architecture:
    """Base of the configurations. A subclass is registered by its name and overrides what differs."""

    d_sae: int
    input_scale: str | None = "rms"

    needs_gradients: ClassVar[bool] = False
    centres_input: ClassVar[bool] = True  # b_dec is taken from the input, and the encoder starts tied to the decoder
    saelens_bias: ClassVar[str] = "b_enc"  # what SAELens calls the bias of the encoder

    def __init_subclass__(cls) -> None:
        REGISTRY[cls.__name__] = cls

    def __post_init__(self) -> None:
        self.check(
            d_sae=checks.count("d_sae", self.d_sae),
            input_scale=checks.choice("input_scale", self.input_scale, ("rms", None)),
        )

    def check(self, **fields: Any) -> None:
        """Put the plain value that a check gave in the place of what the user wrote."""
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        shown = [
            f
            for f in dataclasses.fields(self)
            if f.default is dataclasses.MISSING or getattr(self, f.name) != f.default
        ]
        shown.sort(key=lambda field: (field.name == "d_sae", field.name != "k"))
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"

    @property
    def learning_rate(self) -> float:
        """2e-4 / sqrt(d_sae / 2^14) (the scaling of Gao et al. 2024, section 3; the constant of dictionary_learning)."""
        return 2e-4 / (self.d_sae / 2**14) ** 0.5

    @property
    def unit_decoder(self) -> bool:
        """Whether decoder rows are kept at length 1."""
        return True

    @property
    def betas(self) -> tuple[float, float]:
        """Adam's."""
        return (0.9, 0.999)

    def lr_factor(self, progress: float, base: float) -> float:
        """What the learning rate is multiplied by, from 0 to 1; `base` is the schedule's warm-up and decay."""
        return base

    def extra_parameters(self, d_in: int, d_out: int) -> dict[str, Tensor]:
        """Parameters beside the four that all have, by name, with their initial values (`Params.extra`).

        Those of one dimension keep their precision in any `.to(dtype)`.
        """
        return {}

    def rate_factor(self, name: str) -> float:
        """How many times the learning rate a parameter of `extra_parameters` gets."""
        return 1.0

    def prepare(self, params: Params, batch: Batch, state: State) -> None:
        """Set what depends on data, in place, from a sample of rows before the first step of a fresh SAE."""

    def rescale(self, params: Params, state: State, ratio: float) -> None:
        """Multiply, in place, what this architecture keeps in units of the scaled target: its scale changes by `ratio`."""

    def after_step(
        self, params: Params, batch: Batch, codes: "SparseCodes | Tensor", state: State, progress: float
    ) -> Tensor | None:
        """Whatever is done, in place and without gradients, after the optimiser's step.

        The latents [m] whose weights were set anew, if there are any: the optimiser forgets what it knew of them.
        """
        return None

    def buffers(self) -> dict[str, Tensor]:
        """What this architecture keeps in the state beside what all do: thresholds, densities."""
        return {}

    def thresholds(self, state: State) -> Tensor | None:
        """Inference thresholds in the SAE's own units, a scalar or [d_sae]; None where there are none."""
        return None

    def usable(self, state: State) -> bool:
        """Whether `select` has what it needs; not so before training has learnt thresholds that it fires by."""
        return True

    def scores(self, params: Params, batch: Batch) -> PreActivations:
        """(x - b_dec) W_enc + b_enc, not yet computed."""
        return PreActivations(params.centred(batch.x), params.W_enc, params.b_enc)

    def allocate(self, scores: PreActivations, state: State, progress: float) -> SparseCodes | Tensor:
        """The codes in training, sparse, or dense [n, d_sae] for rules without a budget; `progress` runs from 0 to 1.

        The state is read, not changed: what a batch teaches is learnt in `observe`.
        """
        raise NotImplementedError

    def observe(self, codes: "SparseCodes | Tensor", scores: PreActivations, state: State, progress: float) -> None:
        """Learn from a batch, in place and without gradients: called once a training step, after `allocate`, never at
        inference. What is global to a batch goes through `saelab.base.processes`."""

    def select(self, scores: PreActivations, state: State) -> SparseCodes:
        """The codes at inference, from a state that is not changed; those of `allocate` at progress 1 unless an architecture
        says otherwise."""
        codes = self.allocate(scores, copy.deepcopy(state), 1.0)  # inference learns nothing, whatever `allocate` does
        return SparseCodes.from_dense(codes) if isinstance(codes, Tensor) else codes

    def losses(self, batch: Batch, codes: Any, x_hat: Tensor, params: Params, state: State) -> dict[str, Tensor]:
        """Named terms whose sum is minimised."""
        raise NotImplementedError

    def to_saelens(self) -> dict[str, Any]:
        """What `cfg.json` says of this architecture, in SAELens v6's words."""
        raise NotImplementedError

    def saelens_tensors(self, params: Params, state: State) -> dict[str, Tensor]:
        """What SAELens's layout holds beside the weights and biases that all have, in units of the raw activation."""
        threshold = self.thresholds(state)
        return {} if threshold is None else {"threshold": (threshold / state.target_scale).expand(self.d_sae)}

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON can hold it; `from_dict` reads it back."""
        return {"class": type(self).__name__, **dataclasses.asdict(self)}

    @staticmethod
    def from_dict(fields: dict[str, Any]) -> "Architecture":
        """The configuration that `to_dict` wrote. Raises `ConfigError` for an unknown class or field."""
        fields = dict(fields)
        name = fields.pop("class", None)
        if name not in REGISTRY:
            raise ConfigError(f"unknown architecture {name!r}; this version knows {', '.join(sorted(REGISTRY))}")
        known = {field.name for field in dataclasses.fields(REGISTRY[name])}
        if unknown := sorted(set(fields) - known):
            raise ConfigError(f"{name} has no field {', '.join(unknown)}; its fields are {', '.join(sorted(known))}")
        return REGISTRY[name].from_fields(fields)

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> "Architecture":
        """The configuration with these fields, as `to_dict` wrote them."""
        return cls(**fields)
