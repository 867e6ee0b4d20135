"""The examples of the documentation run."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch

import saelab
from saelab import ConfigError
from saelab.autoencoders.architecture import REGISTRY
from tests.test_train import planted, run_on

DOCS = Path(__file__).parents[1] / "docs"


def test_the_made_up_architecture_trains_saves_and_loads(tmp_path, monkeypatch):
    code, learning = re.findall(r"```python\n(.*?)```", (DOCS / "architectures.md").read_text(), re.S)
    assert len(code.splitlines()) <= 40 and len(learning.splitlines()) <= 25
    module = types.ModuleType("annealed")
    monkeypatch.setitem(sys.modules, "annealed", module)
    exec(compile(code, "architectures.md", "exec"), module.__dict__)
    try:
        cfg = module.AnnealedTopK(k=2, d_sae=64)
        run = run_on(planted(), sae=cfg, tokens=6000, log_every=256)
        assert run.history.l0.iloc[0] > 7 and run.history.l0.iloc[-1] <= 2
        run.sae.save(tmp_path / "sae")
        again = saelab.SAE.load(tmp_path / "sae")
        assert again.cfg == cfg and torch.equal(again(planted(50)), run.sae(planted(50)))
        with pytest.raises(ConfigError, match="k=20"):
            module.AnnealedTopK(k=20, d_sae=64)
        exec(compile(learning, "architectures.md", "exec"), module.__dict__)
        sae = run_on(planted(), sae=module.Averaged(k=2, d_sae=64), tokens=6000).sae
        cut = float(sae.state.cut)
        assert cut > 0 and 1 < sae.encode_sparse(planted(500)).l0 < 4 and float(sae.state.cut) == cut
    finally:
        REGISTRY.pop("AnnealedTopK")
        REGISTRY.pop("Averaged", None)
