"""The command line: options, configuration, errors, exit codes; then all of it on a small model."""

import inspect
import os
import shlex
import signal
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

import saelab
from saelab import cli, hspace
from saelab.analysis import attention, denoisers
from saelab.base.errors import ConfigError, DataError
from saelab.cli import commands, demonstration, doctor, inputs
from saelab.cli.values import autoencoder, kinds_of, reader, whole
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

    def contexts(self, lm: Any, context_length: int | None, split: str = "train", **how: Any) -> "StandIn":
        return self

    def estimate(self, lm: Any, corpus: Any, *, sae: list[Any], **arguments: Any) -> str:
        return f"about a minute for {len(sae)}"

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
        monkeypatch.setitem(saelab.__dict__, "estimate", it.estimate)
        return it

    return install


def test_train_tells_the_cost_and_passes_everything_on(stand_in, capsys):
    it = stand_in()
    assert cli.main([*TRAIN, "--lr", "0.001", "--seed", "3"]) == 0
    expected = {"site": SITE, "tokens": 1000, "lr": 0.001, "seed": 3, "batch_size": 4096, "buffer_tokens": 131_072}
    assert expected.items() <= it.trained.items()
    assert it.trained["sae"] == saelab.TopK(k=2, d_sae=16)
    out = capsys.readouterr().out
    assert "1,000 tokens (0.25 epochs of 4,000): about a minute for 1\n" in out
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
        (COMPLETE + "batchsize: 64", "run.yaml: unknown key 'batchsize'; did you mean batch_size"),
        (COMPLETE + "zzz: 64", "unknown key 'zzz'; known are batch_size"),
        (COMPLETE + "batch_size: many", "run.yaml: batch_size: 'many' is not a whole number"),
        (COMPLETE + "batch_size: [1, 2]", "batch_size: one value expected, not a list"),
        (COMPLETE + "sae: {TopK: 3}", "sae: one value expected, not a dict"),
        (COMPLETE + "batch_size:", "batch_size: 'none' is not a whole number"),
        (COMPLETE + "seed: 1.5", "seed: '1.5' is not a whole number"),
        (COMPLETE + "prepend_bos: perhaps", "prepend_bos: 'perhaps' is not yes or no or auto"),
        ("sae: TopK(k=2, d_sae=16)\n", "saelab train needs --site, --tokens, --out"),
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


@pytest.mark.parametrize("text", ["1.5", "inf", "nan", "x", ""])
def test_only_whole_numbers_count_tokens(text):
    with pytest.raises(ConfigError, match="is not a whole number"):
        reader([int])(text)


def test_whole_numbers_are_exact_and_may_be_written_in_tens():
    assert [whole(text) for text in ("0", "-2", "1e3", "500_000", str(2**53 + 1))] == [0, -2, 1000, 500_000, 2**53 + 1]


def test_what_no_text_can_give_is_refused_when_the_command_is_made():
    assert kinds_of(torch.Tensor | None) == [type(None)]
    with pytest.raises(TypeError, match="cannot be written on a command line"):
        commands.command()(unsayable)


def unsayable(*, x: torch.Tensor) -> int:
    """Cannot be a command."""
    return 0


def lines() -> list[str]:
    """Every command there is, those of `saelab analyze` and `saelab hspace` too."""
    app = cli.application()
    names = {name: [n for n in app[name] if not n.startswith("-")] for name in cli.COMMANDS}
    return [f"{name} {part}" for name, parts in names.items() for part in parts] + [n for n in names if not names[n]]


@pytest.mark.parametrize("line", [*lines(), "analyze", "hspace"])
def test_help_ends_with_examples_to_copy(line, capsys):
    """Each line of them as it stands: none is so long that the help would break it."""
    assert cli.main([*line.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    examples = shown.partition("examples:\n")[2]
    assert f"saelab {line} " in f"{examples} ".replace("\n", " ") and max(map(len, examples.splitlines())) <= 80
    for command in examples.replace("\\\n", "").splitlines():
        if command.startswith("saelab"):
            app, arguments = cli.application(), shlex.split(command)[1:]
            cli._check_names(app, arguments)


@pytest.mark.parametrize(
    "line, message",
    [
        ("", "saelab needs a command: demo, train, sweep"),
        ("trian", "saelab has no command 'trian'; did you mean train?"),
        ("hspace", "saelab hspace needs a command: sample, directions, edit, report"),
        ("analyze dark-mater x", "did you mean dark-matter?"),
        ("train --tokenz 3", "saelab train has no --tokenz; did you mean --tokens"),
        ("train --tokenz=3", "saelab train has no --tokenz; did you mean --tokens"),
        ("train --token 3", "saelab train has no --token; did you mean --tokens"),
        ("train", "saelab train needs --site, --sae, --tokens, --out: give"),
        ("train --tokens few --site a --sae TopK(k=2,d_sae=4) --out b", "--tokens: 'few' is not a whole number"),
        ("train --tokens", "--tokens requires an argument"),
        ("sweep --saes --tokens 3", "--saes requires at least 1 element"),
        ("evaluate", "saelab evaluate needs SAE: give"),
        ("evaluate nowhere", "nowhere holds no run: there is no such folder"),
        ("evaluate a b", "'b'"),
        ("sites nowhere/at-all", "no model 'nowhere/at-all' can be loaded"),
        ("sites --device cuda:99", "device is 'cuda:99', and this machine has"),
        ("dashboard x --latents many", "'many' is not a whole number"),
        ("hspace directions t.st --n 5", "saelab hspace directions has no --n"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(line, message, capsys):
    assert cli.main(line.split()) == 2
    out, error = capsys.readouterr()
    assert message in error and error.count("\n") == 1 and not out


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
    command = [sys.executable, "-m", "saelab", "train", *model_and_text, *flags, *small]
    environment = os.environ | {"SAELAB_CACHE": str(tmp_path / "cache")}
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stderr is not None
        seen = b""
        while b"loss" not in seen and (more := process.stderr.read(64)):
            seen += more
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=60)
    assert process.returncode == 130, (seen + rest).decode()
    run = saelab.load_run(tmp_path / "run")
    assert run.interrupted and len(run.history)


def test_evaluate_asks_for_what_the_sae_does_not_say(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(inputs, "load", lambda path: SimpleNamespace(metadata={}))
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


# The function that a command takes all from, but what no line can say and what the command makes itself.
WHOLE: dict[str, tuple[Any, str]] = {
    "demo": (demonstration.demo, ""),
    "train": (saelab.train, "source"),
    "sweep": (saelab.sweep, "source corpus_and_saes"),
    "harvest": (saelab.harvest, "lm site dtype"),
    "evaluate": (saelab.evaluate, "lm"),
    "benchmark": (saelab.benchmark, "sae_or_saes lm"),
    "dashboard": (saelab.dashboards.build, "lm path evaluation seeds null sweeps"),
    "steer": (saelab.LanguageModel.generate, "self prompts use_cache"),
    "analyze attention": (attention.latent_families, "lm"),
    "analyze denoiser": (denoisers.overview_of, "denoiser images labels"),
    "convert": (saelab.load_sae, ""),
    "hspace sample": (hspace.sample, "edit cond record"),
    "hspace edit": (hspace.edit, "direction_or_list window mask record"),
    "hspace report": (hspace.effects, "strengths classifier classes targets data how"),
}
# The bundled corpus and model without a name; a page of all latents when it is asked for; memory in GiB; more than no noise
# for directions; an edit that shows; and what has a default only as an argument of Python.
OWN = {
    ("train", "corpus"), ("sweep", "corpus"), ("harvest", "corpus"), ("evaluate", "corpus"), ("dashboard", "corpus"),
    ("analyze attention", "corpus"), ("dashboard", "latents"), ("dashboard", "memory"),
    ("hspace sample", "eta"), ("hspace edit", "strength"),
    ("train", "site"), ("train", "out"), ("sweep", "site"), ("sweep", "out"), ("harvest", "sites"), ("harvest", "out"),
}  # fmt: skip


@pytest.mark.parametrize("line", lines())
def test_parameters_and_defaults_are_those_of_the_function(line):
    """Written there once: what the function takes the command takes, with its default and with words on what it is."""
    app = cli.application()
    _, apps, _ = app.parse_commands(line.split())
    arguments = {a.name.lstrip("-").replace("-", "_"): a for a in apps[-1].assemble_argument_collection()}
    assert not [name for name, argument in arguments.items() if not argument.parameter.help]
    whole, unsaid = WHOLE.get(line, (lambda: None, ""))
    assert set(inspect.signature(whole).parameters) - set(arguments) == set(unsaid.split())
    opening = [
        saelab.load_denoiser if line.startswith("hspace") or "denoiser" in line else saelab.load_model,
        saelab.load_corpus,
    ]
    for function in (whole, *(opening if line != "convert" else [])):
        for name, public in inspect.signature(function).parameters.items():
            if name in arguments and public.default is not public.empty and (line, name) not in OWN:
                argument = arguments[name]
                default = inspect.Parameter.empty if argument.required else argument.field_info.default
                assert default == public.default, name


def test_help_shows_the_functions_default(capsys):
    assert cli.main(["train", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert "vectors in a step. [default: 4096]" in shown and "--out TEXT folder for checkpoints" in shown
    assert "[required]" in shown and "smollm2-135m" in shown


def test_help_and_a_misspelt_command_load_no_torch():
    code = "import sys, saelab.cli; {}; sys.exit('torch' in sys.modules)"
    for call in ("saelab.cli.main(['--help'])", "saelab.cli.main(['trian'])"):
        subprocess.run([sys.executable, "-c", code.format(call)], check=True, capture_output=True)


def test_a_closed_pipe_is_no_traceback(tmp_path):
    """As with `saelab sites | head -1`: what is left to be written at the end goes nowhere."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "saelab", "hspace", "sample", "--n", "1", "--steps", "1", "--no-progress"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, cwd=tmp_path)
    os.close(writing)
    assert done.returncode == 141 and not done.stderr


def test_it_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "saelab", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == f"saelab {saelab.__version__}\n"


def test_completion_is_installed_on_request(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.main(["--install-completion", "--shell", "bash"]) == 0
    [script] = tmp_path.rglob("completions/saelab")
    said = "source {}; COMP_WORDS=(saelab {}); COMP_CWORD={}; _saelab; echo ${{COMPREPLY[@]}}"
    for words, at, expected in (("dash", 1, "dashboard"), ("dashboard --latent", 2, "--latents")):
        line = said.format(shlex.quote(str(script)), words, at)
        assert subprocess.run(["bash", "-c", line], capture_output=True, text=True).stdout == f"{expected}\n"


def test_sites_lists_those_of_a_model(model_and_text, capsys):
    assert cli.main(["sites", model_and_text[1], "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert shown.split()[:5] == ["name", "module", "width", "kind", "heads"] and SITE in shown


def test_one_file_serves_the_commands_of_a_group(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "h.yaml").write_text("denoiser: digits-unet\nn: 4\nsteps: 2\neta: 1\nmethod: pca\ncomponents: 1\n")
    flags = ["--config", "h.yaml", "--device", "cpu"]
    assert cli.main(["hspace", "sample", *flags, "--out", "t.safetensors"]) == 0
    assert cli.main(["hspace", "directions", "t.safetensors", *flags, "--out", "d.safetensors"]) == 0
    assert len(hspace.Trajectory.load("t.safetensors")) == 4 and len(hspace.Directions.load("d.safetensors")) == 1
    (tmp_path / "h.yaml").write_text("stepz: 2\n")
    assert cli.main(["hspace", "sample", *flags]) == 2 and "unknown key 'stepz'" in capsys.readouterr().err


def test_a_denoiser_is_analysed(tmp_path, capsys):
    line = ["analyze", "denoiser", "--sites", "mid_block", "--n", "2", "--steps", "3", "--lags", "1", "--device", "cpu"]
    assert cli.main([*line, "--csv", str(tmp_path / "tables")]) == 0
    shown = capsys.readouterr().out
    assert "effective_dimension" in shown and "Accuracy of linear probes" in shown
    assert (tmp_path / "tables" / "reuse.csv").read_text().startswith("site,lag,t,error\nmid_block,1,")


def test_the_last_of_two_flags_counts_and_lists_add_up(stand_in):
    it = stand_in()
    assert (
        cli.main([*TRAIN, "--tokens", "2000", "--loggers", "wandb", "--loggers", "tensorboard", "--no-progress"]) == 0
    )
    assert it.trained["tokens"] == 2000 and it.trained["loggers"] == ["wandb", "tensorboard"]
    assert it.trained["progress"] is False


def test_evaluate_leaves_to_the_sae_what_it_was_trained_with(stand_in, monkeypatch, capsys):
    it, asked = stand_in(), {}
    it.metadata = {"context_length": 128, "model": "m", "corpus": "c", "seed": 0}
    monkeypatch.setattr(inputs, "load", lambda path: it)
    monkeypatch.setitem(saelab.__dict__, "evaluate", lambda sae, lm, corpus, **how: asked.update(how))
    assert cli.main(["evaluate", "runs/x"]) == 0
    assert asked["context_length"] is None and asked["prepend_bos"] is None
    assert cli.main(["evaluate", "runs/x", "--context-length", "64"]) == 0 and asked["context_length"] == 64


def test_convert_writes_what_another_library_reads_and_reads_it_back(tmp_path, capsys):
    sae = saelab.SAE(saelab.TopK(k=2, d_sae=8), 4)
    sae.save(tmp_path / "mine")
    there, back = str(tmp_path / "layers.3"), str(tmp_path / "back")
    assert cli.main(["convert", str(tmp_path / "mine"), there, "--format", "sparsify"]) == 0
    assert sorted(path.name for path in (tmp_path / "layers.3").iterdir()) == [
        "cfg.json",
        "manifest.json",
        "sae.safetensors",
    ]
    assert cli.main(["convert", there, back, "--site", SITE]) == 0
    again = saelab.SAE.load(back)
    assert torch.equal(again.W_dec, sae.W_dec) and again.metadata["site"] == SITE
    assert cli.main(["convert", there, back, "--format", "sparsefy"]) == 2
    assert "use one of 'saelens'" in capsys.readouterr().err


def test_a_line_is_read_where_pydantic_is_imported(tmp_path, monkeypatch):
    pytest.importorskip("pydantic")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["hspace", "sample", "--n", "1", "--steps", "2", "--out", "d.safetensors", "--no-progress"]) == 0
    assert cli.main(["harvest", "--model", "nowhere", "--sites", "a", "b", "--tokens", "8", "--out", "x"]) == 2
