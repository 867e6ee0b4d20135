"""Tiny random models of many causal families of transformers, 2 or 3 blocks of width 32, built in memory."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 257,
}  # fmt: skip
EXPERTS = {
    "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}  # fmt: skip
LATENT = {
    "q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "head_dim": 4,
    "n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4,
}  # fmt: skip
STATES = {"mamba_d_state": 4, "mamba_d_head": 8, "mamba_n_heads": 8, "mamba_expand": 2, "mamba_n_groups": 1}
GATED = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
ZAMBA = {
    "num_hidden_layers": 3, "layer_types": ["mamba", "hybrid", "hybrid"], "hybrid_layer_ids": [1, 2], "mamba_ngroups": 1,
    "mamba_d_state": 4, "n_mamba_heads": 8, "num_mem_blocks": 1, "attention_hidden_size": 64, "mamba_headdim": 8,
}  # fmt: skip
DBRX = {
    "d_model": 32, "n_layers": 2, "n_heads": 4, "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    "ffn_config": {"ffn_hidden_size": 16},
}  # fmt: skip
WIDE = {"head_dim": 8}
OTHERS: dict[str, dict[str, Any]] = {
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gemma": WIDE,
    "gemma2": {**WIDE, "sliding_window": 4},
    "gemma3_text": {**WIDE, "sliding_window": 4},
    "vaultgemma": WIDE,
    "qwen3": WIDE,
    "helium": WIDE,
    "glm": WIDE,
    "glm4": WIDE,
    "seed_oss": WIDE,
    "granite": {"residual_multiplier": 0.3},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "opt_after": {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "xglm": {"ffn_dim": 48, "attention_heads": 4, "num_layers": 2, "pad_token_id": 1},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4},
    "dbrx": DBRX,
    "bloom": {"n_head": 4},
    "bloom_after": {"n_head": 4, "apply_residual_connection_post_layernorm": True},
    "falcon": {"parallel_attn": False},
    "falcon_parallel": {"parallel_attn": True},
    "falcon_new": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "gpt_neox_sequential": {"use_parallel_residual": False},
    "stablelm_parallel": {"use_parallel_residual": True},
    "mixtral": EXPERTS,
    "qwen2_moe": EXPERTS,
    "qwen3_moe": {**EXPERTS, **WIDE},
    "gpt_oss": {**EXPERTS, **WIDE},
    "olmoe": EXPERTS,
    "phimoe": EXPERTS,
    "jetmoe": EXPERTS,
    "granitemoe": {**EXPERTS, "residual_multiplier": 0.3},
    "deepseek_v2": {**EXPERTS, **LATENT},
    "deepseek_v3": {**EXPERTS, **LATENT},
    "minicpm3": LATENT,
    "mamba": {"state_size": 4},
    "mamba2": {"head_dim": 8, "num_heads": 8, "state_size": 4, "n_groups": 1, "chunk_size": 8},
    "falcon_mamba": {"state_size": 4},
    "falcon_h1": {**STATES, "mamba_d_ssm": 64},
    "rwkv": {"attention_hidden_size": 32},
    "xlstm": {"num_heads": 4},
    "bamba": {**STATES, "attn_layer_indices": [1]},
    "granitemoehybrid": {
        **EXPERTS, **STATES, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 16, "residual_multiplier": 0.3,
    },
    "jamba": {**EXPERTS, "mamba_d_state": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "recurrent_gemma": {**WIDE, "num_hidden_layers": 3, "attention_window_size": 16, "lru_width": 32},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "qwen3_next": {**EXPERTS, **WIDE, **GATED},
    "zamba2": ZAMBA,
}  # fmt: skip
PLAIN = (
    "apertus", "arcee", "biogpt", "bitnet", "cohere", "cohere2", "ctrl", "cwm", "diffllama", "ernie4_5", "exaone4", "gpt2",
    "gpt_bigcode", "gpt_neox", "hyperclovax", "llama", "ministral3", "mistral", "moshi", "nanochat", "nemotron", "olmo",
    "olmo2", "olmo3", "openai-gpt", "persimmon", "phi", "phi3", "qwen2", "smollm3", "stablelm", "starcoder2",
)  # fmt: skip
CONFIGS = {**{name: {} for name in PLAIN}, **OTHERS}


def build(family: str) -> Any:
    """A model in evaluation mode; norms are not left at the identity, which would hide a wrong side of one."""
    kind = family.split("_after")[0].split("_parallel")[0].split("_sequential")[0].split("_new")[0]
    config = AutoConfig.for_model(kind, **{**SIZES, **CONFIGS[family]})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()
