"""EleutherAI's sparsify: `<run>/<hookpoint>/cfg.json` and `sae.safetensors`.

TopK of relu(x - b_dec), of a transcoder (`transcode`) of relu(x). The skip connection is of x itself. The hookpoint, a module's
path without its root, is the folder's name: an SAE is of that module's output, a transcoder goes from its input to its output.
"""

import re
from pathlib import Path

from saelab.autoencoders.architectures.multitopk import MultiTopK
from saelab.autoencoders.architectures.topk import TopK
from saelab.autoencoders.sae import SAE
from saelab.base.errors import FormatError
from saelab.base.manifests import COUNT, FLAG, FLOATS, SIZE, exactly, held, read_json
from saelab.interop.assembly import Parts, assembled
from saelab.interop.given import Given
from saelab.interop.weights import read

_SCHEMA = {
    "d_in": SIZE, "k": SIZE, "num_latents?": COUNT, "expansion_factor?": SIZE, "activation?": exactly("topk", "groupmax"),
    "skip_connection?": FLAG, "transcode?": FLAG, "multi_topk?": FLAG, "signed?": FLAG,
}  # fmt: skip
_LAYOUT = {
    "encoder.weight": (FLOATS, "sae in"), "encoder.bias": (FLOATS, "sae"), "W_dec": (FLOATS, "sae in"),
    "b_dec": (FLOATS, "in"), "W_skip?": (FLOATS, "in in"),
}  # fmt: skip
_HOOKPOINT = re.compile(r"(?:.*\.)?(?:layers|h|blocks)\.(\d+)(?:\.(mlp|attn|self_attn|attention|self_attention))?")


def load_sparsify(folder: Path, given: Given) -> SAE:
    """The SAE or transcoder in a folder of sparsify.

    Raises `FormatError` for `groupmax` (the largest of each of k groups, which saelab has not), broken files, and where the
    configuration says of a skip connection what the tensors do not.
    """
    config = read_json(held(folder, "cfg.json"), _SCHEMA)
    if config.get("activation") == "groupmax":
        raise FormatError(
            f"{folder} keeps the largest of each of {config['k']} groups of latents (groupmax), which saelab has not"
        )
    if config.get("signed"):
        raise FormatError(f"{folder} has codes below zero (signed), which saelab has not")
    found = read(held(folder, "sae.safetensors"), _LAYOUT)
    d_sae, d_in = found["encoder.weight"].shape
    told = config.get("num_latents") or config["d_in"] * config.get("expansion_factor", 32)
    if (told, config["d_in"]) != (d_sae, d_in) or not config["k"] <= d_sae:
        raise FormatError(
            f"{folder}: cfg.json says {told:,} latents of width {config['d_in']:,} with k = {config['k']:,}, and the tensors "
            f"are of {d_sae:,} and {d_in:,}"
        )
    if config.get("skip_connection", False) != ("W_skip" in found):
        raise FormatError(f"{folder}: skip_connection is {config.get('skip_connection')}, and there is "
                          f"{'a' if 'W_skip' in found else 'no'} W_skip")  # fmt: skip
    transcodes = config.get("transcode", False)
    parts = Parts(
        found["encoder.weight"], found["encoder.bias"], found["W_dec"], found["b_dec"], centres=not transcodes,
        W_skip=found.get("W_skip"),
    )  # fmt: skip
    kind = MultiTopK if config.get("multi_topk") else TopK
    metadata = _sites(folder.name, transcodes) | given.known()
    if transcodes and "target_site" not in metadata:
        raise FormatError(
            f"{folder} is a transcoder and its folder's name is no hookpoint: give site= and target_site="
        )
    return assembled(kind(k=config["k"], d_sae=d_sae), parts, metadata, folder)


def _sites(hookpoint: str, transcodes: bool) -> dict[str, str]:
    found = _HOOKPOINT.fullmatch(hookpoint)
    if found is None:
        return {}
    layer, part = found[1], found[2]
    end = "hook_mlp_out" if part == "mlp" else "hook_attn_out" if part else "hook_resid_post"
    if not transcodes:
        return {"site": f"blocks.{layer}.{end}"}
    start = {"hook_mlp_out": "mlp.hook_in", "hook_attn_out": "attn.hook_in", "hook_resid_post": "hook_resid_pre"}[end]
    return {"site": f"blocks.{layer}.{start}", "target_site": f"blocks.{layer}.{end}"}
