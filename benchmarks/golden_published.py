"""Golden files of the formats that SAELens reads from the hub: small files in each layout, computed by its own loaders.

    $PEERS/sae-lens/bin/python benchmarks/golden_published.py tests/interop/golden/published

Its downloads are replaced by the files, which lie as in the hub's repositories, so that `SAELAB_HUB` may be that folder.
"""

import argparse
import json
from pathlib import Path
from unittest import mock

import numpy
import torch
from golden import D, F, rows, written
from huggingface_hub.errors import EntryNotFoundError
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.registry import get_sae_class
from safetensors import safe_open
from safetensors.torch import save_file

GENERATOR = torch.Generator().manual_seed(3)
PLAIN = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
TURNED = {"W_enc": (F, D), "b_enc": (F,), "W_dec": (D, F), "b_dec": (D,)}
LINEAR = {"encoder.weight": (F, D), "encoder.bias": (F,), "decoder.weight": (D, F), "decoder.bias": (D,)}
JUMPING = {name.lower(): shape for name, shape in PLAIN.items()} | {"threshold": (F,)}


def random(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    made = {name: torch.randn(*shape, generator=GENERATOR) * 0.6 for name, shape in shapes.items()}
    return {name: value.abs() + 0.1 if name == "threshold" else value for name, value in made.items()}


def computed(out: Path, repository: str, path: str, loader, folder: Path | None = None) -> None:
    """Write what SAELens' loader makes of this path of the repository."""

    def local(repo_id, filename, subfolder=None, **_):
        file = out / repo_id / (subfolder or "") / filename
        if not file.exists():
            raise EntryNotFoundError(str(file), mock.Mock())
        return str(file)

    def shapes(repo_id, filename):
        with safe_open(out / repo_id / filename, "pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118

    with (
        mock.patch.object(loaders, "hf_hub_download", local),
        mock.patch.object(loaders, "get_safetensors_tensor_shapes", shapes),
    ):
        config, state, _ = loader(repository, path, device="cpu", cfg_overrides={"dtype": "float32"})
    config |= {"d_in": D, "d_sae": F} | ({"d_out": D} if "d_out" in config else {})
    config = loaders.handle_config_defaulting(config)
    kind, kind_of_config = get_sae_class(config["architecture"])
    sae = kind(kind_of_config.from_dict(config))
    sae.load_state_dict(state)
    x = rows(2, 3) if config.get("reshape_activations") == "hook_z" else rows()
    written(folder or out / repository / path, x, sae.encode(x), sae(x))


def made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def gemma_scope(out: Path) -> None:
    for kind, loader in {"res": loaders.gemma_2_sae_huggingface_loader, "att": loaders.gemma_2_sae_huggingface_loader,
                         "transcoders": loaders.gemma_2_transcoder_huggingface_loader}.items():  # fmt: skip
        repository, path = f"google/gemma-scope-2b-pt-{kind}", "layer_12/width_16k/average_l0_82"
        shapes = PLAIN | {"threshold": (F,)}
        numpy.savez(made(out / repository / path) / "params.npz", **{n: v.numpy() for n, v in random(shapes).items()})
        computed(out, repository, path, loader)


def gemma_scope_2(out: Path) -> None:
    pre, post = "model.layers.1.pre_feedforward_layernorm.output", "model.layers.1.post_feedforward_layernorm.output"
    repository = "google/gemma-scope-2-1b-pt"
    for kind, points, skip in (
        ("resid_post", ["model.layers.1.output", None], {}), ("attn_out", None, {}), ("mlp_out", [post, None], {}),
        ("transcoder", [pre, post], {"affine_skip_connection": (D, D)}), ("transcoder_all", None, {}),
    ):  # fmt: skip
        path = f"{kind}/layer_1_width_16k_l0_small"
        folder = made(out / repository / path)
        save_file(random(JUMPING | skip), folder / "params.safetensors")
        if points is not None:
            told = {"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt", "affine_connection": bool(skip)}
            told |= dict(zip(("hf_hook_point_in", "hf_hook_point_out"), points, strict=True))
            (folder / "config.json").write_text(json.dumps(told))
        computed(out, repository, path, loaders.gemma_3_sae_huggingface_loader)


def llama_scope(out: Path) -> None:
    """With norms at which the input's scale is 1: at another one SAELens makes another threshold of it."""
    repository, path = "fnlp/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L1R-8x"
    save_file(random(LINEAR), made(out / repository / path / "checkpoints") / "final.safetensors")
    site = "blocks.1.hook_resid_post"
    told = {"d_model": D, "d_sae": F, "jump_relu_threshold": 0.7, "hook_point_in": site, "hook_point_out": site,
            "act_fn": "jumprelu", "dataset_average_activation_norm": {"in": D**0.5, "out": D**0.5}}  # fmt: skip
    (out / repository / path / "hyperparams.json").write_text(json.dumps(told))
    computed(out, repository, path, loaders.llama_scope_sae_huggingface_loader)


def single_files(out: Path) -> None:
    for repository, file, loader, shapes in (
        ("Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_4", "layer1.sae.pt", loaders.qwen_scope_sae_huggingface_loader, TURNED),
        ("ckkissane/attn-saes-gpt2-small-all-layers", "gpt2-small_L1.pt", loaders.connor_rob_hook_z_huggingface_loader, PLAIN),
        ("Goodfire/Llama-3.1-8B-Instruct-SAE-l19", "Llama-3.1-8B-Instruct-SAE-l19.pth", loaders.get_goodfire_huggingface_loader,
         {name.replace(".", "_linear."): shape for name, shape in LINEAR.items()}),
        ("qresearch/DeepSeek-R1-Distill-Llama-8B-SAE-l19", "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt",
         loaders.deepseek_r1_sae_huggingface_loader, LINEAR),
        ("mwhanna/qwen3-0.6b-transcoders-lowl0", "layer_1.safetensors", loaders.mwhanna_transcoder_huggingface_loader,
         TURNED | {"W_dec": (F, D)}),
    ):  # fmt: skip
        folder = made(out / repository)
        if file.endswith("safetensors"):
            save_file(random(shapes), folder / file)
            ends = "feature_input_hook: mlp.hook_in\nfeature_output_hook: hook_mlp_out\n"
            (folder / "config.yaml").write_text(f"model_name: Qwen/Qwen3-0.6B\n{ends}")
            sizes = {"d_model": D, "d_feature": F, "batch_size": 8}
            (folder / "wandb-config.yaml").write_text("".join(f"{n}: {{value: {size}}}\n" for n, size in sizes.items()))
        else:
            torch.save(random(shapes), folder / file)
        if "attn" in repository:
            told = {"act_size": D, "dict_size": F, "act_name": "blocks.1.attn.hook_z"}
            (folder / "gpt2-small_L1_cfg.json").write_text(json.dumps(told))
        computed(out, repository, file, loader, folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    for make in (gemma_scope, gemma_scope_2, llama_scope, single_files):
        make(out)
