"""What the steering tests share: a small SAE with statistics, and a Llama and a GPT-2 in float64."""

import torch

import saelab
from tests import tiny

SITE = "blocks.1.hook_resid_post"
TEXTS = ["The state of the union", "My fellow<|endoftext|>", "We ask the Congress for peace"]
PROMPTS = ["The state of the union", "My", "economy, and"]


def doubles() -> list["saelab.LanguageModel"]:
    """Random models in float64, whose every rounding is far below any tie of two tokens."""
    tokenizer = tiny.byte_tokenizer()
    return [
        saelab.load_model(model.double(), tokenizer=tokenizer, device="cpu")
        for model in (tiny.llama_model(), tiny.gpt2_model())
    ]


def sae_of(lm: "saelab.LanguageModel", site: str = SITE, d_sae: int = 48) -> "saelab.SAE":
    """A TopK SAE in float64 fitted to a few texts in no time: tied rows, and the figures of its latents."""
    width = lm.site(site).width
    sae = saelab.SAE(saelab.TopK(k=6, d_sae=d_sae), d_in=width, metadata={"site": site, "skip_positions": 1})
    sae = sae.double()
    x = lm.record(list(tiny.TEXTS), site)
    mask = lm.tokenize(list(tiny.TEXTS)).mask.clone()
    mask[:, 0] = False
    rows = x[mask].double()
    state = sae.state
    with torch.no_grad():
        sae.decoder_bias.copy_(rows.mean(0))
        codes = sae.encode(rows)
        state.stat_tokens.fill_(len(rows))
        state.fires.copy_((codes > 0).sum(0))
        state.act_max.copy_(codes.amax(0))
        state.act_sum.copy_(codes.sum(0))
        state.direction_std.copy_((rows @ sae.W_dec.T).std(0))
    sae.metadata["median_norm"] = float(rows.norm(dim=1).median())
    return sae


def busy(sae: "saelab.SAE", n: int) -> list[int]:
    """The `n` latents that fired most."""
    return sae.state.fires.sort(descending=True, stable=True).indices[:n].tolist()


def hooks_of(lm: "saelab.LanguageModel") -> int:
    """How many hooks hang on the model."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules())
