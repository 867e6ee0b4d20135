"""Steps of two processes that train together: equal to each other, and to one process with the batches of both.

And what makes that easy to see: allocation and selection are pure, a batch teaches in `observe` and after the step.
"""

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.multiprocessing

import saelab
from saelab.autoencoders.architecture import Architecture, Batch
from saelab.training.schedule import Schedule
from saelab.training.step import Trainer

pytestmark = pytest.mark.slow

STEPS, EACH = 60, 48
SAES = {
    "topk": saelab.TopK(k=2, d_sae=32),
    "multitopk": saelab.MultiTopK(k=2, d_sae=32),
    "lowrank": saelab.LowRank(d_sae=32),
    "gradient": saelab.GradientTopK(k=2, d_sae=32),
    "mutual": saelab.MutualChoice(k=2, d_sae=32),
    "zipf": saelab.MutualChoice(k=2, d_sae=32, aux="zipf"),
    "matryoshka": saelab.Matryoshka(k=2, d_sae=32),
    "feature": saelab.FeatureChoice(k=2, d_sae=32, mutual_share=0.5),
    "relu": saelab.ReLU(l1=1.0, d_sae=32),
    "resampled": saelab.ReLU(l1=1.0, d_sae=32, unit_decoder=True, resample=True),
    "gated": saelab.Gated(l1=1.0, d_sae=32),
    "jump": saelab.JumpReLU(target_l0=2, d_sae=32),
    "transcoder": saelab.Transcoder(of=saelab.MutualChoice(k=2, d_sae=32), skip=True),
}


def batches(cfg, rank=None):
    """The rows of each step: of one process, or of both together. Those of the second are four times as large."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        x = torch.relu(torch.randn(2 * EACH, 8, generator=generator))
        x[EACH:] *= 4
        gradient = torch.randn(2 * EACH, 8, generator=generator)
        rows = {"x": x} | ({"gradient": gradient} if cfg.needs_gradients else {})
        rows |= {} if cfg.centres_input else {"target": x.roll(1, 1)}
        yield rows if rank is None else {name: column[rank * EACH :][:EACH] for name, column in rows.items()}


def trained(cfg, rank=None):
    """The state after a run of that many steps, and the figures of the last one."""
    trainer = Trainer(saelab.SAE(cfg, 8), Schedule(tokens=STEPS * 2 * EACH, batch_size=2 * EACH), lr=1e-3)
    figures = {}
    for i, rows in enumerate(batches(cfg, rank)):
        if i == 0:
            trainer.initialise(rows)
            # some are dead and stay so: aux-k and resampling have work
            trainer.sae.state.tokens_since_fired[:4] = 10**9
            trainer.sae.encoder_bias.data[:4] = -100
        figures = {name: float(value) for name, value in trainer.step(rows).items()}
    trainer.finish()
    return {name: tensor.clone() for name, tensor in trainer.sae.state_dict().items()}, figures


def work(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {name: trained(cfg, rank) for name, cfg in SAES.items()}
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", SAES)
def test_both_processes_end_with_the_same_bits(two, name):
    (one, figures), (other, others) = two[0][name], two[1][name]
    assert figures == others
    assert [key for key in one if not torch.equal(one[key].nan_to_num(-1), other[key].nan_to_num(-1))] == []


@pytest.mark.parametrize("name", SAES)
def test_two_processes_are_one_with_both_batches(two, name):
    """To rounding: masks and counts are equal, sums are added in another order."""
    (found, figures), (expected, alone) = two[0][name], trained(SAES[name])
    for key, tensor in expected.items():
        close = {"rtol": 2e-3, "atol": 2e-4, "equal_nan": True}
        if key == "state.histogram":  # rounding moves a score to the next cell: one more or less below an edge
            found[key], tensor, close["atol"] = found[key].cumsum(-1), tensor.cumsum(-1), 1.0
        torch.testing.assert_close(found[key], tensor, **close, msg=lambda m, key=key: f"{key}: {m}")
    assert figures == pytest.approx(alone, rel=1e-3, abs=1e-5)


# --- purity


@pytest.mark.parametrize("name", SAES)
def test_allocation_and_selection_change_no_state(name):
    cfg = SAES[name]
    trainer = Trainer(saelab.SAE(cfg, 8), Schedule(tokens=STEPS * 2 * EACH, batch_size=2 * EACH), lr=1e-3)
    sae = trainer.sae
    for i, rows in enumerate(batches(cfg)):
        if i == 0:
            trainer.initialise(rows)
        trainer.step(rows)
        before = copy.deepcopy(sae.state)
        progress = trainer.schedule.progress(trainer.done)
        scores = cfg.scores(sae.params(), Batch(rows["x"], rows["x"], rows.get("gradient")))
        first, second = (cfg.allocate(scores, sae.state, progress) for _ in range(2))
        dense = [codes if isinstance(codes, torch.Tensor) else codes.to_dense() for codes in (first, second)]
        assert torch.equal(*dense)
        if cfg.usable(sae.state):
            sae.encode(rows["x"])
        for (key, old), new in zip(before.named_buffers(), sae.state.buffers(), strict=True):
            assert torch.equal(old.nan_to_num(-1), new.nan_to_num(-1)), key


def test_an_architecture_that_learns_while_it_allocates_learns_nothing_at_inference():
    @dataclass(frozen=True, repr=False, kw_only=True)
    class Impure(Architecture):
        k: int

        def buffers(self):
            return {"cut_sum": torch.zeros(())}

        def allocate(self, scores, state, progress):
            codes = scores.per_batch(self.k * len(scores.x_ND))
            state.cut_sum.add_(codes.values.detach().amin())
            return codes

    sae = saelab.SAE(Impure(k=2, d_sae=16), 8)
    codes = sae.encode(torch.randn(4, 8))
    assert float(sae.state.cut_sum) == 0 and int((codes > 0).sum()) == 8
