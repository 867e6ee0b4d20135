"""A model and a corpus without transformers, for subprocesses too; `install` puts the model's forward in place."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch

from saelab.reading import reader as module
from saelab.reading.packing import Contexts

WIDTHS = {"early": 4, "late": 6}
SEPARATOR = 99


class ToyModel:
    """The activation at a place depends on the token ids up to there; the gradient is the activation doubled."""

    name, digest, device, dtype = "toy", "toy-digest", torch.device("cpu"), torch.float32
    runner = torch.nn.Identity()
    to_tokens = None  # its contexts are made by the corpus; a language model has one

    def __init__(self, bad: dict[int, float] | None = None) -> None:
        self.bad = bad or {}  # token id -> value that spoils the activation
        self.calls = 0

    def site(self, name):
        return SimpleNamespace(name=name, width=WIDTHS[name], heads=2 if name == "late" else None)

    def activation(self, ids, width):
        x = ids.cumsum(-1)[..., None] / torch.arange(1.0, width + 1)
        for token, value in self.bad.items():
            x = torch.where((ids == token)[..., None], torch.tensor(value), x)
        return x.sin() if not self.bad else x


def run_recording(lm, tokens, sites, *, gradients=False, label_seeds=None):
    lm.calls += 1
    with torch.inference_mode():
        activations = {site.name: lm.activation(tokens.ids, site.width) for site in sites}
        return (activations, {name: 2 * x for name, x in activations.items()}) if gradients else activations


def install() -> None:
    module.run_recording = run_recording


@dataclass
class ToyCorpus:
    n: int = 20
    length: int = 8
    seed: int = 0
    name: str = "toy corpus"
    digest: str = "corpus-digest"

    def contexts(self, lm, context_length, split="train", prepend_bos=None, progress=True):
        generator = torch.Generator().manual_seed(self.seed)
        ids = torch.randint(0, 90, (self.n, context_length or 256), generator=generator, dtype=torch.int32)
        separators = torch.rand(ids.shape, generator=generator) < 0.1
        ids[separators] = SEPARATOR
        documents = separators.flatten().cumsum(0).view_as(ids).int()
        documents[separators] = -1
        real = torch.ones_like(separators)
        return Contexts(ids, documents, ~separators, real, f"contexts-{self.n}-{split}", bool(prepend_bos))
