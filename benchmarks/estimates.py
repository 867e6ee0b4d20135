"""What `saelab.estimate` says against what a run takes, for every architecture, each in a process of its own.

    python benchmarks/estimates.py [d_in d_sae batch_size tokens]

Memory is what the run adds to the process's resident memory at its peak, so the allocator's own is in it; a small run has
loaded the libraries before.
"""

import json
import resource
import subprocess
import sys
import time

import torch

import saelab

SAES = {
    "TopK": lambda d: saelab.TopK(k=32, d_sae=d),
    "MutualChoice": lambda d: saelab.MutualChoice(k=32, d_sae=d),
    "FeatureChoice": lambda d: saelab.FeatureChoice(k=32, d_sae=d),
    "Matryoshka": lambda d: saelab.Matryoshka(k=32, d_sae=d),
    "MultiTopK": lambda d: saelab.MultiTopK(k=32, d_sae=d),
    "JumpReLU": lambda d: saelab.JumpReLU(target_l0=32, d_sae=d),
    "ReLU": lambda d: saelab.ReLU(l1=1.0, d_sae=d),
    "Gated": lambda d: saelab.Gated(l1=1.0, d_sae=d),
    "Transcoder": lambda d: saelab.Transcoder(of=saelab.TopK(k=32, d_sae=d)),
}


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def one(name: str, what: str, d_in: int, d_sae: int, batch_size: int, tokens: int) -> None:
    """Estimate or train this one, and print seconds and bytes."""
    generator = torch.Generator().manual_seed(0)
    sae = SAES[name](d_sae)
    planted = torch.randn(1024, d_in, generator=generator)
    x = torch.relu(torch.randn(2 * batch_size, 1024, generator=generator) - 2) @ planted
    source = (x, x) if name == "Transcoder" else x
    how = {"sae": sae, "tokens": tokens, "batch_size": batch_size, "progress": False}
    saelab.train(torch.randn(512, 32), sae=saelab.TopK(k=2, d_sae=64), tokens=2048, batch_size=256, progress=False)
    before, start = peak(), time.perf_counter()
    if what == "estimate":
        found = saelab.estimate(source, **{k: v for k, v in how.items() if k != "progress"})
        print(json.dumps([sum(found.seconds.values()), sum(found.memory.values())]))
    else:
        saelab.train(source, **how)
        print(json.dumps([time.perf_counter() - start, peak() - before]))


def main() -> None:
    sizes = sys.argv[1:5] or ["256", "8192", "2048", "163840"]
    print(f"{'':14}{'seconds':>9}{'said':>8}{'ratio':>7}{'MiB':>8}{'said':>8}{'ratio':>7}")
    for name in SAES:
        (said_s, said_b), (took_s, took_b) = (
            json.loads(subprocess.check_output([sys.executable, __file__, "one", name, what, *sizes]).splitlines()[-1])
            for what in ("estimate", "train")
        )
        ratios = said_s / took_s, said_b / took_b
        mib = 2**20
        print(
            f"{name:14}{took_s:9.1f}{said_s:8.1f}{ratios[0]:7.2f}{took_b / mib:8.0f}{said_b / mib:8.0f}{ratios[1]:7.2f}"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        one(sys.argv[2], sys.argv[3], *map(int, sys.argv[4:]))
    else:
        main()
