"""In a peer's environment: open what saelab wrote for it, and print how far its codes and reconstructions are from ours.

python opening_driver.py FORMAT FOLDER     each folder in it has `sae/` and `expected.safetensors` (x, codes, output)
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file


def saelens(folder, x):
    from sae_lens import SAE

    sae = SAE.load_from_disk(folder)
    codes, output = sae.encode(x), sae(x)
    if sae.cfg.architecture() in ("topk", "standard", "jumprelu", "gated"):
        sae.fold_W_dec_norm()
        assert torch.allclose(sae(x), output, atol=1e-4), "folding the norms changes it"
    return codes, output


def dictionary_learning(folder, x):
    from dictionary_learning import dictionary as classes
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    # as `load_dictionary` does, whose file imports more than the environment has
    trainer = json.loads((folder / "config.json").read_text())["trainer"]
    modules = (classes, batch_top_k, matryoshka_batch_top_k, top_k)
    kind = next(getattr(module, trainer["dict_class"]) for module in modules if hasattr(module, trainer["dict_class"]))
    budget = {"k": trainer["k"]} if kind.__module__ != classes.__name__ else {}
    dictionary = kind.from_pretrained(str(folder / "ae.pt"), device="cpu", **budget)
    codes = dictionary.encode(x)
    return codes, dictionary.decode(codes)


def sparsify(folder, x):
    from sparsify import SparseCoder

    coder = SparseCoder.load_from_disk(folder)
    top, indices, _ = coder.encode(x)
    return torch.zeros(len(x), coder.num_latents).scatter_(1, indices, top), coder(x).sae_out


def circuit_tracer(folder, x):
    import yaml
    from circuit_tracer.utils.hf_utils import load_transcoders

    config = yaml.safe_load((folder / "config.yaml").read_text()) | {"scan": "ours"}
    config["transcoders"] = [str(folder / f"layer_{i}.safetensors") for i in range(len(list(folder.glob("layer_*"))))]
    transcoders = load_transcoders(config, device=torch.device("cpu"))
    last = transcoders[len(transcoders) - 1]
    return last.encode(x), last(x)


def main() -> None:
    opened = {
        "saelens": saelens,
        "dictionary_learning": dictionary_learning,
        "sparsify": sparsify,
        "circuit-tracer": circuit_tracer,
    }
    found = {}
    for case in sorted(Path(sys.argv[2]).iterdir()):
        expected = load_file(case / "expected.safetensors")
        with torch.no_grad():
            codes, output = opened[sys.argv[1]](case / "sae", expected["x"])
        found[case.name] = [
            float((codes - expected["codes"]).abs().max()),
            float((output - expected["output"]).abs().max()),
        ]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
