"""From a name or a folder to a transformers model and its tokenizer, with errors that say the way out."""

import difflib
import os
import re
from typing import Any

import torch

from saelab.base.errors import ConfigError
from saelab.base.files import user_path
from saelab.models.bundled import HUB_NAME
from saelab.models.tasks import OTHERWISE

BUNDLED = "smollm2-135m"
_CLASS = re.compile(r"^[A-Z]\w*(ForCausalLM|LMHeadModel|Transformer|TransformerBridge)$")


def hub_name(name: str | None) -> str | None:
    """What the hub calls a model of this name; None for a class, which is all that is known of an object without a name.

    >>> hub_name("smollm2-135m"), hub_name("gpt2"), hub_name("GPT2LMHeadModel")
    ('HuggingFaceTB/SmolLM2-135M-Instruct', 'gpt2', None)
    """
    if name == BUNDLED:
        return HUB_NAME
    return None if name is None or _CLASS.search(name) else name


def pretrained(name: str, device: torch.device, dtype: torch.dtype | None, tokenizer: Any) -> tuple[Any, Any]:
    """A transformers model in evaluation mode and its tokenizer, from the hub, its cache or a local folder."""
    import transformers

    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    path = user_path(name)
    if is_path and not path.is_dir():
        raise ConfigError(f"there is no folder {name!r}: give one that save_pretrained wrote, a model's name on the "
                          f"hub, or {BUNDLED!r}")  # fmt: skip
    source = str(path) if path.is_dir() else name
    try:
        loader: Any = transformers.AutoModelForCausalLM
        model, found = loader.from_pretrained(source, dtype=dtype or torch.float32, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise ConfigError(_not_loaded(name, error)) from error
    if missing := sorted(found["missing_keys"]):
        raise ConfigError(f"{name!r} has no weights for {', '.join(missing[:3])} of a {type(model).__name__} "
              f"({len(missing)} in all), and would get random ones: it is another kind of model{OTHERWISE}")  # fmt: skip
    return model.to(device).eval(), pretrained_tokenizer(source if tokenizer is None else tokenizer)


def pretrained_tokenizer(name: Any) -> Any:
    """The tokenizer of a name or folder; an object is given back as it is."""
    if not isinstance(name, str | os.PathLike):
        return name
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(user_path(name)))
    except (OSError, ValueError) as error:
        raise ConfigError(f"no tokenizer can be loaded from {str(name)!r} ({_first_line(error)}): "
                          "give tokenizer=, an object, a name or a folder") from error  # fmt: skip


def _not_loaded(name: str, error: Exception) -> str:
    if "Unrecognized configuration class" in str(error):
        return f"{name!r} holds no causal language model ({_first_line(error)}){OTHERWISE}"
    near = difflib.get_close_matches(name.lower(), [BUNDLED], cutoff=0.6)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    return (
        f"no model {name!r} can be loaded ({_first_line(error)}).{guess} Without a network (or with HF_HUB_OFFLINE=1) "
        f"only models in the hub's cache load: give a local folder or a model object, or {BUNDLED!r}, which needs "
        "none; with a network check the name, and for a gated model log in with `hf auth login`."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
