"""Labels from and for Neuronpedia and delphi."""

import gzip
import json
import math

import pytest

from saelab import ConfigError
from saelab.dashboards import Label, read_labels, write_labels
from saelab.dashboards.collecting.given import labels_of


def row(index, text, layer="3-res", **more):
    return {"modelId": "m", "layer": layer, "index": str(index), "description": text, "scoreV1": 0, **more}


def export(file, rows):
    text = "".join(json.dumps(entry) + "\n" for entry in rows).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(text) if file.suffix == ".gz" else text)
    return file


def test_an_export_of_neuronpedia(tmp_path):
    graded = [{"value": 0.5}, {"value": 0.9}]
    export(tmp_path / "explanations" / "batch-0.jsonl.gz", [row(2, "years"), row(2, "dates", scoreV2=0.4)])
    export(tmp_path / "explanations" / "batch-1.jsonl", [row(7, "war", scores=graded, explanationModelName="gpt")])
    found = read_labels(tmp_path)
    assert found == {2: Label("dates", 0.4, "Neuronpedia"), 7: Label("war", pytest.approx(0.7), "Neuronpedia, gpt")}
    several = export(tmp_path / "two.jsonl", [row(1, "a"), row(1, "b", layer="4-res")])
    assert read_labels(several, which="4-res")[1].text == "b"
    with pytest.raises(ConfigError, match="labels of 3-res, 4-res: say which="):
        read_labels(several)


def test_results_of_delphi(tmp_path):
    answers = [(True, True), (True, False), (False, True), (False, None)]  # fires, answered rightly
    scored = [{"activating": fires, "correct": right} for fires, right in answers]
    for folder in ("explanations", "scores/detection"):
        (tmp_path / folder).mkdir(parents=True)
    for latent in (4, 11):
        (tmp_path / "explanations" / f"layers.3_latent{latent}.txt").write_text(json.dumps(f"text {latent}"))
    (tmp_path / "scores" / "detection" / "layers.3_latent4.txt").write_text(json.dumps(scored))
    expected = {4: Label("text 4", 0.75, "delphi, detection"), 11: Label("text 11", None, "delphi")}
    assert read_labels(tmp_path) == read_labels(tmp_path, "layers.3") == expected


def test_ours_out_and_back(tmp_path):
    labels = {3: Label("years", 0.5), 0: 'ünïcode "quoted"\n'}
    place = {"which": "3-res"}
    file = write_labels(labels, tmp_path / "batch-0.jsonl.gz", "neuronpedia", model="m", **place)
    assert {i: label[:2] for i, label in read_labels(file).items()} == {3: ("years", 0.5), 0: (labels[0], None)}
    folder = write_labels(labels, tmp_path / "results", "delphi", which="layers.3")
    assert {i: label.text for i, label in read_labels(folder).items()} == {3: "years", 0: labels[0]}
    with pytest.raises(ConfigError, match="model= and which="):
        write_labels(labels, file, "neuronpedia", **place)
    with pytest.raises(ConfigError, match="'neuronpedia', 'delphi'"):
        write_labels(labels, file, "sae_vis", **place)


def test_scores_and_sources_reach_the_page(tiny_llama, tmp_path):
    import saelab
    from saelab import dashboards

    sae = saelab.SAE(saelab.TopK(k=3, d_sae=40), 32, {"site": "blocks.1.hook_resid_post"}).requires_grad_(False)
    corpus = saelab.load_corpus(["The state of the union is strong."] * 30)
    export(tmp_path / "e.jsonl.gz", [row(5, "five", scoreV2=0.25), row(2, "two", explanationModelName="gpt")])
    page = dashboards.build(
        sae,
        tiny_llama,
        corpus,
        tmp_path / "a.html",
        latents=4,
        tokens=300,
        effects=None,
        labels=tmp_path / "e.jsonl.gz",
    )
    found = page.data[page.data.manifest["saes"][0]["prefix"] + "lab"]
    assert found["latent"].tolist() == [2, 5] and found["source"].tolist() == [1, 0]
    assert math.isnan(found["score"][0]) and float(found["score"][1]) == 0.25


@pytest.mark.parametrize("content", [b"{", b'{"layer": 3}\n', b'["x"]\n', b"\x1f\x8b broken", b"x" * (2**22 + 9)])
def test_what_cannot_be_read_is_named(tmp_path, content):
    for name in ("a.jsonl", "a.jsonl.gz"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=f"cannot read labels in .*{name}"):
            read_labels(tmp_path / name)
        (tmp_path / name).unlink()
    with pytest.raises(ConfigError, match="neither an export"):
        read_labels(tmp_path)
    with pytest.raises(ConfigError, match="9"):
        labels_of({9: "x"}, 9)
