"""What a folder holds that is no SAE of saelab's: said in the error, with the call that reads it where there is one."""

from pathlib import Path
from typing import Any

from saelab.base.errors import FormatError
from saelab.base.manifests import read_json

# What is in a folder, by the name of a file, from the most telling to the least.
_FILES = {
    "run.json": "a training run (saelab.load_run reads it)",
    "sweep.json": "a steering sweep (saelab.steering.sweep with the same arguments reads it)",
    "data/manifest.js": "a dashboard (open its index.html)",
    "manifest.json": "something else with a manifest (a harvest is read by saelab.ActivationStore.open)",
    "hyperparams.json": "an SAE of Llama Scope (saelab.interop.scope_releases.load_llama_scope reads it)",
    "params.npz": "an SAE of Gemma Scope (saelab.interop.scope_releases.load_gemma_scope reads it)",
    "ae.pt": "an SAE of dictionary_learning, which is not read yet",
    "sae.safetensors": "an SAE of EleutherAI's sparsify, which is not read yet",
    "model_index.json": "a diffusion pipeline (saelab.load_denoiser reads it)",
    "config.json": "a model or an SAE of another library, which is not read here",
}


def described(folder: Path) -> str:
    """What this folder is, as far as its files tell."""
    if not folder.is_dir():
        return "there is no such folder" if not folder.exists() else "it is not a folder"
    try:
        config = read_json(folder / "cfg.json")
    except FormatError:
        config = None
    if isinstance(config, dict):
        return f"it is {_library(config)}"
    if (folder / "cfg.json").exists():
        return "its cfg.json is no readable JSON table"
    found = next((what for name, what in _FILES.items() if (folder / name).exists()), None)
    return f"it has no cfg.json, and looks like {found}" if found else "it has no cfg.json"


def _library(config: dict[str, Any]) -> str:
    metadata = config.get("metadata")
    architecture = config.get("architecture", config.get("activation_fn_str", "standard"))
    if isinstance(metadata, dict) and "saelab" not in metadata and "architecture" in config:
        return f"an SAE of SAELens (architecture {architecture!r}): folders of other libraries are not read yet"
    if "expansion_factor" in config or "num_latents" in config:
        return "an SAE of EleutherAI's sparsify: folders of other libraries are not read yet"
    if "d_sae" in config or "hook_name" in config or "hook_point" in config:
        return (
            f"an SAE in the layout of SAELens before version 6 (architecture {architecture!r}), which is not read yet"
        )
    return f"a folder of something else: its cfg.json has the keys {', '.join(sorted(map(str, config))[:6]) or 'none'}"
