"""What processes that torchrun has started do in test_lanes.py: `python -m tests.training.ranks CASE FOLDER [RANK STEP]`."""

import os
import signal
import sys
from pathlib import Path

import torch

import saelab
from saelab.base import processes
from saelab.training.step import Trainer
from tests import tiny

STEPS, BATCH, LANES = 50, 128, 4
SITE = "blocks.1.hook_resid_post"
SAES = {
    "topk": saelab.TopK(k=4, d_sae=128),
    "multitopk": saelab.MultiTopK(k=4, d_sae=128),
    "lowrank": saelab.LowRank(d_sae=128),
    "gradient": saelab.GradientTopK(k=4, d_sae=128),
    "mutual": saelab.MutualChoice(k=4, d_sae=128),
    "zipf": saelab.MutualChoice(k=4, d_sae=128, aux="zipf"),
    "matryoshka": saelab.Matryoshka(k=4, d_sae=128),
    "feature": saelab.FeatureChoice(k=4, d_sae=128, mutual_share=0.5),
    "relu": saelab.ReLU(l1=1.0, d_sae=128),
    "resampled": saelab.ReLU(l1=1.0, d_sae=128, unit_decoder=True, resample=True),
    "gated": saelab.Gated(l1=1.0, d_sae=128),
    "jump": saelab.JumpReLU(target_l0=4, d_sae=128),
    "transcoder": saelab.Transcoder(of=saelab.MutualChoice(k=4, d_sae=128), skip=True),
}


def curves(folder: Path) -> None:
    """Train every architecture; loss of each step and state in the end."""
    lm = saelab.load_model(tiny.llama_model(), tokenizer=tiny.byte_tokenizer(), device="cpu")
    corpus = torch.randint(0, 256, (128, 33), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    x = torch.relu(torch.randn(4096, 256, generator=generator) - 1.5) @ torch.randn(256, 32, generator=generator)
    pieces, pairs = list(x.split(100)), list(zip(x.split(100), x.roll(1, 1).split(100), strict=True))
    for name, cfg in SAES.items():
        source = (lm, corpus) if cfg.needs_gradients else (pieces if cfg.centres_input else pairs,)
        run = saelab.train(
            *source, site=SITE, sae=cfg, tokens=STEPS * BATCH, batch_size=BATCH, lanes=LANES, buffer_tokens=9216, lr=1e-4,
            log_every=1, progress=False,
        )  # fmt: skip
        if processes.first():
            tensors = dict(run.sae.state_dict()) | {"loss": torch.tensor(run.history.loss.to_numpy())}
            torch.save(tensors, folder / f"{name}.pt")


def counted(folder: Path, rank: int = -1, step: int = -1) -> None:
    """Train on rows that each have a number, which is written with the step's; one process is killed in the end of a step."""
    x = torch.cat([torch.arange(1.0, 1025).unsqueeze(1), torch.randn(1024, 3, generator=torch.Generator())], 1)
    take = Trainer.step

    def noted(trainer, rows, log=True):
        with (folder / f"rows {os.getpid()}").open("a") as file:
            print(trainer.done, *rows["x"][:, 0].long().tolist(), file=file)
        figures = take(trainer, rows, log)
        if (processes.rank(), trainer.done) == (rank, step):
            os.kill(os.getpid(), signal.SIGKILL)
        return figures

    Trainer.step = noted
    run = saelab.train(
        list(x.split(16)), sae=saelab.TopK(k=2, d_sae=16), tokens=1024, batch_size=32, lanes=LANES, buffer_tokens=9216,
        max_norm=None, checkpoint_every=128, out=folder / "run", progress=False,
    )  # fmt: skip
    torch.save(run.sae.state_dict(), folder / f"sae {processes.rank()}.pt")


def differing(folder: Path) -> None:
    """Other arguments in one process than in the other; rows of its own in each; a batch that does not divide."""
    processes.join()
    rank, x = processes.rank(), torch.ones(64, 4)
    cases = [(x, {"seed": rank}), (x + rank, {}), (x, {"batch_size": 33}), (x, {"lanes": 3}), (x.unsqueeze(rank), {})]
    for number, (rows, more) in enumerate(cases):
        try:
            saelab.train(
                rows, **{"sae": saelab.TopK(k=2, d_sae=16), "tokens": 64, "batch_size": 32, "progress": False} | more
            )
        except saelab.SaelabError as error:
            (folder / f"{number} {rank}").write_text(f"{type(error).__name__}: {error}")


def estimated(folder: Path) -> None:
    """What training takes in each of the processes."""
    processes.join()
    lm = saelab.load_model(tiny.llama_model(), tokenizer=tiny.byte_tokenizer(), device="cpu")
    corpus = torch.randint(0, 256, (128, 33), generator=torch.Generator().manual_seed(0))
    found = saelab.estimate(
        lm, corpus, site=SITE, sae=SAES["topk"], tokens=64_000, batch_size=BATCH, buffer_tokens=50_000
    )
    torch.save(found.memory, folder / f"memory {processes.rank()}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    case, folder, *more = sys.argv[1:]
    {"curves": curves, "counted": counted, "differing": differing, "estimated": estimated}[case](
        Path(folder), *map(int, more)
    )
