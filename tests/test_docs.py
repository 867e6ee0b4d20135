"""The examples of the documentation run, at small size."""

import re
import shlex
import sys
import tomllib
import types
from pathlib import Path

import pytest

import saelab
from saelab.autoencoders.architecture import REGISTRY
from saelab.cli import main
from saelab.evaluation.denoising import DenoiserReport
from saelab.evaluation.report import Report
from saelab.training.run import COLUMNS
from tests import tiny
from tests.training.test_train import planted, run_on

ROOT = Path(__file__).parents[1]


@pytest.fixture
def annealed(monkeypatch):
    """The example architecture with its test, and the one that learns, as a module."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "architectures.md").read_text(), re.S)
    code, test, learning = blocks
    assert len(code.splitlines()) <= 40 and len(test.splitlines()) <= 45 and len(learning.splitlines()) <= 25
    module = types.ModuleType(re.findall(r"from (\S+) import AnnealedTopK", test)[0])  # where the page says to put it
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in blocks:
        exec(compile(block, "architectures.md", "exec"), module.__dict__)
    yield module
    for name in ("AnnealedTopK", "Averaged"):
        REGISTRY.pop(name)


def test_the_made_up_architecture_passes_its_test(annealed, tmp_path):
    annealed.test_the_budget_falls_to_k_and_the_sae_comes_back(tmp_path)
    for progress, k in [(0, 8), (0.25, 5), (0.5, 2), (1, 2)]:
        annealed.test_codes_and_gradients_are_those_of_a_dense_topk(progress, k)
    annealed.test_a_budget_above_d_sae_is_refused()


def test_the_one_that_learns_keeps_its_threshold(annealed):
    sae = run_on(planted(), sae=annealed.Averaged(k=2, d_sae=64), tokens=6000).sae
    cut = float(sae.state.cut)
    assert cut > 0 and 1 < sae.encode_sparse(planted(500)).l0 < 4 and float(sae.state.cut) == cut


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_the_paths_that_a_page_names_are_there(page):
    """Links, and names in backquotes that begin with a folder of ours; not the example's."""
    text = (ROOT / page).read_text()
    named = re.findall(r"`((?:saelab|analysis|dashboards|tests|docs|notebooks|benchmarks)/[\w./-]*)`", text)
    links = [link for link in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", text)]
    missing = [path for path in named if not (ROOT / path).exists() and "annealed" not in path]
    missing += [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
    assert not missing


def test_the_version_is_said_once_in_each_place():
    assert f"version: {saelab.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert "version" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"]


PAGES = ["README.md", *(f"docs/{name}.md" for name in "install your-model your-text others-saes recipes evaluation coming-from "
         "figures troubleshooting".split())]  # fmt: skip
BLOCK = re.compile(r"^```(python|bash)(?: title=\"([^\"\n]+)\")?\n(.*?)^```", re.S | re.M)
# What a title says of a block that is not run: it needs the network, or it is another library's or another program's.
NOT_RUN = {"needs the network", "shell", "a notebook's cell", "SAELens 6", "dictionary_learning", "sparsify", "nnsight"}
SMALLEST = {"tokens": 16_384, "sparsity_tokens": 2048, "d_sae": 128, "k": 32, "latents": 4, "max_new_tokens": 4}


def blocks(page: str) -> list[tuple[str, str]]:
    """The blocks of a page that are to run: their language and text. Raises where a title is none that is known."""
    found = BLOCK.findall((ROOT / page).read_text())
    assert {title for _, title, _ in found if title} <= NOT_RUN
    return [(language, text) for language, title, text in found if not title and "git clone" not in text]


def small(text: str) -> str:
    """The same lines at a smaller size, at a block that the small model has."""

    def least(match: re.Match[str]) -> str:
        return f"{match[1]}{match[2]}{match[3]}{min(int(match[4]), SMALLEST[match[2].replace('-', '_')])}"

    text = re.sub(r"(--|\b)(tokens|sparsity_tokens|d_sae|k|latents|max_new_tokens)(=| )([\d_]+)", least, text)
    return text.replace("blocks.22.", "blocks.3.")


@pytest.fixture
def stand_ins(monkeypatch, tmp_path, tiny_llama):
    """A small model for the bundled one and for what would be fetched, forty short speeches for the corpus."""
    (tmp_path / "speeches").mkdir()
    for number in range(80):
        (tmp_path / "speeches" / f"{number:02}.txt").write_text(f"{number}. {tiny.TEXTS[number % 4]} " * 20)
    speeches = saelab.load_corpus(tmp_path / "speeches")
    load_model, load_corpus = saelab.load_model, saelab.load_corpus
    chat = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    monkeypatch.setattr(tiny_llama.tokenizer, "chat_template", chat)
    known = {"smollm2-135m": tiny_llama, tiny_llama.name: tiny_llama, "sotu": speeches}
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(saelab, "load_model", lambda x, *a, **how: _known(known, x) or load_model(x, *a, **how))
    monkeypatch.setattr(saelab, "load_corpus", lambda x, *a, **how: _known(known, x) or load_corpus(x, *a, **how))
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda name: tiny.gpt2_model(blocks=4))
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda name: tiny.byte_tokenizer())


def _known(known, what):
    return known.get(what) if isinstance(what, str) else None


@pytest.mark.filterwarnings("default::UserWarning")  # a corpus that ends early, a short run: said, not wrong
@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run(page, stand_ins):
    names = {}
    for language, text in blocks(page):
        if language == "python":
            exec(compile(small(text), page, "exec"), names)
            continue
        for line in text.splitlines():
            program, *arguments = shlex.split(small(line), comments=True)
            assert program == "saelab"
            assert main(arguments) == 0, line


def test_every_figure_is_defined():
    text = (ROOT / "docs" / "figures.md").read_text()
    figures = [*Report.__dataclass_fields__, *DenoiserReport.__dataclass_fields__, *COLUMNS]
    missing = [name for name in figures if f"`{name}`" not in text]
    assert not missing


def test_the_site_names_every_page():
    listed = re.findall(r": ([\w./-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= set(listed)


def test_the_readme_is_a_screen_and_a_half():
    assert len((ROOT / "README.md").read_text().splitlines()) < 80
