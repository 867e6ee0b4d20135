"""What is no language model here though transformers has it: of images, classifiers, encoders, models without a head."""

from typing import Any

from torch import nn

from saelab.base.errors import ConfigError

OTHERWISE = " (saelab.models.sites.record(model, path, ...) and .intervene read and change any torch module)"


def refuse_other_tasks(model: nn.Module) -> None:
    """`ConfigError`, with the way out, for a transformers model that does not predict the next token of a text."""
    config: Any = model.config
    kind = type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        what = "is an encoder-decoder, whose sites have two texts"
    elif getattr(config.get_text_config(), "vocab_size", None) is None:
        what = "reads no tokens"
    elif not _has_head(model):
        what = "has no head that predicts tokens: load the ForCausalLM of its family"
    elif _bidirectional(model):
        what = "sees what comes after a token, so that it predicts no next one"
    else:
        return
    raise ConfigError(f"{kind} is not a causal language model: it {what}{OTHERWISE}")


def _has_head(model: Any) -> bool:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return head is not None


def _bidirectional(model: nn.Module) -> bool:
    from transformers.models.auto import modeling_auto as names

    masked = names.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    causal = set(names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    config: Any = model.config
    classes = {cls.__name__ for cls in type(model).__mro__}
    if config.model_type not in masked:
        return False
    return not classes & causal or not (getattr(config, "is_decoder", False) or getattr(config, "causal", False))
