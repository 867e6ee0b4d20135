"""Golden files of other libraries: small SAEs that they write themselves, with the codes and reconstructions they compute.

    benchmarks/peers.sh sae-lens dictionary-learning sparsify
    $PEERS/sae-lens/bin/python benchmarks/golden.py sae-lens tests/interop/golden

and the same with `dictionary-learning` and `sparsify`, each in its own environment. A folder for each: what the library
wrote, and `golden.safetensors` with `x`, `codes` and `x_hat`, for `tests/interop/test_golden.py`. `golden_published.py` makes
those of the formats that SAELens only reads.
"""

import argparse
import json
import shutil
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file

D, F, N, K = 6, 20, 24, 4


def randomised(module, seed: int = 0):
    """The module with weights of a seed: rows of the decoder of several lengths, thresholds above 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(module.named_parameters()):
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.6
        if "threshold" in name:
            parameter.data = parameter.data.abs() + 0.1
        if "bias" in name or name.startswith("b_"):
            parameter.data *= 0.5
    return module


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(N, *(shape or (D,)), generator=torch.Generator().manual_seed(1)) * 2 + 0.3


@torch.no_grad()
def written(folder: Path, x: torch.Tensor, codes: torch.Tensor, x_hat: torch.Tensor) -> None:
    tensors = {"x": x.flatten(1), "codes": codes, "x_hat": x_hat.flatten(1)}
    tensors = {name: value.detach().float().contiguous() for name, value in tensors.items()}
    save_file(tensors, folder / "golden.safetensors")
    print(f"{folder}: {(codes > 0).sum(1).float().mean():.1f} latents a row")


def about(**more):
    from sae_lens.saes.sae import SAEMetadata

    known = {
        "model_name": "gpt2-small",
        "hook_name": "blocks.1.hook_resid_post",
        "context_size": 64,
        "prepend_bos": True,
    }
    return SAEMetadata(**known | more)


def sae_lens(out: Path) -> None:
    def saved(name: str, kind: str, x: torch.Tensor | None = None, metadata=None, **more) -> None:
        from sae_lens import saes

        config = getattr(saes, f"{kind}Config")(d_in=D, d_sae=F, metadata=metadata or about(), **more)
        randomised(getattr(saes, kind)(config)).save_model(out / name)
        recomputed(out / name, rows() if x is None else x)

    kinds = {
        "standard": ("StandardSAE", {}), "gated": ("GatedSAE", {}), "jumprelu": ("JumpReLUSAE", {}),
        "topk": ("TopKSAE", {"k": K}), "topk_rescaled": ("TopKSAE", {"k": K, "rescale_acts_by_decoder_norm": True}),
        "abstopk": ("AbsTopKSAE", {"k": K}), "matching_pursuit": ("MatchingPursuitSAE", {}),
    }  # fmt: skip
    for name, (kind, more) in kinds.items():
        saved(name, kind, **more)
        if name in ("standard", "gated", "jumprelu", "topk_rescaled"):
            saved(f"{name}_uncentred", kind, apply_b_dec_to_input=False, **more)
        if name in ("standard", "gated", "jumprelu", "topk"):
            for how in ("layer_norm", "constant_norm_rescale"):
                saved(f"{name}_{how}", kind, normalize_activations=how, **more)
    for how in ("expected_average_only_in", "covariance_whitening"):
        saved(f"standard_{how}", "StandardSAE", normalize_activations=how)
    z = about(hook_name="blocks.1.attn.hook_z")
    saved("hook_z", "StandardSAE", rows(2, 3), z, reshape_activations="hook_z")
    for kind in ("Transcoder", "SkipTranscoder", "JumpReLUTranscoder", "JumpReLUSkipTranscoder"):
        told = about(hook_name_out="blocks.1.hook_mlp_out")
        saved(kind.lower(), kind, metadata=told, d_out=D + 1, apply_b_dec_to_input=False)
        if kind == "SkipTranscoder":
            normalised = {"d_out": D + 1, "apply_b_dec_to_input": False, "normalize_activations": "layer_norm"}
            saved("skiptranscoder_layer_norm", kind, metadata=told, **normalised)
    for rescales in (True, False):
        trained(out, "batchtopk", "BatchTopKTrainingSAE", rescale_acts_by_decoder_norm=rescales)
        widths = [5, 12, F]
        trained(
            out,
            "matryoshka",
            "MatryoshkaBatchTopKTrainingSAE",
            rescale_acts_by_decoder_norm=rescales,
            matryoshka_widths=widths,
        )
    older(out)


def recomputed(folder: Path, x: torch.Tensor, files: Path | None = None) -> None:
    from sae_lens.saes.sae import SAE

    sae = SAE.load_from_disk(files or folder)
    written(folder, x, sae.encode(x), sae(x))


def trained(out: Path, name: str, kind: str, **more) -> None:
    """Finished, and as a checkpoint with the scale of the input beside it: that is computed with what finishing makes of it."""
    from sae_lens import saes

    name += "" if more["rescale_acts_by_decoder_norm"] else "_plain"
    sae = randomised(
        getattr(saes, kind)(getattr(saes, f"{kind}Config")(d_in=D, d_sae=F, k=K, metadata=about(), **more))
    )
    sae.topk_threshold.fill_(0.8)
    sae.save_inference_model(out / name)
    recomputed(out / name, rows())
    folder, finished = out / f"{name}_checkpoint", out / "finished"
    sae.save_model(folder)
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 0.5}))
    told = json.loads((folder / "cfg.json").read_text()) | {"normalize_activations": "expected_average_only_in"}
    (folder / "cfg.json").write_text(json.dumps(told))
    sae.fold_activation_norm_scaling_factor(0.5)
    sae.save_inference_model(finished)
    recomputed(folder, rows(), finished)
    shutil.rmtree(finished)


def older(out: Path) -> None:
    """Flat configurations of before version 6, as the releases for GPT-2 small have them."""
    site = {"hook_name": "blocks.1.hook_resid_post"}
    for name, kind, more in (
        ("before_6", "standard", {"hook_point": site["hook_name"], "hook_point_head_index": None}),
        ("before_6_topk", "standard", site | {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}),
        ("before_6_centred", "gated",
         site | {"architecture": "gated", "model_from_pretrained_kwargs": {"center_writing_weights": True}}),
    ):  # fmt: skip
        shutil.copytree(out / kind, out / name, dirs_exist_ok=True)
        told = {"model_name": "gpt2-small", "d_in": D, "d_sae": F, "dtype": "torch.float32", "device": "cpu",
                "context_size": 128, "dataset_path": "Skylion007/openwebtext", "l1_coefficient": 0.001} | more  # fmt: skip
        (out / name / "cfg.json").write_text(json.dumps(told))
        x = rows()  # those of a centred model have the mean 0
        recomputed(out / name, x - x.mean(1, keepdim=True) if "centred" in name else x)


def dictionary_learning(out: Path) -> None:
    from dictionary_learning import dictionary
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    with mock.patch.dict("sys.modules", {"datasets": mock.Mock(), "zstandard": mock.Mock()}):  # not there, not needed
        from dictionary_learning.utils import load_dictionary
    plain = ("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder")
    made = [getattr(dictionary, name)(D, F) for name in plain]
    made += [AutoEncoderTopK(D, F, K), BatchTopKSAE(D, F, K), MatryoshkaBatchTopKSAE(D, F, K, [5, 7, F - 12])]
    for sae in map(randomised, made):
        name = type(sae).__name__
        folder = out / name / "trainer_0"
        folder.mkdir(parents=True, exist_ok=True)
        trainer = {"dict_class": name, "lm_name": "EleutherAI/pythia-70m-deduped", "layer": 1, "activation_dim": D,
                   "submodule_name": "resid_post_layer_1", "dict_size": F}  # fmt: skip
        if hasattr(sae, "k"):
            sae.threshold.fill_(0.8)
            trainer["k"] = K
        torch.save(sae.state_dict(), folder / "ae.pt")
        (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))
        sae, x = load_dictionary(str(folder), "cpu")[0], rows()
        written(folder, x, sae.encode(x), sae(x))


def sparsify(out: Path) -> None:
    from sparsify import SparseCoder, SparseCoderConfig

    latents = {"num_latents": F}
    for name, more in {
        "sae/layers.1": {"expansion_factor": 3}, "multi/h.1.mlp": latents | {"multi_topk": True},
        "transcoder/layers.1.mlp": latents | {"transcode": True},
        "skip_transcoder/layers.1.mlp": latents | {"transcode": True, "skip_connection": True},
        "skip_sae/layers.1": latents | {"skip_connection": True}, "groupmax/layers.1": latents | {"activation": "groupmax"},
    }.items():  # fmt: skip
        folder = out / name
        randomised(SparseCoder(D, SparseCoderConfig(k=K, **more))).save_to_disk(folder)
        sae, x = SparseCoder.load_from_disk(folder), rows()
        top, indices, _ = sae.encode(x)
        codes = torch.zeros(N, sae.num_latents).scatter_(1, indices, top)
        x_hat = sae.decode(top, indices)  # `forward` gives that with 4k where the loss is Multi-TopK's
        written(folder, x, codes, x_hat if sae.W_skip is None else x_hat + x @ sae.W_skip.mT)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=("sae-lens", "dictionary-learning", "sparsify"))
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    makers = {"sae-lens": sae_lens, "dictionary-learning": dictionary_learning, "sparsify": sparsify}
    makers[arguments.library](arguments.out / arguments.library)
