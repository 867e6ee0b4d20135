"""GPT-2s made by hand, of which every head's doing is known, and a tokenizer with one token a word.

`copier` has two blocks of one head each. The residual stream has three parts: the position (one-hot), the token (one-hot) and a
copy of the token before. Block 0 attends to the position before (the first to itself) and writes its token into the third
part; block 1 attends to the positions whose third part is the current token, an induction head, and where there is none to
the first position; what it writes is the token that it finds there.
"""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import saelab
from saelab.analysis.attention import ioi_prompts

WORDS = 26  # token ids of `copier`
POSITIONS = 40
SHARP = 400.0  # of the queries: attention is one-hot to rounding


def copier() -> saelab.LanguageModel:
    """The two blocks of the module's description, without MLPs to speak of."""
    d = POSITIONS + 2 * WORDS
    config = GPT2Config(
        vocab_size=WORDS, n_embd=d, n_layer=2, n_head=1, n_positions=POSITIONS, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, n_inner=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model = GPT2LMHeadModel(config).eval()
    position, token, copy = range(POSITIONS), range(POSITIONS, POSITIONS + WORDS), range(POSITIONS + WORDS, d)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for name, norm in model.named_modules():
            if "ln_" in name:
                norm.weight.fill_(1.0)
        model.transformer.wpe.weight[:, list(position)] = torch.eye(POSITIONS)
        model.transformer.wte.weight[:, list(token)] = torch.eye(WORDS)
        model.lm_head.weight[:, list(token)] = torch.eye(WORDS)
        first, second = (block.attn for block in model.transformer.h)
        for here in range(1, POSITIONS):
            first.c_attn.weight[here, here - 1] = SHARP
        _identity(first.c_attn.weight, position, [d + i for i in position])
        _identity(first.c_attn.weight, token, [2 * d + i for i in token])
        _identity(first.c_proj.weight, token, copy, 0.15)  # the norm before had made 1 of 0.15
        _identity(second.c_attn.weight, token, token, SHARP)
        _identity(second.c_attn.weight, copy, [d + i for i in token])
        second.c_attn.weight[0, [d + i for i in token]] = 0.5
        _identity(second.c_attn.weight, token, [2 * d + i for i in token])
        _identity(second.c_proj.weight, token, token, 5.0)
    return saelab.load_model(model, device="cpu")


def _identity(weight: torch.Tensor, rows: range, columns: range | list[int], value: float = 1.0) -> None:
    weight[list(rows), list(columns)] = value


def token_latents(block: int) -> saelab.SAE:
    """An SAE of `copier`'s hook_z with one latent a token: latent i fires where z holds token i."""
    d = POSITIONS + 2 * WORDS
    sae = saelab.SAE(
        saelab.TopK(k=2, d_sae=WORDS), d, metadata={"site": f"blocks.{block}.attn.hook_z", "heads": [1, d]}
    )
    rows = torch.zeros(WORDS, d)
    rows[:, POSITIONS : POSITIONS + WORDS] = torch.eye(WORDS)
    with torch.no_grad():
        sae.encoder_weight.copy_(rows)
        sae.W_dec.copy_(rows)
        sae.encoder_bias.fill_(-1.0)
    return sae


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of the IOI sentences, and marks by themselves."""
    parts = [text for frame in ioi_prompts.FRAMES for text in frame]
    parts += [ioi_prompts.AND, ioi_prompts.ALONGSIDE, ioi_prompts.OPENING, ioi_prompts.FILLER]
    text = " ".join(part.format(place="", thing="") for part in parts).replace(",", " , ").replace(".", " . ")
    words = [*text.split(), *ioi_prompts.NAMES[:12], *ioi_prompts.PLACES, *ioi_prompts.THINGS]
    vocabulary = {word: i for i, word in enumerate(["?", *dict.fromkeys(words)])}
    core = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?")


def reader() -> saelab.LanguageModel:
    """A random GPT-2 of 2 blocks with that tokenizer."""
    tokenizer = word_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=24, n_layer=2, n_head=3, n_positions=64, bos_token_id=None, eos_token_id=None
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).eval()
    return saelab.load_model(model, tokenizer=tokenizer, device="cpu")
