"""Foreign JumpReLU SAEs against their own formulas."""

import json
import os
import zipfile

import numpy
import pytest
import torch
from safetensors.torch import save_file

from saelab import FormatError, Transcoder
from saelab.analysis.dark_matter import decompose
from saelab.interop.given import Given
from saelab.interop.loading import read_path

D, F = 6, 20
SITE = "blocks.1.hook_resid_post"


def load_gemma_scope(path, **given):
    return read_path(path, "gemma_scope", Given(**given))


def load_llama_scope(path, **given):
    return read_path(path, "llama_scope", Given(**given))


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
    assert torch.allclose(load_gemma_scope(folder / "params.npz", site=SITE).W_dec, sae.W_dec)
    with pytest.raises(FormatError, match="may be an SAE or a transcoder"):
        load_gemma_scope(folder)
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
    with pytest.raises(FormatError, match="0 files params.npz"):
        load_gemma_scope(tmp_path, site=SITE)
    (tmp_path / "params.npz").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(FormatError, match="cannot be read as a zip archive"):
        load_gemma_scope(tmp_path, site=SITE)
    numpy.savez(tmp_path / "params.npz", W_enc=numpy.zeros((D, F)))
    with pytest.raises(FormatError, match="b_enc"):
        load_gemma_scope(tmp_path, site=SITE)
    wrong = {name: value.numpy() for name, value in arrays().items()} | {"threshold": numpy.zeros(3)}
    numpy.savez(tmp_path / "params.npz", **wrong)
    with pytest.raises(FormatError, match="threshold is float64 .3., not .* sae being 20"):
        load_gemma_scope(tmp_path, site=SITE)
    with pytest.raises(FormatError, match="hyperparams.json cannot be read"):
        load_llama_scope(tmp_path)
    llama(tmp_path / "topk", act_fn="topk")
    with pytest.raises(FormatError, match="'topk'"):
        load_llama_scope(tmp_path / "topk")
    llama(tmp_path / "zero", dataset_average_activation_norm={"in": 0, "out": 1})
    with pytest.raises(FormatError, match="activation_norm.in is 0, not a number from 1e-30"):
        load_llama_scope(tmp_path / "zero")


def test_a_transcoder_is_read_as_one(tmp_path):
    """Its file is like an SAE's: the folder's name says so, or `target_site`."""
    w, x = arrays(), torch.randn(300, D)
    folder = tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_3" / "width_16k" / "average_l0_4"
    other = tmp_path / "downloaded"
    for path in (folder, other):
        path.mkdir(parents=True)
        numpy.savez(path / "params.npz", **{name: value.numpy() for name, value in w.items()})
    p = x @ w["W_enc"] + w["b_enc"]
    codes = p * (p > w["threshold"]) * (p > 0)
    sites = {"site": "blocks.3.ln2.hook_normalized", "target_site": "blocks.3.hook_mlp_out"}
    for found in (
        load_gemma_scope(folder),
        load_gemma_scope(folder, site=sites["site"]),
        load_gemma_scope(other, **sites),
    ):
        assert isinstance(found.cfg, Transcoder) and not found.cfg.centres_input
        assert {name: found.metadata[name] for name in sites} == sites
        assert torch.allclose(found.encode(x), codes, atol=1e-5)
        assert torch.allclose(found(x), codes @ w["W_dec"] + w["b_dec"], atol=1e-4)
    with pytest.raises(FormatError, match="input of an MLP.*target_site"):
        load_gemma_scope(other, site=sites["site"])
    (tmp_path / "transcoders").mkdir()
    (other / "params.npz").rename(tmp_path / "transcoders" / "params.npz")
    with pytest.raises(FormatError, match="no folder says of which layer: give site= and target_site="):
        load_gemma_scope(tmp_path / "transcoders")


def test_a_transcoder_between_widths_and_an_embedding_are_refused_by_name(tmp_path):
    wide = {name: value.numpy() for name, value in arrays().items()}
    wide |= {"W_dec": numpy.ones((F, D + 1), "f4"), "b_dec": numpy.zeros(D + 1, "f4")}
    numpy.savez(tmp_path / "params.npz", **wide)
    with pytest.raises(FormatError, match="width 6 into 7: a transcoder"):
        load_gemma_scope(tmp_path, site="blocks.0.hook_resid_post")
    assert load_gemma_scope(tmp_path, site="a", target_site="b")(torch.zeros(2, D)).shape == (2, D + 1)
    (tmp_path / "embedding").mkdir()
    numpy.savez(tmp_path / "embedding" / "params.npz", **{name: value.numpy() for name, value in arrays().items()})
    with pytest.raises(FormatError, match="SAE of the embedding"):
        load_gemma_scope(tmp_path / "embedding")
    (tmp_path / "embedding").rename(tmp_path / "renamed")
    with pytest.raises(FormatError, match="SAE of the embedding"):
        load_gemma_scope(tmp_path / "renamed", site="hook_embed")


def test_a_llama_transcoder_is_read_as_one(tmp_path):
    w = llama(tmp_path / "sae", hook_point_in="blocks.1.ln2.hook_normalized", hook_point_out="blocks.1.hook_mlp_out")
    sae, x = load_llama_scope(tmp_path / "sae"), torch.randn(300, D) * 4
    p = (D**0.5 / 9.0 * x) @ w["W_enc"] + w["b_enc"]
    assert isinstance(sae.cfg, Transcoder) and sae.metadata["target_site"] == "blocks.1.hook_mlp_out"
    assert torch.allclose(sae(x), ((p * (p > 0.8)) @ w["W_dec"] + w["b_dec"]) / (D**0.5 / 12.0), atol=1e-4)


def test_archives_that_would_not_fit_or_run_code_are_refused(tmp_path):
    file = tmp_path / "params.npz"
    good = {name: value.numpy() for name, value in arrays().items()}
    numpy.savez_compressed(file, **good | {"b_enc": numpy.zeros(10_000_000, "f4")})
    with pytest.raises(FormatError, match="unpacks to more than 20 times"):
        load_gemma_scope(tmp_path, site=SITE)
    numpy.savez(file, **good | {"b_enc": numpy.array([print], dtype=object)})
    with pytest.raises(FormatError, match="b_enc.npy is object"):
        load_gemma_scope(tmp_path, site=SITE)
    numpy.savez(file, **good | {"more": numpy.ones((D, D), "f4")})
    with pytest.raises(FormatError, match="has also more"):
        load_gemma_scope(tmp_path, site=SITE)
    numpy.savez(file, **good | {"W_dec": numpy.full((F, D), numpy.nan, "f4")})
    with pytest.raises(FormatError, match="W_dec holds NaN"):
        load_gemma_scope(tmp_path, site=SITE)
    header = (
        b"\x93NUMPY\x01\x00v\x00"
        + b"{'descr': '<f4', 'fortran_order': False, 'shape': (100000000000,), }".ljust(117)
        + b"\n"
    )
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("b_enc.npy", header)
    with pytest.raises(FormatError, match="100000000000"):
        load_gemma_scope(tmp_path, site=SITE)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(FormatError, match="pipe"):
        load_gemma_scope(tmp_path, site=SITE)
