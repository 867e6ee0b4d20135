"""The command line: options, configuration, errors, exit codes; then all of it on a small model."""

import inspect
import os
import signal
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

import saelab
from saelab import cli
from saelab.base.errors import ConfigError, DataError
from saelab.cli import doctor, estimate, evaluate
from saelab.cli.options import REQUIRED, Of, autoencoder, natural, positive
from tests import tiny

SITE = "blocks.1.hook_resid_post"
TRAIN = ["train", "--site", SITE, "--sae", "TopK(k=2, d_sae=16)", "--tokens", "1_000", "--out", "runs/x"]


class StandIn:
    """A model, a corpus and a run that remember what they were asked for."""

    def __init__(self, interrupted: bool = False, error: BaseException | None = None) -> None:
        self.interrupted, self.error = interrupted, error
        self.trained: dict[str, Any] = {}
        self.model = torch.nn.Linear(2, 2)
        self.n_tokens, self.ids = 4_000, torch.zeros(4, 8, dtype=torch.long)
        self.path, self.metadata = "runs/x", {}

    def site(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=name, width=4)

    def record(self, ids: torch.Tensor, sites: list[str]) -> torch.Tensor:
        return torch.zeros(*ids.shape, 4)

    def contexts(self, lm: Any, context_length: int | None, split: str = "train", **how: Any) -> "StandIn":
        return self

    def train(self, lm: Any, corpus: Any, **arguments: Any) -> "StandIn":
        if self.error:
            raise self.error
        self.trained = arguments
        return self

    @property
    def history(self) -> pd.DataFrame:
        return pd.DataFrame({"step": [2], "tokens": [1000], "explained_variance": [0.5], "l0": [2.0], "dead": [1]})


@pytest.fixture
def stand_in(monkeypatch) -> Any:
    def install(**arguments: Any) -> StandIn:
        it = StandIn(**arguments)
        monkeypatch.setitem(saelab.__dict__, "load_model", lambda name, device="auto": it)
        monkeypatch.setitem(saelab.__dict__, "load_corpus", lambda name, seed=0: it)
        monkeypatch.setitem(saelab.__dict__, "train", it.train)
        return it

    return install


def test_train_tells_the_cost_and_passes_everything_on(stand_in, capsys):
    it = stand_in()
    assert cli.main([*TRAIN, "--lr", "0.001", "--seed", "3"]) == 0
    expected = {"site": SITE, "tokens": 1000, "lr": 0.001, "seed": 3, "batch_size": 4096, "buffer_tokens": 131_072}
    assert expected.items() <= it.trained.items()
    assert it.trained["sae"] == saelab.TopK(k=2, d_sae=16)
    out = capsys.readouterr().out
    assert "1,000 tokens (0.25 epochs of 4,000): about" in out
    assert "runs/x: step 2, 1,000 tokens, explained variance 0.500" in out


def test_interrupted_training_exits_130(stand_in):
    stand_in(interrupted=True)
    assert cli.main(TRAIN) == 130


def test_a_keyboard_interrupt_exits_130(stand_in, capsys):
    stand_in(error=KeyboardInterrupt())
    assert cli.main(TRAIN) == 130
    assert capsys.readouterr().err == "saelab: interrupted\n"


def test_an_error_is_one_line(stand_in, capsys):
    stand_in(error=DataError("the corpus is empty:\n  give it text"))
    assert cli.main(TRAIN) == 2
    assert capsys.readouterr().err == "saelab: DataError: the corpus is empty: give it text\n"


def test_debug_shows_the_traceback(stand_in):
    stand_in(error=DataError("the corpus is empty"))
    with pytest.raises(DataError):
        cli.main([*TRAIN, "--debug"])


def test_buffer_in_bytes_and_no_norm_limit(stand_in):
    it = stand_in()
    flags = ["--buffer-tokens", "1MiB", "--max-norm", "none", "--loggers", "wandb", "tensorboard"]
    assert cli.main([*TRAIN, *flags]) == 0
    expected = {"buffer_tokens": "1MiB", "max_norm": None, "loggers": ["wandb", "tensorboard"]}
    assert expected.items() <= it.trained.items()


def configuration(tmp_path, text: str) -> list[str]:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return ["train", "--config", str(path)]


COMPLETE = f"site: {SITE}\nsae: TopK(k=2, d_sae=16)\ntokens: 500_000\nout: runs/y\n"


def test_flags_override_the_file_and_the_file_the_defaults(stand_in, tmp_path):
    it = stand_in()
    assert cli.main([*configuration(tmp_path, COMPLETE + "batch_size: 64\nlr:\n"), "--tokens", "7e3"]) == 0
    expected = {"tokens": 7000, "batch_size": 64, "out": "runs/y", "lr": None, "context_length": None}
    assert expected.items() <= it.trained.items()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (COMPLETE + "batchsize: 64", "unknown key 'batchsize'; did you mean batch_size"),
        (COMPLETE + "zzz: 64", "unknown key 'zzz'; known are batch_size"),
        (COMPLETE + "batch_size: many", "batch_size: 'many' is not a number"),
        (COMPLETE + "batch_size: [1, 2]", "batch_size: one value expected, not a list"),
        (COMPLETE + "batch_size:", "batch_size: 'None' is not a number"),
        (COMPLETE + "seed: -1", "seed: '-1' is not a whole number"),
        ("sae: TopK(k=2, d_sae=16)\n", "needs --site, --tokens, --out"),
        ("- a list\n", "must hold 'key: value' lines, not list"),
        ("a: [", "cannot read the configuration"),
    ],
)
def test_a_bad_file_is_refused(text, message, tmp_path, capsys):
    assert cli.main(configuration(tmp_path, text)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_missing_file_is_refused(tmp_path, capsys):
    assert cli.main(["train", "--config", str(tmp_path / "none.yaml")]) == 2
    assert "cannot read the configuration" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("TopX(k=3, d_sae=8)", "unknown architecture 'TopX'; did you mean TopK"),
        ("SAE(d_sae=8)", "unknown architecture 'SAE'"),
        ("TopK(kk=3, d_sae=8)", "TopK has no 'kk'; did you mean k"),
        ("TopK(k=3)", "d_sae"),
        ("TopK(k=__import__('os'), d_sae=8)", "plain numbers"),
        ("topk 32", "is not an architecture"),
        ("print(1)", "is not an architecture"),
        ("TopK(k=9, d_sae=8)", "k"),
    ],
)
def test_a_bad_architecture_is_refused(text, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        autoencoder(text)


def test_an_architecture_reads_as_it_prints():
    assert repr(autoencoder("TopK(k=3, d_sae=8)")) == "TopK(k=3, d_sae=8)"


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "inf", "nan", "x", ""])
def test_only_whole_numbers_count_tokens(text):
    with pytest.raises(ConfigError):
        positive(text)


def test_zero_is_natural():
    assert natural("0") == 0 and natural("1e3") == 1000


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda command: command.name)
def test_help_ends_with_examples(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command.name, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "examples:" in shown and all(line in shown for line in command.examples)


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train", "--token", "3"], ["train", "--tokens", "few"]])
def test_wrong_usage_exits_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: saelab" in capsys.readouterr().err


def test_the_estimate_counts_what_it_says():
    parts = estimate.training_bytes(d_in=768, d_sae=16_384, batch_size=4096, buffer_tokens=131_072)
    assert parts["autoencoder, gradient and Adam"] == 16 * (2 * 768 * 16_384 + 768 + 16_384)
    assert estimate.step_seconds(8, 16, tokens=100) > 0


def test_doctor_reports(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("SAELAB_CACHE", str(tmp_path))
    (tmp_path / "file").write_bytes(bytes(2048))
    monkeypatch.setattr(doctor, "OPTIONAL", {"no-such-package": ("x", "pip install no-such-package")})
    monkeypatch.setattr(doctor, "CORE", {"torch": "torch"})
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"torch              {torch.__version__}" in out
    assert "missing (pip install no-such-package)" in out
    assert f"{tmp_path}: 1 files, 2.0 KiB" in out
    assert "bf16 dot products" in out


def test_doctor_names_what_is_broken(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "OPTIONAL", {})
    monkeypatch.setattr(doctor, "CORE", {"torch": "no_such_module"})
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "does not import: ModuleNotFoundError" in out and "does not work without torch" in out


@pytest.fixture(scope="module")
def model_and_text(tmp_path_factory) -> list[str]:
    """A small model in a local folder and a text file, as flags."""
    folder = tmp_path_factory.mktemp("cli")
    tiny.llama_model().save_pretrained(folder / "model")
    tiny.byte_tokenizer().save_pretrained(folder / "model")
    texts = [f"{number}. {text}" for number in range(80) for text in tiny.TEXTS]
    (folder / "text").mkdir()
    for number in range(40):
        (folder / "text" / f"{number}.txt").write_text("\n".join(texts[number * 8 : number * 8 + 8]))
    return ["--model", str(folder / "model"), "--corpus", str(folder / "text"), "--device", "cpu"]


def test_train_harvest_evaluate_on_a_small_model(model_and_text, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SAELAB_CACHE", str(tmp_path / "cache"))
    out = str(tmp_path / "run")
    small = ["--context-length", "32"]
    flags = ["--site", SITE, "--sae", "TopK(k=4, d_sae=64)", "--tokens", "6_000", "--batch-size", "256"]
    assert cli.main(["train", *model_and_text, *small, *flags, "--buffer-tokens", "2_000", "--out", out]) == 0
    assert cli.main(["evaluate", out, *model_and_text, "--tokens", "256", "--sparsity-tokens", "256"]) == 0
    store = str(tmp_path / "store")
    assert cli.main(["harvest", *model_and_text, *small, "--sites", SITE, "--tokens", "500", "--out", store]) == 0
    shown = capsys.readouterr().out
    assert "explained variance" in shown and f"{SITE}: 500 rows of 32" in shown


def test_sweep_trains_all_of_them_on_one_stream(model_and_text, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SAELAB_CACHE", str(tmp_path / "cache"))
    sizes = ["--tokens", "2_000", "--batch-size", "256", "--context-length", "32", "--buffer-tokens", "2_000"]
    places = ["--site", "blocks.1.mlp.hook_pre", "--target-site", "blocks.1.hook_mlp_out"]
    saes = ["Transcoder(of=TopK(k=4, d_sae=64))", "Transcoder(of=MutualChoice(k=4, d_sae=64), skip=True)"]
    out = tmp_path / "runs"
    assert cli.main(["sweep", *model_and_text, *sizes, *places, "--saes", *saes, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "2,000 tokens" in shown and all(sae in shown for sae in saes)
    assert [repr(saelab.load_run(folder).sae.cfg) for folder in sorted(out.iterdir()) if folder.is_dir()] == saes
    assert (
        cli.main(["evaluate", str(out / "00-Transcoder"), *model_and_text, "--tokens", "64", "--sparsity-tokens", "64"])
        == 0
    )
    assert "blocks.1.mlp.hook_pre to blocks.1.hook_mlp_out" in capsys.readouterr().out


@pytest.mark.slow
def test_ctrl_c_exits_130_and_leaves_a_run(model_and_text, tmp_path):
    """A real process and a real signal, sent once the training bar moves."""
    flags = ["--site", SITE, "--sae", "TopK(k=4, d_sae=64)", "--tokens", "1e9", "--batch-size", "256"]
    small = ["--context-length", "32", "--buffer-tokens", "2_000", "--out", str(tmp_path / "run")]
    command = [sys.executable, "-m", "saelab.cli", "train", *model_and_text, *flags, *small]
    environment = os.environ | {"SAELAB_CACHE": str(tmp_path / "cache")}
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stderr is not None
        seen = b""
        while b"loss" not in seen:
            seen += process.stderr.read(64)
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=60)
    assert process.returncode == 130, (seen + rest).decode()
    run = saelab.load_run(tmp_path / "run")
    assert run.interrupted and len(run.history)


def test_evaluate_asks_for_what_the_sae_does_not_say(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("saelab.cli.evaluate.load", lambda path: SimpleNamespace(metadata={}))
    assert cli.main(["evaluate", "somewhere"]) == 2
    assert "does not say which model" in capsys.readouterr().err


def test_a_buffer_below_a_batch_is_refused(model_and_text, tmp_path, capsys):
    flags = ["--site", SITE, "--sae", "TopK(k=4, d_sae=64)", "--tokens", "6_000", "--buffer-tokens", "100"]
    assert cli.main(["train", *model_and_text, *flags, "--out", str(tmp_path / "run")]) == 2
    assert "buffer of 100 tokens is smaller than the batch of 4,096" in capsys.readouterr().err


def test_an_unknown_site_names_near_ones(model_and_text, tmp_path, capsys):
    flags = ["--site", "blocks.1.hook_resid_pots", "--sae", "TopK(k=4, d_sae=64)", "--tokens", "6_000"]
    assert cli.main(["train", *model_and_text, *flags, "--out", str(tmp_path / "run")]) == 2
    assert SITE in capsys.readouterr().err


FUNCTIONS = {
    "train": saelab.train, "sweep": saelab.sweep, "evaluate": saelab.evaluate, "harvest": saelab.harvest,
    "dashboard": saelab.dashboards.build, "demo": saelab.cli.demonstration.demo, "steer": saelab.LanguageModel.generate,
}  # fmt: skip
# A page of all latents of a large SAE is made when it is asked for; memory is in GiB; without a name it is the bundled corpus.
OWN = {("dashboard", "latents"), ("dashboard", "memory"), ("train", "corpus")}


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda command: command.name)
def test_a_default_is_that_of_the_function(command):
    """Written there once: an option that a function has too says whose it is, and gets it."""
    known = inspect.signature(FUNCTIONS[command.name]).parameters if command.name in FUNCTIONS else {}
    for option in command.options:
        assert option.value is not inspect.Parameter.empty
        default = known[option.key].default if option.key in known else inspect.Parameter.empty
        if default is not inspect.Parameter.empty and (command.name, option.key) not in OWN | {(command.name, "site")}:
            assert option.default is REQUIRED or option.value == default, option
            assert isinstance(option.default, Of) or option.default in (None, (), REQUIRED), option


def test_help_shows_the_functions_default(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "tokens in a step (default 4096)" in shown and "--out X folder of the run" in shown
    assert "(required)" in shown and "smollm2-135m" in shown


def test_evaluate_leaves_to_the_sae_what_it_was_trained_with(stand_in, monkeypatch, capsys):
    it, asked = stand_in(), {}
    it.metadata = {"context_length": 128, "model": "m", "corpus": "c", "seed": 0}
    monkeypatch.setattr(evaluate, "load", lambda path: it)
    monkeypatch.setitem(saelab.__dict__, "evaluate", lambda sae, lm, corpus, **how: asked.update(how))
    assert cli.main(["evaluate", "runs/x"]) == 0
    assert asked["context_length"] is None and asked["prepend_bos"] is None
    assert cli.main(["evaluate", "runs/x", "--context-length", "64"]) == 0 and asked["context_length"] == 64
