"""The benchmark: its protocol, what it keeps, and the stability of latents."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas
import pytest
import torch

import saelab
from saelab import ConfigError, SiteError
from saelab.evaluation.matching import matched
from saelab.evaluation.scores import Score, Scores
from saelab.evaluation.stability import NULL, Stability, directions
from tests import tiny

SITE = "blocks.2.hook_resid_post"


@pytest.fixture(scope="module")
def lm():
    return saelab.load_model(tiny.llama_model(), tokenizer=tiny.byte_tokenizer())


def sae(rows, site=SITE):
    made = saelab.SAE(saelab.TopK(k=2, d_sae=len(rows)), rows.shape[1], metadata={"site": site}).requires_grad_(False)
    made.W_dec.copy_(rows)
    return made


def rows(n, seed=0, d=32):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_latents_are_found_again_whatever_their_order_and_length():
    first, other = rows(48), rows(48, 1)
    mixed = torch.cat([first[:12], other[12:]])
    order = torch.randperm(48, generator=torch.Generator().manual_seed(2))
    scaled = (mixed * (torch.rand(48, 1) + 0.5))[order]
    plain, moved = (Stability().run({"a": sae(first), "b": sae(second)}) for second in (mixed, scaled))
    assert plain.value("universal", sae="a", of="b") == 0.25
    assert plain.value("universal", sae="a", of="b", source=NULL) < 0.05
    np.testing.assert_allclose(
        plain.to_pandas()[["value", "low", "high"]], moved.to_pandas()[["value", "low", "high"]], atol=1e-5
    )
    table = moved.details["stability"]
    assert order[table[table.sae == "a"].matched.tolist()[:12]].tolist() == list(range(12))


def test_what_rows_have_in_common_is_no_latent_found_again():
    shared = 3 * rows(1, 5)
    scores = Stability().run({"a": sae(rows(64) + shared), "b": sae(rows(64, 1) + shared)})
    for figure in ("mean maximum cosine", "matched cosine"):
        value, null = (scores.value(figure, sae="a", of="b", source=source) for source in ("sae", NULL))
        assert value > 0.8 and abs(value - null) < 0.03


def test_what_would_take_hours_to_match_is_refused():
    with pytest.raises(ConfigError, match="65,536 takes 34 GB and hours: give smaller SAEs"):
        matched(torch.zeros(1).expand(65_536, 65_536))


def test_a_smaller_one_is_found_whole_in_a_larger_and_silent_latents_do_not_count():
    large = sae(rows(40))
    scores = Stability().run({"small": sae(rows(40)[:10]), "large": large})
    assert scores.value("universal", sae="small", of="large") == 1
    assert scores.value("universal", sae="large", of="small") == 0.25
    found = scores.to_pandas().query("sae == 'large' and figure == 'matched cosine' and source == 'sae'")
    assert found.n.tolist() == [10] and found.value.tolist() == pytest.approx([1.0])
    large.W_dec[10:] = 0
    assert Stability().run({"small": sae(rows(40)[:10]), "large": large}).value("universal", sae="large") == 1


def test_latents_that_never_fired_in_training_are_left_out():
    planted = saelab.synthetic.make(6, 8, l0=1.0)
    run = saelab.train(planted, sae=saelab.TopK(k=1, d_sae=64), tokens=9000, progress=False)
    fired = (run.sae.latent_stats.max > 0).nonzero()[:, 0]
    assert 0 < len(fired) < 64 and torch.equal(directions(run.sae)[0], fired)


@dataclass(frozen=True)
class Counting:
    calls: list
    stops: bool = False
    name: ClassVar[str] = "counting"

    def __repr__(self):
        return "Counting"

    def run(self, saes, lm):
        if self.stops:
            raise KeyboardInterrupt
        self.calls.append(1)
        details = pandas.DataFrame({"x": [1.5, float("nan")]})
        return sum((Scores.of(name, self.name, [Score.mean("x", [1.0])], details) for name in saes), Scores([]))


def test_what_is_done_is_kept_and_goes_on(lm, tmp_path):
    saes, calls = {"a": sae(rows(8)), "b": sae(rows(8, 1))}, []
    with pytest.raises(KeyboardInterrupt):
        saelab.benchmark(saes, lm, (Stability(), Counting(calls, stops=True)), out=tmp_path / "scores")
    assert [path.name.split("-")[0] for path in (tmp_path / "scores").glob("*.json")] == ["stability"]
    first, again = (saelab.benchmark(saes, lm, ("stability", Counting(calls)), out=tmp_path / "scores") for _ in "12")
    assert len(calls) == 1
    plain = saelab.benchmark(saes, lm, ("stability", Counting(calls)))
    for kept in (first, again):
        pandas.testing.assert_frame_equal(kept.to_pandas(), plain.to_pandas())
        for name, table in plain.details.items():
            pandas.testing.assert_frame_equal(kept.details[name], table, check_like=True)
    saes["b"].W_dec[0] += 1
    saelab.benchmark(saes, lm, (Counting(calls),), out=tmp_path / "scores")
    assert len(calls) == 3  # another autoencoder: nothing kept is its
    saelab.benchmark(
        saes,
        saelab.load_model(tiny.llama_model(1), tokenizer=tiny.byte_tokenizer()),
        (Counting(calls),),
        tmp_path / "scores",
    )
    assert len(calls) == 4  # nor another model's of the same name


def test_bad_input_is_named_before_anything_is_computed(lm):
    good = sae(rows(8))
    with pytest.raises(ConfigError, match="this is one"):
        saelab.benchmark(good, lm, "stability")
    with pytest.raises(ConfigError, match="one of tasks"):
        saelab.benchmark([good, good], lm, ("stabilty",))
    with pytest.raises(ConfigError, match="there is no task"):
        saelab.benchmark(good, lm, ())
    with pytest.raises(SiteError, match="8 wide"):
        saelab.benchmark(sae(rows(8, d=8)), lm)
    with pytest.raises(ConfigError, match="of one site"):
        saelab.benchmark([good, sae(rows(8), "blocks.1.hook_resid_post")], lm, "stability")
    with pytest.raises(ConfigError, match="language model"):
        saelab.benchmark(good, "lm")
