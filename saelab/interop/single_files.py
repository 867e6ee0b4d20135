"""Single PyTorch files of four tensors: Kissane's SAEs of GPT-2's `hook_z`, and Goodfire's of Llama 3."""

from pathlib import Path
from typing import Any

from saelab.autoencoders.architectures.relu import ReLU
from saelab.autoencoders.sae import SAE
from saelab.base.manifests import FLOATS, SIZE, TEXT, held, read_json
from saelab.interop.assembly import Parts, assembled
from saelab.interop.given import Given
from saelab.interop.weights import read

_KISSANE = {"W_enc": (FLOATS, "in sae"), "b_enc": (FLOATS, "sae"), "W_dec": (FLOATS, "sae in"), "b_dec": (FLOATS, "in")}
_GOODFIRE = {
    "encoder_linear.weight": (FLOATS, "sae in"), "encoder_linear.bias": (FLOATS, "sae"),
    "decoder_linear.weight": (FLOATS, "in sae"), "decoder_linear.bias": (FLOATS, "in"),
}  # fmt: skip


def load_kissane(file: Path, given: Given) -> SAE:
    """A ReLU SAE of x - b_dec; site and price are in `<name>_cfg.json` beside it. Raises `FormatError` for other files."""
    path = file.with_name(f"{file.stem}_cfg.json")
    schema = {"act_name?": TEXT, "act_size?": SIZE, "dict_size?": SIZE}
    told = read_json(held(file.parent, path.name), schema) if path.exists() else {}
    found = read(file, _KISSANE)
    parts = Parts(found["W_enc"], found["b_enc"], found["W_dec"], found["b_dec"], centres=True)
    metadata: dict[str, Any] = {"site": told["act_name"]} if "act_name" in told else {}
    return assembled(ReLU(l1=0.0, d_sae=len(parts.b_enc)), parts, metadata | given.known(), file)


def load_goodfire(file: Path, given: Given) -> SAE:
    """A ReLU SAE of x. Raises `FormatError` for other files."""
    found = read(file, _GOODFIRE)
    W_enc, b_enc, W_dec, b_dec = (found[name] for name in _GOODFIRE)
    parts = Parts(W_enc, b_enc, W_dec, b_dec, centres=False)
    return assembled(ReLU(l1=0.0, d_sae=len(parts.b_enc)), parts, given.known(), file)
