"""What a steering context leaves: figures, files that replay, errors at exit, and no hook."""

import json
import math
from pathlib import Path

import pytest
import torch

import saelab
from saelab import cli, steering
from saelab.base.errors import ConfigError, FormatError, InterventionError, SiteError
from saelab.models.generation import Seed, generate_ids, generate_text
from saelab.steering import Direction, Scope
from tests import tiny
from tests.toy_steering import PROMPTS, SITE, TEXTS, busy, doubles, hooks_of, sae_of


@pytest.fixture(scope="module")
def lm():
    return doubles()[0]


@pytest.fixture(scope="module")
def sae(lm):
    return sae_of(lm)


def push(sae, strength=3.0, **more):
    return steering.add(sae, busy(sae, 1)[0], strength=strength, **more)


# hooks


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, InterventionError])
def test_no_hook_is_left_after_an_error_and_the_error_is_the_bodys(lm, sae, error):
    plain = lm.logits(TEXTS)
    with (
        pytest.raises(error),
        lm.steer(push(sae), steering.ablate(sae, busy(sae, 2)[1], site="blocks.2.hook_resid_post")),
    ):
        assert hooks_of(lm) > 0
        raise error
    assert hooks_of(lm) == 0 and lm.receipts == [] and torch.equal(lm.logits(TEXTS), plain)


def test_no_hook_is_left_after_an_interrupt_in_the_middle_of_a_forward_pass(lm, sae):
    def interrupt(x, where):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), lm.steer(push(sae)), lm.intervene("blocks.3.hook_resid_pre", interrupt):
        lm.generate(PROMPTS, 5)
    assert hooks_of(lm) == 0 and lm.receipts == []


def test_no_hook_is_left_by_closed_generators_in_any_order(lm, sae):
    def texts(strength):
        with lm.steer(push(sae, strength)):
            while True:
                yield lm.generate("The", 3)

    plain = lm.logits(TEXTS)
    first, second = texts(1.0), texts(2.0)
    next(first), next(second)
    assert len(lm.receipts) == 2
    first.close()
    next(second)
    second.close()
    assert hooks_of(lm) == 0 and lm.receipts == [] and torch.equal(lm.logits(TEXTS), plain)


def test_no_hook_is_left_when_a_second_operation_is_wrong(lm, sae):
    with pytest.raises(SiteError), lm.steer(push(sae), push(sae, site="blocks.1.mlp.hook_pre")):
        pass
    assert hooks_of(lm) == 0


def test_weights_and_random_state_stay(lm, sae):
    before = [p.clone() for p in (*lm.model.parameters(), *sae.parameters(), *sae.buffers())]
    state = torch.get_rng_state()
    with lm.steer(push(sae), steering.project_out(sae, busy(sae, 2)[1])):
        lm.generate(PROMPTS, 5)
    after = [*lm.model.parameters(), *sae.parameters(), *sae.buffers()]
    assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(before, after, strict=True))
    assert torch.equal(state, torch.get_rng_state()) and all(p.grad is None for p in after)


# what is an error at exit


def test_a_hook_that_does_not_fire_is_an_error(lm, sae):
    with pytest.raises(InterventionError, match=rf"{SITE} never ran"), lm.steer(push(sae)):
        pass
    with pytest.raises(InterventionError, match="never ran"), lm.steer(push(sae)):
        lm.record(TEXTS, "blocks.0.hook_resid_post")  # stops before the site


def test_nothing_touched_is_an_error_that_names_the_operation(lm, sae):
    missing = push(sae, scope=Scope(tokens=[255]))
    with (
        pytest.raises(InterventionError, match=r"touched no position in 1 calls .*tokens=\(255,\)"),
        lm.steer(push(sae), missing),
    ):
        lm.logits(TEXTS)
    with pytest.raises(InterventionError, match="first token"), lm.steer(push(sae)):
        lm.logits("a")


def test_gradients_flow_through_steering(lm, sae):
    x = torch.zeros(32, dtype=torch.float64, requires_grad=True)
    tokens = lm.tokenize("abcdef")
    with lm.intervene("blocks.0.hook_resid_post", lambda h, where: h + x), lm.steer(push(sae)):
        lm.token_losses(tokens).sum().backward()
    assert x.grad is not None and bool(x.grad.abs().sum() > 0)


# any module, any model


def test_any_module_path_and_any_call_of_the_model(lm, sae):
    direction = Direction(torch.randn(64, dtype=torch.float64), name="noise", residual_norm=0.1)
    for site in ("model.layers.2.mlp.up_proj", "layers.2.mlp.act_fn", "model.layers.2.mlp.down_proj.input"):
        tokens = lm.tokenize(TEXTS)
        plain = lm.logits(tokens)
        with lm.steer(steering.add(direction, strength=2.0, site=site)) as receipt:
            steered = lm.model(input_ids=tokens.ids, attention_mask=tokens.mask.long()).logits.detach()
        assert not torch.equal(steered[tokens.mask], plain[tokens.mask])
        assert receipt.to_pandas().site[0] == site and receipt.to_pandas().relative_change[0] > 0
    ids = tokens.ids[:1, : tokens.lengths[0]]
    with lm.steer(steering.add(direction, strength=2.0, site=site)):
        theirs = lm.model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=257)
        ours = generate_ids(lm, lm.to_tokens(ids), 8, temperature=0)
    assert ours[0] == [t for t in theirs[0, ids.shape[1] :].tolist() if t != 256]


def test_the_head_sees_the_last_position_alone(lm):
    """With a cache or without: where a model runs its head on the last position only, the scope is that position's."""
    only = torch.zeros(258, dtype=torch.float64)
    only[65] = 100.0
    always = steering.add(only, strength=1.0, unit="activation", site="lm_head", scope=Scope(prompt=False))
    for use_cache in (True, False):
        with lm.steer(always) as receipt:
            ids = generate_ids(lm, lm.tokenize(["abcdef", "xy"]), 5, temperature=0, use_cache=use_cache)
        assert [row[1:] for row in ids] == [[65] * 4] * 2  # the first is drawn from the prompt's last position
        assert receipt.to_pandas().positions[0] == 8


def test_transformer_lens_objects(tmp_path):
    from tests.models.test_models_families import bridge_of

    model = tiny.llama_model()
    plain = saelab.load_model(model, tokenizer=tiny.byte_tokenizer(), device="cpu")
    bridge = saelab.load_model(bridge_of(model, tmp_path), device="cpu")
    sae = sae_of(plain).float()
    made = [push(sae), steering.clamp(sae, busy(sae, 2)[1], strength=2.0, site="blocks.2.hook_out")]
    found = []
    for lm in (plain, bridge):
        with lm.steer(*made) as receipt:
            tokens = plain.tokenize(PROMPTS)
            found.append((lm.logits(tokens)[tokens.mask], receipt.to_pandas().positions.tolist()))
    assert found[0][1] == found[1][1]
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)


# figures


def test_counts_with_and_without_a_cache(lm, sae):
    for use_cache, calls, positions in ((True, 4, 5 + 3), (False, 4, 5 + 6 + 7 + 8)):
        with lm.steer(push(sae)) as receipt:
            generate_ids(lm, lm.tokenize("abcdef"), 4, temperature=0, use_cache=use_cache)
        line = receipt.to_pandas().iloc[0]
        assert (line.calls, line.positions, line.changed) == (calls, positions, positions)


def test_figures_do_not_depend_on_when_they_are_read(lm, sae):
    made = [push(sae), steering.clamp(sae, busy(sae, 2)[1], strength=2.0, scope=Scope(prompt=False))]
    tables = []
    for often in (False, True):
        with lm.steer(*made) as receipt:
            for _ in range(2):
                generate_ids(lm, lm.tokenize(PROMPTS), 6)
                if often:
                    receipt.to_pandas()
        tables.append(receipt.to_pandas())
    once, twice = tables
    assert once.positions.tolist() == twice.positions.tolist() == once.latent_positions.tolist()
    for column in ("relative_change", "latent_before", "latent_after"):
        assert twice[column].tolist() == pytest.approx(once[column].tolist(), rel=1e-9)
    assert once.latent_after[1] > once.latent_before[1] and "Receipt of 2 operations" in repr(receipt)


def test_latents_are_read_at_the_first_positions_of_each_operation(lm, sae, monkeypatch):
    monkeypatch.setattr("saelab.steering.receipt._LATENT_POSITIONS", 3)
    latent = busy(sae, 1)[0]
    made = [
        steering.add(sae, latent, strength=1.0),
        steering.scale(sae, latent, strength=1.0, scope=Scope(prompt=False)),
    ]
    with lm.steer(*made) as receipt:
        ids = generate_ids(lm, lm.tokenize("abcdef"), 6, temperature=0)[0]
    table = receipt.to_pandas()
    assert table.positions.tolist() == [10, 5] and table.latent_positions[0] >= 3 and table.latent_positions[1] == 3
    codes = sae.encode(lm.record("abcdef", SITE)[0, 1:4]).detach()[:, latent]
    assert table.latent_positions[0] == 3 + 3 and len(ids) == 6  # the later ones are read for both
    with lm.steer(made[0]) as receipt:
        lm.logits("abcdef")
    assert receipt.to_pandas().latent_before[0] == pytest.approx(codes.mean().item(), rel=1e-9)


# replay


def test_a_receipt_replays(lm, sae, tmp_path):
    sae.save(tmp_path / "sae")
    direction = steering.measured(Direction(torch.randn(32, dtype=torch.float64), SITE, "noise"), lm, TEXTS)
    with (
        lm.steer(push(sae)) as outer,
        lm.steer(steering.add(direction, strength=0.4, scope=Scope(prompt=False))) as inner,
    ):
        texts = lm.generate(PROMPTS, 8, seed=4)
        single = lm.generate("We", 5, temperature=0, use_cache=False)
    assert texts != lm.generate(PROMPTS, 8, seed=4)
    for receipt in (outer, inner):
        receipt.save(tmp_path / "receipt.json")
        assert steering.replay(tmp_path / "receipt.json", lm) == [texts, [single]]
    content = json.loads((tmp_path / "receipt.json").read_text())
    assert content == json.loads(json.dumps(inner.to_dict()))
    assert content["model"]["digest"] == lm.digest and content["autoencoders"][0]["path"] == str(tmp_path / "sae")
    assert [hook["operation"] for hook in content["hooks"]] == ["add"] and content["hooks"][0]["positions"] > 0
    assert content["generations"][0]["prompt_texts"] == PROMPTS and content["generations"][0]["seed"] == 4


def test_a_receipt_of_rows_replays(lm, sae):
    one, two = push(sae), steering.ablate(sae, busy(sae, 2)[1])
    seed: Seed = [(7, 2), (7, 0), (8, 1)]
    with steering.steer_rows(lm, [[one, two], [], [one]]) as receipt:
        texts = generate_text(lm, PROMPTS, 6, 1.0, seed, True)
    assert steering.replay(json.loads(json.dumps(receipt.to_dict())), lm, [sae]) == [texts]


def test_what_cannot_be_replayed(lm, sae, tmp_path):
    other = saelab.SAE(sae.cfg, 32, sae.metadata, seed=1).double()
    with lm.steer(push(other, unit="activation")) as receipt:
        lm.logits("abc")
    with pytest.raises(ConfigError, match="nothing was generated"):
        steering.replay(receipt.to_dict(), lm)
    with lm.steer(push(other, unit="activation")) as receipt:
        lm.generate("abc", 3)
    with pytest.raises(ConfigError, match=r"saved at None .*saes="):
        steering.replay(receipt.to_dict(), lm)
    assert len(steering.replay(receipt.to_dict(), lm, [sae, other])) == 1
    with pytest.raises(ConfigError, match="give the model"):
        steering.replay(receipt.to_dict(), doubles()[1], [other])
    other.save(tmp_path / "sae")
    content = receipt.to_dict()
    sae.save(tmp_path / "sae")
    with pytest.raises(ConfigError, match="another one than the receipt's"):
        steering.replay(content, lm)
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(FormatError, match="no receipt"):
        steering.replay(tmp_path / "a.json", lm)
    (tmp_path / "a.json").write_text(json.dumps(content | {"format": 99}))
    with pytest.raises(FormatError, match="format is 99, not 1"):
        steering.replay(tmp_path / "a.json", lm)


# the command line


@pytest.fixture
def command(lm, sae, tmp_path, monkeypatch, capsys):
    sae.metadata["model"] = "tiny"
    sae.save(tmp_path / "sae")
    monkeypatch.setitem(saelab.__dict__, "load_model", lambda name, device="auto": lm)

    def run(*arguments):
        code = cli.main(["steer", *arguments])
        return code, capsys.readouterr()

    return run, str(tmp_path / "sae"), str(tmp_path / "receipt.json")


def test_steer_and_replay_on_the_command_line(command, lm, sae):
    run, folder, file = command
    latent = busy(sae, 1)[0]
    code, printed = run("--sae", folder, "--latent", str(latent), "--prompt", "The state", "My fellow", "--strength", "3",
                        "--max-new-tokens", "6", "--seed", "2", "--receipt", file)  # fmt: skip
    plain = lm.generate(["The state", "My fellow"], 6, seed=2)
    with lm.steer(steering.add(sae, latent, strength=3.0)):
        steered = lm.generate(["The state", "My fellow"], 6, seed=2)
    assert code == 0 and plain != steered
    for text in (*plain, *steered):
        assert text in printed.out
    assert "relative_change" in printed.out
    code, printed = run("--replay", file)
    assert code == 0 and printed.out.strip().endswith("the same text") and steered[1] in printed.out
    content = json.loads(Path(file).read_text())
    content["generations"][0]["texts"][0] = "something else"
    Path(file).write_text(json.dumps(content))
    code, printed = run("--replay", file, "--sae", folder)
    assert code == 1 and "not the same text" in printed.out


def test_other_operations_and_candidates_on_the_command_line(command, sae):
    run, folder, _ = command
    code, printed = run("--sae", folder, "--latent", *map(str, busy(sae, 2)), "--operation", "ablate",
                        "--prompt", "The state", "--max-new-tokens", "3")  # fmt: skip
    assert code == 0 and printed.out.count("ablate") == 2
    code, printed = run("--sae", folder, "--find", "The state of the union")
    assert code == 0 and "usual_share" in printed.out


def test_errors_on_the_command_line(command):
    run, folder, _ = command
    for arguments, match in (
        ([], "Give --sae"),
        (["--sae", folder], "give --latent"),
        (["--sae", folder, "--latent", "999", "--prompt", "The state"], "from 0 to 47"),
        (
            ["--sae", folder, "--latent", "1", "--prompt", "The state", "--operation", "push"],
            "unknown operation 'push'",
        ),
    ):
        code, printed = run(*arguments)
        assert code == 2 and match in printed.err


def test_infinite_caps_survive_the_file(lm, sae, tmp_path):
    with lm.steer(steering.cap(sae, busy(sae, 1)[0], strength=math.inf)) as receipt:
        text = lm.generate("The state", 3)
    receipt.save(tmp_path / "a.json")
    assert steering.replay(tmp_path / "a.json", lm, [sae]) == [[text]]
