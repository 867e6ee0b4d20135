"""Gemma Scope: JumpReLU SAEs and transcoders of Gemma 2 (`params.npz`; Lieberum et al. 2024).

p = x W_enc + b_enc fires above its threshold: nothing is taken from the input. A transcoder's file is like an SAE's. Which of
the two it is, and of which site, its folder or configuration says, or whoever calls.
"""

import re
from pathlib import Path
from typing import Any

from saelab.autoencoders.architectures.jumprelu import JumpReLU
from saelab.autoencoders.sae import SAE
from saelab.base.errors import FormatError
from saelab.base.manifests import FLOATS
from saelab.interop.assembly import Parts, assembled
from saelab.interop.given import Given
from saelab.interop.weights import names, read

_LAYOUT = {
    "w_enc": (FLOATS, "in sae"), "b_enc": (FLOATS, "sae"), "w_dec": (FLOATS, "sae out"), "b_dec": (FLOATS, "out"),
    "threshold": (FLOATS, "sae"),
}  # fmt: skip


def load_gemma_scope(file: Path, given: Given) -> SAE:
    """The SAE or transcoder in a `params.npz` of Gemma Scope (Lieberum et al. 2024).

    The site is of the folders' names ("gemma-scope-2b-pt-res", "layer_3") where they have them. A transcoder reads
    `blocks.3.ln2.hook_normalized`, before the norm's gain: as TransformerLens gives it with that folded into the MLP.
    `cfg.target_l0`, which inference does not read, is that of the name ("average_l0_82").

    Raises `FormatError` for broken files, an SAE of the embedding (of another multiple of it than models give), and where
    nothing says whether it is an SAE or a transcoder.
    """
    folders = [part.lower() for part in file.absolute().parts]
    if "embedding" in folders or given.site == "hook_embed":
        raise FormatError(
            f"{file} is an SAE of the embedding, whose rows Gemma multiplies by the square root of their width before its "
            "first block: it is not read, because no site says on which side of that it is. Use the residual stream's (layer_0)"
        )
    repository = next((part for part in folders if re.search("gemma-scope-.*-(res|att|mlp|transcoders?)$", part)), "")
    layer = next((found[1] for part in folders if (found := re.fullmatch(r"layer_(\d+)", part))), None)
    metadata: dict[str, Any] = {}
    kind = repository.rpartition("-")[2] or next((part for part in folders if re.fullmatch("transcoders?", part)), "")
    if layer is not None and kind.startswith("transcoder"):
        metadata = {"site": f"blocks.{layer}.ln2.hook_normalized", "target_site": f"blocks.{layer}.hook_mlp_out"}
    elif layer is not None and kind:
        end = {"res": "hook_resid_post", "att": "attn.hook_z", "mlp": "hook_mlp_out"}[kind]
        metadata = {"site": f"blocks.{layer}.{end}"}
    metadata["model"] = _model(repository)
    metadata |= given.known()
    if kind.startswith("transcoder") and "target_site" not in metadata:
        raise FormatError(f"{file} is a transcoder and no folder says of which layer: give site= and target_site=")
    check_told(file, metadata)
    named = re.search(r"average_l0_(\d+)", str(file))
    return loaded(file, float(named[1]) if named else None, metadata)


def check_told(file: Path, metadata: dict[str, Any]) -> None:
    """Raise `FormatError` where it is not known whether a file is an SAE or a transcoder."""
    site = metadata.get("site")
    if site is None and "target_site" not in metadata:
        raise FormatError(
            f"{file} may be an SAE or a transcoder, whose files are alike, and no folder or configuration says which: give "
            "site=, and for a transcoder target_site= too"
        )
    if "target_site" not in metadata and re.search(r"ln2|mlp_in|hook_in$|pre_feedforward", str(site)):
        raise FormatError(
            f"{site} is the input of an MLP, from which Gemma Scope has transcoders and no SAEs: give target_site= too, the "
            "site that it predicts (blocks.N.hook_mlp_out)"
        )


def loaded(file: Path, l0: float | None, metadata: dict[str, Any]) -> SAE:
    """The SAE in a file with Gemma Scope's names, in either case."""
    there = {name.lower(): name for name in names(file)}
    layout = {there.get(name, name): wanted for name, wanted in _LAYOUT.items()}
    layout |= {"affine_skip_connection?": (FLOATS, "in out"), "scaling_factor?": (FLOATS, "...")}
    found = {name.lower(): tensor for name, tensor in read(file, layout).items()}
    if not bool((found.get("scaling_factor", found["b_dec"].new_ones(())) == 1).all()):
        raise FormatError(f"{file} has a scaling_factor of its input that is not 1, which is not read")
    parts = Parts(
        found["w_enc"], found["b_enc"], found["w_dec"], found["b_dec"], centres=False, threshold=found["threshold"],
        W_skip=found.get("affine_skip_connection"),
    )  # fmt: skip
    d_sae = len(found["b_enc"])
    return assembled(JumpReLU(target_l0=l0 if l0 and 0 < l0 <= d_sae else d_sae, d_sae=d_sae), parts, metadata, file)


def _model(repository: str) -> str | None:
    found = re.search(r"gemma-scope-(\d+b)-(pt|it)", repository)
    return f"google/gemma-2-{found[1]}" + ("-it" if found[2] == "it" else "") if found else None
