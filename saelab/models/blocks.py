"""Where a transformer keeps what TransformerLens names: measured, from what a few tokens leave in the model.

A name is given where the module holds what the name means: the output of a block is what the next one reads; what attention and
MLP give adds up to the block's change of the stream; what stands between them is the stream with attention's part added. A
block that scales or norms what it adds has no module that gives it, and no such name.

Which modules are looked at is a matter of `Words`: `USUAL` has what most models call their parts, an adapter of TransformerLens
(`saelab.models.adapters`) what its family calls them. Either has to pass the same sums.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saelab.models.site_names import ATTENTION, EMBEDDING, KINDS, MLP, NORM, PROJECTION, RESIDUAL, Side

# runs a few tokens and gives what passed, of the modules that ran
Reader = Callable[[Mapping[Any, tuple[nn.Module, Side]]], Mapping[Any, Tensor]]


class Words(NamedTuple):
    """By what the path of a module below its block tells the part that it is; `attends` looks at "path Class".

    `mixes`: of attention, or of what stands for it; `attends`: attention itself; `writes`: of the MLP; `norms`; `ends`: the
    last projection of attention or MLP; `begins`: the first of the MLP, the likeliest pattern first; `projects`: what
    makes queries, keys and values.
    """

    mixes: re.Pattern[str]
    attends: re.Pattern[str]
    writes: re.Pattern[str]
    norms: re.Pattern[str]
    ends: re.Pattern[str]
    begins: tuple[re.Pattern[str], ...]
    projects: tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]]


def _named(*names: str) -> re.Pattern[str]:
    """Paths whose last name is one of these."""
    return re.compile(rf"(?:^|\.)(?:{'|'.join(names)})$")


USUAL = Words(
    mixes=re.compile(r"^[^.]*(?:attn|attention|temporal_block|mixer|mamba|conv(?=\.|$))", re.I),
    # linear attention and the like go from state to state: no attention to anything
    attends=re.compile(r"(?:^|\.)(?!ln|[^. ]*(?:norm|linear_attn|mamba|mixer))[^. ]*(?:attn|attention)[^. ]* "
                       r"|(?:^|\.)temporal_block \w*Attention$", re.I),
    writes=re.compile(r"^[^.]*(?:mlp|ffn|feed_?forward|moe|fc2(?=\.|$))", re.I),
    norms=re.compile(r"(?:^|\.)(?:ln[^.]*|[^.]*norm[^.]*)$", re.I),
    ends=_named("o_proj", "out_proj", "c_proj", "dense", "wo", "fc_out", "fc2", "down_proj", "dense_4h_to_h", "w2"),
    begins=tuple(_named(name) for name in ("gate_proj", "up_proj", "c_fc", "fc1", "fc_in", "dense_h_to_4h")),
    projects=(_named("q_proj", "query"), _named("k_proj", "key"), _named("v_proj", "value")),
)  # fmt: skip

# What a block with attention and an MLP has; queries and the like are one with others, or the stream has no middle, in many.
_COMPLETE = ("attn.hook_z", "hook_attn_out", "mlp.hook_pre", "mlp.hook_post", "hook_mlp_out")


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


def measured(
    model: nn.Module, n_layers: int, heads: int, read: Reader, other: Callable[[], Words | None]
) -> tuple[str, dict[str, Found]]:
    """The path of the list of blocks and name -> place; empty where no such list passes one stream from block to block.

    `other` words are asked for where the usual ones leave a name out, and stand where those are silent.
    """
    for path, blocks in block_lists(model):
        if len(blocks) != n_layers:
            continue
        passed = _passed(blocks, read)
        if not _one_stream(passed):
            continue
        inside = [_inside(block, heads, USUAL) for block in passed]
        if not all(hook in found for found in inside for hook in _COMPLETE) and (words := other()) is not None:
            inside = [_inside(block, heads, words) | found for block, found in zip(passed, inside, strict=True)]
        return path, {
            f"blocks.{layer}.{hook}": found[hook]._replace(path=f"{path}.{layer}.{found[hook].path}".rstrip("."))
            for layer, found in enumerate(inside)
            for hook in KINDS
            if hook in found
        }
    return "", {}


class Passed(NamedTuple):
    """What went into and came out of a block, and of the modules in it by path; `kinds` are "path Class"."""

    pre: Tensor
    post: Tensor
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    kinds: tuple[str, ...]

    def at(self, path: str) -> Float[Tensor, "batch position width"]:
        """The output in the shape of the stream (some families run their MLP on rows without a batch)."""
        return self.outputs[path].reshape(self.pre.shape)

    def of_stream(self) -> list[str]:
        """Paths whose outputs are as many numbers as the stream."""
        return [path for path, x in self.outputs.items() if x.numel() == self.pre.numel()]


def _passed(blocks: nn.ModuleList, read: Reader) -> list[Passed]:
    """Of every block, from one run; nothing where a block gives no tensor. A module that several share is the first one's,
    whose run is read."""
    owners: dict[nn.Module, tuple[int, str]] = {}
    for layer, block in enumerate(blocks):
        for path, module in block.named_modules():
            # a dropout gives what it gets where nothing is dropped
            if path.count(".") < 3 and not isinstance(module, nn.ModuleList | nn.Dropout):
                owners.setdefault(module, (layer, path))
    found = read({(*owner, side): (m, side) for m, owner in owners.items() for side in ("input", "output")})
    passed = []
    for layer in range(len(blocks)):
        inputs, outputs = ({path: x for (at, path, which), x in found.items() if (at, which) == (layer, side)}
                           for side in ("input", "output"))  # fmt: skip
        kinds = tuple(f"{path} {type(m).__name__}" for m, (at, path) in owners.items() if at == layer and path)
        if "" not in inputs or "" not in outputs:
            return []
        passed.append(Passed(inputs.pop(""), outputs.pop(""), inputs, outputs, kinds))
    return passed


def _one_stream(passed: list[Passed]) -> bool:
    """Whether the output of each block is what the next one reads."""
    alike = all(block.pre.ndim == 3 and block.pre.shape == block.post.shape for block in passed)
    return bool(passed) and alike and all(torch.equal(one.post, two.pre) for one, two in itertools.pairwise(passed))


def _inside(block: Passed, heads: int, words: Words) -> dict[str, Found]:
    shape, outputs = block.pre.shape, block.outputs
    width = shape[-1]
    found = {"hook_resid_pre": Found("", "input", width, RESIDUAL)}
    mixing, writing = _added(block, words) or (None, None)
    attention = next((kind.partition(" ")[0] for kind in block.kinds if words.attends.search(kind)), None)
    if attention:
        found |= _of_attention(block, words, attention, mixing, heads)
    if (
        attention
        and mixing
        and (mixing.startswith(attention) or words.norms.search(mixing))
        and outputs[mixing].shape == shape
    ):
        found["hook_attn_out"] = Found(mixing, "output", width, ATTENTION)
    between = _between(block, mixing or next((path for path in outputs if words.mixes.search(path)), None))
    if between:
        found["hook_resid_mid"] = Found(between, "input", width, RESIDUAL)
    if writing and outputs[writing].shape == shape:
        found |= _of_mlp(block, words, writing)
        found["hook_mlp_out"] = Found(writing, "output", width, MLP)
    found["hook_resid_post"] = Found("", "output", width, RESIDUAL)
    return found


def _added(block: Passed, words: Words) -> tuple[str, str | None] | None:
    """The module of the attention (or what stands for it) and that of the MLP that add up to the block's change."""
    paths = sorted(block.of_stream(), key=lambda path: (bool(words.norms.search(path)), path.count(".")))
    mixing = [path for path in paths if words.mixes.search(path) or words.norms.search(path)]
    writing = [path for path in paths if words.writes.search(path) or words.norms.search(path)]
    for one in mixing:
        if _close(block.post, block.pre, block.at(one)):
            return one, None
        for other in writing:
            if other != one and _close(block.post, block.pre, block.at(one), block.at(other)):
                return one, other
    return None


def _close(total: Tensor, *parts: Tensor) -> bool:
    """Whether the parts add up to the total, but for the rounding of each number."""
    size = sum((part.abs().double() for part in parts), total.abs().double())
    rest = total.double() - sum(part.double() for part in parts)
    return bool((rest.abs() <= 16 * torch.finfo(total.dtype).eps * size).all())


def _between(block: Passed, mixing: str | None) -> str | None:
    """The first module that reads the stream with attention's part added, from where it goes on to the end of the block with
    another module's part; both may be scaled. None where MLP and attention run side by side, or the stream itself is normed."""
    if mixing is None or mixing not in block.of_stream():
        return None
    for path, x in block.inputs.items():
        if x.shape == block.pre.shape and _multiple(x, block.pre, block.at(mixing)):
            later = (other for other in block.of_stream() if other != mixing)
            return path if any(_multiple(block.post, x, block.at(other)) for other in later) else None
    return None


def _multiple(total: Tensor, start: Tensor, part: Tensor) -> bool:
    """Whether total = start + c part, for some number c that is not 0."""
    change, step = total.double() - start.double(), part.double()
    scale = (change * step).sum() / (step * step).sum()
    return bool(scale.abs() > 1e-3) and _close(total, start, scale * step)


def _of_attention(block: Passed, words: Words, attention: str, mixing: str | None, heads: int) -> dict[str, Found]:
    found = {}
    own = {path: x for path, x in block.outputs.items() if path.startswith(f"{attention}.") and x.ndim == 3}
    made = [[path for path in own if pattern.search(path)] for pattern in words.projects]
    if all(len(paths) == 1 for paths in made):
        for letter, (path,) in zip("qkv", made, strict=True):
            found[f"attn.hook_{letter}"] = Found(path, "output", own[path].shape[-1], PROJECTION)
    last = [path for path in own if words.ends.search(path)]
    if len(last) == 1 and block.inputs[last[0]].ndim == 3 and _gives(block, last[0], attention, mixing):
        wide = block.inputs[last[0]].shape[-1]
        found["attn.hook_z"] = Found(last[0], "input", wide, ATTENTION, heads if wide % heads == 0 else None)
    return found


def _gives(block: Passed, projection: str, module: str, contribution: str | None) -> bool:
    """Whether a projection is what a module ends with, or what it adds to the stream."""
    return projection == contribution or torch.equal(block.outputs[projection], block.outputs[module])


def _of_mlp(block: Passed, words: Words, writing: str) -> dict[str, Found]:
    found = {}
    mlp = writing
    if words.norms.search(writing):
        mlp = next((path for path in block.outputs if words.writes.search(path)), writing)
    elif words.ends.search(writing):
        mlp = writing.rpartition(".")[0]
    own = [path for path in block.outputs if path.rpartition(".")[0] == mlp]
    last = [path for path in own if words.ends.search(path)]
    if (
        len(last) == 1
        and block.inputs[last[0]].ndim == 3
        and (last[0] == writing or _gives(block, last[0], mlp, writing))
    ):
        wide = block.inputs[last[0]].shape[-1]
        first = next((path for pattern in words.begins for path in own if pattern.search(path)), None)
        if first and block.outputs[first].shape[-1] == wide:
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
