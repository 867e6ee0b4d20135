"""Targeted perturbation and removal of spurious correlation, on latents that are planted."""

import numpy as np
import pytest

import saelab
from saelab import ConfigError, DataError
from saelab.evaluation.labelled import LabelledTexts
from saelab.evaluation.perturbation import CHANCE, Perturbation, perturbed
from saelab.evaluation.spurious_correlation import SpuriousCorrelation, removed
from tests import tiny


def planted(labels, columns, seed=0, d=40):
    """Texts whose latent `columns[label]` fires, eight others at random, and their activations."""
    chance = np.random.default_rng(seed)
    n, n_latents = len(labels), 1 + max(c for cs in columns.values() for c in cs) + 8
    rows = np.linalg.qr(chance.normal(size=(d, d)))[0][:n_latents]
    codes = chance.random((n, n_latents)) * (chance.random((n, n_latents)) < 0.5)
    codes[:, : n_latents - 8] = 0
    for number, label in enumerate(labels):
        codes[number, list(columns[label])] = 1 + chance.random()
    return codes @ rows + 0.02 * chance.normal(size=(n, d)), codes, rows


def texts(labels):
    return LabelledTexts("planted", tuple(map(str, range(len(labels)))), tuple(labels))


def test_ablation_moves_the_probe_of_its_own_class_and_no_other():
    labels = ["abcd"[i % 4] for i in range(240)]
    x, codes, rows = planted(labels, {label: (number,) for number, label in enumerate("abcd")})
    kept = np.ones(240, bool)
    own, others, told = perturbed(x, codes, rows, texts(labels), kept, 1)
    assert own[0] > 0.4 and abs(others[0]) < 0.02 and told == 80
    order = np.random.default_rng(1).permutation(len(rows))
    moved = perturbed(x, codes[:, order], rows[order], texts(labels), kept, 1)
    np.testing.assert_allclose(moved[0], own)
    by_chance = perturbed(x, codes[:, 4:], rows[4:], texts(labels), kept, 1, "chance")
    assert abs(by_chance[0][0]) < 0.05
    shuffled = np.random.default_rng(2).permutation(labels)
    assert abs(np.subtract(*perturbed(x, codes, rows, texts(shuffled), kept, 1)[:2])[0]) < 0.15


def test_what_a_probe_learnt_in_anothers_place_is_taken_out():
    labels = [("00", "01", "10", "11")[i % 4] for i in range(240)]
    x, codes, rows = planted(labels, {"00": (0, 2), "01": (0, 3), "10": (1, 2), "11": (1, 3)})
    x[:, :] = x + 2 * codes[:, 2:4] @ rows[2:4]  # the unwanted attribute is easier to read
    codes[:, 2:4] *= 3
    found, told = removed(x, codes, rows, texts(labels), np.ones(240, bool), [1, 2])
    assert told == 80 and found["unbiased"][0] == 1
    assert found["biased"][0] < 0.8 and found["n 2"][0] > found["biased"][0] + 0.15
    wrong, _ = removed(x, codes, rows, texts(labels), np.ones(240, bool), [2], "chance")
    assert wrong["n 2"][0] <= found["n 2"][0]


@pytest.fixture(scope="module")
def lm():
    return saelab.load_model(tiny.llama_model(), tokenizer=tiny.byte_tokenizer())


def test_both_run_in_the_protocol_with_their_controls(lm):
    sae = saelab.SAE(saelab.TopK(k=4, d_sae=48), 32, metadata={"site": "blocks.2.hook_resid_post"})
    said = [f"{a} {b} {number}" for a in ("the war", "a peace") for b in ("went on", "ended") for number in range(9)]
    wanted, unwanted = [text[:1] for text in said], [text.split()[2] for text in said]
    scores = saelab.benchmark(
        {"a": sae},
        lm,
        [Perturbation((said, wanted), ns=(2,)), SpuriousCorrelation((said, wanted), (said, unwanted), ns=(2,))],
    )
    table = scores.to_pandas()
    assert table.query("figure == 'tpp'").source.nunique() == 4 and table.query("figure == 'scr'").source.nunique() == 4
    assert scores.value("tpp", of="n 2") == pytest.approx(
        scores.value("own", of="n 2") - scores.value("others", of="n 2")
    )
    assert scores.value("accuracy", of="unbiased") >= 0.5 and scores.value("own", of="n 2", source=CHANCE) < 0.6


def test_attributes_that_cannot_be_crossed_are_named():
    said = [str(number) for number in range(36)]
    yes_no, other = list("yn" * 18), list("aaabbb" * 6)
    with pytest.raises(ConfigError, match="3 classes"):
        SpuriousCorrelation((said, list("abc" * 12)), (said, yes_no))
    with pytest.raises(DataError, match="0 texts of one of its four kinds"):
        SpuriousCorrelation((said, yes_no), (said, yes_no))
    assert len(SpuriousCorrelation((said, yes_no), (said, other)).crossed.texts) == 36


def test_where_the_biased_probe_lacks_nothing_there_is_no_share_of_it(lm, monkeypatch):
    sae = saelab.SAE(saelab.TopK(k=4, d_sae=48), 32, metadata={"site": "blocks.2.hook_resid_post"})
    said = [f"{a} {b} {number}" for a in ("war", "peace") for b in ("on", "off") for number in range(9)]
    task = SpuriousCorrelation((said, [t.split()[0] for t in said]), (said, [t.split()[1] for t in said]), ns=(2,))
    for biased, value in ((0.5, 0.5), (0.9, float("nan"))):
        found = {"biased": np.full(501, biased), "unbiased": np.full(501, 0.9), "n 2": np.full(501, 0.7)}
        found["biased"][1:21] = 0.9  # one resample in twenty-five
        monkeypatch.setattr("saelab.evaluation.spurious_correlation.removed", lambda *_, found=found: (dict(found), 36))
        row = task.run({"a": sae}, lm).to_pandas().query("figure == 'scr' and source == 'sae'").iloc[0]
        assert row.value == pytest.approx(value, nan_ok=True) and np.isnan(row.low)
