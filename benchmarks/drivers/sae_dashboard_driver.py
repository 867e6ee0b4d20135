"""Runs in the sae-dashboard environment with the checkout on PYTHONPATH: see dashboards.py.

One random HookedTransformer, one TopK SAE saved by saelab and read by sae-lens, one set of tokens; each library makes its page.
"""

import argparse
import json
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig

import saelab

SITE = "blocks.2.hook_resid_post"


TOY = "--tokens 4096 --latents 16 --d-sae 256 --k 8 --d-model 64 --vocab 500 --threads 1".split()


def check() -> None:
    """A small page by each library: the environment works."""
    for who in ("saelab", "sae-dashboard"):
        with tempfile.TemporaryDirectory() as folder:
            main(["--who", who, "--folder", folder, *TOY])
            print(who, (Path(folder) / f"{who}.json").read_text())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    for name in ("tokens", "latents", "d-sae", "k", "d-model", "vocab"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--who", choices=("saelab", "sae-dashboard"), required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    model = HookedTransformer(
        HookedTransformerConfig(
            n_layers=4, d_model=args.d_model, d_head=32, n_heads=args.d_model // 32, d_mlp=4 * args.d_model, n_ctx=128,
            d_vocab=args.vocab, act_fn="gelu_new", seed=0, device="cpu",
        )
    ).eval()  # fmt: skip
    model.tokenizer = tokenizer(args.vocab)
    ids = torch.randint(args.vocab - 1, (-(-args.tokens // 128), 128), generator=torch.Generator().manual_seed(0))
    facts = {"site": SITE, "context_length": 128, "skip_positions": 0, "model": "random"}
    sae = saelab.SAE(saelab.TopK(k=args.k, d_sae=args.d_sae), args.d_model, facts, seed=0)
    sae.save(args.folder / "sae")
    start = time.perf_counter()
    make = by_saelab if args.who == "saelab" else by_sae_dashboard
    page = make(model, sae, ids, args)
    seconds = time.perf_counter() - start
    version = saelab.__version__ if args.who == "saelab" else metadata.version(args.who)
    answer = {"seconds": seconds, "bytes": page.stat().st_size, "version": version}
    (args.folder / f"{args.who}.json").write_text(json.dumps(answer))


def tokenizer(vocab: int):
    """One word an id."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(vocab - 1)} | {"<|endoftext|>": vocab - 1}
    core = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=end, eos_token=end, pad_token=end)


def by_saelab(model: HookedTransformer, sae: saelab.SAE, ids: torch.Tensor, args: argparse.Namespace) -> Path:
    lm = saelab.load_model(model, tokenizer=model.tokenizer)
    return saelab.dashboards.build(
        sae, lm, saelab.load_corpus(ids), args.folder / "saelab.html", latents=args.latents, tokens=args.tokens,
        effects=None, evaluation=None, parquet=False, split="all", work=args.folder / "work", progress=False,
    ).path  # fmt: skip


def by_sae_dashboard(model: HookedTransformer, _: saelab.SAE, ids: torch.Tensor, args: argparse.Namespace) -> Path:
    from sae_dashboard.data_writing_fns import save_feature_centric_vis
    from sae_dashboard.sae_vis_data import SaeVisConfig
    from sae_dashboard.sae_vis_runner import SaeVisRunner
    from sae_lens import SAE

    sae = SAE.load_from_disk(str(args.folder / "sae"))
    config = SaeVisConfig(hook_point=SITE, features=list(range(args.latents)), device="cpu", dtype="float32")
    data = SaeVisRunner(config).run(encoder=sae, model=model, tokens=ids)
    page = args.folder / "sae-dashboard.html"
    save_feature_centric_vis(sae_vis_data=data, filename=page)
    return page


if __name__ == "__main__":
    check() if "--check" in sys.argv else main()
