"""Sweeps: each cell as it is alone, controls, resuming, interrupts, tables."""

import _thread
import copy
import json
import math
import signal

import numpy as np
import pandas as pd
import pytest
import torch

import saelab
from saelab import CheckpointError, ConfigError, InterventionError, steering
from saelab.base.statistics import kl
from saelab.models.generation import generate_ids
from saelab.steering import experiments, grid, observe
from saelab.steering import text_measures as measures
from saelab.steering.ranks import at_equal_divergence
from saelab.steering.records import MEASURES, OF_THE_STEERING, OF_THE_TEXT
from tests import tiny, toy_sweep

PROMPTS = ["The economy", "My fellow citizens: in", "We"]
SMALL = {"max_new_tokens": 5, "progress": False}


@pytest.fixture(scope="module")
def llama(tiny_tokenizer):
    """In fp64, so that a text does not hang on the batch that it was made in."""
    return saelab.load_model(tiny.llama_model().double(), tokenizer=tiny_tokenizer, device="cpu")


@pytest.fixture(scope="module")
def trained(llama):
    sae, live = toy_sweep.trained(llama)
    return sae.double(), live


@pytest.fixture(scope="module")
def small(llama, trained):
    """Every operation on two latents, two strengths, two seeds."""
    sae, live = trained
    return steering.sweep(
        llama, sae, live[:2], grid.OPERATIONS, [0.5, 8.0], PROMPTS, seeds=[0, 3], draws=2, batch_size=48, **SMALL
    )


def verb(row, sae):
    strength = None if math.isnan(row.strength) else row.strength
    latent = int(row.latent if pd.isna(row.control) else row.control)
    return getattr(steering, row.operation)(sae, latent, strength=strength)


# the grid


def test_every_cell_is_there_once(small, trained):
    _, live = trained
    table = small.to_pandas()
    per_latent = (4 * 2 + 2) * len(PROMPTS) * 2
    counts = table.baseline.value_counts()
    assert counts.to_dict() == {"none": 6, "steered": 2 * per_latent, "random_direction": 4 * per_latent,
                                "random_latent": 4 * per_latent}  # fmt: skip
    assert len(small) == small.total == len(table) and not small.interrupted
    assert not table.duplicated(["baseline", "latent", "operation", "strength", "draw", "prompt_id", "seed"]).any()
    assert table[table.operation.isin(["ablate", "project_out"])].strength.isna().all()
    assert set(table.unit.dropna()) == {"max_activation"} and table[table.operation == "scale"].unit.isna().all()
    assert set(table.latent.dropna()) == set(live[:2]) and table.row.tolist() == list(range(len(table)))
    assert not set(table.control.dropna()) & set(live[:2])
    assert table.prompt.tolist() == [PROMPTS[i] for i in table.prompt_id]


def test_batches_begin_with_the_unsteered_and_pad_little(small, trained):
    cells = grid.cells([1, 2], ["add"], [1.0, 2.0], 3, [0, 1], ["none"], 1, grid.Controls({}, {}))
    lengths = [9, 2, 5]
    found = experiments.batches(cells, [[0] * n for n in lengths], 4)
    assert sorted(cell.row for batch in found for cell in batch) == list(range(len(cells)))
    kinds = [{cell.baseline for cell in batch} for batch in found]
    assert kinds == [{"none"}] * 2 + [{"steered"}] * 6
    for group in (found[:2], found[2:]):
        ordered = [lengths[cell.prompt_id] for batch in group for cell in batch]
        assert ordered == sorted(ordered)


# each cell is what it would be alone


def test_texts_are_those_of_single_prompts(small, llama, trained):
    sae, _ = trained
    table = small.to_pandas()
    for row in table[table.baseline.isin(["none", "steered", "random_latent"])].iloc[::9].itertuples():
        arguments = {"max_new_tokens": 5, "seed": row.seed}
        if row.baseline == "none":
            assert row.text == llama.generate(row.prompt, **arguments)
        else:
            with llama.steer(verb(row, sae)):
                assert row.text == llama.generate(row.prompt, **arguments)


def test_figures_are_those_of_single_forward_passes(small, llama, trained):
    """The measures again, from the definitions: no batch, no padding."""
    sae, _ = trained
    table = small.to_pandas()
    ids = {row["row"]: row["ids"] for row in small.rows}
    unsteered = {(r.prompt_id, r.seed): r for r in table[table.baseline == "none"].itertuples()}
    tops = {latent: steering.top_tokens(llama, sae.W_dec[[latent]])[0] for latent in table.latent.dropna().unique()}
    later = "blocks.2.hook_resid_post"
    for row in table[table.baseline.isin(["steered", "random_latent"])].iloc[::13].itertuples():
        reference = ids[unsteered[row.prompt_id, row.seed].row]
        before = llama.tokenize(row.prompt).rows()[0]
        text, at = torch.tensor([before + reference]), slice(len(before) - 1, len(before) + max(len(reference), 1) - 1)
        clean = llama.logits(text)[0, at]
        clean_x = llama.record(text, [toy_sweep.SITE, later])
        with llama.steer(verb(row, sae)):
            steered = llama.logits(text)[0, at]
            steered_x = llama.record(text, [toy_sweep.SITE, later])
        divergence, top = kl(clean.double(), steered.double()), tops[row.latent]
        expected = {"kl_next": divergence[0], "kl_text": divergence.mean(), "kl_max": divergence.max()}
        masses = measures.mass(clean, top), measures.mass(steered, top)
        expected |= {"mass_next": masses[1][0], "rise_text": (masses[1] - masses[0]).mean()}
        expected |= {"rise_next": (masses[1] - masses[0])[0], "mass_text": masses[1].mean()}
        if row.baseline == "steered":
            expected |= {"own_" + name: expected[name] for name in ("mass_next", "mass_text", "rise_next", "rise_text")}
        pair = clean_x[toy_sweep.SITE][0, at], steered_x[toy_sweep.SITE][0, at]
        expected |= dict(zip(("relative_change", "norm_ratio"), measures.relative_change(*pair), strict=True))
        names = ("target_before", "target_after", "off_target_l1", "off_target_flipped")
        for site, suffix in ((toy_sweep.SITE, ""), (later, "_later")):
            codes = [sae.encode(x[site][0, at]).detach() for x in (clean_x, steered_x)]
            values = measures.latent_changes(*codes, int(row.latent))
            expected |= {name + suffix: value for name, value in zip(names, values, strict=True)}
        whole = torch.tensor([before + ids[row.row]])
        logits = llama.logits(whole)[0, len(before) - 1 : -1]
        expected["perplexity"] = measures.perplexity(logits, whole[0, len(before) :])
        expected["changed_share"] = measures.changed_share(ids[row.row], reference)
        for name, value in expected.items():
            assert getattr(row, name) == pytest.approx(float(value), rel=1e-6, abs=1e-9, nan_ok=True), name


@pytest.mark.parametrize("in_parts", [False, True])
def test_figures_do_not_hang_on_the_batch(small, llama, trained, monkeypatch, in_parts):
    sae, live = trained
    if in_parts:  # of three rows
        monkeypatch.setattr(observe, "LOGITS_BYTES", 3 * 4 * 258 * (22 + 5) * 2)
    size = 64 if in_parts else 5
    again = steering.sweep(
        llama, sae, live[:2], "add", [0.5, 8.0], PROMPTS, seeds=[0, 3], draws=2, batch_size=size, **SMALL
    )
    one, other = small.to_pandas(), again.to_pandas()
    one = one[one.operation.isna() | (one.operation == "add")]
    assert one.text.tolist() == other.text.tolist()
    np.testing.assert_allclose(one[list(MEASURES)], other[list(MEASURES)], rtol=1e-6, atol=1e-9)


# controls


def test_random_directions_change_by_as_much(small):
    table = small.to_pandas()
    key = ["latent", "operation", "strength", "prompt_id", "seed"]
    steered = table[table.baseline == "steered"].set_index(key).relative_change
    for _, control in table[table.baseline == "random_direction"].groupby("draw"):
        control = control[control.operation != "project_out"].set_index(key).relative_change
        np.testing.assert_allclose(steered.loc[control.index], control, rtol=1e-9, atol=1e-12)
        assert (control > 0).any()


def test_controls_depend_on_latent_and_draw_only(trained):
    sae, live = trained
    few, many = grid.draw_controls(sae, live[:1], 2), grid.draw_controls(sae, live[:4], 3)
    assert torch.equal(few.vectors[live[0]], many.vectors[live[0]][:2])
    for latent in live[:4]:
        norms = many.vectors[latent].norm(dim=1)
        torch.testing.assert_close(norms, sae.W_dec[latent].detach().norm().expand(3))
        assert len(set(many.latents[latent])) == 3 and not set(many.latents[latent]) & set(live[:4])
    with pytest.raises(ConfigError, match="lower draws"):
        grid.draw_controls(sae, range(48), 1)


def test_the_extended_autoencoder(trained):
    sae, live = trained
    vectors = {live[1]: torch.randn(2, 32), live[0]: torch.randn(3, 32)}
    more = grid.Extended(sae, {latent: rows.double() for latent, rows in vectors.items()})
    x = 3 * torch.randn(6, 5, 32, dtype=torch.float64)
    codes, plain = more.encode(x), sae.encode(x)
    assert torch.equal(codes[..., :48], plain) and more.d_sae == 53 == len(more.W_dec) == len(more.latent_stats.max)
    assert [more.latent(live[1], 1), more.latent(live[0], 2)] == [49, 52]
    assert all(torch.equal(codes[..., 48 + i], plain[..., live[1]]) for i in range(2))
    assert all(torch.equal(codes[..., 50 + i], plain[..., live[0]]) for i in range(3))
    assert torch.equal(more.W_dec[50:], vectors[live[0]].double()) and more.metadata is sae.metadata
    assert torch.equal(more.latent_stats.max[48:50], sae.latent_stats.max[live[1]].expand(2))
    nothing = grid.Extended(sae, {})
    assert torch.equal(nothing.encode(x), plain)


def test_neutral_operations_change_nothing(llama, trained):
    sae, live = trained
    add = steering.sweep(llama, sae, live[0], "add", [0.0], PROMPTS, draws=3, **SMALL).to_pandas()
    scale = steering.sweep(llama, sae, live[0], "scale", [1.0], PROMPTS, draws=3, **SMALL).to_pandas()
    for table in (add, scale):
        steered = table[table.baseline != "none"]
        assert (steered.changed_share == 0).all() and steered.first_divergence.isna().all()
        assert steered.kl_max.abs().max() < 1e-12 and (steered.relative_change < 1e-12).all()


def test_without_controls(llama, trained):
    sae, live = trained
    found = steering.sweep(llama, sae, live[0], "add", [1.0], PROMPTS[:2], baselines=["none"], **SMALL)
    assert found.to_pandas().baseline.tolist() == ["none"] * 2 + ["steered"] * 2
    row = found.summary().iloc[0]
    assert math.isnan(row.p) and math.isnan(row.random_direction) and not math.isnan(row.effect)
    assert row.directions == 0 and row.note == "0 random directions: p needs 20" and not math.isnan(row.matched_effect)


# scopes, greedy, odd inputs


def test_scope_is_that_of_the_operations(llama, trained):
    sae, live = trained
    where = steering.Scope(prompt=False)
    found = steering.sweep(
        llama, sae, live[0], "add", [4.0], PROMPTS, scope=where, temperature=0.0, **SMALL
    ).to_pandas()
    steered = found[found.baseline == "steered"]
    assert (steered.kl_next < 1e-12).all() and (steered.kl_text > 1e-6).all()
    for row in steered.itertuples():
        with llama.steer(steering.add(sae, live[0], strength=4.0, scope=where)):
            assert row.text == llama.generate(row.prompt, max_new_tokens=5, temperature=0.0)


def test_a_scope_that_meets_nothing(llama, trained):
    sae, live = trained
    where = steering.Scope(positions=[200])
    with pytest.raises(InterventionError, match="touched no position"):
        steering.sweep(llama, sae, live[0], "add", [4.0], PROMPTS, scope=where, **SMALL)


def test_a_text_that_ends_at_once(llama, trained, monkeypatch):
    """Nothing is generated and the one token of the prompt is left out: steered, it is what it was."""
    sae, live = trained
    monkeypatch.setattr(type(llama), "eos_ids", set(range(258)))
    table = steering.sweep(llama, sae, live[0], "add", [4.0], ["W", "We"], draws=3, **SMALL).to_pandas()
    assert set(table.text) == {""} and table.perplexity.isna().all() and (table.changed_share == 0).all()
    steered = table[table.baseline == "steered"]
    assert steered.kl_text[steered.prompt == "W"].item() < 1e-12 and steered.kl_text[steered.prompt == "We"].item() > 0


def test_token_ids_without_a_tokenizer(trained):
    lm = saelab.load_model(tiny.llama_model().double(), device="cpu")
    sae, live = trained
    tokens = saelab.Tokens(torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[True] * 3, [True, True, False]]))
    found = steering.sweep(lm, sae, live[0], "add", [1.0], tokens, draws=1, **SMALL)
    unsteered = generate_ids(lm, saelab.Tokens(torch.tensor([[8, 9]]), torch.ones(1, 2, dtype=torch.bool)), 5)
    assert found.to_pandas().text[1] == str(unsteered[0])
    found.to_pandas()


def test_a_site_that_does_not_write_to_the_stream(llama, tmp_path):
    sae = saelab.SAE(saelab.TopK(k=2, d_sae=16), d_in=32, metadata={"site": "blocks.1.attn.hook_z"}).double()
    with pytest.warns(UserWarning, match="does not write to the residual stream"):
        found = steering.sweep(llama, sae, [1], "add", [1.0], PROMPTS[:1], unit="activation", draws=1, **SMALL)
    table = found.to_pandas()
    assert table.rise_text.isna().all() and table.target_after_later.isna().all()
    assert (table[table.baseline == "steered"].kl_text > 0).all()
    assert found.summary().effect.isna().all() and found.summary("kl_text", "kl_text").effect.notna().all()
    assert 'data-page="sweep"' in found.to_html(tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"latents": []}, "latents is empty"),
        ({"latents": [48]}, "one of latents is 48.*from 0 to 47"),
        ({"operations": ["push"]}, "not among add"),
        ({"operations": []}, "operations is empty"),
        ({"strengths": []}, "strengths is empty"),
        ({"strengths": [math.nan]}, "nan"),
        ({"prompts": []}, "at least one text"),
        ({"prompts": "The"}, "give a list"),
        ({"seeds": [0, 1.5]}, "one of seeds is 1.5"),
        ({"prompts": ["The", "The"]}, "prompts has one twice"),
        ({"baselines": ["prompt"]}, "not among none"),
        ({"draws": 0}, "draws is 0"),
        ({"unit": "parsec"}, "unknown unit"),
        ({"site": "blocks.9.hook_resid_post"}, "no site"),
    ],
)
def test_wrong_arguments(llama, trained, change, match):
    sae, live = trained
    arguments = {"latents": live[:1], "operations": ["add"], "strengths": [1.0], "prompts": PROMPTS[:1]}
    with pytest.raises((ConfigError, saelab.SiteError), match=match):
        steering.sweep(llama, sae, **{**arguments, **change}, **SMALL)


def test_a_dead_latent_and_a_missing_unit_are_said_before_the_work(llama, trained, monkeypatch):
    sae, live = trained
    monkeypatch.setattr(observe, "generate", lambda *_: pytest.fail("it began"))
    dead = next(i for i in range(48) if not int(sae.state.fires[i]))
    with pytest.raises(ConfigError, match="dead"):
        steering.sweep(llama, sae, [live[0], dead], ["ablate"], [], PROMPTS, **SMALL)
    bare = saelab.SAE(saelab.TopK(k=2, d_sae=16), d_in=32, metadata={"site": toy_sweep.SITE}).double()
    with pytest.raises(ConfigError, match="largest activation"):
        steering.sweep(llama, bare, [3], ["add"], [1.0], PROMPTS, **SMALL)


# on disk


def arguments_of(trained, folder, **change):
    sae, live = trained
    return {"sae": sae, "latents": live[:2], "operations": ["add", "ablate"], "strengths": [2.0], "prompts": PROMPTS,
            "draws": 1, "batch_size": 8, "out": folder, **SMALL, **change}  # fmt: skip


def test_a_killed_sweep_goes_on_to_the_same_table(llama, trained, tmp_path, monkeypatch):
    whole = steering.sweep(llama, **arguments_of(trained, None)).to_pandas()
    real, calls = observe.generate, []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise RuntimeError("power cut")
        return real(*arguments)

    monkeypatch.setattr(observe, "generate", killed)
    with pytest.raises(RuntimeError):
        steering.sweep(llama, **arguments_of(trained, tmp_path / "s"))
    part = steering.load_sweep(tmp_path / "s")
    assert len(part) == 3 + 2 * 8 and part.path == tmp_path / "s"
    assert part.interrupted and f"of {len(whole)}" in repr(part)
    rest = steering.sweep(llama, **arguments_of(trained, tmp_path / "s"))
    assert len(calls) == 4 + 3 and len(rest) == len(whole)
    pd.testing.assert_frame_equal(rest.to_pandas(), whole)
    pd.testing.assert_frame_equal(steering.load_sweep(tmp_path / "s").to_pandas(), whole)
    done = len(calls)
    again = steering.sweep(llama, **arguments_of(trained, tmp_path / "s", batch_size=3))
    assert len(calls) == done
    pd.testing.assert_frame_equal(again.summary(), rest.summary())


def test_directions_without_a_text_are_read_back(llama, trained, tmp_path):
    made = steering.sweep(llama, **arguments_of(trained, tmp_path / "s", draws=4, operations="add"))
    assert sum(row["text"] is None for row in made.rows) == 2 * 3
    pd.testing.assert_frame_equal(steering.load_sweep(tmp_path / "s").to_pandas(), made.to_pandas())


def test_another_sweep_in_the_folder(llama, trained, tmp_path):
    steering.sweep(llama, **arguments_of(trained, tmp_path / "s"))
    with pytest.raises(CheckpointError, match="strengths.*temperature") as error:
        steering.sweep(llama, **arguments_of(trained, tmp_path / "s", strengths=[3.0], temperature=0.5))
    assert "prompts" not in str(error.value)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="thesis.txt"):
        steering.sweep(llama, **arguments_of(trained, tmp_path / "other"))
    with pytest.raises(CheckpointError, match="no sweep"):
        steering.load_sweep(tmp_path / "nothing")


def test_files_are_plain_json(llama, trained, tmp_path):
    steering.sweep(llama, **arguments_of(trained, tmp_path / "s"))
    files = sorted(path for path in (tmp_path / "s").rglob("*") if path.is_file() and path.name != ".lock")
    assert all(path.suffix == ".json" for path in files) and len(files) == 2 + 1 + 5

    def refuse(constant):
        raise AssertionError(constant)

    for path in files:
        json.loads(path.read_text(), parse_constant=refuse)
    (tmp_path / "s" / "rows" / "00000000.json").write_text("[{")
    with pytest.raises(CheckpointError, match="00000000.json is no readable JSON.*: remove that file"):
        steering.load_sweep(tmp_path / "s")


def test_ctrl_c_leaves_what_there_is(llama, trained, tmp_path, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGINT)
    real, calls = observe.generate, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            _thread.interrupt_main()
        return real(*arguments)

    monkeypatch.setattr(observe, "generate", interrupted)
    part = steering.sweep(llama, **arguments_of(trained, tmp_path / "s"))
    assert part.interrupted and len(part) == 3 + 2 * 8 and "run the same call again" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before
    part.to_pandas(), part.summary(), part.plot(), part.to_html(tmp_path / "part.html")
    rest = steering.sweep(llama, **arguments_of(trained, tmp_path / "s"))
    assert not rest.interrupted and len(rest) == rest.total and len(calls) == 6


def test_an_exception_leaves_no_hook(llama, trained, monkeypatch):
    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in llama.model.modules())

    monkeypatch.setattr(observe, "kl", lambda *_: 1 / 0)
    before = hooks()
    with pytest.raises(ZeroDivisionError):
        steering.sweep(llama, **arguments_of(trained, None))
    assert hooks() == before and not llama.receipts


# tables and figures


def test_the_table(small):
    table = small.to_pandas()
    assert table[list(MEASURES)].dtypes.eq("float64").all()
    assert table[table.baseline == "none"][list(OF_THE_STEERING)].isna().all().all()
    assert table[table.baseline != "none"][list(OF_THE_STEERING)].notna().all().all()
    assert table.perplexity_ranked.isna().equals((table.repetition_4 > 0.2) | table.perplexity.isna())
    assert table.text.map(type).eq(str).all()


def test_the_summary_from_the_table(small, trained):
    _, live = trained
    table, summary = small.to_pandas(), small.summary(budget=0.5)
    assert list(zip(summary.latent, summary.operation, strict=True)) == [
        (i, op) for i in live[:2] for op in grid.OPERATIONS
    ]
    row = summary[(summary.latent == live[0]) & (summary.operation == "add")].iloc[0]
    mine = table[(table.latent == live[0]) & (table.operation == "add")]
    steered = mine[mine.baseline == "steered"].groupby("strength")[["kl_text", "rise_text"]].mean()
    within = steered[steered.kl_text <= 0.5]
    assert row.best_strength == within.rise_text.idxmax() and row.effect == within.rise_text.max()
    at = mine[mine.strength == row.best_strength]
    controls = at[at.baseline == "random_direction"].groupby("draw").rise_text.mean()
    assert row.random_direction == pytest.approx(controls.mean())
    assert math.isnan(row.p) and row.note == "2 random directions: p needs 20"
    assert row.random_latent == pytest.approx(at[at.baseline == "random_latent"].rise_text.mean())
    assert row.effect_low <= row.effect <= row.effect_high
    assert row.texts == 2 * len(PROMPTS) * 2 and 0 <= row.output_score <= 1
    nothing = small.summary(budget=1e-9)
    assert nothing[nothing.operation == "add"].best_strength.isna().all()
    with pytest.raises(ConfigError, match="above 0"):
        small.summary(budget=0.0)
    with pytest.raises(ConfigError, match="no measure 'luck'"):
        small.summary("luck")


@pytest.mark.slow
def test_the_rank_among_random_directions_on_their_own_tokens(llama, trained):
    """By default twenty directions, of which three have texts; the rest of the summary does not hang on them."""
    sae, live = trained
    found = steering.sweep(llama, sae, live[:2], ["add", "ablate"], [1.0, 4.0, 16.0], PROMPTS, **SMALL)
    table, summary = found.to_pandas(), found.summary(budget=0.01)
    silent = table[table.text.isna()]
    assert set(silent.baseline) == {"random_direction"} and set(silent.draw) == set(range(3, 20))
    assert silent[list(OF_THE_TEXT)].isna().all().all() and silent[list(OF_THE_STEERING)].notna().all().all()
    assert len(found) == 3 + 2 * 4 * 3 * (1 + 20 + 3)
    for row in summary[summary.operation == "add"].itertuples():
        mine = table[(table.latent == row.latent) & (table.operation == "add")]
        random = mine[mine.baseline == "random_direction"].assign(rise_text=lambda some: some.own_rise_text)
        both = pd.concat([mine[mine.baseline == "steered"].assign(draw=-1), random]).sort_values(["draw", "strength"])
        cubes = [both[name].to_numpy().reshape(21, 3, 3) for name in ("rise_text", "kl_text")]
        level, effects = at_equal_divergence(*cubes, 0.01)
        assert row.matched_kl == level and row.matched_effect == pytest.approx(effects[0])
        assert row.p == (effects >= effects[0]).mean() and row.directions == 20 and row.note == ""
        assert row.matched_random == pytest.approx(effects[1:].mean())
    taken = summary[summary.operation == "ablate"].iloc[0]
    mine = table[(table.latent == taken.latent) & (table.operation == "ablate")]
    ranked = mine[mine.baseline == "random_direction"].groupby("draw").own_rise_text.mean()
    assert taken.p == (1 + (ranked >= taken.effect).sum()) / 21 and "at equal norm" in taken.note
    one = steering.sweep(llama, sae, live[0], "add", [1.0, 4.0], PROMPTS[:1], **SMALL).summary().iloc[0]
    assert math.isnan(one.p) and one.note.startswith("1 prompt") and math.isnan(one.effect_low)


@pytest.mark.slow
def test_random_latents_are_told_from_random_directions_by_chance(llama, trained):
    """Decoder rows that are random directions themselves: their ranks are spread over all places."""
    sae, live = trained
    other = copy.deepcopy(sae)
    with torch.no_grad():
        drawn = torch.randn(other.W_dec.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        other.W_dec.copy_(drawn / drawn.norm(dim=1, keepdim=True))
    latents = live[:16]
    found = steering.sweep(
        llama, other, latents, "add", [4.0, 16.0], PROMPTS[::2], max_new_tokens=1, batch_size=256, progress=False,
        baselines=["random_direction"],
    )  # fmt: skip
    ps = found.summary(effect="rise_next", kl="kl_next").p
    n = len(ps)
    assert ps.notna().all() and abs(ps.mean() - 0.5) < 3.5 * (1 / 12 / n) ** 0.5
    assert (ps <= 0.05).sum() <= 0.05 * n + 3.5 * (0.05 * 0.95 * n) ** 0.5


def test_figures(small):
    effect, frontier = small.plot(), small.plot("frontier", "target_after_later", "kl_next")
    names = [trace.name for trace in frontier.data]
    assert len(names) == 2 * len(grid.OPERATIONS) and len(effect.data) == 3 * len(names)
    table = small.to_pandas()
    mine = table[(table.latent == small.settings["latents"][0]) & (table.operation == "add")]
    mean = mine[mine.baseline == "steered"].groupby("strength").rise_text.mean()
    assert list(effect.data[2].x) == [0.5, 8.0] and list(effect.data[2].y) == pytest.approx(mean.tolist())
    low, high = (np.array(effect.data[i].y) for i in (0, 1))
    controls = mine[mine.baseline == "random_direction"].groupby(["strength", "draw"]).rise_text.mean().unstack()
    np.testing.assert_allclose((low + high) / 2, controls.mean(axis=1))
    np.testing.assert_allclose((high - low) / 2, controls.std(axis=1))
    with pytest.raises(ConfigError, match="no plot 'pie'"):
        small.plot("pie")
