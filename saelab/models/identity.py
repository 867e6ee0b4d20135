"""What a model is at this moment: digests that are taken when they are compared, from the weights as they are then.

What is kept under a digest (stores, runs, sweeps, counted pages) is found again by it. A model that was fine-tuned in place,
has another adapter on or drops activations at random is another one.
"""

import hashlib
import json
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from saelab.base import digests
from saelab.base.errors import InterventionError
from saelab.base.protocols import Dictionary
from saelab.models.hooks import open_interventions
from saelab.models.offloading import weights

if TYPE_CHECKING:
    from saelab.models.denoiser import Denoiser
    from saelab.models.language import LanguageModel


def weights_digest(model: nn.Module | Dictionary) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a module's state, as it is now."""
    digest = hashlib.sha256()
    for name, tensor in weights(model):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(digests.content(tensor))
    return digest.hexdigest()


def fingerprint(model: nn.Module) -> str:
    """What tells whether `state_digest` would still be the same: sums over all bytes of the weights, made where they are.

    A twentieth of the digest's cost, and on a GPU nothing is copied. Only within one process; kept nowhere.
    """
    digest = hashlib.sha256(json.dumps(circumstances(model)).encode())
    for name, tensor in weights(model):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        for sums in _sums(tensor.detach()):
            digest.update(digests.content(sums))
    return digest.hexdigest()


def _sums(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """Of the bytes as whole numbers of 64 bits in rows of 1,024, by row and by column; what is left over as it is."""
    if not x.numel():
        return
    row = 8 * 1024
    flat = x.contiguous().reshape(-1)
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()
    flat = flat.view(torch.uint8)
    whole = len(flat) // row * row
    words = flat[:whole].view(torch.int64).view(-1, 1024)
    yield from (words.sum(0), words.sum(1), flat[whole:])


def state_digest(model: nn.Module) -> str:
    """`weights_digest`, and what else decides the activations: which adapters act, dropout in training mode.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)).eval()
    >>> state_digest(net) == weights_digest(net), state_digest(net.train()) == weights_digest(net)
    (True, False)
    """
    own, beside = weights_digest(model), circumstances(model)
    return digests.of_json([own, *beside]) if beside else own


def circumstances(model: nn.Module) -> list[str]:
    """What decides a model's activations beside its weights, in words; nothing for most models."""
    rate = dropout_rate(model)
    return _adapters(model) + ([f"training mode with dropout {rate:g}"] if rate else [])


def _adapters(model: nn.Module) -> list[str]:
    """Of each layer that peft adapted: the adapters that act (none when switched off), and how strongly."""
    found = []
    for path, module in model.named_modules():
        if hasattr(module, "active_adapters") and hasattr(module, "merged_adapters"):
            on = [] if module.disable_adapters else list(module.active_adapters)
            scaling = getattr(module, "scaling", {})
            strength = {name: scaling[name] for name in on if name in scaling}
            found.append(f"adapters of {path}: {on} {strength} merged {list(module.merged_adapters)}")
    return found


def dropout_rate(model: nn.Module) -> float:
    """The largest share of activations that a module drops at random as the model stands; 0 in evaluation mode."""
    rates = [module.p for module in model.modules() if module.training and isinstance(module, nn.Dropout)]
    if model.training:
        config = getattr(model, "config", None)
        rates += [getattr(config, name, 0.0) or 0.0 for name in ("attention_dropout", "attn_pdrop", "resid_pdrop")]
    return max(rates, default=0.0)


def warn_of_dropout(model: nn.Module) -> None:
    """Say so when the model would drop activations at random: its mode is the user's and is left alone."""
    rate = dropout_rate(model)
    if rate > 0:
        warnings.warn(
            f"the model is in training mode with dropout {rate:g}: activations are random and scaled. "
            "Call model.eval() first, unless that is what you study.",
            stacklevel=3,
        )


def refuse_interventions(lm: "LanguageModel | Denoiser", what: str) -> None:
    """`InterventionError` within `intervene`, `steer` and `splice`: `what` is kept under a digest that cannot tell them.

    Warns of forward hooks that others set on the model: whether they change anything is nowhere written down.
    """
    if open_interventions(lm.runner):
        raise InterventionError(
            f"{what} is found again by the digest of the model's weights, which does not tell what an intervention makes of "
            f"its activations, and one is open (intervene, steer or splice): close it first, or leave out= away"
        )
    if hooks := foreign_hooks(lm.runner):
        warnings.warn(
            f"{what} is found again by the digest of the model's weights, which does not tell what forward hooks make of its "
            f"activations, and the model has {len(hooks)} ({hooks[0]}): where one changes them, give an `out` of its own",
            stacklevel=4,
        )


_OWN_HOOKS = ("saelab", "torch", "transformers", "accelerate")  # by which these read, move and share out what passes


def foreign_hooks(model: nn.Module) -> list[str]:
    """Where forward hooks of the user's, or of another library's, are, and their names."""
    found = []
    for path, module in model.named_modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            function = getattr(hook, "func", hook)  # of a partial
            name = f"{function.__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"
            if name.partition(".")[0] not in _OWN_HOOKS:
                found.append(f"{name} at {path or 'the model'}")
    return found


def warn_of_other_weights(lm: "LanguageModel | Denoiser", sae: Dictionary, stacklevel: int = 3) -> None:
    """Say so, once, when an SAE that knows its model is used with other weights.

    Looked at again when the weights were written to since.
    """
    trained = sae.metadata.get("model_digest")
    if trained is None:
        return
    state = lm.inner.state_dict().values()
    written = sum(x._version for x in state if isinstance(x, torch.Tensor) and not x.is_inference())
    seen = str([written, lm.dtype, *circumstances(lm.inner)])
    if lm.compared.get(sae) == seen:
        return
    lm.compared[sae] = seen
    if trained != lm.digest:
        warnings.warn(
            f"the SAE was trained on {sae.metadata.get('model')!r} with digest {trained[:12]}, and {lm.name!r} is "
            f"{lm.digest[:12]} now: other weights, adapters, dtype or mode. What it finds and does here may mean nothing",
            stacklevel=stacklevel,
        )


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's serialisation, without the padding and truncation of its last call."""
    if tokenizer is None:
        return hashlib.sha256(b"").hexdigest()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}
    else:
        state = {"vocabulary": tokenizer.get_vocab(), "special": sorted(tokenizer.all_special_ids)}
    return digests.of_json(state)
