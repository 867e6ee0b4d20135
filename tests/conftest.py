"""What every test shares: no network, a seed, small random models and the bundled one."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported

import random
from collections.abc import Iterator
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from jaxtyping import install_import_hook

import tests.shapes  # noqa: F401  the hook below finds it by name

install_import_hook("saelab", "tests.shapes.checked")  # before saelab is first imported

import saelab
from tests import tiny

# They name a device, which stays until the process ends: test_devices.py runs them in one of their own.
collect_ignore = [] if "SAELAB_STANDIN" in os.environ else ["standin.py", "training/on_standin.py"]

# The same examples in every run: a change is refused for what it breaks. `--hypothesis-profile=search` looks for new ones.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.register_profile("search", deadline=None)
hypothesis.settings.load_profile("same")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what opens a browser."""
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker("browser")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`-n` gives whole files to its processes: their tests share fixtures, those of the contract an order."""
    if config.getoption("dist") != "load":  # the user asked for something else
        return None
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Seed every global generator; afterwards give the session its generators and default dtype back."""
    dtype, torch_state = torch.get_default_dtype(), torch.get_rng_state()
    numpy_state, python_state = np.random.get_state(), random.getstate()
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    yield
    torch.set_default_dtype(dtype)
    torch.set_rng_state(torch_state)
    np.random.set_state(numpy_state)
    random.setstate(python_state)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level tokenizer: one token a byte, `<|endoftext|>` 256, `<|pad|>` 257."""
    return tiny.byte_tokenizer()


@pytest.fixture(scope="session")
def tiny_llama(tiny_tokenizer) -> "saelab.LanguageModel":
    """A random Llama of 4 blocks, width 32, grouped queries; `.model` is the transformers object."""
    return saelab.load_model(tiny.llama_model(), tokenizer=tiny_tokenizer, device="cpu")


@pytest.fixture(scope="session")
def tiny_gpt2(tiny_tokenizer) -> "saelab.LanguageModel":
    """A random GPT-2 of 3 blocks, width 24, 3 heads; `.model` is the transformers object."""
    return saelab.load_model(tiny.gpt2_model(), tokenizer=tiny_tokenizer, device="cpu")


@pytest.fixture(scope="session")
def smollm2() -> "saelab.LanguageModel":
    """The bundled SmolLM2-135M-Instruct."""
    return saelab.load_model("smollm2-135m", device="cpu")
