"""In the environment `tools`: SAEBench's core evaluation of the SAE, model and token ids in a folder, as SAEBench runs it.

    python saebench_driver.py FOLDER     `sae/`, `model/` and `ids.safetensors`; writes `saebench.json`

Only where its command line needs the hub something stands in: the model is a TransformerLens bridge of the folder, the data set
one of these ids. What is ours goes in as `saelab.interop.as_saelens` gives it.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from sae_bench.evals.core import main as core
from sae_bench.evals.core.eval_config import CoreEvalConfig
from sae_bench.sae_bench_utils.general_utils import load_and_format_sae
from sae_lens.training.activations_store import ActivationsStore
from safetensors.torch import load_file
from transformer_lens.model_bridge import TransformerBridge

import saelab

BATCH = 8


def main() -> None:
    folder = Path(sys.argv[1])
    ids = load_file(folder / "ids.safetensors")["ids"]
    n, length = ids.shape
    model = TransformerBridge.boot_transformers(str(folder / "model"), device="cpu", dtype=torch.float32)
    theirs = saelab.interop.as_saelens(saelab.SAE.load(folder / "sae"))
    _, sae, _ = load_and_format_sae("ours", theirs, "cpu")
    data = Dataset.from_dict({"input_ids": ids.tolist()})
    store = ActivationsStore.from_sae(
        model, sae, data, context_size=length, streaming=False, store_batch_size_prompts=BATCH
    )
    told = [store.get_batch_tokens(BATCH) for _ in range(n // BATCH)]
    assert torch.equal(torch.cat(told), ids), "the store of SAELens gives other contexts"
    store.reset_input_dataset()
    store.iterable_sequences = store._iterate_tokenized_sequences()
    config = CoreEvalConfig(
        model_name="local", batch_size_prompts=BATCH, n_eval_reconstruction_batches=n // BATCH,
        n_eval_sparsity_variance_batches=n // BATCH, context_size=length, compute_kl=True, compute_ce_loss=True,
        compute_l2_norms=True, compute_sparsity_metrics=True, compute_variance_metrics=True,
        compute_featurewise_density_statistics=True, compute_featurewise_weight_based_metrics=True,
    )  # fmt: skip
    tokenizer = model.tokenizer
    ignored = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}
    metrics, of_latents = core.run_evals(sae, store, model, config, ignore_tokens=ignored)
    metrics["misc_metrics"] = core.calculate_misc_metrics(of_latents)
    (folder / "saebench.json").write_text(json.dumps(metrics | {"version": version("sae-bench")}, indent=1))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
