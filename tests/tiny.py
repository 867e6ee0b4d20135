"""Small random language models and a byte-level tokenizer, built in memory: no network, no file."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, END = "<|pad|>", "<|endoftext|>"
TEXTS = (
    "The state of the union is strong, and the people know it.",
    "My fellow citizens: in 1862 the war went on; in 1865 it ended.",
    "The economy grew by three percent.",
    "We ask the Congress for peace, for bread and for work.",
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte (any text round-trips), `<|endoftext|>` as bos and eos, `<|pad|>`: 258 ids."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=END, eos_token=END, pad_token=PAD)


def llama_model(seed: int = 0) -> LlamaForCausalLM:
    """4 blocks of width 32, 4 query heads on 2 key-value heads, tied head: about 50,000 parameters."""
    config = LlamaConfig(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=256, eos_token_id=256, pad_token_id=257,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def gpt2_model(seed: int = 0, blocks: int = 3) -> GPT2LMHeadModel:
    """3 blocks of width 24 with 3 heads."""
    config = GPT2Config(
        vocab_size=258, n_embd=24, n_layer=blocks, n_head=3, n_positions=256,
        bos_token_id=256, eos_token_id=256, pad_token_id=257,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config).eval()
