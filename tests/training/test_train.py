import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch

import saelab
from saelab import CheckpointError, ConfigError, DataError, SiteError, TopK
from saelab.autoencoders import objectives
from saelab.autoencoders.sae import SAE
from saelab.training import checkpoint, step
from saelab.training.norms import NormFilter
from saelab.training.pieces import ItemPieces
from saelab.training.schedule import Schedule
from saelab.training.sources import StreamSource


def planted(n=4000, d=16, f=48, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.nn.functional.normalize(torch.randn(f, d, generator=generator), dim=1)
    codes = torch.rand(n, f, generator=generator) * (torch.rand(n, f, generator=generator) < 3 / f)
    return codes @ features * 50 + 1


def run_on(x, **arguments):
    defaults = {"sae": TopK(k=3, d_sae=64), "tokens": 20_000, "batch_size": 256, "progress": False, "lr": 3e-3}
    return saelab.train(x, **defaults | arguments)


def test_training_explains_planted_features_and_records_it():
    run = run_on(planted(), tokens=60_000)
    history = run.history
    assert list(history.columns[:8]) == [
        "step",
        "tokens",
        "loss",
        "l0",
        "explained_variance",
        "dead",
        "lr",
        "tokens_per_second",
    ]
    assert history.explained_variance.iloc[-1] > 0.85 > 0.5 > history.explained_variance.iloc[0]
    assert history.tokens.iloc[-1] == 60_000 and history.step.iloc[-1] == 235
    assert not run.interrupted and run.path is None
    assert run.sae.latent_stats.density.shape == (64,)
    assert "explained variance" in repr(run)
    assert len(run.plot().data) == 4


def test_the_same_seed_gives_the_same_bits_and_another_seed_others():
    x = planted()
    first, again, other = run_on(x, tokens=2000), run_on(x, tokens=2000), run_on(x, tokens=2000, seed=1)
    assert torch.equal(first.sae.W_dec, again.sae.W_dec)
    assert not torch.equal(first.sae.W_dec, other.sae.W_dec)


def test_nothing_of_the_users_is_changed():
    x = planted(500)
    kept, state, dtype = x.clone(), torch.get_rng_state(), torch.get_default_dtype()
    sae = run_on(x, tokens=1000).sae
    weights = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    more = run_on(x, sae=sae, tokens=1000)
    assert torch.equal(x, kept) and torch.equal(torch.get_rng_state(), state) and torch.get_default_dtype() == dtype
    assert all(torch.equal(sae.state_dict()[name], tensor) for name, tensor in weights.items())
    assert not torch.equal(more.sae.W_dec, sae.W_dec)
    assert all(parameter.grad is None for parameter in sae.parameters())


def test_going_on_improves():
    x = planted()
    first = run_on(x, tokens=5000)
    more = run_on(x, sae=first.sae, tokens=10_000)
    assert more.history.explained_variance.iloc[-1] > first.history.explained_variance.iloc[-1]


def test_statistics_of_latents_equal_a_count():
    x = planted(1024)
    sae = run_on(x, tokens=51_200, lr=1e-9).sae  # the weights stand still, so the last span saw this SAE
    codes, stats = sae.encode(x), sae.latent_stats
    fires = codes > 0
    torch.testing.assert_close(stats.density, fires.float().mean(0), rtol=0.03, atol=1e-3)
    torch.testing.assert_close(stats.max, codes.amax(0), rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(stats.mean, codes.sum(0) / fires.sum(0).clamp(min=1), rtol=0.03, atol=0.05)
    torch.testing.assert_close(stats.std, (x @ sae.W_dec.T).std(0), rtol=0.05, atol=0.1)


def test_input_scale_is_a_power_of_two_and_changes_nothing_at_all():
    x = planted(1000)
    small, large = run_on(x, tokens=2000).sae, run_on(x * 1024, tokens=2000).sae
    assert torch.equal(small.W_dec, large.W_dec)
    assert torch.equal(small(x) * 1024, large(x * 1024))


def test_the_decoder_gradient_is_orthogonal_to_its_rows():
    sae = SAE(TopK(k=2, d_sae=1100), 8)
    sae.W_dec.grad = torch.randn_like(sae.W_dec)
    step.remove_parallel_gradient(sae.W_dec)
    assert float((sae.W_dec.grad * sae.W_dec.detach()).sum(1).abs().max()) < 1e-5


@pytest.mark.parametrize("n_dead", [0, 1, 5, 12, 60])
def test_aux_k_equals_its_definition(n_dead):
    torch.manual_seed(1)
    error, x, W_enc, b, W_dec = (
        torch.randn(7, 5),
        torch.randn(7, 5),
        torch.randn(60, 5),
        torch.randn(60),
        torch.randn(60, 5),
    )
    dead = torch.zeros(60, dtype=torch.bool)
    dead[torch.randperm(60)[:n_dead]] = True
    found = objectives.aux_k(error, x, W_enc, b, W_dec, dead.nonzero().squeeze(1), 3)
    if not n_dead:
        assert float(found) == 0
        return
    scores = (x @ W_enc.T + b).relu().masked_fill(~dead, 0)
    top = scores.topk(3, dim=1)
    error_hat = torch.zeros_like(scores).scatter(1, top.indices, top.values) @ W_dec
    wanted = (error - error_hat).square().sum() / (error - error.mean(0)).square().sum() * min(1, n_dead / 3)
    torch.testing.assert_close(found, wanted)


def test_aux_k_revives_dead_latents():
    x = planted()
    start = SAE(TopK(k=3, d_sae=64), 16)
    with torch.no_grad():
        start.encoder_bias[:32] = -1e3 * 32
    with_aux = run_on(x, sae=start, tokens=40_000, lr=3e-2)
    without = run_on(x, sae=_with_cfg(start, TopK(k=3, d_sae=64, aux_coefficient=0.0)), tokens=40_000, lr=3e-2)
    assert without.history.dead.iloc[-1] >= 32 > 0
    assert with_aux.history.aux.max() > 0 and "aux" not in without.history


def _with_cfg(sae, cfg):
    other = SAE(cfg, sae.d_in)
    other.load_state_dict(sae.state_dict())
    return other


def test_schedule_is_relative():
    short, long = Schedule(20_480, 4096), Schedule(10**9, 4096)
    assert short.lr_factor(0) == 1 and short.steps == 5 and short.dead_after == 8 * 4096
    assert long.lr_factor(999) == 1 > long.lr_factor(998) and long.dead_after == 10_000_000
    assert long.lr_factor(long.steps - 1) < 1e-4
    assert Schedule(4096 * 16_000, 4096).short_run_boost == 1 == long.short_run_boost
    assert Schedule(4096 * 4000, 4096).short_run_boost == 2 and short.short_run_boost == 8
    assert [Schedule(10_001, 4096).rows(i) for i in range(3)] == [3333, 3334, 3334]


@pytest.mark.parametrize("tokens", [1, 255, 257, 513])
def test_any_number_of_tokens_and_rows_that_do_not_vary(tokens):
    assert run_on(planted(300), tokens=tokens).history.tokens.iloc[-1] == tokens
    assert run_on(torch.ones(300, 4), tokens=tokens).history.loss.iloc[-1] < 1e9
    assert run_on(torch.zeros(300, 4), tokens=tokens).history.loss.iloc[-1] == 0


def test_high_norm_rows_are_left_out_counted_and_reported():
    x = planted(2000)
    x[::100] = 50 * x[::100].abs().amax() * torch.randn(20, 16).sign()
    run = run_on(x, tokens=2000)
    assert run.report["high_norm_fraction"] == pytest.approx(0.01)
    assert run.report["high_norm_variance_share"] > 0.9
    assert run.sae.metadata["max_norm"] == 4.0
    assert run.sae.replaceable(x).float().mean() == pytest.approx(0.99)
    assert run_on(x, tokens=2000, max_norm=None).report["high_norm_fraction"] == 0


def test_the_share_of_the_variance_is_the_plain_one():
    x = planted(300)
    x[5] *= 40
    norms = NormFilter(4.0, 16)
    norms.see(x)
    keep = norms.keep(x)
    deviation = (x.double() - x.double().mean(0)).square().sum(1)
    assert norms.report()["high_norm_variance_share"] == pytest.approx(float(deviation[~keep].sum() / deviation.sum()))
    assert norms.median == pytest.approx(float(x.norm(dim=1).median()), rel=0.012)


def test_every_kept_row_serves_once_an_epoch():
    pieces = ItemPieces([torch.arange(i * 10, i * 10 + 10.0)[:, None] + 1 for i in range(30)], seed=0)
    pieces.most = 10
    source = StreamSource(pieces, 50, 0, None, total=600, say=lambda m: None)
    drawn = torch.cat([source.next(20)["x"] for _ in range(15)]).flatten()
    assert sorted(drawn.tolist()) == [float(i) for i in range(1, 301)]
    assert source.epoch == 0
    again = torch.cat([source.next(20)["x"] for _ in range(15)]).flatten()
    assert sorted(again.tolist()) == sorted(drawn.tolist()) and again.tolist() != drawn.tolist()


def test_a_one_shot_iterator_serves_one_epoch():
    x = planted(3000)
    run = run_on(iter(x.split(500)), tokens=2000)
    assert len(run.history)
    with pytest.raises(ConfigError, match="3,000 rows"):
        run_on(iter(x.split(500)), tokens=5000)


def test_pairs_train_a_map():
    x = planted()
    y = torch.roll(x, 3, dims=1)
    run = run_on((x, y), tokens=150_000)
    explained = 1 - (y - run.sae(x).detach()).square().sum() / (y - y.mean(0)).square().sum()
    assert float(explained) > 0.5
    with pytest.raises(ConfigError, match="16 and the target 10"):
        run_on((x, y[:, :10]))
    with pytest.raises(DataError, match="aligned"):
        run_on((x, y[:100]))


@pytest.mark.parametrize(
    ("source", "arguments", "error", "message"),
    [
        (torch.randn(10, 4), {"tokens": 0}, ConfigError, "tokens is 0"),
        (torch.randn(10, 4), {"resume": "always"}, ConfigError, "always"),
        (torch.randn(10, 4, 2), {}, DataError, r"\[10, 4, 2\]"),
        (torch.ones(10, 4, dtype=torch.int64), {}, DataError, "int64"),
        (torch.full((10, 4), float("nan")), {}, DataError, "10 of 10"),
        (torch.randn(0, 4), {}, DataError, "no rows"),
        (torch.nn.Linear(2, 2), {}, ConfigError, "load_model"),
        (torch.randn(10, 4), {"corpus": ["a"]}, ConfigError, "Tensor"),
        (3, {}, ConfigError, "int"),
        ([], {}, DataError, "empty"),
        ([torch.randn(3)], {}, DataError, "item 0"),
        (
            [torch.randn(600, 4)],
            {"buffer_tokens": 100},
            ConfigError,
            "buffer of 100 tokens is smaller than the batch of 256",
        ),
        ([torch.randn(600, 4)], {"buffer_tokens": 500}, ConfigError, "2,304 or more"),
        (torch.randn(10, 4), {"loggers": ["mlflow"]}, ConfigError, "mlflow"),
        (torch.randn(10, 4), {"evaluate_every": 10}, ConfigError, "evaluate_every"),
        (torch.randn(10, 4), {"sae": "TopK"}, ConfigError, "sae is 'TopK'; give a configuration"),
    ],
)
def test_bad_arguments_say_the_way_out(source, arguments, error, message):
    with pytest.raises(error, match=message):
        run_on(source, **arguments)


def test_a_nan_in_a_stream_is_named_and_the_weights_survive():
    bad = torch.randn(100, 4)
    bad[7] = float("inf")
    with pytest.raises(DataError, match="item 2"):
        run_on([torch.randn(600, 4), torch.randn(600, 4), bad], tokens=5000, batch_size=128)


def test_an_sae_of_another_width_is_refused():
    with pytest.raises(SiteError, match="width 4 .* 16"):
        run_on(planted(), sae=SAE(TopK(k=2, d_sae=8), 4))


def test_loggers_get_every_row():
    class Log:
        def __init__(self):
            self.rows, self.closed = [], False

        def log(self, row):
            self.rows.append(row)

        def close(self):
            self.closed = True

    log = Log()
    run = run_on(planted(), tokens=2000, loggers=[log])
    assert log.closed and log.rows == run.rows


def test_a_finished_run_is_returned_and_another_refused(tmp_path):
    x = planted()
    run = run_on(x, tokens=4000, out=tmp_path / "run")
    again = run_on(x, tokens=4000, out=tmp_path / "run")
    assert torch.equal(run.sae.W_dec, again.sae.W_dec) and again.path == tmp_path / "run"
    assert torch.equal(saelab.load_run(tmp_path / "run").sae.W_dec, run.sae.W_dec)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [".lock", "history.csv", "run.json", "sae"]
    with pytest.raises(CheckpointError, match="seed: 0 there, 1 asked"):
        run_on(x, tokens=4000, out=tmp_path / "run", seed=1)
    with pytest.raises(CheckpointError, match="rows"):
        run_on(x + 1, tokens=4000, out=tmp_path / "run")
    with pytest.raises(CheckpointError, match="already"):
        run_on(x, tokens=4000, out=tmp_path / "run", resume="never")


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="notes.txt"):
        run_on(planted(), out=tmp_path)
    with pytest.raises(CheckpointError, match="no run"):
        saelab.load_run(tmp_path)


def test_two_writers_are_kept_apart(tmp_path):
    with checkpoint.locked(tmp_path), pytest.raises(CheckpointError, match="another process"):
        run_on(planted(), out=tmp_path)


def interrupting(at):
    """A logger that presses Ctrl-C when a step is logged."""

    class Interrupt:
        def log(self, row):
            if row["step"] == at:
                os.kill(os.getpid(), signal.SIGINT)

        def close(self):
            pass

    return Interrupt()


@pytest.mark.parametrize("streamed", [False, True])
def test_ctrl_c_gives_a_usable_run_that_continues_to_the_same_bits(tmp_path, streamed):
    x = planted()
    source = list(x.split(1000)) if streamed else x
    arguments = {"tokens": 6000, "log_every": 1, "buffer_tokens": 2400}
    whole = run_on(source, **arguments)
    handler = signal.getsignal(signal.SIGINT)
    part = run_on(source, out=tmp_path / "run", loggers=[interrupting(9)], **arguments)
    assert signal.getsignal(signal.SIGINT) is handler
    assert part.interrupted and part.history.step.iloc[-1] == 9
    assert saelab.load_run(tmp_path / "run").interrupted
    part.sae(x[:4])
    rest = run_on(source, out=tmp_path / "run", **arguments)
    assert not rest.interrupted and rest.history.step.tolist() == whole.history.step.tolist()
    for name, tensor in whole.sae.state_dict().items():
        assert torch.equal(rest.sae.state_dict()[name], tensor), name
    assert rest.history.loss.tolist() == whole.history.loss.tolist()


def test_a_thread_can_train():
    runs = []
    thread = threading.Thread(target=lambda: runs.append(run_on(planted(), tokens=1000)))
    thread.start()
    thread.join()
    assert len(runs) == 1


KILLED = """
import sys, torch, saelab
from tests.training.test_train import planted
saelab.train(list(planted(20_000).split(1000)), sae=saelab.TopK(k=3, d_sae=256), tokens=200_000, batch_size=512, lr=1e-3,
             buffer_tokens=4096, out=sys.argv[1], checkpoint_every=4096, progress=False)
"""


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(tmp_path):
    def start(name):
        command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path / name)]
        return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})

    assert start("whole").wait() == 0
    delays = torch.rand(5, generator=torch.Generator().manual_seed(4)).tolist()
    killed = 0
    for delay in itertools.cycle(delays):
        process = start("killed")
        deadline = time.monotonic() + 60
        before = set((tmp_path / "killed" / "checkpoints").glob("step_*"))
        while set((tmp_path / "killed" / "checkpoints").glob("step_*")) <= before and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(delay * 0.2)
        if killed == 5 or process.poll() is not None:
            assert process.wait() == 0
            break
        process.kill()
        process.wait()
        killed += 1
    assert killed >= 3
    whole, again = (saelab.load_run(tmp_path / name).sae.state_dict() for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path):
    tensors = {"a": torch.arange(3.0)}
    for number in (1, 2):
        checkpoint.save(tmp_path, number, tensors, [])
    newest = tmp_path / "checkpoints" / "step_00000002" / checkpoint.TENSORS
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="going back"):
        found = checkpoint.load_latest(tmp_path)
    assert found is not None and found[0] == 1
    older = tmp_path / "checkpoints" / "step_00000001" / checkpoint.HISTORY
    older.write_text("[1]")
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoint.load_latest(tmp_path)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    code = """
    import resource, sys, torch
    from pathlib import Path
    from saelab import CheckpointError
    from saelab.training import checkpoint
    folder = Path(sys.argv[1])
    checkpoint.save(folder, 1, {"a": torch.zeros(10)}, [])
    import signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        checkpoint.save(folder, 2, {"a": torch.zeros(100_000)}, [])
    except CheckpointError as error:
        assert "bytes free" in str(error), error
        step, tensors, history = checkpoint.load_latest(folder)
        assert step == 1 and len(list((folder / "checkpoints").iterdir())) == 1
        print("kept")
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    assert "kept" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_trackers_are_asked_only_by_name_and_get_the_rows(monkeypatch):
    import types

    calls = []
    wandb_run = types.SimpleNamespace(
        log=lambda row, step: calls.append(("wandb", step)), finish=lambda: calls.append("end")
    )
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **kwargs: wandb_run))

    class SummaryWriter:
        def __init__(self, folder):
            calls.append(("tensorboard", folder))

        def add_scalar(self, name, value, step):
            calls.append((name, step))

        def close(self):
            calls.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    run_on(planted(500), tokens=512, loggers=["wandb", "tensorboard"])
    assert ("wandb", 1) in calls and ("loss", 2) in calls and calls[-2:] == ["closed", "end"]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        run_on(planted(500), tokens=512, loggers=["wandb"])
