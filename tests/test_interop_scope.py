"""Foreign JumpReLU SAEs against their own formulas."""

import json

import numpy
import pytest
import torch
from safetensors.torch import save_file

from saelab import FormatError
from saelab.analysis.dark_matter import decompose
from saelab.interop.scope import load_gemma_scope, load_llama_scope

D, F = 6, 20


def arrays(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
    made = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    return made | {"threshold": torch.rand(F, generator=generator)}


@pytest.mark.parametrize("lower", [False, True])
def test_gemma_scope(tmp_path, lower):
    folder = tmp_path / "layer_1" / "average_l0_7"
    folder.mkdir(parents=True)
    w = arrays()
    numpy.savez(folder / "params.npz", **{name.lower() if lower else name: value.numpy() for name, value in w.items()})
    sae = load_gemma_scope(folder, site="blocks.1.hook_resid_post")
    x = torch.randn(1200, D)
    p = x @ w["W_enc"] + w["b_enc"]
    codes = p * (p > w["threshold"]) * (p > 0)
    assert torch.allclose(sae.encode(x), codes, atol=1e-5)
    assert torch.allclose(sae(x), codes @ w["W_dec"] + w["b_dec"], atol=1e-4)
    assert sae.cfg.target_l0 == 7 and sae.metadata["site"] == "blocks.1.hook_resid_post"
    assert torch.allclose(load_gemma_scope(folder / "params.npz").W_dec, sae.W_dec)
    found = decompose(sae, x, progress=False)
    assert torch.allclose(sum(found.split(x)), x, atol=1e-4)
    sae.save(tmp_path / "saved")
    assert torch.equal(type(sae).load(tmp_path / "saved").encode(x), sae.encode(x))


def llama(folder, **changes):
    w = arrays(1)
    (folder / "checkpoints").mkdir(parents=True)
    tensors = {
        "encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "decoder.weight": w["W_dec"].T, "decoder.bias": w["b_dec"],
    }  # fmt: skip
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, folder / "checkpoints" / "final.safetensors"
    )
    config = {
        "act_fn": "jumprelu", "jump_relu_threshold": 0.8, "dataset_average_activation_norm": {"in": 9.0, "out": 12.0},
        "top_k": 5, "sparsity_include_decoder_norm": False,
    }  # fmt: skip
    (folder / "hyperparams.json").write_text(json.dumps(config | changes))
    return w


@pytest.mark.parametrize("weighed", [False, True])
def test_llama_scope(tmp_path, weighed):
    w = llama(tmp_path / "sae", sparsity_include_decoder_norm=weighed)
    sae = load_llama_scope(tmp_path / "sae", model="llama")
    x = torch.randn(500, D) * 4
    s_in, s_out = D**0.5 / 9.0, D**0.5 / 12.0
    p = (s_in * x) @ w["W_enc"] + w["b_enc"]
    lengths = w["W_dec"].norm(dim=1) if weighed else 1.0
    codes = p * (p * lengths > 0.8)
    assert torch.allclose(sae(x), (codes @ w["W_dec"] + w["b_dec"]) / s_out, atol=1e-4)
    assert torch.equal(sae.encode(x) > 0, codes > 0)
    assert sae.cfg.target_l0 == 5 and sae.metadata["model"] == "llama"


def test_files_that_are_no_such_saes_are_named(tmp_path):
    with pytest.raises(FormatError, match="not an SAE of Gemma Scope"):
        load_gemma_scope(tmp_path)
    (tmp_path / "params.npz").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(FormatError, match="not an SAE of Gemma Scope"):
        load_gemma_scope(tmp_path)
    numpy.savez(tmp_path / "params.npz", W_enc=numpy.zeros((D, F)))
    with pytest.raises(FormatError, match="b_enc"):
        load_gemma_scope(tmp_path)
    wrong = {name: value.numpy() for name, value in arrays().items()} | {"threshold": numpy.zeros(3)}
    numpy.savez(tmp_path / "params.npz", **wrong)
    with pytest.raises(FormatError, match="do not fit"):
        load_gemma_scope(tmp_path)
    with pytest.raises(FormatError, match="not an SAE of Llama Scope"):
        load_llama_scope(tmp_path)
    llama(tmp_path / "topk", act_fn="topk")
    with pytest.raises(FormatError, match="'topk'"):
        load_llama_scope(tmp_path / "topk")
    llama(tmp_path / "zero", dataset_average_activation_norm={"in": 0, "out": 1})
    with pytest.raises(FormatError, match="not an SAE of Llama Scope"):
        load_llama_scope(tmp_path / "zero")
