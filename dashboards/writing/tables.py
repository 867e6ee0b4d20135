"""The same data as tables, read back from the chunks themselves: Parquet files beside the page."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from saelab.base.errors import FormatError
from saelab.base.files import whole_folder
from saelab.dashboards.writing import codec

TABLES = ("features.parquet", "examples.parquet", "neighbours.parquet", "logits.parquet", "manifest.json")


class Data:
    """A dashboard's chunks, decoded when asked for."""

    def __init__(self, manifest: Mapping[str, Any], containers: Mapping[str, bytes]) -> None:
        self.manifest, self.containers = manifest, containers
        self.vocab = self["vocab"]
        ends = np.cumsum(self.vocab["length"], dtype=np.int64)
        blob = self.vocab["bytes"].tobytes()
        self._words = [blob[e - n : e] for e, n in zip(ends.tolist(), self.vocab["length"].tolist(), strict=True)]

    def __getitem__(self, name: str) -> dict[str, Any]:
        if name not in self.containers:
            raise FormatError(f"the dashboard has no chunk {name!r}, which its manifest speaks of")
        return codec.decode(self.containers[name])[1]

    def words(self, local: np.ndarray) -> list[str | None]:
        """Each token as text (invalid bytes as U+FFFD), None for none."""
        none = codec.none_of(local.dtype)
        return [None if t == none else self._words[t].decode("utf-8", "replace") for t in local.tolist()]

    def pages(self, sae: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        """(columns, first window of each latent and the end) of each chunk of pages."""
        for i in range(-(-sae["pages"] // sae["per_chunk"])):
            columns = self[f"{sae['prefix']}f-{i:05d}"]
            yield columns, np.concatenate([[0], np.cumsum(columns["windows"], dtype=np.int64)])

    def labels(self, sae: Mapping[str, Any]) -> dict[int, str]:
        """Label by latent."""
        name = sae["prefix"] + "lab"
        if name not in self.containers:
            return {}
        found = self[name]
        return dict(zip(found["latent"].tolist(), codec.cut(found["text"], found["length"]), strict=True))


def write_parquet(data: Data, folder: Path) -> None:
    """`features`, `examples`, `neighbours` and `logits` as Parquet, for polars or duckdb; column `sae` is "a" or "b".

    The folder is made, or is one that this has written before: whole or not at all. Raises `CheckpointError` where the
    folder holds something else.
    """
    import pyarrow
    from pyarrow.parquet import write_table

    tables: dict[str, dict[str, list[Any]]] = {}
    for sae in data.manifest["saes"]:
        for name, rows in _rows(data, sae):
            table = tables.setdefault(name, {})
            before = max(map(len, table.values()), default=0)
            added = len(rows["latent"])
            for column in {**table, **rows}:  # of two SAEs one may have columns that the other has not
                values = table.setdefault(column, [None] * before)
                values.extend(rows.get(column, [None] * added))
    with whole_folder(folder, manifest={"format": "saelab-tables", "version": 1}) as temporary:
        for name, columns in tables.items():
            write_table(pyarrow.table(columns), temporary / f"{name}.parquet")


def _rows(data: Data, sae: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, list[Any]]]]:
    which = "b" if sae["prefix"] else "a"
    index, more = data[sae["prefix"] + "idx-0"], data[sae["prefix"] + "idx-1"]
    n = len(index["count"])
    labels = data.labels(sae)
    yield "features", {
        "sae": [which] * n, "latent": list(range(n)), "label": [labels.get(i) for i in range(n)],
        **{k: index[k].tolist() for k in ("count", "max", "mean", "flags", "focus")},
        **{f"token_{j}": data.words(index[f"tok{j}"]) for j in range(3)},
        **{k: _known(v) for k, v in more.items()},
    }  # fmt: skip
    groups = [group["name"] for group in data.manifest["groups"]]
    for columns, _ in data.pages(sae):
        owner = np.repeat(columns["latent"], columns["windows"]).tolist()
        pool = data.words(columns["pool"])
        spans = list(zip(columns["offset"].tolist(), columns["length"].tolist(), strict=True))
        scale = np.repeat(columns["scale"], columns["windows"])
        stops = np.cumsum(columns["length"], dtype=np.int64)
        yield "examples", {
            "sae": [which] * len(owner), "latent": owner, "group": [groups[g] for g in columns["group"]],
            **{k: columns[k].tolist() for k in ("context", "document", "start", "peak", "act")},
            **_sources(columns),
            "tokens": [pool[o : o + m] for o, m in spans],
            "acts": [(columns["acts"][stop - n : stop] * (s / 255)).tolist()
                     for (_, n), stop, s in zip(spans, stops, scale, strict=True)],
        }  # fmt: skip
        yield from _lists(data, columns, which)


def _known(column: np.ndarray) -> list[Any]:
    """The values, None where there is none."""
    return (
        [None if v == codec.none_of(column.dtype) else v for v in column.tolist()]
        if column.dtype.kind == "u"
        else column.tolist()
    )


def _sources(columns: dict[str, Any]) -> dict[str, list[Any]]:
    """Of an attention layer's peaks: how many tokens back, which head, how much."""
    if "dfa_n" not in columns:
        return {}
    ends = np.cumsum(columns["dfa_n"], dtype=np.int64)[:-1]
    return {f"source_{name}": [part.tolist() for part in np.split(columns[column], ends)]
            for name, column in (("back", "dfa_back"), ("head", "dfa_head"), ("value", "dfa"))}  # fmt: skip


def _lists(data: Data, columns: dict[str, Any], which: str) -> Iterator[tuple[str, dict[str, list[Any]]]]:
    for kind, other, value in (
        ("decoder", "dec_near", "dec_cos"),
        ("encoder", "enc_near", "enc_cos"),
        ("coactivation", "coact", "coact_both"),
    ):
        real = columns[other] != codec.none_of(columns[other].dtype)
        table = _listed(columns, kind, which, len(columns[other]))
        table |= {"other": columns[other], "value": columns[value].astype(np.float64)}
        if kind == "coactivation":
            table |= {name: columns[f"coact_{name}"] for name in ("before", "after", "lag")}
        yield "neighbours", {name: values[real].tolist() for name, values in table.items()}
    for kind in ("top", "bottom", "raw_top", "raw_bottom"):
        if kind in columns:
            listed = {k: v.tolist() for k, v in _listed(columns, kind, which, len(columns[kind])).items()}
            values = columns[kind + "_value"].astype(np.float64).tolist()
            yield "logits", {**listed, "token": data.words(columns[kind]), "value": values}


def _listed(columns: dict[str, Any], kind: str, which: str, n: int) -> dict[str, np.ndarray]:
    """The first columns of a table with as many rows for each latent."""
    latents = np.repeat(columns["latent"], n // len(columns["latent"]))
    return {"sae": np.full(n, which), "latent": latents, "kind": np.full(n, kind)}
