"""Recursive direct attribution: from a latent back through attention and residual SAEs to the tokens that fired it.

The idea is Kissane et al.'s (arXiv 2406.17759), who describe it without numbers: attention is linear with its pattern
frozen, so a latent of an attention layer is a sum over features of the stream at its sources, these are (affine readings of
the stream) sums over what earlier layers wrote, and so on. Rules of expansion and stopping are ours:

    contribution(child) = contribution(parent) * u_child / f_parent,   with sum over children of u + bias = f_parent,

so that contributions to the root add up level by level (multiplied weights along a path would count an activation twice).
What is pruned stays as two nodes a parent, its positive and its negative sum, errors apart: nothing is lost at any pruning.
"""

import heapq
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from saelab.analysis.circuits.circuit import Circuit, Edge, Node
from saelab.analysis.circuits.frozen import check_latent, readers
from saelab.analysis.circuits.stream import ATTENTION, BIAS, ERROR, RESIDUAL, REST, Stream, order, place_of
from saelab.base import checks
from saelab.base.errors import DataError
from saelab.base.protocols import Dictionary

if TYPE_CHECKING:
    from saelab.models.language import LanguageModel

_Key = tuple[str, str, int, int, int]  # kind, of, block, position, latent


def trace(
    sae: Dictionary,
    lm: "LanguageModel",
    text: Any,
    latent: int,
    position: int | None = None,
    *,
    saes: Dictionary | Iterable[Dictionary] = (),
    depth: int = 2,
    keep: float = 0.9,
    most: int = 24,
    share: float = 0.01,
) -> Circuit:
    """The graph of what fired a latent at a position of a text.

    From a latent of an attention layer one goes to the features of the stream before that layer at each source (to what was
    written to the stream, where no SAE of it is given); from a feature of the stream to what was written before it at its
    position: latents of earlier attention layers (the whole layer's output, where no SAE of it is given), MLPs, the
    embedding. A node that several parents read is one node.

    Args:
        sae: of the root; an attention layer's `hook_z`, or the stream between blocks.
        lm: the model of all SAEs.
        text: one text, or tokens of one.
        latent: the root's number.
        position: where; by default that of the largest pre-activation.
        saes: further SAEs, at most one for each site; those of later blocks are not used.
        depth: how often nodes are expanded; the root's children are at depth 1.
        keep: share of the absolute contributions of a node's children that is kept, the largest first.
        most: children of a node at most, whatever their share.
        share: a node is expanded if its contribution is at least this share of the root's pre-activation.

    The first position, special tokens and high norms, which an SAE is not for, are all error. Raises `ConfigError` for
    arguments that cannot work, two SAEs of one site or another kind of site, `DataError` for several texts or a position
    that is not there.

    >>> trace(sae, lm, "The state of the union", 123, saes=[residual_sae, earlier_sae])  # doctest: +SKIP
    """
    kind, block = place_of(sae, lm)
    number = int(check_latent(sae, latent))
    depth, most = checks.count("depth", depth), checks.count("most", most)
    keep, share = checks.number("keep", keep, above=0, most=1), checks.number("share", share, least=0)
    saes = saes if isinstance(saes, Iterable) else [saes]
    others = [other for other in saes if other is not sae]
    stream = Stream(lm, text, [sae, *others], end=(kind, block))
    at = _strongest(stream, kind, block, number) if position is None else _checked(stream, position)
    growing = _Growing(stream, keep, most)
    root = growing.node((kind, kind, block, at, number), depth=0)
    reading = stream.reading(kind, block, at, number)
    root.contribution, root.activation = reading.total, reading.total
    growing.grow(depth, share * abs(reading.total))
    tokens = [lm.token_text(int(token)) for token in stream.tokens.ids[0]]
    known = {place: _described(own) for place, own in stream.saes.items()}
    settings = {"depth": depth, "keep": keep, "most": most, "share": share}
    return Circuit(growing.nodes, growing.edges, tokens, lm.name, known, settings)


def _described(sae: Dictionary) -> dict[str, Any]:
    known = sae.metadata
    return {"site": known["site"], "d_sae": sae.d_sae, "cfg": repr(sae.cfg), "labels": known.get("labels")}


def _strongest(stream: Stream, kind: str, block: int, latent: int) -> int:
    x = stream.read_by(kind, block)
    weights = readers(stream.saes[kind, block], torch.tensor([latent])).weights[0].to(x)
    return int((x[0] @ weights).masked_fill(~stream.tokens.mask[0], -torch.inf).argmax())


def _checked(stream: Stream, position: int) -> int:
    at, length = checks.count("position", position, least=-(2**62)), stream.tokens.ids.shape[1]
    if not 0 <= at < length:
        raise DataError(f"there is no position {at}: the text has {length} tokens, from 0 on")
    return at


class _Growing:
    """Nodes and edges so far; nodes are known by their keys."""

    def __init__(self, stream: Stream, keep: float, most: int) -> None:
        self.stream, self.keep, self.most = stream, keep, most
        self.nodes: list[Node] = []
        self.edges: list[Edge] = []
        self._by_key: dict[_Key, Node] = {}

    def node(self, key: _Key, depth: int, activation: float = float("nan")) -> Node:
        """The node of a key, made at its first mention."""
        found = self._by_key.get(key)
        if found is None:
            kind, of, block, position, latent = key
            found = Node(len(self.nodes), kind, of, block, position, latent, activation, depth)
            self._by_key[key] = found
            self.nodes.append(found)
        found.depth = min(found.depth, depth)
        return found

    def grow(self, depth: int, least: float) -> None:
        """Expand the root, and every node above `depth` that contributes at least `least` and can be expanded."""
        waiting = [(-order(self.nodes[0].kind, self.nodes[0].block), 0)]
        while waiting:
            _, index = heapq.heappop(waiting)
            node = self.nodes[index]
            # every parent of it has been expanded: they come later in the model
            small = index > 0 and abs(node.contribution) < least
            if node.depth >= depth or small or node.kind not in (ATTENTION, RESIDUAL):
                continue
            for child in self.expand(node):
                if child.kind in (ATTENTION, RESIDUAL):
                    heapq.heappush(waiting, (-order(child.kind, child.block), child.id))

    def expand(self, parent: Node) -> list[Node]:
        """Add a node's children and what is pruned; the children that were not there before."""
        reading = self.stream.reading(parent.kind, parent.block, parent.position, parent.latent)
        # of a root that reads nothing at all, the readings themselves
        scale = parent.contribution / reading.total if reading.total else 1.0
        terms = reading.terms[np.argsort(-np.abs(reading.terms["value"]), kind="stable")]
        mass = np.abs(terms["value"])
        enough = int(np.searchsorted(np.cumsum(mass), self.keep * mass.sum())) + 1
        kept = terms[: min(enough, self.most)]
        before = len(self.nodes)
        for term in kept[kept["value"] != 0]:
            key = (str(term["kind"]), str(term["of"]), int(term["block"]), int(term["position"]), int(term["latent"]))
            child = self.node(key, parent.depth + 1, float(term["activation"]))
            head = -1 if reading.heads is None else int(reading.heads[term["position"]])
            self._join(child, parent, float(term["value"]) * scale, head)
        self._remainders(parent, terms[len(kept) :], scale)
        bias = self._own(parent, BIAS, "", 1)
        self._join(bias, parent, reading.bias * scale)
        parent.expanded = True
        parent.kept_mass = float(mass[: len(kept)].sum() / mass.sum()) if mass.sum() else 1.0
        return self.nodes[before:]

    def _remainders(self, parent: Node, pruned: np.ndarray, scale: float) -> None:
        """What was pruned, summed: errors and the rest, what adds and what takes away."""
        for kind in (REST, ERROR):
            mine = pruned[(pruned["kind"] == ERROR) == (kind == ERROR)]["value"] * scale
            for sign, part in (("+", mine[mine > 0]), ("-", mine[mine < 0])):
                if len(part):
                    self._join(self._own(parent, kind, sign, len(part)), parent, float(part.sum()))

    def _own(self, parent: Node, kind: str, sign: str, members: int) -> Node:
        """A node that belongs to one parent: its bias, or a remainder."""
        node = Node(len(self.nodes), kind, sign, parent.block, parent.position if kind == BIAS else -1, -1, float("nan"),
                    parent.depth + 1, members=members)  # fmt: skip
        self.nodes.append(node)
        return node

    def _join(self, child: Node, parent: Node, contribution: float, head: int = -1) -> None:
        child.contribution += contribution
        self.edges.append(Edge(child.id, parent.id, contribution, head))
