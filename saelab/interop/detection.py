"""Which project wrote a folder or file: by the files in it and the tensors in those, never by a name alone."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path

from saelab.autoencoders.sae import SAE
from saelab.autoencoders.serialization import CONFIG, OURS, WEIGHTS
from saelab.base.errors import FormatError
from saelab.base.files import current
from saelab.base.manifests import TABLE, held, read_json
from saelab.interop.assembly import CROSS_LAYER
from saelab.interop.dictionary_learning import load_dictionary_learning
from saelab.interop.gemma_scope import load_gemma_scope
from saelab.interop.gemma_scope_2 import load_gemma_scope_2
from saelab.interop.given import Given
from saelab.interop.layer_transcoders import load_layer_transcoder
from saelab.interop.llama_scope import load_llama_scope, load_llama_scope_r1
from saelab.interop.openai import load_openai
from saelab.interop.qwen_scope import load_qwen_scope
from saelab.interop.sae_lens import load_sae_lens
from saelab.interop.single_files import load_goodfire, load_kissane
from saelab.interop.sparsify import load_sparsify
from saelab.interop.weights import names

Reader = Callable[[Path, Given], SAE]

READERS: dict[str, tuple[Reader, str]] = {  # the reader, and the file that it takes; "" where it takes the folder
    "saelens": (load_sae_lens, ""),
    "dictionary_learning": (load_dictionary_learning, "ae.pt"),
    "sparsify": (load_sparsify, ""),
    "openai": (load_openai, "*.pt"),
    "gemma_scope": (load_gemma_scope, "params.npz"),
    "gemma_scope_2": (load_gemma_scope_2, "params.safetensors"),
    "llama_scope": (load_llama_scope, ""),
    "llama_scope_r1": (load_llama_scope_r1, ""),
    "qwen_scope": (load_qwen_scope, "*.sae.pt"),
    "kissane": (load_kissane, "*.pt"),
    "goodfire": (load_goodfire, "*.pt"),
    "layer_transcoder": (load_layer_transcoder, "layer_*.safetensors"),
}
_FOLDERS = {  # what a folder of the format has
    "saelens": (CONFIG, WEIGHTS), "sparsify": (CONFIG, "sae.safetensors"),
    "llama_scope": ("hyperparams.json", "checkpoints/final.safetensors"), "llama_scope_r1": ("config.json", WEIGHTS),
}  # fmt: skip
_LINEAR = {"encoder.weight", "decoder.weight"}


def format_of(path: Path) -> str | None:
    """The name of the format of a folder or file, "saelab" for ours, None for what is none that is read here."""
    if path.is_dir():
        return _of_folder(path)
    there = {name.lower() for name in names(path)}
    if path.suffix == ".npz":
        return "gemma_scope"
    if path.suffix == ".safetensors":
        return _of_safetensors(path, there)
    if {"latent_bias", "pre_bias"} <= there:
        return "openai"
    if there == {"w_enc", "b_enc", "w_dec", "b_dec"}:
        found = {name.lower(): shape for name, (_, shape) in names(path).items()}
        shapes = [found[name] for name in ("w_enc", "w_dec", "b_enc", "b_dec")]
        turned = shapes[0][:1] == shapes[2] and shapes[1][:1] == shapes[3]
        return None if shapes[2] == shapes[3] else "qwen_scope" if turned else "kissane"
    if "encoder_linear.weight" in there:
        return "goodfire"
    known = there >= _LINEAR or {"w_enc", "w_dec", "threshold"} <= there
    return "dictionary_learning" if known else None


def _of_folder(folder: Path) -> str | None:
    if os.path.lexists(config := current(folder, CONFIG)):
        told = read_json(held(folder, str(config.relative_to(folder))), TABLE).get("metadata")
        if isinstance(told, dict) and isinstance(told.get("saelab"), dict):
            if os.path.lexists(current(folder, OURS)):
                return "saelab"
            # SAELens, writing one of ours again, keeps our metadata, byte for byte our weights, and no other file.
            warnings.warn(
                f"{folder} was written by saelab and has no {OURS}: it is read as SAELens reads it, without training state, "
                "statistics, and thresholds that were not measured yet",
                stacklevel=4,
            )
    for name, files in _FOLDERS.items():
        if all((folder / file).is_file() for file in files):
            return name
    for name, (_, file) in READERS.items():
        if file and "*" not in file and (folder / file).is_file():
            return name
    return None


def _of_safetensors(path: Path, there: set[str]) -> str | None:
    if {"w_enc", "w_dec", "b_enc", "b_dec", "threshold"} <= there:
        return "gemma_scope_2"
    if {"w_enc", "w_dec", "b_enc", "b_dec"} <= there:
        return "layer_transcoder"
    if any(name.startswith("w_enc_") for name in there):
        raise FormatError(f"{path} {CROSS_LAYER}")
    return None
