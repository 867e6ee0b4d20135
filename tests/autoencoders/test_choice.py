import pytest
import torch

import saelab
from saelab import ConfigError, MutualChoice, TopK
from tests.training.test_train import planted, run_on


def test_a_batch_spends_its_budget_and_no_more():
    sae = saelab.SAE(MutualChoice(k=4, d_sae=50), 16)
    x = planted(128)
    scores = sae.cfg.scores(sae.params(), saelab.autoencoders.architecture.Batch(x, x))
    codes = sae.cfg.allocate(scores, sae.state, 0.0)
    assert len(codes.values) == 4 * 128
    dense = scores.dense().relu().flatten()
    assert torch.equal(codes.values.sort().values, dense.sort().values[-512:])


def test_the_threshold_gives_k_on_new_rows_and_survives_saving(tmp_path):
    x = planted(30_000)
    sae = run_on(x[:20_000], sae=MutualChoice(k=4, d_sae=64), tokens=100_000).sae
    assert sae.encode_sparse(x[20_000:]).l0 == pytest.approx(4, rel=0.1)
    sae.save(tmp_path / "sae")
    again = saelab.SAE.load(tmp_path / "sae")
    assert torch.equal(again(x[:100]), sae(x[:100]))
    scale = float(sae.state.scale)
    more = run_on(x * 64, sae=sae, tokens=2000, batch_size=128, lr=0.0).sae
    assert float(more.state.scale) == scale / 64


def test_it_reconstructs_better_than_topk_where_tokens_differ():
    x = planted(20_000)
    x[::2] *= 0.05
    mutual = run_on(x, sae=MutualChoice(k=2, d_sae=64), tokens=100_000, max_norm=None)
    top = run_on(x, sae=TopK(k=2, d_sae=64), tokens=100_000, max_norm=None)
    assert mutual.history.loss.iloc[-1] < top.history.loss.iloc[-1]


def test_without_a_threshold_inference_says_so():
    with pytest.raises(ConfigError, match="threshold"):
        saelab.SAE(MutualChoice(k=2, d_sae=8), 4)(torch.randn(2, 4))


def test_its_other_name():
    assert saelab.BatchTopK is MutualChoice


def test_resume_is_bitwise_with_thresholds(tmp_path):
    from tests.training.test_train import interrupting

    x = planted()
    arguments = {"sae": MutualChoice(k=3, d_sae=64), "tokens": 6000, "log_every": 1}
    whole = run_on(x, **arguments)
    assert run_on(x, out=tmp_path / "run", loggers=[interrupting(15)], **arguments).interrupted
    rest = run_on(x, out=tmp_path / "run", **arguments)
    assert all(torch.equal(rest.sae.state_dict()[name], tensor) for name, tensor in whole.sae.state_dict().items())
