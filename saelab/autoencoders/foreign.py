"""What a folder holds that is no SAE: said in the error, with the call that reads it where there is one."""

from pathlib import Path

from saelab.base.errors import FormatError
from saelab.base.manifests import read_json

# What is in a folder, by the name of a file, from the most telling to the least.
_FILES = {
    "run.json": "a training run (saelab.load_run reads it)",
    "sweep.json": "a steering sweep (saelab.steering.sweep with the same arguments reads it)",
    "data/manifest.js": "a dashboard (open its index.html)",
    "manifest.json": "something else with a manifest (a harvest is read by saelab.ActivationStore.open)",
    "model_index.json": "a diffusion pipeline (saelab.load_denoiser reads it)",
    "config.json": "a model (saelab.load_model reads it), or a part of an SAE",
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
        keys = ", ".join(sorted(map(str, config))[:6]) or "none"
        return f"its cfg.json has the keys {keys}, and beside it are no weights that go with that"
    if (folder / "cfg.json").exists():
        return "its cfg.json is no readable JSON table"
    found = next((what for name, what in _FILES.items() if (folder / name).exists()), None)
    return f"it has no cfg.json, and looks like {found}" if found else "it has no cfg.json"
