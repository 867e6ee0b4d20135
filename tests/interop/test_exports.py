"""What we write for other libraries, computed as they do in plain torch; `benchmarks/opening.py` asks the libraries."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

import saelab
from saelab import SAE, CheckpointError, ConfigError, TopK
from saelab.interop import save_as
from tests.interop.kinds import KINDS, PLAIN, TRANSCODERS, D, F, K, made, rows

BUDGETS = [name for name in KINDS if "TopK" in name]


def top(p, k=K):
    values, indices = p.relu().topk(k)
    return torch.zeros_like(p).scatter(1, indices, values)


def by_saelens(folder, x):
    config, w = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")
    kind = config["architecture"]
    u = (x - w["b_dec"] * config["apply_b_dec_to_input"]) @ w["W_enc"]
    if kind == "gated":
        codes = (u + w["b_gate"] > 0) * (u * w["r_mag"].exp() + w["b_mag"]).relu()
    else:
        p = u + w["b_enc"]
        codes = top(p) if kind == "topk" else p.relu() * (p > w.get("threshold", torch.tensor(0.0)))
    skip = x @ w["W_skip"].T if "skip" in kind else 0
    assert (
        kind
        in "standard topk jumprelu gated transcoder skip_transcoder jumprelu_transcoder jumprelu_skip_transcoder".split()
    )
    return codes, codes @ w["W_dec"] + w["b_dec"] + skip


def by_dictionary_learning(folder, x):
    w = torch.load(folder / "ae.pt", weights_only=True)
    kind = json.loads((folder / "config.json").read_text())["trainer"]["dict_class"]
    if kind == "GatedAutoEncoder":
        u = (x - w["decoder_bias"]) @ w["encoder.weight"].T
        codes = (u + w["gate_bias"] > 0) * (u * w["r_mag"].exp() + w["mag_bias"]).relu()
        return codes, codes @ w["decoder.weight"].T + w["decoder_bias"]
    if "W_enc" in w:
        p = (x - w["b_dec"] * (kind != "JumpReluAutoEncoder")) @ w["W_enc"] + w["b_enc"]
        codes = p.relu() * (p > w["threshold"])
        return codes, codes @ w["W_dec"] + w["b_dec"]
    bias = w[{"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias"}.get(kind, "b_dec")]
    p = (x - bias * (kind != "AutoEncoderNew")) @ w["encoder.weight"].T + w["encoder.bias"]
    codes = {"AutoEncoderTopK": lambda: top(p, int(w["k"])), "BatchTopKSAE": lambda: p.relu() * (p > w["threshold"])}
    chosen = codes.get(kind, p.relu)()
    return chosen, chosen @ w["decoder.weight"].T + bias


def by_sparsify(folder, x):
    config, w = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae.safetensors")
    centred = x if config["transcode"] else x - w["b_dec"]
    codes = top(centred @ w["encoder.weight"].T + w["encoder.bias"], config["k"])
    return codes, codes @ w["W_dec"] + w["b_dec"] + (x @ w["W_skip"].T if config["skip_connection"] else 0)


def by_circuit_tracer(folder, x):
    w = load_file(folder / "layer_0.safetensors")
    p = x @ w["W_enc"].T + w["b_enc"]
    codes = p * (p > w.get("activation_function.threshold", torch.tensor(0.0)))
    return codes, codes @ w["W_dec"] + w["b_dec"] + (x @ w["W_skip"].T if "W_skip" in w else 0)


HELD = {
    "saelens": (by_saelens, [name for name in KINDS if not (name in BUDGETS and name in TRANSCODERS)]),
    "dictionary_learning": (by_dictionary_learning, list(PLAIN)),
    "sparsify": (by_sparsify, BUDGETS),
    "circuit-tracer": (by_circuit_tracer, [name for name in TRANSCODERS if name not in BUDGETS]),
}


@pytest.mark.parametrize("format", HELD)
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_written_or_refused(tmp_path, name, format):
    compute, held = HELD[format]
    sae, x = made(name), rows()
    if name not in held:
        with pytest.raises(ConfigError, match="TopK|transcoder|budget|Transcoder"):
            sae.save(tmp_path / "sae", format)
        assert not list(tmp_path.iterdir())
        return
    sae.save(tmp_path / "sae", format)
    codes, output = compute(tmp_path / "sae", x)
    torch.testing.assert_close(codes, sae.encode(x), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(output, sae(x), rtol=1e-5, atol=2e-5)
    assert codes.count_nonzero() and sae.path is None


def test_the_classes_of_dictionary_learning(tmp_path):
    classes = {}
    for name in PLAIN:
        made(name).save(tmp_path / name, "dictionary_learning")
        trainer = json.loads((tmp_path / name / "config.json").read_text())["trainer"]
        classes[name] = trainer["dict_class"]
        assert (trainer["activation_dim"], trainer["dict_size"], trainer["layer"]) == (D, F, 0)
    assert classes == {
        "TopK": "AutoEncoderTopK", "MultiTopK": "AutoEncoderTopK", "GradientTopK": "AutoEncoderTopK",
        "MutualChoice": "BatchTopKSAE", "Matryoshka": "MatryoshkaBatchTopKSAE", "FeatureChoice": "JumpReluAutoEncoder",
        "ReLU": "AutoEncoderNew", "ReLU of unit rows": "AutoEncoder", "Gated": "GatedAutoEncoder",
        "JumpReLU": "JumpReluAutoEncoder",
    }  # fmt: skip
    sizes = torch.load(tmp_path / "Matryoshka" / "ae.pt", weights_only=True)["group_sizes"]
    assert sizes.tolist() == [3, 3, 6, 12, 24] and sizes.dtype == torch.int64


def test_a_set_of_transcoders(tmp_path):
    layers = [made("ReLU transcoder", layer) for layer in (1, 0)]
    save_as(layers, tmp_path / "set", "circuit-tracer")
    assert yaml.safe_load((tmp_path / "set" / "config.yaml").read_text()) == {
        "model_name": "tiny", "model_kind": "transcoder_set", "feature_input_hook": "ln2.hook_normalized",
        "feature_output_hook": "hook_mlp_out",
    }  # fmt: skip
    second = load_file(tmp_path / "set" / "layer_1.safetensors")
    assert torch.equal(second["W_dec"], layers[0].W_dec) and second["W_enc"].shape == (F, D)
    with pytest.raises(ConfigError, match="none of 0"):
        layers[0].save(tmp_path / "one", "circuit-tracer")
    layers[1].metadata["target_site"] = "blocks.0.attn.hook_z"
    with pytest.raises(ConfigError, match="same sites"):
        save_as(layers, tmp_path / "other", "circuit-tracer")
    layers[1].metadata["site"] = "model.layers.0"
    with pytest.raises(ConfigError, match="has to know the layer"):
        save_as(layers, tmp_path / "other", "circuit-tracer")


def test_what_has_learnt_no_threshold_and_what_is_no_format(tmp_path):
    with pytest.raises(ConfigError, match="no thresholds yet"):
        SAE(saelab.MutualChoice(k=2, d_sae=8), 4).save(tmp_path / "sae", "saelens")
    with pytest.raises(ConfigError, match="'saelens', 'dictionary_learning', 'sparsify', 'circuit-tracer'"):
        made("TopK").save(tmp_path / "sae", "SAELens")
    with pytest.raises(ConfigError, match="one SAE in a folder, and 2"):
        save_as([made("TopK"), made("TopK", 1)], tmp_path / "sae", "sparsify")
    wide = SAE(saelab.Transcoder(of=TopK(k=2, d_sae=8)), 4, d_out=6)
    with pytest.raises(ConfigError, match="reads 4 and writes 6"):
        wide.save(tmp_path / "sae", "sparsify")
    assert not list(tmp_path.iterdir())


def test_only_what_was_so_written_is_replaced(tmp_path):
    made("TopK").save(tmp_path / "sae", "sparsify")
    made("MultiTopK").save(tmp_path / "sae", "sparsify")
    assert torch.equal(load_file(tmp_path / "sae" / "sae.safetensors")["W_dec"], made("MultiTopK").W_dec)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "ae.pt").write_text("precious")
    with pytest.raises(CheckpointError, match="ae.pt"):
        made("TopK").save(tmp_path / "mine", "dictionary_learning")
    assert (tmp_path / "mine" / "ae.pt").read_text() == "precious"


def test_the_model_is_named_as_on_the_hub(tmp_path):
    sae = made("TopK")
    for model, given, expected in (
        ("smollm2-135m", None, "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("GPT2LMHeadModel", None, None),
        ("GPT2LMHeadModel", "gpt2", "gpt2"),
        ("gpt2", None, "gpt2"),
    ):
        sae.metadata |= {"model": model, "model_name": given}
        sae.save(tmp_path / "sae")
        assert json.loads((tmp_path / "sae" / "cfg.json").read_text())["metadata"]["model_name"] == expected


def test_only_unit_rows_are_said_to_be_weighed_by_their_length(tmp_path):
    sae = made("TopK")
    for length in (1.0, 1.5):
        sae.W_dec.mul_(length)
        sae.save(tmp_path / f"{length}")
        config = json.loads((tmp_path / f"{length}" / "cfg.json").read_text())
        assert config["rescale_acts_by_decoder_norm"] is (length == 1.0)
        assert torch.equal(SAE.load(tmp_path / f"{length}").encode(rows()), sae.encode(rows()))
