"""Files of other projects that are broken, hostile or say too little: refused with the reason, and nothing in them is run."""

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import saelab
from saelab import SAE, ConfigError, FormatError
from saelab.interop.given import Given
from saelab.interop.loading import read_path

GOLDEN = Path(__file__).parent / "golden"
OPENAI = {"encoder.weight": torch.randn(9, 4), "latent_bias": torch.randn(9), "decoder.weight": torch.randn(4, 9),
          "pre_bias": torch.randn(4), "latents_mean_square": torch.ones(9)}  # fmt: skip


@pytest.fixture
def topk(tmp_path):
    """A folder of SAELens."""
    return Path(shutil.copytree(GOLDEN / "sae-lens" / "topk", tmp_path / "topk"))


@pytest.fixture
def linear(tmp_path):
    """A folder of dictionary_learning."""
    return Path(shutil.copytree(GOLDEN / "dictionary-learning" / "AutoEncoder" / "trainer_0", tmp_path / "linear"))


class Calls:
    """What a pickle calls when it is read."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_with_code_is_refused_and_not_run(linear, protocol):
    marker = linear / "was-run"
    torch.save({"encoder.weight": Calls(marker)}, linear / "ae.pt", pickle_protocol=protocol)
    with pytest.raises(FormatError, match=r"it would call posix.mkdir|its pickle has STACK_GLOBAL"):
        SAE.load(linear)
    assert not marker.exists()
    (linear / "ae.pt").write_bytes(pickle.dumps(Calls(marker)))
    with pytest.raises(FormatError, match="cannot be read as safetensors"):
        SAE.load(linear)
    assert not marker.exists()


def test_tensors_larger_than_what_is_stored_are_refused(linear):
    weights = torch.load(linear / "ae.pt") | {"encoder.bias": torch.zeros(1).expand(10**12)}
    torch.save(weights, linear / "ae.pt")
    with pytest.raises(FormatError, match="1000000000000.*which its storage does not fill"):
        SAE.load(linear)


def test_a_packed_pytorch_file_is_refused(linear):
    with zipfile.ZipFile(linear / "ae.pt") as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(linear / "ae.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    with pytest.raises(FormatError, match="is compressed, which PyTorch does not write"):
        SAE.load(linear)
    with zipfile.ZipFile(linear / "ae.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(10**7))
    with pytest.raises(FormatError, match="unpacks to more than 20 times"):
        SAE.load(linear)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("W_dec"), "lacks W_dec"), (lambda t: t.update(more=torch.ones(1)), "has also more"),
        (lambda t: t["W_enc"][0].fill_(torch.nan), "W_enc holds NaN"),
        (lambda t: t["b_dec"].fill_(torch.inf), "b_dec holds NaN"),
        (lambda t: t.update(W_enc=t["W_dec"].clone(), W_dec=t["W_enc"].clone()), "b_enc is float32 .20., not"),
        (lambda t: t.update(b_enc=torch.ones(20, dtype=torch.int64)), "b_enc is int64"),
        (lambda t: t.update(threshold=torch.ones(20)), "has also threshold"),
    ],
)  # fmt: skip
def test_tensors_that_are_not_those_of_the_format_are_named(topk, change, message):
    weights = load_file(topk / "sae_weights.safetensors")
    change(weights)
    save_file(weights, topk / "sae_weights.safetensors")
    with pytest.raises(FormatError, match=message):
        SAE.load(topk)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, "k is 0"), ({"k": 21}, "k is 21"), ({"k": "many"}, "k is 'many'"), ({"d_sae": 21}, "do not belong together"),
        ({"architecture": "gated"}, "b_gate"), ({"architecture": "transcoder_of_souls"}, "which is not known here"),
        ({"normalize_activations": "by magic"}, "'by magic'"),
        ({"metadata": {"sae_lens_version": "6", "hook_head_index": 3}}, "head 3"),
        ({"metadata": {"sae_lens_version": "6", "hook_name": 7}}, "site is 7, not a text"),
    ],
)  # fmt: skip
def test_configurations_that_contradict_the_tensors_are_named(topk, changes, message):
    config = json.loads((topk / "cfg.json").read_text())
    (topk / "cfg.json").write_text(json.dumps(config | changes))
    with pytest.raises(FormatError, match=message):
        SAE.load(topk)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"d_in": 6, "d_in": 7}', "[]"])
def test_a_configuration_that_is_no_table_is_named(topk, text):
    (topk / "cfg.json").write_text(text)
    with pytest.raises(FormatError, match=r"cfg\.json"):
        SAE.load(topk)


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
def test_a_link_out_of_the_folder_is_not_followed(topk, tmp_path, name):
    (topk / name).rename(tmp_path / name)
    (topk / name).symlink_to(tmp_path / name)
    with pytest.raises(FormatError, match="is a link out of its folder"):
        SAE.load(topk)


def test_what_a_link_leads_to_is_not_read_either(topk, tmp_path):
    (tmp_path / "secret").write_text("no JSON")
    (topk / "cfg.json").unlink()
    (topk / "cfg.json").symlink_to(tmp_path / "secret")
    with pytest.raises(FormatError, match="is a link out of its folder"):
        SAE.load(topk)


def test_no_repository_leads_out_of_the_folder_of_the_hub(topk, tmp_path, monkeypatch):
    (tmp_path / "hub").mkdir()
    monkeypatch.setenv("SAELAB_HUB", str(tmp_path / "hub"))
    for repository, sae_id in (("../topk", None), ("owner/name", "../../../topk"), ("owner/name", "/etc")):
        with pytest.raises(FormatError, match="not inside it"):
            saelab.load_sae(repository, sae_id)


def test_files_that_say_too_little_ask(tmp_path, linear):
    qwen = GOLDEN / "published" / "Qwen" / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_4" / "layer1.sae.pt"
    shutil.copy(qwen, tmp_path / "layer1.sae.pt")
    with pytest.raises(FormatError, match="does not hold the k of its TopK.*give k="):
        read_path(tmp_path / "layer1.sae.pt")
    assert read_path(tmp_path / "layer1.sae.pt", given=Given(k=4)).cfg.k == 4
    shutil.copy(GOLDEN / "dictionary-learning" / "BatchTopKSAE" / "trainer_0" / "ae.pt", tmp_path / "ae.pt")
    with pytest.raises(FormatError, match="may be an AutoEncoderTopK or a BatchTopKSAE.*write one"):
        read_path(tmp_path / "ae.pt")
    (linear / "config.json").write_text('{"trainer": {"dict_class": "GatedAutoEncoder"}}')
    with pytest.raises(
        FormatError, match="says that .* is a GatedAutoEncoder, and its tensors are those of AutoEncoder"
    ):
        read_path(linear)


def test_a_small_yaml_that_makes_a_large_table_is_refused(tmp_path):
    folder = GOLDEN / "published" / "mwhanna" / "qwen3-0.6b-transcoders-lowl0"
    shutil.copy(folder / "layer_1.safetensors", tmp_path)
    (tmp_path / "config.yaml").write_text("a: &a [1, 2]\nb: [*a, *a]\n")
    with pytest.raises(FormatError, match="has aliases"):
        read_path(tmp_path / "layer_1.safetensors")
    for text, message in (("a: " + "[" * 100_000, "nested more than 64 deep"), ("- " * 20_000, "no readable YAML")):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(FormatError, match=message):
            read_path(tmp_path / "layer_1.safetensors")
    (tmp_path / "config.yaml").write_text("model_kind: cross_layer_transcoder\n")
    with pytest.raises(FormatError, match="cross-layer transcoder"):
        read_path(tmp_path / "layer_1.safetensors")


def test_openais_is_read_by_its_formula(tmp_path):
    torch.save(OPENAI | {"activation": "ReLU", "activation_state_dict": {}}, tmp_path / "layer_3.pt")
    sae, x = read_path(tmp_path / "layer_3.pt"), torch.randn(50, 4)
    codes = ((x - OPENAI["pre_bias"]) @ OPENAI["encoder.weight"].T + OPENAI["latent_bias"]).relu()
    torch.testing.assert_close(sae.encode(x), codes, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae(x), codes @ OPENAI["decoder.weight"].T + OPENAI["pre_bias"], atol=1e-5, rtol=1e-5)


def test_openais_topk_is_of_normalised_vectors(tmp_path):
    told = {"activation": "TopK", "activation_state_dict": {"k": 3, "postact_fn": "ReLU"}}
    torch.save(OPENAI | told, tmp_path / "layer_3.pt")
    sae, x = read_path(tmp_path / "layer_3.pt"), torch.randn(50, 4)
    mean, deviation = x.mean(1, keepdim=True), x.std(1, keepdim=True)
    p = ((x - mean) / (deviation + 1e-5) - OPENAI["pre_bias"]) @ OPENAI["encoder.weight"].T + OPENAI["latent_bias"]
    values, latents = p.topk(3)
    codes = torch.zeros(50, 9).scatter(1, latents, values.relu())
    torch.testing.assert_close(sae.encode(x), codes, atol=1e-5, rtol=1e-5)
    decoded = codes @ OPENAI["decoder.weight"].T + OPENAI["pre_bias"]
    torch.testing.assert_close(sae(x), decoded * deviation + mean, atol=1e-5, rtol=1e-5)
    for more, message in (
        ({"k": 10}, "chooses 10"),
        ({"k": 0}, "k is 0"),
        ({"k": 3, "postact_fn": "Identity"}, "postact_fn"),
    ):
        torch.save(OPENAI | told | {"activation_state_dict": more}, tmp_path / "layer_3.pt")
        with pytest.raises(FormatError, match=message):
            read_path(tmp_path / "layer_3.pt")


def test_the_distillates_threshold_is_of_each_latent(tmp_path):
    weights = {"encoder.weight": torch.randn(9, 4), "encoder.bias": torch.randn(9), "decoder.weight": torch.randn(4, 9),
               "decoder.bias": torch.randn(4), "log_jumprelu_threshold": torch.randn(9)}  # fmt: skip
    save_file(weights, tmp_path / "sae_weights.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"act_fn": "jumprelu", "hook_point_in": "blocks.1.hook_resid_post"})
    )
    with pytest.raises(FormatError, match="by its release's name"):
        SAE.load(tmp_path)
    s, x = 3.0, torch.randn(200, 4)
    sae = read_path(tmp_path, given=Given(input_scale=s))
    p = s * x @ weights["encoder.weight"].T + weights["encoder.bias"]
    codes = p * (p > weights["log_jumprelu_threshold"].exp())
    torch.testing.assert_close(sae.encode(x) * s, codes, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(
        sae(x), (codes @ weights["decoder.weight"].T + weights["decoder.bias"]) / s, atol=1e-4, rtol=1e-4
    )


def test_a_release_that_no_architecture_covers_is_refused_before_anything_is_fetched(monkeypatch):
    monkeypatch.setattr("saelab.interop.hub.fetched", lambda *ignored: pytest.fail("fetched"))
    with pytest.raises(ConfigError, match="attention over the sequence.*, which saelab has no architecture for"):
        saelab.load_sae("temporal-sae-gemma-2-2b", "blocks.12.hook_resid_post")
