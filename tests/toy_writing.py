"""Whatever writes, made small, and file systems that refuse something, for the tests of writing."""

import os
from pathlib import Path

import numpy as np
import torch

import saelab
from saelab import QuickSelection, steering
from tests.toy_dashboard import SITE, make_sae

X = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
TEXTS = [f"the state of the union {i} " * 8 for i in range(20)]


def train(out, x=X, **more):
    arguments = dict(sae=saelab.TopK(k=2, d_sae=16), tokens=512, batch_size=64, progress=False)
    return saelab.train(x, **arguments | more, out=out)


def sweep(out, x=X):
    return saelab.sweep(x, [saelab.TopK(k=2, d_sae=16)], tokens=512, batch_size=64, progress=False, out=out)


def harvest(lm, out):
    return saelab.harvest(lm, saelab.load_corpus(TEXTS), site=SITE, tokens=64, out=out, progress=False)


def steer(lm, out):
    return steering.sweep(
        lm, make_sae(lm), [1], ["ablate"], [1.0], ["My fellow"], baselines=(), max_new_tokens=1, out=out, batch_size=1,
        progress=False,
    )  # fmt: skip


def build(lm, out, **more):
    page = dict(effects=None, evaluation=None, tokens=256, latents=2, parquet=False, progress=False)
    return saelab.dashboards.build(make_sae(lm), lm, saelab.load_corpus(TEXTS), out, **page | more)


def select(out):
    return QuickSelection(n_hidden=8, epochs=2, batch_size=16, random_state=0, out=out, progress=False).fit(
        np.arange(400.0).reshape(40, 10) % 7
    )


def saved(sae=None, seed=0):
    return sae or saelab.SAE(saelab.TopK(k=2, d_sae=16), 8, seed=seed)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones and empty folders too."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"a folder"
        for path in folder.rglob("*")
        if path.is_file() or path.is_dir()
    }


def theirs(folder: Path, *names: str) -> dict[str, bytes]:
    """The user puts files of theirs into a folder of ours."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"a month of {name}")
    return {name: (folder / name).read_bytes() for name in names}


def refused(number: int):
    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    return refuse
