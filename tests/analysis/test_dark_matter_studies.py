"""What is built on the decomposition: scaling, downstream cost, SAEs of the parts, planted errors, earlier SAEs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import saelab
from saelab import ConfigError, DataError, SiteError, cli
from saelab.analysis.dark_matter import (
    Family,
    decompose,
    downstream_cost,
    family,
    fit_power_law,
    norm_baselines,
    per_token_scaling,
    planted_experiment,
    predict_from_earlier,
    settled,
    train_on_parts,
    unseen_documents,
)
from saelab.analysis.dark_matter.rows import LEARN, MAP, SCORE
from saelab.training.run import COLUMNS, Run
from tests import tiny
from tests.toy_dark_matter import dead, multiple, planted, trained

SITE = "blocks.2.hook_resid_post"
TEXTS = [f"Speech {i}: " + " ".join(f"w{(i * j) % 17}" for j in range(40)) for i in range(60)]
WIDTHS = [256, 512, 1024, 2048, 4096, 8192]


@pytest.fixture(scope="module")
def x():
    return planted()


@pytest.fixture(scope="module")
def corpus():
    return saelab.load_corpus(TEXTS)


@pytest.fixture(scope="module")
def stores(tiny_llama, corpus):
    sites = ["blocks.1.hook_resid_post", SITE]
    return saelab.harvest(tiny_llama, corpus, sites=sites, tokens=5300, context_length=64, progress=False)


# power law


@settings(max_examples=20, deadline=None)
@given(floor=st.floats(0.02, 0.5), factor=st.floats(0.5, 5), exponent=st.floats(0.2, 1.0))
def test_an_exact_power_law_is_found(floor, factor, exponent):
    fvu = floor + factor * torch.tensor(WIDTHS).double() ** -exponent
    law = fit_power_law(WIDTHS, fvu, fvu.expand(3, -1))
    assert law.exponent == pytest.approx(exponent, rel=2e-3) and law.floor == pytest.approx(floor, abs=2e-3)
    assert law(1024) == pytest.approx(float(fvu[2]), rel=1e-4)
    assert law.identifiable and str(law).startswith("FVU = ")


def test_the_interval_of_the_exponent_is_one_of_the_law_not_of_the_documents():
    """Widths lie off the law (another seed, another optimum) by more than documents tell: the interval has to know of it."""
    generator = torch.Generator().manual_seed(0)
    steep = 0.1 + 2 * torch.tensor(WIDTHS).double() ** -0.5
    covered, by_documents, n = 0, 0, 200
    for _ in range(n):
        seen = steep + 0.002 * torch.randn(6, generator=generator)  # what these SAEs came out at
        law = fit_power_law(WIDTHS, seen, seen + 0.0002 * torch.randn(40, 6, generator=generator))
        covered += law.exponent_interval[0] <= 0.5 <= law.exponent_interval[1]
        by_documents += law.exponent_bootstrap[0] <= 0.5 <= law.exponent_bootstrap[1]
    assert 0.9 * n <= covered <= n and by_documents < 0.5 * n


def test_the_law_is_printed_with_its_own_interval_and_why_it_is_wide():
    steep = 0.1 + 2 * torch.tensor(WIDTHS).double() ** -0.5
    generator = torch.Generator().manual_seed(2)
    seen = steep + 0.004 * torch.randn(6, generator=generator)
    law = fit_power_law(WIDTHS, seen, seen + 0.0001 * torch.randn(40, 6, generator=generator))
    low, high = law.exponent_profile
    assert law.identifiable and high > 2 * low and law.exponent_bootstrap[1] < 1.2 * law.exponent_bootstrap[0]
    assert f"exponent {low:.3f} to {high:.3f}, wide because 6 widths leave 3 degrees of freedom" in str(law)
    assert f"other documents alone {law.exponent_bootstrap[0]:.3f} to {law.exponent_bootstrap[1]:.3f}" in str(law)
    assert "wide" not in str(fit_power_law(WIDTHS, steep, steep.expand(3, -1)))


@pytest.mark.parametrize("widths", [WIDTHS[:4], [256] * 6, WIDTHS[:4] + WIDTHS[:4]])
def test_too_few_widths_are_an_error(widths):
    with pytest.raises(ConfigError, match="widths for a power law of 3 parameters: at least 5"):
        fit_power_law(widths, torch.rand(len(widths)), torch.rand(3, len(widths)))


def test_what_cannot_be_told_is_said():
    log_W = torch.tensor(WIDTHS).double().log2()
    flat = torch.full((6,), 0.2).double()
    assert "does not fall" in str(fit_power_law(WIDTHS, flat + 0.001 * log_W, flat.expand(3, -1)))
    straight = 0.5 - 0.02 * log_W  # in the logarithm: any small exponent does
    law = fit_power_law(WIDTHS, straight, straight.expand(3, -1))
    assert not law.identifiable and str(law).startswith("not identifiable: ")
    steep = 0.1 + 2 * torch.tensor(WIDTHS).double() ** -0.5
    noisy = steep + 0.02 * torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    assert not fit_power_law(WIDTHS, steep, noisy).identifiable


# scaling


@pytest.fixture(scope="module")
def members(x):
    return family([trained(x, k=2, d_sae=f, tokens=3000) for f in (4, 8, 16, 32, 64)], x, progress=False)


def test_the_family_scales(members):
    (scaling,) = members.fit(draws=50)
    assert scaling.sparsity == 2 and list(scaling.fvu) == [4, 8, 16, 32, 64]
    assert scaling.slope < 0 and scaling.slope_interval[0] <= scaling.slope <= scaling.slope_interval[1]
    assert scaling.fvu[8] == members[1].fvu
    bands = scaling.bands()
    if scaling.law.identifiable:
        assert torch.allclose(
            torch.tensor((bands.absent + bands.linear + bands.nonlinear).to_numpy()), torch.tensor(bands.fvu.to_numpy())
        )
    assert len(scaling.plot().data) >= 2
    assert members.to_pandas().sparsity.tolist() == [2.0] * 5 and len(members[:2]) == 2
    again = members.fit(draws=50)[0]
    assert again == scaling


def test_family_errors(members, x):
    with pytest.raises(ConfigError, match="at least 5"):
        members[:3].fit()
    other = decompose(members[4].sae, x, holdout=0.4, progress=False)
    other.groups[0] = -1
    with pytest.raises(ConfigError, match="different rows"):
        Family([*members[:4], other]).fit()
    with pytest.raises(ConfigError, match="there are none"):
        per_token_scaling(members[:1], x)


def test_the_error_of_one_width_tells_that_of_the_next(members, x):
    table = per_token_scaling(members, x)
    assert table.width.tolist() == [4, 8, 16, 32] and table.larger.tolist() == [8, 16, 32, 64]
    twice = per_token_scaling(Family([members[2], members[2]]), x)
    assert twice.r2[0] == pytest.approx(1, abs=1e-9)


def test_a_settled_run_is_one_whose_fvu_stands_still():
    blank = dict.fromkeys(COLUMNS, 0.0)

    def run(last):
        rows = [blank | {"tokens": t, "explained_variance": 0.5 if t < 75 else 1 - last(t)} for t in range(1, 101)]
        return Run(None, rows)

    assert settled(run(lambda t: 0.2)) and not settled(run(lambda t: 0.2 - t / 1000))
    with pytest.raises(DataError, match="too few"):
        settled(Run(None, [blank | {"tokens": t, "explained_variance": 0.5} for t in range(1, 9)]))


# downstream


def test_restoring_what_is_all_of_the_error_restores_the_model(tiny_llama, corpus, stores):
    sae = dead(32)
    sae.metadata |= {"site": SITE, "context_length": 64}
    parts = decompose(sae, stores[SITE], progress=False)
    table = downstream_cost(parts, tiny_llama, corpus, tokens=256, batch_size=2, split="train", progress=False)
    assert table.index.tolist() == ["clean", "sae", "sae + linear", "sae + nonlinear"]
    assert abs(table.delta_ce["sae"]) > 1e-3 and table.kl["sae"] > 1e-3
    assert table.delta_ce["sae + linear"] == pytest.approx(0, abs=1e-6) and table.kl["sae + linear"] == pytest.approx(
        0, abs=1e-6
    )
    assert table.recovered["sae + linear"] == pytest.approx(100, abs=0.1)
    assert table.recovered["sae + nonlinear"] == pytest.approx(0, abs=0.1) and table.recovered["sae"] == 0
    for share in ("variance_share", "norm_share"):
        assert table[share]["sae + linear"] == pytest.approx(100, abs=0.1)
        assert table[share]["sae + nonlinear"] == pytest.approx(0, abs=0.1)


def test_the_cost_of_the_sae_is_that_of_evaluate(tiny_llama, corpus, stores):
    sae = trained(stores[SITE], d_sae=64, tokens=4000)
    parts = decompose(sae, stores[SITE], progress=False)
    table = downstream_cost(parts, tiny_llama, corpus, tokens=192, batch_size=2, progress=False)
    report = saelab.evaluate(sae, tiny_llama, corpus, tokens=192, sparsity_tokens=192, batch_size=3, progress=False)
    assert table.delta_ce["sae"] == pytest.approx(report.delta_ce, rel=1e-4)
    assert table.kl["sae"] == pytest.approx(report.kl, rel=1e-4)
    assert table.delta_ce_se["sae"] == pytest.approx(report.delta_ce_se, rel=1e-3)


def test_downstream_errors(tiny_llama, corpus, stores):
    parts = decompose(multiple(32, 0.9), stores[SITE], progress=False)
    with pytest.raises(ConfigError, match="site"):
        downstream_cost(parts, tiny_llama, corpus, progress=False)
    narrow = decompose(multiple(12, 0.9), planted(), progress=False)
    with pytest.raises(SiteError, match="12 wide"):
        downstream_cost(narrow, tiny_llama, corpus, site=SITE, progress=False)
    parts.sae.state.norm_limit.fill_(0.0)
    with pytest.raises(DataError, match="no position"):
        downstream_cost(parts, tiny_llama, corpus, site=SITE, tokens=64, context_length=64, progress=False)


def test_unseen_documents_are_those_that_were_held_out(corpus, stores):
    parts = decompose(trained(stores[SITE], d_sae=64, tokens=4000), stores[SITE], progress=False)
    fitted = {int(i) for c in parts.chunks(stores[SITE]) if c.use == MAP for i in stores[SITE].documents[c.row]}
    texts = set(unseen_documents(parts, corpus).documents)
    assert texts and not texts & {corpus.documents[i] for i in fitted}
    with pytest.raises(ConfigError, match="held out by row"):
        unseen_documents(decompose(dead(12), planted(), progress=False), corpus)


# SAEs of the parts


def test_saes_of_the_parts_are_scored_on_held_out_rows(x):
    parts = decompose(trained(x), x, progress=False)
    cfg = saelab.TopK(k=3, d_sae=48, aux_coefficient=0.0)
    sizes = {"tokens": 4000, "batch_size": 256, "buffer_tokens": 4096, "lr": 3e-3, "progress": False}
    table, runs = train_on_parts(parts, x, cfg, which=("error", "nonlinear"), **sizes)
    assert table.index.tolist() == ["error", "nonlinear"] and set(runs) == {"error", "nonlinear"}
    scored = torch.cat([chunk.x for chunk in parts.chunks(x) if chunk.use == SCORE])
    assert (table.tokens_heldout == len(scored)).all()
    nonlinear = parts.split(scored)[2]
    left = (nonlinear - runs["nonlinear"].sae(nonlinear).detach()).double().square().sum()
    expected = float(left / (nonlinear - nonlinear.mean(0)).double().square().sum())
    assert table.fvu["nonlinear"] == pytest.approx(expected, rel=1e-5) and table.fvu["nonlinear"] < 1
    with pytest.raises(ConfigError, match="part is 'dense'"):
        train_on_parts(parts, x, cfg, which=("dense",), **sizes)


# planted errors


def test_each_part_follows_what_was_planted_for_it():
    x = planted(4000, d=24, f=8)  # fewer directions than dimensions, so that dense noise has where to go
    sae = trained(x, d_sae=16)
    found = planted_experiment(sae, x, sigmas=(0.0, 2.0, 4.0), ablated=(0.0, 0.25), progress=False)
    table = found.correlations
    assert table.dense["linear"] > 0.9 and table.introduced["nonlinear"] > 0.9
    assert abs(table.introduced["linear"]) < 0.2 and abs(table.dense["nonlinear"]) < 0.5
    nothing = found.table.query("ablated == 0 and dense == 0 and introduced == 0").iloc[0]
    assert nothing.nonlinear < 0.5
    introduced = found.table.query("ablated == 0 and dense == 0 and introduced == 4").iloc[0]
    assert introduced.nonlinear == pytest.approx(4, rel=0.1)
    assert len(found.table) == 18 and len(found.plot().data) > 0
    with pytest.raises(ConfigError, match="ablated"):
        planted_experiment(sae, x, ablated=(1.0,))


# baselines of the norm


def test_the_norm_of_the_error_is_told_by_what_makes_it():
    generator = torch.Generator().manual_seed(0)
    token = torch.randint(0, 9, (4000,), generator=generator)
    size = torch.rand(4000, generator=generator) + 1
    x = torch.nn.functional.normalize(torch.randn(4000, 12, generator=generator), dim=1) * (1 + token)[:, None]
    parts = decompose(dead(12), x, progress=False)
    error = (x - dead(12)(x).detach()).double().square().sum(1)
    found = norm_baselines(parts, x, tokens=token, others={"size": size, "error": error.float()})
    assert list(found.index) == ["activation", "norm", "l0", "size", "error", "token"]
    assert found["error"] == pytest.approx(1, abs=1e-6) and abs(found["size"]) < 0.01 and abs(found["l0"]) < 0.01
    use = torch.cat([torch.stack([c.row, torch.full_like(c.row, c.use)], 1) for c in parts.chunks(x)])
    learn, score = (use[use[:, 1] == which, 0] for which in (LEARN, SCORE))
    mean = torch.stack([error[learn][token[learn] == t].mean() for t in range(9)])
    left = (error[score] - mean[token[score]]).square().sum() / (error[score] - error[score].mean()).square().sum()
    assert found["token"] == pytest.approx(1 - float(left), abs=1e-9) and found["token"] > 0.5
    with pytest.raises(DataError, match="'size' has 3 entries for 4,000 rows"):
        norm_baselines(parts, x, others={"size": torch.zeros(3)})


def test_tokens_come_from_the_store(stores):
    parts = decompose(trained(stores[SITE], d_sae=64, tokens=4000), stores[SITE], progress=False)
    assert -1 < norm_baselines(parts, stores[SITE])["token"] <= 1


# earlier SAEs


def test_a_source_that_gives_x_itself_predicts_the_linear_part(x):
    sae = trained(x)
    parts = decompose(sae, x, progress=False)
    noise = torch.randn(x.shape)
    table = predict_from_earlier(
        parts, x, {"x": (multiple(12, 1.0), x), "noise": (multiple(12, 1.0), noise)}
    ).set_index("source")
    assert table.linear["x"] == pytest.approx(1, abs=1e-6) and table.linear_pooled["x"] == pytest.approx(1, abs=1e-6)
    rows = {use: torch.cat([c.x for c in parts.chunks(x) if c.use == use]).double() for use in (LEARN, SCORE)}
    errors = {use: found - sae(found.float()).detach().double() for use, found in rows.items()}
    ones = {use: torch.cat([found, torch.ones(len(found), 1)], 1) for use, found in rows.items()}
    left = (errors[SCORE] - ones[SCORE] @ torch.linalg.lstsq(ones[LEARN], errors[LEARN]).solution).square().sum(0)
    spread = (errors[SCORE] - errors[SCORE].mean(0)).square().sum(0)
    assert table.error["x"] == pytest.approx(float((1 - left / spread).mean()), abs=1e-4)
    assert table.error_pooled["x"] == pytest.approx(1 - float(left.sum() / spread.sum()), abs=1e-4)
    assert (table.loc["noise"] < 0.05).all()


def test_aligned_stores_of_an_earlier_layer_are_read_together(stores):
    before, here = stores.values()
    parts = decompose(trained(here, d_sae=64, tokens=4000), here, progress=False)
    table = predict_from_earlier(parts, here, {"before": (trained(before, d_sae=64, tokens=4000), before)})
    assert table.source.tolist() == ["before"] and table.error.notna().all()
    with pytest.raises(DataError, match="not aligned"):
        predict_from_earlier(parts, here, {"before": (parts.sae, before[:10])})
    with pytest.raises(ConfigError, match="no sources"):
        predict_from_earlier(parts, here, {})


# the command


@pytest.mark.filterwarnings("default::UserWarning")
def test_analyze_from_the_command_line(tmp_path, capsys, monkeypatch):
    tiny.llama_model().save_pretrained(tmp_path / "model")
    tiny.byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "text" / f"{number:02}.txt").write_text(text)
    monkeypatch.setenv("SAELAB_CACHE", str(tmp_path / "cache"))
    lm, corpus = saelab.load_model(str(tmp_path / "model")), saelab.load_corpus(str(tmp_path / "text"))
    run = saelab.train(
        lm, corpus, site=SITE, sae=saelab.TopK(k=3, d_sae=64), tokens=2000, batch_size=256, buffer_tokens=1024,
        context_length=64, progress=False,
    )  # fmt: skip
    run.sae.save(tmp_path / "sae")
    csv = tmp_path / "parts.csv"
    sizes = ["--tokens", "1000", "--downstream-tokens", "128", "--split", "train", "--csv", str(csv)]
    assert cli.main(["analyze", "dark-matter", str(tmp_path / "sae"), *sizes]) == 0
    shown = capsys.readouterr().out
    assert "fvu_nonlinear" in shown and "orthogonal pursuit" in shown and "sae + linear" in shown
    assert csv.read_text().startswith("rows,sae,")
    assert cli.main(["analyze", "dark-mater", str(tmp_path / "sae")]) == 2
    assert "did you mean dark-matter?" in capsys.readouterr().err
