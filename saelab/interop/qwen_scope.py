"""Qwen Scope: `layer3.sae.pt`, a TopK SAE of the residual stream after a block. Both matrices are turned, [d_sae, d_in] and
[d_in, d_sae]; nothing is taken from the input. k is in the repository's name alone ("SAE-Res-Qwen3-8B-Base-W64K-L0_50")."""

import re
from pathlib import Path
from typing import Any

from saelab.autoencoders.architectures.topk import TopK
from saelab.autoencoders.sae import SAE
from saelab.base.errors import FormatError
from saelab.base.manifests import FLOATS
from saelab.interop.assembly import Parts, assembled
from saelab.interop.given import Given
from saelab.interop.weights import read

_LAYOUT = {
    "W_enc": (FLOATS, "sae in"), "b_enc": (FLOATS, "sae"), "W_dec": (FLOATS, "in sae"), "b_dec": (FLOATS, "in"),
}  # fmt: skip


def load_qwen_scope(file: Path, given: Given) -> SAE:
    """The SAE in a file of Qwen Scope.

    Raises `FormatError` for other files, and where neither `k` nor the folder's name says how many latents fire.
    """
    named = re.search(r"SAE-Res-(.+)-W\d+K-L0_(\d+)", str(file.absolute()))
    k = given.k or (int(named[2]) if named else None)
    if k is None:
        raise FormatError(
            f"{file} does not hold the k of its TopK, which is in the repository's name (...-L0_50): give k="
        )
    found = read(file, _LAYOUT)
    d_sae = found["W_enc"].shape[0]
    if k > d_sae:
        raise FormatError(f"{file} has {d_sae:,} latents, fewer than k = {k:,}")
    parts = Parts(found["W_enc"], found["b_enc"], found["W_dec"], found["b_dec"], centres=False)
    layer = re.match(r"layer(\d+)\.sae", file.name)
    metadata: dict[str, Any] = {"model": f"Qwen/{named[1]}"} if named else {}
    metadata |= {"site": f"blocks.{layer[1]}.hook_resid_post"} if layer else {}
    return assembled(TopK(k=k, d_sae=d_sae), parts, metadata | given.known(), file)
