"""The sites of a U-Net or DiT of diffusers: which modules are listed, in which order, and the names of the middle block."""

AFTER = "mid_block"
# h-space's places in Haas et al. (2024): the whole middle block, its input, and its second ResNet after the second norm
PLACES = {"after": AFTER, "before": "mid_block.input", "middle": "mid_block.resnets.1.norm2"}

_KINDS = {
    "attn1": "attention",
    "ff": "mlp",
    "resnets": "resnet",
    "attentions": "attention",
    "downsamplers": "downsampling",
    "upsamplers": "upsampling",
}


def is_block(path: str) -> bool:
    """Whether a module is listed among the sites."""
    parts = path.split(".")
    if parts[0] in ("down_blocks", "up_blocks"):
        return len(parts) == 2 or (len(parts) == 4 and parts[2] in _KINDS)
    if parts[0] == "transformer_blocks":
        return len(parts) == 2 or (len(parts) == 3 and parts[2] in ("attn1", "ff"))
    if parts[0] == AFTER:
        return len(parts) == 1 or (len(parts) == 3 and parts[1] in _KINDS)
    return path in ("conv_in", "conv_out")


def order_of(path: str) -> tuple[int, ...]:
    """Sorts the sites into the order in which a U-Net runs them: a block's output comes after its parts."""
    stage, *parts = path.removesuffix(".norm2").split(".")
    block = int(parts.pop(0)) if parts and parts[0].isdigit() else 0
    if stage == "transformer_blocks":
        return (1, block, 3 if not parts else ("attn1", "ff").index(parts[0]))
    place = {"conv_in": 0, "down_blocks": 1, AFTER: 2, "up_blocks": 3, "conv_out": 4}[stage]
    if parts == ["input"]:
        return (place, block, 0)
    if not parts:
        return (place, block, 3)
    sampler, attention = parts[0] in ("downsamplers", "upsamplers"), parts[0] == "attentions"
    return (place, block, 1 + sampler, int(parts[1]), attention, not path.endswith(".norm2"))


def kind_of(path: str) -> str:
    """What the table of sites calls a module."""
    found = [kind for part, kind in _KINDS.items() if part in path.split(".")]
    return found[0] if found else "convolution" if path.startswith("conv") else "block"
