"""`saelab.dashboards.build`: forms, bad and hostile input, what stands beside the page, and the ways to it."""

import json
import re

import numpy as np
import pytest
import torch

import saelab
from saelab import steering
from saelab.base.errors import ConfigError, DataError, FormatError
from saelab.cli import main
from saelab.dashboards.assembly import build
from saelab.dashboards.collecting import effects
from saelab.dashboards.collecting.given import sweep_rows
from saelab.dashboards.writing import bundle, codec
from saelab.pages import packing
from tests import tiny
from tests.synthetic_dashboard import HOSTILE
from tests.toy_dashboard import LENGTH, SITE, TEXTS, make_sae

QUIET = {"evaluation": None, "parquet": False, "progress": False, "effects": None}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAELAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def sae(tiny_llama):
    return make_sae(tiny_llama)


@pytest.fixture(scope="module")
def corpus():
    return saelab.load_corpus(TEXTS)


def make(sae, lm, corpus, path, **options):
    return build(sae, lm, corpus, path, **{"tokens": 4_000, "window": 12, **QUIET, **options})


@pytest.mark.parametrize(
    ("site", "options"),
    [(SITE, {"shards": 4}), (SITE, {"batch_tiles": 1}), ("blocks.3.attn.hook_z", {"batch_tiles": 3, "shards": 2})],
)
def test_identical_bytes(tiny_llama, corpus, tmp_path, site, options):
    sae = make_sae(tiny_llama, site)
    same = {"tokens": 9_000, "effects": "direct", "prompts": ["The union"], "null": None}
    first = make(sae, tiny_llama, corpus, tmp_path / "a.html", work=tmp_path / "a", shards=1, **same)
    other = make(sae, tiny_llama, corpus, tmp_path / "b.html", work=tmp_path / "b", **options, **same)
    assert first.path.read_bytes() == other.path.read_bytes()


def test_the_user_s_objects_stay_as_they_were(tiny_llama, sae, corpus, tmp_path):
    def state():
        tensors = [*tiny_llama.runner.state_dict().values(), *sae.state_dict().values()]
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny_llama.runner.modules())
        return [t.clone() for t in tensors], hooks, torch.get_rng_state(), dict(sae.metadata)

    before = state()
    make(sae, tiny_llama, corpus, tmp_path / "a.html", effects="full", latents=3)
    after = state()
    assert all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in zip(before[0], after[0], strict=True))
    assert before[1] == after[1] and torch.equal(before[2], after[2]) and before[3] == after[3]
    assert all(p.requires_grad and p.grad is None for p in tiny_llama.runner.parameters())


def test_a_bundle_holds_the_same_chunks(tiny_llama, sae, corpus, tmp_path):
    single = make(sae, tiny_llama, corpus, tmp_path / "page.html", latents=10)
    folder = make(sae, tiny_llama, corpus, tmp_path / "a folder #1 ü", latents=10)
    assert folder.path == tmp_path / "a folder #1 ü" / "index.html"
    assert bundle.read(single.path)[1] == bundle.read(folder.path)[1] == bundle.read(folder.path.parent)[1]
    for file in (folder.path.parent / "data").iterdir():
        assert re.fullmatch(r"[a-z0-9-]+\.js", file.name)
        assert re.fullmatch(r'__sl\("[a-z0-9-]+","[A-Za-z0-9+/=]*"\)\n', file.read_text())


def test_a_changed_chunk_is_found(tiny_llama, sae, corpus, tmp_path):
    page = make(sae, tiny_llama, corpus, tmp_path / "out", latents=2)
    chunk = page.path.parent / "data" / "idx-0.js"
    changed = packing.to_text(packing.compress(b"SLD1"))
    chunk.write_text(codec.script("idx-0", changed))
    with pytest.raises(FormatError, match="idx-0 does not have the checksum"):
        bundle.read(page.path)
    chunk.unlink()
    with pytest.raises(FormatError, match="idx-0"):
        bundle.read(page.path)


def test_a_folder_that_is_no_dashboard_is_left_alone(tiny_llama, sae, corpus, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ConfigError, match="is no dashboard"):
        make(sae, tiny_llama, corpus, tmp_path / "mine", latents=2)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"
    make(sae, tiny_llama, corpus, tmp_path / "ours", latents=2)
    make(sae, tiny_llama, corpus, tmp_path / "ours", latents=3)
    assert bundle.read(tmp_path / "ours")[0]["saes"][0]["pages"] == 3


def test_a_single_file_that_would_be_too_large(tiny_llama, sae, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "SINGLE_FILE_LIMIT", 20_000)
    with pytest.raises(ConfigError, match=r"more than 20,000 bytes: write a bundle"):
        make(sae, tiny_llama, corpus, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
    make(sae, tiny_llama, corpus, tmp_path / "page", bundle=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latents": 0}, "latents is 0"),
        ({"latents": []}, "at least one"),
        ({"latents": [3, -1]}, "from 0 to 47"),
        ({"latents": [48]}, "from 0 to 47"),
        ({"latents": [1.5]}, "whole number"),
        ({"tokens": 0}, "tokens is 0"),
        ({"windows": 0}, "windows is 0"),
        ({"window": 256}, "from 1 to 255"),
        ({"effects": "some"}, "effects is 'some'"),
        ({"labels": "/nowhere/labels.json"}, "cannot read labels"),
    ],
)
def test_arguments_that_cannot_work(tiny_llama, sae, corpus, tmp_path, options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make(sae, tiny_llama, corpus, tmp_path / "page.html", **options)
    assert not list(tmp_path.glob("*.html"))


def test_another_width_and_no_site(tiny_llama, corpus, tmp_path):
    wide = make_sae(tiny_llama, "blocks.1.mlp.hook_post")
    wide.metadata["site"] = SITE
    with pytest.raises(saelab.SiteError, match="64 wide"):
        make(wide, tiny_llama, corpus, tmp_path / "page.html")
    del wide.metadata["site"]
    with pytest.raises(ConfigError, match="give site="):
        make(wide, tiny_llama, corpus, tmp_path / "page.html")


def test_latents_asked_for(tiny_llama, sae, corpus, tmp_path):
    page = make(sae, tiny_llama, corpus, tmp_path / "a.html", latents=[40, 7, 7, 3])
    assert page.data["pages"]["latent"].tolist() == [3, 7, 40]
    some = make(sae, tiny_llama, corpus, tmp_path / "b.html", latents=9).data["pages"]["latent"]
    again = make(sae, tiny_llama, corpus, tmp_path / "c.html", latents=9).data["pages"]["latent"]
    assert len(some) == 9 and some.tolist() == again.tolist() and 7 not in some
    counts = page.data["idx-0"]["count"]
    ranks = np.argsort(np.argsort(-counts[counts > 0].astype(int), kind="stable"))
    alive = np.flatnonzero(counts > 0)
    stretches = [int(ranks[np.searchsorted(alive, i)]) * 9 // len(alive) for i in some]
    assert len(set(stretches)) >= 8  # evenly over the ranks: hardly two in a ninth


def test_a_dead_latent_has_a_page_that_says_so(tiny_llama, sae, corpus, tmp_path):
    data = make(sae, tiny_llama, corpus, tmp_path / "a.html", latents=[7], effects="direct").data
    columns = data["f-00000"]
    assert columns["count"].tolist() == [0] and columns["hist_bins"].tolist() == [0]
    kinds = {data.manifest["groups"][g]["kind"] for g in columns["group"]}
    assert kinds == {"random", "near"} and not columns["acts"].any() and not len(columns["x_window"])


def test_corpora_at_the_edge(tiny_llama, sae, tmp_path):
    ids = torch.randint(0, 256, (40, 8), generator=torch.Generator().manual_seed(0))
    data = make(sae, tiny_llama, saelab.load_corpus(ids), tmp_path / "a.html", tokens=100, window=48).data
    assert set(data["f-00000"]["length"]) == {8}  # contexts shorter than the window
    same = torch.full((40, 8), 65)
    data = make(sae, tiny_llama, saelab.load_corpus(same), tmp_path / "b.html", tokens=200, split="all").data
    assert data["f-00000"]["repeat"].any()
    with pytest.warns(UserWarning, match="the corpus has 304 tokens in split 'train', 5,000 were asked for"):
        make(sae, tiny_llama, saelab.load_corpus(ids), tmp_path / "c.html", tokens=5_000)
    with pytest.raises(DataError, match="none of the"):
        make(sae, tiny_llama, saelab.load_corpus(torch.full((40, 8), 257)), tmp_path / "d.html", tokens=80, split="all")


def test_one_latent(tiny_llama, corpus, tmp_path):
    data = make(make_sae_of_one(tiny_llama), tiny_llama, corpus, tmp_path / "a.html").data
    assert data["idx-1"]["near"].tolist() == [0xFFFFFFFF] and np.isnan(data["idx-1"]["near_cos"]).all()


def make_sae_of_one(lm):
    return saelab.SAE(saelab.TopK(k=1, d_sae=1), 32, {"site": SITE, "context_length": LENGTH}, seed=0)


def test_without_a_tokenizer(sae, tmp_path):
    lm = saelab.load_model(tiny.llama_model(), device="cpu")
    ids = torch.randint(0, 256, (60, LENGTH), generator=torch.Generator().manual_seed(0))
    data = make(sae, lm, saelab.load_corpus(ids), tmp_path / "a.html", tokens=1_000).data
    assert data._words[0] == str(int(data.vocab["id"][0])).encode()


def test_hostile_strings_come_through_verbatim(tiny_llama, sae, tmp_path):
    import pandas

    hostile = saelab.load_corpus([text[:200] * 3 for text in HOSTILE] * 8)
    labels = dict(enumerate([*HOSTILE, "\ud800 lone"]))
    page = make(
        sae,
        tiny_llama,
        hostile,
        tmp_path / "a.html",
        tokens=3_000,
        prompts=HOSTILE[:3],
        labels=labels,
        title=HOSTILE[0],
        parquet=True,
        window=48,
    )
    text = page.path.read_text(encoding="utf-8")
    assert "__pwned" not in text and HOSTILE[1] not in text
    data = page.data
    found = data.labels(data.manifest["saes"][0])
    assert [found[i] for i in range(len(HOSTILE))] == HOSTILE and found[len(HOSTILE)] == "\ufffd lone"
    assert [p["text"] for p in data.manifest["prompts"]] == HOSTILE[:3] and data.manifest["title"] == HOSTILE[0]
    words = np.array(data._words, object)
    assert b"".join(words[data["p-000"]["token"]]).decode() == HOSTILE[0]

    examples = pandas.read_parquet(tmp_path / "a.parquet" / "examples.parquet").tokens
    features = pandas.read_parquet(tmp_path / "a.parquet" / "features.parquet").label
    assert features[: len(HOSTILE)].tolist() == HOSTILE
    exported = json.loads(page.to_neuronpedia(tmp_path / "np.json").read_text(encoding="ascii"))["features"]
    texts = ["".join(a["tokens"]) for feature in exported for a in feature["activations"]]
    # a token of this tokenizer is a byte: what is not ASCII is cut into pieces that are no text by themselves
    columns = data["f-00000"]
    windows = [
        b"".join(words[columns["pool"][o : o + n]]) for o, n in zip(columns["offset"], columns["length"], strict=True)
    ]
    shown = [
        part for part in (text[:12] for text in HOSTILE if text.isascii()) if any(part.encode() in w for w in windows)
    ]
    assert len(shown) >= 12
    for part in shown:
        assert any(part in "".join(tokens) for tokens in examples) and any(part in text for text in texts)


def test_labels_from_files(tiny_llama, sae, corpus, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"3": "three"}))
    (tmp_path / "b.json").write_text(json.dumps([{"index": "4", "description": "four"}]))
    for name, expected in (("a", {3: "three"}), ("b", {4: "four"})):
        data = make(
            sae, tiny_llama, corpus, tmp_path / f"{name}.html", latents=2, labels=tmp_path / f"{name}.json"
        ).data
        assert data.labels(data.manifest["saes"][0]) == expected
    (tmp_path / "c.json").write_text("[1]")
    with pytest.raises(ConfigError, match="cannot read labels"):
        make(sae, tiny_llama, corpus, tmp_path / "c.html", latents=2, labels=tmp_path / "c.json")


def test_a_compared_sae_is_evaluated_too(tiny_llama, sae, corpus, tmp_path):
    rival = make_sae(tiny_llama, d_sae=20, seed=5)
    made = {}
    for name, evaluation in (("both", True), ("none", None)):
        page = make(sae, tiny_llama, corpus, tmp_path / f"{name}.html", latents=4, compare=rival, evaluation=evaluation)
        made[name] = [described["evaluation"] for described in page.data.manifest["saes"]]
    first, second = made["both"]
    assert first["tokens"] == second["tokens"] > 0 and first["ce_sae"] != second["ce_sae"]
    assert made["none"] == [None, None]


def test_two_saes_seeds_null_and_sweeps(tiny_llama, sae, corpus, tmp_path):
    import pandas

    rival = make_sae(tiny_llama, d_sae=20, seed=5)
    twin = make_sae(tiny_llama)
    null = saelab.load_model(tiny.llama_model(seed=9), tokenizer=tiny_llama.tokenizer, device="cpu")
    sweeps = [{"latent": 3, "operation": "add", "strength": np.float64(2.0), "text": HOSTILE[0], "kl": float("nan")}]
    page = make(
        sae,
        tiny_llama,
        corpus,
        tmp_path / "a.html",
        latents=6,
        compare=rival,
        seeds=[twin, rival],
        null=null,
        sweeps=sweeps,
        parquet=True,
    )
    table = pandas.read_parquet(tmp_path / "a.parquet" / "features.parquet")
    assert table.groupby("sae").seeds.count().to_dict() == {"a": 6, "b": 0}
    data = page.data
    first, second = data.manifest["saes"]
    assert (first["matches"], second["matches"], second["prefix"], second["d_sae"]) == ("b-", "", "b-", 20)
    unit = [s.W_dec.detach() / s.W_dec.detach().norm(dim=1, keepdim=True) for s in (sae, rival)]
    cosine = unit[0] @ unit[1].T
    for prefix, own in (("", cosine), ("b-", cosine.T)):
        pages, more = data[prefix + "pages"]["latent"].astype(np.int64), data[prefix + "idx-1"]
        np.testing.assert_allclose(more["match_cos"][pages], own[pages].amax(1), atol=1e-3)
        matched = torch.from_numpy(more["match"][pages].astype(np.int64))
        np.testing.assert_allclose(own[pages].gather(1, matched[:, None])[:, 0], own[pages].amax(1), atol=1e-6)
        others = np.delete(np.arange(len(more["match"])), pages)  # without a page: not compared
        assert (more["match"][others] == 0xFFFFFFFF).all() and np.isnan(more["near_cos"][others]).all()
    seeds = data["idx-1"]["seeds"]
    assert (seeds < 255).sum() == 6 and seeds.min() >= 1  # the twin has them all
    assert first["seeds"] == {"others": 2, "threshold": 0.9} and second["seeds"] is None

    alone = make(sae, null, corpus, tmp_path / "null.html", latents=None).data
    np.testing.assert_array_equal(data["idx-1"]["null_count"], alone["idx-0"]["count"])
    np.testing.assert_array_equal(data["idx-1"]["null_max"], alone["idx-0"]["max"])
    whole = alone["f-00000"]
    ends = np.cumsum(whole["hist_bins"], dtype=np.int64)
    place = np.concatenate([whole["hist"][ends[i] - whole["hist_bins"][i] : ends[i]] for i in data["pages"]["latent"]])
    np.testing.assert_array_equal(data["f-00000"]["null_hist"], place)

    steer = data["steer"]
    (row,) = [json.loads(text) for text in codec.cut(steer["text"], steer["length"])]
    assert steer["latent"].tolist() == [3] and row == {
        "operation": "add",
        "strength": 2.0,
        "text": HOSTILE[0],
        "kl": None,
    }


@pytest.mark.filterwarnings("ignore:no output score")  # of an untrained SAE
def test_a_sweep_shows_its_steered_texts_beside_the_unsteered_ones(tiny_llama, sae):
    prompts = ["the state", "a union of"]
    sweep = steering.sweep(
        tiny_llama, sae, latents=[3, 5], operations=["add"], strengths=[1, 2], prompts=prompts, unit="activation",
        max_new_tokens=4, progress=False,
    )  # fmt: skip
    table = sweep.to_pandas()
    plain = table[table.baseline == "none"].set_index("prompt").text
    rows = sweep_rows(sweep, 48)
    assert sorted(rows) == [3, 5] and {len(mine) for mine in rows.values()} == {4}
    for latent, mine in rows.items():
        steered = table[(table.baseline == "steered") & (table.latent == latent)].set_index(["prompt", "strength"])
        for row in mine:
            assert row["text"] == steered.text[row["prompt"], row["strength"]]
            assert row["baseline"] == plain[row["prompt"]]
            assert row["kl"] == pytest.approx(steered.kl_text[row["prompt"], row["strength"]])


def test_parquet_and_neuronpedia(tiny_llama, sae, corpus, tmp_path):
    import pandas

    page = make(sae, tiny_llama, corpus, tmp_path / "a.html", latents=[3, 4], labels={3: HOSTILE[0]}, parquet=True)
    folder = tmp_path / "a.parquet"
    features = pandas.read_parquet(folder / "features.parquet")
    data = page.data
    columns = data["f-00000"]
    assert features["count"].tolist() == data["idx-0"]["count"].tolist() and features.label[3] == HOSTILE[0]
    examples = pandas.read_parquet(folder / "examples.parquet")
    assert len(examples) == columns["windows"].sum()
    top = examples[(examples.latent == 3) & (examples.group == "Top")].iloc[0]
    assert top.acts[top.peak] == pytest.approx(top.act, rel=1 / 255) and top.act == columns["max"][0]
    assert set(pandas.read_parquet(folder / "neighbours.parquet").kind) == {"decoder", "encoder", "coactivation"}
    logits = pandas.read_parquet(folder / "logits.parquet")
    assert (logits[logits.kind == "top"].groupby("latent").size() == 10).all()

    batch = json.loads(page.to_neuronpedia(tmp_path / "np.json").read_text())
    assert (batch["model_id"], batch["layer"], batch["sae_set"]) == (tiny_llama.name, 1, SITE)
    feature = batch["features"][0]
    assert feature["feature_index"] == 3
    assert feature["frac_nonzero"] == columns["count"][0] / data.manifest["corpus"]["counted"]
    assert len(feature["pos_str"]) == len(feature["pos_values"]) == 10
    assert sum(feature["freq_hist_data_bar_heights"]) == columns["count"][0]
    assert len(feature["activations"]) == columns["windows"][0]
    for activation in feature["activations"]:
        assert len(activation["tokens"]) == len(activation["values"]) == 12
    assert max(feature["activations"][0]["values"]) == pytest.approx(columns["max"][0], rel=1e-6)


def test_in_a_notebook_the_page_is_in_a_sandbox(tiny_llama, sae, corpus, tmp_path, monkeypatch):
    page = make(sae, tiny_llama, corpus, tmp_path / "a.html", latents=2)
    shown = page._repr_html_()
    assert re.match(r'<iframe title="[^"]+" sandbox="allow-scripts allow-downloads" srcdoc="[^"]*"', shown)
    import html

    inside = re.search(r'srcdoc="([^"]*)"', shown)
    assert inside and html.unescape(inside[1]) == page.path.read_text(encoding="utf-8")
    assert "allow-same-origin" not in shown
    assert "<iframe" not in make(sae, tiny_llama, corpus, tmp_path / "out", latents=2)._repr_html_()
    monkeypatch.setattr("saelab.dashboards.result.EMBEDDED", 10)
    assert "<iframe" not in page._repr_html_()


def test_effects_are_bounded_in_full_passes(tiny_llama, sae, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(effects, "FULL_LATENTS", 5)
    data = make(sae, tiny_llama, corpus, tmp_path / "a.html", effects="direct").data
    columns = data["f-00000"]
    owner = np.repeat(columns["latent"], columns["windows"])[columns["x_window"]]
    assert len(set(owner)) <= 5 and (np.bincount(owner).max() == effects.FULL_CONTEXTS)
    whole = make(sae, tiny_llama, corpus, tmp_path / "b.html", effects="full").data["f-00000"]
    alive = (whole["count"] > 0).sum()
    assert len(set(np.repeat(whole["latent"], whole["windows"])[whole["x_window"]])) == alive


def test_run_dashboard_show_and_the_evaluation(tiny_llama, tmp_path):
    corpus = saelab.load_corpus(TEXTS * 4)
    run = saelab.train(
        tiny_llama, corpus, site=SITE, sae=saelab.TopK(k=4, d_sae=32), tokens=4_000, batch_size=500, context_length=LENGTH,
        out=tmp_path / "run", progress=False,
    )  # fmt: skip
    report = saelab.evaluate(run.sae, tiny_llama, corpus, tokens=320, sparsity_tokens=500, progress=False)
    options = {**QUIET, "tokens": 2_000, "window": 12}
    page = run.dashboard(lm=tiny_llama, corpus=corpus, **{**options, "evaluation": report})
    assert page.path == tmp_path / "run" / "dashboard.html"
    found = page.data.manifest["saes"][0]["evaluation"]
    assert found["delta_ce"] == report.delta_ce and found["split"] == "heldout"
    shown = run.sae.show(5, lm=tiny_llama, corpus=corpus, tokens=1_000, window=12, progress=False)
    assert shown.data["pages"]["latent"].tolist() == [5]
    with pytest.raises(ConfigError, match="give"):
        run.sae.show(5, lm=tiny_llama)  # a list of strings has no name to load it by
    with pytest.warns(UserWarning, match="the page has no evaluation"):
        nothing = saelab.load_corpus(torch.full((9, LENGTH), 65))
        make(run.sae, tiny_llama, nothing, tmp_path / "x.html", split="all", tokens=64, latents=[1], evaluation=True)


def test_the_command_line(tiny_llama, sae, tmp_path, monkeypatch, capsys):
    sae.save(tmp_path / "sae")
    monkeypatch.setattr(saelab, "load_model", lambda name, device="auto": tiny_llama)
    text = tmp_path / "corpus.txt"
    text.write_text("\n".join(TEXTS * 3))
    out, export = tmp_path / "page.html", tmp_path / "np.json"
    arguments = ["dashboard", str(tmp_path / "sae"), "--out", str(out), "--corpus", str(text), "--model", "toy",
                 "--tokens", "1_000",
                 "--latents", "3,4", "--window", "12", "--effects", "none", "--neuronpedia", str(export)]  # fmt: skip
    assert main(arguments) == 0
    assert f"{out}: open it in a browser" in capsys.readouterr().out
    assert [f["feature_index"] for f in json.loads(export.read_text())["features"]] == [3, 4]
    assert main([*arguments, "--memory", "0.0000001"]) == 2
    assert "bytes of memory" in capsys.readouterr().err
    assert main([*arguments, "--effects", "all"]) == 2
    assert "effects" in capsys.readouterr().err
