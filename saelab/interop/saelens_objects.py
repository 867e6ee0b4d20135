"""An SAE of saelab as an object of SAELens, for the tools that are built on it."""

import importlib
from typing import Any

from saelab.autoencoders.sae import SAE
from saelab.base.errors import ConfigError
from saelab.interop.exports import exported, saelens


def as_saelens(sae: SAE) -> Any:
    """The SAE as a `sae_lens.SAE` of its class, with weights of its own: what SAEBench, sae-probes, SAEDashboard and a
    session of TransformerLens and SAELens take.

    It computes what `sae` does; gated transcoders come as the JumpReLU ones that they are. One at `hook_z` takes
    activations with heads apart, [..., heads, d_head], as SAELens has it. delphi takes `sae.encode` itself;
    circuit-tracer reads `sae.save(path, "circuit-tracer")`.

    Raises `ConfigError` where sae-lens is not installed or has no class for this SAE (see `saelab.interop.save_as`).

    >>> saelab.interop.as_saelens(sae).cfg.metadata.hook_name  # doctest: +SKIP
    'blocks.3.hook_resid_post'
    """
    config, tensors = saelens(exported(sae))
    try:
        registry = importlib.import_module("sae_lens.registry")
    except ImportError as error:
        raise ConfigError(f"sae-lens cannot be imported ({error}): pip install 'sae-lens>=6'") from error
    kind, settings = registry.get_sae_class(config["architecture"])
    made = kind(settings.from_dict(config | {"device": str(sae.device)}))
    made.load_state_dict({name: tensor.clone().to(sae.device) for name, tensor in tensors.items()})
    return made.requires_grad_(False)
