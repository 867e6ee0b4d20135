"""In a tool's environment: let it use the SAEs in a folder, and print how far what it computes is from ours (inside_tools.py).

    python inside_tools_driver.py TOOL FOLDER

No hub: the models are of the folder or made here, as each tool takes them.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch

import saelab


def sae_probes(folder):
    """The AUC of probes of k latents, by our SAE itself and by SAELens' object, on one of its data sets."""
    from sae_probes.generate_model_activations import ensure_dataset_activations
    from sae_probes.run_sae_evals import run_sae_evals
    from sae_probes.utils_data import get_dataset_sizes
    from transformer_lens.model_bridge import TransformerBridge

    sizes = get_dataset_sizes()
    data, site = min(sizes, key=sizes.get), "blocks.3.hook_resid_post"
    model = TransformerBridge.boot_transformers(str(folder / "model"), device="cpu", dtype=torch.float32)
    ensure_dataset_activations("bundled", [data], [site], folder, "cpu", max_seq_len=64, model=model)
    sae, scores = saelab.SAE.load(folder / "sae"), {}
    for name, given in {"ours": sae, "as_saelens": saelab.interop.as_saelens(sae)}.items():
        run_sae_evals(
            given, "bundled", site, "l1", "normal", ks=[1, 16], results_path=folder / name, model_cache_path=folder,
            datasets=[data], device="cpu",
        )  # fmt: skip
        (file,) = (folder / name).rglob("*.json")
        scores[name] = {score["k"]: score["test_auc"] for score in json.loads(file.read_text())}
    difference = max(abs(scores["ours"][k] - scores["as_saelens"][k]) for k in (1, 16))
    return {"difference": difference, "data": data, "prompts": sizes[data], "auc": scores["ours"]}


def delphi(folder):
    """What its cache holds of each hookpoint, against the codes of what saelab records there."""
    from delphi.latents import LatentCache
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    sae = saelab.SAE.load(folder / "sae")
    ids = torch.randint(100, (16, 32), generator=torch.Generator().manual_seed(0))
    cache = LatentCache(model.model, {"layers.1": sae.encode}, batch_size=4)
    cache.run(ids.numel(), ids)
    (folder / "latents").mkdir()
    cache.save_splits(4, folder / "latents")
    found = torch.zeros(*ids.shape, sae.d_sae)
    batch, position, latent = cache.cache.latent_locations["layers.1"].T
    found[batch, position, latent] = cache.cache.latent_activations["layers.1"]
    expected = sae.encode(saelab.load_model(model).record(ids, "blocks.1.hook_resid_post"))
    files = sorted(path.name for path in (folder / "latents").rglob("*.safetensors"))
    return {"difference": away(found, expected), "activations": int(found.count_nonzero()), "splits": files}


def circuit_tracer(folder):
    """The active latents of a graph, against those of ours on what the model has there."""
    import yaml
    from circuit_tracer import attribute
    from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
    from circuit_tracer.utils.hf_utils import load_transcoders
    from sae_dashboard_driver import tokenizer
    from transformer_lens import HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=2, d_model=32, d_head=8, n_heads=4, d_mlp=64, n_ctx=32, d_vocab=100, act_fn="gelu_new", seed=0, device="cpu",
        normalization_type="LN", model_name="random", dtype=torch.float32,
    )  # fmt: skip
    ids, worst, nodes = torch.randint(99, (12,), generator=torch.Generator().manual_seed(1)), 0.0, {}
    ids[0] = 99  # its BOS, which it would put in front
    for name in ("relu", "skip"):
        told = yaml.safe_load((folder / name / "set" / "config.yaml").read_text())
        told |= {
            "scan": "ours",
            "transcoders": [str(folder / name / "set" / f"layer_{i}.safetensors") for i in range(2)],
        }
        model = TransformerLensReplacementModel.from_config(config, load_transcoders(told, device=torch.device("cpu")))
        model.tokenizer = tokenizer(100)
        graph = attribute(ids, model, batch_size=64, max_n_logits=3)
        found = torch.zeros(2, len(ids), 96)
        layer, position, latent = graph.active_features.T
        found[layer, position, latent] = graph.activation_values
        _, cache = model.run_with_cache(ids[None], names_filter=lambda hook: hook.endswith("ln2.hook_normalized"))
        ours = [saelab.SAE.load(folder / name / f"ours_{i}") for i in range(2)]
        codes = [sae.encode(cache[sae.metadata["site"]][0]) for sae in ours]
        expected = torch.stack(codes)
        expected[:, model.zero_positions] = 0  # it leaves out the first position
        worst = max(worst, away(found, expected))
        nodes[name] = [len(graph.active_features), int(graph.adjacency_matrix.count_nonzero())]
    return {"difference": worst, "active latents and edges": nodes}


def away(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


if __name__ == "__main__":
    torch.set_num_threads(1)
    tool = sys.argv[1]
    used = {"sae-probes": sae_probes, "delphi": delphi, "circuit-tracer": circuit_tracer}[tool](Path(sys.argv[2]))
    print(json.dumps(used | {"version": version({"delphi": "eai-delphi"}.get(tool, tool))}))
