"""SAEs that other libraries wrote, with the codes and reconstructions that they computed (benchmarks/golden.py makes them)."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import saelab
from saelab import SAE, ConfigError, FormatError
from saelab.interop.loading import load_sae

GOLDEN = Path(__file__).parent / "golden"
PUBLISHED = GOLDEN / "published"
FOLDERS = sorted(path.parent.relative_to(GOLDEN) for path in GOLDEN.rglob("golden.safetensors"))
REFUSED = {
    "sae-lens/abstopk": "codes below zero", "sae-lens/matching_pursuit": "pursues the residual",
    "sparsify/groupmax/layers.1": "groupmax",
}  # fmt: skip
NOTED = "ignore:.*trained on normalised activations:UserWarning"


def file_of(folder: Path) -> Path:
    """The one file where there is one SAE of several in a repository."""
    files = [
        path
        for path in folder.glob("*.*")
        if path.name.startswith(("layer1.sae", "layer_1.", "gpt2-", "Llama-", "DeepSeek-"))
    ]
    return next((file for file in sorted(files) if file.suffix != ".json"), folder)


@pytest.mark.filterwarnings(NOTED)
@pytest.mark.parametrize("name", [str(folder) for folder in FOLDERS if str(folder) not in REFUSED])
def test_codes_and_reconstructions_are_the_librarys(name, tmp_path):
    golden = load_file(GOLDEN / name / "golden.safetensors")
    sae = SAE.load(file_of(GOLDEN / name))
    torch.testing.assert_close(sae.encode(golden["x"]), golden["codes"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae(golden["x"]), golden["x_hat"], atol=1e-5, rtol=1e-5)
    assert not any(parameter.requires_grad for parameter in sae.parameters())
    sae.save(tmp_path / "ours")
    again = SAE.load(tmp_path / "ours")
    assert torch.equal(again.encode(golden["x"]), sae.encode(golden["x"])) and again.metadata == sae.metadata


@pytest.mark.parametrize("name", REFUSED)
def test_what_saelab_has_no_architecture_for_is_refused_by_name(name):
    with pytest.raises(FormatError, match=REFUSED[name]):
        SAE.load(GOLDEN / name)


def test_every_library_has_its_golden_files():
    assert len(FOLDERS) >= 65 and {folder.parts[0] for folder in FOLDERS} == {
        "sae-lens", "dictionary-learning", "sparsify", "published"
    }  # fmt: skip


TWO = "published/google/gemma-scope-2-1b-pt"
STREAM = "blocks.1.hook_resid_post"


@pytest.mark.parametrize(
    ("name", "what", "site"),
    [
        ("sae-lens/matryoshka", "Matryoshka", STREAM), ("sae-lens/batchtopk", "MutualChoice", STREAM),
        ("sae-lens/hook_z", "ReLU", "blocks.1.attn.hook_z"), ("sparsify/multi/h.1.mlp", "MultiTopK", "blocks.1.hook_mlp_out"),
        ("dictionary-learning/BatchTopKSAE/trainer_0", "MutualChoice", STREAM),
        (f"{TWO}/attn_out/layer_1_width_16k_l0_small", "JumpReLU", "blocks.1.attn.hook_z"),
        ("published/google/gemma-scope-2b-pt-att/layer_12/width_16k/average_l0_82", "JumpReLU", "blocks.12.attn.hook_z"),
    ],
)  # fmt: skip
def test_class_and_site_are_those_of_the_files(name, what, site):
    sae = SAE.load(GOLDEN / name)
    assert type(sae.cfg).__name__ == what and sae.metadata["site"] == site


def test_a_transcoder_knows_both_of_its_sites():
    sae = SAE.load(GOLDEN / "sae-lens" / "skiptranscoder")
    assert isinstance(sae.cfg, saelab.Transcoder) and sae.cfg.skip and (sae.d_in, sae.d_out) == (6, 7)
    assert (sae.metadata["site"], sae.metadata["target_site"]) == ("blocks.1.hook_resid_post", "blocks.1.hook_mlp_out")
    sae = SAE.load(GOLDEN / "sparsify" / "transcoder" / "layers.1.mlp")
    assert (sae.metadata["site"], sae.metadata["target_site"]) == ("blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out")


def test_an_sae_of_a_centred_model_is_the_same_on_one_that_is_not():
    sae = SAE.load(GOLDEN / "sae-lens" / "before_6_centred")
    golden = load_file(GOLDEN / "sae-lens" / "before_6_centred" / "golden.safetensors")
    shifted = golden["x"] + torch.randn(len(golden["x"]), 1)
    torch.testing.assert_close(sae.encode(shifted), golden["codes"], atol=2e-5, rtol=1e-5)
    assert "centred" in sae.metadata["model_processing"]


def test_a_threshold_that_was_never_learnt_is_none(tmp_path):
    folder = GOLDEN / "dictionary-learning" / "BatchTopKSAE" / "trainer_0"
    state = torch.load(folder / "ae.pt") | {"threshold": torch.tensor(-1.0)}
    torch.save(state, tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ConfigError, match="learnt no threshold"):
        SAE.load(tmp_path).encode(torch.randn(2, 6))


def test_a_name_is_found_in_the_folder_that_stands_for_the_hub(monkeypatch, capsys):
    monkeypatch.setenv("SAELAB_HUB", str(PUBLISHED))
    path = "google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82"
    sae = load_sae("gemma-scope-2b-pt-res", "layer_12/width_16k/canonical")
    said = capsys.readouterr().out
    assert (
        "google/gemma-scope-2b-pt-res layer_12/width_16k/average_l0_82" in said and "blocks.12.hook_resid_post" in said
    )
    assert torch.equal(sae.W_dec, SAE.load(PUBLISHED / path).W_dec) and sae.metadata["model"] == "google/gemma-2-2b"
    other = load_sae("google/gemma-scope-2b-pt-res", "layer_12/width_16k/average_l0_82")
    assert torch.equal(other.encode(torch.ones(3, 6)), sae.encode(torch.ones(3, 6)))
    z = load_sae("mwhanna-qwen3-0.6b-transcoders-lowl0", "layer_1")
    assert z.metadata["site"] == "blocks.1.mlp.hook_in"
    found = load_sae("deepseek-r1-distill-llama-8b-qresearch", "blocks.19.hook_resid_post", dtype="bfloat16")
    assert found.metadata["site"] == "blocks.19.hook_resid_post" and found.dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="layer_13.*is not in it"):
        load_sae("gemma-scope-2b-pt-res", "layer_13/width_16k/canonical")


@pytest.mark.parametrize(
    ("name", "sae_id", "message"),
    [
        ("gemma-scope-2b-pt-re", "layer_12/width_16k/canonical", "near it: gemma-scope-2b-pt-res"),
        ("gemma-scope-2b-pt-res", None, "which SAE"),
        ("gemma-scope-2b-pt-res", "layer_99/width_16k/canonical", "an id of it is"),
        ("mntss-gemma-2-2b-2.5m-clt-as-per-layer", "layer_1", "cross-layer"), ("no such thing", None, "no release"),
        ("temporal-sae-gemma-2-2b", "blocks.12.hook_resid_post", "temporal"),
        ("google/gemma-scope-2b-pt-res", "layer_12/width_16k/average_l0_82", "cannot be had from the hub.*SAELAB_HUB"),
    ],
)  # fmt: skip
def test_a_name_that_means_nothing_says_the_way_out(name, sae_id, message):
    with pytest.raises(ConfigError, match=message):
        load_sae(name, sae_id)


def test_the_files_of_a_snapshot_may_be_links_into_the_cache(tmp_path):
    """As the hub's client lays them: each file of a snapshot is a link to a blob."""
    cache = tmp_path / "models--owner--name"
    snapshot = cache / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for file in (GOLDEN / "sae-lens" / "topk").iterdir():
        (cache / "blobs" / file.name).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", file.name))
    assert SAE.load(snapshot).cfg.k == 4


def test_of_a_repository_only_what_is_needed_is_fetched_from_the_mirror_at_the_revision(monkeypatch):
    import huggingface_hub

    asked = {}

    def fetched(repository, **how):
        asked.update(how, repository=repository)
        return str(PUBLISHED / repository)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    monkeypatch.setenv("SAELAB_HUB", "https://mirror.example")
    sae = load_sae("gemma-scope-2b-pt-res-canonical", "layer_12/width_16k/canonical", revision="abc")
    assert sae.metadata["site"] == "blocks.12.hook_resid_post"
    assert (asked["repository"], asked["revision"]) == ("google/gemma-scope-2b-pt-res", "abc")
    assert asked["endpoint"] == "https://mirror.example"
    path = "layer_12/width_16k/average_l0_82"
    assert f"{path}/params.npz" in asked["allow_patterns"] and not any("*" in name for name in asked["allow_patterns"])
    monkeypatch.delenv("SAELAB_HUB")
    load_sae("mwhanna/qwen3-0.6b-transcoders-lowl0", "layer_1.safetensors")
    assert asked["endpoint"] is None and {"layer_1.safetensors", "config.yaml"} <= set(asked["allow_patterns"])


def test_a_release_says_how_vectors_are_normalised_where_its_files_do_not(tmp_path, monkeypatch):
    theirs = GOLDEN / "sae-lens" / "topk_constant_norm_rescale"
    folder = tmp_path / "JoshEngels" / "Mistral-7B-Residual-Stream-SAEs" / "mistral_7b_layer_8"
    shutil.copytree(theirs, folder)
    told = json.loads((folder / "cfg.json").read_text()) | {"normalize_activations": "none"}
    (folder / "cfg.json").write_text(json.dumps(told))
    monkeypatch.setenv("SAELAB_HUB", str(tmp_path))
    golden = load_file(theirs / "golden.safetensors")
    sae = load_sae("mistral-7b-res-wg", "blocks.8.hook_resid_pre")
    torch.testing.assert_close(sae(golden["x"]), golden["x_hat"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "published/google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82", "sae-lens/topk", "sparsify/sae/layers.1",
        "dictionary-learning/AutoEncoder/trainer_0",
    ],
)  # fmt: skip
def test_pieces_are_the_whole_and_a_file_is_read_once(name, monkeypatch, tmp_path):
    whole = SAE.load(GOLDEN / name)
    whole.save(tmp_path / "ours")
    opened = []
    entry = zipfile.ZipFile.open
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *of, **how: opened.append(1) or entry(*of, **how))
    monkeypatch.setattr("saelab.base.owned.PIECE", 64)
    for folder in (GOLDEN / name, tmp_path / "ours"):
        for key, value in SAE.load(folder).state_dict().items():
            assert value.equal(whole.state_dict()[key]) or "direction_std" in key, key
    assert name[0] != "p" or len(opened) <= 20  # five arrays: told twice, read once


def test_a_changed_byte_of_an_archive_is_found_out(tmp_path, monkeypatch):
    monkeypatch.setattr("saelab.base.owned.PIECE", 64)
    folder = shutil.copytree(
        PUBLISHED / "google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82", tmp_path / "a"
    )
    data = bytearray((folder / "params.npz").read_bytes())
    data[len(data) // 3] ^= 1
    (folder / "params.npz").write_bytes(data)
    with pytest.raises(FormatError, match="Bad CRC-32"):
        load_sae(folder, site=STREAM)
