"""The lines of the block "What the user writes" of docs/design.md, run in order on the bundled model.

Every `tokens=` is divided by 25.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.toy_attribution import attention_sae

pytestmark = pytest.mark.slow

DESIGN = Path(__file__).parents[1] / "docs" / "design.md"
DIVISOR = 25

# Names that the block uses and does not make.
GIVEN = {
    "x0": lambda names: names["x"][:64],
    "X": lambda names: names["x"][:500].numpy(),
    "sae_z": lambda names: attention_sae(names["lm"], 2),
    "tokens": lambda names: "The state of the union is strong",
}


def block() -> str:
    section = DESIGN.read_text().split("## What the user writes", 1)[1]
    return section.split("```python\n", 1)[1].split("```", 1)[0]


def statements() -> list[str]:
    text = block()
    return [ast.get_source_segment(text, node) or "" for node in ast.parse(text).body]


def divided(text: str) -> str:
    return re.sub(r"\btokens=([\d_]+)", lambda m: f"tokens={int(m[1]) // DIVISOR}", text)


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> Iterator[dict[str, Any]]:
    """What the statements have made so far, in a folder of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("contract"))
        yield {}


@pytest.mark.filterwarnings("default::UserWarning")  # a corpus that ends early, a short run: said, not wrong
@pytest.mark.parametrize("text", statements(), ids=lambda text: text.split("\n")[0][:70])
def test_statement(text, names):
    for name, make in GIVEN.items():
        if re.search(rf"\b{name}\b(?!=)", text) and "x" in names:
            names[name] = make(names)
    exec(compile(divided(text), "<contract>", "exec"), names)


def test_what_they_made(names):
    """Shapes and columns that the comments of the block promise."""
    lm, sae, x = names["lm"], names["sae"], names["x"]
    assert list(lm.sites().columns[:4]) == ["name", "module", "width", "kind"]
    assert names["acts"].shape[::2] == (1, 576)
    columns = "step tokens loss l0 explained_variance dead lr tokens_per_second".split()
    assert set(columns) <= set(names["run"].history.columns)
    assert x[:1000].shape == (1000, 576) and len(x) == 50_000 // DIVISOR
    assert names["codes"].shape == (64, 4096)
    assert (sae.W_enc.shape, sae.W_dec.shape) == ((576, 4096), (4096, 576))
    assert (sae.b_enc.shape, sae.b_dec.shape) == ((4096,), (576,))
    columns = "l0 explained_variance fvu mse ce_clean ce_sae ce_zero ce_score delta_ce kl dead_fraction".split()
    assert set(columns) <= set(names["report"].to_pandas().columns)
    assert names["trajectory"].h.shape[:2] == (64, 50) and len(names["directions"]) == 8
    assert names["edited"].samples.shape == names["trajectory"].samples.shape
