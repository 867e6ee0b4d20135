#!/usr/bin/env bash
# Makes one virtual environment per peer library, so that each runs with the versions it asks for.
#
#   benchmarks/peers.sh                    the four of the benchmarks: sae-lens, dictionary-learning, sparsify, sae-dashboard
#   benchmarks/peers.sh tools sparsify     only the named ones; also tools (SAEBench, sae-probes), delphi, circuit-tracer, lm-eval
#
# PEERS        where they go                                     (default benchmarks/.peers, 1.5 to 2 GB each)
# PYTHON       the interpreter they are made from                (default python3)
# TORCH        the torch requirement                             (default torch==2.13.0)
# TORCH_INDEX  an index with torch's CPU build, where a plain torch would be the CUDA build, for example
#              https://download.pytorch.org/whl/cpu              (default none)
#
# The four are checked by training a small TopK SAE on synthetic rows (sae-dashboard by a small page); the others by saebench.py
# and inside_tools.py. Needs package indexes now, no network later.
# torch goes in first and is pinned for what follows: otherwise a peer may pull another one.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
PEERS=${PEERS:-$here/.peers}
PYTHON=${PYTHON:-python3}
TORCH=${TORCH:-torch==2.13.0}

make_environment() {  # name, then what pip installs after torch
    local name=$1
    shift
    local folder=$PEERS/$name
    "$PYTHON" -m venv --clear "$folder"
    "$folder/bin/pip" install --quiet ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$TORCH"
    "$folder/bin/pip" freeze | grep '^torch==' >"$folder/torch.txt"
    "$folder/bin/pip" install --quiet --constraint "$folder/torch.txt" "$@"
    echo "$name: $("$folder/bin/python" --version), $(cat "$folder/torch.txt")"
}

sae_lens() {
    # TransformerLens 4 breaks it; 3 also has the real HookedTransformer that hooked_transformer.py checks.
    make_environment sae-lens 'sae-lens==6.54.*' 'transformer-lens>=3,<4'
}

dictionary_learning() {
    # Of its requirements only these are imported on the way to its trainers; the rest (circuitsvis, umap, plotly,
    # llvmlite, wandb, datasets, zstandard) is left out.
    make_environment dictionary-learning 'nnsight>=0.3,<0.4' einops tqdm
    "$PEERS/dictionary-learning/bin/pip" install --quiet --no-deps dictionary-learning==0.1.0
    # nnsight brings a torchvision built for CUDA, which breaks transformers beside a CPU torch; nothing here needs it.
    "$PEERS/dictionary-learning/bin/pip" uninstall --quiet --yes torchvision
}

sparsify() {
    make_environment sparsify eai-sparsify==1.3.3
}

sae_dashboard() {
    # saelab runs in the same environment, on the same HookedTransformer: jaxtyping and tqdm come with transformer-lens.
    # It asks for transformer-lens 2, which asks for numpy 1, for which newer pyarrow is not built.
    make_environment sae-dashboard 'sae-dashboard==0.8.*' 'pyarrow<21'
    "$PEERS/sae-dashboard/bin/pip" uninstall --quiet --yes torchvision  # as above
}

tools() {
    make_environment tools 'sae-bench==0.6.*' 'sae-probes==0.4.*' 'sae-lens==6.54.*' 'transformer-lens>=3,<4'
}

delphi() {
    make_environment delphi 'eai-delphi==0.1.*' httpx
}

circuit_tracer() {
    make_environment circuit-tracer 'circuit-tracer==0.5.*'
}

lm_eval() {
    make_environment lm-eval 'lm-eval[hf]==0.4.13'
}

[ $# -gt 0 ] || set -- sae-lens dictionary-learning sparsify sae-dashboard
for name in "$@"; do
    "${name//-/_}"
    driver=$here/drivers/${name//-/_}_driver.py
    [ ! -f "$driver" ] || PYTHONPATH="$here/.." HF_HUB_OFFLINE=1 WANDB_MODE=disabled "$PEERS/$name/bin/python" "$driver" --check
done
