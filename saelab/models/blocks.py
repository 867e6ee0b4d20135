"""TransformerLens' names in a family that no table knows: measured, from what a few tokens leave in the model.

A name is given where the module holds what the name means: the output of a block is what the next one reads; what attention and
MLP give adds up to the block's change of the stream; what stands between them is the stream with attention's part added. A
block that scales or norms what it adds has no module that gives it, and no such name.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from saelab.models.families import ATTENTION, EMBEDDING, MLP, NORM, PROJECTION, RESIDUAL, Side

Targets = Mapping[str, tuple[nn.Module, Side]]
Reader = Callable[[Targets], Mapping[str, Tensor]]  # runs a few tokens and gives what passed, of the modules that ran

_MIXER = re.compile(r"attn|attention|temporal_block|mixer|mamba|conv$", re.I)
_ATTENTION = re.compile(r"attn|attention", re.I)
_STATES = re.compile(r"linear_attn|mamba|mixer", re.I)  # named so, and going from state to state: attention to nothing
_MLP = re.compile(r"mlp|ffn|feed_?forward|moe|fc2$", re.I)
_NORM = re.compile(r"norm|^ln", re.I)
_OUTPUT = re.compile(r"^(o_proj|out_proj|c_proj|dense|wo|fc_out|fc2|down_proj|dense_4h_to_h|w2)$")
_PRE = ("gate_proj", "up_proj", "c_fc", "fc1", "fc_in", "dense_h_to_4h")


class Found(NamedTuple):
    """A place: the path below the model, the side, the width, what it is, and how many heads."""

    path: str
    side: Side
    width: int
    kind: str
    heads: int | None = None


def block_lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Every list of modules that are of one kind of block, the longest first."""
    lists = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    yield from sorted(lists, key=lambda item: (-len(item[1]), item[0].count(".")))


def measured(model: nn.Module, n_layers: int, heads: int, read: Reader) -> tuple[str, dict[str, Found]]:
    """The path of the list of blocks and name -> place; empty where no such list passes one stream from block to block."""
    for path, blocks in block_lists(model):
        if len(blocks) != n_layers:
            continue
        stream = read({f"{i}{side}": (block, side) for i, block in enumerate(blocks) for side in ("input", "output")})
        if len(stream) == 2 * n_layers and all(_same_stream(stream, i) for i in range(n_layers)):
            named: dict[str, Found] = {}
            for layer, block in enumerate(blocks):
                pre, post = stream[f"{layer}input"], stream[f"{layer}output"]
                for hook, found in _inside(block, pre, post, heads, read).items():
                    inside = f"{path}.{layer}.{found.path}".rstrip(".")
                    named[f"blocks.{layer}.{hook}"] = found._replace(path=inside)
            return path, named
    return "", {}


def _same_stream(stream: Mapping[str, Tensor], layer: int) -> bool:
    x, y, following = (stream.get(key) for key in (f"{layer}input", f"{layer}output", f"{layer + 1}input"))
    assert x is not None and y is not None
    return x.ndim == 3 and x.shape == y.shape and (following is None or torch.equal(y, following))


def _inside(block: nn.Module, pre: Tensor, post: Tensor, heads: int, read: Reader) -> dict[str, Found]:
    width = pre.shape[-1]
    parts = {
        path: m
        for path, m in block.named_modules()
        if path and path.count(".") < 3 and not isinstance(m, nn.ModuleList)
    }
    inputs, outputs = (read({path: (m, side) for path, m in parts.items()}) for side in ("input", "output"))
    whole = Passed(inputs, outputs, pre)
    found = {"hook_resid_pre": Found("", "input", width, RESIDUAL)}
    mixing, writing = _added(whole, post) or (None, None)
    attention = next((path for path in parts if _attends(path, parts[path])), None)
    if attention:
        found |= _of_attention(whole, attention, mixing, heads)
    if attention and mixing and mixing.startswith((attention, *_norms(outputs))) and outputs[mixing].shape == pre.shape:
        found["hook_attn_out"] = Found(mixing, "output", width, ATTENTION)
    between = _between(
        whole, post, mixing or next((path for path in outputs if _MIXER.search(path.split(".")[0])), None)
    )
    if between:
        found["hook_resid_mid"] = Found(between, "input", width, RESIDUAL)
    if writing and outputs[writing].shape == pre.shape:
        found |= _of_mlp(whole, writing)
        found["hook_mlp_out"] = Found(writing, "output", width, MLP)
    found["hook_resid_post"] = Found("", "output", width, RESIDUAL)
    return found


class Passed(NamedTuple):
    """What went into and came out of the modules of a block, by path, and what the block read."""

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    pre: Tensor

    def at(self, path: str) -> Tensor:
        """The output in the shape of the stream (some families run their MLP on rows without a batch)."""
        return self.outputs[path].reshape(self.pre.shape)

    def of_stream(self) -> list[str]:
        """Paths whose outputs are as many numbers as the stream."""
        return [path for path, x in self.outputs.items() if x.numel() == self.pre.numel()]


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _norms(paths: Mapping[str, Tensor]) -> list[str]:
    return [path for path in paths if _NORM.search(_last(path))]


def _attends(path: str, module: nn.Module) -> bool:
    name, kind = _last(path), type(module).__name__
    named = _ATTENTION.search(name) and not _NORM.search(name) and not _STATES.search(name)
    return bool(named or (name == "temporal_block" and kind.endswith("Attention")))


def _added(whole: Passed, post: Tensor) -> tuple[str, str | None] | None:
    """The module of the attention (or what stands for it) and that of the MLP that add up to the block's change."""
    paths = sorted(whole.of_stream(), key=lambda path: (bool(_NORM.search(_last(path))), path.count(".")))
    mixing = [path for path in paths if _MIXER.search(path.split(".")[0]) or _NORM.search(_last(path))]
    writing = [path for path in paths if _MLP.search(path.split(".")[0]) or _NORM.search(_last(path))]
    for one in mixing:
        if _close(post, whole.pre, whole.at(one)):
            return one, None
        for other in writing:
            if other != one and _close(post, whole.pre, whole.at(one), whole.at(other)):
                return one, other
    return None


def _close(total: Tensor, *parts: Tensor) -> bool:
    """Whether the parts add up to the total, but for the rounding of each number."""
    size = sum((part.abs().double() for part in parts), total.abs().double())
    rest = total.double() - sum(part.double() for part in parts)
    return bool((rest.abs() <= 16 * torch.finfo(total.dtype).eps * size).all())


def _between(whole: Passed, post: Tensor, mixing: str | None) -> str | None:
    """The first module that reads the stream with attention's part added, from where it goes on to the end of the block with
    another module's part; both may be scaled. None where MLP and attention run side by side, or the stream itself is normed."""
    if mixing is None or mixing not in whole.of_stream():
        return None
    for path, x in whole.inputs.items():
        if x.shape == whole.pre.shape and _multiple(x, whole.pre, whole.at(mixing)):
            later = (other for other in whole.of_stream() if other != mixing)
            return path if any(_multiple(post, x, whole.at(other)) for other in later) else None
    return None


def _multiple(total: Tensor, start: Tensor, part: Tensor) -> bool:
    """Whether total = start + c part, for some number c that is not 0."""
    change, step = total.double() - start.double(), part.double()
    scale = (change * step).sum() / (step * step).sum()
    return bool(scale.abs() > 1e-3) and _close(total, start, scale * step)


def _of_attention(whole: Passed, attention: str, mixing: str | None, heads: int) -> dict[str, Found]:
    found = {}
    for names in (("q_proj", "k_proj", "v_proj"), ("query", "key", "value")):
        paths = [f"{attention}.{name}" for name in names]
        if all(path in whole.outputs and whole.outputs[path].ndim == 3 for path in paths):
            for letter, path in zip("qkv", paths, strict=True):
                found[f"attn.hook_{letter}"] = Found(path, "output", whole.outputs[path].shape[-1], PROJECTION)
    own = [path for path in whole.outputs if path.startswith(f"{attention}.") and _OUTPUT.match(_last(path))]
    if len(own) == 1 and whole.inputs[own[0]].ndim == 3 and _gives(whole, own[0], attention, mixing):
        wide = whole.inputs[own[0]].shape[-1]
        found["attn.hook_z"] = Found(own[0], "input", wide, ATTENTION, heads if wide % heads == 0 else None)
    return found


def _gives(whole: Passed, projection: str, module: str, contribution: str | None) -> bool:
    """Whether a projection is what a module ends with, or what it adds to the stream."""
    return projection == contribution or torch.equal(whole.outputs[projection], whole.outputs[module])


def _of_mlp(whole: Passed, writing: str) -> dict[str, Found]:
    found = {}
    mlp = writing
    if _NORM.search(_last(writing)):
        mlp = next((path for path in whole.outputs if _MLP.search(_last(path))), writing)
    elif _OUTPUT.match(_last(writing)):
        mlp = writing.rpartition(".")[0]
    own = {_last(path): path for path in whole.outputs if path.rpartition(".")[0] == mlp}
    last = [path for name, path in own.items() if _OUTPUT.match(name)]
    if (
        len(last) == 1
        and whole.inputs[last[0]].ndim == 3
        and (last[0] == writing or _gives(whole, last[0], mlp, writing))
    ):
        wide = whole.inputs[last[0]].shape[-1]
        first = next((own[name] for name in _PRE if name in own), None)
        if first and whole.outputs[first].shape[-1] == wide:
            found["mlp.hook_pre"] = Found(first, "output", wide, MLP)
        found["mlp.hook_post"] = Found(last[0], "input", wide, MLP)
    return found


def ends(model: nn.Module, blocks: str, d_model: int) -> dict[str, Found]:
    """`hook_embed`, the token embedding, and `ln_final`, the one norm beside the list of blocks."""
    found = {}
    getter = getattr(model, "get_input_embeddings", None)
    embedding: Any = getter() if getter else None
    path = next((path for path, module in model.named_modules() if module is embedding), None)
    if path and hasattr(embedding, "embedding_dim"):
        found["hook_embed"] = Found(path, "output", int(embedding.embedding_dim), EMBEDDING)
    beside = blocks.rpartition(".")[0]
    norms = [name for name, module in model.get_submodule(beside).named_children()
             if "Norm" in type(module).__name__ and "emb" not in name]  # fmt: skip
    if len(norms) == 1:
        found["ln_final"] = Found(f"{beside}.{norms[0]}".lstrip("."), "output", d_model, NORM)
    return found
