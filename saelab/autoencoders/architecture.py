"""What an architecture says: its configuration, and the few functions in which it differs from the others."""

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor, nn

from saelab.autoencoders.allocation import PreActivations
from saelab.autoencoders.objectives import fraction_of_variance_unexplained
from saelab.autoencoders.token_norm import PER_TOKEN
from saelab.base import checks
from saelab.base.codes import SparseCodes
from saelab.base.errors import ConfigError
from saelab.kernels import mixed

_BY_THE_HOST = ("progress", "input_norm", "rounding_state")  # endings of what the host plans a step by: it stays there

REGISTRY: dict[str, type["Architecture"]] = {}

Codes = SparseCodes | Float[Tensor, "n d_sae"]  # dense where a rule has no budget
Tensors = dict[str, Shaped[Tensor, "..."]]  # by name
Terms = dict[str, Float[Tensor, ""]]  # of a loss, by name


class Lists:
    """The latents of a mask by name. On a device, where to ask is to wait, training renews them every few steps only."""

    def __init__(self) -> None:
        self.kept: Tensors = {}
        self.renews = True

    def of(self, name: str, mask: Callable[[], Bool[Tensor, " d_sae"]]) -> Int64[Tensor, " m"]:
        """The latents, ascending, that the mask holds, or held when the list was renewed.

        >>> import torch
        >>> Lists().of("dead", lambda: torch.tensor([False, True, True]))
        tensor([1, 2])
        """
        if self.renews or name not in self.kept:
            self.kept[name] = mask().nonzero().squeeze(1)
        return self.kept[name]


@dataclass
class Batch:
    """Aligned rows in the SAE's own units, at a moment of training (its progress runs from 0 to 1).

    `scores` is what the architecture made of them, for whatever needs more than the codes.
    """

    x: Float[Tensor, "n d_in"]
    target: Float[Tensor, "n d_out"]
    gradient: Float[Tensor, "n d_in"] | None = None
    progress: float = 1.0
    lists: Lists = field(default_factory=Lists)
    scores: PreActivations = field(init=False)


@dataclass
class Params:
    """The weights as an architecture sees them, in the SAE's own units.

    `W_enc` [d_sae, d_in] (a latent's encoder is a row, for contiguous reads), `b_enc` [d_sae], `W_dec` [d_sae, d_out],
    `b_dec` [d_out]; `extra` holds what an architecture adds, by name. An autoencoder takes b_dec from its input, `centres`;
    a transcoder does not, and may have a skip connection, `extra["W_skip"]` [d_out, d_in].
    """

    W_enc: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_out"]
    b_dec: Float[Tensor, " d_out"]
    extra: Tensors = field(default_factory=dict)
    centres: bool = True

    def centred(self, x_ND: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
        """What the encoder multiplies: x - b_dec, or x itself."""
        return x_ND - self.b_dec if self.centres else x_ND

    def base(self, x_ND: Float[Tensor, "n d_in"]) -> Float[Tensor, "*n d_out"]:
        """The output when no latent fires: b_dec [d_out], or b_dec + x W_skip^T [n, d_out]."""
        W_skip = self.extra.get("W_skip")
        return self.b_dec if W_skip is None else self.b_dec + mixed.linear(x_ND, W_skip)


class State(nn.Module):
    """What training learns beside the weights; kept in the state_dict, and in its own precision in any `.to(dtype)`."""

    scale: Float[Tensor, ""]
    target_scale: Float[Tensor, ""]
    norm_limit: Float[Tensor, ""]
    dead_after: Int64[Tensor, ""]
    tokens_since_fired: Int64[Tensor, " d_sae"]
    fires: Int64[Tensor, " d_sae"]
    act_sum: Float[Tensor, " d_sae"]
    act_max: Float[Tensor, " d_sae"]
    direction_std: Float[Tensor, " d_sae"]
    stat_tokens: Int64[Tensor, ""]

    def __init__(self, d_sae: int, extra: Tensors) -> None:
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "State":
        for name, buffer in self._buffers.items():
            if buffer is not None and not name.endswith(_BY_THE_HOST):
                self._buffers[name] = buffer.to(fn(buffer).device)
        return self

    @property
    def dead(self) -> Bool[Tensor, " d_sae"]:
        """Latents [d_sae] silent for `dead_after` tokens or more."""
        return self.tokens_since_fired >= self.dead_after


@dataclass(frozen=True)
class Recipe:
    """How an architecture is optimised.

    `learning_rate` is the peak of Adam's, `betas` are its own; `unit_decoder` keeps decoder rows at length 1; `rates` says how
    many times the rate a parameter of `extra_parameters` gets, 1 where it says nothing; `lr_factor` makes of the progress and
    of the schedule's factor (warm-up and decay, 0 to 1) the one that the rate is multiplied by.
    """

    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    unit_decoder: bool = True
    rates: Mapping[str, float] = field(default_factory=dict)
    lr_factor: Callable[[float, float], float] = lambda progress, scheduled: scheduled


@dataclass(frozen=True, repr=False, kw_only=True)
class Architecture:
    """Base of the configurations. A subclass is registered by its name and overrides what differs; only `allocate` it must.

    `input_scale` is what vectors are multiplied by before an SAE sees them: "rms" one power of two for all, None nothing;
    "layer_norm" and "token_norm" normalise each by itself (`saelab.autoencoders.token_norm`).
    """

    d_sae: int
    input_scale: str | None = "rms"

    needs_gradients: ClassVar[bool] = False
    centres_input: ClassVar[bool] = True  # b_dec is taken from the input, and the encoder starts tied to the decoder

    def __init_subclass__(cls, registered: bool = True) -> None:
        if registered:
            REGISTRY[cls.__name__] = cls

    def __post_init__(self) -> None:
        self.check(
            d_sae=checks.count("d_sae", self.d_sae),
            input_scale=checks.choice("input_scale", self.input_scale, ("rms", *PER_TOKEN, None)),
        )
        if self.needs_gradients and self.per_token:
            raise ConfigError(
                f"input_scale={self.input_scale!r} normalises each vector by itself, and {type(self).__name__} weighs scores "
                'by gradients at the vector as it is: use "rms"'
            )

    # --- which latents fire, and what is minimised

    def scores(self, params: Params, batch: Batch) -> PreActivations:
        """(x - b_dec) W_enc + b_enc, not yet computed."""
        return PreActivations(params.centred(batch.x), params.W_enc, params.b_enc)

    def allocate(self, scores: PreActivations, state: State, progress: float) -> Codes:
        """The codes in training, sparse, or dense [n, d_sae] for rules without a budget; `progress` runs from 0 to 1.

        The state is read, not changed: what a batch teaches is learnt in `observe`.
        """
        raise NotImplementedError

    def select(self, scores: PreActivations, state: State) -> SparseCodes:
        """The codes at inference, from a state that is not changed: those above the learnt thresholds, and where there are none
        those of `allocate` at progress 1.

        Raises `ConfigError` where thresholds are still to be learnt.
        """
        threshold = self.thresholds(state)
        if threshold is not None:
            if not self.usable(state):
                raise ConfigError(f"this SAE has learnt no threshold yet, and {self!r} fires by one: train it further")
            return scores.above(threshold)
        codes = self.allocate(scores, copy.deepcopy(state), 1.0)  # inference learns nothing, whatever `allocate` does
        return SparseCodes.from_dense(codes) if isinstance(codes, Tensor) else codes

    def losses(
        self, batch: Batch, codes: Codes, x_hat: Float[Tensor, "n d_out"], params: Params, state: State
    ) -> Terms:
        """Named terms whose sum is minimised."""
        return {"fvu": fraction_of_variance_unexplained(batch.target, x_hat)}

    # --- what is learnt

    def observe(self, batch: Batch, codes: Codes, params: Params, state: State) -> Int64[Tensor, " m"] | None:
        """Learn from a batch, in place and without gradients: once a training step, after the optimiser's, never at inference.

        `params` are the weights after the step; of `batch.scores`, only what `once` has kept is from before it. What is global
        to a batch goes through `saelab.base.processes`. Gives the latents [m] whose weights were set anew, if there are any:
        the optimiser forgets what it knew of them.
        """
        return None

    def buffers(self) -> Tensors:
        """What the state keeps of this architecture beside what it does of all: thresholds, densities."""
        return {}

    def thresholds(self, state: State) -> Float[Tensor, "*d_sae"] | None:
        """Above what a latent fires at inference in the SAE's own units, a scalar or [d_sae]: NaN before it is learnt, None
        for other rules."""
        return None

    def by_rank(self, state: State) -> Tensors:
        """What `Run.plot` draws of a trained SAE over the ranks of its latents, curves [d_sae] by name."""
        return {}

    def extra_parameters(self, d_in: int, d_out: int) -> Tensors:
        """Parameters beside the four that all have, by name, with their initial values (`Params.extra`).

        Those of one dimension keep their precision in any `.to(dtype)`.
        """
        return {}

    def prepare(self, params: Params, batch: Batch, state: State) -> None:
        """Set what depends on data, in place, from a sample of rows before the first step of a fresh SAE."""

    def rescale(self, params: Params, state: State, ratio: float) -> None:
        """Multiply, in place, what this architecture keeps in units of the scaled target: its scale changes by `ratio`."""

    # --- how it is trained and saved

    @property
    def recipe(self) -> Recipe:
        """2e-4 / sqrt(d_sae / 2^14) (the scaling of Gao et al. 2024, section 3; the constant of dictionary_learning)."""
        return Recipe(learning_rate=2e-4 / (self.d_sae / 2**14) ** 0.5)

    def to_saelens(self) -> dict[str, Any]:
        """What `cfg.json` says of this architecture, in SAELens v6's words where it has some. It refuses other names, and so
        the folder, rather than to read it as something else."""
        return {"architecture": f"saelab_{type(self).__name__.lower()}"}

    # --- what is the same for all

    @property
    def per_token(self) -> bool:
        """Whether each vector is normalised by itself (`saelab.autoencoders.token_norm`), rather than all by one scale."""
        return self.input_scale in PER_TOKEN

    def usable(self, state: State) -> bool:
        """Whether `select` has what it needs; not so before training has learnt thresholds that it fires by."""
        threshold = self.thresholds(state)
        return threshold is None or not bool(threshold.isnan().any())

    def check(self, **fields: Any) -> None:
        """Put the plain value that a check gave in the place of what the user wrote."""
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        shown = [
            f
            for f in dataclasses.fields(self)
            if f.init and (f.default is dataclasses.MISSING or getattr(self, f.name) != f.default)
        ]
        shown.sort(key=lambda field: (field.name == "d_sae", field.name != "k"))
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON can hold it; `from_dict` reads it back."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        plain = {name: value.to_dict() if isinstance(value, Architecture) else value for name, value in values.items()}
        return {"class": type(self).__name__, **plain}

    @staticmethod
    def from_dict(fields: dict[str, Any]) -> "Architecture":
        """The configuration that `to_dict` wrote. Raises `ConfigError` for an unknown class or field."""
        fields = dict(fields)
        name = fields.pop("class", None)
        if name not in REGISTRY:
            raise ConfigError(f"unknown architecture {name!r}; this version knows {', '.join(sorted(REGISTRY))}")
        known = {field.name for field in dataclasses.fields(REGISTRY[name]) if field.init}
        if unknown := sorted(set(fields) - known):
            raise ConfigError(f"{name} has no field {', '.join(unknown)}; its fields are {', '.join(sorted(known))}")
        inner = {key: Architecture.from_dict(value) for key, value in fields.items() if isinstance(value, dict)}
        return REGISTRY[name](**fields | inner)
