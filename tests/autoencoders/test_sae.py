import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import saelab
from saelab import SAE, CheckpointError, ConfigError, DataError, FormatError, TopK
from saelab.autoencoders.architecture import Batch


@pytest.fixture
def sae():
    x = torch.randn(600, 12) @ torch.randn(12, 12) * 40 + 3
    return saelab.train(x, sae=TopK(k=3, d_sae=40), tokens=2000, batch_size=100, progress=False).sae


def test_public_weights_are_in_raw_units(sae):
    x = torch.randn(9, 12) * 40
    dense = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
    top = dense.topk(3, dim=1)
    codes = torch.zeros_like(dense).scatter(1, top.indices, top.values)
    torch.testing.assert_close(sae.encode(x), codes, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(sae(x), codes @ sae.W_dec + sae.b_dec, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(sae.decode(sae.encode(x)), sae(x))
    torch.testing.assert_close(sae.decode(sae.encode_sparse(x)), sae(x))
    assert float(sae.state.scale) != 1


def test_shapes_and_dtypes(sae):
    x = torch.randn(2, 5, 12)
    assert sae.encode(x).shape == (2, 5, 40)
    assert sae(x).shape == (2, 5, 12)
    assert sae(x.bfloat16()).dtype == torch.bfloat16
    assert sae.W_enc.shape == (12, 40) and sae.W_dec.shape == (40, 12)
    assert len(sae.encode_sparse(x)) == 10


def test_decoder_rows_have_unit_norm(sae):
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(40))


def test_load_gives_back_class_configuration_and_bits(sae, tmp_path):
    sae.metadata["site"] = "blocks.3.hook_resid_post"
    sae.save(tmp_path / "sae")
    again = SAE.load(tmp_path / "sae")
    x = torch.randn(50, 12) * 40
    assert again.cfg == sae.cfg and type(again.cfg) is TopK
    assert again.metadata == sae.metadata
    assert torch.equal(again.encode(x), sae.encode(x))
    assert torch.equal(again(x), sae(x))
    for name, tensor in sae.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_the_folder_is_saelens_v6s(sae, tmp_path):
    sae.save(tmp_path / "sae")
    weights = load_file(tmp_path / "sae" / "sae_weights.safetensors")
    assert {name: tuple(t.shape) for name, t in weights.items()} == {
        "W_enc": (12, 40), "b_enc": (40,), "W_dec": (40, 12), "b_dec": (12,)
    }  # fmt: skip
    cfg = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    assert cfg["architecture"] == "topk" and cfg["k"] == 3 and cfg["d_in"] == 12 and cfg["d_sae"] == 40
    assert cfg["apply_b_dec_to_input"] is True and cfg["normalize_activations"] == "none"
    sparsity = load_file(tmp_path / "sae" / "sparsity.safetensors")["sparsity"]
    torch.testing.assert_close(10**sparsity, sae.latent_stats.density.clamp_min(1e-10))


def test_saving_replaces_an_sae_and_nothing_else(sae, tmp_path):
    sae.save(tmp_path / "sae")
    sae.save(tmp_path / "sae")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(CheckpointError, match="not an SAE folder"):
        sae.save(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "sae"]


@pytest.mark.parametrize("damage", ["truncate", "tamper", "remove", "future", "class", "json", "shape"])
def test_a_damaged_folder_is_named(sae, tmp_path, damage):
    folder = tmp_path / "sae"
    sae.save(folder)
    weights = folder / "sae_weights.safetensors"
    content = weights.read_bytes()
    cfg = json.loads((folder / "cfg.json").read_text())
    if damage == "truncate":
        weights.write_bytes(content[:-10])
    elif damage == "tamper":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "remove":
        weights.unlink()
    elif damage == "future":
        cfg["metadata"]["saelab"]["format"] = 99
    elif damage == "class":
        cfg["metadata"]["saelab"]["config"]["class"] = "Oracle"
    elif damage == "shape":
        cfg["metadata"]["saelab"]["config"]["d_sae"] = 41
    if damage in ("future", "class", "shape"):
        (folder / "cfg.json").write_text(json.dumps(cfg))
    if damage == "json":
        (folder / "cfg.json").write_text('{"metadata": ')
    with pytest.raises(FormatError):
        SAE.load(folder)


def test_a_foreign_folder_says_what_it_is(tmp_path):
    save_file({"W_enc": torch.zeros(2, 3)}, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(
        json.dumps({"architecture": "lista", "d_in": 2, "d_sae": 3, "metadata": {"sae_lens_version": "6"}})
    )
    with pytest.raises(FormatError, match="lista"):
        SAE.load(tmp_path)


def test_bad_input_is_named(sae):
    with pytest.raises(ConfigError, match="width 7"):
        sae(torch.randn(2, 7))
    x = torch.randn(4, 12)
    x[2, 3] = float("nan")
    with pytest.raises(DataError, match="row 2"):
        sae.encode(x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 65, "d_sae": 64}, "65.*64"),
        ({"k": 0, "d_sae": 64}, "0"),
        ({"k": 4, "d_sae": 0}, "d_sae is 0"),
        ({"k": 4, "d_sae": 8, "aux_coefficient": -1.0}, "aux_coefficient is -1"),
        ({"k": 4, "d_sae": 8, "aux_k": 0}, "aux_k is 0"),
        ({"k": 4, "d_sae": 8, "input_scale": "std"}, "std"),
    ],
)
def test_impossible_configurations(arguments, message):
    with pytest.raises(ConfigError, match=message):
        TopK(**arguments)


def test_an_untrained_sae_says_that_it_has_no_statistics():
    with pytest.raises(ConfigError, match="statistics"):
        _ = SAE(TopK(k=2, d_sae=8), 4).latent_stats


def test_thresholds_and_counters_keep_their_precision():
    sae = SAE(TopK(k=2, d_sae=8), 4).to(torch.bfloat16)
    assert sae.W_dec.dtype == torch.bfloat16
    assert sae.state.act_sum.dtype == torch.float64 and sae.state.norm_limit.dtype == torch.float32
    assert sae(torch.randn(3, 4)).dtype == torch.float32


def test_high_norm_vectors_are_not_replaceable(sae):
    sae.state.norm_limit.fill_(5.0)
    assert sae.replaceable(torch.tensor([[3.0] + [0.0] * 11, [6.0] + [0.0] * 11])).tolist() == [True, False]


def test_repr_has_sizes_site_and_model():
    sae = SAE(TopK(k=2, d_sae=8), 4, metadata={"site": "blocks.3.hook_resid_post", "model": "smollm2-135m"})
    assert repr(sae) == "SAE(TopK(k=2, d_sae=8), d_in=4, blocks.3.hook_resid_post of smollm2-135m)"


def test_gradients_reach_the_input(sae):
    x = torch.randn(3, 12, requires_grad=True)
    sae(x).sum().backward()
    assert x.grad is not None and bool(x.grad.abs().sum() > 0)


def test_aux_k_is_the_power_of_two_nearest_half_the_width():
    x, auxiliary = torch.randn(64, 16), []
    for aux_k in (None, 8):
        sae = saelab.SAE(saelab.TopK(k=2, d_sae=64, aux_k=aux_k), 16)
        sae.state.tokens_since_fired[:32] = sae.state.dead_after
        batch, params = Batch(x, x), sae.params()
        codes = sae.cfg.allocate(sae.cfg.scores(params, batch), sae.state, 0.0)
        auxiliary.append(sae.cfg.losses(batch, codes, torch.zeros_like(x), params, sae.state)["aux"].item())
    assert auxiliary[0] == auxiliary[1] > 0


def test_a_single_number_is_no_vector():
    with pytest.raises(ConfigError, match="width none, a single number, and this SAE reads 4"):
        SAE(TopK(k=1, d_sae=8), 4)._rows(torch.tensor(1.0))
