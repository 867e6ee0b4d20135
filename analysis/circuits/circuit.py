"""The graph of a recursive attribution: nodes, edges, what they sum to; as tables, JSON and a page."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from saelab.base.files import whole_file

if TYPE_CHECKING:
    from pandas import DataFrame

FORMAT, VERSION = "saelab-circuit", 1
LATENTS = ("attention", "residual")


@dataclass
class Node:
    """What adds to the root: a latent, something written to the stream, an error, a bias, or a pruned remainder.

    `kind`: "attention" or "residual" (a latent of an SAE there), "mlp", "attention output", "embedding", "error", "bias",
    "rest". `of`: of an error, whose SAE; of a remainder, its sign. `block`: of the residual kinds, the one before which the
    stream is read; -1 of the embedding. `position` and `latent` are -1 where there is none, `activation` is NaN.
    `contribution`: to the root's pre-activation, over all parents. `members`: how many terms a remainder sums. `kept_mass`:
    of an expanded node, the share of its children's absolute contributions that is shown one by one.
    """

    id: int
    kind: str
    of: str
    block: int
    position: int
    latent: int
    activation: float
    depth: int
    contribution: float = 0.0
    expanded: bool = False
    members: int = 1
    kept_mass: float = float("nan")


@dataclass(frozen=True)
class Edge:
    """`child` gives `contribution` to the root by way of `parent`; `head` moves most from the child's position to an
    attention latent, -1 elsewhere."""

    child: int
    parent: int
    contribution: float
    head: int = -1


@dataclass(frozen=True)
class Sums:
    """What a circuit adds up to, over the nodes that were not expanded. `gap` is root - (kept + rest + error + bias),
    `absolute` the sum of their absolute contributions: rounding leaves gap / absolute below 1e-3."""

    root: float
    kept: float
    rest: float
    error: float
    bias: float
    absolute: float
    gap: float


@dataclass(frozen=True, repr=False)
class Circuit:
    """What fired a latent, as a graph; `saelab.analysis.circuits.recursive_dfa.trace` makes it. `nodes[0]` is the root.

    `tokens` are the texts of the tokens, `saes` what is known of each SAE by (kind, block): site, d_sae, cfg, labels.
    `settings` are those of `trace`. Edges lead from a child to its parent, which stands later in the model.
    """

    nodes: Sequence[Node]
    edges: Sequence[Edge]
    tokens: Sequence[str]
    model: str
    saes: Mapping[tuple[str, int], Mapping[str, Any]]
    settings: Mapping[str, Any]

    @property
    def root(self) -> Node:
        return self.nodes[0]

    @property
    def sums(self) -> Sums:
        """What the nodes that were not expanded add up to, by kind."""
        parts = dict.fromkeys(("kept", "rest", "error", "bias"), 0.0)
        absolute = 0.0
        for node in self.nodes:
            if not node.expanded:
                parts[node.kind if node.kind in parts else "kept"] += node.contribution
                absolute += abs(node.contribution)
        root = self.root.activation
        return Sums(root=root, **parts, absolute=absolute, gap=root - sum(parts.values()))

    def name(self, node: Node) -> str:
        """A node in words: "attention 17 · 123", "MLP 3", "error of residual 2", "rest +"."""
        if node.kind in LATENTS:
            return f"{node.kind} {node.block} · {node.latent}"
        if node.kind == "error":
            return f"error of {node.of} {node.block}" if node.of in LATENTS else f"errors {node.of}"
        words = {"mlp": f"MLP {node.block}", "attention output": f"attention {node.block}", "rest": f"rest {node.of}"}
        return words.get(node.kind, node.kind)

    def label(self, node: Node) -> str:
        """The label of a latent, where its SAE has one."""
        labels = self.saes.get((node.kind, node.block), {}).get("labels") or {}
        return str(labels.get(str(node.latent), ""))

    def to_pandas(self) -> "DataFrame":
        """One row a node: its fields, its name, label and token, and the share of the root's pre-activation."""
        import pandas as pd

        rows = [
            {
                **dataclasses.asdict(node), "name": self.name(node), "label": self.label(node), "token": self._token(node),
                "share": node.contribution / self.root.activation if self.root.activation else math.nan,
            }
            for node in self.nodes
        ]  # fmt: skip
        return pd.DataFrame(rows).set_index("id")

    def edge_table(self) -> "DataFrame":
        """One row an edge: child, parent (node ids), contribution, head (-1 where there is none)."""
        import pandas as pd

        return pd.DataFrame([dataclasses.asdict(edge) for edge in self.edges])

    def by_token(self) -> "DataFrame":
        """What came from each token: position, token, and the summed contributions of the nodes there that were not
        expanded, in all and apart for `embedding`, `error` and the rest of them; position -1 is what has no place
        (remainders)."""
        import pandas as pd

        rows: dict[int, dict[str, Any]] = {}
        for node in self.nodes:
            if node.expanded:
                continue
            row = rows.setdefault(node.position, {"position": node.position, "token": self._token(node), "contribution": 0.0,
                                                  "embedding": 0.0, "error": 0.0, "other": 0.0})  # fmt: skip
            kind = node.kind if node.kind in ("embedding", "error") else "other"
            row[kind] += node.contribution
            row["contribution"] += node.contribution
        return pd.DataFrame([rows[position] for position in sorted(rows)])

    def to_dict(self) -> dict[str, Any]:
        """The graph as JSON can hold it: null for what is not there."""
        nodes = []
        for node in self.nodes:
            fields = {**dataclasses.asdict(node), "name": self.name(node), "label": self.label(node)}
            for key in ("block", "position", "latent"):
                fields[key] = None if fields[key] < 0 else fields[key]
            nodes.append({key: _finite(value) for key, value in fields.items()})
        edges = [{**dataclasses.asdict(edge), "head": None if edge.head < 0 else edge.head} for edge in self.edges]
        saes = [
            {"kind": kind, "block": block, **{k: v for k, v in known.items() if k != "labels"}}
            for (kind, block), known in sorted(self.saes.items())
        ]
        return {
            "format": FORMAT, "version": VERSION, "model": self.model, "tokens": list(self.tokens), "saes": saes,
            "settings": dict(self.settings), "sums": {k: _finite(v) for k, v in dataclasses.asdict(self.sums).items()},
            "nodes": nodes, "edges": edges,
        }  # fmt: skip

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict` to a file, whole or not at all."""
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False), encoding="utf-8")

    def to_html(self, path: str | os.PathLike[str], pages: Mapping[str, str] | None = None) -> None:
        """Write a page that shows the graph: one file that opens anywhere and reaches no network.

        `pages` says where the dashboards of the SAEs are, by site: {"blocks.16.attn.hook_z": "z16.html"}; relative to the
        page, a file: or an http(s): address. Latents then link to theirs. Raises `ConfigError` for another kind of address.
        """
        from saelab.analysis.circuits.circuit_page import page

        with whole_file(path) as temporary:
            temporary.write_text(page(self.to_dict(), pages or {}), encoding="utf-8", newline="\n")

    def _token(self, node: Node) -> str:
        return self.tokens[node.position] if node.position >= 0 else ""

    def __repr__(self) -> str:
        sums, root = self.sums, self.root
        share = sums.kept / sums.root if sums.root else math.nan
        return (
            f"Circuit({self.name(root)} at {root.position} {self._token(root)!r}: {len(self.nodes)} nodes, "
            f"{len(self.edges)} edges, kept {share:.0%} of {sums.root:.4g})"
        )


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
