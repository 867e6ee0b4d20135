"""What a benchmark's scores show: a figure, a page, a command."""

import base64
import gzip
import json
import re

import pytest

import saelab
from saelab.cli import main
from saelab.evaluation.scores import Score, Scores
from tests import tiny


@pytest.fixture
def scores():
    rows = [
        Score.mean("f1", [0.5, 1.0], of="k 1"),
        Score("f1", 0.2, 0.1, 0.3, 2, "k 1", "chance"),
        Score("l0", 3.0, *[float("nan")] * 2, 9),
    ]
    return Scores.of("mine", "recovery", rows) + Scores.of("</script>", "absorption", rows[:1])


def test_a_plot_has_every_figure_with_its_bounds(scores):
    figure = scores.plot()
    assert {trace.name for trace in figure.data} == {"mine", "chance (mine)", "</script>"}
    chance = next(trace for trace in figure.data if trace.name == "chance (mine)")
    assert chance.x[0] == 0.2 and chance.error_x.array[0] == pytest.approx(0.1)
    assert chance.error_x.arrayminus[0] == pytest.approx(0.1)


def test_many_are_printed_in_part(scores):
    many = sum((Scores.of("a" * 100, f"task {i}", [Score("f1", 0.5, 0.1, 0.9, 2)]) for i in range(60)), scores)
    assert len(repr(many).encode()) < 2_000 and "52 more" in repr(many) and "more" not in repr(scores)


def test_a_page_holds_them_as_data(scores, tmp_path):
    text = scores.to_html(tmp_path / "scores.html").read_text()
    (chunk,) = re.findall(r'id="data">([^<]+)</script>', text)
    raw = base64.b64decode(chunk)
    data = json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
    assert data["saes"] == ["mine", "</script>"]
    first, second = data["parts"]
    assert [group["figure"] for group in first["groups"]] == ["f1, k 1", "l0"] and second["task"] == "absorption"
    assert first["groups"][0]["rows"][1] == {
        "who": "chance (mine)",
        "control": True,
        "value": 0.2,
        "low": 0.1,
        "high": 0.3,
        "n": 2,
    }
    assert first["groups"][1]["rows"][0]["low"] is None


def test_the_command_prints_and_writes_them(tmp_path, capsys, monkeypatch):
    lm = saelab.load_model(tiny.llama_model(), tokenizer=tiny.byte_tokenizer())
    monkeypatch.setattr(saelab, "load_model", lambda *_, **__: lm)
    for seed in (0, 1):
        sae = saelab.SAE(
            saelab.TopK(k=2, d_sae=16), 32, metadata={"site": "blocks.1.hook_resid_post", "model": "tiny"}, seed=seed
        )
        sae.save(tmp_path / str(seed))
    line = [
        "benchmark",
        str(tmp_path / "0"),
        str(tmp_path / "1"),
        "--tasks",
        "stability",
        "--html",
        str(tmp_path / "s.html"),
    ]
    assert main([*line, "--csv", str(tmp_path / "s.csv"), "--out", str(tmp_path / "kept")]) == 0
    assert "matched cosine" in capsys.readouterr().out
    assert (tmp_path / "s.html").exists() and len((tmp_path / "s.csv").read_text().splitlines()) == 13
    assert len(list((tmp_path / "kept").glob("*.json"))) == 1
