"""What the installed TransformerLens has for a family: its adapter's words for the parts, and its bridge.

An adapter is read, from the configuration. A bridge replaces a model's modules in place: none is built around an object of the
user's, only around one that was loaded for it.
"""

import contextlib
import copy
import re
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from torch import nn

from saelab.base.errors import ConfigError
from saelab.models.blocks import Words


def adapter_words(model: nn.Module) -> Words | None:
    """The words of the adapter for a model's architecture; None where the installed TransformerLens has none for it.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = LlamaConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8, vocab_size=9)
    >>> bool(adapter_words(LlamaForCausalLM(tiny)).ends.search("self_attn.o_proj"))
    True
    """
    with _settings_kept():
        try:
            from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
            from transformer_lens.model_bridge.sources import build_bridge_config_from_hf

            config: Any = model.config
            asked = build_bridge_config_from_hf(config, type(model).__name__, "", next(model.parameters()).dtype)
            block = ArchitectureAdapterFactory.select_architecture_adapter(asked).get_component_mapping()["blocks"]
        except Exception:  # it has no adapters, none of this architecture, or one that does not know this configuration
            return None
    parts = list(_parts(block))

    def named(*names: str, below: str = "$") -> re.Pattern[str]:
        paths = [re.escape(path) for name, path, _ in parts if name in names and path]
        return re.compile(rf"^(?:{'|'.join(paths)}){below}" if paths else "(?!)")

    norms = [name for name, _, kind in parts if "Norm" in kind]
    return Words(
        mixes=named("attn", "linear_attn", "mamba", "mixer", "ssm", "conv", "time_mix", below=r"(?:\.|$)"),
        attends=named("attn", below=" "),
        # an MLP may be two projections of the block with no module around them
        writes=named("mlp", "moe", "channel_mix", "mlp.out", below=r"(?:\.|$)"),
        norms=named(*norms),
        ends=named("attn.o", "mlp.out", "mlp.dense_out"),
        begins=tuple(named(f"mlp.{name}") for name in ("gate", "dense_gate", "in", "dense_in")),
        projects=(named("attn.q"), named("attn.k"), named("attn.v")),
    )


def bridge_around(model: Any, tokenizer: Any, name: str) -> nn.Module:
    """A `TransformerBridge` around a model that nobody else holds, with eager attention, whose patterns can be read.

    Raises `ConfigError` where the installed TransformerLens has no bridge for the architecture.
    """
    architecture = type(model).__name__
    with _settings_kept():
        try:
            from transformer_lens.model_bridge.sources import build_bridge_from_module

            model.set_attn_implementation("eager")
            own = copy.deepcopy(tokenizer)  # it gets a padding token and a side
            return build_bridge_from_module(model, architecture, hf_config=model.config, tokenizer=own, model_name=name)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"TransformerLens {version('transformer-lens')} has no bridge for {architecture} "
                              f"({error}): leave backend= out, which needs none") from error  # fmt: skip


def _parts(component: Any, name: str = "", path: str = "") -> Iterator[tuple[str, str, str]]:
    """(TransformerLens' name, path in the model, class) of everything below a component."""
    for own, part in component.submodules.items():
        below = f"{path}.{part.name}".strip(".") if part.name else path
        yield f"{name}{own}", below if part.name else "", type(part).__name__
        yield from _parts(part, f"{name}{own}.", below)


@contextlib.contextmanager
def _settings_kept() -> Iterator[None]:
    """Importing TransformerLens quiets transformers and filters warnings: both are the user's to set."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    try:
        with warnings.catch_warnings():
            yield
    finally:
        logging.set_verbosity(verbosity)
